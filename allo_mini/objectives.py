"""What each stage minimizes: log-probs of a micro-batch -> loss and metrics. Equations: losses.py.

ALLO's own come first, then those of the methods it is compared with. A loss is a sum; the loop in
train.py divides it by the units of the whole step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from allo_mini import losses
from allo_mini.logprobs import by_response

LN2 = math.log(2)


@dataclass
class Objective:
    """loss(logps, ref, real, examples) -> (sum of losses, {metric: one value an example}), where

        logps, ref [R,T]   per-token log-probs of the R responses; of pairs, rows alternate y+, y-
        real [R,T] bool    which of them are tokens

    units(example): what the sum is divided by: pairs, tokens, or weights that are not 0.
    first_loss(examples): the loss while theta = theta_ref, which is checked; None: no reference is
    needed. state: what the loss remembers of earlier steps, saved in checkpoints; after(metrics)
    changes it.
    """
    loss: Callable
    units: Callable
    first_loss: Callable | None = None
    shown: tuple = ("loss", "grad_norm", "learning_rate", "tokens/s")
    state: dict = field(default_factory=dict)
    after: Callable = lambda metrics: None


def sft_objective(cfg=None):
    """Mean negative log-likelihood of the response tokens."""
    def loss(logps, ref, real, examples):
        return losses.sft_loss(logps).sum(), {"logps/chosen": logps.sum(-1)}

    return Objective(loss, lambda example: len(example.responses[0]))


def npo_objective(beta):
    """Forgetting: token-weighted NPO over y-, divided by the number of weights that are not 0."""
    def loss(logps, ref, real, examples):
        rows = [torch.tensor(example.weights) for example in examples]
        flat = torch.cat(rows).to(logps.device, non_blocking=True)
        weights, _ = by_response(flat, list(map(len, rows)))  # [R,T]
        values = losses.npo_loss(logps, ref, weights, beta)
        return values.sum(), {
            "rewards/rejected": beta * (logps - ref).sum(-1),
            "logps/rejected": logps.sum(-1),
            "token_weight/fraction": (weights != 0).sum(-1) / real.sum(-1)}

    def units(example):
        return sum(w != 0 for w in example.weights)

    def first_loss(examples):
        total = sum(sum(example.weights) for example in examples)
        return LN2 * total / sum(map(units, examples))

    shown = "loss", "rewards/rejected", "token_weight/fraction", "grad_norm", "tokens/s"
    return Objective(loss, units, first_loss, shown)


def pair_objective(loss_of, beta, first_loss, epsilon=1.0, mean=False):
    """Mean over pairs of loss_of(scores, lengths); of y-'s tokens only the share `epsilon` counts.

    scores: chosen, rejected, ref_chosen, ref_rejected [B], log-probs summed over the tokens that
    count, or with `mean` averaged; lengths: tokens of y+ and y- [B]. The logged rewards are of
    whole responses: beta log pi_theta/pi_ref; without a reference (first_loss None) beta times the
    mean log-prob of a token.
    """
    def loss(logps, ref, real, examples):
        n = real.sum(-1)  # [R]
        useful = losses.useful_token_mask(logps[1::2], ref[1::2], real[1::2], epsilon)  # [B,T]
        counted = real.clone()
        counted[1::2] = useful
        length = n if mean else 1
        now = (logps * counted).sum(-1) / length
        before = (ref * counted).sum(-1) / length
        now, before, lengths = (x.view(-1, 2).T for x in (now, before, n))  # of y+ and y- [2,B]
        values = loss_of((*now, *before), lengths)
        ratios = (logps - ref).sum(-1) if first_loss else logps.sum(-1) / n
        up, down = (beta * ratios).view(-1, 2).T
        chosen, rejected = logps.sum(-1).view(-1, 2).T
        return values.sum(), {
            "rewards/chosen": up,
            "rewards/rejected": down,
            "rewards/margins": up - down,
            "rewards/accuracies": up > down,
            "logps/chosen": chosen, "logps/rejected": rejected,
            "useful/fraction": useful.sum(-1) / n[1::2]}

    shown = ["loss", "rewards/margins", "rewards/accuracies", "grad_norm", "tokens/s"]
    if epsilon < 1:
        shown.insert(3, "useful/fraction")
    return Objective(loss, lambda example: 1, first_loss, shown)


def dpo_objective(beta, epsilon=1.0):
    """DPO over whole pairs; with epsilon < 1 improving: only y-'s most useful tokens count."""
    def loss_of(scores, lengths):
        return losses.dpo_loss(*scores, beta)

    return pair_objective(loss_of, beta, lambda examples: LN2, epsilon)


# ---- the methods that ALLO is compared with ----------------------------------------------------

def rdpo_objective(cfg):
    """R-DPO: DPO whose reward pays rdpo_alpha for every token."""
    def loss_of(scores, lengths):
        return losses.rdpo_loss(*scores, *lengths, cfg.beta, cfg.rdpo_alpha)

    def first_loss(examples):
        pairs = [example.responses for example in examples]
        longer = torch.tensor([len(chosen) - len(rejected) for chosen, rejected in pairs])
        return float(-F.logsigmoid(cfg.rdpo_alpha * longer).mean())

    return pair_objective(loss_of, cfg.beta, first_loss)


def ipo_objective(cfg):
    """IPO on mean log-probs, as its authors advise for responses of different lengths."""
    def loss_of(scores, lengths):
        return losses.ipo_loss(*scores, cfg.beta)

    start = 1 / (4 * cfg.beta ** 2)
    return pair_objective(loss_of, cfg.beta, lambda examples: start, mean=True)


def simpo_objective(cfg):
    """SimPO: mean log-probs, no reference."""
    def loss_of(scores, lengths):
        return losses.simpo_loss(*scores[:2], cfg.simpo_beta, cfg.simpo_gamma)

    return pair_objective(loss_of, cfg.simpo_beta, None, mean=True)


def bco_objective(cfg):
    """BCO. delta is the mean reward of all steps before this one: micro-batches do not matter."""
    state = {"delta": 0.0, "steps": 0}

    def loss_of(scores, lengths):
        return losses.bco_loss(*scores, cfg.beta, state["delta"])

    def after(metrics):
        mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        state["steps"] += 1
        state["delta"] += (mean - state["delta"]) / state["steps"]

    objective = pair_objective(loss_of, cfg.beta, lambda examples: 2 * LN2)
    objective.state = state
    objective.after = after
    return objective


def sequence_npo_objective(cfg):
    """NPO over whole wrong responses (Zhang et al. 2024, without their 2/beta: AdamW sees none)."""
    def loss(logps, ref, real, examples):
        score = logps.sum(-1)  # [R]
        ref_score = ref.sum(-1)
        reward = cfg.beta * (score - ref_score)
        values = losses.npo_loss(score, ref_score, 1, cfg.beta)
        return values.sum(), {"rewards/rejected": reward, "logps/rejected": score}

    shown = "loss", "rewards/rejected", "grad_norm", "tokens/s"
    return Objective(loss, lambda example: 1, lambda examples: LN2, shown)


BASELINES = {  # method -> its name in the table, its objective
    "sft": ("+SFT", sft_objective),  # on reference solutions
    "rft": ("RFT", sft_objective),  # on the model's own right answers
    "dpo": ("DPO", lambda cfg: dpo_objective(cfg.beta)),
    "rdpo": ("R-DPO", rdpo_objective),
    "ipo": ("IPO", ipo_objective),
    "bco": ("BCO", bco_objective),
    "simpo": ("SimPO", simpo_objective),
    "npo": ("NPO", sequence_npo_objective)}
