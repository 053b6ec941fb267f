"""A step of MaskedAdamW against a dense mixed-precision AdamW step over the same model.

    python tests/benchmarks/optimizer.py [--shape llama-3.2-1b] [--p 5 10] [--device cuda] [--json FILE]

The dense step is torch.optim.AdamW(fused=True) over fp32 masters with fp32 gradients, then the copy into the working
weights. Ours is MaskedAdamW.step(): update, scatter into the weights, emptying of the gradient buffer. The roofline is
the bytes a step cannot avoid moving over the bandwidth of a large copy, measured in the same run. Every figure is the
best of --repeat. Where the dense state does not fit into memory, it is measured on as many tensors as fit, scaled up,
and marked so.
"""

import sys

import torch
from common import (DTYPES, RandomMask, copy_rate, finish, fresh_process, gb, guarded, make_parser, memory_now,
                    random_model, shapes_of, start, timed)

from allo_mini.optim import MaskedAdamW

BYTES = 18  # of a weight in dense mixed precision: fp32 master, gradient and two moments, the bf16 weight


def dense_step(shape: str, dtype: str, device: str, repeat: int) -> dict:
    """Seconds of torch's fused AdamW and of the copy into the weights, over as much of the model as fits."""
    kind, shapes = DTYPES[dtype], shapes_of(shape)
    room = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 16 << 30
    weights, masters, held = [], [], 0
    for s in shapes.values():
        if held and (held + s.numel()) * BYTES > 0.85 * room:
            continue
        weights.append(torch.zeros(s, dtype=kind, device=device))
        masters.append(torch.zeros(s, device=device, requires_grad=True))
        masters[-1].grad = torch.full(s, 1e-3, device=device)
        held += s.numel()
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)

    def copy():
        torch._foreach_copy_(weights, [m.detach() for m in masters])

    def step():
        optimizer.step()
        copy()

    scale = sum(s.numel() for s in shapes.values()) / held
    return {"seconds": scale * min(timed(step, device, repeat)), "copy_seconds": scale * min(timed(copy, device, repeat)),
            "bytes": round(scale * held * (4 + 8 + 16 + kind.itemsize)), "scaled": scale if scale > 1 else None}


def masked_step(shape: str, dtype: str, device: str, repeat: int, p: float, bits: int, offload: str) -> dict:
    """Seconds of MaskedAdamW.step() and of its parts."""
    model = random_model(shape, DTYPES[dtype], device)
    before = memory_now(device)
    mask = RandomMask({n: w.shape for n, w in model.named_parameters()}, p, device)
    optimizer = MaskedAdamW(model.named_parameters(), mask, 1e-5, state_bits=bits, offload=offload)
    held = memory_now(device) - before
    seconds = min(timed(optimizer.step, device, repeat, before=lambda: optimizer.grad.fill_(1e-3)))
    scatter = min(timed(optimizer.write_back, device, repeat))
    n, size = len(optimizer.master), DTYPES[dtype].itemsize
    positions = sum((s.selection.offsets.nbytes + s.selection.counts.nbytes) if device.startswith("cuda") else 8 * len(s.selection)
                    for s in optimizer.slots if not s.selection.all)
    moved = n * (8 + 8 + (16 if bits == 32 else 4) + size) + positions  # gradient, master, moments, weights
    return {"p": p, "state_bits": bits, "offload": offload, "selected": n, "seconds": seconds, "scatter_seconds": scatter,
            "scatter_share": scatter / seconds, "bytes": moved, "held_bytes": held}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", help="default: llama-3.2-1b on CUDA, smollm2-135m on a CPU")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--p", type=float, nargs="+", default=[5.0, 10.0])
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    device = start(args)
    args.shape = args.shape or ("llama-3.2-1b" if device.startswith("cuda") else "smollm2-135m")
    common = (args.shape, args.dtype, device, args.repeat)
    rate, dense = fresh_process(copy_rate, device), fresh_process(dense_step, *common)
    dense |= {"roofline_seconds": dense["bytes"] / rate}
    rows = [[f"AdamW fused, dense{' (scaled up)' if dense['scaled'] else ''}", f"{1e3 * dense['seconds']:.1f}", "100 %",
             f"{dense['copy_seconds'] / dense['seconds']:.0%}", gb(dense["bytes"]),
             f"{dense['roofline_seconds'] / dense['seconds']:.0%}"]]
    masked = []
    for p, bits, offload in [*((p, 32, "none") for p in args.p), (args.p[0], 8, "none"), (args.p[0], 32, "state")]:
        one = fresh_process(masked_step, *common, p, bits, offload)
        one |= {"of_dense": one["seconds"] / dense["seconds"], "roofline_seconds": one["bytes"] / rate}
        masked.append(one)
        rows.append([f"MaskedAdamW {p:g} %, {bits}-bit moments" + (", state in host memory" if offload == "state" else ""),
                     f"{1e3 * one['seconds']:.1f}", f"{one['of_dense']:.1%}", f"{one['scatter_share']:.0%}", gb(one["bytes"]),
                     f"{one['roofline_seconds'] / one['seconds']:.0%}"])
    finish(args, [f"step of {args.shape}, {args.dtype}", "ms", "of dense", "scatter/copy", "GB moved", "of roofline"], rows,
           [f"copy bandwidth {rate / 1e9:.0f} GB/s. On a CPU, 'state in host memory' changes nothing."],
           copy_bytes_per_s=rate, dense=dense, masked=masked)


if __name__ == "__main__":
    sys.exit(guarded(main))
