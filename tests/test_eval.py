"""eval.py: tables, per-item files, resuming, comparison with another model, files for judges, chat, refusals."""

import io
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import tiny_model, write_tokenizer, write_folder

import eval as evaluation
from allo_mini import tasks
from allo_mini.checkpoint import save_model, save_patch
from eval import bootstrap

TEMPLATE = ("{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '|' }}"
            "{% endfor %}")
OPTIONS = "\nOptions:\nred\nblue"


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("m") / "model", chat_template=TEMPLATE)


@pytest.fixture
def place(model, tmp_path, monkeypatch):
    """A folder with one small file of each kind."""
    monkeypatch.chdir(tmp_path)
    write("gsm8k_test.jsonl", [{"input": f"{i} + {i}?", "answer": str(2 * i)} for i in range(7)])
    write("qasc_test.jsonl", [{"input": f"Colour {i}?{OPTIONS}", "answer": "Red"} for i in range(5)])
    write("rows.jsonl", [{"input": f"Row {i}?", "output": "The answer is 5"} for i in range(3)])
    write("pairs.jsonl", [{"prompt": f"Is {i}?", "chosen": "yes", "rejected": "no"} for i in range(4)])
    write("alpaca_eval.jsonl", [{"instruction": f"Write {i}.", "dataset": "d", "reference": "r"} for i in range(3)])
    write("arena_hard.jsonl", [{"uid": f"u{i}", "category": "c", "prompt": f"Do {i}."} for i in range(3)])
    return tmp_path


def run(model, *words, code=0, tokens="4"):
    flags = [] if "--chat" in words else ["--max-new-tokens", tokens, "--max-length", "300", "--sample-batch", "2"]
    assert evaluation.main(["--model", str(model), *flags, *words]) == code


def answering(monkeypatch, answer):
    """Let every question be answered by answer(question); returns the prompts that were asked."""
    asked = []

    def respond(model, encoder, prompts, settings, eos, n=1, temperature=None, rows=None, on_done=lambda *_: None):
        assert temperature == 0.0
        asked.extend(json.loads(json.dumps(prompts)))
        for i in range(len(prompts)):
            on_done(i, [5, 6, 7])
        return [[(answer(p), True)] for p in prompts]
    monkeypatch.setattr(tasks, "respond", respond)
    monkeypatch.setattr(evaluation, "respond", respond)
    return asked


def test_several_files_in_one_call(model, place, capsys, monkeypatch):
    answering(monkeypatch, lambda q: "The answer is " + {"C": "red", "R": "5"}.get(q[0], "6"))
    run(model, "--test", "gsm8k_test.jsonl", "qasc_test.jsonl", "rows.jsonl", "pairs.jsonl", "--out", "out")
    said = capsys.readouterr().out
    table = {line.split()[0]: line.split() for line in said.splitlines() if ".jsonl (" in line}
    assert table["gsm8k_test.jsonl"][1:7] == ["(gsm8k)", "14.3", "%", "[2.6,", "51.3]", "7"]
    assert table["qasc_test.jsonl"][1:9] == ["(qasc)", "100.0", "%", "[56.6,", "100.0]", "5", "0.0", "%"]  # official: 0
    assert table["rows.jsonl"][1:3] == ["(generic)", "100.0"] and table["pairs.jsonl"][1] == "(generic)"
    assert "21 tokens, " in said and "tokens/s" in said
    first = lines("out/gsm8k_test.jsonl")[3]
    assert first == {"input": "3 + 3?", "gold": "6", "response": "The answer is 6", "finished": True, "tokens": 3, "correct": True}
    assert [row["official"] for row in lines("out/qasc_test.jsonl")] == [False] * 5
    assert set(lines("out/pairs.jsonl")[0]) == {"prompt", "margin", "correct"}


def test_task_overrides_the_name(model, place, capsys, monkeypatch):
    answering(monkeypatch, lambda q: "It is 5")
    run(model, "--test", "rows.jsonl", "--out", "a")
    run(model, "--test", "rows.jsonl", "--out", "b", "--task", "math")
    run(model, "--test", "gsm8k_test.jsonl", "--out", "c", "--task", "generic")
    assert [sum(r["correct"] for r in lines(f"{x}.jsonl")) for x in ("a/rows", "b/rows", "c/gsm8k_test")] == [0, 3, 0]
    run(model, "--test", "rows.jsonl", "--out", "b", "--task", "mawps", code=2)
    assert "another task ('math', now 'mawps')" in capsys.readouterr().err


def test_what_alpaca_eval_and_arena_hard_read(model, place, capsys, monkeypatch):
    answering(monkeypatch, lambda q: f"Done: {q}")
    run(model, "--test", "alpaca_eval.jsonl", "arena_hard.jsonl", "--out", "results/mine")
    assert json.loads(Path("results/mine/alpaca_eval/model_outputs.json").read_text())[1] == {
        "dataset": "d", "instruction": "Write 1.", "output": "Done: Write 1.", "generator": "mine"}
    now, old = (lines(f"results/mine/arena_hard/{x}/mine.jsonl") for x in ("model_answer", "model_answer_2024"))
    assert [row["uid"] for row in now] == [row["question_id"] for row in old] == ["u0", "u1", "u2"]
    assert now[2]["model"] == old[2]["model_id"] == "mine" and now[2]["ans_id"] and old[2]["answer_id"] and now[0]["tstamp"]
    assert now[2]["messages"] == [{"role": "user", "content": "Do 2."},
                                  {"role": "assistant", "content": {"answer": "Done: Do 2."}}]
    assert old[2]["choices"] == [{"index": 0, "turns": [{"content": "Done: Do 2.", "token_len": 3}]}]
    assert lines("results/mine/arena_hard.jsonl")[0]["correct"] is None and "accuracy" not in capsys.readouterr().out
    before = {path: path.read_bytes() for path in Path("results").rglob("*.json*")}
    run(model, "--test", "alpaca_eval.jsonl", "arena_hard.jsonl", "--out", "results/mine")
    assert before == {path: path.read_bytes() for path in Path("results").rglob("*.json*")}


def test_instructions_get_the_chat_template_or_else_the_alpaca_form(model, place, tmp_path, monkeypatch):
    framed = []
    monkeypatch.setattr(evaluation.Encoder, "frame", lambda self, prompt: framed.append(self.style) or "q")
    run(model, "--test", "alpaca_eval.jsonl", "gsm8k_test.jsonl", "--out", "a", "--limit", "2")
    assert framed == ["chat"] * 2 + ["alpaca"] * 2
    plain = tmp_path / "plain"
    save_model(tiny_model(), plain)
    write_tokenizer(plain)
    run(plain, "--test", "alpaca_eval.jsonl", "--out", "b", "--limit", "1")
    run(model, "--test", "alpaca_eval.jsonl", "--out", "c", "--limit", "1", "--prompt", "none")
    assert framed[4:] == ["alpaca", "none"]


# ---- resuming ----------------------------------------------------------------------------------------------

def command(model, out):
    return ["--model", str(model), "--test", "qasc_test.jsonl", "many.jsonl", "--out", out, "--max-new-tokens", "25",
            "--max-length", "300", "--sample-batch", "3", "--device", "cpu"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_started_again_it_ends_with_the_same_file(model, place):
    write("many.jsonl", [{"input": f"Question {i} of {i * 7919 % 104729}?", "answer": str(i)} for i in range(60)])
    if not (child := os.fork()):
        evaluation.main(command(model, "cut"))
        os._exit(0)
    part, until = Path("cut/many.part.jsonl"), time.monotonic() + 60
    while not (part.exists() and part.read_bytes().count(b"\n") >= 6) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not Path("cut/many.jsonl").exists() and 6 <= len(lines(part)) < 60
    with part.open("a") as f:
        f.write('{"input": "torn')
    assert evaluation.main(command(model, "cut")) == 0
    assert evaluation.main(command(model, "whole")) == 0
    assert [row["input"] for row in lines("cut/many.jsonl")] == [row["input"] for row in lines("many.jsonl")]
    assert Path("cut/many.jsonl").read_bytes() == Path("whole/many.jsonl").read_bytes()
    assert not part.exists()


def test_finished_answers_are_not_made_again(model, place, capsys, monkeypatch):
    asked = answering(monkeypatch, lambda q: "The answer is 5")
    run(model, "--test", "rows.jsonl", "--out", "out")
    run(model, "--test", "rows.jsonl", "--out", "out")
    assert len(asked) == 3 and capsys.readouterr().out.count("rows.jsonl (generic)") == 2
    run(model, "--test", "gsm8k_test.jsonl", "--out", "out")  # another file, same folder
    assert len(asked) == 10
    for words, says in ((["--limit", "2"], "another limit (0, now 2)"), (["--stop", "x"], "another stop"),
                        (["--prompt", "none"], "another prompt ('alpaca', now 'none')")):
        run(model, "--test", "rows.jsonl", "--out", "out", *words, code=2)
        assert says in capsys.readouterr().err
    write("rows.jsonl", [{"input": "Row?", "answer": "5"}])
    run(model, "--test", "rows.jsonl", "--out", "out", code=2)
    assert "another test file" in capsys.readouterr().err and len(asked) == 10


def test_another_model_needs_another_folder(model, place, tmp_path, capsys, monkeypatch):
    answering(monkeypatch, lambda q: "The answer is 5")
    other = tmp_path / "other" / "model"
    save_model(tiny_model(seed=1), other)
    write_tokenizer(other, chat_template=TEMPLATE)
    run(model, "--test", "rows.jsonl")
    mine = Path("eval") / f"{model.resolve().parent.name}-model/rows.jsonl"
    before = mine.read_bytes()
    run(other, "--test", "rows.jsonl", "--out", str(mine.parent), code=2)
    assert "another model;" in capsys.readouterr().err and mine.read_bytes() == before
    run(other, "--test", "rows.jsonl")  # a folder of the same name in another place
    assert Path("eval/other-model/rows.jsonl").exists()


# ---- comparison --------------------------------------------------------------------------------------------

def test_against_another_model(model, place, capsys, monkeypatch):
    write("many_gsm8k.jsonl", [{"input": f"{i}?", "answer": "1" if i % 4 else "2"} for i in range(200)])
    files = ["--test", "many_gsm8k.jsonl", "alpaca_eval.jsonl", "rows.jsonl"]
    answering(monkeypatch, lambda q: "The answer is 2")
    run(model, *files, "--out", "a")  # 25 % right
    answering(monkeypatch, lambda q: "The answer is 1")
    capsys.readouterr()
    run(model, *files, "--out", "b", "--against", "a")  # 75 % right
    said = capsys.readouterr().out.partition("against a:")[2].splitlines()
    many, rows = (next(line.split() for line in said if line.startswith(name)) for name in ("many", "rows"))
    low, high = float(many[2].strip("[,")), float(many[3].strip("]"))
    assert many[1] == "+50.0" and 35 < low < 43 and 57 < high < 65 and float(many[4]) < 0.001 and many[5] == "200"
    assert rows[1:] == ["+0.0", "[+0.0,", "+0.0]", "1.0000", "3"]
    run(model, *files, "--out", "a", "--against", "b")
    said = capsys.readouterr().out
    assert "-50.0" in said and "WARNING" not in said
    run(model, *files, "--out", "c", "--against", "b", "--prompt", "none")
    assert "rows.jsonl: WARNING: compared with answers that were made with another prompt ('none', there 'alpaca')" in capsys.readouterr().out
    for broken in ('{"rows.jsonl": "task"}', '{"rows.jsonl": null}'):
        Path("b/eval.json").write_text(broken)
        run(model, "--test", "rows.jsonl", "--out", "c", "--against", "b", "--prompt", "none")
        assert "WARNING" not in capsys.readouterr().out  # nothing is known of how they were made


def test_a_patch_brings_the_settings_of_its_run(model, place, capsys):
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/config.json").write_text(json.dumps({"config": {"prompt": "chat", "max_new_tokens": 4, "max_length": 200}}))
    save_patch(model, model, Path("runs/demo/patch.safetensors"))
    assert evaluation.main(["--model", str(model), "--patch", "runs/demo/patch.safetensors", "--test", "rows.jsonl"]) == 0
    assert "rows.jsonl: 3 rows, prompts: chat\n" in capsys.readouterr().out
    shutil.copytree(model, "runs/demo/sft")  # its own run's, where the patch lies beside none
    shutil.copy("runs/demo/patch.safetensors", "patch.safetensors")
    Path("config.json").write_text("{}")
    assert evaluation.main(["--model", "runs/demo/sft", "--patch", "patch.safetensors", "--test", "rows.jsonl", "--out", "b"]) == 0
    assert "rows.jsonl: 3 rows, prompts: chat\n" in capsys.readouterr().out
    assert evaluation.main(["--model", str(model), "--test", "rows.jsonl", "--max-new-tokens", "4"]) == 0
    assert "prompts: alpaca (the model has a chat template: --prompt chat uses it)" in capsys.readouterr().out


def test_bootstrap_agrees_with_the_normal_approximation():
    wins, losses, n = 60, 30, 1000
    mine = [True] * wins + [False] * losses + [True] * 400 + [False] * (n - 400 - wins - losses)
    theirs = [False] * wins + [True] * losses + [True] * 400 + [False] * (n - 400 - wins - losses)
    difference, low, high, p = bootstrap(mine, theirs)
    deviation = math.sqrt(((wins + losses) / n - difference ** 2) / n)
    assert difference == pytest.approx(0.03)
    assert (low, high) == pytest.approx((0.03 - 1.96 * deviation, 0.03 + 1.96 * deviation), abs=0.0015)
    assert p == pytest.approx(math.erfc(0.03 / deviation / math.sqrt(2)), abs=0.002)
    back = bootstrap(theirs, mine)
    assert back[0] == -difference and back[1] == pytest.approx(-high, abs=0.0015)
    assert bootstrap(mine, mine) == (0, 0, 0, 1.0) and bootstrap(mine, theirs) == bootstrap(mine, theirs)


# ---- chat --------------------------------------------------------------------------------------------------

def typed(monkeypatch, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(word + "\n" for word in words)))


def test_chat_remembers_until_reset(model, place, capsys, monkeypatch):
    asked = answering(monkeypatch, lambda messages: f"reply {len(messages)}")
    typed(monkeypatch, "one", "two", "/reset", "three", "", "never")
    run(model, "--chat")
    said = capsys.readouterr().out
    assert [[m["content"] for m in messages] for messages in asked] == [
        ["one"], ["one", "reply 1", "two"], ["three"]]
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "user"]
    assert said.count("reply 1") == 2 and said.count("reply 3") == 1 and list(place.glob("eval*")) == []


def test_chat_with_and_without_a_template(model, place, tmp_path, capsys, monkeypatch):
    plain = tmp_path / "plain"
    save_model(tiny_model(), plain)
    write_tokenizer(plain)
    framed, frame = [], evaluation.Encoder.frame
    monkeypatch.setattr(evaluation.Encoder, "frame", lambda self, p: framed.append(frame(self, p)) or framed[-1])
    for folder in (model, plain):
        typed(monkeypatch, "hello")  # then the end of the input
        assert evaluation.main(["--model", str(folder), "--chat", "--max-new-tokens", "3", "--max-length", "400"]) == 0
    assert framed[0] == "u:hello|" and "### Instruction:\nhello\n" in framed[1]
    assert capsys.readouterr().out.count(" ... (cut: --max-new-tokens") >= 1  # random weights rarely end an answer


def test_a_talk_that_outgrows_the_length_limit_says_so(model, place, capsys, monkeypatch):
    typed(monkeypatch, "short", "a long line " * 20, "bytes \udce9")
    run(model, "--chat", "--max-length", "60", "--max-new-tokens", "2")
    said = capsys.readouterr().out
    before, after = said.split("its beginning is left out", 1)
    assert before.count("> ") == 2 and "outgrown" not in before.split("> ")[1]


# ---- refusals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, says", [
    (["--test", "rows.jsonl", "--chat"], "--chat"),
    ([], "--test"),
    (["--test", "rows.jsonl", "--task", "gms8k"], "did you mean gsm8k?"),
    (["--test", "rows.jsonl", "--against", "nowhere"], "nowhere/rows.jsonl"),
    (["--test", "rows.jsonl", "--against", "bad"], "bad/rows.jsonl: holds no graded answers"),
    (["--test", "rows.jsonl", "--against", "other"], "other/rows.jsonl: has no question in common"),
    (["--test", "no_uid/arena_hard.jsonl"], "no_uid/arena_hard.jsonl:1: missing key 'uid'"),
    (["--test", "rows.jsonl", "--task", "alpaca_eval"], "rows.jsonl:1: missing key 'instruction'"),
    (["--test", "rows.jsonl", "--out", "mine"], "mine/rows.jsonl: exists already"),
    (["--test", "rows.jsonl", "--out", "half"], "half/rows.jsonl: exists already"),
    (["--test", "rows.jsonl", "--out", "json"], "json/eval.json"),
])
def test_refused_in_one_line_and_nothing_is_touched(model, place, capsys, words, says):
    for name, rows in (("bad/rows", [{"input": "Row 0?"}]), ("other/rows", [{"input": "x", "correct": True}]),
                       ("no_uid/arena_hard", [{"prompt": "x"}]), ("mine/rows", [{}]), ("half/rows.part", [{}])):
        Path(name).parent.mkdir(exist_ok=True)
        write(name + ".jsonl", rows)
    Path("json").mkdir()
    Path("json/eval.json").write_text("[1]")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    run(model, *words, code=2)
    errors = capsys.readouterr().err
    assert says in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
