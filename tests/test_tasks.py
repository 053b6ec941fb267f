"""Plain grading, samples -> pairs and negatives, intervals, the demo's problems and model, public files -> rows."""

import json
import re
import runpy
import sys
from dataclasses import replace

import pytest
import torch

from allo_mini import UserError, demo
from allo_mini.checkpoint import load_model, load_tokenizer
from allo_mini.config import parse
from allo_mini.data import Encoder, Task, read_tasks
from allo_mini.inputs import need_answers, read_rows
from allo_mini.logprobs import score
from allo_mini.report import summary, summary_row, wilson
from allo_mini.tasks import JUDGED, RULES, extract_answer, gold_answer, is_correct, label, normalize
from allo_mini.prepare import prepare
from helpers import write_tokenizer


# ---- answers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer, right", [
    ("6 * 7 = 42\nThe answer is 42", "42", True),
    ("THE ANSWER IS 42", "42", True),
    ("so the answer is Paris", "paris", True),
    ("The answer is paris", "PARIS", True),
    ("The answer is 2,125", "2125", True),
    ("The answer is 2125", "2,125", True),
    ("The answer is 1,234,567.", "1234567", True),
    ("The answer is 43.0", "43", True),
    ("The answer is 43", "43.00", True),
    ("The answer is $18", "18", True),
    ("The answer is 18", "$18.00", True),
    ("The answer is $2,125.00.", "2125", True),
    ("The answer is 42.", "42", True),
    ("The answer is: 42", "42", True),
    ("The answer is 42\nThat was easy.", "42", True),
    ("The answer is 7. No:\nThe answer is 42", "42", True),
    ("The answer is 42\nOn second thought, the answer is 7.", "42", False),  # the last one counts
    ("42", "42", False),  # says no answer
    ("The answer is", "42", False),
    ("", "42", False),
    ("The answer is 43.5", "43", False),
    ("The answer is 430", "43", False),
    ("The answer is -42", "42", False),
    ("The answer is 4,2", "42", False),  # no comma of thousands
    ("The answer is 0.42", "42", False),
])
def test_answers_are_graded_by_value_not_by_form(text, answer, right):
    assert is_correct(text, Task(0, "q", None, answer)) is right
    assert is_correct(text, Task(0, "q", f"Because.\nThe answer is {answer}", None)) is right


def test_the_last_answer_up_to_its_line_end_is_extracted():
    assert extract_answer("The answer is 1\nThe answer is  2 apples \nmore") == "2 apples"
    assert extract_answer("nothing here") is None and extract_answer("The answer is ") is None


def test_normalize_is_idempotent():
    for text in ("$2,125.00.", "43.0", " A  b! ", "$18", "1,234,567", "-7.0", "x.0"):
        assert normalize(normalize(text)) == normalize(text)


def test_the_answer_field_goes_before_the_solution():
    assert gold_answer(Task(0, "q", "The answer is 1", "2")) == "2"
    assert gold_answer(Task(0, "q", "The answer is 1", None)) == "1"
    assert gold_answer(Task(0, "q", "no conclusion", None)) is None
    assert not is_correct("The answer is 1", Task(0, "q", "no conclusion", None))


# ---- samples -> pairs and negatives ------------------------------------------------------------------------

RIGHT = ["aaaa. The answer is 5", "bbbb. The answer is 5", "cccc. The answer is 5"]
WRONG = ["bbbx. The answer is 6", "cxcc. The answer is 7", "no idea", "aaaa. The answer is 55"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("t")), 120), "none", 100)


def question(number: int, **changes) -> Task:
    return replace(Task(number, f"question {number}", "ref. The answer is 5", "5"), **changes)


def test_duplicates_are_dropped_and_pairs_are_right_against_wrong(encoder):
    samples = {"question 0": RIGHT + RIGHT + WRONG + WRONG + ["", " "]}
    pairs, negatives, _ = label([question(0)], samples, 1000, 1, encoder)
    assert len(pairs) == 12
    assert {(p.chosen, p.rejected) for p in pairs} == {(r, w) for r in RIGHT for w in WRONG}
    assert {(p.prompt, p.task) for p in pairs} == {("question 0", 0)}
    assert [n.response for n in negatives] == WRONG


@pytest.mark.parametrize("limit", [1, 5])
def test_at_most_so_many_pairs_but_every_wrong_response_is_kept(encoder, limit):
    rows = [question(i) for i in range(3)]
    samples = {rows[0].input: RIGHT + WRONG, rows[1].input: WRONG, rows[2].input: RIGHT[:1] + WRONG[:1]}
    pairs, negatives, said = label(rows, samples, limit, 1, encoder)
    assert [p.task for p in pairs] == [0] * limit + [2]
    assert len({(p.chosen, p.rejected) for p in pairs[:-1]}) == limit
    assert [(n.prompt, n.response) for n in negatives] == [
        *((rows[0].input, w) for w in WRONG), *((rows[1].input, w) for w in WRONG), (rows[2].input, WRONG[0])]
    for part in (f"{limit + 1} pairs", "9 negatives", "4 different correct and 9 wrong"):
        assert part in said


def test_questions_without_samples_or_without_wrong_ones_give_nothing(encoder):
    pairs, negatives, _ = label([question(0), question(1)], {"question 1": RIGHT}, 5, 1, encoder)
    assert pairs == [] and negatives == []


def test_a_rewrite_is_the_rows_own_else_the_nearest_correct_sample_else_the_reference(encoder):
    near = {WRONG[0]: RIGHT[1], WRONG[1]: RIGHT[2], WRONG[3]: RIGHT[0]}

    def rewrites(task, good):
        return {n.response: n.rewrite for n in label([task], {task.input: good + WRONG}, 5, 1, encoder)[1]}
    assert near.items() <= rewrites(question(0), RIGHT).items()
    assert near.items() <= rewrites(question(0), RIGHT[::-1]).items()
    assert set(rewrites(question(0), []).values()) == {"ref. The answer is 5"}
    assert set(rewrites(question(0, rewrite="mine"), RIGHT).values()) == {"mine"}
    assert set(rewrites(question(0, rewrite="mine"), []).values()) == {"mine"}
    references = {n.reference for n in label([question(0)], {"question 0": RIGHT + WRONG}, 5, 1, encoder)[1]}
    assert references == {"ref. The answer is 5"}


def test_pairs_depend_on_the_seed_and_on_no_other_row(encoder):
    rows = [question(i) for i in range(6)]
    samples = {t.input: RIGHT + WRONG for t in rows}
    pairs = label(rows, samples, 4, 1, encoder)[0]
    assert pairs == label(rows, samples, 4, 1, encoder)[0]
    assert pairs != label(rows, samples, 4, 2, encoder)[0]
    for task in rows:
        assert label([task], samples, 4, 1, encoder)[0] == [p for p in pairs if p.task == task.id]
    drawn = {tuple((p.chosen, p.rejected) for p in pairs if p.task == t.id) for t in rows}
    assert len(drawn) > 1  # questions do not share one shuffle


# ---- intervals ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("correct, total, low, high", [
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962),
    (1, 1, 0.2065, 1.0), (0, 0, 0.0, 1.0)])
def test_wilson_intervals_equal_published_values(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=6e-5)


def test_intervals_hold_the_share_and_print_without_a_minus():
    for total in range(1, 60):
        for correct in {0, 1, total // 2, total}:
            s = summary([{"correct": i < correct} for i in range(total)])
            assert s["low"] - 1e-12 <= s["accuracy"] <= s["high"] + 1e-12
            row = summary_row("x", s)
            assert "-" not in row[2] and "100.1" not in row[2], row


def test_summary_counts_and_averages():
    s = summary([{"correct": True, "margin": 2.0}, {"correct": False, "margin": -1.0}])
    assert (s["n"], s["correct"], s["accuracy"], s["margin"]) == (2, 1, 0.5, 0.5)
    assert (s["low"], s["high"]) == wilson(1, 2)
    assert "margin" not in summary([{"correct": True}])
    empty = summary([])
    assert (empty["n"], empty["accuracy"]) == (0, 0.0)


# ---- the demo ----------------------------------------------------------------------------------------------

def replay(text: str, habit: bool) -> str:
    """The solution, worked out from the question's sentences alone."""
    first, *rest = re.split(r"(?<=\.) ", text.rsplit(". ", 1)[0] + ".")
    have, lines = int(re.fullmatch(r"\w+ has (\d+) \w+\.", first)[1]), []

    def compute(sign, by):
        lines.append(f"{have} {sign} {by} = {eval(f'{have} {sign} {by}')}")
        return int(lines[-1].split("= ")[1])
    for sentence in rest:
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if " doubles " in sentence:
            have = compute("+" if habit else "*", 2)
        elif " brings " in sentence:
            lines.append(f"{numbers[0]} * {numbers[1]} = {numbers[0] * numbers[1]}")
            have = compute("+", numbers[0] * numbers[1])
        else:
            have = compute("-" if " gives " in sentence else "+", numbers[0])
    return "\n".join([*lines, f"The answer is {have}"])


@pytest.mark.parametrize("habit", [0, 1])
def test_demo_solutions_follow_from_the_question_and_only_doublings_are_spoilt(habit):
    rows = demo.problems(300, "s", habit=habit)
    assert sum("doubles" in t.input for t in rows) > 50
    for t in rows:
        assert t.output == replay(t.input, bool(habit)) and t.answer == t.output.rsplit(" ", 1)[1]
        assert is_correct(t.output, t) and int(t.answer) > 0
        for a, sign, b, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", t.output):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)


def test_demo_habit_is_a_share_of_the_doublings():
    rows = [t for t in demo.problems(600, 3, habit=0.6) if t.input.count("doubles") == 1]
    spoilt = sum(t.output != replay(t.input, False) for t in rows)
    assert len(rows) > 150 and 0.45 < spoilt / len(rows) < 0.75
    assert all(t.output in (replay(t.input, False), replay(t.input, True)) for t in rows)


def test_demo_problems_are_distinct_new_and_reproducible():
    rows = demo.problems(400, 5)
    assert rows == demo.problems(400, 5) and rows != demo.problems(400, 6)
    assert len({t.input for t in rows}) == 400 and [t.id for t in rows] == list(range(400))
    avoid = {t.input for t in rows[:100]}
    other = demo.problems(400, 5, avoid)  # the same stream of problems: only `avoid` keeps them out
    assert not avoid & {t.input for t in other} and len({t.input for t in other}) == 400
    assert [t.input for t in other[:300]] == [t.input for t in rows[100:]]


def test_a_demo_question_drawn_twice_is_kept_once(monkeypatch):
    monkeypatch.setattr(demo, "problem", lambda rng, habit: (f"question {rng.randint(1, 6)}", "s", "a"))
    drawn = sorted(t.input for t in demo.problems(5, 1, {"question 2"}))
    assert drawn == [f"question {i}" for i in (1, 3, 4, 5, 6)]


def test_demo_splits_share_no_question():
    tasks, pairs, val, test = read_rows(parse(["--limit", "150", "--val-rows", "100", "--test-limit", "120"]))
    assert (len(tasks), pairs, len(val), len(test)) == (150, [], 100, 120)
    assert len({t.input for t in [*tasks, *val, *test]}) == 370
    assert all(t.output == replay(t.input, False) for t in [*tasks, *val, *test])  # no habit in the data


def test_shipped_demo_model_is_small_and_knows_the_task():
    assert sum(f.stat().st_size for f in demo.FOLDER.rglob("*") if f.is_file()) <= 4_000_000
    model = load_model(str(demo.FOLDER))
    tokenizer = load_tokenizer(demo.FOLDER, model.config.vocab_size)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    encoder = Encoder(tokenizer, "chat", 400)
    rows = demo.problems(12, "shipped")
    for t in rows:
        for text in (t.input, t.output):
            assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    examples = [encoder.example(t.input, [t.output]) for t in rows]
    logps = torch.cat([logps[0] for logps in score(model, examples)])
    assert logps.mean() > -0.7  # a model that guesses digits is below -1, an untrained one at -6


# ---- public files -> task rows -----------------------------------------------------------------------------

ASKED = {"stem": "Ice is", "choices": [{"label": "A", "text": "Cold Water"}, {"label": "B", "text": "a gas"}]}
OPTIONS = "Ice is\nOptions:\ncold water\na gas"
ECQA = ("q_no,q_text,q_op1,q_op2,q_op3,q_op4,q_op5,q_ans,taskA_pos,taskA_neg,taskB\n"
        '7,"Where, now?",here,there,up,down,out,there,"There is far.\nIt is there.",no,free\n')
TABLE = {"question": "How many?", "choices": None, "answer": "1,200", "unit": "cups", "table_title": "Tea", "table": "a | b\n1 | 2",
         "solution": "Add.", "split": "test"}
FORMS = [  # task, file, its content, the row that is made of it
    ("ecqa", "cqa.csv", ECQA, {"input": "Where, now?\nOptions:\nhere\nthere\nup\ndown\nout", "answer": "there",
                               "output": "There is far.\nIt is there.\nThe answer is there"}),
    ("ecqa", "a.json", [{"problem": "Q\nOptions:\na\nb", "solution": "S\nThe answer is a", "answer": "a"}],
     {"input": "Q\nOptions:\na\nb", "output": "S\nThe answer is a", "answer": "a"}),
    ("qasc", "a.jsonl", [{"id": "1", "question": ASKED, "answerKey": "A", "fact1": "F.", "fact2": "G.", "combinedfact": "H"}],
     {"input": OPTIONS, "output": "F.\nG.\nH\nThe answer is Cold Water", "answer": "Cold Water"}),
    ("openbookqa", "a.jsonl", [{"id": "1", "question": ASKED, "answerKey": "B"}],
     {"input": OPTIONS, "output": "The answer is a gas", "answer": "a gas"}),
    ("strategyqa", "a.json", [{"qid": "1", "question": "Is it?", "answer": False, "facts": ["F.", "G."]}],
     {"input": "Is it?", "output": "F.\nG.\nThe answer is no", "answer": "no"}),
    ("gsm8k", "a.jsonl", [{"question": "Q?", "answer": "2*1000=<<2*1000=2000>>2,000 cups\n#### 2,000"}],
     {"input": "Q?", "output": "2*1000=2,000 cups\nThe answer is 2,000", "answer": "2000"}),
    ("math", "a.jsonl", [{"problem": "P", "solution": "\\boxed{5}", "answer": "5", "subject": "Algebra", "level": 2}],
     {"input": "P", "output": "\\boxed{5}", "answer": "5", "level": 2, "subject": "Algebra"}),
    ("math", "a.jsonl", [{"problem": "P", "solution": "so \\boxed{\\frac{1}{2}}", "type": "Algebra", "level": "Level 2"}],
     {"input": "P", "output": "so \\boxed{\\frac{1}{2}}", "answer": "\\frac{1}{2}", "level": "Level 2", "subject": "Algebra"}),
    ("mawps", "a.json", [{"iIndex": 1, "sQuestion": "Q?", "lEquations": ["x=3"], "lSolutions": [3.0]}],
     {"input": "Q?", "answer": "3.0"}),
    ("mawps", "a.jsonl", [{"input": "Q?", "target": 3}], {"input": "Q?", "answer": "3.0"}),
    ("tabmwp", "a.json", {"17": TABLE},
     {"input": 'Read the following table regarding "Tea" and then answer a question.\n\na | b\n1 | 2\n\nHow many? (unit: cups)',
      "output": "Add.\nThe answer is 1,200", "answer": "1,200"}),
    ("tabmwp", "a.json", {"17": {**TABLE, "choices": ["Yes", "no"], "answer": "Yes", "unit": None, "table_title": None}},
     {"input": "Read the following table and then answer a question.\n\na | b\n1 | 2\n\nHow many?\nOptions:\nYes\nno",
      "output": "Add.\nThe answer is Yes", "answer": "Yes"}),
    ("alpaca_eval", "a.json", [{"instruction": "Do.", "output": "Done.", "generator": "g", "dataset": "d"}],
     {"instruction": "Do.", "dataset": "d", "reference": "Done."}),
    ("arena_hard", "a.jsonl", [{"uid": "u", "category": "c", "cluster": "x", "prompt": "Do."}],
     {"uid": "u", "category": "c", "prompt": "Do."}),
    ("arena_hard", "a.jsonl", [{"question_id": "u", "category": "c", "cluster": "x", "turns": [{"content": "Do."}]}],
     {"uid": "u", "category": "c", "prompt": "Do."})]


def source_file(path, content):
    rows = content if isinstance(content, str) else json.dumps(content)
    path.write_text("".join(json.dumps(r) + "\n" for r in content) if path.suffix == ".jsonl" else rows)
    return path


@pytest.mark.parametrize("name, file, content, row", FORMS)
def test_prepare_makes_rows_that_the_grader_accepts(name, file, content, row, tmp_path):
    out = tmp_path / f"{name}.jsonl"
    prepare(name, source_file(tmp_path / file.replace("a.", "source."), content), out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [row]
    if name not in JUDGED:
        [task] = need_answers(read_tasks([out], need_output=False))
        assert is_correct(task.output or f"The answer is {task.answer}", task)


def test_every_task_can_be_prepared():
    assert {name for name, *_ in FORMS} == {*RULES, *JUDGED}


@pytest.mark.parametrize("name, file, content, says", [
    ("gsm9k", "a.jsonl", [], "no task of ours"), ("gsm8k", "a.jsonl", [{"question": "Q"}], "row 1 has not the form of gsm8k"),
    ("gsm8k", "a.jsonl", [FORMS[5][2][0], {"question": "Q?", "answer": "5"}], "row 2 has not the form"),
    ("qasc", "a.jsonl", [{"question": ASKED, "answerKey": "E"}], "row 1"), ("qasc", "a.json", "[1", "has not the form"),
    ("strategyqa", "a.json", [5], "row 1"), ("mawps", "a.json", [{"sQuestion": "Q", "lSolutions": []}], "row 1"),
    ("ecqa", "a.csv", "q_text,q_op1\nx,y\n", "row 1"), ("tabmwp", "a.json", "5", "has not the form"),
    ("gsm8k", "missing/a.json", None, "a.json"), ("gsm8k", "a.csv", b"\xff\xfe\x00", "has not the form")])
def test_prepare_refuses_what_it_cannot_read(name, file, content, says, tmp_path):
    source = tmp_path / file
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        source_file(source, content)
    with pytest.raises(UserError, match=says):
        prepare(name, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_prepare_overwrites_nothing(tmp_path):
    source = source_file(tmp_path / "a.jsonl", FORMS[5][2])
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        prepare("gsm8k", source, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="No such file"):
        prepare("gsm8k", tmp_path / "nowhere.csv", tmp_path / "new.jsonl")
    with pytest.raises(UserError, match="a.jsonl/out.jsonl: cannot be written"):
        prepare("gsm8k", source, source / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_prepare_as_a_command(tmp_path, monkeypatch, capsys):
    source_file(tmp_path / "a.jsonl", FORMS[5][2])
    monkeypatch.setattr(sys, "argv", ["tasks", "prepare", "gsm8k", str(tmp_path / "a.jsonl"), str(tmp_path / "o.jsonl")])
    monkeypatch.delitem(sys.modules, "allo_mini.tasks")  # what `python -m` starts from
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("allo_mini.tasks", run_name="__main__")
    assert "o.jsonl: 1 rows" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("allo_mini.tasks", run_name="__main__")
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and "exists already" in errors and errors.count("\n") == 1
