"""The graders of the eight tasks with answers: twelve hand-made rows a task, and the datasets' own gold solutions.

`ALLO_DATA=data python -m pytest -s tests/test_graders.py -k gold` prints the share of gold solutions that are accepted.
"""

import os
import random
from pathlib import Path

import pytest

from allo_mini.data.rows import Task, read_tasks
from allo_mini.evaluation.graders import (QA, RULES, bare, concluded, final, gold_answer,
                                          is_correct, official_correct, same_math, task_name)
from allo_mini.run.inputs import need_answers

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
    ("yes", ["the answer is: yes", "the answer: yes"], ["the answers: yes and no"]),
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


CITIES = "Which city?\nOptions:\nRome\nParis\nSt. Louis\nNew York\nYork"
FORMS = {  # how chat models write answers: task ("": none of the ten), gold, right and wrong ones
    "emphasis": ("", "42", [
        "**Answer:** 42", "**Answer**: 42", "The answer is *42*.", A + "__42__.", A + "***42***!",
        "**The answer is: 42**", "_Answer:_ 42", "### Answer: 42", A + "`42`, since `6*7` is 42.",
        "The answer is:\n```\n42\n```", "- **Final answer:** **42**", A + "** 42 **."],
        ["**Answer:** 43", A + "*43*", A + "`43`.", "**42** is near. **Answer:** 41", A + "2**42"]),
    "dollars and quotes": ("", "42", [
        A + "\\(42\\).", A + "\\[42\\]", "The answer is\n$$\n42\n$$", A + "$$42$$.", A + "'42'",
        A + "“42”.", A + "$42", "Answer: $\\boxed{42}$", "\\fbox{42}", "\\boxed 42.", "\\(\\boxed42\\)",
        "\\boxed{\\text{42}}", "$\\text{The answer is } 42$", A + "(42)."],
        [A + "\\(43\\).", "Answer: $\\boxed{43}$", "\\boxed 4 2", "\\boxed{4}2", A + "(43)", A + "(4, 2)"]),
    "a number in a sentence": ("", "42", [
        "The answer is:\n\n**42**", A + "therefore 42.", A + "approximately 42.", "Answer = 42",
        "It is 42", "42", "It is 7.\n#### 42", A + "42.\n\nThis took 3 steps.", A + "x = 42.",
        "The answer to this question is 42.", A + "40 + 2 = 42.", A + "42 (that is, 40 and 2).",
        A + "42 (6 * 7).", A + "42: 6*7 = 42.", "The answer is the total of both: 42", A + "42 apples"],
        [A + "-42", A + "42.5", A + "not 42.", A + "42 or 43", A + "41 and 42", A + "42x", A + "42^2",
         A + "4 2", A + "42/2", A + "1/42", A + "42:10", A + "4,2", "#### 43", "42 and 43", A + "42 1/2",
         A + "42 - 1", A + "42 * 2", ""]),
    "a reason": ("", "42", [
        A + "42, since 40 + 2 = 42.", A + "42 because 6 * 8 is 48, less 6.", A + "42, which is 6 * 7.",
        A + "42. 6 * 9 = 54 would be too much.", A + "42; this follows from 6 * 7.",
        A + "42! 6 * 7 = 42.", A + "42 - as 40 + 2 is 42."],
        [A + "43, since 42 is even.", A + "4.2. This follows.", A + "41 because 42 is too big.",
         A + "43. No, 42 is wrong.", A + "41, not 42"]),
    "a check": ("", "42", [
        A + "42. Let me verify: 6 * 7 = 42, so the answer is correct.", A + "42. That is what the answer is.",
        A + "42. Is the answer right? Yes, the answer is 42.", A + "42.\nThe answer is",
        A + "42. We see that the answer is not 41.", A + "42.\n\nCheck: 42 / 7 = 6. The answer is valid."],
        [A + "41. Check: 42 is even, so the answer is correct.", A + "42. Wait, the answer is 41.",
         A + "41. We see that the answer is not 42."]),
    "money": ("", "1234.5", [A + "$1,234.50.", A + "**$1,234.50**.", A + "$\\$1,234.50$"],
              [A + "$1,234.05.", A + "1.234,50", A + "$1,234"]),
    "negative": ("", "-3", [A + "−3", A + "$-3$", A + "x = -3", "So we get -3", A + "-3 degrees"],
                 [A + "3", A + "x = 3", "10-3"]),
    "percent": ("", "25%", [A + "25%.", A + "**25 %**", A + "25\\%", A + "25"], [A + "0.25", A + "24%"]),
    "decimals": ("", "3.14", [A + "3.14. This is pi.", A + "$3.14$, roughly"], [A + "3", A + "3,14"]),
    "fraction": ("", "3/4", [
        A + "$\\frac{3}{4}$.", A + "0.75", A + "¾", A + "**3/4** of it.", A + "3 / 4, so less than 1.",
        "Final Answer: The final answer is $\\dfrac{3}{4}$. I hope it is correct."],
        [A + "4/3", A + "3", A + "34", A + "½"]),
    "letter": ("", "B", [
        A + "[B].", A + "B)", A + "**(B)**", A + "**B)**", A + "Option (B).", "**Answer: (B)**", A + "$B$",
        "\\boxed{\\text{(B)}}", "$\\boxed{\\textbf{(B)}\\ 5}$", A + "(B) Paris.", A + "B. Paris", A + "B: Paris",
        A + "B, because Paris is.", A + "B since it is", A + '"B"', A + "b", A + "B (Paris)", "Answer:\n\nB"],
        [A + "(A)", A + "not B", A + "A or B", A + "B or C", A + "B, C", A + "(B) or (C)", A + "(A) B",
         A + "Bern", A + "BC", "B", A + "Option A, not B", A + "B/C"]),
    "a letter that is an article": ("", "A", [A + "(A) dog", A + "A.", A + "A because it is"], [A + "a dog"]),
    "yes": ("strategyqa", "yes", [
        A + "**yes**.", A + "Yes, it is. No ship sank.", "**Answer:** Yes", A + "`yes`", "\\boxed{\\text{Yes}}",
        A + "yes. So the answer is correct.", A + "yes it can"],
        [A + "**no**", "Answer: No", A + "not yes", "\\boxed{no}", A + "yes or no"]),
    "no": ("", "No", [A + "no.", A + "**No**, it is not.", A + "false"], [A + "yes", A + "not sure", "no"]),
    "words": ("", "Paris", [
        A + '"Paris", because it is.', "Answer: *Paris*", "\\boxed{Paris}", A + "Paris. It is old.",
        A + "Paris (France).", A + "Paris, the capital of France.", A + "“Paris”.", A + "Paris, not Rome.",
        A + "indeed Paris", A + "$\\text{Paris}$", A + "(B) Paris.",
        A + "Paris. Let me check: so the answer is right."],
        ["Paris", A + "not Paris", A + "Paris or Rome", A + "Paris, Rome", A + "Parish", A + "New Paris",
         A + "Rome. Not Paris.", "It is Paris.\n" + A + "Rome"]),
    "words with a stop": ("", "St. Louis", [A + "**St. Louis**. It has an arch.", A + "St. Louis, since"],
                          [A + "St", A + "Louis", A + "St. Paul", A + "St. Louis Park"]),
    "initials": ("", "U.S. Steel", [A + "the U.S. Steel, which is old."], [A + "U.S.", A + "K.S. Steel"]),
    "sentences": ("", "red. Then blue", [A + "red. Then blue."], [A + "red", A + "red. Then green"]),
    "code": ("", "get_it(x)", [A + "`get_it(x)`."], [A + "`get_it(y)`", A + "`getit`"]),
    "letters in order": ("", "a, b, c", [A + "**a, b, c**."], [A + "c, b, a", A + "a, b", A + "a, b, c, d"]),
    "numbers in order": ("", "1, 2, 3", [A + "1,2,3", A + "1, 2 and 3"], [A + "3, 2, 1", A + "1", A + "1, 2"]),
    "a unit": ("", "15 minutes", [A + "**15 minutes**, since"], [A + "15 hours", A + "51 minutes"]),
    "an option": ("ecqa", "Paris", [
        A + "(B) Paris.", A + "**Paris**", A + "Paris. It lies on the Seine.", "Answer: Paris",
        "\\boxed{\\text{Paris}}", A + "`Paris`, since Rome is older."],
        [A + "Rome", "Paris", A + "not Paris", A + "Paris or Rome"]),
    "an option with a stop": ("qasc", "St. Louis", [A + "**St. Louis**. It has an arch."], [A + "St"]),
    "an option in an option": ("openbookqa", "York", [A + "*York*"], [A + "New York", A + "**New York**"]),
    "root": ("math", "2\\sqrt{3}", [
        A + "$2√3$", A + "2√(3)", A + "2*sqrt(3)", A + "2·√3", A + "2√3 cm.", A + "**2√3**, or about 3.46.",
        A + "$2\\sqrt3$ cm. This follows from 3 facts.", "The length of $AB$ is 2√3. So the answer is 2√3.",
        "Final Answer: The length of $AB$ is $2\\sqrt{3}$.", A + "$d = 2√3$.", A + "2√3 ≈ 3.46"],
        [A + "3√2", A + "√3", A + "2√13", A + "2", A + "2√3x", A + "23"]),
    "root of a half": ("math", "\\frac{\\sqrt{2}}{2}", [A + "√2/2", A + "(√2)/2", A + "$\\dfrac{\\sqrt2}{2}$."],
                       [A + "√(2/2)", A + "√2", A + "2/√2"]),
    "pi": ("math", "3\\pi", [A + "3π.", A + "$3 π$", A + "3pi", "Answer: 3π square units", A + "3π cm²."],
           [A + "3", A + "π", A + "2π", A + "3π/2"]),
    "half of pi": ("math", "-\\frac{\\pi}{2}", [A + "−π/2.", A + "**-π/2**"], [A + "-2/π", A + "π/2"]),
    "a list": ("math", "2,-3", [
        A + "2 and -3.", A + "-3, 2", A + "x = 2, x = -3", A + "x=2 or x=-3", A + "$2$ and $-3$.",
        A + "$x=2$, $x=-3$", "\\boxed{2 \\text{ and } -3}", A + "x = 2 and x = −3", A + "{2, -3}",
        "Final Answer: The solutions are 2 and -3."],
        [A + "2", A + "-3", A + "2 and 3", A + "-2 and 3", A + "x = 2", A + "2-3", A + "(2,-3)",
         A + "2, -3, 4", A + "x = 2, y = -3"]),
    "named values": ("math", "x=1, y=2", [A + "$y=2$, $x=1$"], [A + "x=2, y=1", A + "1", A + "x=1"]),
    "x =": ("math", "5", [A + "$x = 5$.", A + "f(x) = 5"],
            [A + "x = -5", A + "x ≥ 5", A + "x < 5", A + "x^5", A + "5i", A + "x = 4, y = 5", A + "(5, 6)"]),
    "powers": ("math", "x^4 + 10^5", [A + "x⁴ + 10⁵.", A + "$x^{4}+10^{5}$"], [A + "x⁴ + 10⁴", A + "x4 + 105"]),
    "a range": ("math", "x \\le 5", [A + "x ≤ 5", A + "x <= 5"], [A + "x ≥ 5", A + "x < 5", A + "5"]),
    "intervals": ("math", "(-\\infty, 0] \\cup (3, 4)", [A + "(-∞, 0] ∪ (3, 4)"], [A + "(-∞, 0]"]),
    "a product": ("math", "2 \\times 3^4", [A + "2 × 3^4", A + "2·3⁴"], [A + "2 × 4^3", A + "2 + 3^4"]),
    "plus or minus": ("math", "1 \\pm \\sqrt{19}", [A + "1 ± √19"], [A + "1 + √19", A + "1 ± √91"]),
    "a formula before it": ("math", "34", [
        "Answer: The area of $ABC$ is 34 square units.", A + "34 for $n = 2$.", "Answer: $n$ equals 34",
        "Final Answer: For $n=3$, the sum is 34.", "Answer: 34 is the largest $n$.",
        "Final Answer: The largest $n$ such that $n^2 < 1200$ is $34$.", A + "$n = 34$, where $n$ is even."],
        ["Answer: The area of 34 squares is 43.", "Final Answer: For $n=34$, the sum is 3.", A + "$34n$",
         A + "33 < 34", A + "4.3. It is not 34."]),
    "an expression": ("math", "x+1", [
        A + "$x + 1$ for all of 12", A + "$f(x) = x+1$.", A + "x+1, since 1 is added.",
        "Answer: $x+1$ is the polynomial."], [A + "1", A + "x-1", A + "x+1 or x-1"]),
    "a choice": ("math", "\\text{(C)}", ["\\boxed{C}", A + "(C) 12"], [A + "(B)", A + "C or D"]),
    "a box": ("math", "\\frac{3}{4}", ["$\\boxed\\frac{3}{4}$", "$\\boxed\\frac34$.", "\\boxed{3/4}, not 5"],
              ["\\boxed\\frac{4}{3}", "\\boxed3", "\\boxed{5}, not 3/4"]),
    "GSM8K": ("gsm8k", "72", [
        "48 + 24 = <<48+24=72>>72.\n#### 72", A + "**72** clips.", "**Answer:** She sold 72 clips.",
        A + "48 + 24 = 72. This is right.", A + "72 m."], ["#### 27", A + "**27**", A + "48 + 24", A + "71 < 72"]),
    "mixed": ("mawps", "11.5", [A + "11 1/2.", A + "11.5. Check: 5 + 6.5 = 11.5."], [A + "11", A + "11.2"])}


CASES = {f"{name}-{i}": (question, f"data/{name}_test.jsonl", *row)
         for name in RULES for i, (question, *row) in enumerate(ROWS[name])}
CASES |= {name: (CITIES if task in QA[:3] else "How much?", task, *row)
          for name, (task, *row) in FORMS.items()}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_right_however_they_are_written(name):
    question, source, gold, right, wrong = CASES[name]
    task = Task(0, question, None, gold, source=source)
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


def test_a_number_in_an_unknown_file_is_an_answer_but_no_gold_answer(tmp_path):
    plain = Task(0, "q", None, "5")
    assert all(is_correct(text, plain) for text in (A + "5.", "\\boxed{5}", "5"))
    for name, gold in (("rows", None), ("gsm8k_own", "5")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text('{"input": "q", "output": "It is 5"}\n{"input": "q", "output": "The answer is 5"}\n')
        silent, said = read_tasks([path])
        assert gold_answer(silent) == gold and gold_answer(said) == "5"
        assert is_correct("It is 5", said)  # what labels samples in training, too


def test_where_the_answer_stands():
    assert concluded(r"\boxed{\frac{1}{\sqrt{2}}} so the answer is 3, not 4") == r"\frac{1}{\sqrt{2}}"
    assert concluded(r"\boxed{7} and the answer is 3: \boxed{5") == "7"  # a box that never closes is none
    assert concluded("The answer is 3\n#### 4") == "3" and concluded("is 3\n#### 4") == "4"
    assert concluded("It is 3") is None and final("It is 3") == "3"
    assert final("first 3, then -4.5 of 1,200") == "1,200" and final("none") is None
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
