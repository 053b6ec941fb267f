"""eval.py: tables, per-item files, another model to compare with, chat."""

import io
import json
from pathlib import Path

import pytest
from helpers import tiny_model, write_tokenizer
from runs import TEMPLATE, lines, rows_of

import eval as evaluation
from allo_mini.checkpoint import save_model
from allo_mini.evaluation import answers
from allo_mini.patch import save_patch


def write(path, rows):
    Path(path).write_text(lines(*rows))


@pytest.fixture
def model(world):
    return world / "model"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with one small file of each kind."""
    monkeypatch.chdir(tmp_path)
    write("gsm8k_test.jsonl", [{"input": f"{i} + {i}?", "answer": str(2 * i)} for i in range(7)])
    write("qasc_test.jsonl", [{"input": "Colour?\nOptions:\nred\nblue", "answer": "Red"}] * 5)
    write("rows.jsonl", [{"input": f"Row {i}?", "output": "The answer is 5"} for i in range(3)])
    write("pairs.jsonl", [{"prompt": "Is it?", "chosen": "yes", "rejected": "no"}] * 4)
    write("alpaca_eval.jsonl", [{"instruction": f"Write {i}.", "dataset": "d"} for i in range(3)])
    write("arena_hard.jsonl", [{"uid": f"u{i}", "prompt": f"Do {i}."} for i in range(3)])
    return tmp_path


def run(model, *words):
    sizes = ["--max-new-tokens", "4", "--max-length", "300", "--sample-batch", "2"]
    assert evaluation.main(["--model", str(model), *sizes, *words]) == 0


def answering(monkeypatch, answer):
    """Let every question be answered by answer(question); returns the prompts that were asked."""
    asked = []
    def respond(model, encoder, prompts, settings, n=1, temperature=None, on_done=None):
        assert temperature == 0.0
        asked.extend(json.loads(json.dumps(prompts)))
        return [[(answer(prompt), True)] for prompt in prompts]
    monkeypatch.setattr(answers, "respond", respond)
    monkeypatch.setattr(evaluation, "respond", respond)
    return asked


def test_several_files_in_one_call(model, place, capsys, monkeypatch):
    answering(monkeypatch, lambda q: "The answer is " + {"C": "red", "R": "5"}.get(q[0], "6"))
    run(model, "--test", "gsm8k_test.jsonl", "qasc_test.jsonl", "rows.jsonl", "pairs.jsonl",
        "--out", "out")
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert table["gsm8k_test.jsonl"][1:8] == ["(gsm8k)", "14.3", "%", "-", "[2.6,", "51.3]", "7"]
    assert table["qasc_test.jsonl"][7:10] == ["5", "0.0", "%"]  # by the official grader
    assert table["rows.jsonl"][1:3] == ["(generic)", "100.0"] and "pairs.jsonl" in table
    assert rows_of(Path("out/gsm8k_test.jsonl"))[3] == {
        "input": "3 + 3?", "gold": "6", "response": "The answer is 6", "finished": True,
        "correct": True}
    assert all(r["correct"] and not r["official"] for r in rows_of(Path("out/qasc_test.jsonl")))
    assert set(rows_of(Path("out/pairs.jsonl"))[0]) == {"input", "margin", "correct"}
    run(model, "--test", "rows.jsonl", "--out", "out", "--limit", "2")  # over its own file
    assert len(rows_of(Path("out/rows.jsonl"))) == 2


def test_the_flag_task_goes_before_the_name(model, place, monkeypatch):
    answering(monkeypatch, lambda q: "It is 5")
    for task, correct in (("ecqa", 0), ("generic", 3), ("math", 3)):
        run(model, "--test", "rows.jsonl", "--out", "a", "--task", task)
        assert sum(row["correct"] for row in rows_of(Path("a/rows.jsonl"))) == correct


def test_prompts_for_a_judge_are_answered_and_not_graded(model, place, capsys, monkeypatch):
    files = ["--test", "alpaca_eval.jsonl", "arena_hard.jsonl", "--out", "out"]
    run(model, *files)
    said = capsys.readouterr().out
    assert "alpaca_eval: 3 rows, none dropped; prompts: chat\n" in said and "accuracy" not in said
    save_model(tiny_model(), "plain")
    answering(monkeypatch, lambda q: f"Done: {q}")
    run(write_tokenizer(Path("plain")), *files)
    assert "prompts: alpaca\n" in capsys.readouterr().out
    assert rows_of(Path("out/alpaca_eval.jsonl"))[2]["response"] == "Done: Write 2."
    last = {"response": "Done: Do 2.", "gold": None, "correct": None}
    assert last.items() <= rows_of(Path("out/arena_hard.jsonl"))[2].items()


def test_against_another_model(model, place, capsys, monkeypatch):
    write("many_gsm8k.jsonl", [{"input": f"{i}?", "answer": "2111"[i % 4]} for i in range(200)])
    files = ["--test", "many_gsm8k.jsonl", "alpaca_eval.jsonl", "rows.jsonl"]
    answering(monkeypatch, lambda q: "The answer is 2")
    run(model, *files, "--out", "a")  # 25 % right
    answering(monkeypatch, lambda q: "The answer is 1")
    capsys.readouterr()
    run(model, *files, "--out", "b", "--against", "a")  # 75 % right
    said = capsys.readouterr().out.splitlines()
    many, rows = (line.split()[7:] for line in said if ".jsonl (" in line)
    assert many[0] == "+50.0" and many[4] == "200" and float(many[3]) < 0.001
    assert 35 < float(many[1].strip("[,")) < 43 and 57 < float(many[2].strip("]")) < 65
    assert rows == ["+0.0", "[+0.0,", "+0.0]", "1.0000", "3"]


def test_a_model_brings_its_runs_settings(model, place, capsys):
    """In a run folder, or made of the base and a run's patch, which must be the same model."""
    improved = Path("runs/demo/improve")
    save_model(tiny_model(seed=1), improved)
    write_tokenizer(improved, chat_template=TEMPLATE)
    save_patch(model, improved, Path("runs/demo/patch.safetensors"))
    write("runs/demo/config.json", [{"config": {"prompt": "chat", "max_new_tokens": 5, "p": 5.0}}])
    for words in ([str(improved)], [str(model), "--patch", "runs/demo/patch.safetensors"]):
        assert evaluation.main(["--model", *words, "--test", "rows.jsonl"]) == 0
        assert "rows: 3 rows, none dropped; prompts: chat\n" in capsys.readouterr().out
    rows = rows_of(Path("eval/demo-improve/rows.jsonl"))
    assert rows == rows_of(Path("eval/demo-patch.safetensors/rows.jsonl"))
    assert 1 < len(rows[0]["response"]) <= 5
    run(model, "--test", "rows.jsonl")  # prompts: alpaca, and there is a template
    assert "prompts: alpaca (the model has a chat" in capsys.readouterr().out


def test_chat_remembers_until_an_empty_line(model, place, capsys, monkeypatch):
    def type_in(text):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
    type_in(b"hi\n" + b"a long line " * 20 + b"\nno text: \xe9\n")
    run(model, "--chat", "--max-length", "60", "--max-new-tokens", "2")
    said = capsys.readouterr().out
    assert said.count(" ... (cut: --max-new") == 3 and said.count("with a trimmed prompt") == 2
    type_in(b"one\ntwo\n\nthree\n")
    asked = answering(monkeypatch, lambda messages: f"reply {len(messages)}")
    run(model, "--chat")
    said = [[message["content"] for message in messages] for messages in asked]
    assert said == [["one"], ["one", "reply 1", "two"], ["three"]]
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]
