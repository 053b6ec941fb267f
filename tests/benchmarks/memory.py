"""Memory of every training stage: the estimate that train.py prints against what was allocated.

    python tests/benchmarks/memory.py [--shape llama-2-7b ...] [--card 24gb 16gb 12gb] [--p 5 10]

On CUDA each stage runs on a random model of the shape and one pair of 2 x 1024 tokens under a cap
(23, 15 or 11 GiB for the cards); allocated and reserved are the allocator's peaks. On a CPU micro
shapes run with chunks as small as they are, and the bytes are those of live tensors, metered: they
hold the estimate's terms against what is there, and measure no card.
"""

import sys
import tempfile
import weakref
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
from common import (SHAPES, exit_code, finish, fresh_process, gb, make_parser, peaks, random_pairs,
                    random_run, shape, start, train_steps)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allo_mini import logprobs, mask
from allo_mini.data.encoder import Example
from allo_mini.mask import Selected
from allo_mini.objectives import dpo_objective, npo_objective, sft_objective
from allo_mini.run import memory

MICRO = {"micro-wide": shape("LlamaForCausalLM", 8000, 1024, 2752, 4, 8, 8),
         "micro-vocabulary": shape("LlamaForCausalLM", 30000, 512, 1408, 6, 8, 2)}
SHAPES |= MICRO
CAPS = {"24gb": 23.0, "16gb": 15.0, "12gb": 11.0}  # GiB: the card less context, desktop, driver
OBJECTIVES = {"sft": sft_objective(), "forget": npo_objective(0.1),
              "improve": dpo_objective(0.1, 0.1)}  # "rewrite" is as sft, "warmup" as improve
VARIANTS = ({}, {"recompute": True}, {"int8": True}, {"int8": True, "state_bits": 8, "p_sft": 10},
            {"int8": True, "offload": True, "recompute": True, "p_sft": 10})  # on a CPU
SMALL = 1 << 22  # values of a chunk, and bytes of logits, for micro shapes


class Meter(TorchDispatchMode):
    """`peak` is the most bytes that tensors made inside the block held at one time.

    What a caching allocator would report, on any device; kernels' own scratch is not seen. Inside,
    positions of selected weights are decoded anew every time, as on a GPU.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.sizes = 0, 0, {}

    def __enter__(self):
        self.chunks, Selected.chunks = Selected.chunks, Selected.decode
        return super().__enter__()

    def __exit__(self, *error):
        Selected.chunks = self.chunks
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.take_in(tensor.untyped_storage())
        return out

    def take_in(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes and storage.device.type != "meta":
            self.sizes[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.let_go, key)

    def let_go(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def one_stage(name: str, stage: str, settings: dict, dtype: str, device: str, tokens: int) -> dict:
    """Train one step of a stage on a pair of 2 x `tokens` tokens; estimate and peaks in bytes."""
    [(prompt, [chosen, rejected])] = random_pairs(1, tokens, SHAPES[name]["vocab_size"])
    example = Example(prompt, [chosen], [1.0] * len(chosen))
    if stage == "improve":
        example = Example(prompt, [chosen, rejected])
    settings = settings | {"micro_tokens": logprobs.size_of(example), "max_steps": 1}
    meter = None if device.startswith("cuda") else Meter()
    if meter:  # chunks as small as the models
        mask.CHUNK = SMALL << 4  # of which a CPU takes a sixteenth
        memory.CHUNK = memory.HEAD_BYTES = SMALL
        logprobs.head_logps.__defaults__ = (SMALL,)
    else:
        cap = CAPS[settings["memory"]] * 2**30 / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap), device)
    with tempfile.TemporaryDirectory() as place:
        run = random_run(name, settings, device, dtype, Path(place))
        percent = memory.percent_of(run.cfg, stage)
        estimate = sum(memory.estimate(run, stage).values())
        with meter or nullcontext():
            optimizer = train_steps(run, stage, [example], OBJECTIVES[stage], percent)
    found = peaks(device)
    if meter:  # but for what would stand in the host's memory
        offload = run.cfg.offload
        state = optimizer.state_dict() if offload else {"start": optimizer.start}
        host = sum(x.nbytes for x in state.values()) + optimizer.grad.nbytes * offload
        found = {"peak_bytes": meter.peak - host, "reserved_bytes": 0}
    return {"estimate": estimate, **found, "ratio": found["peak_bytes"] / estimate}


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES)
    add("--card", nargs="+", default=list(CAPS), choices=tuple(CAPS))
    add("--p", type=float, nargs="+", default=[5.0, 10.0])
    add("--tokens", type=int, default=1024, help="of each of a pair's sequences")
    args = parser.parse_args()
    names, dtype, variants = args.shape or MICRO, "fp32", VARIANTS
    if start(args):
        names, dtype = args.shape or ("llama-2-7b", "llama-3-8b", "qwen2.5-7b"), "bf16"
        variants = [{"memory": card} for card in args.card]
    rows, done = [], []
    for name, p, variant, stage in product(names, args.p, variants, OBJECTIVES):
        settings = {"p": p, **variant}
        one = fresh_process(one_stage, name, stage, settings, dtype, args.device, args.tokens)
        done.append({"shape": name, "stage": stage, "settings": settings, **(one or {})})
        figures = ["-", "out of memory", "-", "-"]
        if one:
            figures = [gb(one[key]) for key in ("estimate", "peak_bytes", "reserved_bytes")]
            figures.append(f"{one['ratio']:.3f}")
        words = " ".join(f"{key}={value}" for key, value in settings.items())
        rows.append([f"{name}, {stage}", words, *figures])
    finish(args, ["GB", "settings", "estimate", "peak", "reserved", "of estimate"], rows,
           stages=done)


if __name__ == "__main__":
    sys.exit(exit_code(main))
