"""--dry-run says what the run then does, and touches nothing."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

import train
from allo_mini import dry_run
from allo_mini.checkpoint import save_model
from allo_mini.config import parse
from allo_mini.inputs import open_run
from test_train import arguments, random_model, world  # noqa: F401 (fixture)

SAID = re.compile(r"(?m)^(\S+): (\d+) rows, (\d+) steps of (\d+), lr (\S+), ([\d,]+) weights in training$")
ROOT = Path(__file__).parent.parent


def everything(*folders) -> dict:
    """Every file and folder: its time of change, size, and for small ones what is in it."""
    paths = [p for folder in folders for p in [folder, *folder.rglob("*")]]
    return {p: (p.stat().st_mtime_ns, p.stat().st_size, p.is_file() and p.read_bytes()) for p in paths}


def table_of(text: str) -> dict[str, list[str]]:
    """stage -> the cells of its line in the plan: rows, steps, batch, lr, weights trained, time."""
    lines = text[text.index("\nstage "):].split("\n\n")[0].splitlines()[3:]
    return {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:] for line in lines}


def dry(argv, capsys, *folders) -> str:
    """What a dry run prints; it must leave the folders as they are."""
    before = everything(*folders)
    capsys.readouterr()
    assert train.main([*argv, "--dry-run"]) == 0
    assert everything(*folders) == before
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def small(world):  # noqa: F811
    """A smaller model with the same tokenizer, for --reward-base."""
    raw = json.loads((world / "model/config.json").read_text())
    save_model(random_model({**raw, "num_hidden_layers": 1, "intermediate_size": 16}, world / "demo/model"), world / "small")
    return world / "small"


@pytest.mark.parametrize("more", [
    [], ["--method", "npo", "rft", "simpo", "--sft"], ["--mask-source", "random", "--max-length", "48"],
    ["--locate", "gradient", "--no-forget"], ["--p-forget", "2", "--p", "7", "--max-steps", "2"],
    ["--p-sft", "5", "--sft", "--method", "sft", "allo"], ["--reward-base", "SMALL", "--p-sft", "5"], "pairs"], ids=str)
def test_rows_steps_batches_rates_and_weights_are_those_of_the_run(world, small, tmp_path, capsys, more):  # noqa: F811
    """Exactly, where no row is dropped as too long; else the rows are at least as many."""
    argv = arguments(world, tmp_path / "run", *(str(small) if word == "SMALL" else word for word in more if more != "pairs"))
    if more == "pairs":
        argv = ["--model", str(world / "model"), "--pairs", str(world / "pairs.jsonl"), "--out", str(tmp_path / "run"),
                "--max-length", "40", "--prompt", "chat"]
    argv += ["--no-eval", "--sft-epochs", "0.5"]
    said = dry(argv, capsys, world, tmp_path)
    plan = {stage: cells[:5] for stage, cells in table_of(said).items() if cells[3] not in "--"}
    assert train.main(argv) == 0
    ran = {stage: cells for stage, *cells in SAID.findall(capsys.readouterr().out)}
    assert list(plan) == list(ran) and len(plan) > 1
    if "48" in more or more == "pairs":
        assert all(int(plan[stage][0]) >= int(ran[stage][0]) and plan[stage][3:] == ran[stage][3:] for stage in ran)
    else:
        assert plan == ran


def test_what_is_not_sampled_yet_is_at_most_so_much(world, tmp_path, capsys):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--n", "3", "--pairs-per-question", "2")
    at = argv.index("--samples")
    said = dry(argv[:at] + argv[at + 2:], capsys, world, tmp_path)
    plan = table_of(said)  # 24 rows less 4 test rows
    assert list(plan) == "sample dpo warmup locate reward score forget improve test together".split()
    assert plan["sample"][0] == "60" and plan["reward"][0] == "60" and plan["dpo"][0] == "40" and plan["test"][0] == "18"
    assert "the most there can be" in said and "Times are rough" in said and re.search(r"(?m)^dpo +0\.00 ", said)
    assert re.search(r"disk: about [\d.]+ GB, and up to [\d.]+ GB meanwhile .* GB are free", said)


def test_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = dry([], capsys, tmp_path, ROOT / "allo_mini/demo")
    assert table_of(said)["sample"][0] == "4000" and "Run folder: runs/demo-2023 (new)" in said


def test_what_is_there_already_is_skipped(world, tmp_path, capsys):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--max-steps", "1", "--p-forget", "2", "--no-eval", "--sft", "--p-sft", "5")
    assert train.main(argv) == 0
    run = tmp_path / "run"
    assert "this run is finished" in dry(argv, capsys, world, tmp_path)
    (run / "results.json").unlink()
    shutil.rmtree(run / "reward")
    shutil.rmtree(run / "improve")
    left = {stage for stage, cells in table_of(dry(argv, capsys, world, tmp_path)).items() if "skipped" not in cells[-1]}
    assert left == {"reward", "improve", "together"}
    (run / "mask.safetensors").unlink()
    left = {stage for stage, cells in table_of(dry(argv, capsys, world, tmp_path)).items() if "skipped" not in cells[-1]}
    assert left == {"locate", "reward", "improve", "together"}
    said = dry([*argv, "--restart"], capsys, world, tmp_path)
    assert "would be renamed" in said and "skipped" not in said


def test_samples_that_are_there_are_counted(world, tmp_path, capsys):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--no-eval", "--n", "4")
    at = argv.index("--samples")
    argv = argv[:at] + argv[at + 2:]
    open_run(parse(argv))
    shutil.copyfile(world / "samples.jsonl", tmp_path / "run/samples.jsonl")
    plan = table_of(dry(argv, capsys, world, tmp_path))
    assert plan["sample"][-1] == "skipped" and plan["dpo"][0] == "40"  # one right, two different wrong ones


def test_a_run_that_is_going_on_is_not_disturbed(world, tmp_path, capsys):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--max-steps", "1")
    code = "import torch; torch.set_num_threads(1)\n"
    code += f"from allo_mini import inputs, config; inputs.open_run(config.parse({argv!r})); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        while other.stdout.readline() not in ("held\n", ""):
            pass
        assert "there already" in dry(argv, capsys, world, tmp_path)
        assert train.main(argv) == 2 and "another process" in capsys.readouterr().err
    finally:
        other.communicate("\n")


def test_mistakes_are_found_as_in_a_run(world, tmp_path, capsys):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--beta", "0.2")
    open_run(parse(argv))
    (tmp_path / "typo.jsonl").write_text('{"input": "1 + 1?", "output": "The answer is 2"}\n{"input": "a" "b"}\n')
    for more, says in ((["--sft-lrr", "1"], "did you mean"), (["--beta", "0"], "--beta is 0"),
                       (["--train", "nowhere.jsonl"], "nowhere.jsonl"), (["--beta", "0.3"], "another beta (0.2, now 0.3)"),
                       (["--train", str(tmp_path / "typo.jsonl")], "typo.jsonl:2"),
                       (["--out", str(tmp_path)], "no run of ours"), (["--out", str(world / "train.jsonl")], "train.jsonl")):
        before = everything(world, tmp_path)
        assert train.main([*argv, *more, "--dry-run"]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and says in errors and everything(world, tmp_path) == before


@pytest.mark.parametrize("flag", ["--model", "--reward-base"])
def test_nothing_is_downloaded(world, tmp_path, monkeypatch, capsys, flag):  # noqa: F811
    asked, cached = [], []

    def download(name, local_files_only=False, **_):
        asked.append(local_files_only)
        if not cached:
            raise FileNotFoundError("not cached")
        return str(cached[0])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    argv = arguments(world, tmp_path / "run", flag, "some/model", "--dry-run")
    assert train.main(argv) == 2
    errors = capsys.readouterr().err
    assert errors == "error: some/model: no such local folder, and not in the hub's cache on this machine\n"
    cached.append(world / "model")
    assert train.main(argv) == 0 and asked and all(asked)
    open_run(parse(argv[:-1]))  # a folder of the same run, whose files are compared
    asked.clear()
    assert train.main(argv) == 0 and asked and all(asked)


def test_memory_and_pairs(world, tmp_path, capsys):  # noqa: F811
    said = dry(["--model", str(world / "model"), "--pairs", str(world / "pairs.jsonl"), "--memory", "12gb", "--max-length",
                "300", "--out", str(tmp_path / "run")], capsys, world, tmp_path)
    assert "sample" not in table_of(said) and said.count("estimate in GB") == 1 and "--memory 12gb:" in said


# ---- the numbers -------------------------------------------------------------------------------------------

ROWS = dict.fromkeys(("questions", "solutions", "pairs", "right", "wrong", "weighted"), 100)
SPEED = dry_run.Measured(prompt=20, response=10, read=1e-3, sampled=5e-3)


def test_the_rewriting_model_counts_with_its_own_size(world, small, tmp_path):  # noqa: F811
    run = open_run(parse([*arguments(world, tmp_path / "run", "--reward-base", str(small)), "--dry-run"]))
    score, reward, dpo = (dry_run.line_of(run, stage, ROWS, SPEED) for stage in ("score", "reward", "dpo"))
    n = int(reward.training[3].replace(",", ""))
    assert n < run.parameters == int(dpo.training[3].replace(",", "")) and reward.stay == 4 * n
    assert score.seconds == pytest.approx(5.0 * n / run.parameters)  # prompt and three responses
    assert reward.seconds == pytest.approx(20.0 * n / run.parameters)


def test_seconds_of_a_stage(world, tmp_path):  # noqa: F811
    run = open_run(parse([*arguments(world, tmp_path / "run", "--locate-groups", "3", "--dpo-epochs", "2"), "--dry-run"]))
    seconds = {stage: dry_run.line_of(run, stage, ROWS, SPEED).seconds for stage in ("sample", "score", "locate", "dpo", "rft")}
    assert seconds == pytest.approx({"sample": 5, "score": 5, "locate": 36, "dpo": 32, "rft": 36})  # rft: sft's 3 epochs
    run = open_run(parse([*arguments(world, tmp_path / "run", "--eval-every", "5", "--val-rows", "4"), "--dry-run"]))
    assert dry_run.line_of(run, "dpo", ROWS, SPEED).seconds == pytest.approx(16 + 3 * 4 * (0.02 + 0.05))  # 13 steps of 8


def test_more_memory_than_there_is_is_warned_of(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    for there, warned in ((64 << 30, False), (1 << 20, True), (0, False)):  # 0: the system does not say
        monkeypatch.setattr(dry_run, "host_memory", lambda: there)
        assert train.main([*arguments(world, tmp_path / "run"), "--dry-run"]) == 0
        assert ("WARNING: " in capsys.readouterr().out) == warned


def test_what_is_measured_is_scaled_to_all_layers(world, tmp_path, monkeypatch):  # noqa: F811
    run = open_run(parse([*arguments(world, tmp_path / "run"), "--dry-run"]))
    layer = sum(shape.numel() for name, shape in run.shapes.items() if ".layers.0." in name)

    def repeat(work, number, repeat):
        work()
        return [0.75, 0.5, 1.0]
    monkeypatch.setattr(dry_run.timeit, "repeat", repeat)
    two = dry_run.measure(run)
    assert (two.read, two.sampled) == pytest.approx((0.5 / 256, 0.5 / 128)) and min(two.prompt, two.response) > 30
    run.config = replace(run.config, num_hidden_layers=5)
    run.shapes = {**run.shapes, "model.layers.2.to.4": type(run.shapes["model.norm.weight"])((3 * layer,))}
    five = dry_run.measure(run)
    assert five.read / two.read == five.sampled / two.sampled == pytest.approx(1 + 3 * layer / (run.parameters - 3 * layer))


def test_what_is_written_is_about_what_was_said(world, tmp_path):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--max-steps", "2", "--no-eval", "--sft")
    run = open_run(parse([*argv, "--dry-run"]))
    plan = dry_run.plan_of(run)
    assert train.main(argv) == 0
    models = {p.parent.name: p.stat().st_size for p in tmp_path.glob("run/*/model.safetensors")}
    models["warmup"] = (tmp_path / "run/movement.safetensors").stat().st_size
    assert {stage for stage, line in plan.items() if line.stay} == models.keys() and len(models) == 6
    for stage, size in models.items():
        assert size == pytest.approx(plan[stage].stay, rel=0.3), stage
    assert plan["dpo"].meanwhile == 2 * 20 * run.parameters
    assert all(dry_run.is_made(run, stage) for stage in plan)
