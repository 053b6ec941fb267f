"""Sampling speed: allo_mini against transformers' generate, same model, same prompts.

    python tests/benchmarks/sampling.py --model DIR --test ecqa_test.jsonl [--prompts 32] [--n 10]

transformers is not one of our requirements: install it (and accelerate) beside them for this;
without it only our own figure is printed. Tokens count up to and including EOS.
"""

import sys
import time
from importlib.util import find_spec

import torch
from common import DTYPES, exit_code, finish, make_parser, start
from torch.nn.utils.rnn import pad_sequence

from allo_mini.checkpoint import eos_ids, find_folder, load_model
from allo_mini.data.encoder import Encoder
from allo_mini.data.rows import read_tasks
from allo_mini.data.tokenizer import load_tokenizer
from allo_mini.generate import sample


def ours(folder, prompts: list, eos: tuple, args) -> tuple[int, float]:
    """(tokens, seconds) of our sampling."""
    model = load_model(folder, args.dtype, args.device)
    began = time.perf_counter()
    responses = sample(model, prompts, args.n, args.max_new_tokens, 0.7, 0.95, eos,
                       slots=args.prompts * args.n)
    seconds = time.perf_counter() - began
    return sum(len(response) for row in responses for response in row), seconds


def theirs(folder, prompts: list, eos: tuple, args) -> tuple[int, float]:
    """(tokens, seconds) of transformers' generate, prompts padded on the left."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype]).to(args.device)
    ids = [torch.tensor(prompt, device=args.device) for prompt in prompts]
    real = [torch.ones_like(prompt) for prompt in ids]
    ids = pad_sequence(ids, True, eos[0], padding_side="left")
    real = pad_sequence(real, True, 0, padding_side="left")
    torch.manual_seed(0)
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=real, do_sample=True, temperature=0.7, top_p=0.95,
                             top_k=0, num_return_sequences=args.n, pad_token_id=eos[0],
                             max_new_tokens=args.max_new_tokens, eos_token_id=list(eos))
    seconds, count = time.perf_counter() - began, 0
    for row in out[:, ids.shape[1]:].tolist():
        ends = [at for at, token in enumerate(row) if token in eos]
        count += ends[0] + 1 if ends else len(row)
    return count, seconds


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True)
    add("--test", required=True)
    add("--prompts", type=int, default=32)
    add("--n", type=int, default=10)
    add("--max-new-tokens", type=int, default=128)
    add("--prompt", default="alpaca", choices=("alpaca", "chat", "none"))
    add("--dtype", default="fp32", choices=("fp32", "bf16"))
    args = parser.parse_args()
    start(args)
    folder = find_folder(args.model)
    model = load_model(folder, args.dtype, "meta")
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    encoder = Encoder(tokenizer, args.prompt, 2048)
    eos = eos_ids(model, encoder)
    tasks = read_tasks([args.test], need_output=False)[:args.prompts]
    prompts = [encoder.prompt_ids(task.prompt) for task in tasks]
    sides = {"allo_mini": ours} | ({"transformers": theirs} if find_spec("transformers") else {})
    rates, rows = {}, []
    for name, side in sides.items():
        count, seconds = side(folder, prompts, eos, args)
        rates[name] = count / seconds
        rows.append([name, count, f"{seconds:.1f}", f"{rates[name]:.0f}"])
    ratio = rates["allo_mini"] / rates.get("transformers", float("nan"))
    finish(args, ["side", "tokens", "seconds", "tokens/s"], rows,
           [f"allo_mini / transformers: {ratio:.2f}"], tokens_per_s=rates, ratio=ratio)


if __name__ == "__main__":
    sys.exit(exit_code(main))
