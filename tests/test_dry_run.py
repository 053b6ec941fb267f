"""--dry-run says what the run then does, and touches nothing."""

import json
import re

import pytest

import train
from allo_mini import disk, dry_run
from allo_mini.config import parse
from allo_mini.inputs import open_run
from allo_mini.memory import TRAINING
from test_train import arguments, world  # noqa: F401 (fixture)


def everything(*folders) -> dict:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for folder in folders for p in [folder, *folder.rglob("*")]}


def table_of(text: str) -> dict[str, list[str]]:
    """stage -> the cells of its line in the plan."""
    lines = text[text.index("\nstage "):].split("\n\n")[0].splitlines()[3:]
    return {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:] for line in lines}


@pytest.mark.parametrize("more", [(), ("--method", "npo", "rft", "simpo", "--sft"), ("--mask-source", "random"),
                                  ("--locate", "gradient", "--token-weights", "uniform", "--no-forget")])
def test_rows_steps_batches_and_rates_are_those_of_the_run(world, tmp_path, capsys, more):  # noqa: F811
    argv = arguments(world, tmp_path / "run", *more, "--no-eval", "--sft-epochs", "0.5")
    before = everything(world, tmp_path)
    assert train.main([*argv, "--dry-run"]) == 0
    plan = table_of(capsys.readouterr().out)
    assert everything(world, tmp_path) == before
    assert train.main(argv) == 0
    notes = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = {n["stage"]: [str(n["rows"]), str(n["steps"]), str(n["batch"]), f"{n['lr']:g}"] for n in notes if "steps" in n}
    assert {stage: cells[:4] for stage, cells in plan.items() if stage in TRAINING} == trained


def test_what_is_not_sampled_yet_is_at_most_so_much(world, tmp_path, capsys):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--n", "3", "--pairs-per-question", "2")
    at = argv.index("--samples")
    assert train.main([*argv[:at], *argv[at + 2:], "--dry-run"]) == 0
    said = capsys.readouterr().out
    plan = table_of(said)
    assert plan["sample"][0] == "at most 60" and plan["dpo"][0] == "at most 40"  # 24 rows less 4 test rows; 3 each, 2 pairs
    assert plan["test"][0] == "18" and "nothing is written" in said and re.search(r"(?m)^dpo +0\.00 ", said)


def test_what_is_there_already_is_skipped(world, tmp_path, capsys):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--max-steps", "1", "--method", "dpo", "--no-eval")
    assert train.main(argv) == 0
    before = everything(tmp_path)
    capsys.readouterr()
    assert train.main([*argv, "--dry-run"]) == 0
    assert table_of(capsys.readouterr().out)["dpo"][-1] == "is there, skipped" and everything(tmp_path) == before


def test_a_run_that_is_going_on_is_not_disturbed(world, tmp_path, capsys):  # noqa: F811
    argv = arguments(world, tmp_path / "run", "--max-steps", "1")
    open_run(parse(argv))  # holds the folder
    before = everything(tmp_path)
    assert train.main([*argv, "--dry-run"]) == 0 and everything(tmp_path) == before
    disk.HELD.clear()


@pytest.mark.parametrize("more, says", [(["--sft-lrr", "1"], "did you mean"), (["--beta", "0"], "--beta is 0"),
                                        (["--train", "nowhere.jsonl"], "nowhere.jsonl"),
                                        (["--model", "nobody/nothing"], "nobody/nothing")])
def test_mistakes_are_found_as_in_a_run(world, tmp_path, capsys, more, says):  # noqa: F811
    assert train.main([*arguments(world, tmp_path / "run"), *more, "--dry-run"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and says in errors and not (tmp_path / "run").exists()


def test_memory_and_pairs(world, tmp_path, capsys):  # noqa: F811
    argv = ["--model", str(world / "model"), "--pairs", str(world / "pairs.jsonl"), "--memory", "12gb", "--max-length", "300",
            "--out", str(tmp_path / "run"), "--dry-run"]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert "sample" not in table_of(said) and said.count("estimate in GB") == 1 and "--memory 12gb:" in said


def test_longer_rows_and_more_layers_take_longer(world, tmp_path, monkeypatch):  # noqa: F811
    run = open_run(parse([*arguments(world, tmp_path / "run"), "--dry-run"]))
    clock = iter([1.0, 4.0, 1.5, 5.5])  # forward and both of one layer, of two
    monkeypatch.setattr(dry_run, "timed", lambda work: next(clock))
    assert dry_run.seconds_per_token(run, 100) == pytest.approx((0.015, 0.055))


@pytest.mark.parametrize("seconds, text", [(0.2, "0.2 s"), (42.4, "42 s"), (90, "1.5 min"), (3600, "1 h"), (90000, "25 h")])
def test_spell(seconds, text):
    assert dry_run.spell(seconds) == text
