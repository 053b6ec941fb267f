"""The whole method through train.main: every stage and mode, what it prints, what it leaves."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from helpers import error_of, whole
from runs import (ROOT, arguments, demo_command, difference, equal, lines, results_of, rows_of, run,
                  steps_of, weights_of, with_samples)
from safetensors.torch import load_file

import eval as evaluation
import train
from allo_mini import UserError
from allo_mini.checkpoint import load_model
from allo_mini.data.encoder import Encoder
from allo_mini.data.rows import Pair
from allo_mini.patch import apply
from allo_mini.run import log
from allo_mini.run.config import METHODS, parse, schedule
from allo_mini.run.folder import Run, load_mask
from allo_mini.run.log import exit_code

LN2 = math.log(2)
FIRST = r"(?m)^(\S+): first loss ([\d.]+), expected ([\d.]+)"
PLAN = r"(?m)^(\S+) +(\d+) +(\d+) +(\d+) +(\S+) +([\d.]+) % +[\d.]+ GB$"
RAN = r"(?m)^(\S+): (\d+) rows, (\d+) steps of (\d+), lr (\S+), ([\d,]+) weights in training$"
WEIGHTS = 7760  # of the tiny model
ALLO = ("--method", "allo", "--no-eval")
EDIT = (*ALLO, "--token-weights", "edit", "--locate", "random")  # the shortest way through


def dense_mask(folder, name="mask.safetensors") -> dict[str, torch.Tensor]:
    return {n: selected.dense() for n, selected in load_mask(folder / name).items()}


def count(mask: dict) -> int:
    return sum(int(m.sum()) for m in mask.values())


def only_inside(mask: dict, old: dict, new: dict) -> bool:
    """Whether two models differ, and in selected weights alone."""
    return not equal(old, new) and all(torch.equal(old[n][~m], new[n][~m]) for n, m in mask.items())


def first_losses(said: str) -> dict[str, float]:
    """stage -> its first loss, which must be the declared one."""
    found = re.findall(FIRST, said)
    assert all(math.isclose(float(a), float(b), rel_tol=1e-4) for _, a, b in found)
    return {stage: float(loss) for stage, loss, _ in found}


# ---- every stage -------------------------------------------------------------------------------

def test_every_stage_leaves_its_artefact(whole):
    for name in ("sft", "rewriter", "improve", "dpo"):
        load_model(whole / name)
        assert {"tokenizer.json", "generation_config.json"} <= {*os.listdir(whole / name)}
    assert {"samples.jsonl", "pairs.jsonl", "negatives.jsonl", "movement.safetensors",
            "mask.safetensors", "token_weights.jsonl", "forget.safetensors", "report.html",
            "patch.safetensors", "token_examples.jsonl"} <= {*os.listdir(whole)}
    results = json.loads((whole / "results.json").read_text())["results"]
    assert results.keys() == {"SFT", "DPO", "ALLO"} and results["ALLO"]["n"] == 4
    assert not list(whole.glob(".*.tmp")) + list(whole.glob(".*state*"))
    for row in rows_of(whole / "token_examples.jsonl"):
        n = len(row["tokens"])
        assert row["weights"] == [float(score < 0.5) for score in row["scores"]]
        assert n == len(row["weights"]) == len(row["kept"]) and sum(row["kept"]) >= max(1, n // 10)
    scored = [row["output"] for row in rows_of(whole / "token_weights.jsonl")]
    assert scored == [row["response"] for row in rows_of(whole / "negatives.jsonl")]


def test_metrics_of_every_step(whole):
    steps = {(row["stage"], row["step"]): row for row in steps_of(whole)}
    assert {stage for stage, _ in steps} == {"sft", "dpo", "warmup", "rewrite", "forget", "improve"}
    for stage in ("dpo", "warmup", "improve"):
        assert steps[stage, 1]["loss"] == pytest.approx(LN2, rel=1e-5)
        assert steps[stage, 1]["rewards/margins"] == 0
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "grad_norm",
            "logps/rejected", "learning_rate", "tokens/s"} <= steps["improve", 1].keys()
    assert any("mem/peak_gb" in row for row in rows_of(whole / "metrics.jsonl"))
    assert 0 < steps["forget", 1]["token_weight/fraction"] < 1
    assert 0 < steps["improve", 2]["useful/fraction"] < 0.2 < steps["improve", 1]["useful/fraction"]
    assert {"sft", "dpo", "forget", "improve"} <= {stage for stage, step in steps
                                                   if "eval/score" in steps[stage, step]}


def test_masks_are_exact_and_no_other_weight_moves(whole):
    """--p-forget 2 and --p 5, with weight decay; forgetting leaves its fp32 weights."""
    start, end = weights_of(whole / "sft"), weights_of(whole / "improve")
    total = sum(t.numel() for t in start.values())
    mask, forget = dense_mask(whole), dense_mask(whole, "mask-forget.safetensors")
    assert (count(mask), count(forget)) == (5 * total // 100, 2 * total // 100)
    assert all((mask[n] | ~m).all() for n, m in forget.items())  # nested
    assert only_inside(mask, start, end)
    forgotten = load_file(whole / "forget.safetensors")
    values = [t for name, t in forgotten.items() if name.endswith(".values")]
    assert sum(map(len, values)) == count(forget)
    assert all(t.dtype == torch.float32 for t in values)
    moved = load_file(whole / "movement.safetensors")
    ranked = torch.cat([moved[n].flatten() for n in mask])
    chosen = torch.cat([m.flatten() for m in mask.values()])
    assert ranked[chosen].min() >= ranked[~chosen].max()


def test_a_finished_run_prints_its_table_again(whole, monkeypatch, capsys):
    """And its next commands; with another number of threads, which is said once."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    before = results_of(whole)
    assert train.main(demo_command(whole.parent)) == 0
    said = capsys.readouterr().out
    table = json.loads((whole / "results.json").read_text())["table"]
    for text in "finished", table, "grade ", "talk ", "share ":
        assert text in said
    assert "skipped" not in said
    assert said.count("begun with 1 threads, now 2") == 1
    assert difference(before, results_of(whole)) == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_patch_is_the_improved_model(whole, tmp_path, monkeypatch, capsys):
    """Applied to the base, and in eval.py, which then gives the folder's answers."""
    path, answers = whole / "patch.safetensors", []
    shutil.copytree(whole / "sft", tmp_path / "base")
    (tmp_path / "base/generation_config.json").unlink()
    apply(["apply", str(tmp_path / "base"), str(path), str(tmp_path / "applied")])
    assert equal(weights_of(whole / "improve"), weights_of(tmp_path / "applied"))
    ends = [json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
            for folder in (whole / "improve", tmp_path / "applied")]
    assert ends[0] == ends[1]  # what ends a response, too
    for i, words in enumerate(("improve", f"sft --patch {path}", f"sft --patch {path} --int8")):
        command = f"--test {whole.parent}/test.jsonl --out {tmp_path}/{i} --model {whole}/{words}"
        assert evaluation.main(command.split()) == 0
        answers.append(rows_of(tmp_path / f"{i}/test.jsonl"))
    assert answers[0] == answers[1] and len(answers[2]) == 4
    capsys.readouterr()
    for words, says in ((f"{whole}/dpo {path} {tmp_path}/wrong", "patch.safetensors"),
                        (f"{whole}/sft {whole}/mask.safetensors {tmp_path}/wrong", "no patch"),
                        (f"{path}", "apply BASE PATCH OUT")):
        monkeypatch.setattr(sys, "argv", ["patch", "apply", *words.split()])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module("allo_mini.patch", run_name="__main__")
        assert says in error_of(capsys) and not (tmp_path / "wrong").exists()


# ---- methods and modes -------------------------------------------------------------------------

def test_every_method(world, tmp_path, capsys):
    """With the losses they declare; all weights are theirs to train."""
    out = run(world, tmp_path / "run", "--method", *METHODS, "--sft", "--locate", "random",
              "--token-weights", "edit", "--no-eval")
    losses = first_losses(capsys.readouterr().out)
    assert 0.6 < losses.pop("rdpo") < 0.8
    assert losses == pytest.approx({"dpo": LN2, "ipo": 25, "bco": 2 * LN2, "npo": LN2,
                                    "masked-dpo": LN2, "forget": LN2, "improve": LN2}, rel=1e-5)
    start = weights_of(out / "sft")
    for name in ("more-sft", *METHODS[1:-1], "improve"):
        assert not equal(start, weights_of(out / name)), name
    assert set(json.loads((out / "results.json").read_text())["models"]) == {
        "SFT", "+SFT", "RFT", "DPO", "R-DPO", "IPO", "BCO", "SimPO", "NPO", "masked DPO",
        "ALLO"}


def test_masked_dpo_alone_trains_once(world, tmp_path, capsys):
    """On weights that snr finds: no warm-up, no rewriting model, no forgetting, none of their
    rates, nor DPO's."""
    rates = "--lr-warmup", "1", "--lr-forget", "1", "--lr-dpo", "1", "--lr-improve", "1e-3"
    out = run(world, tmp_path / "run", *ALLO, "--method", "masked-dpo", *rates)
    said = capsys.readouterr().out
    assert re.findall(r"(?m)^(\S+): \d+ rows, .*lr (\S+),", said) == [("masked-dpo", "0.001")]
    assert re.findall(r"--lr-(\S+) does nothing here", said) == ["warmup", "forget", "dpo"]
    start, end = weights_of(world / "model"), weights_of(out / "masked-dpo")
    assert only_inside(dense_mask(out), start, end) and not equal(start, end)
    assert (out / "patch-masked-dpo.safetensors").exists()


@pytest.mark.parametrize("mode", ["random", "gradient", "snr"])
def test_locate_modes(world, tmp_path, mode):
    """And --masked, with which the other methods train allo's weights alone, also sft by itself."""
    run(world, tmp_path / "sft", "--method", "sft", "--masked", "--locate", mode, "--no-eval")
    out = run(world, tmp_path / "run", *EDIT, "--locate", mode, "--locate-pairs", "9", "--masked",
              "--method", "allo", "dpo", "npo", "sft")
    mask = dense_mask(out)
    assert count(mask) == 5 * WEIGHTS // 100
    for name in ("improve", "dpo", "npo", "sft"):
        assert only_inside(mask, weights_of(world / "model"), weights_of(out / name)), name
    assert not (out / "movement.safetensors").exists()


@pytest.mark.parametrize("mode", ["soft", "released", "edit", "uniform"])
def test_token_weight_modes(world, tmp_path, mode):
    out = run(world, tmp_path / "run", *EDIT, "--token-weights", mode)
    assert (out / "token_weights.jsonl").exists() == (mode in ("soft", "released"))
    fractions = [row["token_weight/fraction"] for row in steps_of(out, "forget")]
    assert [row["epoch"] for row in steps_of(out, "improve")] == [pytest.approx(i / 10)
                                                                 for i in (1, 2, 3)]
    assert all(0 < f < 1 for f in fractions) if mode == "edit" else set(fractions) == {1.0}
    for row in rows_of(out / "token_examples.jsonl"):
        if mode in ("soft", "released"):
            weights = [1 - s if mode == "soft" else s for s in row["scores"]]
            assert row["weights"] == pytest.approx(weights)


def test_without_forgetting_and_with_all_weights(world, tmp_path):
    """--p 100 needs no mask and no patch; --no-forget no token weights."""
    out = run(world, tmp_path / "run", *ALLO, "--no-forget", "--p", "100")
    assert [path.name for path in out.glob("*.safetensors")] == []
    assert not (out / "rewriter").exists()
    start, end = weights_of(world / "model"), weights_of(out / "improve")
    moved = sum(int((start[n] != end[n]).sum()) for n in start)
    assert moved > 0.8 * WEIGHTS  # rows of unread tokens stay
    assert {row["stage"] for row in steps_of(out)} == {"improve"}


def test_the_leanest_settings_go_through_every_stage(world, tmp_path, capsys, monkeypatch):
    """The end's table is of what was trained, not of its 8 bits; all else is rounded alike."""
    graded, finish = [], train.finish

    def watched(run, models):
        graded.extend(map(run.load, models.values()))
        finish(run, models)

    monkeypatch.setattr(train, "finish", watched)
    monkeypatch.setattr(train, "locate_groups", lambda run: 2)
    lean = "--sft --locate snr --int8 --state-bits 8 --offload --recompute --p-sft 3".split()
    out = run(world, tmp_path / "run", *ALLO, *lean)
    losses = first_losses(capsys.readouterr().out)
    assert losses == pytest.approx({"forget": LN2, "improve": LN2}, rel=1e-5)
    start, tuned, *ends = (weights_of(folder) for folder in (
        world / "model", out / "sft", out / "rewriter", out / "improve"))
    masks = [dense_mask(out, f"mask{of}.safetensors") for of in ("-sft", "-rewrite", "")]
    assert [*map(count, masks)] == [percent * WEIGHTS // 100 for percent in (3, 3, 5)]
    for mask, before, after in zip(masks, (start, tuned, tuned), (tuned, *ends)):
        assert only_inside(mask, before, after)
    before_it, model = graded
    for name, p in model.named_parameters():
        m, first = mask[name], whole(before_it.get_parameter(name))
        assert torch.equal(whole(p)[m], after[name][m]) and torch.equal(whole(p)[~m], first[~m])


def test_under_8_bits_models_with_all_weights_trained_are_graded_as_they_are(
        world, tmp_path, monkeypatch):
    """A table in which DPO alone is rounded would be in favour of the masks."""
    graded = []

    def evaluate(run, model, rows, label):
        graded.append(hasattr(model.model.layers[0].mlp.up_proj.weight, "int8"))
        return [{"input": "?", "correct": True}]

    monkeypatch.setattr(Run, "evaluate", evaluate)
    for name, methods in ("all", ["dpo", "allo"]), ("few", ["allo"]):
        run(world, tmp_path / name, *EDIT[3:], "--locate", "snr", "--int8", "--method", *methods)
    assert graded == [False] * 3 + [True] * 2


def test_bf16(world, tmp_path, capsys):
    """First ratios exactly 0, only masked weights change, forgetting's fp32 weights go on."""
    out = run(world, tmp_path / "run", *EDIT, "--dtype", "bf16", "--recompute", "--lr-forget",
              "1e-5", "--lr-improve", "1e-12")
    said = capsys.readouterr().out
    assert first_losses(said)["improve"] == pytest.approx(LN2, rel=1e-5)
    assert "holds torch.float32: all weights are rounded to torch.bfloat16" in said
    start, end, mask = weights_of(world / "model"), weights_of(out / "improve"), dense_mask(out)
    assert all(t.dtype == torch.bfloat16 for t in end.values())
    forgotten = load_file(out / "forget.safetensors")
    for name, m in mask.items():
        assert torch.equal(start[name][~m].bfloat16(), end[name][~m])
        if m.any():  # improving hardly moved: it began where forgetting had ended, unrounded
            assert torch.equal(end[name][m], forgotten[f"{name}.values"].bfloat16())
    values = torch.cat([t for name, t in forgotten.items() if name.endswith("values")])
    assert (values != values.bfloat16().float()).float().mean() > 0.5


def test_a_run_of_preferences(world, tmp_path, monkeypatch, capsys):
    """Its table: beta [log pi/pi_start (y+) - log pi/pi_start (y-)] of every held-out pair."""
    monkeypatch.chdir(tmp_path)
    val, out = tmp_path / "val.jsonl", tmp_path / "run"
    val.write_text((world / "pairs.jsonl").read_text().replace("Is ", "Are "))
    command = (f"--model {world}/model --pairs {world}/pairs.jsonl --out {out} --val {val} --beta "
               "0.5 --token-weights edit --lr-improve 1e-3 --eval-every 2 --max-steps 3")
    assert train.main(command.split()) == 0
    said = capsys.readouterr().out
    assert "2 of 24 pairs held out" in said and "dropped" not in said
    assert "prompts: none" in said and "--prompt chat uses it" in said
    assert "reward accuracy" in said and "raw accuracy" in said
    results = json.loads((out / "results.json").read_text())["results"]
    assert set(results) == {"start", "DPO", "ALLO"} and "reward" not in results["start"]
    start, tuned = ([row["margin"] for row in rows_of(out / f"eval-{name}.jsonl")]
                    for name in ("start", "ALLO"))
    rewards = [0.5 * (now - before) for now, before in zip(tuned, start, strict=True)]
    shown = results["ALLO"]
    assert shown["n"] == 2 == len(rewards) and shown["margin"] > results["start"]["margin"]
    assert shown["reward"] == pytest.approx(sum(rewards) / 2)
    assert shown["reward_accuracy"] == sum(reward > 0 for reward in rewards) / 2
    assert shown["accuracy"] == sum(margin > 0 for margin in tuned) / 2
    assert 0 <= steps_of(out, "improve")[-1]["eval/score"] <= 1
    # the next commands run, on the rows held out; cards tell how each model came about
    *asked, share = re.findall(r"(?m)^(?:grade|talk|share)  +(.*)$", said)
    monkeypatch.setattr(sys, "stdin", val.open())
    for words in map(str.split, asked):
        assert words[:4] == [sys.executable, "eval.py", "--model", f"{out}/improve"]
        assert evaluation.main([*words[2:], "--max-new-tokens", "2"]) == 0
    assert [row["margin"] for row in rows_of(tmp_path / "eval/run-improve/test.jsonl")] == tuned
    assert share == f"{os.path.dirname(sys.executable)}/hf upload YOU/NAME {out}/improve"
    table = json.loads((out / "results.json").read_text())["table"]
    assert table in said and table.startswith("ALLO and DPO: no difference that 2 rows can show")
    for name, p, rate in ("dpo", 100, 1e-4), ("improve", 5, 1e-3):
        card = (out / name / "README.md").read_text()
        for text in ("---\nbase_model: model\nlibrary_name: transformers\n", "on pairs.jsonl by",
                     table, f"p = {p} % ", f"peak rate {rate}, seed 2023"):
            assert text in card and str(world) not in card


def test_of_a_pair_of_the_same_nothing_is_forgotten():
    pairs = [Pair("a", "b", "b"), Pair("a", "b", "c")]
    _, negatives = train.preferences(SimpleNamespace(pairs=pairs))
    assert [negative.response for negative in negatives] == ["c"]


def test_validation_changes_no_step_and_micro_batches_nothing_but_rounding(world, tmp_path):
    val = ("--eval-every", "1", "--val", world / "val.jsonl")
    plain, scored, cut = (steps_of(run(world, tmp_path / str(i), *EDIT, *more)) for i, more in
                          enumerate([(), val, ("--micro-tokens", "60")]))
    for a, b, c in zip(plain, scored, cut, strict=True):
        assert a["stage"] == b["stage"] == c["stage"]
        for key in ("loss", "grad_norm"):
            assert a[key] == b[key] == pytest.approx(c[key], rel=1e-4)


@pytest.mark.parametrize("names, gone", [
    (["movement.safetensors"], {"warmup"}), (["mask.safetensors"], {"warmup", "mask"}),
    (["token_weights.jsonl"], {"rewrite", "score"}), (["rewriter"], {"rewrite"}),
    (["mask.safetensors", "forget.safetensors"], {"warmup", "mask", "forget"})])
def test_an_artefact_laid_into_the_folder_replaces_its_stage(world, tmp_path, names, gone):
    """And the run ends in the same bits."""
    source, target = run(world, tmp_path / "a", *ALLO), tmp_path / "b"
    target.mkdir()
    for name in names:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, target / name)
    run(world, target, *ALLO)
    made, again = (set(json.loads((folder / "results.json").read_text())["seconds"])
                   for folder in (source, target))
    assert made - again == gone and again < made
    assert equal(weights_of(source / "improve"), weights_of(target / "improve"))


def test_steps_without_any_weight_are_skipped_and_counted(world, tmp_path, capsys):
    """Of 40 rows, 30 of weight 0, one to a step (a question that stands twice is labelled once)."""
    locate = (*ALLO, "--locate", "random", "--batch", "1", "--max-steps", "0")
    rows = rows_of(run(world, tmp_path / "a", *locate, "--max-steps", "1") / "token_weights.jsonl")
    for number, row in enumerate(rows):
        if number % 4:
            row["reward"] = [1.0] * len(row["reward"])
    with_samples(world, tmp_path / "b")
    (tmp_path / "b/token_weights.jsonl").write_text(lines(*rows))
    capsys.readouterr()
    run(world, tmp_path / "b", *locate)
    said = capsys.readouterr().out
    assert "forget: 10 steps, 30 skipped" in said
    assert first_losses(said)["forget"] == pytest.approx(LN2, rel=1e-5)


@pytest.mark.parametrize("pairs", [False, True])
def test_what_is_finished_is_not_encoded_or_labelled_again(world, tmp_path, monkeypatch, pairs):
    """Nor after a kill in the last lines; an unfinished stage has what it needs encoded."""
    out, calls = tmp_path / "run", []
    command = arguments(world, out, "--method", "rft", "allo", "--locate", "random")
    if pairs:
        command[2:6] = ["--no-forget", "--pairs", f"{world}/pairs.jsonl"]  # for --train, --test
    else:
        with_samples(world, out)
    assert train.main(command) == 0
    with monkeypatch.context() as patched:
        for place, name in ((Encoder, "example"), (train, "label"), (train, "is_correct")):
            patched.setattr(place, name, calls.append)
        for name in ("results.json", "report.html"):
            (out / name).unlink()
            assert train.main(command) == 0 and (out / name).exists() and calls == []
    rows, encode = 22 if pairs else 40, Encoder.example
    monkeypatch.setattr(Encoder, "example", lambda *row: calls.append(row[2]) or encode(*row))
    shutil.rmtree(out / "improve")
    (out / "results.json").unlink()
    assert train.main(command) == 0 and sorted(map(len, calls)) == [1] * rows + [2] * rows


# ---- the plan ----------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    ["--method", "npo", "rft", "simpo", "--sft"], ["--p-forget", "2", "--p", "7"],
    ["--locate", "snr", "--no-forget"], ["--masked", "--method", "dpo", "sft", "--p", "7"], [],
    ["--p", "100", "--p-forget", "5"], ["--method", "masked-dpo", "dpo", "--locate", "movement"],
    ["--method", "sft", "--p-sft", "9"], ["--method", "sft", "--sft", "--p-sft", "8"]], ids=str)
def test_the_plan_is_what_is_then_run(world, tmp_path, capsys, more):
    """A line for each training stage: rows, steps, batch, rate, share of the weights."""
    argv = ["--model", f"{world}/model", "--pairs", f"{world}/pairs.jsonl", "--token-weights",
            "edit", "--no-eval", "--out", str(tmp_path / "run"), *more]
    assert train.main([*argv, "--dry-run"]) == 0
    plan = re.findall(PLAN, capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert plan and plan == re.findall(PLAN, said)
    ran = {line[0]: line[1:] for line in re.findall(RAN, said)}
    assert {line[0] for line in plan} == ran.keys()
    for stage, *settings, percent in plan:
        weights = int(Fraction(percent) * WEIGHTS / 100)
        assert ran[stage] == (*settings, f"{weights:,}"), stage


def test_a_dry_run_changes_nothing(world, whole, tmp_path, capsys, monkeypatch):
    """Neither in a run's folder nor anywhere else; the demo too; mistakes are found as in a run."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train.main([*demo_command(whole.parent), "--dry-run"]) == 0
    assert train.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("responses to each of") == 1  # the first run has its samples
    assert "8 responses to each of 500 questions" in said
    assert len(re.findall(r"(?m)^\w+ +sampled +.* +\S+ GB$", said)) == 10
    assert train.main(arguments(world, tmp_path / "x", "--beta", "0", "--dry-run")) == 2
    assert train.main([*demo_command(whole.parent), "--beta", "0.2", "--dry-run"]) == 2
    assert "another beta" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["sft", "warmup", "rewrite", "forget", "improve", "dpo"])
def test_rates_and_batches_by_size(stage):
    """Rates grow with the root of the size, up to 100 times; batches of 8 or more give 50 steps."""
    cfg = parse(["--model", "m", "--train", "t"])
    sizes = 70_000_000_000, 7_000_000_000, 1_750_000_000, 700_000, 1
    rates = [schedule(cfg, stage, size, 1000).lr for size in sizes]
    assert rates == pytest.approx([rates[0] * k for k in (1, 1, 2, 100, 100)], rel=0.05)
    batches = [schedule(cfg, "improve", 10**9, n).batch for n in (1, 5, 8, 100, 450, 1000, 10**6)]
    assert batches == [1, 5, 8, 8, 9, 20, 128] and schedule(cfg, "warmup", 10**9, 10**6).batch == 32
    cfg = parse(["--model", "m", "--train", "t", f"--lr-{stage}", "3e-4", "--batch", "64"])
    plan = schedule(cfg, stage, 1000, 10)
    assert (plan.lr, plan.batch) == (3e-4, 64)


def test_a_card_given_as_a_flag_outranks_a_file(tmp_path):
    (tmp_path / "c.json").write_text('{"config": {"memory": "", "int8": false, "beta": 0.2}}')
    flags = f"--model m --train t --config {tmp_path}/c.json --no-offload --memory".split()
    cfg = parse([*flags, "12gb"])
    assert (cfg.int8, cfg.locate, cfg.offload, cfg.beta) == (True, "snr", False, 0.2)
    (tmp_path / "c.json").write_text('{"memory": "12gb", "schedules": {"sft": {"batch": 8}}}')
    assert parse(flags[:-1]).int8 and not parse([*flags, "24gb"]).int8


# ---- what a command says -----------------------------------------------------------------------

@pytest.mark.parametrize("error, code, says", [
    (UserError("rows.jsonl:3: bad\nrow"), 2, "error: rows.jsonl:3: bad row"),
    (PermissionError(13, "Permission denied", "x"), 2, "error: [Errno 13] Permission denied: 'x'"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "error: out of memory: lower --"),
    (RuntimeError("[..] can't allocate memory: you tried"), 2, "error: out of memory: lower --"),
    (KeyboardInterrupt(), 130, "\nstopped; go on")])
def test_what_ends_a_command_is_one_line_and_a_code(error, code, says, capsys):
    def work():
        raise error

    assert exit_code(work, stopped="stopped; go on") == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(says) and said.err.strip().count("\n") == 0
    with pytest.raises(ZeroDivisionError):  # other errors are ours, and not hidden
        exit_code(lambda: 1 / 0)


def test_without_a_terminal_a_long_step_says_a_line_a_minute(monkeypatch, capsys):
    """With its rate and what is left; a short step says nothing."""
    bar, began = log.tqdm, time.monotonic()
    monkeypatch.setattr(log, "MINUTE", 0.2)
    monkeypatch.setattr(log, "tqdm", lambda *a, **more: bar(*a, maxinterval=0.01, **more))
    monkeypatch.setattr(bar, "monitor", None)  # a thread, which adds lines
    monkeypatch.setattr(bar, "monitor_interval", 0.01)
    for _ in log.progress([*range(60), *log.progress(range(9), label="short")], label="long"):
        time.sleep(0.01)
    most = (time.monotonic() - began) / log.MINUTE
    bar.monitor.exit()
    said = [line for line in capsys.readouterr().err.split("\n") if line.strip()]
    line = r"long: +\d+%\|.*\| \d+/69 \[\d+:\d+<\d+:\d+, +[\d.]+it/s\] *"
    assert 2 <= len(said) <= most and all(re.fullmatch(line, text) for text in said)


def test_a_reader_who_has_seen_enough_ends_a_command_quietly(world, tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    with os.fdopen(writer, "w") as out:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            assert train.main(arguments(world, tmp_path / "run")) == 141
        out.flush()  # as Python does at the end: without an error now
    assert capsys.readouterr() == ("", "")


def test_weights_that_do_not_move_or_are_no_numbers(world, tmp_path, capsys):
    for lr, moved in (("1e-30", False), ("1e-6", True)):
        out = run(world, tmp_path / lr, "--method", "dpo", "--no-eval", "--lr-dpo", lr)
        assert equal(weights_of(world / "model"), weights_of(out / "dpo")) is not moved
        assert ("WARNING" in capsys.readouterr().out) is not moved
    run(world, tmp_path / "bf16", "--method", "masked-dpo", "--no-eval", "--lr-improve", "1e-12",
        "--dtype", "bf16")  # the fp32 weights move, what is saved does not
    said = capsys.readouterr().out
    assert "0 % of the trained weights changed as torch.bfloat16   <-- WARNING" in said
    apply(["apply", f"{world}/model", f"{tmp_path}/bf16/patch-masked-dpo.safetensors",
           f"{tmp_path}/same"])
    with_samples(world, tmp_path / "run")
    argv = arguments(world, tmp_path / "run", "--method", "dpo", "--lr-dpo", "1e9")
    assert train.main(argv) == 2
    assert error_of(capsys).startswith("error: dpo")
    assert not (tmp_path / "run/dpo").exists()


# ---- two ranks, on CPUs with gloo --------------------------------------------------------------

def test_two_ranks_give_the_run_of_one(world, tmp_path):
    """Losses, every metric and the weights; some steps are of one row, along which the second rank
    has none. All files are there."""
    options = ("--sft --locate gradient --token-weights edit --micro-tokens 300 --batch 3 --p 10 "
               "--max-steps 2 --limit 4 --lr-sft 1e-4 --lr-dpo 1e-5 --lr-forget 1e-4 "
               "--lr-improve 1e-4").split()
    one, two, logs = (tmp_path / name for name in ("one", "two", "logs"))
    run(world, one, *options)
    with_samples(world, two)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                "--redirects=1", f"--log-dir={logs}", "--", "train.py"]
    with subprocess.Popen([*torchrun, *arguments(world, two, *options)], cwd=ROOT) as ranks:
        try:
            assert ranks.wait(120) == 0
        finally:
            ranks.terminate()  # which ends its workers, too
    said, silent = (re.sub(r".*\[Gloo\].*\n", "", path.read_text())
                    for path in sorted(logs.rglob("stdout.log")))
    assert "ALLO" in said and silent == ""
    names = [{path.relative_to(out) for path in out.rglob("*")} for out in (one, two)]
    assert names[0] == names[1]
    assert {row["stage"] for row in steps_of(one)} == {"sft", "dpo", "forget", "improve"}
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        assert a.keys() == b.keys() and a["stage"] == b["stage"]
        for key in a.keys() - {"stage", "time", "tokens/s", "mem/peak_gb"}:
            assert a[key] == pytest.approx(b[key], abs=1e-6, rel=1e-5), (a["stage"], key)
    start = weights_of(world / "model")
    for stage in ("sft", "dpo", "improve"):
        a, b = weights_of(one / stage), weights_of(two / stage)
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-6, stage
        assert max(float((a[n] - start[n]).abs().max()) for n in a) > 1e-5, stage
