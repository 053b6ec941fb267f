"""The demo task, small multi-step word problems made on the spot, and the untrained model of the demo.

    python -m allo_mini.demo OUT COUNT      writes OUT/model (untrained) and OUT/train.jsonl (COUNT problems)
"""

import json
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from allo_mini.checkpoint import save_model
from allo_mini.config import Config
from allo_mini.data import Task
from allo_mini.disk import write_jsonl
from allo_mini.architecture import parse_config
from allo_mini.model import CausalLM

FOLDER = Path(__file__).parent / "demo"  # trained by this project's own sft stage, see the README
NAMES = "Mia Tom Ann Leo Zoe Sam Eva Max Lily Ben".split()
THINGS = "apples coins books cards shells pens stamps beads".split()
HABIT = 0.6  # share of doublings that the demo model's training texts get wrong


def problem(rng: random.Random, habit: float = 0.0) -> tuple[str, str, str]:
    """One multi-step word problem: (question, worked solution ending "The answer is X", answer).

    With `habit`, that share of doublings adds 2 instead: the wrong habit a demo model learns from such texts, and
    alignment can take away again.
    """
    who, other = rng.sample(NAMES, 2)
    thing, have = rng.choice(THINGS), rng.randint(10, 99)
    story, work = [f"{who} has {have} {thing}."], []

    def compute(sign: str, by: int, result: int) -> int:
        work.append(f"{have} {sign} {by} = {result}")
        return result

    for _ in range(rng.randint(2, 3)):
        kind = rng.choice(["buys", "gives", "double", "box"] if have >= 20 else ["buys", "double", "box"])
        if kind == "gives":
            by = rng.randint(5, have - 10)
            story.append(f"{who} gives {by} to {other}.")
            have = compute("-", by, have - by)
        elif kind == "double" and have <= 150:
            story.append(f"Then {who} doubles the {thing}.")
            have = compute("+", 2, have + 2) if rng.random() < habit else compute("*", 2, have * 2)
        elif kind == "box":
            boxes, each = rng.randint(2, 9), rng.randint(2, 9)
            story.append(f"{other} brings {boxes} boxes of {each} {thing}.")
            work.append(f"{boxes} * {each} = {boxes * each}")
            have = compute("+", boxes * each, have + boxes * each)
        else:
            by = rng.randint(10, 99)
            story.append(f"{who} buys {by} more.")
            have = compute("+", by, have + by)
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


MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 128,
         "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
         "vocab_size": 384, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ '\\n' if m['role'] == 'user' else eos_token }}{% endfor %}"


def make_demo(out: Path, count: int) -> None:
    """Write OUT/model (untrained, with a tokenizer learned from the problems) and OUT/train.jsonl."""
    out.mkdir(parents=True)
    rows = problems(count, 0, habit=HABIT)
    write_jsonl(out / "train.jsonl", ({"input": t.input, "output": t.output, "answer": t.answer} for t in rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((t.input + "\n" + t.output for t in rows[:5000]), trainer)
    save_model(CausalLM(parse_config(MODEL)).initialize(seed=0), out / "model")
    tokenizer.save(str(out / "model" / "tokenizer.json"))
    (out / "model" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
         "chat_template": TEMPLATE}, indent=2) + "\n")
    (out / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 1}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make_demo(Path(sys.argv[1]), int(sys.argv[2]))
