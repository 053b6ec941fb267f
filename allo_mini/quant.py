"""8-bit storage: int8 weights with exact selected entries, and 8-bit optimizer moments.

Both are blockwise: neighbouring values share one fp32 scale, their largest magnitude (Dettmers et
al. 2021, arXiv 2110.02861). Weights use blocks along a row and evenly spaced codes; moments, whose
values span many powers of ten, use blocks of 256 and the codes of a dynamic map.
"""

import math
from functools import lru_cache

import torch
from torch.nn.functional import pad

BLOCK = 256


# ---- weights -----------------------------------------------------------------------------------

def quantize_rows(weight):
    """weight [R,I] -> (codes int8 [R,I], scale fp32 [R, I/block]) with weight ~ codes * scale.

    A block is the largest power of two up to 256 that divides I, so that none straddles two rows.
    """
    block = math.gcd(weight.shape[1], BLOCK)
    blocks = weight.float().unflatten(1, (-1, block))  # [R, I/block, block]
    scale = blocks.abs().amax(-1).clamp(min=1e-30) / 127
    return (blocks / scale[..., None]).round_().to(torch.int8).flatten(1), scale


def dequantize_rows(codes, scale, dtype):
    """The inverse, in `dtype`: codes [R,I], scale [R, I/block] -> [R,I]."""
    blocks = codes.unflatten(1, (scale.shape[1], -1))
    return (blocks * scale[..., None].to(dtype)).flatten(1)  # no copy of the codes in `dtype`


# ---- optimizer moments -------------------------------------------------------------------------

@lru_cache
def dynamic_map(signed):
    """256 ascending codes in [-1, 1] or [0, 1], dense near 0: a decade has half the next one's."""
    top = 6 if signed else 7
    values = []
    for decade in range(top + 1):
        count = 2**decade  # of equal steps from 0.1 to 1; a code is the middle of one
        values += [10.0 ** (decade - top) * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
    if signed:
        values += [-value for value in values]
    else:
        values.pop()  # the largest: 1 takes its place
    return torch.tensor(sorted([*values, 0.0, 1.0]))


def encode(values, signed):
    """values [n] fp32 -> (codes uint8 [n], scale fp32 [ceil(n / 256)]).

    What is not zero never becomes zero in the unsigned form: it holds sqrt(v), by which a step is
    divided. (Storing v itself spans twice the decades: small v would vanish and blow a step up a
    thousandfold.)
    """
    table = dynamic_map(signed).to(values.device)
    between = (table[1:] + table[:-1]) / 2
    blocks = pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1).clamp(min=1e-30)
    codes = torch.bucketize(blocks / scale[:, None], between, out_int32=True)
    if not signed:
        codes = codes.maximum((blocks > 0).int())
    return codes.byte().view(-1)[:len(values)], scale


def decode(codes, scale, signed):
    """The inverse of encode: [n] fp32."""
    table = dynamic_map(signed).to(codes.device)
    return table.index_select(0, codes.int()) * scale.repeat_interleave(BLOCK)[:len(codes)]
