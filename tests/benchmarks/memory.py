"""Memory of every training stage: the estimate that train.py prints against what was allocated.

    python tests/benchmarks/memory.py [--true llama-2-7b ...] [--memory 24gb 16gb 12gb]

Each stage takes one step on a random model with the settings of --memory and a full micro-batch, on
CUDA under a cap. Without CUDA it is the same code on a pretended GPU (pretend_cuda.py), which meters
tensors' bytes, not kernels' workspaces or fragments: widths, heads and vocabulary are true, but
layers, which are all alike, are few; their difference, times those left out, is added.
"""

import ctypes
import mmap
import os
import sys
import tempfile
from argparse import ArgumentParser
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
from common import (SHAPES, UserError, exit_code, finish, fresh_process, peaks, pick_device,
                    random_pairs, random_run, train, train_steps)

from allo_mini import locate
from allo_mini.data.encoder import Example
from allo_mini.generate import sample
from allo_mini.masked_adamw import FlatGradient
from allo_mini.objectives import dpo_objective, npo_objective, sft_objective
from allo_mini.run import memory

CAPS = {"24gb": 23.0, "16gb": 15.0, "12gb": 11.0}  # GiB: the card less context, desktop, driver
STAGES = {"locate": dpo_objective(0.1), "sft": sft_objective(), "forget": npo_objective(0.1),
          "improve": dpo_objective(0.1, 0.1), "sample": None}  # "rewrite" is as sft
RESPONSE, PROMPT = 1024, 352  # a pair has 2400 tokens, as many as a card's micro-batch
BLOCK = 1 << 26


def hollow(count, *_) -> torch.Tensor:
    """fp32 [count] that stands for a vector in the host's memory: the same 64 MB over and over."""
    libc, size, block = ctypes.CDLL(None), 4 * count, os.memfd_create("hollow")
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [
        ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_size_t]
    os.truncate(block, BLOCK)
    both = mmap.PROT_READ | mmap.PROT_WRITE
    place = libc.mmap(None, size, both, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    for at in range(0, size, BLOCK):  # 16: MAP_FIXED
        libc.mmap(place + at, min(BLOCK, size - at), both, mmap.MAP_SHARED | 16, block, 0)
    return torch.frombuffer((ctypes.c_float * count).from_address(place), dtype=torch.float32)


def one_stage(name: str, layers: int, stage: str, settings: dict, device: str) -> dict:
    """A stage's step with so many of the shape's layers, on CUDA or a pretended one: its peaks."""
    pretended, zeros = nullcontext(), FlatGradient.zeros
    if device == "cpu":
        import pretend_cuda
        pretend_cuda.install()
        pretended = pretend_cuda.Pretend(hollow=True)
        FlatGradient.zeros = lambda self, n: (hollow if self.device == "cpu" else zeros)(n)
        locate.scratch = lambda folder, count: hollow(count)
        train.locate_groups = lambda run: 8
    else:
        cap = CAPS[settings["memory"]] * 2**30 / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap), device)
    SHAPES["cut"] = SHAPES[name] | {"num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as place, pretended:
        whole = random_run(name, settings, "cuda", "bf16", Path(place))
        run = random_run("cut", settings | {"max_steps": 1}, "cuda", "bf16", Path(place))
        run.report_change = lambda name, optimizer, skipped: optimizer.close()
        work(run, stage, slots_of(whole, RESPONSE + 8))
        estimate = sum(memory.estimate(whole, stage, percent_of(whole.cfg, stage)).values())
        return {"estimate": estimate, "layers": layers, "slots": slots_of(whole, 450),
                **peaks("cuda")}


def percent_of(cfg, stage: str) -> float:
    """How many percent of the weights a stage trains."""
    return cfg.p_sft or 100 if stage == "sft" else cfg.p


def slots_of(run, room: int) -> int:
    """How many samples of so many tokens generate.py's Cache runs at once under the cap."""
    c = run.config
    weights = memory.estimate(run, "improve", run.cfg.p)["weights"]
    free = CAPS[run.cfg.memory] * 2**30 - weights
    token = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return min(run.cfg.sample_batch, int(0.7 * free / token / room))


def work(run, stage: str, slots: int) -> None:
    """Let a run take one step of a stage, or sample 8 tokens after each of 4 prompts."""
    vocab, objective = run.config.vocab_size, STAGES[stage]
    if stage == "sample":
        prompts = [prompt for prompt, _ in random_pairs(4, RESPONSE + 1, vocab, RESPONSE)]
        sample(run.load(run.base), prompts, -(-slots // 4), 8, slots=slots)
        return
    examples = [Example(*pair) for pair in random_pairs(1, PROMPT + RESPONSE, vocab, PROMPT)]
    if stage == "locate":
        train.importance_of(run, run.base, lambda: examples, objective, run.cfg.locate)
        return
    if stage != "improve":  # two responses, each after half a prompt
        pairs = random_pairs(2, PROMPT // 2 + RESPONSE, vocab, PROMPT // 2)
        examples = [Example(prompt, [y], [1.0] * RESPONSE) for prompt, [y, _] in pairs]
    train_steps(run, stage, examples, objective, percent_of(run.cfg, stage))


def all_layers(name: str, stage: str, settings: dict, device: str, few: list[int]) -> dict | None:
    """A stage's figures with all of the shape's layers; None when memory runs out."""
    layers = SHAPES[name]["num_hidden_layers"]
    if device != "cpu":
        return fresh_process(one_stage, name, layers, stage, settings, device)
    if len(few) == 1 and few != [layers]:
        raise UserError(f"--few {few[0]}: a line takes two, or all {layers} layers of {name}")
    done = [fresh_process(one_stage, name, each, stage, settings, device) for each in few]
    first, last = done[0], done[-1]
    each = (last["peak_bytes"] - first["peak_bytes"]) / max(1, last["layers"] - first["layers"])
    peak = first["peak_bytes"] + each * (layers - first["layers"])
    return first | {"peak_bytes": peak, "reserved_bytes": 0}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--true", nargs="+", choices=SHAPES, default=["llama-2-7b", "llama-3-8b", "qwen2.5-7b"])
    add("--memory", nargs="+", default=list(CAPS), choices=tuple(CAPS))
    add("--stages", nargs="+", default=list(STAGES), choices=tuple(STAGES))
    add("--few", type=int, nargs="+", default=(2, 4),
        help="layers run on a pretended GPU: two numbers, or all there are")
    args = parser.parse_args()
    device, _ = pick_device("auto", "auto")
    rows = []
    for name, card, stage in product(args.true, args.memory, args.stages):
        one = all_layers(name, stage, {"memory": card}, device, args.few)
        figures = ["-", "out of memory", "-", "-"]
        if one:
            sizes = [one[key] for key in ("estimate", "peak_bytes", "reserved_bytes")]
            figures = [f"{size / 2**30:.2f}" if size else "-" for size in sizes]
            figures.append(f"{sizes[0] / sizes[1] - 1:+.1%}")
            if stage in ("locate", "sample"):  # for which none is printed
                figures[0] = figures[3] = "-"
            if stage == "sample":
                print(f"{name} {card}: {one['slots']} samples of 450 tokens at once")
        rows.append([f"{name} {card}, {stage}", *figures, CAPS[card]])
        print(*rows[-1], flush=True)
    finish(device, ["GiB", "estimate", "peak", "reserved", "estimate / peak", "cap"], rows)


if __name__ == "__main__":
    sys.exit(exit_code(main))
