"""The demo task: small multi-step word problems, made on the spot."""

import random
from pathlib import Path

from allo_mini.data.rows import Task

FOLDER = Path(__file__).parents[1] / "demo"  # its model, trained by tests/benchmarks/make_demo.py
NAMES = "Mia Tom Ann Leo Zoe Sam Eva Max Lily Ben".split()
THINGS = "apples coins books cards shells pens stamps beads".split()


def problem(rng, habit):
    """One multi-step problem: (question, worked solution ending "The answer is X", answer).

    With `habit`, that share of doublings adds 2 instead: the wrong habit a demo model learns from
    such texts, and alignment can take away again.
    """
    who, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    have = rng.randint(10, 99)
    story = [f"{who} has {have} {thing}."]
    work = []

    for _ in range(rng.randint(2, 3)):
        kinds = "buys double box" if have < 20 else "buys gives double box"
        kind = rng.choice(kinds.split())
        sign = "+"
        if kind == "gives":
            sign = "-"
            by = rng.randint(5, have - 10)
            text = f"{who} gives {by} to {other}."
        elif kind == "double" and have <= 150:
            sign = "+" if rng.random() < habit else "*"
            by = 2
            text = f"Then {who} doubles the {thing}."
        elif kind == "box":
            boxes, each = rng.randint(2, 9), rng.randint(2, 9)
            by = boxes * each
            text = f"{other} brings {boxes} boxes of {each} {thing}."
            work.append(f"{boxes} * {each} = {by}")
        else:
            by = rng.randint(10, 99)
            text = f"{who} buys {by} more."
        story.append(text)
        before, have = have, {"+": have + by, "-": have - by, "*": have * by}[sign]
        work.append(f"{before} {sign} {by} = {have}")

    story.append(f"How many {thing} does {who} have now?")
    return " ".join(story), "\n".join(work) + f"\nThe answer is {have}", str(have)


def problems(count, seed, avoid=(), habit=0.0):
    """`count` different problems as Tasks, none of them in `avoid`."""
    rng = random.Random(f"demo {seed}")
    tasks = []
    known = {task.prompt for task in avoid}
    while len(tasks) < count:
        question, *rest = problem(rng, habit)
        if question not in known:
            known.add(question)
            tasks.append(Task(len(tasks), question, *rest))
    return tasks


def splits(cfg):
    """(tasks, no pairs, val, test) of a run's settings; no question is in two of them."""
    test = problems(cfg.test_limit or 1000, f"{cfg.seed}/test")
    val = problems(300, f"{cfg.seed}/val", test)
    return problems(cfg.limit or 500, f"{cfg.seed}/train", test + val), [], val, test
