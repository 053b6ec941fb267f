"""objectives.py: the formulas on ragged pairs by hand, what is logged."""

from collections import Counter

import pytest
import torch
from helpers import low, random_ids

from allo_mini.data.encoder import Example
from allo_mini.objectives import BASELINES, dpo_objective, npo_objective
from allo_mini.run.config import Config

LENGTHS = ((3, 5), (6, 2), (4, 4))  # tokens of y+ and y-
FLAT = torch.tensor(LENGTHS).flatten()
REAL = torch.arange(6) < FLAT[:, None]
PAIRS = [Example([1], [random_ids(n, n), random_ids(m, m)]) for n, m in LENGTHS]
SINGLES = [Example([1], [r], weights=[0.0, 1.0, 0.4, 0.0, 1.0, 1.0][:len(r)])
           for pair in PAIRS for r in pair.responses]
NOW = -torch.rand(REAL.shape, generator=torch.Generator().manual_seed(0)) * REAL
CFG = Config(beta=0.3, rdpo_alpha=0.05, simpo_beta=2.5, simpo_gamma=0.7)
ALL = {name: make(CFG) for name, (_, make) in BASELINES.items()}
ALL |= {"forget": npo_objective(0.3), "improve": dpo_objective(0.3, 0.1)}
ROWS = {name: SINGLES if name in ("npo", "sft", "rft", "forget") else PAIRS for name in ALL}


def test_losses_of_ragged_pairs_by_hand():
    """IPO and SimPO take means over tokens, R-DPO counts them, forgetting weighs them."""
    ref = NOW * 1.5
    sums, ratios = NOW.sum(-1).tolist(), (NOW - ref).sum(-1).tolist()
    wanted = Counter()
    for i, (n, m) in enumerate(LENGTHS):
        up, down = ratios[2 * i:2 * i + 2]
        wanted["dpo"] += low(0.3 * (up - down))
        wanted["rdpo"] += low(0.3 * (up - down) + 0.05 * (n - m))
        wanted["ipo"] += (up / n - down / m - 1 / 0.6) ** 2
        wanted["simpo"] += low(2.5 * (sums[2 * i] / n - sums[2 * i + 1] / m) - 0.7)
        lowest = float((NOW - ref)[2 * i + 1, :m].min())  # epsilon keeps one token of so few
        wanted["improve"] += low(0.3 * (up - lowest))
    wanted["npo"] = sum(low(-0.3 * r) for r in ratios)
    wanted["sft"] = wanted["rft"] = -sum(sums)
    for example, row in zip(SINGLES, (NOW - ref).tolist()):
        wanted["forget"] += sum(w * low(-0.3 * r) for w, r in zip(example.weights, row))
    for method, value in wanted.items():
        given = NOW if method == "simpo" else ref
        loss, metrics = ALL[method].loss(NOW, given, REAL, ROWS[method])
        assert float(loss) == pytest.approx(value, rel=1e-5), method
        assert all(len(values) == len(ROWS[method]) for values in metrics.values())
        if "rewards/chosen" in metrics:  # of whole responses; without a reference, mean log-probs
            rewards = 2.5 * NOW.sum(-1) / FLAT if method == "simpo" else 0.3 * (NOW - ref).sum(-1)
            torch.testing.assert_close(metrics["rewards/chosen"], rewards[::2])
    assert ALL["sft"].units(PAIRS[0]) == 3 and ALL["forget"].units(SINGLES[1]) == 3


def test_bco_shifts_by_the_mean_of_earlier_rewards():
    objective = BASELINES["bco"][1](CFG)
    for up, down in ((0.4, 0.2), (0.8, -0.2), (0.0, 0.0)):
        objective.after({"rewards/chosen": up, "rewards/rejected": down})
    loss, _ = objective.loss(NOW, NOW.clone(), REAL, PAIRS)
    assert float(loss) == pytest.approx(3 * (low(-0.2) + low(0.2)))
