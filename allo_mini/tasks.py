"""Answers and how they are graded; sampled responses -> pairs and negatives; evaluation of a model on rows."""

import random
import re

from allo_mini.data import Encoder, Negative, Pair, Task
from allo_mini.edits import nearest
from allo_mini.generate import sample
from allo_mini.log import progress
from allo_mini.logprobs import score

GROUP = 64  # questions sampled together; a restart goes on at such a boundary, so it changes nothing
ANSWER = re.compile(r"the answer is\s*:?\s*", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    """What follows the last "The answer is", up to the end of its line; None when there is none."""
    places = list(ANSWER.finditer(text))
    return text[places[-1].end():].split("\n")[0].strip() or None if places else None


def normalize(answer: str) -> str:
    """Case, commas inside numbers, final punctuation, and ".0" of whole numbers do not matter."""
    text = " ".join(answer.strip().lower().split()).rstrip(".,;:!?").strip()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return re.sub(r"^\$?(-?\d+)\.0+$", r"\1", text).lstrip("$").strip()


def is_correct(text: str, task: Task) -> bool:
    """Whether a response's final answer is the task's."""
    found, gold = extract_answer(text), gold_answer(task)
    return found is not None and gold is not None and normalize(found) == normalize(gold)


def gold_answer(task: Task) -> str | None:
    """The reference answer: the `answer` field, else what the reference solution concludes."""
    return task.answer if task.answer is not None else extract_answer(task.output or "")


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
    pairs, negatives, counts = [], [], {"correct": 0, "wrong": 0}
    for task in tasks:
        texts = [s for s in dict.fromkeys(samples.get(task.input, [])) if s.strip()]
        good = [s for s in texts if is_correct(s, task)]
        bad = [s for s in texts if not is_correct(s, task)]
        counts["correct"], counts["wrong"] = counts["correct"] + len(good), counts["wrong"] + len(bad)
        good_ids = [encoder.tokenizer.encode(s, bos=False) for s in good]
        for wrong in bad:
            rewrite = task.rewrite or (good[nearest(encoder.tokenizer.encode(wrong, bos=False), good_ids)] if good
                                       else task.output)
            if rewrite:
                negatives.append(Negative(task.input, wrong, task.output or rewrite, rewrite))
        every = [(g, b) for g in good for b in bad]
        random.Random(f"{seed}/{task.id}/pairs").shuffle(every)
        pairs += [Pair(task.input, g, b, task.id) for g, b in every[:per_question]]
    return pairs, negatives, (f"{len(tasks)} questions, {counts['correct']} different correct and {counts['wrong']} wrong "
                              f"responses -> {len(pairs)} pairs, {len(negatives)} negatives")


def evaluate(model, encoder: Encoder, rows: list, settings, eos, name: str = "eval") -> list[dict]:
    """Greedy answers to Tasks, or log-prob comparison of Pairs -> one dict a row, "correct" among its keys."""
    with progress(total=len(rows), label=name, unit="row") as bar:
        if isinstance(rows[0], Task):
            said = respond(model, encoder, [t.input for t in rows], settings, eos, temperature=0.0,
                           on_done=lambda *_: bar.update())
            return [{"input": t.input, "gold": gold_answer(t), "response": text, "finished": finished,
                     "correct": is_correct(text, t)} for t, [(text, finished)] in zip(rows, said)]
        kept = [(p, e) for p in rows if (e := encoder.example(p.prompt, [p.chosen, p.rejected]))]
        scored = score(model, [e for _, e in kept], settings.micro_tokens, bar.update)
        margins = [float(chosen.sum() - rejected.sum()) for chosen, rejected in scored]  # log pi(y+) - log pi(y-)
        return [{"prompt": p.prompt, "margin": m, "correct": m > 0} for (p, _), m in zip(kept, margins)]
