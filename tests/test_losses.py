"""losses.py, objectives.py, mask.py, locate.py: official and hand-worked numbers, brute force."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from helpers import (FIXTURES, assert_close, golden, gradients, low, random_ids, separate_logps,
                     tiny_model, whole)
from torch import tensor as t

from allo_mini import UserError, locate, mask
from allo_mini.checkpoint import load_model
from allo_mini.data.encoder import Example
from allo_mini.locate import gradient_importance
from allo_mini.losses import bco_loss, dpo_loss, npo_loss, useful_token_mask
from allo_mini.mask import Selected, put, select_neurons, take, to_tensors
from allo_mini.objectives import BASELINES, dpo_objective, npo_objective, pair_objective
from allo_mini.run.config import Config
from allo_mini.run.files import save_tensors
from allo_mini.run.folder import load_mask


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
    (dpo_loss(t([-1e5, 1e5, 7.0]), 0, t([0, 0, 7.0]), 0, 0.1), [1e4, 0.0, math.log(2)]),
    (npo_loss(t([-1e5, 1e5, -50.0]), t([0.0]), t([1.0, 1.0, 0.0]), 0.1), [0.0, 1e4, 0.0]),
    (bco_loss(t([-5.0, -5.0]), t([-11.0, -9.0]), t([-10.0]), t([-10.0]), 0.1, 0.2),
     [2 * low(0.3), low(0.3) + low(0.1)])])
def test_hand_worked_numbers(loss, wanted):
    """Far from 0, and BCO's; test_losses_of_ragged_pairs_by_hand has the others."""
    torch.testing.assert_close(loss, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [-1e9, 0.0, 1e9, math.nan, -math.inf])
@pytest.mark.parametrize("fraction", ["0.1", "0.3", "0.07", "0.29", "1.0", "0.3333333333333333"])
def test_the_lowest_ratios_and_those_tied_with_the_kth_are_useful(fraction, garbage):
    """k = max(1, floor(epsilon n)) in decimal arithmetic; integers of few values make many ties.
    Whatever the padding holds."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 3, 9, 10, 11, 20, 29, 30, 90, 100, 300, 4000]
    exact = Fraction(fraction).limit_denominator(10**6)
    mask = torch.arange(4000) < torch.tensor(lengths)[:, None]
    for levels in (1, 2, 4, 50, 10**6):
        ref = torch.randint(-5, 0, mask.shape, generator=generator).float()
        ratio = torch.randint(1 - levels, levels, mask.shape, generator=generator).float()
        logps = (ref + ratio).masked_fill(~mask, garbage).requires_grad_()
        useful = useful_token_mask(logps, ref, mask, float(fraction))
        assert useful.dtype == torch.bool and not useful.requires_grad
        for row, n in enumerate(lengths):
            kth = sorted(ratio[row, :n].tolist())[max(1, math.floor(exact * n)) - 1]
            assert torch.equal(useful[row], mask[row] & (ratio[row] <= kth))


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
    filtered = pair_objective(lambda scores, lengths: scores[1], 0.3, epsilon=0.1, mean=True)
    means, _ = filtered.loss(NOW, ref, REAL, PAIRS)  # over the one token of y- that counts
    lowest = (NOW - ref)[1::2].masked_fill(~REAL[1::2], math.inf).argmin(-1, keepdim=True)
    assert float(means) == pytest.approx(float(NOW[1::2].gather(-1, lowest).sum()))
    assert ALL["sft"].units(PAIRS[0]) == 3 and ALL["forget"].units(SINGLES[1]) == 3
    objective = ALL["bco"]  # which shifts by the mean of earlier rewards
    for up, down in ((0.4, 0.2), (0.8, -0.2), (0.0, 0.0)):
        objective.after({"rewards/chosen": up, "rewards/rejected": down})
    loss, _ = objective.loss(NOW, NOW.clone(), REAL, PAIRS)
    assert float(loss) == pytest.approx(3 * (low(-0.2) + low(0.2)))


# ---- which weights: exact selection, mask files, importance by the gradient --------------------

SHAPES = {"embed_tokens": (30, 8), "q_proj": (8, 8), "up_proj": (13, 8), "three": (3, 2, 2),
          "scalar": (), "norm": (79,)}  # 500 weights; as floats 0.57 * 500 < 285


def random_importance(seed):
    """Tensors at scales 1e-3 to 100: a rule for each tensor would choose differently."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 10.0 ** (i - 3)
            for i, (name, shape) in enumerate(SHAPES.items())}


def flat(tensors):
    dense = [t.dense() if isinstance(t, Selected) else t for t in tensors.values()]
    return torch.cat([t.reshape(-1) for t in dense])


def brute_force(importance, count):
    """The first `count` weights sorted by |value| descending, then tensor order, then index."""
    values = flat(importance).abs().tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


@pytest.mark.parametrize("chunk", [1 << 24, 9, 16])
@pytest.mark.parametrize("levels", [None, 0, 1, 4])
def test_the_top_p_percent_of_everything_is_exact_with_ties(monkeypatch, tmp_path, levels, chunk):
    """Few distinct values: nearly all are ties, across chunks and tensors. From a mapped file."""
    monkeypatch.setattr(mask, "CHUNK", 16 * chunk)  # a CPU takes a sixteenth
    importance = random_importance(9)
    if levels is not None:
        importance = {n: (10 * t).round().clamp(-levels, levels) for n, t in importance.items()}
    store = torch.from_file(str(tmp_path / "values"), shared=True, size=500).copy_(flat(importance))
    parts = store.split([t.numel() for t in importance.values()])
    lazy = {n: part.view(importance[n].shape) for n, part in zip(importance, parts)}
    for fraction in (1e-9, 0.07, 0.29, Fraction(57, 10_000), 0.57, 1):
        count = math.floor(Fraction(str(fraction)) * 500)
        chosen = select_neurons(lazy, fraction)
        assert torch.equal(flat(chosen), brute_force(importance, count))
        assert sum(map(len, chosen.values())) == count
        assert {n: m.shape for n, m in chosen.items()} == SHAPES


def test_neighbouring_floats_are_told_apart():
    """Equal in their upper 16 bits, subnormal, -0.0 beside 0.0; other dtypes, views."""
    for first in (0, 0x3F800000):  # 64 successive floats from 0, which are subnormal, and from 1
        values = torch.randperm(64, generator=torch.Generator().manual_seed(1)) + first
        importance = values.int().view(torch.float32)
        chosen = select_neurons({"a": importance[:40], "b": -importance[40:]}, 0.25)
        assert sorted(values[flat(chosen)].tolist()) == list(range(first + 48, first + 64))
    zeros = select_neurons({"a": torch.tensor([-0.0, 0.0, 0.0, -0.0])}, 0.5)
    assert zeros["a"].dense().tolist() == [True, True, False, False]
    odd = {"view": torch.randn(6, 4).t(), "half": torch.randn(9).bfloat16()}
    assert torch.equal(flat(select_neurons(odd, 0.5)), brute_force(odd, 16))


def test_what_is_no_importance_or_no_fraction_is_refused():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="inf or NaN"):
            select_neurons(random_importance(0) | {"norm": torch.tensor([1.0, bad])}, 0.05)
    for fraction in (0, -0.1, 1.0001, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            select_neurons(random_importance(0), fraction)


@pytest.mark.parametrize("chunk", [50, 2048, 1 << 24])
def test_selected_walks_over_exactly_the_selected_entries(monkeypatch, chunk):
    """take gives what indexing by the mask gives, put changes these only, chunk after chunk."""
    monkeypatch.setattr(mask, "CHUNK", 16 * chunk)
    generator = torch.Generator().manual_seed(0)
    for shape in ((1700,), (), (900, 31), (31, 900), (60, 3, 5), (2, 40_000)):
        for density in (0.0, 0.003, 0.05, 0.5, 1.1, None):
            values = torch.randn(shape, generator=generator)
            chosen = torch.rand(shape, generator=generator) < (density or 2)
            where = Selected(shape) if density is None else Selected.from_dense(chosen)
            new = torch.arange(len(where)) + 100.0
            filled, twin, taken = values.clone(), values.clone(), new.clone().fill_(-1)
            twin[chosen] = new
            for rows, entries, index in where.chunks():
                taken[entries] = take(values.view(-1, where.width)[rows], index)
                put(filled.view(-1, where.width)[rows], index, new[entries])
            assert torch.equal(taken, values[chosen]) and torch.equal(filled, twin)
            assert len(where) == chosen.sum() and torch.equal(where.to("cpu").dense(), chosen)
            assert torch.equal(where.gather(values), values[chosen])
            where.scatter(values, new)
            assert torch.equal(values, twin)


def test_a_mask_file_gives_the_mask_back_and_what_does_not_fit_is_one_line(tmp_path):
    chosen = select_neurons(random_importance(1), 0.3) | {"all": Selected((4, 5))}
    path, shapes = tmp_path / "mask.safetensors", {name: one.shape for name, one in chosen.items()}
    metadata = {name: " ".join(map(str, shape)) for name, shape in shapes.items()}
    kept = to_tensors(chosen)
    save_tensors(kept, path, metadata)
    back = load_mask(path, shapes)
    assert back.keys() == load_mask(path).keys() == shapes.keys() and back["all"].columns is None
    assert all(torch.equal(back[name].dense(), one.dense()) for name, one in chosen.items())
    assert back["q_proj"].columns.nbytes == 2 * len(back["q_proj"])
    with pytest.raises(UserError, match="another model"):
        load_mask(path, shapes | {"norm": torch.Size([9])})
    for broken in ({"norm.columns": kept["norm.columns"][1:]},
                   {"norm.columns": kept["norm.columns"] + 79},  # too far
                   {"q_proj.counts": torch.ones(9, dtype=torch.int32)}):
        save_tensors(kept | broken, path, metadata)
        with pytest.raises(UserError, match=rf"^{path}: .*\Z"):
            load_mask(path)


EXAMPLES = [Example(random_ids(5 + i, i), [random_ids(6, 20 + i), random_ids(3 + i, 40 + i)])
            for i in range(5)]


def by_autograd(model, examples):
    for example in examples:
        up, down = (separate_logps(model.requires_grad_(True), example.prompt, response).sum()
                    for response in example.responses)
        (-0.3 / 2 * (up - down)).backward()
    return gradients(model)


@pytest.mark.parametrize("groups", [1, 3, 1000])
def test_importance_is_the_gradients_sum_or_its_ratio_to_the_root_of_their_squares(
        monkeypatch, tmp_path, groups):
    """In one pass, in three, and a tensor at a time; no file is left, the model is as before."""
    monkeypatch.setattr(locate, "TOGETHER", 2)
    model = tiny_model(trainable=False)
    each = [by_autograd(tiny_model(), EXAMPLES[at:at + 2]) for at in (0, 2, 4)]
    for snr in (False, True):
        objective = dpo_objective(0.3)
        got = gradient_importance(model, EXAMPLES, objective, tmp_path, snr, groups, 30, snr)
        assert got.keys() == each[0].keys()
        for name, importance in got.items():
            g = torch.stack([one[name] for one in each])
            wanted = g.sum(0) / (g.square().sum(0).sqrt().clamp(min=1e-19) if snr else 1)
            assert torch.equal(importance == 0, wanted == 0) or not snr
            clear = g.abs().amax(0) >= (1e-5 if snr else 0)
            torch.testing.assert_close(importance[clear], wanted[clear], rtol=1e-3, atol=1e-4)
    assert not list(tmp_path.iterdir())
    assert not any(p.requires_grad or hasattr(p, "slot") for p in model.parameters())


def test_importance_of_an_int8_model_is_that_of_its_dequantised_twin(tmp_path):
    ours, twin = (load_model(FIXTURES / "hf" / "qwen2", int8=int8) for int8 in (True, False))
    for name, p in ours.named_parameters():
        twin.get_parameter(name).copy_(whole(p))
    got = gradient_importance(ours, EXAMPLES, dpo_objective(0.3), tmp_path, False, 3, 4096, False)
    assert_close(got, by_autograd(twin, EXAMPLES), rtol=1e-3, atol=1e-5)
