"""Training and sampling speed of a random model of a known shape, as a share of what is possible.

    python tests/benchmarks/speed.py [--shape llama-2-7b] [--tokens 4096 8192] [--json FILE]
    python tests/benchmarks/speed.py --generate [--shape llama-2-7b]

A step is the improving stage's (p % of the weights) on random pairs of two sequences of --length
tokens, a quarter of which is their common prompt. *Physical* tokens are those the model reads: the
prompt once a pair. *Logical* ones count it for each response, as trainers do that read it twice.
MFU: 6 x weights in matrix products x physical tokens/s (recomputing does not count) over the bf16
FLOP/s of the data sheet; "of GEMM" over a large matrix product's, measured in the same run.
--generate: new tokens/s of sampling, prompts read included, with plain and int8 weights.
"""

import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median

import torch
from common import (DTYPES, SHAPES, device_name, exit_code, finish, fresh_process, gb, make_parser,
                    meta_of, peaks, pick_device, random_model, random_pairs, random_run, start,
                    timed, train_steps)

from allo_mini.data.encoder import Example
from allo_mini.generate import sample
from allo_mini.logprobs import size_of
from allo_mini.objectives import dpo_objective

# Dense bf16 FLOP/s on the vendors' data sheets, by the beginning of the device's name.
PEAK_FLOPS = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
              "NVIDIA GH200": 989e12, "NVIDIA A100": 312e12}
GPU = torch.cuda.is_available()


def gemm_rate(device: str, dtype: str) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    size = 8192 if device.startswith("cuda") else 1536
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    out = torch.empty_like(a)
    return 2 * size**3 / min(timed(lambda: torch.matmul(a, b, out=out), device, 10))


def multiplied(name: str) -> int:
    """Weights in a matrix product for every token: all matrices but an untied embedding."""
    tied = SHAPES[name]["tie_word_embeddings"]
    return sum(p.numel() for key, p in meta_of(name).named_parameters()
               if p.dim() == 2 and (tied or "embed_tokens" not in key))


def training(args, tokens: int, recompute: bool) -> dict:
    """One configuration."""
    vocab = SHAPES[args.shape]["vocab_size"]
    size = size_of(random_pairs(1, args.length, vocab)[0])
    each = max(1, tokens // size)  # pairs of a micro-batch
    step = [Example(*pair) for pair in random_pairs(each * args.micros, args.length, vocab)]
    settings = {"lr_improve": 1e-9, "batch": len(step), "micro_tokens": each * size,
                "schedules": {"improve": {"epochs": args.repeat + 1}}, "recompute": recompute,
                "int8": args.int8, "state_bits": args.state_bits, "offload": args.offload}
    with tempfile.TemporaryDirectory() as place:
        run = random_run(args.shape, settings, args.device, args.dtype, Path(place))
        train_steps(run, "improve", step, dpo_objective(0.1, 0.1), args.p)
    seconds = median(run.log.seconds(1))
    physical, prompts = size * len(step), sum(len(example.prompt) for example in step)
    return {"micro_tokens": each * size, "recompute": recompute, "seconds": seconds,
            "physical_per_s": physical / seconds, "logical_per_s": (physical + prompts) / seconds,
            "flops": 6 * multiplied(args.shape) * physical / seconds, **peaks(args.device)}


def generation(args, int8: bool) -> dict:
    """New tokens/s of sampling args.n responses to each of args.prompts random prompts."""
    pick_device(args.device, args.dtype)
    model = random_model(args.shape, DTYPES[args.dtype], args.device, int8)
    vocab, size = model.config.vocab_size, args.prompt_tokens
    prompts = [prompt for prompt, _ in random_pairs(args.prompts, size + 1, vocab, size)]

    def run():  # random weights spread their probability: cold, a nucleus is as narrow as trained
        sample(model, prompts, args.n, args.new_tokens, temperature=0.05, top_p=0.95,
               slots=args.prompts * args.n)

    seconds = median(timed(run, args.device, args.repeat))
    new = args.prompts * args.n * args.new_tokens
    return {"int8": int8, "new_tokens": new, "seconds": seconds, "tokens_per_s": new / seconds,
            **peaks(args.device)}


def show_training(args) -> None:
    """The table of training configurations."""
    rate, name = fresh_process(gemm_rate, args.device, args.dtype), device_name(args.device)
    peak = next((PEAK_FLOPS[key] for key in PEAK_FLOPS if name.startswith(key)), None)
    modes = {"none": [False], "all": [True], "both": [False, True]}[args.checkpointing]
    rows, done = [], []
    for tokens, recompute in product(args.tokens, modes):
        one = fresh_process(training, args, tokens, recompute)
        kind = "all blocks" if recompute else "none"
        if one is None:
            rows.append([tokens, kind, "out of memory", "", "", "", ""])
            continue
        one |= {"mfu": one["flops"] / peak if peak else None, "of_gemm": one["flops"] / rate}
        done.append(one)
        rows.append([one["micro_tokens"], kind, f"{one['physical_per_s']:.0f}",
                     f"{one['logical_per_s']:.0f}", f"{one['mfu']:.1%}" if peak else "-",
                     f"{one['of_gemm']:.1%}", gb(one["peak_bytes"])])
    note = (f"{args.shape}, {args.p:g} % of the weights, {args.dtype}{', int8' * args.int8}; GEMM: "
            f"{rate / 1e12:.3g} TFLOP/s, by data sheet {(peak or 0) / 1e12:.0f}")
    header = ["micro-batch", "recompute", "physical/s", "logical/s", "MFU", "of GEMM", "peak GB"]
    finish(args, header, rows, [note], gemm_flops=rate, peak_flops=peak, training=done)


def show_generation(args) -> None:
    """The table of sampling with plain and with int8 weights."""
    rows, done = [], []
    for int8 in [True] if args.int8 else [False, True]:
        one = fresh_process(generation, args, int8)
        figures = ["out of memory", ""]
        if one:
            done.append(one)
            figures = [f"{one['tokens_per_s']:.3g}", gb(one["peak_bytes"])]
        rows.append(["int8" if int8 else args.dtype, *figures])
    title = f"sampling {args.prompts} x {args.n} responses, {args.shape}"
    finish(args, [title, "new tokens/s", "peak GB"], rows, generate=done)


def arguments(argv=None):
    """The flags."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-2-7b" if GPU else "smollm2-135m")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    add("--tokens", type=int, nargs="+", help="physical tokens of a micro-batch",
        default=[2048, 4096, 8192, 16384] if GPU else [512, 1024])
    add("--length", type=int, default=1024 if GPU else 256, help="tokens of prompt and response")
    add("--micros", type=int, default=4 if GPU else 1, help="micro-batches a step")
    add("--checkpointing", default="both", choices=("none", "all", "both"), help="of activations")
    add("--p", type=float, default=5.0, help="percent of the weights that are trained")
    add("--int8", action="store_true", help="frozen weights in 8 bits")
    add("--state-bits", type=int, default=32, choices=(8, 32))
    add("--offload", action="store_true", help="optimizer and gradient in host memory")
    add("--generate", action="store_true", help="measure sampling instead")
    add("--prompts", type=int, default=32 if GPU else 4)
    add("--prompt-tokens", type=int, default=256)
    add("--n", type=int, default=10 if GPU else 4, help="responses a prompt")
    add("--new-tokens", type=int, default=256 if GPU else 32, help="tokens of a response")
    add("--repeat", type=int, default=5 if GPU else 2)
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    start(args)
    show_generation(args) if args.generate else show_training(args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
