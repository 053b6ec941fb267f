"""Nothing lost: kills, Ctrl-C, full disks, read-only folders, changed inputs, numbers that are none."""

import json
import os
import shutil
import signal

import pytest
import torch
from kill import at_write, difference, die, in_child, on_call, results_of
from safetensors.torch import load_file, save_file
from test_stages import equal, start, weights
from test_train import arguments, world

import train
from allo_mini import UserError, disk, files, inputs, run as run_module
from allo_mini.config import parse
from allo_mini.data import Example
from allo_mini.inputs import open_run
from allo_mini.loop import Objective, dpo_objective, run_stage
from allo_mini.mask import select_neurons

OPTIONS = ["--sft", "--sft-batch", "2", "--max-steps", "3", "--reward-batch", "5", "--dpo-batch", "5",
           "--warmup-batch", "5", "--forget-batch", "5", "--improve-batch", "5", "--save-minutes", "0",
           "--token-weights", "threshold",
           "--test-limit", "3", "--limit", "8", "--locate-pairs", "8", "--max-new-tokens", "3", "--eval-every", "2",
           "--val-rows", "2"]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run of all stages."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(arguments(world, folder, *OPTIONS)) == 0
    return folder


def at_step(stage, number, act=die):
    """Act just before the line of a training step is logged (its weights have moved)."""
    def before():
        on_call(run_module.Log, "step", lambda go, args: act() if args[1:3] == (stage, number) else go())
    return before


def in_file(name, torn=None):
    """Die after half of a file of this name is written."""
    def before():
        def half(go, args):
            go()
            if name in str(args[0] if torn else args[1]):
                os.truncate(args[0] if torn else args[1], 100)
                die()
        if torn:
            on_call(disk.Path, "write_bytes", half)
        else:
            on_call(files, "save_file", half)
    return before


def before_deleting(name):
    def before():
        on_call(disk.Path, "unlink", lambda go, args: die() if args[0].name == name else go())
    return before


MOMENTS = [at_step("sft", 2), in_file("movement"), in_file(".reward.state"), in_file("token_weights", True),
           before_deleting(".forget.state.safetensors"), at_step("improve", 3), in_file("eval-DPO", True)]  # in their order


def test_killed_again_and_again_a_run_ends_bit_identically(world, whole, tmp_path):
    """Seven SIGKILLs, each one in a resumed process; then the run is let go on to its end."""
    command = arguments(world, tmp_path / "run", *OPTIONS)
    for number, moment in enumerate(MOMENTS):
        assert in_child(lambda: train.main(command), moment) == -signal.SIGKILL, number
    assert train.main(command) == 0
    assert difference(results_of(whole), results_of(tmp_path / "run")) == []


def test_killed_inside_any_write(world, whole, tmp_path):
    """Two of some hundred places; tests/long/kills.py draws from all of them."""
    command = arguments(world, tmp_path / "run", *OPTIONS)
    assert in_child(lambda: train.main(command), lambda: at_write(60, False)) == -signal.SIGKILL
    assert in_child(lambda: train.main(command), lambda: at_write(41, True)) == -signal.SIGKILL
    assert train.main(command) == 0
    assert difference(results_of(whole), results_of(tmp_path / "run")) == []


def test_a_torn_metrics_file_is_mended(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("results.json", "eval-ALLO.jsonl"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run/improve")
    with (tmp_path / "run/metrics.jsonl").open("a") as f:
        f.write('{"stage": "improve", "st')
    assert train.main(arguments(world, tmp_path / "run", *OPTIONS)) == 0
    assert difference(results_of(whole), results_of(tmp_path / "run")) == []


def test_ctrl_c_saves_and_the_same_command_goes_on(world, whole, tmp_path, monkeypatch, capsys):
    command = [*arguments(world, tmp_path / "run", *OPTIONS), "--save-minutes", "1000"]
    line, handler = run_module.Log.step, signal.getsignal(signal.SIGINT)

    def pressed(self, stage, number, *rest):
        line(self, stage, number, *rest)
        if (stage, number) == ("improve", 2):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(run_module.Log, "step", pressed)
    assert train.main(command) == 130
    said = capsys.readouterr()
    assert "improve: saved after step 2 of 3" in said.out and "the same command goes on" in said.err
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(run_module.Log, "step", line)
    assert train.main(command) == 0
    assert "improve: goes on after step 2 of 3" in capsys.readouterr().out
    assert difference(results_of(whole), results_of(tmp_path / "run")) == []


# ---- what is refused ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cut(world, tmp_path_factory):
    """A run that was killed in the middle of improve."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    assert in_child(lambda: train.main(arguments(world, folder, *OPTIONS)), at_step("improve", 3)) == -signal.SIGKILL
    return folder


def reversed_bits(path):
    state = load_file(path)
    with files.open_safetensors(path) as f:
        save_file({n: t.flip(0) for n, t in state.items()}, path, f.metadata())


def of_state(change):
    def do(folder):
        path = folder / ".improve.state.safetensors"
        state = load_file(path)
        with files.open_safetensors(path) as f:
            metadata = f.metadata()
        change(state, metadata)
        save_file(state, path, metadata)
    return do


def shorter(folder):
    path = folder / ".improve.state.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


CHANGES = [("config.json", lambda f: (f / "config.json").write_bytes((f / "config.json").read_bytes() + b" "),
            "another config.json"),
           ("mask", lambda f: reversed_bits(f / "mask.safetensors"), "another mask"),
           ("model", lambda f: shutil.copyfile(f / "sft/model.safetensors", f / "forget/model.safetensors"),
            "another model"),
           ("truncated", shorter, "not a complete safetensors"),
           ("no progress", of_state(lambda s, m: m.clear()), "no checkpoint of ours"),
           ("broken progress", of_state(lambda s, m: m.update(progress="{")), "no checkpoint of ours"),
           ("a list", of_state(lambda s, m: m.update(progress="[]")), "no checkpoint of ours"),
           ("a step too many", of_state(lambda s,
                                        m: m.update(progress=m["progress"].replace('"step": 2', '"step": 9'))),
            "no checkpoint of ours"),
           ("a word for a step", of_state(lambda s,
                                          m: m.update(progress=m["progress"].replace('"step": 2', '"step": "2"'))),
            "no checkpoint of ours"),
           ("no moments", of_state(lambda s, m: s.pop("exp_avg")), "no checkpoint of ours"),
           ("shorter moments", of_state(lambda s, m: s.update(exp_avg=s["exp_avg"][:1])), "no checkpoint of ours"),
           ("another step count", of_state(lambda s,
                                           m: m.update(progress=m["progress"].replace('steps": 3', 'steps": 4'))),
            "another number of steps")]


@pytest.mark.parametrize("change, says", [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_checkpoint_that_does_not_belong_here_is_refused(world, cut, tmp_path, capsys, change, says):
    shutil.copytree(cut, tmp_path / "run")
    change(tmp_path / "run")
    before = results_of(tmp_path / "run")
    assert train.main(arguments(world, tmp_path / "run", *OPTIONS)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and says in errors, errors
    assert difference(before, results_of(tmp_path / "run")) == []


def test_changed_settings_data_and_model_are_named(world, cut, tmp_path, capsys):
    for name in ("model", "train.jsonl", "test.jsonl", "samples.jsonl"):
        copy = shutil.copytree if (world / name).is_dir() else shutil.copyfile
        copy(world / name, tmp_path / name)
    command = arguments(tmp_path, tmp_path / "run", "--max-steps", "1", "--method", "allo", "--no-eval",
                        "--token-weights", "edit")
    assert in_child(lambda: train.main(command), at_step("warmup", 1)) == -signal.SIGKILL
    for change, says in ((["--beta", "0.2", "--n", "3"], ["another beta (0.1, now 0.2)", "another n (10, now 3)"]),
                         ("train.jsonl", [f"another content of {tmp_path}/train.jsonl"]),
                         ("model/tokenizer_config.json", [f"another content of {tmp_path}/model/tokenizer_config.json"]),
                         ("model/config.json", [f"another content of {tmp_path}/model/config.json"]),
                         ("model/model.safetensors", [f"another content of {tmp_path}/model/model.safetensors"])):
        more = change if isinstance(change, list) else []
        if not more and "safetensors" in change:  # one bit, in the middle
            data = bytearray((tmp_path / change).read_bytes())
            data[len(data) // 2] ^= 1
            (tmp_path / change).write_bytes(data)
        elif not more:
            (tmp_path / change).write_bytes((tmp_path / change).read_bytes() + b"\n")
        assert train.main([*command, *more]) == 2
        errors = capsys.readouterr().err
        assert all(part in errors for part in [*says, "--restart"]), errors


def test_restart_moves_the_old_run_aside(world, cut, tmp_path, capsys):
    shutil.copytree(cut, tmp_path / "run")
    (tmp_path / "run.1").mkdir()
    command = arguments(world, tmp_path / "run", "--max-steps", "1", "--method", "allo", "--no-eval",
                        "--token-weights", "edit")
    assert train.main([*command, "--restart"]) == 0
    assert f"{tmp_path / 'run'} is now {tmp_path / 'run.2'}" in capsys.readouterr().out
    assert difference(results_of(cut),
                      results_of(tmp_path / "run.2")) == [] and not list((tmp_path / "run.1").iterdir())
    assert train.main(command) == 0 and "is finished" in capsys.readouterr().out


def test_restart_touches_no_folder_that_is_not_a_run(world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "run")
    before = results_of(tmp_path)
    assert train.main(arguments(world, tmp_path / "run", "--restart")) == 2
    assert "no run of ours" in capsys.readouterr().err
    assert difference(before, results_of(tmp_path)) == []


def test_a_run_that_another_process_begins_and_ends_before_we_hold_the_folder(world, tmp_path, monkeypatch, capsys):
    real = inputs.lock

    def other(folder):
        monkeypatch.setattr(inputs, "lock", real)
        open_run(parse(arguments(world, tmp_path / "run", "--beta", "0.5")))
    monkeypatch.setattr(inputs, "lock", other)
    assert train.main(arguments(world, tmp_path / "run")) == 2
    assert "another beta (0.5, now 0.1)" in capsys.readouterr().err


def test_a_second_process_is_kept_out_until_the_first_is_gone(world, tmp_path):
    command = arguments(world, tmp_path / "run", "--max-steps", "1", "--method", "allo", "--no-eval",
                        "--token-weights", "edit")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # a process that holds the folder until it is killed
        try:
            open_run(parse(command))
            os.write(write, b"held")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(read, 4) == b"held"
    try:
        assert train.main(command) == 2
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert train.main(command) == 0


# ---- disks -------------------------------------------------------------------------------------------------

def small_files(size):
    def before():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return before


def test_a_write_that_fails_leaves_the_last_good_state(world, tmp_path, capfd):
    """The kernel refuses files of more than 60 kB: checkpoints and models do not fit, what is there stays."""
    command = arguments(world, tmp_path / "run", *OPTIONS)
    assert in_child(lambda: train.main(command), at_step("sft", 3)) == -signal.SIGKILL
    before = results_of(tmp_path / "run")
    assert ".sft.state.safetensors" in before
    assert in_child(lambda: train.main(command), small_files(60_000)) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "Traceback" not in errors
    assert "File too large; " in errors and "bytes are needed" in errors and "are free" in errors
    assert not [d for d in difference(before, results_of(tmp_path / "run")) if d != "metrics.jsonl"]


def test_a_memory_mapped_file_is_made_only_where_there_is_room(world, tmp_path, capfd):
    """Without the room a write into the mapping would end the process by a signal."""
    command = arguments(world, tmp_path / "run", "--locate", "gradient", "--method", "allo", "--token-weights", "edit")
    assert in_child(lambda: train.main(command), small_files(60_000)) == 2
    errors = capfd.readouterr().err
    assert "run/a temporary file: cannot be written: File too large; 131,712 bytes are needed" in errors, errors


def test_missing_bytes_are_told_before_a_stage_begins(world, tmp_path, monkeypatch, capsys):
    run, examples = start(world, tmp_path)
    usage = shutil.disk_usage
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(path)._replace(free=100_000))
    with pytest.raises(UserError) as caught:
        run_stage(run, "dpo", run.load(run.base), examples, dpo_objective(0.1))
    state = 4 * 4 * run.parameters + 8  # master, two moments and the start, fp32, and the step count
    need = 2 * state + 4 * run.parameters
    assert f"{need:,} bytes are needed, 100,000 are free, {need - 100_000:,} are missing" in str(caught.value)
    assert not (run.folder / "metrics.jsonl").exists()


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    """Our own temporary files and folders, and the file that safetensors renames to one of them."""
    run = tmp_path / "run"
    (run / ".improve.tmp").mkdir(parents=True)
    for name in (".improve.tmp/model.safetensors", ".results.json.tmp", ".tmpQ1w2E3", "mask.safetensors", ".improve.state.safetensors"):
        (run / name).write_text("x")
    disk.lock(run)
    disk.HELD.pop(run).close()
    assert {path.name for path in run.iterdir()} == {".lock", "mask.safetensors", ".improve.state.safetensors"}


def test_a_full_disk(world, tmp_path, capsys):
    place = tmp_path / "small"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {place} 2>/dev/null"):
        pytest.skip("mounting a small disk needs root")
    try:
        (place / "ballast").write_bytes(bytes(600_000))
        assert train.main(arguments(world, place / "run", *OPTIONS)) == 2
        errors = capsys.readouterr().err
        assert "No space left on device" in errors and "are missing" in errors and errors.count("\n") == 1, errors
        assert json.loads((place / "run/config.json").read_text())["config"]["seed"] == 2023
        assert not list((place / "run").glob(".*.tmp"))
    finally:
        disk.HELD.pop(place / "run").close()
        assert os.system(f"umount {place}") == 0


def test_a_read_only_folder(world, cut, tmp_path, capsys):
    shutil.copytree(cut, tmp_path / "run")
    before, place = results_of(tmp_path / "run"), str(tmp_path / "run")
    if os.getuid() == 0:  # to root, only a disk is read-only
        if os.system(f"mount --bind {place} {place} 2>/dev/null && mount -o remount,ro,bind {place}"):
            pytest.skip("mounting needs more rights")
    else:
        os.chmod(place, 0o555)
    try:
        assert train.main(arguments(world, tmp_path / "run", *OPTIONS)) == 2
    finally:
        assert os.system(f"umount {place}") == 0 if os.getuid() == 0 else not os.chmod(place, 0o755)
    errors = capsys.readouterr().err
    assert "run/.lock: cannot be written: " in errors and errors.count("\n") == 1, errors
    assert difference(before, results_of(tmp_path / "run")) == []


def test_keep_1_leaves_the_model_even_of_a_method_that_located_by_movement(world, tmp_path):
    assert train.main(arguments(world, tmp_path / "run", "--method", "dpo", "--mask-source", "top", "--p", "10", "--no-eval",
                                "--max-steps", "1", "--keep", "1")) == 0
    assert (tmp_path / "run/dpo/model.safetensors").is_file() and not (tmp_path / "run/movement.safetensors").exists()


def test_keep_deletes_only_what_can_be_made_again(world, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    before = results_of(tmp_path / "run")
    command = arguments(world, tmp_path / "run", *OPTIONS)
    assert train.main([*command, "--keep", "2"]) == 0  # the run is finished: this only tidies up
    said = capsys.readouterr().out
    gone = {name.split("/")[0] for name in difference(before, results_of(tmp_path / "run"))}
    assert gone == {"sft", "dpo", "movement.safetensors", "reward", "forget.exact.safetensors"}
    assert all(f"deleted {tmp_path / 'run' / name}" in said for name in gone - {"forget.exact.safetensors"})
    assert train.main(command) == 0 and "ALLO" in capsys.readouterr().out


# ---- numbers -----------------------------------------------------------------------------------------------

def test_a_loss_that_is_no_number_stops_with_step_and_rows(world, tmp_path):
    run, examples = start(world, tmp_path, "--save-minutes", "0", "--dpo-batch", "3")
    plain, seen, bad = dpo_objective(0.1), [], examples[7]

    def loss(logps, ref, real, group):
        value, metrics = plain.loss(logps, ref, real, group)
        seen.append(group)
        return value * (float("nan") if any(e.prompt is bad.prompt for e in group) else 1), metrics
    with pytest.raises(UserError) as caught:
        run_stage(run, "dpo", run.load(run.base), examples, Objective(loss, plain.units, plain.step0))
    rows = sorted(i
                  for i, e in enumerate(examples) if any(e.prompt is other.prompt for other in seen[-1]))
    step = len(seen)
    assert 7 in rows and step > 1
    places = ", ".join(map(str, rows))
    assert f"dpo, step {step}: loss is nan, in rows {places} of {len(examples)};" in str(caught.value)
    assert "--dpo-lr" in str(caught.value) and "--dtype fp32" in str(caught.value)
    state = load_file(run.state_file("dpo"))
    assert int(state["steps"]) == step - 1 and all(t.isfinite().all() for t in state.values())


def test_a_gradient_that_is_no_number_stops_before_the_weights_move(world, tmp_path):
    run, examples = start(world, tmp_path)

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")
    model = run.load(run.base)
    before = weights(model)
    with pytest.raises(UserError, match=r"sft, step 1: grad_norm is (nan|inf), in rows [\d, ]+ of"):
        run_stage(run, "sft", model, [Example(e.prompt, e.responses[:1]) for e in examples],
                  Objective(lambda logps, *_: (Explode.apply(-logps.sum()), {}), lambda e: 1))
    assert equal(before, weights(model))


@pytest.mark.parametrize("chosen, margin, warned", [(-0.3, 0.2, True), (-0.3, -0.2, False), (-0.05, 0.2, False),
                                                    (0.3, 0.2, False)])
def test_falling_chosen_responses_are_told_once(world, tmp_path, capsys, chosen, margin, warned):
    run, _ = start(world, tmp_path)
    capsys.readouterr()
    values = {"loss": 0.5, "grad_norm": 1.0, "rewards/chosen": chosen, "rewards/margins": margin}
    for step in (4, 5):
        run.check_numbers("improve", step, values, [], [], lambda group: 0.5)
    said = capsys.readouterr().out
    assert said.count("WARNING") == (1 if warned else 0)
    if warned:
        assert "at step 5 the chosen responses have lost 3.00 nats" in said and "margin is up at 0.2" in said


def test_falling_chosen_responses_are_no_news_without_a_reference_or_in_the_warm_up(world, tmp_path, capsys):
    """SimPO's rewards are mean log-probs, always negative; what the warm-up moved is put back."""
    run, _ = start(world, tmp_path)
    values = {"loss": 0.5, "grad_norm": 1.0, "rewards/chosen": -3.0, "rewards/margins": 0.2}
    run.check_numbers("simpo", 4, values, [], [], None)
    run.check_numbers("warmup", 4, values, [], [], lambda group: 0.5)
    assert "WARNING" not in capsys.readouterr().out


# ---- the seed ----------------------------------------------------------------------------------------------

def test_the_seed_fixes_everything_and_no_global_generator_is_used(world, whole, tmp_path):
    import random

    import numpy
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert train.main(arguments(world, tmp_path / "again", *OPTIONS)) == 0
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]
    assert difference(results_of(whole), results_of(tmp_path / "again")) == []


def test_deterministic_asks_torch_for_it(world, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        run, examples = start(world, tmp_path, "--deterministic", "--max-steps", "1")
        masked = select_neurons({n: torch.rand(s) for n, s in run.shapes.items()}, 0.1)
        for stage, mask in (("dpo", None), ("improve", masked)):
            run_stage(run, stage, run.load(run.base, mask), examples, dpo_objective(0.1), mask)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
