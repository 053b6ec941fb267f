"""losses.py against the official functions' numbers, hand-worked values and brute force."""

import math
from fractions import Fraction

import pytest
import torch

from allo_mini.losses import dpo_loss, npo_loss, sft_loss, useful_token_mask
from helpers import golden


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
    assert data["grad"].abs().max() > 1e-4  # the comparison above is not one of zeros


@pytest.mark.parametrize("case", range(4))
def test_noisy_token_dpo_equals_official_loss_and_gradient(case):
    """Official ALLO with epsilon 0.1, 0.3, 0.5, 1.0 on equal-length responses; gradients of the rows' sum."""
    data = case_of("noisy_token_dpo", case)
    chosen, rejected = data["policy_chosen"].requires_grad_(), data["policy_rejected"].requires_grad_()
    epsilon = round(float(data["epsilon"]), 6)
    everywhere = torch.ones(rejected.shape, dtype=torch.bool)
    useful = useful_token_mask(rejected, data["ref_rejected"], everywhere, epsilon)
    losses = dpo_loss(chosen.sum(-1), (rejected * useful).sum(-1),
                      data["ref_chosen"].sum(-1), (data["ref_rejected"] * useful).sum(-1), 0.1)
    losses.sum().backward()
    assert useful.sum(-1).tolist() == [math.floor(epsilon * 20 + 1e-6)] * 4
    assert torch.equal(useful, data["grad_rejected"] != 0)
    torch.testing.assert_close(losses, data["losses"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(chosen.grad, data["grad_chosen"], atol=1e-6, rtol=0)
    torch.testing.assert_close(rejected.grad, data["grad_rejected"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case, of_margin", [(4, lambda m: (1 - 0.1 * m).relu()),
                                             (5, lambda m: (m - 1 / (2 * 0.1)).square())])
def test_useful_tokens_equal_the_official_ones_under_hinge_and_ipo(case, of_margin):
    """The official filter with its hinge (case 4) and IPO (case 5, summed ratios) losses, which are written here."""
    data = case_of("noisy_token_dpo", case)
    chosen, rejected = data["policy_chosen"].requires_grad_(), data["policy_rejected"].requires_grad_()
    everywhere = torch.ones(rejected.shape, dtype=torch.bool)
    useful = useful_token_mask(rejected, data["ref_rejected"], everywhere, round(float(data["epsilon"]), 6))
    losses = of_margin((chosen - data["ref_chosen"]).sum(-1) - ((rejected - data["ref_rejected"]) * useful).sum(-1))
    losses.sum().backward()
    torch.testing.assert_close(losses, data["losses"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(chosen.grad, data["grad_chosen"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rejected.grad, data["grad_rejected"], atol=1e-6, rtol=1e-6)


def test_values_while_theta_is_ref():
    """DPO: ln 2, whatever beta; NPO: w ln 2; gradients -beta/2, +beta/2 and w beta/2."""
    chosen, rejected = torch.randn(5).requires_grad_(), torch.randn(5).requires_grad_()
    for beta in (0.01, 0.1, 2.0):
        loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta)
        torch.testing.assert_close(loss, torch.full((5,), math.log(2)), atol=1e-7, rtol=0)
        up, down = torch.autograd.grad(loss.sum(), (chosen, rejected))
        torch.testing.assert_close(up, torch.full((5,), -beta / 2))
        torch.testing.assert_close(down, torch.full((5,), beta / 2))
    logps, weights = torch.randn(3, 4).requires_grad_(), torch.rand(3, 4)
    loss = npo_loss(logps, logps.detach(), weights, 0.1)
    torch.testing.assert_close(loss, weights * math.log(2))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logps)[0], weights * 0.05)


def test_hand_worked_numbers():
    """beta * margin = ln 3 gives sigma = 3/4; ratio ln 2 / beta gives sigma(-ln 2) = 1/3."""
    margin = math.log(3) / 0.1
    loss = dpo_loss(torch.tensor([margin - 2.0, -1.0]), torch.tensor([-5.0, -3.0]),
                    torch.tensor([-2.0, -2.0]), torch.tensor([-5.0, -2.0]), 0.1)
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3), math.log(1 + math.exp(-0.2))]))
    ratio = math.log(2) / 0.1
    logps, ref, weights = torch.tensor([[[ratio - 1, -ratio - 1]], [[-1.0, -1.0]], [[0.5, 2.0]]])
    loss = npo_loss(logps, ref, weights, 0.1)
    torch.testing.assert_close(loss, torch.tensor([[0.5 * math.log(3), 2 * math.log(1.5)]]))
    assert sft_loss(torch.tensor([-1.5, 0.0])).tolist() == [1.5, 0.0]


def test_dpo_wants_chosen_up_and_rejected_down_npo_wants_down():
    zero = torch.zeros(1)
    assert dpo_loss(zero + 1, zero, zero, zero, 0.1) < dpo_loss(zero, zero, zero, zero, 0.1)
    assert dpo_loss(zero, zero - 1, zero, zero, 0.1) < dpo_loss(zero, zero, zero, zero, 0.1)
    assert npo_loss(zero - 1, zero, zero + 1, 0.1) < npo_loss(zero, zero, zero + 1, 0.1)


def test_losses_stay_finite_far_from_ref():
    far = torch.tensor([-1e5, 1e5])
    zero = torch.zeros(2)
    torch.testing.assert_close(dpo_loss(far, zero, zero, zero, 0.1), torch.tensor([1e4, 0.0]))
    torch.testing.assert_close(npo_loss(far, zero, torch.ones(2), 0.1), torch.tensor([0.0, 1e4]))


def test_weight_zero_takes_the_token_out():
    logps = torch.tensor([[-1.0, -50.0, -2.0]]).requires_grad_()
    loss = npo_loss(logps, torch.tensor([[-1.5, -1.0, -1e4]]), torch.tensor([[1.0, 0.0, 0.0]]), 0.1)
    loss.sum().backward()
    assert loss[0, 1:].tolist() == [0.0, 0.0] and logps.grad[0, 1:].tolist() == [0.0, 0.0]
    assert loss[0, 0] > 0 and logps.grad[0, 0] > 0


# ---- useful_token_mask -------------------------------------------------------------------------------------

@pytest.mark.parametrize("fraction", ["0.1", "0.3", "0.5", "0.07", "0.29", "1.0", "0.3333333333333333"])
def test_k_is_exact(fraction):
    """k = max(1, floor(epsilon n)) in decimal arithmetic (0.1*30, 0.3*10, 0.29*100), rows ragged."""
    lengths = [1, 2, 3, 9, 10, 11, 20, 29, 30, 90, 100, 300, 4000]
    mask = torch.arange(4000) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    ratio = torch.stack([torch.randperm(4000, generator=generator) for _ in lengths])
    kept = useful_token_mask(ratio.float(), torch.zeros(mask.shape), mask, float(fraction))
    assert kept.sum(-1).tolist() == [max(1, math.floor(Fraction(fraction).limit_denominator(10**6) * n)) for n in lengths]


def test_the_lowest_ratios_are_kept_and_only_those_tied_with_the_kth():
    """Small integers make many ties; brute force says what stays."""
    generator = torch.Generator().manual_seed(3)
    for levels in (2, 4, 50):
        ref = torch.randint(-5, 0, (40, 25), generator=generator).float()
        ratio = torch.randint(-levels, levels, (40, 25), generator=generator).float()
        lengths = torch.randint(1, 26, (40,), generator=generator)
        mask = torch.arange(25) < lengths[:, None]
        kept = useful_token_mask(ref + ratio, ref, mask, 0.3)
        for row in range(40):
            n = int(lengths[row])
            kth = sorted(ratio[row, :n].tolist())[max(1, n * 3 // 10) - 1]
            assert kept[row].tolist() == [i < n and ratio[row, i].item() <= kth for i in range(25)]


@pytest.mark.parametrize("garbage", [-1e9, 0.0, 1e9, math.nan, -math.inf])
def test_padding_is_never_kept_and_changes_nothing(garbage):
    mask = torch.tensor([[True] * 10 + [False] * 7, [True] * 3 + [False] * 14])
    logps = torch.randn(2, 17, generator=torch.Generator().manual_seed(0))
    kept = useful_token_mask(logps.masked_fill(~mask, garbage), torch.zeros(2, 17), mask, 0.3)
    assert kept.sum(-1).tolist() == [3, 1]
    assert not (kept & ~mask).any()
    alone = useful_token_mask(logps[:1, :10], torch.zeros(1, 10), mask[:1, :10], 0.3)
    assert torch.equal(kept[0, :10], alone[0])


def test_all_tokens_count_while_theta_is_ref():
    mask = torch.arange(12) < torch.tensor([12, 5, 1])[:, None]
    logps = torch.randn(3, 12)
    assert torch.equal(useful_token_mask(logps, logps.clone(), mask, 0.1), mask)


def test_useful_mask_depends_on_the_ratio_and_carries_no_gradient():
    """Rare but unchanged tokens are not useful; pushed-down ones are, whatever their own probability."""
    ref = torch.tensor([[-9.0, -0.1, -5.0, -3.0]])
    logps = torch.tensor([[-9.0, -2.1, -5.0, -3.5]]).requires_grad_()
    kept = useful_token_mask(logps, ref, torch.ones(1, 4, dtype=torch.bool), 0.5)
    assert kept.tolist() == [[False, True, False, True]]
    assert kept.dtype == torch.bool and not kept.requires_grad
