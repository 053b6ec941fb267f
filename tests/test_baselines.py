"""The methods that ALLO is compared with: formulas by hand, and all of them through train.main."""

import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file

import train
from allo_mini.baselines import NAMES, OBJECTIVES
from allo_mini.config import METHODS, Config
from allo_mini.data import Example
from allo_mini.files import load_mask
from allo_mini.losses import bco_loss, ipo_loss, rdpo_loss, simpo_loss
from allo_mini.mask import overlap, selected
from helpers import random_ids
from kill import in_child
from test_resume import at_step
from test_train import arguments, world

LN2 = math.log(2)
QUICK = ("--max-steps", "2", "--dpo-batch", "4", "--sft-batch", "4", "--locate", "gradient", "--token-weights", "edit")


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def minus_log_sigmoid(x):
    return math.log(1 + math.exp(-x))


# ---- formulas ----------------------------------------------------------------------------------------------

def test_rdpo_by_hand():
    """margin 1 - (-2) = 3; y+ is 20 tokens longer than y-, at 0.01 a token: 0.1 * 3 + 0.2."""
    loss = rdpo_loss(t(-9.0), t(-12.0), t(-10.0), t(-10.0), t(50.0), t(30.0), 0.1, 0.01)
    assert loss.item() == pytest.approx(minus_log_sigmoid(0.5))
    shorter = rdpo_loss(t(-9.0), t(-12.0), t(-10.0), t(-10.0), t(30.0), t(50.0), 0.1, 0.01)
    assert shorter.item() == pytest.approx(minus_log_sigmoid(0.1)) and shorter > loss


def test_ipo_by_hand():
    """Mean log-ratios 0.5 and -0.25, margin 0.75; the target is 1/(2 * 0.25) = 2. Past it, the loss rises again."""
    assert ipo_loss(t(-1.5), t(-2.25), t(-2.0), t(-2.0), 0.25).item() == pytest.approx(1.5625)
    assert ipo_loss(t(0.0), t(0.0), t(0.0), t(0.0), 0.1).item() == pytest.approx(25.0)
    assert ipo_loss(t(3.0), t(0.0), t(0.0), t(0.0), 0.25).item() == pytest.approx(1.0)


def test_simpo_by_hand():
    """2 * (-0.5 - -1.25) - 1 = 0.5."""
    assert simpo_loss(t(-0.5), t(-1.25), 2.0, 1.0).item() == pytest.approx(minus_log_sigmoid(0.5))


def test_bco_by_hand():
    """Rewards 0.5 and -0.1, delta 0.2: -log sigma(0.3) - log sigma(0.3)."""
    assert bco_loss(t(-5.0), t(-11.0), t(-10.0), t(-10.0), 0.1, 0.2).item() == pytest.approx(2 * minus_log_sigmoid(0.3))
    assert bco_loss(t(-5.0), t(-6.0), t(-5.0), t(-6.0), 0.1, 0.0).item() == pytest.approx(2 * LN2)


# ---- objectives --------------------------------------------------------------------------------------------

LENGTHS = ((3, 5), (6, 2), (4, 4))  # tokens of y+ and y-


def pairs_at_ref():
    """Log-probs of three ragged pairs, equal to the reference; mask; examples."""
    flat = [n for pair in LENGTHS for n in pair]
    real = torch.arange(max(flat)) < torch.tensor(flat)[:, None]
    logps = -torch.rand(real.shape, generator=torch.Generator().manual_seed(0)) * real
    return logps, real, [Example([1], [random_ids(n, n), random_ids(m, m)]) for n, m in LENGTHS]


@pytest.mark.parametrize("method", ["dpo", "rdpo", "ipo", "bco", "npo"])
def test_the_first_loss_is_the_one_the_objective_declares(method):
    objective = OBJECTIVES[method](Config(beta=0.3, rdpo_alpha=0.05))
    logps, real, examples = pairs_at_ref()
    if method == "npo":
        examples = [Example(e.prompt, [r]) for e in examples for r in e.responses]
    loss, _ = objective.loss(logps, logps.clone(), real, examples)
    assert float(loss) / sum(map(objective.units, examples)) == pytest.approx(objective.step0(examples), rel=1e-6)


def test_ipo_and_simpo_take_means_over_tokens_rdpo_counts_them():
    cfg = Config(beta=0.3, rdpo_alpha=0.05, simpo_beta=2.5, simpo_gamma=0.7)
    now, real, examples = pairs_at_ref()
    ref = now * 1.5
    sums, ref_sums = now.sum(-1).tolist(), ref.sum(-1).tolist()
    expected = {"rdpo": 0.0, "ipo": 0.0, "simpo": 0.0}
    for i, (n, m) in enumerate(LENGTHS):
        up, down = sums[2 * i], sums[2 * i + 1]
        ratio_up, ratio_down = up - ref_sums[2 * i], down - ref_sums[2 * i + 1]
        expected["rdpo"] += minus_log_sigmoid(0.3 * (ratio_up - ratio_down) + 0.05 * (n - m))
        expected["ipo"] += (ratio_up / n - ratio_down / m - 1 / 0.6) ** 2
        expected["simpo"] += minus_log_sigmoid(2.5 * (up / n - down / m) - 0.7)
    for method, value in expected.items():
        loss, _ = OBJECTIVES[method](cfg).loss(now, now if method == "simpo" else ref, real, examples)
        assert float(loss) == pytest.approx(value, rel=1e-5), method


def test_simpo_needs_no_reference_and_logs_mean_log_probs():
    objective = OBJECTIVES["simpo"](Config(simpo_beta=2.0))
    logps, real, examples = pairs_at_ref()
    _, metrics = objective.loss(logps, logps, real, examples)
    assert objective.step0 is None
    torch.testing.assert_close(metrics["rewards/chosen"], 2 * logps[0::2].sum(-1) / torch.tensor([3, 6, 4]))


def test_bco_shifts_by_the_mean_of_earlier_rewards():
    objective = OBJECTIVES["bco"](Config(beta=0.5))
    for up, down in ((0.4, 0.2), (0.8, -0.2), (0.0, 0.0)):
        objective.after({"rewards/chosen": up, "rewards/rejected": down})
    assert objective.state["delta"] == pytest.approx((0.3 + 0.3 + 0.0) / 3)
    logps, real, examples = pairs_at_ref()
    loss, _ = objective.loss(logps, logps.clone(), real, examples)
    assert float(loss) == pytest.approx(3 * (minus_log_sigmoid(-0.2) + minus_log_sigmoid(0.2)))


def test_npo_is_over_whole_responses():
    logps, real, examples = pairs_at_ref()
    loss, _ = OBJECTIVES["npo"](Config(beta=0.3)).loss(logps, 2 * logps, real, examples)
    assert float(loss) == pytest.approx(sum(minus_log_sigmoid(0.3 * r) for r in logps.sum(-1).tolist()), rel=1e-5)


# ---- runs --------------------------------------------------------------------------------------------------

def test_every_method_in_one_run(world, tmp_path, capsys):
    assert train.main(arguments(world, tmp_path / "run", *QUICK, "--method", *METHODS)) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert list(results["results"]) == ["start", *NAMES.values(), "ALLO"]
    assert "do not agree" not in said and "first loss 1.386294, expected 1.386294" in said
    base = load_file(world / "model/model.safetensors")
    for name, folder in results["models"].items():
        changed = any(not torch.equal(base[n], w) for n, w in load_file(f"{folder}/model.safetensors").items())
        assert changed == (name != "start"), name
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = {row["stage"]: row["rows"] for row in rows if "rows" in row and "steps" in row}
    assert trained["more-sft"] == trained["rft"] == 20  # 24 rows, four of which are test rows; one right sample each
    assert trained["npo"] == 40 and trained["simpo"] == trained["dpo"] == 40  # two different wrong samples each


def test_rft_of_preference_rows_trains_on_what_was_chosen(world, tmp_path):
    argv = arguments(world, tmp_path / "run", *QUICK, "--method", "rft", "--pairs", str(world / "pairs.jsonl"), "--no-eval")
    at = argv.index("--samples")
    assert train.main(argv[:at] + argv[at + 2:]) == 0
    assert (tmp_path / "run/rft/model.safetensors").exists()


@pytest.mark.parametrize("source", ["top", "bottom", "random"])
def test_a_mask_source_decides_which_weights_every_method_trains(world, tmp_path, source):
    out = tmp_path / "run"
    assert train.main(arguments(world, out, *QUICK, "--method", "dpo", "rft", "--mask-source", source, "--p", "10",
                                "--dpo-lr", "1e-2", "--sft-lr", "1e-2", "--no-eval")) == 0
    base = load_file(world / "model/model.safetensors")
    mask, total = load_mask(out / "mask.safetensors", {n: w.shape for n, w in base.items()}), sum(w.numel() for w in base.values())
    assert abs(selected(mask) - total // 10) <= 1
    for folder in ("dpo", "rft"):
        new = load_file(out / folder / "model.safetensors")
        assert all(torch.equal(base[n][~mask[n]], new[n][~mask[n]]) for n in base)
        assert any(not torch.equal(base[n], new[n]) for n in base)
    assert not (out / "patch.safetensors").exists()


def test_top_and_bottom_share_nothing_and_random_shares_its_part(world, tmp_path):
    masks = {}
    shapes = {n: w.shape for n, w in load_file(world / "model/model.safetensors").items()}
    for source in ("top", "bottom", "random"):
        assert train.main(arguments(world, tmp_path / source, *QUICK, "--method", "dpo", "--mask-source", source, "--p",
                                    "20", "--no-eval")) == 0
        masks[source] = load_mask(tmp_path / source / "mask.safetensors", shapes)
    assert overlap(masks["top"], masks["bottom"]) == 0.0
    assert overlap(masks["top"], masks["random"]) == pytest.approx(0.2, abs=0.05)


def test_allo_without_mask_and_without_forgetting(world, tmp_path):
    assert train.main(arguments(world, tmp_path / "run", *QUICK, "--method", "allo", "--mask-source", "none",
                                "--no-forget")) == 0
    out = tmp_path / "run"
    assert not any((out / name).exists() for name in ("mask.safetensors", "forget", "patch.safetensors", "dpo"))
    base, new = load_file(world / "model/model.safetensors"), load_file(out / "improve/model.safetensors")
    moved = sum(int((base[n] != new[n]).sum()) for n in base) / sum(w.numel() for w in base.values())
    assert moved > 0.5


def test_allo_without_mask_trains_exact_weights_under_int8(world, tmp_path):
    """Forgetting and improving move all weights then, so none is kept in 8 bits: the same run, bit for bit."""
    for name, more in (("plain", ()), ("int8", ("--int8",))):
        assert train.main(arguments(world, tmp_path / name, *QUICK, "--method", "allo", "--mask-source", "none", "--no-eval",
                                    *more)) == 0
    for stage in ("forget", "improve"):
        plain, int8 = (load_file(tmp_path / name / stage / "model.safetensors") for name in ("plain", "int8"))
        assert all(torch.equal(plain[n], int8[n]) for n in plain)


@pytest.mark.parametrize("more, says", [
    (["--method", "dpoo"], "did you mean dpo?"), (["--mask-source", "upper"], "expected one of auto, top"),
    (["--mask-source", "random", "--mask", "m.safetensors"], "leave out --mask")])
def test_bad_methods_and_sources_are_one_line(world, tmp_path, capsys, more, says):
    assert train.main(arguments(world, tmp_path / "run", *more)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and says in errors and not (tmp_path / "run").exists()


def test_bco_goes_on_after_a_kill_as_if_nothing_had_been(world, tmp_path):
    """Its delta is in the checkpoint."""
    options = ["--method", "bco", "--max-steps", "5", "--dpo-batch", "4", "--dpo-lr", "1e-2", "--save-minutes", "0", "--no-eval"]
    whole, cut = (arguments(world, tmp_path / name, *options) for name in ("whole", "cut"))
    assert train.main(whole) == 0
    assert in_child(lambda: train.main(cut), at_step("bco", 3)) == -signal.SIGKILL
    assert train.main(cut) == 0
    first, second = (load_file(tmp_path / name / "bco/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[n], second[n]) for n in first)
