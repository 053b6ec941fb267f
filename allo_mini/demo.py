"""The demo task: small multi-step word problems, made on the spot. (Its model: tests/benchmarks/make_demo.py)"""

import random
from pathlib import Path

from allo_mini.config import Config
from allo_mini.data import Task

FOLDER = Path(__file__).parent / "demo"  # trained by this project's own sft stage: tests/benchmarks/README.md
NAMES = "Mia Tom Ann Leo Zoe Sam Eva Max Lily Ben".split()
THINGS = "apples coins books cards shells pens stamps beads".split()


def problem(rng: random.Random, habit: float = 0.0) -> tuple[str, str, str]:
    """One multi-step word problem: (question, worked solution ending "The answer is X", answer).

    With `habit`, that share of doublings adds 2 instead: the wrong habit a demo model learns from such texts, and
    alignment can take away again.
    """
    who, other = rng.sample(NAMES, 2)
    thing, have = rng.choice(THINGS), rng.randint(10, 99)
    story, work = [f"{who} has {have} {thing}."], []

    for _ in range(rng.randint(2, 3)):
        kind = rng.choice(["buys", "gives", "double", "box"] if have >= 20 else ["buys", "double", "box"])
        if kind == "gives":
            sign, by = "-", rng.randint(5, have - 10)
            story.append(f"{who} gives {by} to {other}.")
        elif kind == "double" and have <= 150:
            sign, by = "+" if rng.random() < habit else "*", 2
            story.append(f"Then {who} doubles the {thing}.")
        elif kind == "box":
            boxes, each = rng.randint(2, 9), rng.randint(2, 9)
            sign, by = "+", boxes * each
            story.append(f"{other} brings {boxes} boxes of {each} {thing}.")
            work.append(f"{boxes} * {each} = {by}")
        else:
            sign, by = "+", rng.randint(10, 99)
            story.append(f"{who} buys {by} more.")
        result = {"+": have + by, "-": have - by, "*": have * by}[sign]
        work.append(f"{have} {sign} {by} = {result}")
        have = result
    story.append(f"How many {thing} does {who} have now?")
    return " ".join(story), "\n".join([*work, f"The answer is {have}"]), str(have)


def problems(count: int, seed: int | str, avoid: set[str] = frozenset(), habit: float = 0.0) -> list[Task]:
    """`count` different problems, none of them in `avoid` (questions)."""
    rng, seen, tasks = random.Random(f"demo {seed}"), set(avoid), []
    while len(tasks) < count:
        question, solution, answer = problem(rng, habit)
        if question not in seen:
            seen.add(question)
            tasks.append(Task(len(tasks), question, solution, answer))
    return tasks


def splits(cfg: Config) -> tuple[list[Task], list[Task], list[Task]]:
    """(train, val, test) problems of a demo run; no question is in two of them."""
    made, seen = {}, set()
    for name, n in (("test", cfg.test_limit or 1000), ("val", cfg.val_rows or 300), ("train", cfg.limit or 500)):
        made[name] = problems(n, f"{cfg.seed}/{name}", seen)
        seen |= {t.input for t in made[name]}
    return made["train"], made["val"], made["test"]
