"""The graders of the eight tasks with answers: twelve hand-made rows a task, and the datasets' own gold solutions.

`ALLO_DATA=data python -m pytest -s tests/test_graders.py -k gold` prints the share of gold solutions that are accepted.
"""

import os
import random
from pathlib import Path

import pytest

from allo_mini.data import Task, read_tasks
from allo_mini.inputs import need_answers
from allo_mini.tasks import (RULES, bare, extract_math, gold_answer, grader_for, is_correct, official_correct,
                             same_math, same_plain, task_name)

A = "The answer is "


def choice(question, options, gold, right, wrong):
    return "\n".join([question, "Options:", *options.split("|")]), gold, right, wrong


# Each row: question, gold answer, responses that are right, responses that are wrong.
ECQA = [
    choice("Where do you keep milk cold?", "fridge|oven|shelf|garage|river", "fridge",
           [A + "fridge", A + "the fridge.", A + "Fridge", "It is cold there.\n" + A + '"fridge"'],
                  [A + "oven", "fridge", A + "fridges"]),
    choice("What do you do with a ladder?", "climb|eat|sing|burn|sell", "climb",
           [A + "climb, since it has steps", A + "**climb**", A + "climb because it is tall"],
                  [A + "climbing", A + "sell"]),
    choice("Who teaches?", "teacher|head teacher|pupil|cook|judge", "teacher",
           [A + "teacher", A + "a teacher", A + "the teacher!"], [A + "head teacher", A + "teacher or pupil"]),
    choice("Who leads the school?", "teacher|head teacher|pupil|cook|judge", "head teacher",
           [A + "head teacher", A + "the head teacher (not a pupil)"], [A + "teacher", A + "head"]),
    choice("What falls in April?", "rain|rain, snow and hail|sand|ash|leaves", "rain",
           [A + "rain", A + "rain, I think"], [A + "rain, snow and hail", A + "ash"]),
    choice("What falls in a mixed storm?", "rain|rain, snow and hail|sand|ash|leaves", "rain, snow and hail",
           [A + "rain, snow and hail", A + "Rain, snow and hail."], [A + "rain", A + "rain, snow"]),
    choice("What makes a dog happy?", "long walk|short nap|vet|rain|cat", "long walk",
           [A + "long walk", A + "a long walk", A + "long  walk"], [A + "walk", A + "short nap"]),
    choice("Where is the sea?", "coast|hill|new york|desert|attic", "coast",
           [A + "coast", "the answer is: Coast"], [A + "new york", "Coast it is."]),
    choice("Which is a big city?", "coast|hill|new york|desert|attic", "new york",
           [A + "new york", A + "New York."], [A + "new", A + "york"]),
    choice("What do you wear on a foot?", "shoe|hat|ring|scarf|glove", "shoe",
           ["No: " + A + "hat\n" + A + "shoe", A + "shoe\nThat was easy."], [A + "shoe\n" + A + "hat", A]),
    choice("What is a way to say no?", "no|no thanks|yes|maybe|hello", "no thanks",
           [A + "no thanks", A + "'no thanks'"], [A + "no", A + "no, thanks"]),
    choice("What can be blown up?", "balloon|brick|desk|plate|rug", "balloon",
           [A + "an balloon", A + "balloon: it holds air"], [A + "not balloon", A + "the brick"])]
QASC = [
    choice("What does a plant make?", "sugar|sand|glass|tin|rust|salt|steam|coal", "Sugar",
           [A + "sugar", A + "Sugar.", A + "SUGAR"], [A + "salt", A + "sugars"]),
    choice("What turns water into vapor?", "heat|the cold.|dust|a net|ice|noise|paint|wool", "Heat",
           [A + "heat", A + "Heat, as in a kettle"], [A + "the cold.", A + "he"]),
    choice("What freezes a lake?", "heat|the cold.|dust|a net|ice|noise|paint|wool", "The cold.",
           [A + "the cold", A + "the cold.", A + "cold"], [A + "heat", A + "ice"]),
    choice("What catches fish?", "heat|the cold.|dust|a net|ice|noise|paint|wool", "a net",
           [A + "a net", A + "net"], [A + "nets", A + "wool"]),
    choice("How is bread made?", "by baking dough|by freezing|by magnets|by wind|by rust|by light|by sound|by dye", "By baking dough",
           [A + "by baking dough"], [A + "baking", A + "by wind"]),
    choice("What is H2O?", "water|h2 o|iron|gold|lead|zinc|argon|neon", "Water", [A + "water"],
           [A + "h2 o", A + "gold"]),
    choice("What do bees collect?", "pollen and nectar|pollen|bark|stones|oil|soot|chalk|silk", "pollen and nectar",
           [A + "pollen and nectar", A + "Pollen and nectar;"], [A + "pollen", A + "nectar and pollen"]),
    choice("Where do whales live?", "Pacific|farms|roofs|caves|nests|jars|sky|trees", "Pacific",
           [A + "pacific", A + "the Pacific"], [A + "sky", A + "Pacific farms"]),
    choice("What do roots absorb?", "water|light|sound|paper|metal|glass|wind|time", "Water",
           [A + "“water”", A + "water (from soil)"], [A + "water light", A + "wind"]),
    choice("What carries sound?", "air|vacuum|void|nothing|hope|math|names|dreams", "air", [A + "air", A + "the air"],
           [A + "hair", A + "void"]),
    choice("What rusts?", "iron|gold|glass|wood|paper|wax|silk|bone", "Iron", [A + "Iron", A + "iron\n\nDone"],
           [A + "iron gold", ""]),
    choice("How many legs has an insect?", "6|8|4|2|10|0|3|5", "6", [A + "6", A + "6.0", A + "6."],
           [A + "8", A + "60"])]
OPENBOOKQA = [
    choice("A magnet pulls", "a nail|a cup|a leaf|soap", "a nail", [A + "a nail", A + "nail", A + "A Nail."],
           [A + "a leaf", A + "nails"]),
    choice("The sun rises in the", "east|west|north|south", "East", [A + "east", A + "the East"],
           [A + "west", A + "northeast"]),
    choice("Which month is warm in Spain?", "july|january|may be none|february", "July", [A + "july", A + "July!"],
           [A + "january", A + "june"]),
    choice("Ice is", "solid water|a gas|a metal|alive", "solid water", [A + "solid water", A + "solid water: frozen"],
           [A + "water", A + "solid"]),
    choice("Owls hunt", "at night|at noon|in rain|never", "at night", [A + "at night", A + "at night, mostly"],
           [A + "night", A + "at noon"]),
    choice("Cars need", "fuel|sails|hay|ink", "Fuel", [A + "fuel", A + "Fuel because they burn it"],
           [A + "fuels", A + "ink"]),
    choice("Which city is in Asia?", "hanoi|athens|oslo|rome", "Hanoi", [A + "hanoi", A + "Hanoi"],
           [A + "athens", "Hanoi"]),
    choice("Friction makes", "heat|cold|light years|salt", "heat", [A + "heat", "THE ANSWER IS HEAT"],
           [A + "cold", A + "heat\n" + A + "salt"]),
    choice("A tree grows from", "a seed|a stone|a coin|a shoe", "a seed", [A + "a seed", A + "the seed"],
           [A + "seedling", A + "a stone"]),
    choice("Fish breathe with", "gills|lungs|fins|tails", "gills", [A + "gills", A + "`gills`"],
           [A + "gill", A + "fins"]),
    choice("A year has", "12 months|10 weeks|5 days|2 hours", "12 months", [A + "12 months", A + "12 months."],
           [A + "12", A + "10 weeks"]),
    choice("Which weighs most?", "1,000 grams|100 grams|10 grams|1 gram", "1,000 grams",
           [A + "1,000 grams", A + "1000 grams"], [A + "100 grams", A + "1"])]
STRATEGYQA = [(f"Question {i}?", gold, right, wrong) for i, (gold, right, wrong) in enumerate([
    ("yes", [A + "yes", A + "Yes.", A + "YES!"], [A + "no", "yes"]),
    ("no", [A + "no", A + "No, it is not"], [A + "yes", A + "not sure"]),
    ("yes", [A + "true", A + "yes because it can"], [A + "false", A + "yesterday"]),
    ("no", [A + "false", A + "**No**"], [A + "none", A + "nothing"]),
    ("yes", ["I doubt it.\n" + A + "yes"], [A + "probably", ""]),
    ("no", [A + "no\nThe end"], [A + "no\n" + A + "yes"]),
    ("yes", ["the answer is: yes"], ["the answer: yes"]),
    ("no", [A + "'no'"], [A + "unknown"]),
    ("yes", ["So the answer is yes (see above)"], ["So it is yes"]),
    ("no", [A + "no;"], [A]),
    ("yes", [A + "yes - easily"], [A + "no - never"]),
    ("no", ["The answer is yes? No.\n" + A + "no"], [A + "y"])])]
GSM8K = [(f"Problem {i}?", gold, right, wrong) for i, (gold, right, wrong) in enumerate([
    ("18", [A + "18", A + "$18.", A + "18 dollars", "#### 18", "so \\boxed{18}"],
           [A + "180", A + "81", "18 and then 19"]),
    ("2125", [A + "2,125", A + "$2125.00", "She has 2,125 blocks."], [A + "2,125,000", A + "212"]),
    ("5", [A + "2 + 3 = 5", A + "5 (since 2+3=5)", "We get 2 and 3, in all 5"], [A + "2 + 3 = 6", "5 or 6"]),
    ("70000", [A + "70,000", A + "$70,000.", A + "70000.0"], [A + "70", A + "70,001"]),
    ("3", [A + "3 hours and some", A + "about 3", "\\boxed{3\\text{ hours}}"], [A + "13", A + "three"]),
    ("-4", [A + "-4", A + "−4", "\\boxed{-4}"], [A + "4", A + "10-4"]),
    ("25", [A + "25%", A + "25 percent", "so $\\boxed{25\\%}$"], [A + "0.25", A + "2.5"]),
    ("12", ["Final answer: 12", "Answer: 12 eggs", "the correct answer is $12$"], ["Answer: 11 of 12", A + "1 2"]),
    ("109200000", [A + "109,200,000 people"], [A + "109,200", A + "109.2"]),
    ("8", ["\\boxed{7} no, \\boxed{8}", A + "9 but \\boxed{8}"],
           ["\\boxed{8} no, \\boxed{7}", "\\boxed{7}. " + A + "8"]),
    ("1", [A + "1", A + "1.0", A + "**1**"], [A + "1:20", A + "21", A + "1/2"]),
    ("540", [A + "540 meters per week.", "It is $540$\n" + A + "$540$."], [A + "54", A + "5400", "nothing"])])]
MAWPS = [(f"Problem {i}?", gold, right, wrong) for i, (gold, right, wrong) in enumerate([
    ("43.0", [A + "43", A + "43.0", A + "43 seashells"], [A + "43.5", A + "34"]),
    ("0.6666666667", [A + "2/3", A + "\\frac{2}{3}", A + "0.66667"], [A + "0.6", A + "3/2"]),
    ("11.5", [A + "11.5", A + "11 1/2", A + "$11.50", "\\boxed{11.5}"], [A + "11", A + "115"]),
    ("1.84", [A + "1.84", A + "$1.84 in all"], [A + "1.85", A + "184"]),
    ("0.5", [A + "1/2", A + ".5", A + "0.50 of a pie"], [A + "5", A + "2"]),
    ("158.35", [A + "158.35", "Thus 158.35"], [A + "158", A + "58.35"]),
    ("6.0", [A + "6", A + "3 * 2 = 6", A + "6.00"], [A + "3 * 2", A + "16"]),
    ("1000.0", [A + "1,000", A + "1000"], [A + "1", A + "1,001"]),
    ("0.3333333333", [A + "1/3", A + "0.33333"], [A + "0.3", A + "1 3"]),
    ("52.0", [A + "52 weeks", "25 + 27 = 52"], ["52 - 27 = 25", A + "52.2"]),
    ("0.875", [A + "7/8", A + "\\frac78", A + "0.875"], [A + "8/7", A + "0.87"]),
    ("9.43", [A + "9.43 dollars", "#### 9.43"], [A + "9.4", A + "94.3"])])]
TABMWP = [(f"Table {i}?", gold, right, wrong) for i, (gold, right, wrong) in enumerate([
    ("4,656", [A + "4,656", A + "4656", A + "4656 miles"], [A + "4", A + "4,665"]),
    ("3.30", [A + "3.30", A + "$3.3", A + "3.3"], [A + "33", A + "3"]),
    ("3/10", [A + "3/10", A + "\\frac{3}{10}", A + "0.3"], [A + "3", A + "10/3"]),
    ("-7", [A + "-7", A + "-7 degrees"], [A + "7", A + "17"]),
    ("0.08", [A + "0.08", A + ".08"], [A + "0.8", A + "8"]),
    ("1,522.81", [A + "$1,522.81", A + "1522.81"], [A + "1,522", A + "1,522.18"])])] + [
    choice("Is it linear?", "linear|nonlinear", "linear", [A + "linear", A + "Linear."], [A + "nonlinear", "linear"]),
    choice("Is there a shortage?", "shortage|surplus", "shortage",
           [A + "a shortage", A + "shortage, for demand is high"], [A + "surplus"]),
    choice("When does it leave?", "1:20 P.M.|1:30 P.M.", "1:20 P.M.", [A + "1:20 P.M.", A + "1:20 p.m"],
           [A + "1:30 P.M.", A + "1:20"]),
    choice("Who has most?", "Ann|Anna|Mr. Lee", "Anna", [A + "Anna", A + "anna"], [A + "Ann", A + "Anna Lee"]),
    choice("How long?", "15 minutes|1 hour and 15 minutes", "15 minutes", [A + "15 minutes"],
           [A + "1 hour and 15 minutes", A + "15"]),
    choice("Which cost?", "$155|$275", "$155", [A + "$155", A + "155"], [A + "$275", A + "$1,550"])]
MATH = [(f"Problem {i}?", gold, right, wrong) for i, (gold, right, wrong) in enumerate([
    (r"\frac{14}{3}", [r"$\boxed{\dfrac{14}{3}}$", A + r"$\frac{14}3$.", A + "14/3", r"\boxed{4\frac{2}{3}}"],
           [A + "14", A + "4.6", r"\boxed{\frac{3}{14}}"]),
    (r"\left( 3, \frac{\pi}{2} \right)",
           [r"\boxed{(3, \pi/2)}", r"\boxed{\left(3,\frac\pi2\right)}", A + r"\( (3,\tfrac{\pi}{2}) \)"],
     [r"\boxed{(\pi/2, 3)}", r"\boxed{[3, \pi/2]}", r"\boxed{3}"]),
    (r"(3,4]", [r"\boxed{(3, 4]}", r"\boxed{\left(3,4\right]}", r"\boxed{x \in (3,4]}"],
           [r"\boxed{(3,4)}", r"\boxed{[3,4]}"]),
    (r"1,-2", [r"\boxed{-2, 1}", r"\boxed{1,-2}", r"\boxed{\{1,-2\}}"],
           [r"\boxed{1}", r"\boxed{1,2}", r"\boxed{(1,-2)}"]),
    (r"3\sqrt{13}", [r"\boxed{3\sqrt{13}}", r"\boxed{3 \sqrt{13}}", A + "3sqrt(13)"],
           [r"\boxed{\sqrt{13}}", r"\boxed{3\sqrt{31}}"]),
    (r"\text{Evelyn}", [r"\boxed{\text{Evelyn}}", r"\boxed{Evelyn}", A + "Evelyn."], [r"\boxed{\text{Eve}}", "Evelyn"]),
    (r"864 \mbox{ inches}^2", [r"\boxed{864}", A + r"$864 \text{ inches}^2$", A + "864 square inches"],
           [r"\boxed{846}", r"\boxed{864x}"]),
    (r"90^\circ", [r"\boxed{90}", r"\boxed{90^{\circ}}", A + "90 degrees"], [r"\boxed{9}", r"\boxed{90\pi}"]),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
           [r"\boxed{\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{pmatrix}}",
     r"\boxed{\begin{pmatrix}-1/3\\2/3\end{pmatrix}}"],
            [r"\boxed{\begin{pmatrix} 2/3 \\ -1/3 \end{pmatrix}}", r"\boxed{-1/3}"]),
    (r"x^3+3x-6", [r"\boxed{x^3 + 3x - 6}", r"\boxed{x^{3}+3x-6}"], [r"\boxed{x^3+3x+6}", A + "6"]),
    (r"\$32,\!348", [r"\boxed{32348}", r"\boxed{\$32{,}348}", A + "$32,348."], [r"\boxed{32}", r"\boxed{348}"]),
    (r"2516_8", [r"\boxed{2516_8}", r"\boxed{2516_{8}}"], [r"\boxed{2516}", r"\boxed{2516_9}", r"\boxed{}"])])]
ROWS = {"ecqa": ECQA, "qasc": QASC, "openbookqa": OPENBOOKQA, "strategyqa": STRATEGYQA, "gsm8k": GSM8K, "math": MATH,
        "mawps": MAWPS, "tabmwp": TABMWP}


def test_twelve_rows_for_every_task_with_a_grader():
    assert ROWS.keys() == RULES.keys() and all(len(rows) == 12 for rows in ROWS.values())
    assert all(right and wrong for rows in ROWS.values() for _, _, right, wrong in rows)


@pytest.mark.parametrize("name, row", [(name, row) for name, rows in ROWS.items() for row in rows],
                         ids=[f"{name}-{i}" for name, rows in ROWS.items() for i in range(12)])
def test_written_variants(name, row):
    question, gold, right, wrong = row
    task = Task(0, question, None, gold, source=f"data/{name}_test.jsonl")
    assert [text for text in right if not is_correct(text, task)] == []
    assert [text for text in wrong if is_correct(text, task)] == []


def test_the_official_grader_cannot_give_a_capital():
    asked = {gold: Task(0, "q", None, gold, source="qasc") for gold in ("Heat", "heat")}
    assert is_correct(A + "Heat", asked["Heat"]) and is_correct(A + "heat", asked["Heat"])
    assert not official_correct(A + "Heat", asked["Heat"]) and not official_correct(A + "heat", asked["Heat"])
    assert official_correct("So.\nThe answer is Heat ", asked["heat"])
    assert not official_correct("the answer is heat", asked["heat"]) and not official_correct("heat", asked["heat"])
    assert not official_correct(A + "heat.", asked["heat"])


@pytest.mark.parametrize("file, task", [
    ("ecqa_test.jsonl", "ecqa"), ("data/math500_test.jsonl", "math"), ("x/gsm8k.jsonl", "gsm8k"), ("GSM8K-train.jsonl", "gsm8k"),
    ("alpaca_eval_805.jsonl", "alpaca_eval"), ("arena-hard-v0.1.jsonl", "arena_hard"), ("mathematics.jsonl", ""),
    ("gsm8k_math.jsonl", ""), ("rows.jsonl", ""), ("gsm8k/rows.jsonl", ""), ("tabmwp", "tabmwp"), ("aftermath.jsonl", "")])
def test_a_file_name_tells_the_task(file, task):
    assert task_name(file) == task


@pytest.mark.parametrize("name, file", [("sort-letters", "sort-letters_train.jsonl"), ("Sorting", "sorting.jsonl"),
                                        ("math_sort", "math-sort_test.jsonl")])
def test_a_task_of_ones_own_is_found_however_it_is_spelled(name, file, monkeypatch):
    """And although its name holds one of the ten."""
    monkeypatch.setitem(RULES, name, (str, str))
    assert task_name(file) == name and task_name("math_test.jsonl") == "math" and task_name("gsm8k_math.jsonl") == ""


def test_rows_of_an_unknown_file_keep_the_plain_rule(tmp_path):
    assert grader_for("rows.jsonl")[1] is same_plain
    plain = Task(0, "q", None, "5")
    assert is_correct(A + "5.", plain) and not is_correct("\\boxed{5}", plain) and not is_correct("5", plain)
    for name, answer in (("rows", False), ("gsm8k_own", True)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text('{"input": "q", "output": "The answer is 5"}\n')
        assert is_correct("It is 5", read_tasks([path])[0]) is answer  # what labels samples in training, too


def test_extraction_order_and_nested_braces():
    assert extract_math(r"\boxed{\frac{1}{\sqrt{2}}} so the answer is 3, not 4") == r"\frac{1}{\sqrt{2}}"
    assert extract_math(r"\boxed{7} and the answer is 3: \boxed{5") == "7"  # a box that never closes is none
    assert extract_math("The answer is $x + 1$ for all of 12") == "x + 1"
    assert extract_math("first 3, then -4.5 of 1,200") == "1,200" and extract_math("none") is None
    assert gold_answer(Task(0, "q", r"Thus \boxed{x^{2}}.", None, source="math")) == "x^{2}"


def test_same_math_is_symmetric_and_reflexive():
    answers = [gold for _, gold, *_ in MATH + GSM8K + MAWPS + TABMWP]
    for a in answers:
        assert same_math(a, a), a
        for b in answers:
            assert same_math(a, b) == same_math(b, a), (a, b)


@pytest.mark.parametrize("text",
       ["", " ", "\\boxed{", "\\boxed{}" * 50, "{" * 3000, "\\frac" * 500, "\\frac{" * 300, "(" * 3000,
                                  "The answer is " + "9" * 5000, "The answer is 1/0", "The answer is $", "." * 3000,
                                  "\\boxed{" * 40 + "5" + "}" * 40, "The answer is " + "a " * 3000, "1," * 2000])
@pytest.mark.parametrize("name", RULES)
def test_no_text_breaks_a_grader(name, text):
    for gold in ("5", "yes", r"(1, \frac{1}{2}]"):
        assert is_correct(text, Task(0, "q", None, gold, source=name)) in (True, False)


@pytest.mark.skipif(not os.environ.get("ALLO_DATA"), reason="ALLO_DATA names no folder with the datasets")
@pytest.mark.parametrize("name", RULES)
def test_gold_solutions_are_accepted_and_other_answers_refused(name):
    files = sorted(Path(os.environ["ALLO_DATA"]).glob(f"{name}*_t*.jsonl"))
    assert files
    for path in files:
        rows = need_answers(read_tasks([path], need_output=False))
        accepted = sum(is_correct(t.output or A + t.answer, t) for t in rows) / len(rows)
        answers = [t.answer for t in rows]
        random.Random(0).shuffle(answers)
        other = [(t, a) for t, a in zip(rows, answers) if bare(a) != bare(t.answer)]
        fooled = [(t.answer, a) for t, a in other if is_correct(A + a, t)]
        print(f"{path.name}: {100 * accepted:.2f} % of {len(rows)} gold solutions accepted, "
              f"{len(fooled)} of {len(other)} differing answers accepted")
        assert accepted >= 0.995 and not fooled
