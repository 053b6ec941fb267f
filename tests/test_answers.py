"""evaluation/: pairs of samples, intervals, eval.py, report.html; token_weights.py."""

import html
import io
import json
import math
import random
import re
import runpy
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import EOS, error_of, random_ids, separate_logps, tiny_model, write_tokenizer
from runs import TEMPLATE, rows_of

import eval as evaluation
from allo_mini.checkpoint import save_model
from allo_mini.data.encoder import Encoder, Example
from allo_mini.data.rows import Negative, Task
from allo_mini.data.tokenizer import Tokenizer, load_tokenizer
from allo_mini.evaluation import answers, report
from allo_mini.evaluation.answers import (bootstrap, label, read_samples, respond, summary,
                                          summary_row, wilson)
from allo_mini.logprobs import score
from allo_mini.mask import Selected, to_tensors
from allo_mini.patch import save_patch
from allo_mini.run.files import read_jsonl, save_tensors, write_json, write_jsonl as write
from allo_mini.token_weights import (edit_weights, nearest, read_scores, rewrite_examples,
                                     rewrite_prompt, token_scores, weights_from_scores)

RIGHT = ["aaaa. The answer is 5", "bbbb. The answer is 5", "cccc. The answer is 5"]
WRONG = ["bbbx. The answer is 6", "cxcc. The answer is 7", "no idea", "aaaa. The answer is 55"]


def question(number, rewrite=None):
    return Task(number, f"question {number}", "ref. The answer is 5", "5", rewrite)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(Tokenizer(write_tokenizer(tmp_path_factory.mktemp("t"))), "none", 200)


# ---- samples -> pairs and negatives -------------------------------------------------------------

def test_samples_of_a_question_are_read_from_all_its_lines(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"input": "a", "samples": ["x", " ", "y"], "unfinished": 2}\n'
                    '{"input": "b", "samples": []}\n{"input": "a", "samples": ["z ", ""]}\n')
    assert read_samples(path) == {"a": ["x", "y", "z "], "b": []}
    assert "2 that hit the length limit are left out" in capsys.readouterr().out


@pytest.mark.parametrize("limit, some", [(1, 1), (5, 5), (1000, 12)])
def test_at_most_so_many_pairs_but_every_wrong_response_is_kept(encoder, limit, some, capsys):
    """Of 3 x 4 different responses; what comes twice counts once."""
    rows = [question(i) for i in range(4)]  # the last has no samples
    samples = {rows[0].prompt: RIGHT + WRONG + RIGHT, rows[1].prompt: WRONG,
               rows[2].prompt: RIGHT[:1] + WRONG[:1]}
    pairs, negatives = label(rows, samples, limit, 1, encoder)
    assert [p.task for p in pairs] == [0] * some + [2] and pairs[0].prompt == "question 0"
    drawn = {(p.chosen, p.rejected) for p in pairs[:-1]}
    assert len(drawn) == some and drawn <= {*product(RIGHT, WRONG)}
    assert [(n.prompt, n.response) for n in negatives] == [
        *((rows[0].prompt, w) for w in WRONG), *((rows[1].prompt, w) for w in WRONG),
        (rows[2].prompt, WRONG[0])]
    assert capsys.readouterr().out == ("pairs: 3 questions, 4 different correct and 9 wrong "
                                       f"responses -> {some + 1} pairs, 9 negatives\n")


def test_a_rewrite_is_the_rows_own_else_the_nearest_correct_sample_else_the_reference(encoder):
    def rewrites(task, good):
        negatives = label([task], {task.prompt: good + WRONG}, 5, 1, encoder)[1]
        assert {n.reference for n in negatives} == {"ref. The answer is 5"}
        return {n.response: n.rewrite for n in negatives}
    near = {WRONG[0]: RIGHT[1], WRONG[1]: RIGHT[2], WRONG[3]: RIGHT[0]}
    assert near.items() <= rewrites(question(0), RIGHT).items()
    assert near.items() <= rewrites(question(0), RIGHT[::-1]).items()
    assert set(rewrites(question(0), []).values()) == {"ref. The answer is 5"}
    assert set(rewrites(question(0, rewrite="mine"), RIGHT).values()) == {"mine"}


def test_pairs_depend_on_the_seed_and_on_no_other_row(encoder):
    rows = [question(i) for i in range(6)]
    samples = {t.prompt: RIGHT + WRONG for t in rows}
    pairs = label(rows, samples, 4, 1, encoder)[0]
    assert pairs == label(rows, samples, 4, 1, encoder)[0]
    assert pairs != label(rows, samples, 4, 2, encoder)[0]
    for task in rows:
        assert label([task], samples, 4, 1, encoder)[0] == [p for p in pairs if p.task == task.id]
    drawn = {tuple((p.chosen, p.rejected) for p in pairs if p.task == t.id) for t in rows}
    assert len(drawn) > 1  # questions do not share one shuffle


def test_stop_strings_end_a_response_and_are_cut_off(encoder, monkeypatch, tmp_path):
    model = tiny_model(eos_token_id=2)
    model.folder = encoder.tokenizer.folder
    settings = SimpleNamespace(stop=[], seed=1, max_new_tokens=30, top_p=1.0, sample_batch=4)
    [[(whole, ended)], _] = respond(model, encoder, ["a", "b"], settings)
    settings.stop = [whole[7:9]]
    [[(text, ended)], _] = respond(model, encoder, ["a", "b"], settings)
    assert ended and text == whole.split(whole[7:9])[0]  # no space is lost: --prompt none
    drawn = respond(model, encoder, ["a"], settings, 3, 1.0, rows=[5])
    assert drawn == respond(model, encoder, ["b", "a"], settings, 3, 1.0, rows=[0, 5])[1:]
    settings.stop = ["<s>"]  # a special token, which no decoded response shows
    monkeypatch.setattr(answers, "sample", lambda *_, stopped, **more: [[[1] * stopped([5, 1])]])
    assert respond(model, encoder, ["a"], settings) == [[("", True)]]
    spelled = Encoder(Tokenizer(write_tokenizer(tmp_path, eos_token="~")), "none", 100)
    ids = spelled.tokenizer.encode("4~")  # no tokenizer.json says that it is special
    monkeypatch.setattr(answers, "sample", lambda *_, **more: [[ids]])
    assert respond(model, spelled, ["a"], settings) == [[("4", True)]]


# ---- intervals ----------------------------------------------------------------------------------

def test_what_was_cut_and_what_has_no_answer_is_counted():
    items = [{"correct": False, "finished": False, "answer": None}, {"correct": True, "official": 1}]
    row = dict(zip(answers.COLUMNS, summary_row("x", summary(items))[1:], strict=True))
    shown = [row[key] for key in ("accuracy", "cut", "no answer", "official")]
    assert shown == ["50.0 %", "1", "1", "-"]


def test_intervals_are_wilsons_hold_the_share_and_print_without_a_minus():
    """Published values; all counts of few rows."""
    published = {(8, 10): (0.4902, 0.9433), (0, 10): (0.0, 0.2775), (10, 10): (0.7225, 1.0),
                 (50, 100): (0.4038, 0.5962), (1, 1): (0.2065, 1.0)}
    for counts, interval in published.items():
        assert wilson(*counts) == pytest.approx(interval, abs=6e-5)
    for total in range(1, 60):
        for correct in {0, 1, total // 2, total}:
            s = summary([{"correct": i < correct} for i in range(total)])
            assert s["low"] - 1e-12 <= s["accuracy"] <= s["high"] + 1e-12
            row = summary_row("x", s)
            assert "-" not in row[3] + row[5] and "100.1" not in row[5] and row[7:] == 4 * ["-"]
    s = summary([{"correct": True, "margin": 2.0}, {"correct": False, "margin": -1.0}])
    assert (s["n"], s["accuracy"], s["margin"]) == (2, 0.5, 0.5)


def test_bootstrap_agrees_with_the_normal_approximation():
    wins, losses, n = 60, 30, 1000
    rest = [True] * 400 + [False] * (n - 400 - wins - losses)
    ours = [True] * wins + [False] * losses + rest
    theirs = [False] * wins + [True] * losses + rest
    difference, low, high, p = bootstrap(ours, theirs)
    deviation = math.sqrt(((wins + losses) / n - difference ** 2) / n)
    reach = 1.96 * deviation
    assert difference == pytest.approx(0.03)
    assert (low, high) == pytest.approx((0.03 - reach, 0.03 + reach), abs=0.0015)
    assert p == pytest.approx(math.erfc(0.03 / deviation / math.sqrt(2)), abs=0.002)
    assert bootstrap(theirs, ours)[:2] == pytest.approx((-difference, -high), abs=0.0015)
    assert bootstrap(ours, ours) == (0, 0, 0, 1.0)


# ---- token weights ------------------------------------------------------------------------------

NEGATIVES = [Negative("2 + 2?", "It is 5.", "It is 4.", "It is 4."),
             Negative("Capital of France?", "Rome, I think", "Paris", "Paris, I think")]


def test_weights_by_edit_alignment_and_from_scores():
    """Tokens of weight 0 stand in the rewrite, in that order; hand-worked cases."""
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(14))] for _ in "ab")
        rest = iter(b)
        assert all(token in rest for token, w in zip(a, edit_weights(a, b), strict=True) if w == 0)
    assert edit_weights([1, 2, 3, EOS], [1, 9, 3, EOS]) == [0, 1, 0, 0]  # replaced
    assert edit_weights([1, 2, 3, EOS], [1, 3, EOS]) == [0, 1, 0, 0]  # deleted
    assert edit_weights([1, 3, EOS], [1, 2, 3, EOS]) == [0, 0, 0]  # inserted: no token is wrong
    assert edit_weights([5, 6], []) == edit_weights([5, 6], [7, 8, 9]) == [1, 1]
    assert nearest([1, 2, 3, 4], [[9], [1, 4], [1, 2, 3, 4, 5], [1, 2, 4]]) == 2
    scores = [0.0, 0.49, 0.5, 0.75, 1.0]
    assert weights_from_scores(scores, "threshold", 0.5) == [1, 1, 0, 0, 0]  # 0.5 is aligned


def test_scores_are_the_probabilities_of_the_policys_own_tokens(tmp_path):
    """Each token's, EOS included although pad == eos; files of them; what the prompt shows."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, pad_token="</s>"))
    encoder, model = Encoder(tokenizer, "alpaca", 600), tiny_model(seed=2, trainable=False)
    examples = [encoder.example(n.prompt, [n.response]) for n in NEGATIVES]
    scores = token_scores(model, encoder, NEGATIVES, examples, 8192, [].append)
    for negative, example, row in zip(NEGATIVES, examples, scores, strict=True):
        [ids] = example.responses
        assert len(row) == len(ids) and ids.count(EOS) == 1 and ids[-1] == EOS
        wanted = separate_logps(model, rewrite_prompt(encoder, negative, ids), [*ids]).exp()
        torch.testing.assert_close(torch.tensor(row), wanted, atol=1e-6, rtol=1e-4)
    path = tmp_path / "token_weights.jsonl"
    rows = [{"input": n.prompt, "output": n.response, "reward": row}
            for n, row in zip(NEGATIVES, scores)]
    other = [1 - s for s in scores[0]]  # as to another reference: each keeps its own
    write(path, [*rows, rows[0] | {"reward": other}])
    twice = read_scores(path, [*NEGATIVES, NEGATIVES[0]], [*examples, examples[0]])
    assert twice == [*scores, other]
    text = tokenizer.decode(rewrite_prompt(encoder, NEGATIVES[1], []))
    assert text.index("Capital of France?") < text.index("\nParis\n") < text.index("Rome, I think")
    prompt, [rewrite], *_ = rewrite_examples(encoder, NEGATIVES)[1]
    assert tokenizer.decode(rewrite) == " Paris, I think"
    assert prompt == rewrite_prompt(encoder, NEGATIVES[1], rewrite)
    tight = Encoder(tokenizer, "alpaca", 50)  # never cut: dropped and counted
    assert rewrite_examples(tight, NEGATIVES) == []
    assert "2 dropped (rewriting prompt" in tight.report()
    assert token_scores(model, tight, NEGATIVES, examples, 8192, [].append) == [[], []]


# ---- eval.py ------------------------------------------------------------------------------------

@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A folder with a model and one small file of each kind."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(world / "model")
    write("gsm8k_test.jsonl", [{"input": f"{i} + {i}?", "answer": str(2 * i)} for i in range(7)])
    write("qasc_test.jsonl", [{"input": "Colour?\nOptions:\nred\nblue", "answer": "Red"}] * 5)
    write("rows.jsonl", [{"input": f"Row {i}?", "output": "The answer is 5"} for i in range(3)])
    write("pairs.jsonl", [{"prompt": "Is it?", "chosen": "yes", "rejected": "no"}] * 4)
    write("alpaca_eval.jsonl", [{"instruction": f"Write {i}.", "dataset": "d"} for i in range(3)])
    write("arena_hard.jsonl", [{"uid": f"u{i}", "prompt": f"Do {i}."} for i in range(3)])
    return tmp_path


def run(*words):
    sizes = ["--max-new-tokens", "4", "--max-length", "300", "--sample-batch", "2"]
    assert evaluation.main(["--model", "model", *sizes, *words]) == 0


def answering(monkeypatch, answer):
    """Let every question be answered by answer(question); returns the prompts that were asked."""
    asked = []
    def respond(model, encoder, prompts, settings, on_done=None):  # greedy, one a prompt
        asked.extend(json.loads(json.dumps(prompts)))
        return [[(answer(prompt), True)] for prompt in prompts]
    monkeypatch.setattr(answers, "respond", respond)
    monkeypatch.setattr(evaluation, "respond", respond)
    return asked


def test_several_files_in_one_call(place, capsys, monkeypatch):
    answering(monkeypatch, lambda q: "The answer is " + {"C": "red", "R": "5"}.get(q[0], "6"))
    run("--test", "gsm8k_test.jsonl", "qasc_test.jsonl", "rows.jsonl", "pairs.jsonl",
        "--out", "out")
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert table["gsm8k_test.jsonl"][1:8] == ["(gsm8k)", "14.3", "%", "-", "[2.6,", "51.3]", "7"]
    assert table["qasc_test.jsonl"][7:10] == ["5", "0.0", "%"]  # by the official grader
    assert table["rows.jsonl"][1:3] == ["(generic)", "100.0"] and "pairs.jsonl" in table
    assert rows_of(Path("out/gsm8k_test.jsonl"))[3] == {
        "prompt": "alpaca", "input": "3 + 3?", "gold": "6", "response": "The answer is 6",
        "finished": True, "answer": "6", "correct": True}
    assert all(r["correct"] and not r["official"] for r in rows_of(Path("out/qasc_test.jsonl")))
    assert rows_of(Path("out/pairs.jsonl"))[0].keys() == {"prompt", "input", "gold",
                                                          "rejected", "margin", "correct"}
    assert evaluation.main(["--model", "model", "--test", "rows.jsonl", "--out", "out"]) == 2
    answering(monkeypatch, lambda q: "It is 5")  # --task goes before the file's name
    for task, correct in (("ecqa", 0), ("generic", 3), ("math", 3)):
        run("--test", "rows.jsonl", "--out", task, "--task", task)
        assert sum(row["correct"] for row in rows_of(Path(task, "rows.jsonl"))) == correct


def test_prompts_for_a_judge_are_answered_and_not_graded(place, capsys, monkeypatch):
    files = ["--test", "alpaca_eval.jsonl", "arena_hard.jsonl", "--out"]
    run(*files, "chat")
    said = capsys.readouterr().out
    assert "chat/alpaca_eval.jsonl: 3 rows, none dropped; prompts: chat\n" in said
    assert "accuracy" not in said
    save_model(tiny_model(), "plain")
    answering(monkeypatch, lambda q: f"Done: {q}")
    write_tokenizer(Path("plain"))
    run(*files, "out", "--model", "plain")
    assert "prompts: alpaca\n" in capsys.readouterr().out
    assert rows_of(Path("out/alpaca_eval.jsonl"))[2]["response"] == "Done: Write 2."
    last = {"response": "Done: Do 2.", "gold": None, "correct": None}
    assert last.items() <= rows_of(Path("out/arena_hard.jsonl"))[2].items()


def test_against_another_model(place, capsys, monkeypatch):
    write("many_gsm8k.jsonl", [{"input": f"{i}?", "answer": "2111"[i % 4]} for i in range(200)])
    files = ["--test", "many_gsm8k.jsonl", "alpaca_eval.jsonl", "rows.jsonl"]
    answering(monkeypatch, lambda q: "The answer is 2")
    run(*files, "--out", "a")  # 25 % right
    answering(monkeypatch, lambda q: "The answer is 1")
    capsys.readouterr()
    run(*files, "--out", "b", "--against", "a")  # 75 % right
    said = capsys.readouterr().out.splitlines()
    many, rows = (line.split()[7:] for line in said if ".jsonl (" in line)
    assert many[0] == "+50.0" and many[4] == "200" and float(many[3]) < 0.001
    assert 35 < float(many[1].strip("[,")) < 43 and 57 < float(many[2].strip("]")) < 65
    assert rows == ["+0.0", "[+0.0,", "+0.0]", "1.0000", "3"]
    own = rows_of(Path("a/rows.jsonl"))
    write("a/rows.jsonl", [own[0] | {"gold": "another"}, *own[1:]])  # is not the same question
    run("--test", "rows.jsonl", "--out", "d", "--against", "a")
    assert capsys.readouterr().out.split()[-1] == "2"
    write("few.jsonl", [{"prompt": "Is it?", "chosen": "yes", "rejected": no} for no in "ab"])
    run("--test", "few.jsonl", "--out", "a")
    run("--test", "few.jsonl", "--out", "d", "--against", "a")
    assert capsys.readouterr().out.split()[-1] == "2"  # they differ in what was rejected
    words = ["--model", "model", "--test", "rows.jsonl", "--out", "c", "--against", "a"]
    assert evaluation.main([*words, "--prompt", "chat"]) == 2
    assert "asked in the same style" in capsys.readouterr().err


def test_a_model_brings_its_runs_settings(place, capsys):
    """In a run folder, or made of the base and a run's patch, which must be the same model."""
    improved = Path("runs/demo/improve")
    save_model(tiny_model(seed=1), improved)
    write_tokenizer(improved, chat_template=TEMPLATE)
    save_patch(Path("model"), improved, Path("runs/demo/patch.safetensors"))
    write("runs/demo/config.json", [{"config": {"prompt": "chat", "max_new_tokens": 5, "p": 5.0}}])
    for words in ([str(improved)], ["model", "--patch", "runs/demo/patch.safetensors"]):
        assert evaluation.main(["--model", *words, "--test", "rows.jsonl"]) == 0
        assert "rows.jsonl: 3 rows, none dropped; prompts: chat\n" in capsys.readouterr().out
    rows = rows_of(Path("eval/demo-improve/rows.jsonl"))
    assert rows == rows_of(Path("eval/demo-patch.safetensors/rows.jsonl"))
    assert 1 < len(rows[0]["response"]) <= 5
    run("--test", "rows.jsonl")  # prompts: alpaca, and there is a template
    assert "prompts: alpaca (the model has a chat" in capsys.readouterr().out


def test_chat_remembers_until_an_empty_line(place, capsys, monkeypatch):
    def type_in(text):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
    type_in(b"hi\n" + b"a long line " * 20 + b"\nno text: \xe9\n")
    run("--chat", "--max-length", "60", "--max-new-tokens", "2")
    said = capsys.readouterr().out
    assert said.count(" ... (cut: --max-new") == 3 and said.count("with a trimmed prompt") == 2
    type_in(b"one\ntwo\n\nthree\n")
    asked = answering(monkeypatch, lambda messages: f"reply {len(messages)}")
    run("--chat")
    said = [[message["content"] for message in messages] for messages in asked]
    assert said == [["one"], ["one", "reply 1", "two"], ["three"]]
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]


# ---- report.html: it shows what the folder holds, and nothing in it can run ---------------------

EVIL = '</span></div><script>e = 1</script><img src=x onerror="alert(1)"> "a" \'b\' &lt; é 漢 😀'
UP, NORM = "model.layers.{}.mlp.up_proj.weight", "model.norm.weight"
SHAPES = {UP.format(layer): (6, 2 * layer + 1) for layer in range(11)} | {NORM: (8,)}


def graded(pattern: str, mark: str = "x") -> list[dict]:
    return [{"input": f"q{i}", "gold": "1", "response": f"{mark}{i}.", "correct": digit == "1"}
            for i, digit in enumerate(pattern)]


EVALS = {"SFT": graded("0" * 30 + "1" * 8, "old"), "A<b>": graded("1" * 30 + "0" * 8, "new")}


def random_mask() -> dict[str, Selected]:
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}
    return {name: Selected.from_dense(values) for name, values in dense.items()}


@pytest.fixture
def folder(tmp_path):
    """A run folder made by hand, with everything the page shows."""
    evals = {name: [dict(row) for row in rows] for name, rows in EVALS.items()}
    evals["SFT"][0] |= {"response": EVIL + "\ud800", "input": EVIL}
    steps = [{"stage": "improve", "step": i + 1, "loss": 0.7 - i / 10000, "tokens/s": 5.0,
              "rewards/margins": math.sin(i), "rewards/accuracies": 1.0} for i in range(1000)]
    steps.append({"stage": "improve", "seconds": 7.25, "mem/peak_gb": 3.5})
    write_json(tmp_path / "config.json", {"config": {"model": EVIL}, "machine": {"dtype": "fp32"}})
    table = {name: summary(rows) for name, rows in evals.items()}
    write_json(tmp_path / "results.json", {"results": table})
    for name, rows in evals.items():
        write(tmp_path / f"eval-{name}.jsonl", rows)
    write(tmp_path / "metrics.jsonl", steps)
    write(tmp_path / "token_examples.jsonl", [{
        "prompt": EVIL, "tokens": [EVIL, "b"], "weights": [1.0, 0.0], "scores": [0.25, 0.75],
        "log_ratios": [-0.5, 0.125], "kept": [False, True]}])
    shapes = {name: " ".join(map(str, shape)) for name, shape in SHAPES.items()}
    save_tensors(to_tensors(random_mask()), tmp_path / "mask.safetensors", shapes)
    return tmp_path


def test_the_page_shows_the_folder_and_escapes_it(folder):
    page = report.write_report(folder).read_text(encoding="utf-8")
    titles = ["Results", "Training curves", "Trained weights", "Tokens that count",
              "Before and after", "Time and memory", "Settings"]
    assert re.findall("<h2 .*?>(.*?)</h2>", page) == titles
    assert re.findall('<a href="#(.*?)"', page) == re.findall('<h2 id="(.*?)"', page)
    assert f'class="verdict">{html.escape(report.verdict(EVALS))}<' in page
    assert page.count("<details") == page.count("</details>") == 6
    assert not re.search('<script|<img|<link|onerror="|src="|://', page)
    boxes = [html.unescape(box) for box in re.findall('<div class="text">(.*?)</div>', page)]
    assert boxes.count(EVIL) == 2 and EVIL + "?" in boxes  # half a surrogate stops nothing
    assert ">forgetting: 1 of 2 tokens<" in page
    write_json(folder / "config.json", {"config": {"forget": False}, "machine": {}})
    assert "orgetting:" not in report.write_report(folder).read_text(encoding="utf-8")
    for shown in ("21.1 %", "[11.1, 36.3]", "78.9 %", "+57.9", ">7.2\n", "3.50", "A&lt;b&gt;",
                  'class="w" style="--a:1.0"', "<sup>0.25</sup>", "<sup>0.12</sup>"):
        assert shown in page, shown
    assert page.count("<h3>Won") == page.count("<h3>Lost") == 6
    assert {"old5.", "new30."} < {*boxes} and "new6." not in boxes
    lines = [line.split() for line in re.findall('points="(.*?)"', page, re.S)]
    for line in [line for line in lines if len(line) > 2]:  # the others are the legend's
        corners = [tuple(map(float, point.split(","))) for point in line]
        assert len(corners) == 1000 and corners[-1][0] == 300
        assert all(0 <= x <= 300 and 0 <= y <= 120 for x, y in corners)
    for name in ("results.json", "mask.safetensors", "token_examples.jsonl", "metrics.jsonl"):
        (folder / name).unlink()  # and what is not there is left out
    page = report.write_report(folder).read_text()
    assert re.findall("<h2 .*?>(.*?)</h2>", page) == ["Settings"]


def test_stages_that_share_a_metric_share_a_chart_by_their_share_of_steps(folder):
    """Ten steps of DPO and a thousand of improving both end at 100 %; IPO's loss stands apart."""
    rows = [{"stage": stage, "step": i + 1, "loss": loss, "rewards/margins": i / 10,
             "rewards/accuracies": 0.5} for stage, loss in (("dpo", 0.7), ("ipo", 25.0))
            for i in range(10)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    page = report.write_report(folder).read_text(encoding="utf-8")
    assert re.findall('aria-label="(.*?)"', page)[1:] == [
        "loss: ALLO (improve), DPO", "rewards/margins: ALLO (improve), DPO, ipo",
        "rewards/accuracies: ALLO (improve), DPO, ipo", "improve: rewards: rewards/margins",
        "dpo: rewards: rewards/margins", "ipo: loss: ipo", "ipo: rewards: rewards/margins"]
    logged = report.Log.read(folder)
    assert [x for x, _ in report.curve(logged, "dpo", "loss")] == [*range(10, 101, 10)]


def test_of_preferences_rewards_come_first_and_raw_numbers_are_named(folder):
    start = {"n": 3, "accuracy": 0.5, "low": 0.4, "high": 0.6, "margin": -7.5}
    tuned = start | {"margin": 1.25, "reward": 0.125, "reward_accuracy": 0.75}
    about = {"results": {"start": start, "DPO": tuned}, "command": "train.py --x <y>",
             "date": "2026-01-02", "torch": "9.9"}
    write_json(folder / "results.json", about)
    cfg = {"config": {"model": "m", "pairs": ["a/b.jsonl", "c"]}, "machine": {}}
    write_json(folder / "config.json", cfg)
    for name, margins in {"start": [-9, 0, 3], "DPO": [-8, 2, 2]}.items():
        write(folder / f"eval-{name}.jsonl", [
            {"input": "q", "margin": margin, "correct": margin > 0} for margin in margins])
    page = report.write_report(folder).read_text(encoding="utf-8")
    head = re.search("<thead><tr>(.*?)</thead>", page)[1]
    assert re.findall(">([^<>]+)", head) == [
        "model", "reward accuracy", "reward margin", "raw accuracy, 95 % interval", "raw margin",
        "rows"]
    for shown in ("<h1>m, trained on b.jsonl, c</h1>", "train.py --x &lt;y&gt;", "2026-01-02",
                  "torch 9.9", ">75.0 %", ">0.125", ">-7.50", "pi_start(y-)] &gt; 0"):
        assert shown in page, shown


@pytest.mark.parametrize("first, last, sentence", [
    ("0001" * 50, "1" * 200, "B is 75.0 points above A on 200 rows (p = 0.0002)."),
    ("1" * 200, "0001" * 50, "B is 75.0 points below A on 200 rows (p = 0.0002)."),
    ("01" * 1000, "10" * 1000, "B and A: no difference that 2,000 rows can show (p = ")])
def test_the_verdict_is_on_the_last_two_models(first, last, sentence):
    """Of preferences on how often each one's margin is above the start's."""
    evals, margins = {"start": graded(last)}, {"start": [{"margin": 5.0, "correct": True}] * 2000}
    for name, pattern in (("A", first), ("B", last)):
        evals[name] = graded(pattern)
        margins[name] = [{"margin": 4.0 + 2 * int(x), "correct": True} for x in pattern]
    assert all(report.verdict(rows).startswith(sentence) for rows in (evals, margins))
    del margins["A"]
    assert report.verdict(margins) == report.verdict({"A": []}) == report.verdict({}) == ""


def test_density_counts_the_mask_in_all_and_by_kind_and_layer(capsys):
    mask, noted = random_mask(), {}
    cells = report.density(mask)
    assert cells["all", "all"] == [sum(map(len, mask.values())), 6 * 121 + 8]
    assert cells["norm", "norm"] == cells["all", "norm"] == [len(mask[NORM]), 8]
    assert cells["up_proj", "10"] == [int(mask[UP.format(10)].dense().sum()), 6 * 21]
    log = SimpleNamespace(write=lambda _, **values: noted.update(values))
    report.describe_mask(SimpleNamespace(log=log), "mask", mask, 50.0)
    assert f"{cells['all', 'all'][0]:,} weights" in capsys.readouterr().out
    assert cells["up_proj", "all"] == [sum(map(len, mask.values())) - len(mask[NORM]), 6 * 121]
    assert noted == {"percent": 50.0, "mask/density": cells["all", "all"][0] / (6 * 121 + 8)}


def test_watched_tokens_are_those_of_the_two_models(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"), 120)
    cfg = SimpleNamespace(epsilon=0.25, micro_tokens=4096)
    run = SimpleNamespace(
        folder=tmp_path, encoder=Encoder(tokenizer, "none", 100), cfg=cfg, load=lambda x: x,
        stage=lambda name, artefact, make: make(tmp_path / artefact))
    examples = [Example(random_ids(5, i, 97), [random_ids(9, i + 50, 97)]) for i in range(30)]
    model, other = tiny_model(0, trainable=False), tiny_model(1, trainable=False)
    before, after = score(model, examples), score(other, examples)
    report.record_tokens(run, model, other, examples)
    rows = [row for _, row in read_jsonl(tmp_path / "token_examples.jsonl")]
    assert len(rows) == 10 <= report.SHOWN
    for row, example, [ref], [now] in zip(rows, examples[::3], before[::3], after[::3]):
        torch.testing.assert_close(torch.tensor(row["log_ratios"]), now - ref)
        assert sum(row["kept"]) == 2 and row["kept"][int((now - ref).argmin())]
        assert "".join(row["tokens"]) == tokenizer.decode(example.responses[0])


@pytest.mark.parametrize("file, text, message", [
    ("config.json", "{}", "cannot be read"), ("metrics.jsonl", '{"stage": "a"}\n{', "jsonl:2"),
    ("metrics.jsonl", '{"stage": "a", "seconds": "1"}\n', "metrics.jsonl: cannot be read"),
    ("results.json", "[1]", "results.json: expected a JSON object"),
    ("results.json", '{"results": {"A": {}}}', "eval-A.jsonl: cannot be read"),
    ("token_examples.jsonl", '{"prompt": "a", "tokens": ["b"]}\n', "cannot be read"),
    ("mask.safetensors", "no", "mask.safetensors: cannot be read")])
def test_a_broken_folder_is_one_line(folder, monkeypatch, capsys, file, text, message):
    (folder / file).write_text(text)
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(report.__file__, run_name="__main__")
    assert message in error_of(capsys)
    assert not (folder / "report.html").exists()
