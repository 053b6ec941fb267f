"""Training and sampling speed of a random model of a known shape: tokens/s, and the share of what the device can do.

    python tests/benchmarks/speed.py [--shape llama-2-7b] [--tokens 4096 8192] [--device cuda] [--json FILE]
    python tests/benchmarks/speed.py --generate [--shape llama-2-7b]

A step is forward, backward, clipping and update of the improving stage (p % of the weights) on random pairs of two
sequences of --length tokens, a quarter of which is their common prompt. *Physical* tokens are those the model reads: the
prompt once a pair. *Logical* ones count it for each response, as trainers do that read it twice. MFU is

    6 x weights in matrix products x physical tokens/s  over  the device's bf16 FLOP/s by its data sheet

(recomputed activations do not count); beside it the share of a large matrix product's rate, measured in the same run, and
on a CPU only that. --generate: new tokens/s of sampling, prompts read included, with plain and with int8 weights (--int8: with these alone).
"""

import sys
from pathlib import Path

import torch
from common import (DTYPES, SHAPES, RandomMask, finish, fresh_process, gb, gemm_rate, guarded, make_parser, matmul_parameters,
                    median, number, peak_flops, peak_memory, random_model, random_pairs, reset_peak, shapes_of, start, timed)

from allo_mini import UserError
from allo_mini.config import parse
from allo_mini.data import Example
from allo_mini.device import pick_device
from allo_mini.generate import sample
from allo_mini.log import Log
from allo_mini.logprobs import size_of
from allo_mini.loop import accumulate, dpo_objective
from allo_mini.pointwise import compile_pointwise
from allo_mini.optim import MaskedAdamW
from allo_mini.run import Run
from allo_mini.scoring import with_reference


def training(args, tokens: int, checkpointing: bool) -> dict | None:
    """One configuration; None when memory runs out."""
    pick_device(args.device, args.dtype)  # what train.py sets for a device
    device, dtype, shapes = args.device, DTYPES[args.dtype], shapes_of(args.shape)
    vocab, layers = SHAPES[args.shape]["vocab_size"], SHAPES[args.shape]["num_hidden_layers"]
    if args.compile:
        compile_pointwise()
    mask = RandomMask(shapes, args.p, device)
    model = random_model(args.shape, dtype, device, args.int8, mask, args.stream)
    model.checkpoint_blocks = layers if checkpointing else 0
    each = max(1, tokens // size_of(random_pairs(1, args.length, vocab)[0]))  # pairs a micro-batch
    group = [Example(*pair) for pair in random_pairs(each * args.micros, args.length, vocab)]
    cfg = parse(["--micro-batch", str(each)])
    run = Run(cfg, Path(), Path(), device, dtype, shapes, None, Log(None))
    objective = dpo_objective(0.1, 0.1)
    try:
        optimizer = MaskedAdamW(model.named_parameters(), mask, 1e-9, state_bits=args.state_bits, offload=args.offload)
        group = with_reference(model, run.micro_batches(group))
        reset_peak(device)

        def step():
            accumulate(run, model, group, objective)
            optimizer.clip(1.0)
            optimizer.step()

        seconds = median(timed(step, device, args.repeat, warm=1))
    except torch.OutOfMemoryError:
        return None
    physical = sum(map(size_of, group))
    logical = physical + sum(len(e.prompt) for e in group)
    flops = 6 * matmul_parameters(shapes, SHAPES[args.shape]["tie_word_embeddings"]) * physical / seconds
    return {"micro_tokens": physical // args.micros, "checkpointing": checkpointing, "seconds": seconds,
            "physical_per_s": physical / seconds, "logical_per_s": logical / seconds, "flops": flops,
            "peak_bytes": peak_memory(device)["allocated"], "reserved_bytes": peak_memory(device)["reserved"]}


def generation(args, int8: bool) -> dict | None:
    """New tokens/s of sampling args.n responses to each of args.prompts random prompts."""
    pick_device(args.device, args.dtype)
    device, vocab = args.device, SHAPES[args.shape]["vocab_size"]
    model = random_model(args.shape, DTYPES[args.dtype], device, int8, stream=int8 and args.stream)
    prompts = [prompt for prompt, _ in random_pairs(args.prompts, args.prompt_tokens, vocab, 1 - 1 / args.prompt_tokens)]
    reset_peak(device)

    def run():  # random weights spread their probability: cold, the nucleus is as narrow as a trained model's
        sample(model, prompts, args.n, args.new_tokens, temperature=0.05, top_p=0.95, slots=args.prompts * args.n)

    try:
        seconds = median(timed(run, device, args.repeat, warm=1))
    except torch.OutOfMemoryError:
        return None
    new = args.prompts * args.n * args.new_tokens
    return {"int8": int8, "new_tokens": new, "seconds": seconds, "tokens_per_s": new / seconds,
            "peak_bytes": peak_memory(device)["allocated"]}


def sweep(args) -> tuple[list[str], list[list], dict]:
    """The table of training configurations."""
    rate, peak = fresh_process(gemm_rate, args.device, DTYPES[args.dtype]), peak_flops(args.device)
    header = ["tokens a micro-batch", "recompute", "physical/s", "logical/s", "MFU", "of GEMM", "peak GB"]
    rows, found = [], []
    for tokens in args.tokens:
        for checkpointing in (False, True) if args.checkpointing == "both" else (args.checkpointing == "all",):
            one = fresh_process(training, args, tokens, checkpointing)
            kind = "all blocks" if checkpointing else "none"
            if one is None:
                rows.append([tokens, kind, "out of memory", "", "", "", ""])
                continue
            one |= {"mfu": one["flops"] / peak if peak else None, "of_gemm": one["flops"] / rate}
            found.append(one)
            rows.append([one["micro_tokens"], kind, f"{one['physical_per_s']:.0f}", f"{one['logical_per_s']:.0f}",
                         f"{one['mfu']:.1%}" if peak else "-", f"{one['of_gemm']:.1%}", gb(one["peak_bytes"])])
    return header, rows, {"gemm_flops": rate, "peak_flops": peak, "training": found}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-2-7b on CUDA, smollm2-135m on a CPU")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--tokens", type=int, nargs="+", help="physical tokens of a micro-batch (CUDA: 2048 4096 8192 16384)")
    parser.add_argument("--length", type=int, help="tokens of a sequence, prompt and response (CUDA: 1024, CPU: 256)")
    parser.add_argument("--micros", type=int, help="micro-batches a step (CUDA: 4, CPU: 1)")
    parser.add_argument("--checkpointing", default="both", choices=("none", "all", "both"), help="of activations")
    parser.add_argument("--p", type=float, default=5.0, help="percent of the weights that are trained")
    parser.add_argument("--int8", action="store_true", help="frozen weights in 8 bits")
    parser.add_argument("--stream", action="store_true", help="with --int8: these weights in host memory")
    parser.add_argument("--state-bits", type=int, default=32, choices=(8, 32))
    parser.add_argument("--offload", default="none", choices=("none", "state", "gradient"))
    parser.add_argument("--compile", action="store_true", help="torch.compile for the pointwise pieces")
    parser.add_argument("--generate", action="store_true", help="measure sampling instead")
    parser.add_argument("--prompts", type=int, help="(CUDA: 32, CPU: 4)")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--n", type=int, help="responses a prompt (CUDA: 10, CPU: 4)")
    parser.add_argument("--new-tokens", type=int, help="tokens of a response (CUDA: 256, CPU: 32)")
    parser.add_argument("--repeat", type=int, help="(CUDA: 5, CPU: 2)")
    args = parser.parse_args()
    cuda = start(args).startswith("cuda")
    for name, large, small in (("shape", "llama-2-7b", "smollm2-135m"), ("tokens", [2048, 4096, 8192, 16384], [512, 1024]),
                               ("length", 1024, 256), ("micros", 4, 1), ("prompts", 32, 4), ("n", 10, 4),
                               ("new_tokens", 256, 32), ("repeat", 5, 2)):
        if getattr(args, name) is None:
            setattr(args, name, large if cuda else small)
    if min(args.length, args.prompt_tokens) < 4:
        raise UserError(f"--length is {args.length} and --prompt-tokens {args.prompt_tokens}, expected at least 4")
    if args.generate:
        both = [None if args.int8 and not int8 else fresh_process(generation, args, int8) for int8 in (False, True)]
        rows = [[name, *([number(one["tokens_per_s"]), gb(one["peak_bytes"])] if one else ["out of memory", ""])]
                for name, one in zip((args.dtype, "int8"), both) if one or not args.int8]
        finish(args, [f"sampling {args.prompts} x {args.n} responses, {args.shape}", "new tokens/s", "peak GB"], rows,
               generate=[one for one in both if one])
        return
    header, rows, figures = sweep(args)
    peak = f", data sheet {figures['peak_flops'] / 1e12:.0f}" if figures["peak_flops"] else ""
    finish(args, header, rows, [f"{args.shape}, {args.p:g} % of the weights, {args.dtype}{', int8' if args.int8 else ''}; matrix "
                                f"product {figures['gemm_flops'] / 1e12:.3g} TFLOP/s{peak}"], **figures)


if __name__ == "__main__":
    sys.exit(guarded(main))
