"""Nothing lost: kills, Ctrl-C, full disks, other processes; and what a run folder refuses."""

import json
import resource
import shutil
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from helpers import error_of
from kill import Watched, at_line, at_write, in_child, press
from runs import arguments, demo_command, difference, results_of, rows_of, run, with_samples
from safetensors.torch import save_file

import train
from allo_mini.run.files import append_rows, load_tensors

SMALL = ("--sft", "--token-weights", "edit", "--locate", "random", "--no-eval")
KILLED = -signal.SIGKILL
PRESSED = 11  # of the moments, the one of Ctrl-C


def moments(folder) -> list:
    """In the order of the stages; at a line of a step its weights have moved, and are not saved."""
    return [at_line("^ +sft 2/2"), at_write(folder / "samples.part", 3, torn=True),
            at_line("^sample: "), at_line("^ +dpo 1/2"),
            at_write(folder / ".movement", 1, torn=True), at_line("^mask: "),
            at_line("^ +rewrite 2/2"), at_write(folder / ".rewrite.state", 1),
            at_write(folder / ".token_weights", 2, torn=True), at_line("^ +forget 2/2"),
            at_line(r"^forget: \d+ steps"), at_line("^ +improve 2/2", press),
            at_write(folder / ".improve.tmp", 2), at_write(folder / ".eval-DPO", 2, torn=True),
            at_write(folder / ".results", 2, torn=True)]


def test_killed_again_and_again_a_run_ends_bit_identically(whole, tmp_path, monkeypatch, capfd):
    """SIGKILL in every stage, each time in the process that goes on; long/kills.py: at random.
    Ctrl-C too, and with a torn metrics file the rows that are whole."""
    monkeypatch.setattr(train, "GROUP", 4)  # questions sampled together
    folder = tmp_path / "run"
    command = demo_command(whole.parent, folder)
    for number, moment in enumerate(moments(folder)):
        code = in_child(lambda: train.main(command), moment)
        assert code == (130 if number == PRESSED else KILLED), number
        if number == PRESSED:
            with (folder / "metrics.jsonl").open("a") as f:
                f.write('{"stage": "improve", "st')
        if number in (1, 4):  # after a group, after a checkpoint: as if it had been a long sitting
            *_, row = [row for row in rows_of(folder / "metrics.jsonl") if "seconds" in row]
            append_rows(folder / "metrics.jsonl", [row | {"seconds": 1000 + row["seconds"]}])
    assert train.main(command) == 0
    seconds = json.loads((folder / "results.json").read_text())["seconds"]
    assert seconds["sample"] > 1000 < seconds["warmup"] and 2000 < sum(seconds.values()) < 3000
    said = capfd.readouterr()
    assert "Traceback" not in said.err and "the same command goes on" in said.err
    assert "improve: goes on after step 1 of 2" in said.out
    assert difference(results_of(whole), results_of(folder)) == []


@pytest.mark.parametrize("stage, lean", [
    ("dpo", ()), ("warmup", ("--method", "allo")), ("bco", ("--method", "bco", "allo")),
    ("sft", ("--p-sft", "9")), ("improve", ("--int8", "--state-bits", "8", "--offload"))])
def test_resume_inside_a_stage(world, tmp_path, capsys, stage, lean):
    """With every form of the optimizer's state, and an objective that remembers."""
    more = ("--sft", "--token-weights", "edit", "--config", world / "settings.json", *lean)
    undisturbed = run(world, tmp_path / "undisturbed", *more)
    command = arguments(world, tmp_path / "run", *more)
    with_samples(world, tmp_path / "run")
    assert in_child(lambda: train.main(command), at_line(rf"^ +{stage} 3/3")) == KILLED
    capsys.readouterr()
    assert train.main(command) == 0
    assert f"{stage}: goes on after step 2 of 3" in capsys.readouterr().out
    assert difference(results_of(undisturbed), results_of(tmp_path / "run")) == []


# ---- what is refused ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cut(world, tmp_path_factory):
    """(command, folder) of a run that was killed in the last step of improve, on its own files."""
    place = shutil.copytree(world, tmp_path_factory.mktemp("cut"), dirs_exist_ok=True)
    folder = place / "run"
    with_samples(world, folder)
    command = arguments(place, folder, *SMALL, "--config", place / "settings.json")
    assert in_child(lambda: train.main(command), at_line("^ +improve 3/3")) == KILLED
    return command, folder


@pytest.mark.parametrize("change", [
    None, lambda state, notes: notes.clear(), lambda state, notes: notes.update(progress="[]"),
    lambda state, notes: notes.update(progress='{"step": 2, "total": 4, "state": {}}'),
    lambda state, notes: state.pop("exp_avg"),
    lambda state, notes: state.update(exp_avg=state["exp_avg"][:3]),
    lambda state, notes: state.update(start=state["start"] + 1)])
def test_a_checkpoint_that_does_not_belong_here_is_refused(cut, tmp_path, capsys, change):
    """None: one that is cut off."""
    command, folder = cut
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run/.improve.state.safetensors"
    state, notes = load_tensors(path)
    if change:
        change(state, notes)
        save_file({name: t.clone() for name, t in state.items()}, path, notes)
    else:
        path.write_bytes(path.read_bytes()[:-7])
    before = path.read_bytes()
    assert train.main([*command, "--out", str(tmp_path / "run")]) == 2
    assert path.name in error_of(capsys) and path.read_bytes() == before


@pytest.mark.parametrize("change", [
    ["--beta", "0.2"], ["--method", "allo"], ["--pairs", "pairs.jsonl"], "train.jsonl",
    "test.jsonl", "model/config.json", "model/tokenizer.json", "model/tokenizer_config.json",
    "model/model.safetensors"], ids=str)
def test_changed_settings_data_and_model_are_named(cut, monkeypatch, capsys, change):
    command, folder = cut
    monkeypatch.chdir(folder.parent)
    before, says = results_of(folder), change
    if isinstance(change, list):
        says = f"another {change[0][2:]}"
        assert train.main([*command, *change]) == 2
    else:
        path = Path(change)
        data = path.read_bytes()
        changed = data[:-1] + bytes([data[-1] ^ 1]) if "safetensors" in change else data + b" "
        path.write_bytes(changed)
        assert train.main(command) == 2
        path.write_bytes(data)
    error = error_of(capsys)
    assert says in error and "choose another --out" in error
    assert difference(before, results_of(folder)) == []


def test_a_second_process_is_kept_out(world, tmp_path, capfd):
    """It comes in a step of the first, which goes on; a dry run may look."""
    command, codes = arguments(world, tmp_path / "run", *SMALL), []
    with_samples(world, tmp_path / "run")

    def others():
        for more in ([], ["--dry-run"]):
            codes.append(in_child(lambda: train.main([*command, *more])))

    with redirect_stdout(Watched(sys.stdout, "^ +dpo 1/3", others)):
        assert train.main(command) == 0
    assert codes == [2, 0] and "another process is at work" in error_of(capfd)


def small_files():
    """The kernel refuses larger files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_write_that_fails_leaves_the_last_good_state(world, cut, tmp_path, capfd):
    command, folder = cut
    command = [*command, "--out", str(shutil.copytree(folder, tmp_path / "run"))]
    before = results_of(tmp_path / "run")
    capfd.readouterr()
    assert in_child(lambda: train.main(command), small_files) == 2
    assert "File too large" in error_of(capfd)
    assert difference(before, results_of(tmp_path / "run")) == []
    assert train.main(command) == 0
    command = arguments(world, tmp_path / "b", "--locate", "gradient", "--method", "allo")
    with_samples(world, tmp_path / "b")  # in a mapped file's missing room a write is a signal
    assert in_child(lambda: train.main(command), small_files) == 2
    assert "File too large" in capfd.readouterr().err
