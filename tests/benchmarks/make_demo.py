"""What the demo's model is trained from: the untrained model, and problems with one wrong habit in their solutions.

    python tests/benchmarks/make_demo.py OUT COUNT      writes OUT/model and OUT/train.jsonl (COUNT problems)
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
from allo_mini.architecture import parse_config  # noqa: E402
from allo_mini.checkpoint import save_model  # noqa: E402
from allo_mini.demo import problems  # noqa: E402
from allo_mini.disk import write_jsonl  # noqa: E402
from allo_mini.model import CausalLM  # noqa: E402
from helpers import initialize  # noqa: E402

HABIT = 0.6  # share of doublings that the training texts get wrong
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
    save_model(initialize(CausalLM(parse_config(MODEL)), seed=0), out / "model")
    tokenizer.save(str(out / "model" / "tokenizer.json"))
    (out / "model" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
         "chat_template": TEMPLATE}, indent=2) + "\n")
    (out / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 1}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make_demo(Path(sys.argv[1]), int(sys.argv[2]))
