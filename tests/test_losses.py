"""losses.py, objectives.py: official functions' numbers, hand-worked values, brute force."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from helpers import golden, low, random_ids
from torch import tensor as t

from allo_mini.data.encoder import Example
from allo_mini.losses import bco_loss, dpo_loss, npo_loss, sft_loss, useful_token_mask
from allo_mini.objectives import BASELINES, dpo_objective, npo_objective
from allo_mini.run.config import Config


def case_of(name, case):
    """One case of a golden file: {"losses": tensor, ...}."""
    return {k.split(".")[1]: v for k, v in golden(name).items() if k.startswith(f"case{case}.")}


@pytest.mark.parametrize("case", range(3))
def test_npo_equals_official_loss_and_gradient(case):
    """Probability weights, 0/1 weights, all ones; the logit at t - 1 scores the token at t."""
    data = case_of("token_weighted_npo", case)
    logits = data["logits"].requires_grad_()
    scored = data["labels"][:, 1:] != -100
    logps = logits[:, :-1].log_softmax(-1).gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)
    weights = data["weight"][:, 1:] * scored
    loss = npo_loss(logps, data["ref_logps"][:, 1:], weights, 0.1).sum() / (weights != 0).sum()
    loss.backward()
    torch.testing.assert_close(loss, data["loss"][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits.grad, data["grad"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case, of_margin", [
    *((case, lambda m: dpo_loss(m, 0, 0, 0, 0.1)) for case in range(4)),
    (4, lambda m: (1 - 0.1 * m).relu()), (5, lambda m: (m - 1 / (2 * 0.1)).square())])
def test_noisy_token_dpo_equals_official_loss_and_gradient(case, of_margin):
    """With epsilon 0.1, 0.3, 0.5, 1.0, and its filter under the official hinge and IPO losses."""
    data = case_of("noisy_token_dpo", case)
    chosen, rejected = (data[f"policy_{side}"].requires_grad_() for side in ("chosen", "rejected"))
    epsilon = round(float(data["epsilon"]), 6)
    useful = useful_token_mask(rejected, data["ref_rejected"], rejected < 1, epsilon)
    assert useful.sum(-1).tolist() == [math.floor(epsilon * 20 + 1e-6)] * 4
    up = (chosen - data["ref_chosen"]).sum(-1)
    losses = of_margin(up - ((rejected - data["ref_rejected"]) * useful).sum(-1))
    losses.sum().backward()
    torch.testing.assert_close(losses, data["losses"], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(chosen.grad, data["grad_chosen"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rejected.grad, data["grad_rejected"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss, wanted", [
    (sft_loss(t([-1.5, 0.0])), [1.5, 0.0]),
    (dpo_loss(t([-1.0]), t([-3.0]), t([-2.0]), t([-2.0]), 0.1), [low(0.2)]),
    (dpo_loss(t([-1e5, 1e5, 7.0]), 0, t([0, 0, 7.0]), 0, 0.1), [1e4, 0.0, math.log(2)]),
    (npo_loss(t([9.0, -9.0]), t([2.0, -2.0]), t([0.5, 2.0]), 0.1), [0.5 * low(-0.7), 2 * low(0.7)]),
    (npo_loss(t([-1e5, 1e5, -50.0]), t([0.0]), t([1.0, 1.0, 0.0]), 0.1), [0.0, 1e4, 0.0]),
    (bco_loss(t([-5.0, -5.0]), t([-11.0, -9.0]), t([-10.0]), t([-10.0]), 0.1, 0.2),
     [2 * low(0.3), low(0.3) + low(0.1)])])
def test_hand_worked_numbers(loss, wanted):
    torch.testing.assert_close(loss, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


# ---- useful_token_mask -------------------------------------------------------------------------

@pytest.mark.parametrize("fraction", ["0.1", "0.3", "0.07", "0.29", "1.0", "0.3333333333333333"])
def test_k_is_exact(fraction):
    """k = max(1, floor(epsilon n)) in decimal arithmetic, rows ragged."""
    lengths = [1, 2, 3, 9, 10, 11, 20, 29, 30, 90, 100, 300, 4000]
    mask = torch.arange(4000) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    ratio = torch.stack([torch.randperm(4000, generator=generator) for _ in lengths])
    useful = useful_token_mask(ratio.float(), torch.zeros(mask.shape), mask, float(fraction))
    exact = Fraction(fraction).limit_denominator(10**6)
    assert useful.sum(-1).tolist() == [max(1, math.floor(exact * n)) for n in lengths]


@pytest.mark.parametrize("garbage", [-1e9, 0.0, 1e9, math.nan, -math.inf])
def test_the_lowest_ratios_and_those_tied_with_the_kth_are_useful(garbage):
    """Small integers make many ties; brute force says what stays, whatever the padding holds."""
    generator = torch.Generator().manual_seed(3)
    for levels in (1, 2, 4, 50):
        ref = torch.randint(-5, 0, (40, 25), generator=generator).float()
        ratio = torch.randint(1 - levels, levels, (40, 25), generator=generator).float()
        lengths = torch.randint(1, 26, (40,), generator=generator)
        mask = torch.arange(25) < lengths[:, None]
        logps = (ref + ratio).masked_fill(~mask, garbage).requires_grad_()
        useful = useful_token_mask(logps, ref, mask, 0.3)
        assert useful.dtype == torch.bool and not useful.requires_grad
        for row in range(40):
            n = int(lengths[row])
            kth = sorted(ratio[row, :n].tolist())[max(1, n * 3 // 10) - 1]
            assert useful[row].tolist() == [i < n and ratio[row, i] <= kth for i in range(25)]


# ---- objectives on ragged pairs ----------------------------------------------------------------

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
