"""Which weights are trained: the exact global top p % of an importance score over all weights of all tensors.

"Neuron" means one scalar weight, as in the paper; norms, biases and embeddings included. The official script
first cuts every tensor to its own top 2p %, so that tensors which move a lot are capped and asking for 5 % can
select 21 % (departure a); here the threshold is global and the count is exact.
"""

import hashlib
import json
import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 24  # values looked at in one go: 64 MB of fp32


def bit_patterns(values: Tensor):
    """Yield |values| as int32 bit patterns, chunk by chunk: for non-negative floats, their order is the bits' order."""
    for chunk in values.detach().reshape(-1).split(CHUNK):
        bits = chunk.float().abs().view(torch.int32)
        if bits.numel() and int(bits.max()) >= 0x7F800000:
            raise ValueError("importance holds inf or NaN")
        yield bits


def kth_largest(tensors: list[Tensor], k: int) -> tuple[int, int]:
    """Radix select: the bit pattern of the k-th largest |value| over all tensors, and how many *equal* ones to take.

    Two streaming passes with a histogram of 65,536 bins each: the upper 16 bits first, then the lower 16 bits of
    the values in the bin where the k-th falls. Exact, and never more than a chunk of memory beyond the inputs.
    """
    def bin_of_kth(histogram: Tensor, k: int) -> tuple[int, int]:
        above = histogram.flip(0).cumsum(0)  # above[i]: values in the top i+1 bins
        i = int(torch.searchsorted(above, torch.tensor(k)))
        return len(histogram) - 1 - i, k - (int(above[i - 1]) if i else 0)

    def histogram(select) -> Tensor:
        total = torch.zeros(1 << 16, dtype=torch.int64)
        for values in tensors:
            for bits in bit_patterns(values):
                total += torch.bincount(select(bits), minlength=1 << 16).cpu()
        return total

    high, k = bin_of_kth(histogram(lambda bits: bits >> 16), k)
    low, k = bin_of_kth(histogram(lambda bits: bits[bits >> 16 == high] & 0xFFFF), k)
    return high << 16 | low, k


def select_neurons(importance: dict[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """The exact top `fraction` (0..1) of |importance| over all tensors together -> bool tensors of the same shapes.

    floor(fraction * N) weights are selected, in exact arithmetic (0.07 means 7/100); ties at the threshold go to
    the earlier (tensor, flat index). Raises ValueError for a fraction outside (0, 1] or non-finite importance.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    count = math.floor(Fraction(repr(float(fraction))) * sum(t.numel() for t in importance.values()))
    if count == 0:
        return {name: torch.zeros_like(t, dtype=torch.bool) for name, t in importance.items()}
    threshold, ties = kth_largest(list(importance.values()), count)
    mask = {}
    for name, values in importance.items():
        picked = []
        for bits in bit_patterns(values):
            above, equal = bits > threshold, bits == threshold
            if (here := int(equal.sum())) > ties:
                equal &= equal.cumsum(0) <= ties
            ties -= min(ties, here)
            picked.append(above | equal)
        mask[name] = torch.cat(picked).view(values.shape) if picked else torch.zeros_like(values, dtype=torch.bool)
    return mask


def selected(mask: dict[str, Tensor]) -> int:
    """How many weights a mask selects."""
    return sum(int(m.sum()) for m in mask.values())


def overlap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Share of the smaller mask's weights that the other one selects too (by chance: the other one's density)."""
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    return both / max(1, min(selected(a), selected(b)))


def density_by(mask: dict[str, Tensor], key) -> dict[str, float]:
    """Selected share per group; `key(name)` names the group (a layer, a kind of matrix)."""
    hits, sizes = {}, {}
    for name, m in mask.items():
        hits[key(name)] = hits.get(key(name), 0) + int(m.sum())
        sizes[key(name)] = sizes.get(key(name), 0) + m.numel()
    return {group: hits[group] / sizes[group] for group in sizes}


def layer_of(name: str) -> str:
    """"model.layers.3.mlp.up_proj.weight" -> "3"; anything outside the layers -> its module name ("embed_tokens")."""
    parts = name.split(".")
    return parts[2] if parts[1] == "layers" else parts[-2]


def kind_of(name: str) -> str:
    """"model.layers.3.mlp.up_proj.weight" -> "up_proj"."""
    return name.split(".")[-2]


def pack_mask(mask: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata for a mask file of 1 bit a weight (safetensors; shapes in the metadata)."""
    bits = {n: torch.from_numpy(np.packbits(m.cpu().numpy().reshape(-1))) for n, m in mask.items()}
    return bits, {"format": "allo_mini mask", "shapes": json.dumps({n: list(m.shape) for n, m in mask.items()})}


def unpack_mask(bits: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """The inverse of pack_mask. Raises ValueError when the file does not hold a mask or contradicts itself."""
    if metadata.get("format") != "allo_mini mask":
        raise ValueError("not an allo_mini mask file")
    shapes = json.loads(metadata.get("shapes", "null"))
    if not isinstance(shapes, dict) or not all(isinstance(s, list) and all(type(d) is int and d >= 0 for d in s)
                                               for s in shapes.values()):
        raise ValueError("the mask's shapes are missing or broken")
    if set(shapes) != set(bits):
        raise ValueError("the mask's names and shapes do not agree")
    mask = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        if bits[name].dtype != torch.uint8 or bits[name].numel() != (size + 7) // 8:
            raise ValueError(f"{name} has {bits[name].numel()} bytes, expected {(size + 7) // 8}")
        flat = np.unpackbits(bits[name].numpy(), count=size).astype(bool)
        mask[name] = torch.from_numpy(flat).view(shape)
    return mask


def mask_hash(mask: dict[str, Tensor]) -> str:
    """A short fingerprint: equal masks, equal hash."""
    digest = hashlib.sha256()
    for name, m in mask.items():
        digest.update(name.encode() + np.packbits(m.cpu().numpy().reshape(-1)).tobytes())
    return digest.hexdigest()[:16]
