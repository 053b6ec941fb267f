"""What the methods that ALLO is compared with minimize, in the same loop. Their formulas and sources: losses.py."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from allo_mini import losses
from allo_mini.config import Config
from allo_mini.loop import LN2, Objective, dpo_objective, pair_objective, sft_objective

NAMES = {"sft": "+SFT", "rft": "RFT", "dpo": "DPO", "rdpo": "R-DPO", "ipo": "IPO", "bco": "BCO", "simpo": "SimPO",
         "npo": "NPO"}  # method -> its name in the table


def rdpo_objective(cfg: Config) -> Objective:
    """R-DPO: DPO whose reward pays --rdpo-alpha for every token."""
    def step0(examples):
        longer = [len(chosen) - len(rejected) for chosen, rejected in (e.responses for e in examples)]
        return float(-F.logsigmoid(cfg.rdpo_alpha * torch.tensor(longer)).mean())
    return pair_objective(lambda *args: losses.rdpo_loss(*args, cfg.beta, cfg.rdpo_alpha), cfg.beta, step0)


def ipo_objective(cfg: Config) -> Objective:
    """IPO on mean log-probs, as its authors advise for responses of different lengths."""
    def values(up, down, ref_up, ref_down, n, m):
        return losses.ipo_loss(up / n, down / m, ref_up / n, ref_down / m, cfg.beta)
    return pair_objective(values, cfg.beta, lambda examples: 1 / (4 * cfg.beta ** 2))


def simpo_objective(cfg: Config) -> Objective:
    """SimPO: mean log-probs, no reference model."""
    def values(up, down, ref_up, ref_down, n, m):
        return losses.simpo_loss(up / n, down / m, cfg.simpo_beta, cfg.simpo_gamma)
    return pair_objective(values, cfg.simpo_beta, None)


def bco_objective(cfg: Config) -> Objective:
    """BCO. delta is the mean reward of all steps before this one, so that it does not depend on micro-batches."""
    state = {"delta": 0.0, "steps": 0}

    def values(up, down, ref_up, ref_down, n, m):
        return losses.bco_loss(up, down, ref_up, ref_down, cfg.beta, state["delta"])

    def after(metrics):
        state["steps"] += 1
        mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        state["delta"] += (mean - state["delta"]) / state["steps"]
    return replace(pair_objective(values, cfg.beta, lambda examples: 2 * LN2), state=state, after=after)


def sequence_npo_objective(cfg: Config) -> Objective:
    """NPO over whole wrong responses (Zhang et al. 2024, without their factor 2/beta, which AdamW does not see)."""
    def loss(logps, ref, real, examples):
        score, ref_score = logps.sum(-1, keepdim=True), ref.sum(-1, keepdim=True)  # [R,1]: a response is one "token"
        values = losses.npo_loss(score, ref_score, torch.ones_like(score), cfg.beta)
        return values.sum(), {"rewards/rejected": cfg.beta * (score - ref_score)[:, 0], "logps/rejected": score[:, 0]}
    return Objective(loss, units=lambda e: 1, step0=lambda examples: LN2,
                     shown=("loss", "rewards/rejected", "grad_norm", "tokens/s"))


OBJECTIVES = {"sft": lambda cfg: sft_objective(), "rft": lambda cfg: sft_objective(),  # on solutions, on right samples
              "dpo": lambda cfg: dpo_objective(cfg.beta), "rdpo": rdpo_objective, "ipo": ipo_objective,
              "bco": bco_objective, "simpo": simpo_objective, "npo": sequence_npo_objective}
