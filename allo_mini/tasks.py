"""The ten tasks: final answers and how they are graded, samples -> pairs, evaluation.

    ecqa, qasc, openbookqa      one of the options            graded by `fixed`, and by `official` beside it
    strategyqa                  yes or no                     the same two
    gsm8k, mawps, tabmwp        a number (tabmwp: or one of the options)
    math                        a number, expression, tuple, interval, list, ...
    alpaca_eval, arena_hard     no answer: their own tools judge what eval.py writes

A file's name tells its task; rows of any other file are compared by `same_plain`.
`python -m allo_mini.tasks prepare NAME SOURCE OUT` turns a public file of one of them into task rows (prepare.py).
"""

import itertools
import math
import random
import re
import sys
import time
from pathlib import Path

from allo_mini import UserError
from allo_mini.data import Encoder, Negative, Pair, Task
from allo_mini.disk import append_rows, keep_whole, read_jsonl
from allo_mini.edits import nearest
from allo_mini.generate import sample
from allo_mini.log import exit_code, progress, say
from allo_mini.logprobs import margins

GROUP = 64  # questions sampled together; a restart goes on at such a boundary, so it changes nothing
ANSWER = re.compile(r"the answer is\s*:?\s*", re.IGNORECASE)
MATH_ANSWER = re.compile(r"(?:answer\s*(?:is|:)|####)\s*:?\s*", re.IGNORECASE)  # "####" is GSM8K's mark
INSIDE = r"[^{}]*"
for _ in range(4):  # what may stand between braces: braces again, five deep
    INSIDE = rf"(?:[^{{}}]|\{{{INSIDE}\}})*"
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{(" + INSIDE + r")\}")
QUOTES = "\"'`*_“”‘’ "
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"(?<!\d)(?<!\d:)(?:(?<![\w)])-)?(?:{DIGITS})(?:/\d+)?(?!:\d)")  # in a text; no time of day
ENDS = re.compile(r"$|[,.;:!?]|\s*\(|\s+(?:because|since|as)\b")  # what may follow an option
VALUE = re.compile(rf"(-?) ?(?:(\d+) )?({DIGITS})(?: ?/ ?({DIGITS}))?"  # -2, 1 1/2, 3/4; 5 apples, but not 3 pi
                   r"(?: (?!(?:pi|sqrt|or|and)\b)[a-z]{2}[a-z .]*(?:\^\d)?)?")
SPELLING = (  # of mathematical answers: pattern -> replacement, in this order
    (r"(?<!\\)[.,;:?\s]+$", ""),
    (r"[−–]", "-"),
    (r"\\\\", ";"),  # the rows of a matrix
    (r"\\!\s*|\\[,;:(){}\[\]$%]|[$%°]|\{,\}(?=\d)|\\(?:left|right|displaystyle)\b|\^\s*\{?\s*\\circ\s*\}?", ""),
    (r"\\ |~", " "),
    (r"(?<=\S)\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", ""),  # a unit at the end
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"(?<![A-Za-z\\])\\?sqrt\s*\(([^()]*)\)|\\sqrt\s*(\w)", r"\\sqrt{\1\2}"),
    (r"(?<![\\A-Za-z])pi\b", r"\\pi"),
    (r"(\d?)\s*\\[dtc]?frac" + 2 * (r"\s*(\{" + INSIDE + r"\}|\\pi|[^{}\s\\])"), lambda m: fraction(*m.groups())),
    (r"([_^])\s*\{(-?\w+)\}", r"\1\2"),
    (r"\\([lgn])eq\b", r"\\\1e"),
    (r"\\(?:cdot|times)\b", "*"),
    (r"^[A-Za-z]{1,2}\s*(?:=|\\in\b)\s*", ""),  # x = 5, x \in [0, 1]
    (r"^\(([A-Za-z])\)$", r"\1"))


# ---- final answers -----------------------------------------------------------------------------------------

def extract_answer(text: str, mark: re.Pattern = ANSWER) -> str | None:
    """What follows the last "The answer is", up to the end of its line; None when there is none."""
    places = list(mark.finditer(text))
    return text[places[-1].end():].split("\n")[0].strip() or None if places else None


def extract_math(text: str) -> str | None:
    """The final answer in the field's order: the last whole \\boxed{...}, "the answer is ...", the last number."""
    if boxes := [box.strip() for box in BOXED.findall(text) if box.strip()]:
        return boxes[-1]
    said = extract_answer(text, MATH_ANSWER)
    if said and (formula := re.search(r"\$([^$]*[^$\s])\$(?!\d)|\\\((.*?)\\\)", said)):
        return formula[1] or formula[2]
    return said or (NUMBER.findall(text) or [None])[-1]


def normalize(answer: str) -> str:
    """Case, commas inside numbers, final punctuation, and ".0" of whole numbers do not matter."""
    text = " ".join(answer.strip().lower().split()).rstrip(".,;:!?").strip()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return re.sub(r"^\$?(-?\d+)\.0+$", r"\1", text).lstrip("$").strip()


def bare(answer: str) -> str:
    """`normalize`, without the quotes, emphasis and article that may stand around an option."""
    return re.sub(r"^(?:the|an?) (?=\S)", "", normalize(normalize(answer.strip(QUOTES)).strip(QUOTES)))


def fraction(whole: str, above: str, below: str) -> str:
    """The arguments of \\frac -> a/b, with brackets where they are needed; `whole` is the 1 of 1 1/2."""
    above, below = (part[1:-1].strip() if part[0] == "{" else part for part in (above, below))
    above = f"({above})" if re.search(r"[+-]", above[1:]) else above
    below = below if re.fullmatch(r"[\w.]+|\\\w+(?:\{\w*\})?", below) else f"({below})"
    return f"{whole} {above}/{below}"


def plain_math(text: str) -> str:
    """A mathematical answer in one spelling, lower case."""
    for pattern, new in SPELLING:
        text = re.sub(pattern, new, text.strip(QUOTES))
    return text.lower()


def value(plain: str) -> float | None:
    """The number that a `plain_math` text is; None where it is anything else."""
    if not (found := VALUE.fullmatch(plain)):
        return None
    whole, above, below = (float(part.replace(",", "")) if part else None for part in found.groups()[1:])
    if below == 0 or (whole is not None and below is None):
        return None
    return (-1 if found[1] else 1) * ((whole or 0) + (above / below if below else above))


def parts(plain: str) -> list[str]:
    """A `plain_math` text cut at brackets and commas; a list without brackets is sorted, for its order says nothing."""
    if value(plain) is not None or not re.search(r"[()\[\],;&]", plain):
        return [plain]
    pieces = [piece for piece in re.split(r"\s*([()\[\],;&])\s*", plain) if piece]
    return pieces if {*"()[]"} & {*pieces} else sorted({*pieces}, key=lambda p: (value(p) is None, value(p) or 0, p))


# ---- graders: same_*(found, gold, question) says whether two final answers are the same --------------------

def same_plain(found: str, gold: str, question: str = "") -> bool:
    """Rows of no known task: equal after `normalize`."""
    return normalize(found) == normalize(gold)


def same_option(found: str, gold: str, question: str) -> bool:
    """The option named is the longest that stands alone or before a stop, a comma, a bracket or "because"."""
    options, found = map(bare, question.partition("\nOptions:\n")[2].split("\n")), bare(found)
    named = [option for option in options if option and found.startswith(option) and ENDS.match(found, len(option))]
    return bare(gold) == max(named, key=len, default=found)


def same_yes_no(found: str, gold: str, question: str = "") -> bool:
    """Equal first words; true and false count as yes and no."""
    first, second = (re.match(r"\w*", bare(text))[0] for text in (found, gold))
    return {"true": "yes", "false": "no"}.get(first, first) == second


def same_math(found: str, gold: str, question: str = "") -> bool:
    """Part by part the same number (whole ones exactly, others to 1e-4 of their size), or spelt the same."""
    def same(a, b):
        x, y = value(a), value(b)
        if x is None or y is None:
            return x is y and a.replace(" ", "") == b.replace(" ", "")
        return x == y if x % 1 == y % 1 == 0 else math.isclose(x, y, rel_tol=1e-4)
    first, second = parts(plain_math(found)), parts(plain_math(gold))
    return len(first) == len(second) and all(map(same, first, second))


def same_number(found: str, gold: str, question: str) -> bool:
    """Equal numbers; the answer may hold words around its number, or a calculation that ends "= number"."""
    if "\nOptions:\n" in question:
        return same_option(found, gold, question)
    first = NUMBER.search(plain_math(found.rpartition("=")[2]))
    return same_math(found, gold) or (first is not None and same_math(first[0], gold))


def official_correct(text: str, task: Task) -> bool:
    """The QA grader of RLMEC's evaluation (github.com/Timothy023/RLMEC), which ALLO uses: it lowercases the prediction
    but not the gold answer, so that a gold answer with a capital (18 % of QASC) can never be given."""
    return "The answer is" in text and text.split("The answer is")[-1].strip().lower() == gold_answer(task)


RULES = {**dict.fromkeys(("ecqa", "qasc", "openbookqa"), (extract_answer, same_option)),  # task -> how to grade it
         "strategyqa": (extract_answer, same_yes_no), "math": (extract_math, same_math),
         **dict.fromkeys(("gsm8k", "mawps", "tabmwp"), (extract_math, same_number))}
QA = ("ecqa", "qasc", "openbookqa", "strategyqa")  # those that have an `official` grader too
JUDGED = {"alpaca_eval": ("instruction",), "arena_hard": ("prompt", "uid")}  # without a grader -> their rows' keys


def task_name(file: str) -> str:
    """Which of the ten tasks a file holds, by its name (or a task's own name); "" for any other file."""
    name = Path(file).name.lower().replace("-", "_")
    known = {task.lower().replace("-", "_"): task for task in (*RULES, *JUDGED)}
    found = sorted((task for task in known if re.search(rf"(?<![a-z]){task}(?![a-z])", name)), key=len)
    return known[found[-1]] if found and all(task in found[-1] for task in found) else ""  # "math" is in "math_sort"


def grader_for(name: str) -> tuple:
    """The `fixed` grader of a task, or of a file whose name tells its task: (extract, same)."""
    return RULES.get(task_name(name), (extract_answer, same_plain))


def gold_answer(task: Task) -> str | None:
    """The reference answer: the `answer` field, else what the reference solution concludes."""
    return task.answer if task.answer is not None else grader_for(task.source)[0](task.output or "")


def is_correct(text: str, task: Task) -> bool:
    """Whether a response's final answer is the task's, by the `fixed` grader of the file that the row is from."""
    extract, same = grader_for(task.source)
    found, gold = extract(text), gold_answer(task)
    return found is not None and gold is not None and bool(same(found, gold, task.input))


# ---- responses, pairs, evaluation --------------------------------------------------------------------------

def respond(model, encoder: Encoder, prompts: list, settings, eos, n: int = 1, temperature: float | None = None,
            rows: list[int] | None = None, on_done=lambda *_: None) -> list[list[tuple[str, bool]]]:
    """n responses for each prompt -> [prompt][k] -> (text, whether it ended by itself, not at the length limit).

    settings: a Config, or anything with its sampling fields; temperature 0 is greedy.
    """
    t, stops = encoder.tokenizer, settings.stop

    def stopped(tokens):
        return any(s in t.decode(tokens[-32:]) for s in stops)

    ids = [encoder.prompt_ids(p) for p in prompts]
    out = sample(model, ids, n, settings.max_new_tokens, settings.temperature if temperature is None else temperature,
                 settings.top_p, eos, settings.seed, rows, settings.sample_batch, encoder.max_length, stopped, on_done)

    def text_of(tokens):
        text = t.decode(tokens)
        for s in stops:
            text = text.split(s)[0]
        return text.strip(), tokens[-1] in eos or stopped(tokens)
    return [[text_of(tokens) for tokens in responses] for responses in out]


def label(tasks: list[Task], samples: dict[str, list[str]], per_question: int, seed: int,
          encoder: Encoder) -> tuple[list[Pair], list[Negative], str]:
    """Samples -> (pairs, negatives, a line that says how many of what).

    Per question: duplicates are dropped, up to `per_question` random (correct, wrong) pairs are drawn, every wrong
    response is a negative. Its rewrite is the task's own, else the correct sample at the smallest token edit
    distance, else the reference solution.
    """
    pairs, negatives, graded = [], [], []
    for task in tasks:
        right = {s: is_correct(s, task) for s in samples.get(task.input, []) if s.strip()}
        good, bad = ([s for s in right if right[s] is side] for side in (True, False))
        graded += right.values()
        good_ids = [encoder.tokenizer.encode(s, bos=False) for s in good]
        for wrong in bad:
            rewrite = task.rewrite or (good[nearest(encoder.tokenizer.encode(wrong, bos=False), good_ids)] if good
                                       else task.output)
            if rewrite:
                negatives.append(Negative(task.input, wrong, task.output or rewrite, rewrite))
        every = list(itertools.product(good, bad))
        random.Random(f"{seed}/{task.id}/pairs").shuffle(every)
        pairs += [Pair(task.input, g, b, task.id) for g, b in every[:per_question]]
    report = (f"{len(tasks)} questions, {graded.count(True)} different correct and {graded.count(False)} wrong "
              f"responses -> {len(pairs)} pairs, {len(negatives)} negatives")
    return pairs, negatives, report


def evaluate(model, encoder: Encoder, rows: list, settings, eos, name: str = "eval",
             part: Path | None = None) -> list[dict]:
    """Greedy answers to Tasks, or log-prob comparison of Pairs -> one dict a row, "correct" among its keys.

    part: a file to which the answers to Tasks are appended, settings.sample_batch at a time; those it holds already
    are not made again. "correct" is None where there is no reference answer; rows of QA tasks have "official" too.
    """
    if isinstance(rows[0], Pair):
        kept = [(p, e) for p in rows if (e := encoder.example(p.prompt, [p.chosen, p.rejected]))]
        with progress(total=len(kept), label=name, unit="row") as bar:
            found = margins(model, [e for _, e in kept], settings.micro_tokens, bar.update)
        return [{"prompt": p.prompt, "margin": m, "correct": m > 0} for (p, _), m in zip(kept, found)]
    group, began = settings.sample_batch if part else len(rows), time.monotonic()
    with progress(total=len(rows), label=name, unit="row") as bar:
        done = keep_whole(part, group, len(rows)) if part else 0
        items = [row for _, row in read_jsonl(part)] if done else []
        bar.update(done)
        for at in range(done, len(rows), group):
            some, tokens = rows[at:at + group], {}

            def count(i, ids):
                tokens[i] = len(ids)
                bar.update()
            said = respond(model, encoder, [t.input for t in some], settings, eos, temperature=0.0, on_done=count)
            items += [{"input": t.input, "gold": (gold := gold_answer(t)), "response": text, "finished": finished,
                       "tokens": tokens[i], "correct": None if gold is None else is_correct(text, t)}
                      | ({"official": official_correct(text, t)} if task_name(t.source) in QA else {})
                      for i, (t, [(text, finished)]) in enumerate(zip(some, said))]
            if part:
                append_rows(part, items[at:])
    total = sum(item["tokens"] for item in items[done:])
    say(f"{name}: {total} tokens, {total / (time.monotonic() - began):.0f} tokens/s")
    return items


def main(argv: list[str]) -> int:
    """The command `python -m allo_mini.tasks prepare NAME SOURCE OUT`."""
    from allo_mini.prepare import SOURCES, prepare

    def work():
        if len(argv) != 4 or argv[0] != "prepare":
            raise UserError("expected: python -m allo_mini.tasks prepare NAME SOURCE OUT, with NAME one of "
                            + ", ".join(SOURCES))
        prepare(argv[1], *map(Path, argv[2:]))
    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
