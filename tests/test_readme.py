"""The README is checked line by line: its commands, printed blocks, examples, results and the list of files; so are the
commands, flags and paths of the page about the benchmarks."""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from allo_mini import UserError, architecture, baselines, checkpoint, demo, model, prepare, tasks
from allo_mini.config import Config, make_parser, parse
from allo_mini.data import Task
from allo_mini.mask import kind_of
from helpers import FIXTURES, tiny_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOTH = README + (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = BLOCK.findall(README)
COMMANDS = [line for kind, text in BLOCK.findall(BOTH) if kind == "sh" for line in text.splitlines()]
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README[README.index("\n## Change it"):], re.M | re.S)
PYTHON = re.compile(r"\.venv/bin/python +")
SETUP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
OTHERS = ("vllm serve ", "hf upload ")  # other people's tools


def words_of(command: str) -> list[str]:
    """What follows python in a command of ours, torchrun's own flags left out."""
    command = re.sub(r"^\.venv/bin/torchrun --nproc_per_node=\d+ ", ".venv/bin/python ", command.removeprefix(SETUP))
    assert PYTHON.match(command), f"no test knows the README's command {command}"
    return shlex.split(PYTHON.sub("", command, count=1))


# ---- commands ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(OTHERS)])
def test_every_command_is_one_that_the_program_takes(command):
    script, *argv = words_of(command)
    if script == "train.py":
        parse(argv)
    elif script == "eval.py":
        evaluation.make_parser().parse_args(argv)
    elif script == "-m":
        module, *rest = argv
        counts = {"pytest": 2, "allo_mini.report": 1}
        if module == "allo_mini.tasks":
            assert rest[0] == "prepare" and rest[1] in prepare.SOURCES and len(rest) == 4
        elif module == "allo_mini.checkpoint":
            assert rest[0] == "apply" and len(rest) == 4
        else:
            assert len(rest) == counts[module]
    else:
        if "--more" in argv:  # what follows is for train.py
            argv, rest = argv[:argv.index("--more")], argv[argv.index("--more") + 1:]
            parse(["--model", "x", "--train", "x", *rest])
        known = (ROOT / script).read_text()
        assert all(f'"{flag}"' in known for flag in argv if flag.startswith("--")), command


def test_every_flag_in_the_text_exists():
    scripts = [p.read_text() for p in [ROOT / "eval.py", *ROOT.glob("tests/benchmarks/*.py")]]
    known = {*make_parser()._option_string_actions, *evaluation.make_parser()._option_string_actions}
    text = re.sub(r"^```.*?^```$", "", BOTH, flags=re.M | re.S)
    for flag in {*re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(re.findall(r"`[^`]+`", text)))} - {"--index-url"}:
        assert flag in known or any(f'"{flag}"' in script for script in scripts), flag


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every file that the README's commands name, small."""
    folder = tmp_path_factory.mktemp("readme")
    rows = [{"input": t.input, "output": t.output, "answer": t.answer} for t in demo.problems(20, 5)]
    talk = [{"prompt": [{"role": "user", "content": r["input"]}], "chosen": [{"role": "assistant", "content": r["output"]}],
             "rejected": [{"role": "assistant", "content": "The answer is 1"}]} for r in rows]
    files = {"train": rows[:16], "test": rows[16:], "chats": talk, "gsm8k_download": [
        {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}], "preferences": [
        {"prompt": r["input"] + "\n", "chosen": r["output"], "rejected": "The answer is 1"} for r in rows]}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    (folder / "samples.jsonl").write_text("".join(json.dumps(
        {"input": r["input"], "samples": [r["output"], "The answer is 1"]}) + "\n" for r in rows))
    for name in ("DIR_OR_HUB_ID", "BASE"):
        shutil.copytree(demo.FOLDER, folder / name)
    return folder


QUICK = "--max-steps 1 --max-new-tokens 4 --max-length 400 --dtype fp32 --locate gradient --token-weights edit".split()


def test_the_commands_for_own_models_and_data_run_one_after_the_other(place, monkeypatch, capsys):
    """As written, with smaller numbers; what samples would be made is given, as a model this small answers nothing."""
    monkeypatch.chdir(place)
    section = README[README.index("\n## Your own model"):README.index("\n## Read it")]
    for command in re.findall(r"^(?:torchrun|\.venv).*$", section, re.M):
        script, *argv = words_of(command)
        if script == "train.py":
            more = ["--samples", "samples.jsonl"] if "--train" in argv else []
            again = Path(argv[argv.index("--out") + 1]).exists() and "--dry-run" not in argv
            code = train.main([*argv, *QUICK, *more, *(["--restart"] if again else [])])
        elif script == "eval.py":
            code = evaluation.main([*argv, "--max-new-tokens", "4", "--max-length", "400"])
        elif argv[0] == "allo_mini.report":
            continue  # every run of train.py calls it
        else:
            code = subprocess.run([sys.executable, "-m", *argv], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
        said = capsys.readouterr()
        assert code == 0, (command, said.err)
    assert (place / "runs/chats/simpo").is_dir() and (place / "OUT/model.safetensors").is_file()
    assert json.loads((place / "gsm8k_train.jsonl").read_text())["answer"] == "2"
    assert "against eval/allo" in said.out or (place / "eval/dpo/test.jsonl").is_file()


# ---- printed blocks ----------------------------------------------------------------------------------------

def pattern_of(line: str) -> str:
    """A regular expression for a printed line: numbers, bars of a table and machine-dependent words may differ."""
    line = re.escape(re.sub(r"\s+", " ", line.strip()))
    line = re.sub(r"\d+(?:,\d{3})*(?:\\\.\d+)?(?:e\\?-?\d+)?", r"[-\\d.,e]+", line)
    return line.replace(r"\.\.\.", ".*").replace("\\ ", " ").replace(r"\[ ?", r"\[ ?")


def test_every_printed_block_is_what_is_printed(tmp_path, monkeypatch, capsys):
    picture, *printed = [text for kind, text in BLOCKS if kind == "text"]
    assert "FORGET" in picture and "IMPROVE" in picture
    monkeypatch.chdir(tmp_path)
    assert train.main(["--limit", "40", "--test-limit", "16", "--n", "6", "--max-steps", "1"]) == 0
    said = [re.sub(r"\s+", " ", line.strip()) for line in capsys.readouterr().out.splitlines()]
    said = [line.replace(str(ROOT) + "/", "").replace("~/", "") for line in said]
    for block in printed:
        for line in block.splitlines():
            if line.strip() not in ("", "...") and not set(line) <= {"-"}:
                assert any(re.fullmatch(".*" + pattern_of(line), other) for other in said), (line, pattern_of(line))


def test_there_are_no_blocks_of_other_kinds():
    assert {kind for kind, _ in BLOCKS} == {"sh", "text", "python"} and len(EXAMPLES) == 5
    for kind, text in BLOCKS:
        if kind == "python":
            ast.parse(text)


# ---- files -------------------------------------------------------------------------------------------------

def test_the_reading_order_names_every_file_once():
    section = README[README.index("## Read it in this order"):README.index("## Change it")]
    named = re.findall(r"^\| ((?:allo_mini/)?\w+\.py) \|", section, re.M)
    there = {str(p.relative_to(ROOT)) for p in ROOT.glob("allo_mini/*.py")} - {"allo_mini/__init__.py"} | {"train.py", "eval.py"}
    assert len(named) == len(set(named)) and set(named) == there


NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path: Path) -> int:
    """Lines of a file that hold more than comments and docstrings."""
    text, lines = path.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(lines)


def test_the_parts_are_as_long_as_the_reading_order_says():
    section = README[README.index("## Read it in this order"):README.index("## Change it")]
    parts = re.findall(r"about ([\d,]+) lines(.*?)(?=\*\*[A-Z]|\Z)", section, re.S)
    assert len(parts) == 3
    for said, table in parts:
        files = re.findall(r"^\| ((?:allo_mini/)?\w+\.py) \|", table, re.M)
        assert sum(code_lines(ROOT / file) for file in files) == pytest.approx(int(said.replace(",", "")), rel=0.04)


def test_no_link_leads_to_a_file_that_is_not_there():
    for path in re.findall(r"[`(]((?:tests|allo_mini)/[\w/.]+)[`)]", BOTH):
        assert (ROOT / path).exists(), path


def cells_of(text: str) -> dict[str, list[str]]:
    """First cell of a table's line, without emphasis -> the others."""
    lines = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {name: rest for name, *rest in lines}


def test_the_results_are_what_the_finished_cells_say():
    """Means and spreads of the README's table, in the tables that reproduce.py makes of its rows."""
    section = README[README.index("## Results"):README.index("### Speed and memory")]
    for column, name in enumerate(("demo", "ecqa")):
        made = cells_of((ROOT / f"tests/benchmarks/results/{name}.md").read_text().split("Training loss")[0])
        found = 0
        for cell, values in cells_of(section).items():
            row = made.get(re.split(", on | \\(|: ", cell)[0])
            if row and values[column] not in ("not run", "the same"):
                said, _, seeds = values[column].partition(" (")
                assert row[1] in (said, f"{said} +- 0.0") and seeds in ("", f"{row[-1]} seeds)"), (name, cell)
                found += 1
        assert found >= len({*made} & {*cells_of(section)}) > 8


# ---- examples for forks ------------------------------------------------------------------------------------

@pytest.fixture
def forked(monkeypatch):
    """forked(word): run the example that holds the word; what it changed is put back afterwards."""
    for module, name in ((baselines, "OBJECTIVES"), (baselines, "NAMES"), (tasks, "RULES"), (architecture, "FAMILIES"), (model, "BUILDERS")):
        for key in [*getattr(module, name)]:
            monkeypatch.setitem(getattr(module, name), key, getattr(module, name)[key])
    for key, table in (("capitals", tasks.RULES), ("SmolLM3ForCausalLM", architecture.FAMILIES), ("smollm3", model.BUILDERS)):
        monkeypatch.setitem(table, key, None)
        del table[key]
    for name in ("weights_from_scores", "importance_mask"):
        monkeypatch.setattr(train, name, getattr(train, name))

    def run(word):
        [code] = [text for text in EXAMPLES if word in text]
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
        names = {}
        exec(code, names)
        return names
    return run


def run_with(place, tmp_path, *more):
    return train.main(["--model", str(place / "BASE"), "--train", str(place / "train.jsonl"), "--samples",
                       str(place / "samples.jsonl"), "--prompt", "chat", "--no-eval", "--out", str(tmp_path / "run"),
                       "--max-steps", "2", "--max-length", "400", *more])


def test_example_of_a_new_loss(forked, place, tmp_path, capsys):
    forked("hinge_objective")
    assert run_with(place, tmp_path, "--method", "ipo") == 0
    assert "ipo: first loss 1.000000, expected 1.000000" in capsys.readouterr().out
    up, down, zero = torch.tensor([2.0]), torch.tensor([-1.0]), torch.zeros(1)
    objective = baselines.OBJECTIVES["ipo"](Config(beta=0.5))
    loss, _ = objective.loss(torch.stack([up, down]), torch.stack([zero, zero]), torch.ones(2, 1, dtype=torch.bool), [])
    assert float(loss) == 0.0


def test_example_of_a_new_weight_rule(forked, place, tmp_path):
    assert forked("squared")["squared"]([0.9, 0.4, 0.0], "threshold", 0.5) == pytest.approx([0.0, 0.36, 1.0])
    assert run_with(place, tmp_path, "--method", "allo", "--locate", "gradient", "--reward-epochs", "0.1") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/token_examples.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["weights"] == pytest.approx([(1 - s) ** 2 if s < 0.5 else 0.0 for s in row["scores"]])


def test_example_of_a_new_mask_rule(forked, place, tmp_path):
    forked("attention_only")
    assert run_with(place, tmp_path, "--method", "allo", "--locate", "gradient", "--token-weights", "edit", "--improve-lr",
                    "1e-2") == 0
    base, new = load_file(place / "BASE/model.safetensors"), load_file(tmp_path / "run/improve/model.safetensors")
    changed = {kind_of(name) for name in base if not torch.equal(base[name], new[name])}
    assert changed and changed <= {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_example_of_a_new_task(forked):
    forked("capitals")
    task = Task(0, "Capital of Ghana?", None, "Accra", source="data/capitals_train.jsonl:1")
    assert tasks.is_correct("Let me think. It is accra.", task) and not tasks.is_correct("Kumasi", task)


def test_example_of_a_new_family(forked):
    folder = FIXTURES / "hf/smollm3"
    with pytest.raises(UserError, match="architectures"):
        checkpoint.load_model(str(folder))
    forked("SmolLM3")
    expected = load_file(folder / "expected.safetensors")
    smollm3 = checkpoint.load_model(str(folder))
    torch.testing.assert_close(smollm3.logits(expected["input_ids"]), expected["logits"], atol=1e-5, rtol=1e-4)
    assert type(tiny_model()) is model.CausalLM
