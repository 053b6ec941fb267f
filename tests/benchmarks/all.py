"""Every benchmark that needs no files of yours, in one process, what is worth most first.

    python tests/benchmarks/all.py OUT.jsonl [--minutes 8.5] [--only step speed ...] [--tiny]

OUT.jsonl gets a line as each row ends, a table comes last. The same command goes on with what the
minutes did not suffice for. --tiny: small shapes, for a CPU or (tests/pretend_cuda.py) as on a GPU.

Speed: a training step is the improving stage's (p % of the weights) on random pairs of two
sequences of `length` tokens, a quarter of which is their common prompt. *Physical* tokens are those
the model reads: the prompt once a pair. *Logical* ones count it for each response, as trainers do
that read it twice. MFU: 6 x weights in matrix products x physical tokens/s (recomputing does not
count) over the bf16 FLOP/s of the data sheet; "of GEMM" over a large product's of the same run.
"""

import gc
import json
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from unittest.mock import patch

import memory
import peer
import torch
from common import (DTYPES, SHAPES, device_name, meta_of, peaks, pick_device, random_mask,
                    random_model, random_pairs, random_run, shape, timed, train, train_steps)

from allo_mini.checkpoint import save_model
from allo_mini.data.encoder import Example
from allo_mini.generate import sample
from allo_mini.logprobs import size_of
from allo_mini.masked_adamw import MaskedAdamW
from allo_mini.model import KERNELS
from allo_mini.objectives import dpo_objective
from helpers import last_step

TRUE = {"shape": "llama-2-7b", "tokens": 8192, "length": 1024, "micros": 2, "repeat": 3, "p": 5.0,
        "gemm": 8192, "prompts": 32, "n": 10, "new_tokens": 256, "small": "llama-3.2-1b",
        "batch": 8, "cards": {"12gb": "llama-2-7b", "24gb": "llama-2-7b", "16gb": "llama-3-8b"}}
TINY = {"shape": "tiny", "tokens": 64, "length": 32, "gemm": 64, "prompts": 2, "n": 2, "batch": 2,
        "new_tokens": 4, "small": "tiny", "cards": {"12gb": "tiny"}}
SHAPES["heads of 64"] = shape("LlamaForCausalLM", 512, 256, 384, 2, 4, 4)
SHAPES["shared keys"] = shape("LlamaForCausalLM", 512, 256, 384, 2, 4, 2)
SHOWN = ("of_cpu", "physical_per_s", "mfu", "of_gemm", "tokens_per_s", "pairs_per_s", "seconds",
         "estimate", "peak_bytes", "saved_bytes")
# Dense bf16 FLOP/s on the vendors' data sheets, by the beginning of the device's name.
PEAK_FLOPS = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
              "NVIDIA GH200": 989e12, "NVIDIA A100": 312e12}


def check(a, name: str, dtype: str, int8=False, resume=False) -> dict:
    """How far the gradient of a second step is from a CPU's in fp32; as a share of its norm."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save_model(random_model(name, torch.float32, "cpu"), folder)
        _, expected, _ = last_step(folder, "cpu", "fp32", int8, steps=2)
        _, found, _ = last_step(folder, a.device, dtype, int8, steps=2, resume=resume)
    apart = float((found - expected).norm() / expected.norm())
    assert apart < (1e-3 if dtype == "fp32" else 0.05), f"{apart:.2g} of the gradient's norm off"
    return {"of_cpu": apart}


def gemm_rate(device: str, dtype: str, size: int) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    out = torch.empty_like(a)
    return 2 * size**3 / min(timed(lambda: torch.matmul(a, b, out=out), device, 10))


def multiplied(name: str) -> int:
    """Weights in a matrix product for every token: all matrices but an untied embedding."""
    tied = SHAPES[name]["tie_word_embeddings"]
    return sum(p.numel() for key, p in meta_of(name).named_parameters()
               if p.dim() == 2 and (tied or "embed_tokens" not in key))


def training(a, shape: str, recompute: bool) -> dict:
    """Improving steps of a.micros micro-batches of about a.tokens physical tokens."""
    vocab, device = SHAPES[shape]["vocab_size"], a.device
    size = size_of(random_pairs(1, a.length, vocab)[0])
    each = max(1, a.tokens // size)  # pairs of a micro-batch
    step = [Example(*pair) for pair in random_pairs(each * a.micros, a.length, vocab)]
    settings = {"lr_improve": 1e-9, "batch": len(step), "micro_tokens": each * size,
                "schedules": {"improve": {"epochs": a.repeat + 1}}, "recompute": recompute}
    with tempfile.TemporaryDirectory() as place:
        run = random_run(shape, settings, device, a.dtype, Path(place))
        train_steps(run, "improve", step, dpo_objective(0.1, 0.1), a.p)
    seconds = median(run.log.seconds(1))
    physical, prompts = size * len(step), sum(len(example.prompt) for example in step)
    flops, found = 6 * multiplied(shape) * physical / seconds, peaks(device)
    sheet = [PEAK_FLOPS[key] for key in PEAK_FLOPS if device_name(device).startswith(key)]
    gemm = gemm_rate(device, a.dtype, a.gemm)
    return {"physical_per_s": physical / seconds, "mfu": flops / sheet[0] if sheet else None,
            "of_gemm": flops / gemm, "gemm_flops": gemm, "micro_tokens": each * size,
            "logical_per_s": (physical + prompts) / seconds, "seconds": seconds, **found}


def uncompiled(a) -> dict:
    with patch.dict(KERNELS, clear=True), patch("torch.compile", lambda plain, **how: plain):
        return training(a, a.shape, False)


def generation(a, shape: str, int8: bool) -> dict:
    """New tokens/s, prompts read included: a.n responses to each of a.prompts random prompts."""
    model = random_model(shape, DTYPES[a.dtype], a.device, int8)
    vocab, size = model.config.vocab_size, a.length // 4
    prompts = [prompt for prompt, _ in random_pairs(a.prompts, size + 1, vocab, size)]

    def run():  # random weights spread their probability: cold, a nucleus is as narrow as trained
        sample(model, prompts, a.n, a.new_tokens, temperature=0.05, top_p=0.95,
               slots=a.prompts * a.n)

    seconds = median(timed(run, a.device, 1))
    new = a.prompts * a.n * a.new_tokens
    return {"tokens_per_s": new / seconds, "new_tokens": new, "seconds": seconds, **peaks(a.device)}


def optimizer_step(a, shape: str) -> dict:
    """A step of AdamW over a.p % of the weights, written back into the model."""
    model = random_model(shape, DTYPES[a.dtype], a.device)
    mask = random_mask({name: p.shape for name, p in model.named_parameters()}, a.p, a.device)
    optimizer = MaskedAdamW(model.named_parameters(), mask, 1e-9)
    optimizer.grad.normal_()
    seconds = median(timed(optimizer.step, a.device, 5))
    return {"seconds": seconds, "weights": len(optimizer.master), **peaks(a.device)}


def under_cap(a, name: str, card: str, stage: str) -> dict:
    """A row of memory.py; on a CPU of two layers."""
    settings = {"p": a.p, "memory": card}
    if a.device == "cpu":
        return memory.all_layers(name, stage, settings, "cpu", (1, 2))
    layers = SHAPES[name]["num_hidden_layers"]
    return memory.one_stage(name, layers, stage, settings, a.device)


def beside(a, side, *more) -> dict:
    """A side of peer.py: median pairs/s, peak, saved bytes."""
    args = peer.arguments(f"--shape {a.small} --batch {a.batch} --steps 6 --warm 2".split())
    args.device = a.device
    with tempfile.TemporaryDirectory() as place:
        peer.make_world(args, Path(place))
        pairs = peer.usable_pairs(args, 8 * a.batch)
        return side(args, pairs, *more)


def demo(a) -> dict:
    """The demo, as `python train.py` runs it."""
    with tempfile.TemporaryDirectory() as place:
        few = "--limit 6 --max-steps 2 --n 4 --no-eval".split() if a.gemm == 64 else []
        cfg = train.parse(["--device", a.device, "--out", f"{place}/demo", *few])
        train.run_all(train.open_run(cfg))
    return {}


def jobs(a) -> dict:
    """{row's name: what measures it}"""
    rows = {"step fp32": partial(check, a, "heads of 64", "fp32"),
            "step bf16": partial(check, a, "heads of 64", "bf16"),
            "step int8": partial(check, a, "heads of 64", "bf16", True),
            "step GQA": partial(check, a, "shared keys", "bf16"),
            "step resumed": partial(check, a, "heads of 64", "fp32", False, True),
            f"speed {a.tokens}": partial(training, a, a.shape, False),
            f"speed {a.tokens} recompute": partial(training, a, a.shape, True),
            f"speed {a.tokens} uncompiled": partial(uncompiled, a)}
    for card, name in a.cards.items():
        for stage in ("improve", "sft", "forget", "sample"):
            rows[f"memory {name} {card} {stage}"] = partial(under_cap, a, name, card, stage)
    rows |= {f"sample {'int8' if int8 else a.dtype}": partial(generation, a, a.shape, int8)
             for int8 in (True, False)}
    rows |= {f"optimizer {name}": partial(optimizer_step, a, name) for name in (a.shape, a.small)}
    sides = {"allo_mini": (peer.ours, a.p), "TRL": (peer.trl,), "TRL LoRA": (peer.trl, True)}
    if find_spec("trl"):
        rows |= {f"peer {name}": partial(beside, a, *side) for name, side in sides.items()}
    return rows | {"demo": partial(demo, a)}


def measured(name: str, job) -> dict:
    """A row: its figures, or why there are none."""
    began = time.monotonic()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0)
    try:
        with redirect_stdout(sys.stderr):
            found = job()
    except Exception as e:
        found = {"failed": f"{type(e).__name__}: {e}"[:300]}
    return {"row": name, "took": time.monotonic() - began, **found}


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path)
    add("--minutes", type=float, default=8.5, help="for all of it [8.5]")
    add("--only", nargs="+", help="beginnings of rows' names")
    add("--tiny", action="store_true")
    add("--device", default="auto")
    args = parser.parse_args()
    device, _ = pick_device(args.device, "bf16")
    a = Namespace(**TRUE | TINY if args.tiny else TRUE, device=device, dtype="bf16")
    args.out.touch()
    rows = map(json.loads, args.out.read_text().splitlines())
    rows = [row for row in rows if "failed" not in row]
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # as if Ctrl-C was pressed
    signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    known = {row["row"] for row in rows}
    about = {"device": device_name(device), "torch": torch.__version__}
    try:
        for name, job in jobs(a).items():
            if name not in known and name.startswith(tuple(args.only or [""])):
                rows.append(measured(name, job))
                with args.out.open("a") as file:  # closed: a kill loses nothing
                    file.write(json.dumps(rows[-1] | about) + "\n")
    except KeyboardInterrupt:
        print(f"stopped at {name}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    for row in rows:
        figures = [f"{key} {row[key]:.4g}" for key in SHOWN if row.get(key) is not None]
        print(f"{row['row']:28} {row['took']:6.1f} s", *figures, row.get("failed", ""))
    failed = [row["row"] for row in rows if "failed" in row]
    print(f"{len(rows)} rows, {len(failed)} failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
