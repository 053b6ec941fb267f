"""Which weights are trained: the exact global top p % of an importance score over all weights of all tensors.

"Neuron" means one scalar weight, as in the paper; norms, biases and embeddings included. The official script
first cuts every tensor to its own top 2p %, so that tensors which move a lot are capped and asking for 5 % can
select 21 % (departure a); here the threshold is global and the count is exact.
"""

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from allo_mini.selection import chunk_of


def bit_patterns(values: Tensor, device=None):
    """Yield |values| as int32 bit patterns, chunk by chunk: for non-negative floats, their order is the bits' order."""
    for chunk in values.detach().reshape(-1).split(chunk_of(device or values.device)):
        bits = chunk.to(device).float().abs().view(torch.int32)
        if bits.numel() and int(bits.max()) >= 0x7F800000:
            raise ValueError("importance holds inf or NaN")
        yield bits


def kth_largest(tensors: list[Tensor], k: int, device=None) -> tuple[int, int]:
    """Radix select: the bit pattern of the k-th largest |value| over all tensors, and how many *equal* ones to take.

    Two streaming passes with a histogram of 65,536 bins each: the upper 16 bits first, then the lower 16 bits of
    the values in the bin where the k-th falls. Exact, and never more than a chunk of memory beyond the inputs.
    Raises ValueError for a value that is inf or NaN.
    """
    def every():
        return (bits for values in tensors for bits in bit_patterns(values, device))

    upper, k = kth_bin(k, (bits >> 16 for bits in every()))
    lower, k = kth_bin(k, (bits[bits >> 16 == upper] & 0xFFFF for bits in every()))
    return upper << 16 | lower, k


def kth_bin(k: int, digits) -> tuple[int, int]:
    """Of many digits below 65,536, tensors of them: the k-th largest, and as which of its equals it is counted."""
    histogram = sum(torch.bincount(d, minlength=1 << 16).cpu() for d in digits)
    above = histogram.flip(0).cumsum(0)  # above[i]: digits in the top i+1 bins
    i = int(torch.searchsorted(above, torch.tensor(k)))
    return 0xFFFF - i, k - (int(above[i - 1]) if i else 0)


def each_selected(importance: dict[str, Tensor], fraction: float | Fraction, device=None, lowest: bool = False):
    """The exact top `fraction` (0..1) of |importance| over all tensors together: yields (name, bool tensor on the CPU).

    floor(fraction * N) weights are selected, in exact arithmetic (0.07 means 7/100; a Fraction is taken as it is); ties
    at the threshold go to the earlier (tensor, flat index). Raises ValueError for a fraction outside (0, 1] or
    non-finite importance. It may lie in a memory-mapped file: two passes count on `device`, a third selects, each
    holding a chunk at a time. lowest: as many of the least important weights instead.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    total = sum(t.numel() for t in importance.values())
    count = math.floor(Fraction(str(fraction)) * total)
    if lowest:  # they are what the top of the others leaves, so that ties go the same way from either end
        count = total - count
    infinite = 0x7F800000  # above every finite value's bits
    threshold, ties = kth_largest(list(importance.values()), count, device) if count else (infinite, 0)
    for name, values in importance.items():
        mask, at = torch.zeros(values.numel(), dtype=torch.bool), 0
        for bits in bit_patterns(values, device):
            equal = (bits == threshold).nonzero().squeeze(1)[:ties].cpu()
            mask[at:at + len(bits)] = bits > threshold
            mask[at + equal] = True
            ties, at = ties - len(equal), at + len(bits)
        yield name, (~mask if lowest else mask).view(values.shape)


def select_neurons(importance: dict[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """each_selected as a dict."""
    return dict(each_selected(importance, fraction))


def selected(mask: dict[str, Tensor]) -> int:
    """How many weights a mask selects."""
    return sum(int(m.sum()) for m in mask.values())


def overlap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Share of the smaller mask's weights that the other one selects too (by chance: the other one's density)."""
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    return both / max(1, min(selected(a), selected(b)))


def layer_of(name: str) -> str:
    """"model.layers.3.mlp.up_proj.weight" -> "3"; anything outside the layers -> its module name ("embed_tokens")."""
    parts = name.split(".")
    return parts[2] if parts[1] == "layers" else parts[-2]


def kind_of(name: str) -> str:
    """"model.layers.3.mlp.up_proj.weight" -> "up_proj"."""
    return name.split(".")[-2]


class PackedMask(Mapping):
    """A mask of 1 bit a weight that unpacks a tensor when asked for it; bits: name -> uint8, shapes: name -> shape."""

    def __init__(self, bits: dict[str, Tensor], shapes: dict[str, list[int]]):
        self.bits, self.shapes = bits, shapes

    def __getitem__(self, name: str) -> Tensor:
        flat = np.unpackbits(self.bits[name].numpy(), count=math.prod(self.shapes[name]))
        return torch.from_numpy(flat.view(bool)).view(self.shapes[name])

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def pack_mask(masks) -> PackedMask:
    """(name, bool tensor) pairs -> PackedMask."""
    bits, shapes = {}, {}
    for name, m in masks:
        bits[name], shapes[name] = torch.from_numpy(np.packbits(m.cpu().numpy().reshape(-1))), list(m.shape)
    return PackedMask(bits, shapes)


def mask_hash(mask: dict[str, Tensor]) -> str:
    """A short fingerprint: equal masks, equal hash."""
    digest = hashlib.sha256()
    for name, m in mask.items():
        digest.update(name.encode() + np.packbits(m.cpu().numpy().reshape(-1)).tobytes())
    return digest.hexdigest()[:16]
