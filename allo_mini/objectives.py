"""What each stage minimizes: log-probs of a micro-batch -> loss and metrics. Equations: losses.py.

ALLO's own come first, then those of the methods it is compared with. A loss is a sum; the loop in
train.py divides it by the units of the whole step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch.nn.utils.rnn import pad_sequence

from allo_mini import losses

LN2 = math.log(2)


@dataclass
class Objective:
    """loss(logps, ref, real, examples) -> (sum of losses, {metric: one value an example}), where

        logps, ref [R,T]   per-token log-probs of the R responses; of pairs, rows alternate y+, y-
        real [R,T] bool    which of them are tokens

    units(example): what the sum is divided by: rows, tokens, or weights that are not 0.
    first_loss(examples): the loss while theta = theta_ref, which is checked; None: no reference is
    needed. state: what the loss remembers of earlier steps, saved in checkpoints as JSON;
    after(metrics) changes it.
    """
    loss: Callable
    units: Callable = lambda example: 1
    first_loss: Callable | None = None
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
        weights = pad_sequence(rows, batch_first=True).to(logps.device, non_blocking=True)  # [R,T]
        return losses.npo_loss(logps, ref, weights, beta).sum(), {
            "rewards/rejected": beta * (logps - ref).sum(-1),
            "logps/rejected": logps.sum(-1),
            "token_weight/fraction": (weights != 0).sum(-1) / real.sum(-1)}

    def first_loss(examples):
        return LN2 * fmean(w for example in examples for w in example.weights if w)

    return Objective(loss, lambda example: sum(map(bool, example.weights)), first_loss)


def pair_objective(loss_of, beta, epsilon=1.0, mean=False, reference=True):
    """Mean over pairs of loss_of(scores, lengths); of y-'s tokens only the share `epsilon` counts.

    scores: chosen, rejected, ref_chosen, ref_rejected [B], log-probs summed over the tokens that
    count, or with `mean` averaged; lengths: tokens of y+ and y- [B]. With a reference it depends on
    the ratios alone, so its first loss is that of scores which are all 0. The logged rewards are of
    whole responses: beta log pi_theta/pi_ref. Without a `reference` they are beta times the mean
    log-prob of a token, and `epsilon` does nothing.
    """
    def loss(logps, ref, real, examples):
        # of y+ and y-: [2,B,T]
        logps, ref, real = (x.unflatten(0, (-1, 2)).transpose(0, 1) for x in (logps, ref, real))
        useful = losses.useful_token_mask(logps[1], ref[1], real[1], epsilon)  # [B,T]
        counted = torch.stack((real[0], useful))
        lengths = real.sum(-1)  # [2,B]
        divisor = counted.sum(-1) if mean else 1
        now, before = ((x * counted).sum(-1) / divisor for x in (logps, ref))
        whole = logps.sum(-1)
        ratios = (logps - ref).sum(-1) if reference else whole / lengths
        up, down = beta * ratios
        metrics = {"rewards/chosen": up, "rewards/rejected": down,
                   "rewards/margins": up - down, "rewards/accuracies": up > down,
                   "logps/chosen": whole[0], "logps/rejected": whole[1]}
        if epsilon < 1:
            metrics["useful/fraction"] = useful.sum(-1) / lengths[1]
        return loss_of((*now, *before), lengths).sum(), metrics

    def first_loss(examples):
        lengths = torch.tensor([list(map(len, example.responses)) for example in examples]).T
        return float(loss_of(torch.zeros(4, len(examples)), lengths).mean())

    return Objective(loss, first_loss=first_loss if reference else None)


def dpo_objective(beta, epsilon=1.0):
    """DPO over whole pairs; with epsilon < 1 improving: only y-'s most useful tokens count."""
    return pair_objective(lambda scores, lengths: losses.dpo_loss(*scores, beta), beta, epsilon)


# ---- the methods that ALLO is compared with ----------------------------------------------------

def rdpo_objective(cfg):
    """R-DPO: DPO whose reward loses rdpo_alpha with every token."""
    return pair_objective(
        lambda scores, lengths: losses.rdpo_loss(*scores, *lengths, cfg.beta, cfg.rdpo_alpha),
        cfg.beta)


def ipo_objective(cfg):
    """IPO on mean log-probs, as its authors advise for responses of different lengths."""
    return pair_objective(lambda scores, lengths: losses.ipo_loss(*scores, cfg.beta), cfg.beta,
                          mean=True)


def simpo_objective(cfg):
    """SimPO: mean log-probs, no reference."""
    return pair_objective(
        lambda scores, lengths: losses.simpo_loss(*scores[:2], cfg.simpo_beta, cfg.simpo_gamma),
        cfg.simpo_beta, mean=True, reference=False)


def bco_objective(cfg):
    """BCO. delta is the mean reward of all steps before this one: micro-batches do not matter."""
    state = {"delta": 0.0, "steps": 0}

    def loss_of(scores, lengths):
        return losses.bco_loss(*scores, cfg.beta, state["delta"])

    def after(metrics):
        mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        state["steps"] += 1
        state["delta"] += (mean - state["delta"]) / state["steps"]

    return replace(pair_objective(loss_of, cfg.beta), state=state, after=after)


def sequence_npo_objective(cfg):
    """NPO over whole wrong responses (Zhang et al. 2024, without their 2/beta: AdamW sees none)."""
    def loss(logps, ref, real, examples):
        score, start = logps.sum(-1), ref.sum(-1)  # [R]
        total = losses.npo_loss(score, start, 1, cfg.beta).sum()
        return total, {"rewards/rejected": cfg.beta * (score - start), "logps/rejected": score}

    return Objective(loss, first_loss=lambda examples: LN2)


BASELINES = {  # method -> its name in the table, its objective
    "sft": ("+SFT", sft_objective),  # on reference solutions
    "rft": ("RFT", sft_objective),  # on the model's own right answers
    "dpo": ("DPO", lambda cfg: dpo_objective(cfg.beta)),
    "rdpo": ("R-DPO", rdpo_objective),
    "ipo": ("IPO", ipo_objective),
    "bco": ("BCO", bco_objective),
    "simpo": ("SimPO", simpo_objective),
    "npo": ("NPO", sequence_npo_objective),
    "masked-dpo": ("masked DPO", lambda cfg: dpo_objective(cfg.beta))}  # of located weights
