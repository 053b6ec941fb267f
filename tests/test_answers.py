"""Plain grading, samples -> pairs and negatives, responses, intervals."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
from helpers import tiny_model, write_tokenizer

from allo_mini.data.encoder import Encoder
from allo_mini.data.rows import Task
from allo_mini.data.tokenizer import Tokenizer
from allo_mini.evaluation.answers import (bootstrap, label, read_samples, respond, summary,
                                          summary_row, wilson)
from allo_mini.evaluation.graders import bare, gold_answer, is_correct

RIGHT = ["aaaa. The answer is 5", "bbbb. The answer is 5", "cccc. The answer is 5"]
WRONG = ["bbbx. The answer is 6", "cxcc. The answer is 7", "no idea", "aaaa. The answer is 55"]


def question(number, rewrite=None):
    return Task(number, f"question {number}", "ref. The answer is 5", "5", rewrite)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(Tokenizer(write_tokenizer(tmp_path_factory.mktemp("t"))), "none", 200)


# ---- rows of no known task --------------------------------------------------------------------

@pytest.mark.parametrize("text, answer", [
    ("2,125", "2125"), ("1,234,567.", "1234567"), ("43.0", "43"), ("18", "$18.00"), ("Paris", "paris")])
def test_answers_are_graded_by_value_not_by_form(text, answer):
    """Those of a row's answer, or of its solution; test_graders.py has many more."""
    for task in (Task(0, "q", None, answer), Task(0, "q", f"So.\nThe answer is {answer}", None)):
        assert is_correct(f"The answer is {text}", task)
        assert not is_correct(f"The answer is 1{text}", task) and not is_correct("", task)


def test_the_answer_field_goes_before_the_solution():
    assert gold_answer(Task(0, "q", "The answer is 1", "2")) == "2"
    assert gold_answer(Task(0, "q", "no conclusion", None)) is None
    assert not is_correct("The answer is 1", Task(0, "q", "no conclusion", None))
    for text in ("$2,125.00.", "43.0", " A  b! ", "1,234,567", "-7.0", "x.0"):
        assert bare(bare(text)) == bare(text)


# ---- samples -> pairs and negatives -------------------------------------------------------------

def test_samples_of_a_question_are_read_from_all_its_lines(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"input": "a", "samples": ["x", " ", "y"], "unfinished": 2}\n'
                    '{"input": "b", "samples": []}\n{"input": "a", "samples": ["z ", ""]}\n')
    assert read_samples(path) == {"a": ["x", "y", "z "], "b": []}
    assert "2 that hit the length limit are left out" in capsys.readouterr().out


def test_all_pairs_of_different_responses(encoder):
    samples = {"question 0": RIGHT + WRONG + RIGHT}
    pairs, negatives = label([question(0)], samples, 1000, 1, encoder)
    assert {(p.chosen, p.rejected) for p in pairs} == set(product(RIGHT, WRONG))
    assert {(p.prompt, p.task) for p in pairs} == {("question 0", 0)}
    assert [n.response for n in negatives] == WRONG


@pytest.mark.parametrize("limit", [1, 5])
def test_at_most_so_many_pairs_but_every_wrong_response_is_kept(encoder, limit, capsys):
    rows = [question(i) for i in range(4)]  # the last has no samples
    samples = {rows[0].prompt: RIGHT + WRONG, rows[1].prompt: WRONG,
               rows[2].prompt: RIGHT[:1] + WRONG[:1]}
    pairs, negatives = label(rows, samples, limit, 1, encoder)
    assert [p.task for p in pairs] == [0] * limit + [2]
    assert len({(p.chosen, p.rejected) for p in pairs[:-1]}) == limit
    assert [(n.prompt, n.response) for n in negatives] == [
        *((rows[0].prompt, w) for w in WRONG), *((rows[1].prompt, w) for w in WRONG),
        (rows[2].prompt, WRONG[0])]
    assert capsys.readouterr().out == ("pairs: 3 questions, 4 different correct and 9 wrong "
                                       f"responses -> {limit + 1} pairs, 9 negatives\n")


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


def test_stop_strings_end_a_response_and_are_cut_off(encoder):
    model = tiny_model(eos_token_id=2)
    model.folder = encoder.tokenizer.folder
    settings = SimpleNamespace(stop=[], seed=1, max_new_tokens=30, top_p=1.0, temperature=1.0,
                               sample_batch=4)
    [[(whole, ended)], _] = respond(model, encoder, ["a", "b"], settings, temperature=0.0)
    settings.stop = [whole[7:9]]
    [[(text, ended)], _] = respond(model, encoder, ["a", "b"], settings, temperature=0.0)
    assert ended and text == whole.split(whole[7:9])[0]  # no space is lost: --prompt none
    drawn = respond(model, encoder, ["a"], settings, n=3, rows=[5])
    assert drawn == respond(model, encoder, ["b", "a"], settings, n=3, rows=[0, 5])[1:]


# ---- intervals ----------------------------------------------------------------------------------

@pytest.mark.parametrize("correct, total, low, high", [
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0),
    (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1.0)])
def test_wilson_intervals_equal_published_values(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=6e-5)


def test_intervals_hold_the_share_and_print_without_a_minus():
    for total in range(1, 60):
        for correct in {0, 1, total // 2, total}:
            s = summary([{"correct": i < correct} for i in range(total)])
            assert s["low"] - 1e-12 <= s["accuracy"] <= s["high"] + 1e-12
            row = summary_row("x", s)
            assert "-" not in row[3] + row[5] and "100.1" not in row[5] and row[7:] == ["-", "-"]
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
