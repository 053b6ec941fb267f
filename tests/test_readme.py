"""The README is checked line by line, and so is the comparison behind its results."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from helpers import FIXTURES
from runs import ROOT, lines, pair, rows_of, run, weights_of
from safetensors.torch import load_file

import eval as evaluation
import train
from allo_mini import UserError, checkpoint, mask, model, objectives
from allo_mini.data import demo
from allo_mini.data.rows import Task
from allo_mini.evaluation import graders
from allo_mini.run.config import Config, make_parser, parse
from allo_mini.run.folder import load_mask

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import reproduce  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
FORKING, *PAGES = ((ROOT / f"tests/benchmarks/{name}.md").read_text(encoding="utf-8")
                   for name in ("forks", "README", "data"))
BOTH = "".join([README, FORKING, *PAGES])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMANDS = [line for kind, text in BLOCK.findall(BOTH) if kind == "sh"
            for line in text.splitlines()]
FORKS = README.split("\n## Change it")[1] + FORKING
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", FORKS, re.M | re.S)
SETUP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
OTHERS = ("vllm serve ", "hf upload ")  # other people's tools


def words_of(command: str) -> list[str]:
    """What follows python in a command of ours, torchrun's own flags left out."""
    command = command.removeprefix(SETUP)
    command = re.sub(r"^\.venv/bin/torchrun --nproc_per_node=\d+ ", ".venv/bin/python ", command)
    assert command.startswith(".venv/bin/python "), f"no test knows the command {command}"
    return shlex.split(command.removeprefix(".venv/bin/python "))


# ---- commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(OTHERS)])
def test_every_command_is_one_that_the_program_takes(command):
    script, *argv = words_of(command)
    if script == "train.py":
        parse(argv)
    elif script == "eval.py":
        evaluation.make_parser().parse_args(argv)
    elif script == "-m":
        assert argv[0] in ("pytest", "allo_mini.patch", "allo_mini.evaluation.report")
    else:
        if "--more" in argv:  # what follows is for train.py
            at = argv.index("--more")
            parse(["--model", "x", "--train", "x", *argv[at + 1:]])
            argv = argv[:at]
        known = (ROOT / script).read_text()
        assert all(f'"{flag}"' in known for flag in argv if flag.startswith("--")), command


def test_every_flag_in_the_text_exists():
    scripts = [p.read_text() for p in [ROOT / "eval.py", *ROOT.glob("tests/benchmarks/*.py")]]
    known = {"--index-url", "--nproc_per_node", *make_parser()._option_string_actions}
    text = " ".join(re.findall(r"`[^`]+`", BLOCK.sub("", BOTH)))
    for flag in {*re.findall(r"(?<![\w-])--[a-z][\w-]*", text)} - known:
        assert any(f'"{flag}"' in script for script in scripts), flag


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every file that the README's commands name, small."""
    folder = tmp_path_factory.mktemp("readme")
    rows = [{"input": t.prompt, "output": t.output} for t in demo.problems(20, 5)]
    prefs = [pair(r["input"] + "\n", r["output"], "The answer is 1") for r in rows]
    samples = [{"input": r["input"], "samples": [r["output"], "The answer is 1"]} for r in rows]
    for name, content in {"train": rows[:16], "test": rows[16:], "prefs": prefs,
                          "samples": samples}.items():
        (folder / f"{name}.jsonl").write_text(lines(*content))
    for name in ("DIR_OR_HUB_ID", "BASE", "model"):
        shutil.copytree(demo.FOLDER, folder / name)
    return folder


SHORT = ["--max-new-tokens", "4", "--max-length", "400"]
QUICK = [*SHORT, *"--max-steps 1 --dtype fp32 --locate snr --token-weights edit".split()]


def test_the_recipes_run_one_after_the_other(place, monkeypatch, capsys):
    """As written, with smaller numbers; samples are laid in: a model this small answers nothing."""
    monkeypatch.chdir(place)
    section = README[README.index("\n## Recipes"):README.index("\n## Read it")]
    for command in re.findall(r"^\.venv.*$", section, re.M):
        script, *argv = words_of(command)
        if script == "train.py":
            out = Path(argv[argv.index("--out") + 1])
            out.mkdir(parents=True)
            if "--train" in argv and "sft" not in argv:
                shutil.copy("samples.jsonl", out)
            code = train.main([*argv, *QUICK])
        elif "--chat" in argv:
            continue
        elif script == "eval.py":
            code = evaluation.main([*argv, *SHORT])
        else:
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            code = subprocess.run([sys.executable, "-m", *argv], env=env).returncode
        assert code == 0, (command, capsys.readouterr().err)
    assert (place / "OUT/model.safetensors").is_file() and (place / "eval/dpo/test.jsonl").is_file()


# ---- printed blocks and files --------------------------------------------------------------------

def test_the_first_table_is_what_the_demo_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text('{"test_limit": 16, "prompt": "chat", "max_length": 400}')
    assert train.main(["--config", "small.json", "--limit", "30", "--n", "6", "--max-steps", "1",
                       "--max-new-tokens", "100"]) == 0
    said = [re.sub(r"[\d.]+", "#", line) for line in capsys.readouterr().out.splitlines()]
    table, picture = [text for kind, text in BLOCK.findall(README) if kind == "text"]
    for line in table.splitlines():
        words = re.sub(r"[\d.]+", "#", line).split()
        assert words in [line.split() for line in said] or set(line) == {"-"}, line
    assert "FORGET" in picture and "IMPROVE" in picture


def test_the_curves_go_to_tensorboard(tmp_path, monkeypatch):
    """The example with a stub for tensorboard, which stays optional."""
    [code] = [text for kind, text in BLOCK.findall(README) if "SummaryWriter" in text]
    monkeypatch.chdir(tmp_path)
    Path("runs/prefs").mkdir(parents=True)
    rows = [{"stage": "dpo", "step": 1, "loss": 0.7}, {"stage": "dpo", "seconds": 1.5},
            {"stage": "test DPO", "mem/peak_gb": 0.4}]
    Path("runs/prefs/metrics.jsonl").write_text(lines(*rows))
    board = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(torch.utils, "tensorboard", board, raising=False)
    exec(code, {})
    assert {call.args for call in board.SummaryWriter().add_scalar.call_args_list} == {
        ("dpo/loss", 0.7, 1), ("dpo/seconds", 1.5, None), ("test DPO/mem/peak_gb", 0.4, None)}
    assert "tensorboard" not in (ROOT / "requirements.txt").read_text()


def test_requirements_name_what_is_imported_and_nothing_else():
    imported = {"pytest"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("allo_mini/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [
                    alias.name for alias in node.names]
                imported.update(name.split(".")[0] for name in names)
    named = (ROOT / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0].replace("-", "_") for line in named} == (
        imported - sys.stdlib_module_names - {"allo_mini", "train", "eval"})


def test_the_reading_order_names_every_file():
    section = README[README.index("## Read it in this order"):README.index("## Change it")]
    for path in [*ROOT.glob("allo_mini/*.py"), ROOT / "train.py", ROOT / "eval.py"]:
        assert path.name in section or path.name == "__init__.py"
    for path in ROOT.glob("allo_mini/*/*.py"):
        [row] = re.findall(f".*allo_mini/{path.parent.name}/.*", section)
        assert path.stem in row or path.stem == "__init__", path


def test_the_page_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 250
    assert len(re.findall(r"\S*\w\S*", BLOCK.sub("", README))) <= 2000
    for path in re.findall(r"[`(]((?:tests|allo_mini)/[\w/.]+)[`)]", BOTH):
        assert (ROOT / path).exists(), path
    for kind, text in BLOCK.findall(README):
        assert kind in ("sh", "text", "python")
        if kind == "python":
            ast.parse(text)


def cells_of(text: str) -> dict[str, list[str]]:
    """First cell of a table's line, without emphasis -> the others."""
    table = {}
    for row in re.findall(r"(?m)^\| (.*)\|$", text):
        name, *cells = (cell.strip(" *") for cell in row.split("|"))
        table[name] = cells
    return table


def test_the_results_are_what_the_finished_cells_say():
    """Means and spreads of the README's table, in those that reproduce.py makes of its rows."""
    section = cells_of(README[README.index("## Results"):])
    for column, name in enumerate(("demo", "ecqa")):
        table = (ROOT / f"tests/benchmarks/results/{name}.md").read_text().split("Training loss")[0]
        finished, checked = cells_of(table), 0
        for cell, values in section.items():
            row = finished.get(cell.split(", on ")[0])
            if cell and row:
                assert row[1] == values[column].partition(" (")[0], (name, cell)
                checked += 1
        assert checked >= 7
    [snr] = [values[0] for cell, values in section.items() if "by snr" in cell]
    demo_cells = cells_of((ROOT / "tests/benchmarks/results/demo.md").read_text())
    # the demo's rows have another name for it
    assert demo_cells["masked DPO, 512 pairs"][1] == snr.partition(" (")[0]
    pool = reproduce.pooled(["ecqa-again", "qasc", "openbookqa", "strategyqa"], "DPO")
    assert {*pool.splitlines()[2:]} <= {*BOTH.splitlines()}
    averages = {re.split(" by |:", cell)[0]: values[2]
                for cell, values in section.items() if values[2:]}
    for cell in ("start", "DPO", "masked DPO", "ALLO"):
        assert cells_of(pool)[cell][4] == averages[cell], cell


# ---- examples for forks --------------------------------------------------------------------------

HOOKS = ("weights_from_scores", "select", "allo", "token_scores", "rewrite")
ALLO = ("--no-eval", "--method", "allo", "--locate", "snr", "--lr-improve", "1e-2")
EDIT = ("--token-weights", "edit")


@pytest.fixture
def fork(monkeypatch):
    """fork(word): run the example that holds the word; what it changed is put back afterwards."""
    def execute(word):
        [code] = [text for text in EXAMPLES if word in text]
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
        names = {}
        exec(code, names)
        return names

    for name in HOOKS:
        monkeypatch.setattr(train, name, getattr(train, name))
    with (patch.dict(objectives.BASELINES), patch.dict(graders.RULES), patch.dict(model.FAMILIES),
          patch.dict(model.BUILDERS)):
        yield execute


def test_example_of_a_new_loss(fork, place, tmp_path, capsys):
    fork("hinge_objective")
    run(place, tmp_path / "run", "--no-eval", "--method", "ipo")
    assert "ipo: first loss 1.000000, expected 1.000000" in capsys.readouterr().out
    objective = objectives.BASELINES["ipo"][1](Config(beta=0.5))
    logps, zeros = torch.tensor([[2.0], [-1.0]]), torch.zeros(2, 1)
    assert float(objective.loss(logps, zeros, zeros == 0, [])[0]) == 0.0


def test_example_of_a_new_weight_rule(fork, place, tmp_path):
    rule = fork("squared")["squared"]
    assert rule([0.9, 0.4, 0.0], "threshold", 0.5) == pytest.approx([0, 0.36, 1])
    train.weights_from_scores = lambda *given: [int(w) if w in (0, 1) else w for w in rule(*given)]
    for row in rows_of(run(place, tmp_path / "run", *ALLO) / "token_examples.jsonl"):
        assert row["weights"] == pytest.approx(rule(row["scores"], "threshold", 0.5))


def test_example_of_scores_from_two_models(fork, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    fork("contrast")
    out = run(place, tmp_path / "run", *ALLO, "--token-weights", "soft")
    for row in rows_of(out / "token_weights.jsonl"):
        assert row["reward"] == pytest.approx([0.5] * len(row["reward"]))  # the same model twice


def test_example_of_a_mask_rule(fork, place, tmp_path):
    fork("attention_only")
    out = run(place, tmp_path / "run", *ALLO, *EDIT)
    base, new = weights_of(place / "BASE"), weights_of(out / "improve")
    changed = {name for name in base if not torch.equal(base[name], new[name])}
    assert changed and all("self_attn" in name for name in changed)
    train.select = lambda importance, *more: mask.select_neurons(
        {name: values for name, values in importance.items() if "self_attn" in name}, 0.05)
    with pytest.raises(KeyError, match="embed_tokens"):  # what it leaves out would be all trained
        run(place, tmp_path / "other", *ALLO, *EDIT)


def test_example_of_a_budget_for_each_block(fork, place, tmp_path):
    fork("per_block")
    counts = Counter()
    made = load_mask(run(place, tmp_path / "run", *ALLO, *EDIT) / "mask.safetensors")
    for name, selected in made.items():
        counts[name.split(".")[2]] += len(selected)
    assert len({counts[str(layer)] for layer in range(4)}) == 1


def test_example_of_cycles(fork, place, tmp_path):
    fork("cycles")
    out = run(place, tmp_path / "run", *ALLO, *EDIT)
    parts = [f"{stage}-{cycle}.safetensors" for cycle in (1, 2) for stage in ("forget", "improve")]
    assert {*parts, "forget-3.safetensors", "improve-3"} <= {*os.listdir(out)}
    assert json.loads((out / "results.json").read_text())["models"]["ALLO"] == f"{out}/improve-3"
    assert "p = 5 % of the weights" in (out / "improve-3/README.md").read_text()


def test_example_of_a_new_task(fork):
    fork("capitals")
    task = Task(0, "Capital of Ghana?", None, "Accra", source="data/capitals_train.jsonl:1")
    assert graders.is_correct("Let me think. It is accra.", task)
    assert not graders.is_correct("Kumasi", task)


def test_example_of_a_new_family(fork):
    folder = FIXTURES / "hf/smollm3"
    with pytest.raises(UserError, match="architectures"):
        checkpoint.load_model(str(folder))
    fork("SmolLM3")
    expected = load_file(folder / "expected.safetensors")
    logits = checkpoint.load_model(str(folder)).logits(expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-4)


def test_example_of_the_optimizer_alone(fork):
    names = fork("MaskedAdamW")
    selected = sum(map(len, names["mask"].values()))
    assert 0 < selected == len(names["optimizer"].master)
    assert all(p.grad is None for p in names["net"].parameters())


# ---- reproduce.py: paired differences, tuned rates; no finished cell is made again ---------------

def study_of(*flags):
    return reproduce.Study(reproduce.make_parser().parse_args(["out", "--tune", "11", *flags]))


def row_of(cell, seed, bits):
    return {"part": "methods", "cell": cell, "seed": seed, "setting": ["--lr-dpo", "4e-05"],
            "correct": f"{int('1' + bits, 2):x}", "accuracy": bits.count("1") / len(bits)}


def test_paired_differences_by_hand():
    """Questions 0.5 and 0, seeds the same: t = 1/sqrt(2), two degrees of freedom. Questions of
    their own: seeds 0.5 and 0, t = 1, one degree. Three runs, one start: 1, 1, 0, t = 2."""
    assert reproduce.answers(row_of("DPO", 1, "0" * 70 + "1")) == [0] * 70 + [1]

    def compared(mine, theirs, shared):
        return reproduce.compared([reproduce.matched(mine, theirs, shared)], shared)

    mine = [row_of("ALLO", 1, "11"), row_of("ALLO", 2, "01")]
    theirs = [row_of("DPO", 1, "01"), row_of("DPO", 2, "01")]
    assert compared(mine, theirs, True) == pytest.approx((0.25, 0.5528), abs=1e-4)
    assert compared(mine, theirs, False) == pytest.approx((0.25, 0.5), abs=1e-4)
    assert compared(mine, mine, False) == (0, 1)
    three = [row_of("ALLO", seed, "110") for seed in (1, 2, 3)]
    start = [row_of("start", seed, "000") for seed in (1, 2)]  # of one model: one counts
    assert compared(start, three, True) == pytest.approx((-2 / 3, 0.1835), abs=1e-4)
    assert reproduce.against([[], []], True) == "- | -"
    assert reproduce.t_test(1.96, [(1.0, 10**6)]) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("cell, flags, best, chosen", [
    ("DPO", "--factors 0.5 1 2", {"DPO": [1.6e-4]}, [1.6e-4]),  # beyond the row's end
    ("ALLO, no forgetting", "--ratios 0.1 1 4 --allo-factors 1 0.5", {"ALLO": [1.4e-5, 1e-5]},
     [1e-5, 1e-5]),  # as ALLO: first the ratio, then the rate
    ("ALLO, all weights, own rates", "--ratios 0.1 4 --factors 0.5 1 2",
     {"ALLO": [8e-5, 2e-5], "ALLO, all weights, own rates": [4e-5, 1e-5]}, [4e-5, 1e-5])])
def test_the_best_rates_are_found(cell, flags, best, chosen, monkeypatch):
    tried, study = set(), study_of(*flags.split())

    def made(part, name, seed, flags):
        tried.add(name)
        rates = map(float, flags[1::2])
        return {"accuracy": 1 - sum(abs(rate - right) for rate, right in zip(rates, best[name]))}

    monkeypatch.setattr(study, "cell", made)
    assert list(map(float, study.tuned(cell)[1::2])) == chosen
    assert tried == {*best} and study.tuned("start") == []


def test_rates_that_were_tried_are_shown_with_their_mean_over_seeds():
    rows = [row_of("ALLO", seed, bits) | {"part": "tune", "setting": ["--a", a, "--b", b]}
            for seed, a, b, bits in ((11, "4e-05", "2e-05", "11"), (12, "4e-05", "2e-05", "10"),
                                     (11, "8e-05", "1e-05", "10"))]
    assert reproduce.tuning(rows)[-1] == "| ALLO | 8e-05 / 1e-05: 50.0, **4e-05 / 2e-05: 75.0** |"
    assert reproduce.tuning([row_of("DPO", 1, "1")]) == []


def test_finished_cells_are_read_back_and_missing_ones_made(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(lines(row_of("DPO", 1, "10")))
    study = study_of("--rows", str(tmp_path / "rows.jsonl"))
    monkeypatch.setattr(study, "shared", lambda *_: pytest.fail("made again"))
    assert study.cell("methods", "DPO", 1, ["--lr-dpo", "4e-05"])["accuracy"] == 0.5
    with pytest.raises(pytest.fail.Exception):
        study.cell("methods", "DPO", 1, ["--lr-dpo", "8e-05"])


@pytest.mark.parametrize("name", [
    "demo", "ecqa", "ecqa-again", "openbookqa", "qasc", "strategyqa"])
def test_the_shipped_tables_are_those_of_the_shipped_rows(name):
    study = study_of("--name", name)  # which questions seeds share follows from the rows
    assert reproduce.tables(study) == study.file.with_suffix(".md").read_text()
    if name == "demo":
        with pytest.raises(UserError, match="share"):
            reproduce.pooled([name], "DPO")


def test_one_small_study_from_samples_to_table(tmp_path):
    cells = ["start", "DPO", "DPO, top 10 %", "DPO, last 10 %", "ALLO", "masked DPO, 64 pairs"]
    reproduce.main([str(tmp_path / "out"), "--rows", str(tmp_path / "rows.jsonl"), "--seeds", "1",
                    "--parts", *reproduce.PARTS, "--cells", *cells, "--tune", "--test-limit", "8",
                    "--more", "--limit", "40", "--n", "6", "--max-steps", "1",
                    "--token-weights", "edit", "--locate", "snr"])
    location = tmp_path / "out/demo-1-location-masked-DPO-64-pairs"  # its mask is kept, too
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["cell"] for row in rows} == {*cells} and {row["n"] for row in rows} == {8}
    base = tmp_path / "out/demo-1-base"
    top, last = load_mask(base / "top-10.safetensors"), load_mask(base / "last-10.safetensors")
    assert not any((top[name].dense() & last[name].dense()).any() for name in top)
    assert {path.parent for path in (tmp_path / "out").rglob("*.safetensors")} == {base, location}
