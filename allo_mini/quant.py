"""8-bit storage: int8 weights with exact selected entries, and 8-bit optimizer moments.

Both are blockwise: neighbouring values share one fp32 scale, their largest magnitude (Dettmers et al. 2021,
arXiv 2110.02861). Weights use blocks along a row and evenly spaced codes; moments, whose values span many powers
of ten, use blocks of 256 and the codes of a dynamic map.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


# ---- weights -----------------------------------------------------------------------------------------------

def quantize_rows(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [O,I] -> (codes int8 [O,I], scale fp32 [O, I / block]) with weight ~ codes * scale.

    Entries selected by `mask` (bool [O,I]) do not widen a block's scale: their exact values are kept elsewhere.
    A block is the largest power of two up to 256 that divides I, so that none straddles two rows.
    """
    blocks = weight.float().unflatten(1, (-1, math.gcd(weight.shape[1], BLOCK)))  # [O, I/block, block]
    if mask is not None:
        blocks = blocks.masked_fill(mask.view(blocks.shape), 0.0)
    scale = blocks.abs().amax(-1).clamp(min=1e-30) / 127
    return (blocks / scale[..., None]).round_().to(torch.int8).flatten(1), scale


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, in `dtype`: codes [R,I], scale [R, I / block] -> [R,I]."""
    blocks = codes.unflatten(1, (scale.shape[1], -1))
    return (blocks.to(dtype) * scale[..., None].to(dtype)).flatten(1)


# ---- optimizer moments -------------------------------------------------------------------------------------

@lru_cache
def dynamic_map(signed: bool) -> Tensor:
    """256 ascending codes in [-1, 1] or [0, 1], dense near zero: each decade has half the codes of the one above."""
    bits, values = (7 if signed else 8), [0.0]
    for decade in range(bits):
        edges = torch.linspace(0.1, 1, 2 ** (bits - 1 - decade) + 1, dtype=torch.float64)
        values += ((edges[1:] + edges[:-1]) / 2 * 10.0**-decade).tolist()
    if signed:
        values += [1.0, *(-v for v in values[1:])]
    else:
        values[values.index(max(values))] = 1.0
    return torch.tensor(sorted(values), dtype=torch.float32)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """values [n] fp32 -> (codes uint8 [n], scale fp32 [ceil(n / 256)]).

    What is not zero never becomes zero in the unsigned form: it holds sqrt(v), by which a step is divided. (Storing v
    itself spans twice the decades: small v would vanish and blow a step up a thousandfold.)
    """
    table = dynamic_map(signed).to(values.device)
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1).clamp(min=1e-30)
    codes = torch.bucketize(blocks / scale[:, None], (table[1:] + table[:-1]) / 2)
    if not signed:
        codes = codes.maximum((blocks > 0).to(codes.dtype))
    return codes.to(torch.uint8).view(-1)[:len(values)], scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The inverse of encode: [n] fp32."""
    table = dynamic_map(signed).to(codes.device)
    return table.index_select(0, codes.int()) * scale.repeat_interleave(BLOCK)[:len(codes)]
