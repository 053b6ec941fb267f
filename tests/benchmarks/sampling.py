"""Sampling speed: allo_mini against transformers' generate, same model, same prompts, taking turns in one run.

    python tests/benchmarks/sampling.py --model DIR --test ecqa_test.jsonl [--prompts 32] [--n 10] [--json FILE]

transformers is not one of our requirements: install it (and accelerate) beside them for the comparison; without it
only our own figure is printed. Tokens are counted up to and including EOS; padding after EOS is not a token.
"""

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from allo_mini.checkpoint import eos_ids, find_folder, load_model, load_tokenizer  # noqa: E402
from allo_mini.data import Encoder, read_tasks  # noqa: E402
from allo_mini.generate import sample  # noqa: E402
from allo_mini.log import table  # noqa: E402


def ours(folder, prompts, eos, args):
    model = load_model(str(folder), args.dtype, args.device)
    began = time.perf_counter()
    out = sample(model, prompts, args.n, args.max_new_tokens, 0.7, 0.95, eos, slots=args.prompts * args.n)
    return sum(len(r) for rs in out for r in rs), time.perf_counter() - began


def theirs(folder, prompts, eos, args):
    from transformers import AutoModelForCausalLM
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[eos[0]] * (width - len(p)) + p for p in prompts], device=args.device)  # padded on the left
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=args.device)
    torch.manual_seed(0)
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=real, do_sample=True, temperature=0.7, top_p=0.95, top_k=0,
                             num_return_sequences=args.n, max_new_tokens=args.max_new_tokens, eos_token_id=list(eos),
                             pad_token_id=eos[0])
    seconds, count = time.perf_counter() - began, 0
    for row in out[:, width:].tolist():
        ends = [i for i, t in enumerate(row) if t in eos]
        count += ends[0] + 1 if ends else len(row)
    return count, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--prompt", default="alpaca", choices=("alpaca", "chat", "none"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    args = parser.parse_args()
    folder = find_folder(args.model)
    model = load_model(str(folder), args.dtype, args.device)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    encoder, eos = Encoder(tokenizer, args.prompt, 2048), eos_ids(model, tokenizer)
    prompts = [encoder.prompt_ids(t.input) for t in read_tasks([args.test], args.prompts, False)]
    del model
    sides = {"allo_mini": ours}
    try:
        import transformers
        sides[f"transformers {transformers.__version__}"] = theirs
    except ImportError:
        print("transformers is not installed: our own figure only")
    rates, rows = {name: [] for name in sides}, []
    for _ in range(args.repeat):
        for name, run in sides.items():
            count, seconds = run(folder, prompts, eos, args)
            rates[name].append(count / seconds)
            rows.append([name, count, f"{seconds:.1f}", f"{count / seconds:.0f}"])
    print(table(["side", "tokens", "seconds", "tokens/s"], rows))
    best = [sorted(r)[len(r) // 2] for r in rates.values()]
    ratio = best[0] / best[1] if len(best) == 2 else None
    if ratio:
        print(f"allo_mini / transformers: {ratio:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"tokens_per_s": dict(zip(rates, best)), "ratio": ratio, "torch": torch.__version__,
                                               "device": args.device, "machine": platform.machine(), "threads":
                                               torch.get_num_threads(), "date": str(date.today()), "args": vars(args)}, indent=2))


if __name__ == "__main__":
    main()
