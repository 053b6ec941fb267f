"""The whole method through train.main: every stage with real saving and loading, resuming, own artefacts, the README."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from allo_mini import run as run_module
from allo_mini import tasks
from allo_mini.checkpoint import load_model, save_model
from allo_mini.data import Task
from allo_mini.files import load_mask
from helpers import initialize

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/benchmarks"))
from make_demo import make_demo  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random 2-layer model, 24 problems, and samples for them: one right, two wrong ones each."""
    folder = tmp_path_factory.mktemp("world")
    make_demo(folder / "demo", 40)
    config = json.loads((folder / "demo/model/config.json").read_text())
    raw = {**config, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    model = random_model(raw, folder / "demo/model")
    save_model(model, folder / "model")
    rows = [json.loads(line) for line in (folder / "demo/train.jsonl").read_text().splitlines()]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:24]))
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[20:]))  # four are in both
    with (folder / "samples.jsonl").open("w") as f:
        for r in rows[:24]:
            wrong = r["output"].replace(f"is {r['answer']}", "is 1")
            f.write(json.dumps({"input": r["input"], "samples": [r["output"], wrong, "No idea.", wrong]}) + "\n")
    with (folder / "pairs.jsonl").open("w") as f:
        for r in rows:
            f.write(json.dumps({"prompt": r["input"], "chosen": r["output"], "rejected": "The answer is 1"}) + "\n")
    return folder


def random_model(raw, tokenizer_folder):
    from allo_mini.architecture import parse_config
    from allo_mini.model import CausalLM
    model = initialize(CausalLM(parse_config(raw)), seed=1)
    model.folder = tokenizer_folder
    return model


def arguments(world, out, *more):
    return ["--model", str(world / "model"), "--train", str(world / "train.jsonl"), "--prompt", "chat", "--max-length",
            "300", "--max-new-tokens", "8", "--samples", str(world / "samples.jsonl"), "--test",
            str(world / "test.jsonl"), "--test-limit", "6", "--out", str(out), *more]


def test_every_stage_end_to_end(world, tmp_path, capsys):
    assert train.main(arguments(world, tmp_path / "run", "--sft", "--sft-epochs", "1", "--p-forget", "2",
                                "--eval-every", "2", "--val-rows", "4")) == 0
    out = tmp_path / "run"
    said = capsys.readouterr().out
    assert "4 training rows dropped" in said and "ALLO" in said and "WARNING" not in said
    for folder in ("sft", "reward", "forget", "improve", "dpo"):
        load_model(out / folder)
        assert (out / folder / "tokenizer.json").exists() and (out / folder / "generation_config.json").exists()
    results = json.loads((out / "results.json").read_text())
    assert set(results["results"]) == {"SFT", "DPO", "ALLO"} and results["results"]["ALLO"]["n"] == 6
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {(m["stage"], m["step"]): m for m in metrics if "step" in m}
    assert abs(steps["dpo", 1]["loss"] - 0.693147) < 1e-5 and abs(steps["improve", 1]["loss"] - 0.693147) < 1e-5
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                "logps/rejected", "grad_norm", "learning_rate", "tokens/s", "mem/peak_gb", "useful/fraction"):
        assert key in steps["improve", 1]
    # the masks hold exactly floor(p N / 100) weights, and only those moved
    base = {n: t for n, t in load_file(out / "sft/model.safetensors").items()}
    shapes = {n: t.shape for n, t in base.items()}
    total = sum(t.numel() for t in base.values())
    for name, before, after, p in (("mask-forget", "sft", "forget", 2), ("mask", "forget", "improve", 5)):
        mask = load_mask(out / f"{name}.safetensors", shapes)
        assert sum(int(m.sum()) for m in mask.values()) == p * total // 100
        old, new = load_file(out / before / "model.safetensors"), load_file(out / after / "model.safetensors")
        assert all(torch.equal(old[n][~mask[n]], new[n][~mask[n]]) for n in old)
        assert any(not torch.equal(old[n], new[n]) for n in old)
    # a second call reprints the table and trains nothing; another setting is refused
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = arguments(world, tmp_path / "run", "--sft", "--sft-epochs", "1", "--p-forget", "2", "--eval-every", "2",
                      "--val-rows", "4")
    assert train.main(again) == 0 and results["table"] in capsys.readouterr().out
    assert train.main([*again, "--beta", "0.2"]) == 2
    assert "another beta (0.1, now 0.2)" in capsys.readouterr().err
    # a run that was begun before there was some flag has its default
    file = out / "config.json"
    known = file.read_text()
    config = json.loads(known)
    del config["config"]["beta"]
    file.write_text(json.dumps(config))
    assert train.main(again) == 0 and train.main([*again, "--beta", "0.2"]) == 2
    assert "another beta (0.1, now 0.2)" in capsys.readouterr().err
    file.write_text(known)
    del written[file]
    assert written == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p != file}


@pytest.mark.parametrize("mode", ["soft", "released", "edit", "uniform"])
def test_token_weight_modes(world, tmp_path, mode):
    assert train.main(arguments(world, tmp_path / "run", "--token-weights", mode, "--locate", "gradient", "--no-eval",
                                "--max-steps", "2", "--method", "allo")) == 0
    metrics = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    fraction = [m["token_weight/fraction"] for m in metrics if m["stage"] == "forget" and "step" in m]
    assert fraction and (all(0 < f < 1 for f in fraction) if mode == "edit" else all(f == 1 for f in fraction))
    assert not (tmp_path / "run/movement.safetensors").exists()


def test_pairs_run_reports_preference_accuracy(world, tmp_path):
    argv = ["--model", str(world / "model"), "--pairs", str(world / "pairs.jsonl"), "--prompt", "chat", "--max-length",
            "300", "--token-weights", "edit", "--out", str(tmp_path / "run"), "--improve-lr", "1e-3"]
    assert train.main(argv) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())["results"]
    assert set(results) == {"start", "DPO", "ALLO"} and results["ALLO"]["n"] == 4
    assert results["ALLO"]["margin"] > results["start"]["margin"]


def test_bf16_run_with_checkpointing(world, tmp_path, capsys):
    """bf16 weights: the first step's ratios are exactly 0, only masked weights change, the saved files stay bf16."""
    assert train.main(arguments(world, tmp_path / "run", "--dtype", "bf16", "--token-weights", "edit", "--locate", "gradient",
                                "--checkpoint-blocks", "1", "--improve-lr", "1e-2", "--method", "allo")) == 0
    said = capsys.readouterr().out
    assert "improve: first loss 0.693147, expected 0.693147" in said and "WARNING" not in said
    old, new = (load_file(tmp_path / f"run/{name}/model.safetensors") for name in ("forget", "improve"))
    mask = load_mask(tmp_path / "run/mask.safetensors", {n: t.shape for n, t in old.items()})
    assert all(t.dtype == torch.bfloat16 for t in new.values())
    assert all(torch.equal(old[n][~mask[n]], new[n][~mask[n]]) for n in old)
    assert any(not torch.equal(old[n], new[n]) for n in old)


def test_own_mask_and_token_weights(world, tmp_path):
    first = arguments(world, tmp_path / "a", "--max-steps", "3", "--no-eval", "--method", "allo")
    assert train.main(first) == 0
    own = ["--mask", str(tmp_path / "a/mask.safetensors"), "--token-weights-file", str(tmp_path / "a/token_weights.jsonl")]
    assert train.main(arguments(world, tmp_path / "b", "--max-steps", "3", "--no-eval", "--method", "allo", *own)) == 0
    assert not (tmp_path / "b/reward").exists() and not (tmp_path / "b/mask.safetensors").exists()
    same(tmp_path / "a/improve", tmp_path / "b/improve")


def test_token_weights_of_other_questions_are_left_out(world, tmp_path, capsys):
    first = arguments(world, tmp_path / "a", "--max-steps", "3", "--no-eval", "--method", "allo")
    assert train.main(first) == 0
    rows = (tmp_path / "a/token_weights.jsonl").read_text()
    other = {"input": "else", "output": "The answer is 5", "reward": [0.1] * 50}
    (tmp_path / "more.jsonl").write_text(json.dumps(other) + "\n" + rows)
    own = ["--token-weights-file", str(tmp_path / "more.jsonl"), "--mask", str(tmp_path / "a/mask.safetensors")]
    capsys.readouterr()
    assert train.main(arguments(world, tmp_path / "b", "--max-steps", "3", "--no-eval", "--method", "allo", *own)) == 0
    total = 1 + len(rows.splitlines())
    assert f"more.jsonl: 1 of {total} rows left out, which belong to no training question" in capsys.readouterr().out
    same(tmp_path / "a/improve", tmp_path / "b/improve")
    # scores that stand in the run folder belong to its negatives, in their order
    (tmp_path / "a/token_weights.jsonl").write_text("".join(reversed(rows.splitlines(keepends=True))))
    for made in ("forget", "improve"):
        shutil.rmtree(tmp_path / "a" / made)
    assert train.main(first) == 0  # finished, only the table
    (tmp_path / "a/results.json").unlink()
    assert train.main(first) == 2 and "token_weights.jsonl: holds the scores of other responses" in capsys.readouterr().err


def same(a, b):
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("stage, step", [("warmup", 1), ("forget", 3), ("improve", 2)])
def test_killed_and_resumed_is_bit_identical(world, tmp_path, monkeypatch, stage, step):
    options = ["--no-eval", "--method", "allo", "--token-weights", "edit", "--max-steps", "4", "--save-minutes", "0"]
    assert train.main(arguments(world, tmp_path / "whole", *options)) == 0
    line = run_module.Log.step

    def killed(self, name, number, *rest):
        if (name, number) == (stage, step + 1):
            raise KeyboardInterrupt
        line(self, name, number, *rest)
    monkeypatch.setattr(run_module.Log, "step", killed)
    assert train.main(arguments(world, tmp_path / "cut", *options)) == 130
    monkeypatch.setattr(run_module.Log, "step", line)
    assert train.main(arguments(world, tmp_path / "cut", *options)) == 0
    same(tmp_path / "whole/improve", tmp_path / "cut/improve")

    def losses_of(name):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(m["stage"], m["step"], m["loss"], m["grad_norm"]) for m in rows if "step" in m]
    assert losses_of("whole") == losses_of("cut")


def test_micro_batches_do_not_change_training(world, tmp_path):
    """Four micro-batches of a step give the same losses and weights as one (up to summation order)."""
    for name, size in (("one", "64"), ("many", "2")):
        assert train.main(arguments(world, tmp_path / name, "--no-eval", "--method", "allo", "--token-weights", "edit",
                                    "--micro-batch", size, "--max-steps", "2", "--locate", "gradient")) == 0
    rows = {name: [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "many")}
    for a, b in zip(rows["one"], rows["many"]):
        if "step" in a:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_sampling_in_the_run_resumes_bit_identically(world, tmp_path, monkeypatch):
    """The sample stage goes on at a group boundary and says what an uninterrupted run says."""
    monkeypatch.setattr(tasks, "GROUP", 8)
    base = ["--model", str(world / "model"), "--train", str(world / "train.jsonl"), "--prompt", "chat", "--max-length",
            "300", "--max-new-tokens", "6", "--n", "3"]
    assert train.main([*base, "--out", str(tmp_path / "whole")]) == 2  # a random model is never right: no pairs
    calls, respond = [], tasks.respond

    def cut(*args, **kw):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return respond(*args, **kw)
    monkeypatch.setattr(tasks, "respond", cut)
    assert train.main([*base, "--out", str(tmp_path / "cut")]) == 130
    (tmp_path / "cut/samples.part.jsonl").open("a").write('{"input": "torn')
    monkeypatch.setattr(tasks, "respond", respond)
    assert train.main([*base, "--out", str(tmp_path / "cut")]) == 2
    assert (tmp_path / "cut/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()


def test_eval_command(world, tmp_path, capsys):
    argv = ["--model", str(world / "model"), "--test", str(world / "test.jsonl"), str(world / "pairs.jsonl"), "--prompt",
            "chat", "--max-new-tokens", "5", "--limit", "5", "--max-length", "300", "--out", str(tmp_path / "out")]
    assert evaluation.main(argv) == 0
    said = capsys.readouterr().out
    assert "test.jsonl" in said and "pairs.jsonl" in said and "margin" in said
    items = [json.loads(line) for line in (tmp_path / "out/test.jsonl").read_text().splitlines()]
    assert len(items) == 5 and {"input", "gold", "response", "correct"} <= set(items[0])
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert evaluation.main(argv) == 0 and "margin" in capsys.readouterr().out  # the same again: the table again
    assert evaluation.main([*argv, "--max-new-tokens", "6"]) == 2 and "another max_new_tokens (5, now 6)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_readme_first_command_runs(tmp_path, monkeypatch, capsys):
    """The README's first command, word for word; its train.py part in a small mode."""
    commands = re.findall(r"^```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.M | re.S)
    setup = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    assert commands[0] == setup + ".venv/bin/python train.py"
    assert commands[1] == setup + ".venv/bin/python -m pytest -q tests"
    script, *argv = shlex.split(commands[0].split("&&")[-1])[1:]
    assert (ROOT / script).exists() and argv == []
    monkeypatch.chdir(tmp_path)
    small = ["--limit", "24", "--test-limit", "16", "--n", "6", "--max-steps", "2"]
    assert train.main(argv + small) == 0
    said = capsys.readouterr().out
    for name in ("start", "DPO", "ALLO"):
        assert re.search(rf"^{name} +[\d.]+ % +\[[\d.]+, [\d.]+\] +16$", said, re.M)
    assert (tmp_path / "runs/demo-2023/improve/model.safetensors").exists()


def test_a_question_that_stands_twice_is_sampled_and_labelled_once(world, tmp_path, capsys):
    rows = (world / "train.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(rows + rows)
    made = []
    for file in (world / "train.jsonl", tmp_path / "twice.jsonl"):
        argv = arguments(world, tmp_path / file.stem, "--method", "dpo", "--max-steps", "1", "--no-eval")
        argv[argv.index("--train") + 1] = str(file)
        assert train.main(argv) == 0
        made.append((tmp_path / file.stem / "negatives.jsonl").read_text().splitlines())
    assert sorted(made[0]) == sorted(made[1])
    assert "training rows whose question stands there already: 20;" in capsys.readouterr().out


def test_of_rows_with_one_question_the_one_with_an_answer_counts():
    silent, answered = ([Task(i, f"Q{i % 2}?", said, None) for i in at] for at, said in
                        (((0, 1), "Hm."), ((2, 3), "The answer is 4")))
    run = object.__new__(run_module.Run)
    run.tasks = [*silent, *answered, Task(4, "Q4?", "Hm.", None), Task(5, "Q0?", "The answer is 5", None)]
    assert [t.id for t in run.questions] == [2, 3, 4]
