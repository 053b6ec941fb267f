"""Answers and how they are graded, and the demo task: small word problems made on the spot.

    python -m allo_mini.tasks demo OUT      writes an untrained demo model and its training problems into OUT
"""

import json
import math
import random
import re
import sys
from pathlib import Path

from allo_mini.data import Encoder, Negative, Pair, Task
from allo_mini.generate import sample
from allo_mini.log import progress
from allo_mini.scoring import margins, nearest

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
    return re.sub(r"^\$?(-?\d+)\.0+$", r"\1", text).lstrip("$")


def is_correct(text: str, task: Task) -> bool:
    """Whether a response's final answer is the task's."""
    found, gold = extract_answer(text), gold_answer(task)
    return found is not None and gold is not None and normalize(found) == normalize(gold)


def gold_answer(task: Task) -> str | None:
    """The reference answer: the `answer` field, else what the reference solution concludes."""
    return task.answer if task.answer is not None else extract_answer(task.output or "")


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), as two numbers in 0..1."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959964, correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - spread) / (1 + z * z / total), (centre + spread) / (1 + z * z / total)


def respond(model, encoder: Encoder, prompts: list, settings, eos, n: int = 1, temperature: float | None = None,
            rows: list[int] | None = None, on_done=lambda *_: None) -> list[tuple[list[str], int]]:
    """n responses for each prompt -> [(finished texts, how many hit the length limit), ...].

    settings: a Config, or anything with its sampling fields; temperature 0 is greedy.
    """
    t, stops = encoder.tokenizer, settings.stop

    def stopped(tokens):
        return any(s in t.decode(tokens[-32:]) for s in stops)

    ids = [encoder.prompt_ids(p) for p in prompts]
    out = sample(model, ids, n, settings.max_new_tokens, settings.temperature if temperature is None else temperature,
                 settings.top_p, eos, settings.seed, rows, settings.sample_batch, stopped if stops else None, on_done)
    result = []
    for responses in out:
        finished = [r for r in responses if r[-1] in eos or (stops and stopped(r))]
        texts = [t.decode(r) for r in finished]
        for s in stops:
            texts = [text.split(s)[0] for text in texts]
        result.append(([text.strip() for text in texts], n - len(finished)))
    return result


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
            return [{"input": t.input, "gold": gold_answer(t), "response": (texts or [""])[0],
                     "finished": not cut, "correct": bool(texts) and is_correct(texts[0], t)}
                    for t, (texts, cut) in zip(rows, said)]
        kept = [(p, e) for p in rows if (e := encoder.example(p.prompt, [p.chosen, p.rejected]))]
        values = margins(model, [e for _, e in kept], settings.micro_tokens, bar.update).tolist() if kept else []
        return [{"prompt": p.prompt, "margin": m, "correct": m > 0} for (p, _), m in zip(kept, values)]


def summary(items: list[dict]) -> dict[str, float]:
    """Accuracy with its 95 % interval and, for pairs, the mean log-prob margin."""
    correct, n = sum(item["correct"] for item in items), len(items)
    low, high = wilson(correct, n)
    result = {"n": n, "correct": correct, "accuracy": correct / max(1, n), "low": low, "high": high}
    if items and "margin" in items[0]:
        result["margin"] = sum(item["margin"] for item in items) / n
    return result


def summary_row(name: str, s: dict[str, float]) -> list[str]:
    """One line of the result table."""
    return [name, f"{100 * s['accuracy']:.1f} %", f"[{100 * s['low']:.1f}, {100 * s['high']:.1f}]", str(s["n"]),
            *([f"{s['margin']:.2f}"] if "margin" in s else [])]


# ---- the demo task -----------------------------------------------------------------------------------------

NAMES = "Mia Tom Ann Leo Zoe Sam Eva Max Lily Ben".split()
THINGS = "apples coins books cards shells pens stamps beads".split()


def problem(rng: random.Random) -> tuple[str, str, str]:
    """One multi-step word problem: (question, worked solution ending "The answer is X", answer)."""
    who, other = rng.sample(NAMES, 2)
    thing, have = rng.choice(THINGS), rng.randint(10, 99)
    story, work = [f"{who} has {have} {thing}."], []
    for _ in range(rng.randint(2, 4)):
        kind = rng.choice(["buys", "gives", "double", "box"] if have >= 20 else ["buys", "double", "box"])
        if kind == "buys":
            by = rng.randint(10, 99)
            story.append(f"{who} buys {by} more.")
            work.append(f"{have} + {by} = {have + by}")
            have += by
        elif kind == "gives":
            by = rng.randint(5, have - 10)
            story.append(f"{who} gives {by} to {other}.")
            work.append(f"{have} - {by} = {have - by}")
            have -= by
        elif kind == "double" and have <= 150:
            story.append(f"Then {who} doubles the {thing}.")
            work.append(f"{have} * 2 = {have * 2}")
            have *= 2
        else:
            boxes, each = rng.randint(2, 9), rng.randint(2, 9)
            story.append(f"{other} brings {boxes} boxes of {each} {thing}.")
            work.append(f"{boxes} * {each} = {boxes * each}")
            work.append(f"{have} + {boxes * each} = {have + boxes * each}")
            have += boxes * each
    story.append(f"How many {thing} does {who} have now?")
    return " ".join(story), "\n".join([*work, f"The answer is {have}"]), str(have)


def problems(count: int, seed: int, avoid: set[str] = frozenset()) -> list[Task]:
    """`count` different problems, none of them in `avoid` (questions)."""
    rng, seen, tasks = random.Random(f"demo {seed}"), set(avoid), []
    while len(tasks) < count:
        question, solution, answer = problem(rng)
        if question not in seen:
            seen.add(question)
            tasks.append(Task(len(tasks), question, solution, answer))
    return tasks


DEMO_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 128,
               "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
               "vocab_size": 384, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
               "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

DEMO_TEMPLATE = ("{% for m in messages %}{{ m['content'] }}{{ '\\n' if m['role'] == 'user' else eos_token }}"
                 "{% endfor %}")


def make_demo(out: Path, count: int) -> None:
    """Write OUT/model (untrained, with a tokenizer learned from the problems) and OUT/train.jsonl."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from allo_mini.checkpoint import save_model, write_jsonl
    from allo_mini.model import CausalLM, parse_config

    out.mkdir(parents=True)
    rows = problems(count, seed=0)
    write_jsonl(out / "train.jsonl", ({"input": t.input, "output": t.output, "answer": t.answer} for t in rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator((t.input + "\n" + t.output for t in rows[:5000]), trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    model = CausalLM(parse_config(DEMO_CONFIG)).initialize(seed=0)
    save_model(model, out / "model")
    tokenizer.save(str(out / "model" / "tokenizer.json"))
    (out / "model" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
         "chat_template": DEMO_TEMPLATE}, indent=2) + "\n")
    (out / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 1}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "demo":
        sys.exit(__doc__)
    make_demo(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 60000)
