"""The graders of the eight tasks with answers: twelve hand-made rows a task, the data sets' own.

`ALLO_DATA=data python -m pytest -s tests/test_graders.py -k gold` prints the share accepted.
"""

import os
import random
from pathlib import Path

import pytest

from allo_mini.data.rows import Task, read_tasks
from allo_mini.evaluation.graders import (QA, RULES, bare, concluded, final, gold_answer,
                                          is_correct, official_correct, same_math, task_name)
from allo_mini.run.inputs import read_questions

A = "The answer is "
ROWS = {  # twelve a task: options (where it has them), gold answer, right and wrong responses
    "ecqa": [
        ("fridge|oven|shelf|garage|river", "fridge",
         '~fridge|~the fridge.|~Fridge|It is cold there.\n~"fridge"', "~oven|fridge|~fridges"),
        ("climb|eat|sing|burn|sell", "climb",
         "~climb, since it has steps|~**climb**|~climb because it is tall", "~climbing|~sell"),
        ("teacher|head teacher|pupil|cook|judge", "teacher", "~teacher|~a teacher|~the teacher!",
         "~head teacher|~teacher or pupil"),
        ("teacher|head teacher|pupil|cook|judge", "head teacher",
         "~head teacher|~the head teacher (not a pupil)", "~teacher|~head"),
        ("rain|rain, snow and hail|sand|ash|leaves", "rain", "~rain|~rain, I think",
         "~rain, snow and hail|~ash"),
        ("rain|rain, snow and hail|sand|ash|leaves", "rain, snow and hail",
         "~rain, snow and hail|~Rain, snow and hail.", "~rain|~rain, snow"),
        ("long walk|short nap|vet|rain|cat", "long walk", "~long walk|~a long walk|~long  walk",
         "~walk|~short nap"),
        ("coast|hill|new york|desert|attic", "coast",
         "~coast|the answer is: Coast|the answer to this question is coast",
         "~new york|Coast it is."),
        ("coast|hill|new york|desert|attic", "new york", "~new york|~New York.", "~new|~york"),
        ("shoe|hat|ring|scarf|glove", "shoe", "No: ~hat\n~shoe|~shoe\nThat was easy.",
         "~shoe\n~hat|~"),
        ("no|no thanks|yes|maybe|hello", "no thanks", "~no thanks|~'no thanks'", "~no|~no, thanks"),
        ("balloon|brick|desk|plate|rug", "balloon", "~an balloon|~balloon: it holds air",
         "~not balloon|~the brick")],
    "qasc": [
        ("sugar|sand|glass|tin|rust|salt|steam|coal", "Sugar", "~sugar|~Sugar.|~SUGAR",
         "~salt|~sugars"),
        ("heat|the cold.|dust|a net|ice|noise|paint|wool", "Heat", "~heat|~Heat, as in a kettle",
         "~the cold.|~he"),
        ("heat|the cold.|dust|a net|ice|noise|paint|wool", "The cold.",
         "~the cold|~the cold.|~cold", "~heat|~ice"),
        ("heat|the cold.|dust|a net|ice|noise|paint|wool", "a net", "~a net|~net", "~nets|~wool"),
        ("by baking dough|by freezing|by magnets|by wind|by rust|by light|by sound|by dye",
         "By baking dough", "~by baking dough", "~baking|~by wind"),
        ("water|h2 o|iron|gold|lead|zinc|argon|neon", "Water", "~water", "~h2 o|~gold"),
        ("pollen and nectar|pollen|bark|stones|oil|soot|chalk|silk", "pollen and nectar",
         "~pollen and nectar|~Pollen and nectar;", "~pollen|~nectar and pollen"),
        ("Pacific|farms|roofs|caves|nests|jars|sky|trees", "Pacific", "~pacific|~the Pacific",
         "~sky|~Pacific farms"),
        ("water|light|sound|paper|metal|glass|wind|time", "Water", "~“water”|~water (from soil)",
         "~water light|~wind"),
        ("air|vacuum|void|nothing|hope|math|names|dreams", "air", "~air|~the air", "~hair|~void"),
        ("iron|gold|glass|wood|paper|wax|silk|bone", "Iron", "~Iron|~iron\n\nDone", "~iron gold|"),
        ("6|8|4|2|10|0|3|5", "6", "~6|~6.0|~6.", "~8|~60")],
    "openbookqa": [
        ("a nail|a cup|a leaf|soap", "a nail", "~a nail|~nail|~A Nail.", "~a leaf|~nails"),
        ("east|west|north|south", "East", "~east|~the East", "~west|~northeast"),
        ("july|january|may be none|february", "July", "~july|~July!", "~january|~june"),
        ("solid water|a gas|a metal|alive", "solid water", "~solid water|~solid water: frozen",
         "~water|~solid"),
        ("at night|at noon|in rain|never", "at night", "~at night|~at night, mostly",
         "~night|~at noon"),
        ("fuel|sails|hay|ink", "Fuel", "~fuel|~Fuel because they burn it", "~fuels|~ink"),
        ("hanoi|athens|oslo|rome", "Hanoi", "~hanoi|~Hanoi", "~athens|Hanoi"),
        ("heat|cold|light years|salt", "heat", "~heat|THE ANSWER IS HEAT", "~cold|~heat\n~salt"),
        ("a seed|a stone|a coin|a shoe", "a seed", "~a seed|~the seed", "~seedling|~a stone"),
        ("gills|lungs|fins|tails", "gills", "~gills|~`gills`", "~gill|~fins"),
        ("12 months|10 weeks|5 days|2 hours", "12 months", "~12 months|~12 months.",
         "~12|~10 weeks"),
        ("1,000 grams|100 grams|10 grams|1 gram", "1,000 grams", "~1,000 grams|~1000 grams",
         "~100 grams|~1")],
    "strategyqa": [
        ("yes", "~yes|~Yes.|~YES!", "~no|yes"),
        ("no", "~no|~No, it is not", "~yes|~not sure"),
        ("yes", "~true|~yes because it can", "~false|~yesterday"),
        ("no", "~false|~**No**", "~none|~nothing"),
        ("yes", "I doubt it.\n~yes", "~probably|"),
        ("no", "~no\nThe end", "~no\n~yes"),
        ("yes", "the answer is: yes|the answer: yes", "the answers: yes and no"),
        ("no", "~'no'", "~unknown"),
        ("yes", "So the answer is yes (see above)", "So it is yes"),
        ("no", "~no;", "~"),
        ("yes", "~yes - easily", "~no - never"),
        ("no", "~yes? No.\n~no", "~y")],
    "gsm8k": [
        ("18", r"~18|~$18.|~18 dollars|#### 18|so \boxed{18}", "~180|~81|18 and then 19"),
        ("2125", "~2,125|~$2125.00|She has 2,125 blocks.", "~2,125,000|~212"),
        ("5", "~2 + 3 = 5|~5 (since 2+3=5)|We get 2 and 3, in all 5", "~2 + 3 = 6|5 or 6"),
        ("70000", "~70,000|~$70,000.|~70000.0", "~70|~70,001"),
        ("3", r"~3 hours and some|~about 3|\boxed{3\text{ hours}}", "~13|~three"),
        ("-4", r"~-4|~−4|\boxed{-4}", "~4|~10-4"),
        ("25", r"~25%|~25 percent|so $\boxed{25\%}$", "~0.25|~2.5"),
        ("12", "Final answer: 12|Answer: 12 eggs|the correct answer is $12$",
         "Answer: 11 of 12|~1 2"),
        ("109200000", "~109,200,000 people", "~109,200|~109.2"),
        ("8", r"\boxed{7} no, \boxed{8}|~9 but \boxed{8}", r"\boxed{8} no, \boxed{7}|"
         r"\boxed{7}. ~8"),
        ("1", "~1|~1.0|~**1**", "~1:20|~21|~1/2"),
        ("540", "~540 meters per week.|It is $540$\n~$540$.", "~54|~5400|nothing")],
    "math": [
        (r"\frac{14}{3}", r"$\boxed{\dfrac{14}{3}}$|~$\frac{14}3$.|~14/3|\boxed{4\frac{2}{3}}",
         r"~14|~4.6|\boxed{\frac{3}{14}}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}|\boxed{\left(3,\frac\pi2\right)}|"
         r"~\( (3,\tfrac{\pi}{2}) \)", r"\boxed{(\pi/2, 3)}|\boxed{[3, \pi/2]}|\boxed{3}"),
        ("(3,4]", r"\boxed{(3, 4]}|\boxed{\left(3,4\right]}|\boxed{x \in (3,4]}",
         r"\boxed{(3,4)}|\boxed{[3,4]}"),
        ("1,-2", r"\boxed{-2, 1}|\boxed{1,-2}|\boxed{\{1,-2\}}",
         r"\boxed{1}|\boxed{1,2}|\boxed{(1,-2)}"),
        (r"3\sqrt{13}", r"\boxed{3\sqrt{13}}|\boxed{3 \sqrt{13}}|~3sqrt(13)",
         r"\boxed{\sqrt{13}}|\boxed{3\sqrt{31}}"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}|\boxed{Evelyn}|~Evelyn.",
         r"\boxed{\text{Eve}}|Evelyn"),
        (r"864 \mbox{ inches}^2", r"\boxed{864}|~$864 \text{ inches}^2$|~864 square inches",
         r"\boxed{846}|\boxed{864x}"),
        (r"90^\circ", r"\boxed{90}|\boxed{90^{\circ}}|~90 degrees", r"\boxed{9}|\boxed{90\pi}"),
        (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
         r"\boxed{\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{pmatrix}}|"
         r"\boxed{\begin{pmatrix}-1/3\\2/3\end{pmatrix}}",
         r"\boxed{\begin{pmatrix} 2/3 \\ -1/3 \end{pmatrix}}|\boxed{-1/3}"),
        ("x^3+3x-6", r"\boxed{x^3 + 3x - 6}|\boxed{x^{3}+3x-6}", r"\boxed{x^3+3x+6}|~6"),
        (r"\$32,\!348", r"\boxed{32348}|\boxed{\$32{,}348}|~$32,348.", r"\boxed{32}|\boxed{348}"),
        ("2516_8", r"\boxed{2516_8}|\boxed{2516_{8}}", r"\boxed{2516}|\boxed{2516_9}|\boxed{}")],
    "mawps": [
        ("43.0", "~43|~43.0|~43 seashells", "~43.5|~34"),
        ("0.6666666667", r"~2/3|~\frac{2}{3}|~0.66667", "~0.6|~3/2"),
        ("11.5", r"~11.5. Check: 5 + 6.5 = 11.5.|~11 1/2.|~$11.50|\boxed{11.5}", "~11|~115|~11.2"),
        ("1.84", "~1.84|~$1.84 in all", "~1.85|~184"),
        ("0.5", "~1/2|~.5|~0.50 of a pie", "~5|~2"),
        ("158.35", "~158.35|Thus 158.35", "~158|~58.35"),
        ("6.0", "~6|~3 * 2 = 6|~6.00", "~3 * 2|~16"),
        ("1000.0", "~1,000|~1000", "~1|~1,001"),
        ("0.3333333333", "~1/3|~0.33333", "~0.3|~1 3"),
        ("52.0", "~52 weeks|25 + 27 = 52", "52 - 27 = 25|~52.2"),
        ("0.875", r"~7/8|~\frac78|~0.875", "~8/7|~0.87"),
        ("9.43", "~9.43 dollars|#### 9.43", "~9.4|~94.3")],
    "tabmwp": [
        ("4,656", "~4,656|~4656|~4656 miles", "~4|~4,665"),
        ("3.30", "~3.30|~$3.3|~3.3", "~33|~3"),
        ("3/10", r"~3/10|~\frac{3}{10}|~0.3", "~3|~10/3"),
        ("-7", "~-7|~-7 degrees", "~7|~17"),
        ("0.08", "~0.08|~.08", "~0.8|~8"),
        ("1,522.81", "~$1,522.81|~1522.81", "~1,522|~1,522.18"),
        ("linear|nonlinear", "linear", "~linear|~Linear.", "~nonlinear|linear"),
        ("shortage|surplus", "shortage", "~a shortage|~shortage, for demand is high", "~surplus"),
        ("1:20 P.M.|1:30 P.M.", "1:20 P.M.", "~1:20 P.M.|~1:20 p.m", "~1:30 P.M.|~1:20"),
        ("Ann|Anna|Mr. Lee", "Anna", "~Anna|~anna", "~Ann|~Anna Lee"),
        ("15 minutes|1 hour and 15 minutes", "15 minutes", "~15 minutes",
         "~1 hour and 15 minutes|~15"),
        ("$155|$275", "$155", "~$155|~155", "~$275|~$1,550")]}
CITIES = "Rome|Paris|St. Louis|New York|York"
FORMS = {  # how chat models write answers: task ("": none of the ten), gold, right and wrong ones
    "emphasis": ("", "42", "**Answer:** 42|**Answer**: 42|~*42*.|~__42__.|~***42***!|"
        "**The answer is: 42**|_Answer:_ 42|### Answer: 42|~`42`, since `6*7` is 42.|"
        "The answer is:\n```\n42\n```|- **Final answer:** **42**|~** 42 **.",
        "**Answer:** 43|~*43*|~`43`.|**42** is near. **Answer:** 41|~2**42"),
    "dollars and quotes": ("", "42", "~\\(42\\).|~\\[42\\]|The answer is\n$$\n42\n$$|~$$42$$.|"
        r"~'42'|~“42”.|~$42|Answer: $\boxed{42}$|\fbox{42}|\boxed 42.|\(\boxed42\)|"
        r"\boxed{\text{42}}|$\text{~} 42$|~(42).", r"~\(43\).|Answer: $\boxed{43}$|\boxed 4 2|"
        r"\boxed{4}2|~(43)|~(4, 2)"),
    "a number in a sentence": ("", "42", "The answer is:\n\n**42**|~therefore 42.|"
        "~approximately 42.|Answer = 42|It is 42|42|It is 7.\n#### 42|~42.\n\nThis took 3 steps.|"
        "~x = 42.|The answer to this question is 42.|~40 + 2 = 42.|~42 (that is, 40 and 2).|"
        "~42 (6 * 7).|~42: 6*7 = 42.|~the total of both: 42|~42 apples", "~-42|~42.5|~not 42.|"
        "~42 or 43|~41 and 42|~42x|~42^2|~4 2|~42/2|~1/42|~42:10|~4,2|#### 43|42 and 43|~42 1/2|"
        "~42 - 1|~42 * 2|"),
    "a reason": ("", "42", "~42, since 40 + 2 = 42.|~42 because 6 * 8 is 48, less 6.|"
        "~42, which is 6 * 7.|~42. 6 * 9 = 54 would be too much.|~42; this follows from 6 * 7.|"
        "~42! 6 * 7 = 42.|~42 - as 40 + 2 is 42.", "~43, since 42 is even.|~4.2. This follows.|"
        "~41 because 42 is too big.|~43. No, 42 is wrong.|~41, not 42"),
    "a check": ("", "42", "~42. Let me verify: 6 * 7 = 42, so the answer is correct.|"
        "~42. That is what the answer is.|~42. Is the answer right? Yes, the answer is 42.|"
        "~42.\nThe answer is|~42. We see that the answer is not 41.|"
        "~42.\n\nCheck: 42 / 7 = 6. ~valid.", "~41. Check: 42 is even, so the answer is correct.|"
        "~42. Wait, the answer is 41.|~41. We see that the answer is not 42."),
    "money": ("", "1234.5", r"~$1,234.50.|~**$1,234.50**.|~$\$1,234.50$",
        "~$1,234.05.|~1.234,50|~$1,234"),
    "negative": ("", "-3", "~−3|~$-3$|~x = -3|So we get -3|~-3 degrees", "~3|~x = 3|10-3"),
    "percent": ("", "25%", r"~25%.|~**25 %**|~25\%|~25", "~0.25|~24%"),
    "many thousands": ("", "1,234,567", "~1234567.|~$1,234,567.00", "~11234567|~1,234"),
    "dollars": ("", "$18.00", "~18|~18.0", "~118|"),
    "decimals": ("", "3.14", "~3.14. This is pi.|~$3.14$, roughly", "~3|~3,14"),
    "fraction": ("", "3/4", r"~$\frac{3}{4}$.|~0.75|~¾|~**3/4** of it.|~3 / 4, so less than 1.|"
        r"Final Answer: The final answer is $\dfrac{3}{4}$. I hope it is correct.",
        "~4/3|~3|~34|~½"),
    "letter": ("", "B", "~[B].|~B)|~**(B)**|~**B)**|~Option (B).|**Answer: (B)**|~$B$|"
        r"\boxed{\text{(B)}}|$\boxed{\textbf{(B)}\ 5}$|~(B) Paris.|~B. Paris|~B: Paris|"
        '~B, because Paris is.|~B since it is|~"B"|~b|~B (Paris)|Answer:\n\nB',
        "~(A)|~not B|~A or B|~B or C|~B, C|~(B) or (C)|~(A) B|~Bern|~BC|B|~Option A, not B|~B/C"),
    "a letter that is an article": ("", "A", "~(A) dog|~A.|~A because it is", "~a dog"),
    "yes": ("strategyqa", "yes", "~**yes**.|~Yes, it is. No ship sank.|**Answer:** Yes|~`yes`|"
        r"\boxed{\text{Yes}}|~yes. So the answer is correct.|~yes it can",
        r"~**no**|Answer: No|~not yes|\boxed{no}|~yes or no"),
    "no": ("", "No", "~no.|~**No**, it is not.|~false", "~yes|~not sure|no"),
    "words": ("", "Paris", r'~"Paris", because it is.|Answer: *Paris*|\boxed{Paris}|'
        "~Paris. It is old.|~Paris (France).|~Paris, the capital of France.|~“Paris”.|"
        r"~Paris, not Rome.|~paris|~indeed Paris|~$\text{Paris}$|~(B) Paris.|"
        "~Paris. Let me check: so the answer is right.", "Paris|~not Paris|~Paris or Rome|"
        "~Paris, Rome|~Parish|~New Paris|~Rome. Not Paris.|It is Paris.\n~Rome"),
    "words with a stop": ("", "St. Louis", "~**St. Louis**. It has an arch.|~St. Louis, since",
        "~St|~Louis|~St. Paul|~St. Louis Park"),
    "initials": ("", "U.S. Steel", "~the U.S. Steel, which is old.", "~U.S.|~K.S. Steel"),
    "sentences": ("", "red. Then blue", "~red. Then blue.", "~red|~red. Then green"),
    "code": ("", "get_it(x)", "~`get_it(x)`.", "~`get_it(y)`|~`getit`"),
    "letters in order": ("", "a, b, c", "~**a, b, c**.", "~c, b, a|~a, b|~a, b, c, d"),
    "numbers in order": ("", "1, 2, 3", "~1,2,3|~1, 2 and 3", "~3, 2, 1|~1|~1, 2"),
    "a unit": ("", "15 minutes", "~**15 minutes**, since", "~15 hours|~51 minutes"),
    "an option": ("ecqa", "Paris", "~(B) Paris.|~**Paris**|~Paris. It lies on the Seine.|"
        r"Answer: Paris|\boxed{\text{Paris}}|~`Paris`, since Rome is older.",
        "~Rome|Paris|~not Paris|~Paris or Rome"),
    "an option with a stop": ("qasc", "St. Louis", "~**St. Louis**. It has an arch.", "~St"),
    "an option in an option": ("openbookqa", "York", "~*York*", "~New York|~**New York**"),
    "root": ("math", r"2\sqrt{3}", "~$2√3$|~2√(3)|~2*sqrt(3)|~2·√3|~2√3 cm.|"
        r"~**2√3**, or about 3.46.|~$2\sqrt3$ cm. This follows from 3 facts.|"
        "The length of $AB$ is 2√3. So the answer is 2√3.|"
        r"Final Answer: The length of $AB$ is $2\sqrt{3}$.|~$d = 2√3$.|~2√3 ≈ 3.46",
        "~3√2|~√3|~2√13|~2|~2√3x|~23"),
    "root of a half": ("math", r"\frac{\sqrt{2}}{2}", r"~√2/2|~(√2)/2|~$\dfrac{\sqrt2}{2}$.",
        "~√(2/2)|~√2|~2/√2"),
    "pi": ("math", r"3\pi", "~3π.|~$3 π$|~3pi|Answer: 3π square units|~3π cm².", "~3|~π|~2π|~3π/2"),
    "half of pi": ("math", r"-\frac{\pi}{2}", "~−π/2.|~**-π/2**", "~-2/π|~π/2"),
    "a list": ("math", "2,-3", "~2 and -3.|~-3, 2|~x = 2, x = -3|~x=2 or x=-3|~$2$ and $-3$.|"
        r"~$x=2$, $x=-3$|\boxed{2 \text{ and } -3}|~x = 2 and x = −3|~{2, -3}|"
        "Final Answer: The solutions are 2 and -3.", "~2|~-3|~2 and 3|~-2 and 3|~x = 2|~2-3|"
        "~(2,-3)|~2, -3, 4|~x = 2, y = -3"),
    "named values": ("math", "x=1, y=2", "~$y=2$, $x=1$", "~x=2, y=1|~1|~x=1"),
    "x =": ("math", "5", "~$x = 5$.|~f(x) = 5", "~x = -5|~x ≥ 5|~x < 5|~x^5|~5i|~x = 4, y = 5|"
        "~(5, 6)"),
    "powers": ("math", "x^4 + 10^5", "~x⁴ + 10⁵.|~$x^{4}+10^{5}$", "~x⁴ + 10⁴|~x4 + 105"),
    "a range": ("math", r"x \le 5", "~x ≤ 5|~x <= 5", "~x ≥ 5|~x < 5|~5"),
    "intervals": ("math", r"(-\infty, 0] \cup (3, 4)", "~(-∞, 0] ∪ (3, 4)", "~(-∞, 0]"),
    "a product": ("math", r"2 \times 3^4", "~2 × 3^4|~2·3⁴", "~2 × 4^3|~2 + 3^4"),
    "plus or minus": ("math", r"1 \pm \sqrt{19}", "~1 ± √19", "~1 + √19|~1 ± √91"),
    "a formula before it": ("math", "34", "Answer: The area of $ABC$ is 34 square units.|"
        "~34 for $n = 2$.|Answer: $n$ equals 34|Final Answer: For $n=3$, the sum is 34.|"
        "Answer: 34 is the largest $n$.|"
        "Final Answer: The largest $n$ such that $n^2 < 1200$ is $34$.|"
        "~$n = 34$, where $n$ is even.", "Answer: The area of 34 squares is 43.|"
        "Final Answer: For $n=34$, the sum is 3.|~$34n$|~33 < 34|~4.3. It is not 34."),
    "an expression": ("math", "x+1", "~$x + 1$ for all of 12|~$f(x) = x+1$.|"
        "~x+1, since 1 is added.|Answer: $x+1$ is the polynomial.", "~1|~x-1|~x+1 or x-1"),
    "a choice": ("math", r"\text{(C)}", r"\boxed{C}|~(C) 12", "~(B)|~C or D"),
    "a box": ("math", r"\frac{3}{4}", r"$\boxed\frac{3}{4}$|$\boxed\frac34$.|\boxed{3/4}, not 5",
        r"\boxed\frac{4}{3}|\boxed3|\boxed{5}, not 3/4"),
    "GSM8K": ("gsm8k", "72", "48 + 24 = <<48+24=72>>72.\n#### 72|~**72** clips.|"
        "**Answer:** She sold 72 clips.|~48 + 24 = 72. This is right.|~72 m.",
        "#### 27|~**27**|~48 + 24|~71 < 72"),
    "a heading": ("gsm8k", "18", "**Answer:**\n\nShe sells 16 - 7 = 9.\n\nShe makes 9 * 2 = $18.|"
        "The answer is as follows:\n1. She has 9 eggs and sells all\n2. 9 * 2 = 18|Answer:\n\n18\n\n"
        "Why: 9 * 2 = 18 for 9 eggs.",
        "**Answer:**\n\nShe has 18 eggs before she eats.\n\nShe eats 9 of them."),
    "a sentence": ("gsm8k", "18", "Answer: In 3 days, she makes $18.|~18 dollars ($2 x 9).|~$18, and "
        "she is happy.|Answer: $18 is her income.|Answer: She sells 9 eggs for $18.|~18 and we are done.|"
        "Answer: Thus, the sum is 18.|Answer: After 3 days, there are 18.|Answer: She needs to pay 18.|"
        "Answer: She divided half of it and got 18.|Answer: So, on Friday, she had 40 - 22 = 18 left.",
        "~18 to 20|~18 out of 20|~18 divided by 3|~18 million|Answer: In 18 days, she makes $3."),
    "a million": ("", "2000000", "~2 million|~2,000,000", "~2|~2 thousand|~2.5 million"),
    "below zero": ("math", r"-\frac{3}{4}", r"~-3/4|~minus 3/4|~negative \frac34|\boxed{- \frac34}",
        r"~\frac{3}{4}|~3/4"),
    "above zero": ("math", r"\frac{3}{4}", "~3/4", r"\boxed{-\frac{3}{4}}|~minus 3/4|~negative 3/4"),
    "a function of it": ("math", "2", "~2",
        r"\boxed{\ln 2}|\boxed{\sin 2}|~half of 2|~twice 2|~2 hours 30 minutes"),
    "no limit": ("math", r"\infty", r"\boxed{+\infty}", r"\boxed{-\infty}"),
    "a binomial": ("math", r"\binom{5}{2}", r"\boxed{\dbinom{5}{2}}", r"\boxed{\dbinom{2}{5}}"),
    "an explanation below": ("strategyqa", "yes", "Answer:\n\nYes, because Rome had 2 kings more than we"
        " think.\n\nSo it is.", "Answer:\n\nNo, because Rome had 2 kings more than we.\n\nYes."),
    "spellings": ("math", r"90^\circ", r"\boxed{90\degree}", r"\boxed{9\degree}"),
    "a matrix": ("math", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"\boxed{\begin{bmatrix} 1 \\ 2 \end{bmatrix}}",
        r"\boxed{\begin{bmatrix} 2 \\ 1 \end{bmatrix}}")}


def case_of(source, gold, right, wrong, options=""):
    """A row of a table, its responses parted by |, in which ~ stands for A."""
    question = "Which?\nOptions:\n" + options.replace("|", "\n") if options else "How much?"
    return question, source, gold, *(text.replace("~", A).split("|") for text in (right, wrong))


CASES = {f"{name}-{i}": case_of(f"data/{name}_test.jsonl", *row[-3:], *row[:-3])
         for name in RULES for i, row in enumerate(ROWS[name])}
CASES |= {name: case_of(*row, CITIES if row[0] in QA[:3] else "") for name, row in FORMS.items()}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_right_however_they_are_written(name):
    question, source, gold, right, wrong = CASES[name]
    task = Task(0, question, None, gold, source=source)
    assert [text for text in right if not is_correct(text, task)] == []
    assert [text for text in wrong if is_correct(text, task)] == []


def test_the_official_grader_cannot_give_a_capital():
    upper, lower = (Task(0, "q", None, gold, source="qasc") for gold in ("Heat", "heat"))
    assert is_correct(A + "Heat", upper) and is_correct(A + "heat", upper)
    assert not official_correct(A + "Heat", upper) and not official_correct(A + "heat", upper)
    assert official_correct(f"So.\n{A}Heat ", lower)
    for text in ("the answer is heat", "heat", A + "heat."):
        assert not official_correct(text, lower)


@pytest.mark.parametrize("task, files", [
    ("ecqa", "ecqa_test.jsonl"), ("math", "data/math500_test.jsonl math_test.jsonl"),
    ("tabmwp", "tabmwp"), ("gsm8k", "x/gsm8k.jsonl GSM8K-train.jsonl"),
    ("alpaca_eval", "alpaca_eval_805.jsonl"), ("arena_hard", "arena-hard-v0.1.jsonl"),
    ("sort-letters", "sort-letters_train.jsonl"), ("Sorting", "sorting.jsonl"),
    ("math_sort", "math-sort_test.jsonl"),
    ("", "mathematics.jsonl gsm8k_math.jsonl rows.jsonl gsm8k/rows.jsonl aftermath.jsonl")])
def test_a_file_name_tells_the_task(task, files, monkeypatch):
    """Also one's own, however it is spelled, and although its name holds one of the ten."""
    for own in ("sort-letters", "Sorting", "math_sort"):
        monkeypatch.setitem(RULES, own, (str, str))
    assert {task_name(file) for file in files.split()} == {task}


def test_a_number_in_an_unknown_file_is_an_answer_but_no_gold_answer(tmp_path):
    plain = Task(0, "q", None, "5")
    assert all(is_correct(text, plain) for text in (A + "5.", "\\boxed{5}", "5"))
    for name, gold in (("rows", None), ("gsm8k_own", "5")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"input": "q", "output": "{text} 5"}}\n'
                                for text in ("It is", "The answer is")))
        silent, said = read_tasks([path])
        assert gold_answer(silent) == gold and gold_answer(said) == "5"
        assert is_correct("It is 5", said)  # what labels samples in training, too


def test_where_the_answer_stands():
    root = r"\frac{1}{\sqrt{2}}"
    assert concluded(rf"\boxed{{{root}}} so the answer is 3, not 4") == root
    assert concluded(r"\boxed{7} and the answer is 3: \boxed{5") == "7"  # one that never closes
    assert concluded("The answer is 3\n#### 4") == "3" and concluded("is 3\n#### 4") == "4"
    assert concluded("It is 3") is None and final("It is 3") == "3"
    assert final("first 3, then -4.5 of 1,200") == "1,200" and final("none") is None
    assert gold_answer(Task(0, "q", r"Thus \boxed{x^{2}}.", None, source="math")) == "x^{2}"
    assert gold_answer(Task(0, "q", A + "1", "2")) == "2"  # the field goes before the solution
    for solution in (A + "4. I hope it is correct.", A + "$4$.\nDone"):
        assert is_correct(A + "4", Task(0, "q", solution, None))
    for answer in ("1 + 3 = 4. " + A + "4. I hope so.", r"\boxed{4}", "Sum.\n#### 4", "4"):
        assert gold_answer(Task(0, "q", None, answer)) == "4"
    assert is_correct(A + "2,125", Task(0, "q", f"So.\n{A}2125", None))
    silent = Task(0, "q", "no conclusion", None)
    assert gold_answer(silent) is None and not is_correct(A + "1", silent)
    for text in ("$2,125.00.", "43.0", " A  b! ", "1,234,567", "-7.0", "x.0"):
        assert bare(bare(text)) == bare(text)


def test_same_math_is_symmetric_and_reflexive():
    answers = [row[-3] for name in ("math", "gsm8k", "mawps", "tabmwp") for row in ROWS[name]]
    for a in answers:
        assert same_math(a, a), a
        for b in answers:
            assert same_math(a, b) == same_math(b, a), (a, b)


@pytest.mark.parametrize("text", [
    "", " ", "\\boxed{", "\\boxed{}" * 50, "{" * 3000, "\\frac" * 500, "\\frac{" * 300, "(" * 3000,
    A + "9" * 5000, A + "1/0", A + "$", "." * 3000, "\\boxed{" * 40 + "5" + "}" * 40,
    A + "a " * 3000, "1," * 2000])
@pytest.mark.parametrize("name", RULES)
def test_no_text_breaks_a_grader(name, text):
    for gold in ("5", "yes", r"(1, \frac{1}{2}]"):
        assert is_correct(text, Task(0, "q", None, gold, source=name)) in (True, False)


@pytest.mark.skipif(not os.environ.get("ALLO_DATA"), reason="ALLO_DATA names no folder")
@pytest.mark.parametrize("name", RULES)
def test_gold_solutions_are_accepted_and_other_answers_refused(name):
    files = sorted(Path(os.environ["ALLO_DATA"]).glob(f"{name}*_t*.jsonl"))
    assert files
    for path in files:
        rows = read_questions([path])
        accepted = sum(is_correct(t.output or A + t.answer, t) for t in rows) / len(rows)
        answers = [t.answer for t in rows]
        random.Random(0).shuffle(answers)
        other = [(t, a) for t, a in zip(rows, answers) if bare(a) != bare(t.answer)]
        fooled = [(t.answer, a) for t, a in other if is_correct(A + a, t)]
        print(f"{path.name}: {100 * accepted:.2f} % of {len(rows)} gold solutions accepted, "
              f"{len(fooled)} of {len(other)} differing answers accepted")
        assert accepted >= 0.995 and not fooled
