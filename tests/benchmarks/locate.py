"""The exact top p % of as many fp32 values as a 7B model has weights: time and peak memory beyond the inputs.

    python tests/benchmarks/locate.py [--values 6.7e9] [--p 5] [--device cuda] [--json FILE]

The values stand in tensors of one layer's size, on the device or (CUDA: a second row) in host memory, from where they
pass through the device in chunks, as the importance of a model does that does not fit beside its weights. The mask is
packed to 1 bit a weight; its bytes are part of the peak. On a CPU fewer values are the default, and figures scaled to
6.7e9 are marked so.
"""

import sys
import time

import torch
from common import (finish, fresh_process, gb, guarded, make_parser, memory_now, peak_memory, reset_peak, start,
                    status_bytes, wait)

from allo_mini.mask import each_selected, pack_mask

FULL, TENSOR = 6.7e9, 1 << 26


def select(values: int, p: float, device: str, where: str) -> dict:
    """Seconds and peaks of one selection; the values are normal, at another scale in every tensor."""
    sizes = [TENSOR] * (values // TENSOR) + [values % TENSOR] * (values % TENSOR > 0)
    importance = {str(i): torch.empty(n, device=device).normal_(0, 10.0 ** -(i % 5)).to(where) for i, n in enumerate(sizes)}
    pack_mask(each_selected({"warm": torch.rand(1 << 16, device=where)}, p / 100, device))
    wait(device)
    before, host = memory_now(device), status_bytes("VmRSS")
    reset_peak(device)
    reset_peak("cpu")
    began = time.perf_counter()
    mask = pack_mask(each_selected(importance, p / 100, device))
    wait(device)
    seconds = time.perf_counter() - began
    beyond, beyond_host = peak_memory(device)["allocated"] - before, status_bytes("VmHWM") - host
    chosen = sum(int(m.sum()) for m in mask.values())
    return {"where": where, "values": values, "p": p, "seconds": seconds, "selected": chosen, "beyond_bytes": beyond,
            "host_beyond_bytes": beyond_host, "mask_bytes": sum(b.nbytes for b in mask.bits.values())}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--values", type=float, help="default: 6.7e9 on CUDA, 3e8 on a CPU")
    parser.add_argument("--p", type=float, default=5.0)
    args = parser.parse_args()
    device = start(args)
    cuda = device.startswith("cuda")
    args.values = int(args.values or (FULL if cuda else 3e8))
    places = [device, "cpu"] if cuda else [device]
    if cuda and 4 * args.values > 0.9 * torch.cuda.mem_get_info(device)[0]:
        places = ["cpu"]
    rows, found = [], []
    for where in places:
        one = fresh_process(select, args.values, args.p, device, where)
        one["scaled_seconds"] = one["seconds"] * FULL / args.values if args.values < FULL else None
        found.append(one)
        rows.append([f"{args.values:.3g} values on {where}", f"{one['seconds']:.1f}",
                     f"{one['scaled_seconds']:.0f} (scaled)" if one["scaled_seconds"] else "measured",
                     one["selected"], gb(one["beyond_bytes"]), gb(one["host_beyond_bytes"])])
    finish(args, [f"exact top {args.p:g} %", "seconds", "seconds for 6.7e9", "selected", "GB beyond, device", "GB beyond, host"],
           rows, [f"of the host's, {gb(found[0]['mask_bytes'])} GB are the mask itself"], selections=found)


if __name__ == "__main__":
    sys.exit(guarded(main))
