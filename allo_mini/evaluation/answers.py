"""Asking a model: responses, the pairs made of them, greedy answers and how good they are."""

from collections import defaultdict
from itertools import compress, product
from random import Random

import numpy as np

from allo_mini import UserError
from allo_mini.checkpoint import eos_ids
from allo_mini.data.rows import Negative, Pair, Task
from allo_mini.evaluation.graders import (QA, gold_answer, is_correct, official_correct, rule_of,
                                          task_name)
from allo_mini.generate import sample
from allo_mini.logprobs import margins
from allo_mini.run.files import read_jsonl, reading
from allo_mini.run.log import progress, say
from allo_mini.token_weights import nearest

COLUMNS = ("reward accuracy", "reward margin", "accuracy", "raw accuracy", "95 % interval", "rows",
           "official", "raw margin", "cut", "no answer")  # of the result table


def respond(model, encoder, prompts, settings, n=1, temperature=0.0, **more):
    """n responses a prompt, greedy ones by default -> [prompt][k] -> (text, whether it ended by
    itself).

    settings: a Config, or anything with its sampling fields, of which n and temperature are not
    read. more: `rows`, the numbers that seed each prompt, and `on_done` (generate.sample).
    """
    eos = eos_ids(model, encoder)
    decode = encoder.tokenizer.decode

    def stopped(tokens):
        # decoded for every token of every sample: only where there is something to look for
        said = decode(tokens[-32:], skip_special_tokens=False) if settings.stop else ""
        return any(stop in said for stop in settings.stop)

    def texts(prompt, responses):
        before = len(decode(prompt))
        for tokens in responses:
            said = [token for token in tokens if token not in eos]
            text = decode(prompt + said)[before:]  # alone it may lose its first space
            for stop in settings.stop:
                text = text.split(stop)[0]
            text = text if encoder.style == "none" else text.strip()
            yield text, tokens[-1] in eos or stopped(tokens)

    ids = list(map(encoder.prompt_ids, prompts))
    if not all(ids):
        raise UserError(f"--prompt {encoder.style} makes an empty prompt of a question")
    sampled = sample(model, ids, n, settings.max_new_tokens, temperature, settings.top_p, eos,
                     settings.seed, slots=settings.sample_batch, max_length=encoder.max_length,
                     stopped=stopped, **more)
    return list(map(list, map(texts, ids, sampled)))


def read_samples(path):
    """Question -> its samples; says how many were left out. Raises UserError naming the line."""
    samples = defaultdict(list)
    unfinished = 0
    for where, row in read_jsonl(path):
        with reading(where):
            samples[row["input"]] += filter(str.strip, [] + row["samples"])
            unfinished += row.get("unfinished", 0)
    if unfinished:
        say(f"samples: {unfinished} that hit the length limit are left out")
    return samples


def label(tasks, samples, per_question, seed, encoder):
    """Samples -> pairs and negatives; says how many of what.

    Of each question that has an answer: duplicates are dropped, up to `per_question` random
    (right, wrong) pairs are drawn, every wrong response is a negative. Its rewrite is the task's
    own, else the right sample nearest in token edits, else the reference solution.
    """
    pairs, negatives, rights, wrongs = [], [], [], []
    tasks = [task for task in tasks if task.question in samples and gold_answer(task)]
    for task in tasks:
        ids = {text: encoder.tokenizer.encode(text) for text in samples[task.question]}
        right = [text for text in ids if is_correct(text, task)]
        wrong = [text for text in ids if text not in right]
        rights += right
        wrongs += wrong
        for text in wrong:
            rewrite = task.rewrite or task.output
            if right and not task.rewrite:
                rewrite = right[nearest(ids[text], map(ids.get, right))]
            if rewrite:
                negatives.append(Negative(task.prompt, text, task.output or rewrite, rewrite))
        both = list(product(right, wrong))
        Random(f"{seed}/{task.id}/pairs").shuffle(both)
        pairs += [Pair(task.prompt, *sides, task.id) for sides in both[:per_question]]
    say(f"pairs: {len(tasks)} questions, {len(rights)} different correct and {len(wrongs)} wrong "
        f"responses -> {len(pairs)} pairs, {len(negatives)} negatives")
    return pairs, negatives


# ---- evaluation ------------------------------------------------------------------------------

def evaluate(model, encoder, rows, settings, name):
    """Greedy answers to Tasks, or log-prob margins of Pairs -> one dict a row, with "correct".

    "correct" is None where there is no reference answer; rows of QA tasks have "official" too.
    A margin is log pi(chosen) - log pi(rejected); pairs that cannot be encoded are left out.
    """
    update = progress(None, name, total=len(rows)).update
    if isinstance(rows[0], Task):
        answers = respond(model, encoder, [task.prompt for task in rows], settings,
                          on_done=lambda *_: update())
        return [graded(task, *response, encoder.style) for task, [response] in zip(rows, answers)]
    examples = [encoder.example(*pair.sides) for pair in rows]
    found = margins(model, list(filter(None, examples)), settings.micro_tokens, update)
    return [{"prompt": encoder.style, "input": pair.prompt, "gold": pair.chosen,
             "rejected": pair.rejected, "margin": margin, "correct": margin > 0}
            for pair, margin in zip(compress(rows, examples), found)]


def graded(task, text, finished, style):
    """The line of a per-item file; style: how it was asked, as --prompt has it."""
    gold = gold_answer(task)
    extract, _ = rule_of(task)
    item = {"prompt": style, "input": task.prompt, "gold": gold, "response": text,
            "finished": finished, "answer": extract(text) if gold else None,
            "correct": is_correct(text, task) if gold else None}
    if task_name(task.source) in QA:
        item["official"] = official_correct(text, task)
    return item


def wilson(correct, total):
    """95 % interval of a share (Wilson 1927), as two numbers in 0..1."""
    z = 1.959964
    size = total + z * z
    centre = (correct + z * z / 2) / size
    spread = z * (correct * (total - correct) / total + z * z / 4) ** 0.5 / size
    return max(0.0, centre - spread), min(1.0, centre + spread)  # rounding must not print -0.0


def summary(items):
    """Accuracy with its 95 % interval, of QA tasks `official` too, how many responses were cut or
    have no final answer; of pairs the mean margin and, against the model a run began with, the mean
    reward and how often it is above 0."""
    n = len(items)
    correct = sum(item["correct"] for item in items)
    low, high = wilson(correct, n)
    result = {"n": n, "accuracy": correct / n, "low": low, "high": high,
              "cut": sum(not item.get("finished", True) for item in items),
              "no answer": sum(item.get("answer", "") is None for item in items)}
    for key in ("margin", "official", "reward"):
        if all(key in item for item in items):
            result[key] = sum(item[key] for item in items) / n
    if "reward" in result:
        result["reward_accuracy"] = sum(item["reward"] > 0 for item in items) / n
    return result


def summary_row(name, result):
    """One line of the result table: the name, then COLUMNS, "-" for what was not measured."""
    def cell(key, form="{:.1%}"):
        return form.format(result[key]).replace("%", " %") if key in result else "-"

    accuracy = cell("accuracy")
    pairs = "margin" in result
    return [name, cell("reward_accuracy"), cell("reward", "{:.3f}"), "-" if pairs else accuracy,
            accuracy if pairs else "-", f"[{100 * result['low']:.1f}, {100 * result['high']:.1f}]",
            f"{result['n']}", cell("official"), cell("margin", "{:.2f}"),
            f"{result['cut'] or '-'}", f"{result['no answer'] or '-'}"]


def bootstrap(ours, theirs):
    """Paired bootstrap (Koehn 2004) of two models' verdicts on the same rows, 10,000 draws.

    Returns our accuracy minus theirs, low and high of its 95 % interval, two-sided p of no
    difference. A row's difference is -1, 0 or 1, so resampling n rows is one multinomial draw of
    how often each occurs.
    """
    differences = np.subtract(ours, theirs, dtype=int)
    n = len(differences)
    means = np.random.default_rng(0).multinomial(
        n, np.bincount(differences + 1, minlength=3) / n, 10_000) @ [-1, 0, 1] / n
    tail = min(np.sum(means <= 0), np.sum(means >= 0)) + 1  # no draw proves a p of 0
    return differences.mean(), *np.quantile(means, [0.025, 0.975]), min(1.0, 2 * tail / 10_001)
