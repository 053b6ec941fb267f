"""What the demo's model is trained from: the untrained model, and problems with one wrong habit.

    python tests/benchmarks/make_demo.py OUT COUNT      writes OUT/model and OUT/train.jsonl
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import LLAMA, shape

from allo_mini.checkpoint import save_model
from allo_mini.data.demo import problems
from allo_mini.model import CausalLM, parse_config
from allo_mini.run.files import write_json, write_jsonl
from helpers import initialize

HABIT = 0.6  # share of doublings that the training texts get wrong
MODEL = shape(LLAMA, 384, 128, 384, 4, 4, 4, tied=True) | {
    "hidden_act": "silu", "max_position_embeddings": 512, "bos_token_id": 0, "pad_token_id": 1}
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "pad_token": "</s>", "chat_template": "{% for m in messages %}{{ m['content'] }}"
            "{{ '\\n' if m['role'] == 'user' else eos_token }}{% endfor %}"}


def make_demo(out: Path, count: int) -> None:
    """Write OUT/model (untrained, its tokenizer learned from the problems) and OUT/train.jsonl."""
    tasks = problems(count, 0, habit=HABIT)
    write_jsonl(out / "train.jsonl", [{"input": task.prompt, "output": task.output,
                                       "answer": task.answer} for task in tasks])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((t.prompt + "\n" + t.output for t in tasks[:5000]), trainer)
    save_model(initialize(CausalLM(parse_config(MODEL)), seed=0), out / "model")
    tokenizer.save(str(out / "model" / "tokenizer.json"))
    write_json(out / "model" / "tokenizer_config.json", SETTINGS)
    write_json(out / "model" / "generation_config.json", {"eos_token_id": 1, "pad_token_id": 1})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make_demo(Path(sys.argv[1]), int(sys.argv[2]))
