"""Products with trained weights whose dense gradient never exists, for plain and for int8 weights.

    y = x W^T        dx = dy W        dW = dy^T x

dW is made a group of rows at a time: its selected entries are added to the optimizer's flat
gradient (masked_adamw.py), the rest is dropped at once; autograd itself sees no gradient of W. The
plain twin of all this is F.linear with the hook of masked_adamw.py; the tests compare the two.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F

from allo_mini.mask import Selected, put, take
from allo_mini.quant import dequantize_rows, quantize_rows

# What an int8 weight [O,I] is made of: `weight.int8` (the parameter is a single zero in its shape).
# selected: a Selected; values: the selected entries, exact; chunks: of every chunk of R rows its
# codes, int8 [R,I], and their scale [R, I/block]
Int8 = namedtuple("Int8", "selected values chunks")


def is_quantized(name, shape):
    """Whether --int8 makes a weight int8: the matrices of `linear`, by their names."""
    return len(shape) == 2 and name.endswith(("_proj.weight", "lm_head.weight"))


def to_int8(weight, selected, device):
    """weight [O,I] -> the int8 parameter that stands for it; what is selected stays exact."""
    selected = (selected or Selected.from_dense(torch.zeros_like(weight).bool())).to(device)
    values, chunks = [], []
    for rows, _, index in selected.chunks():
        dense = weight[rows].to(device, copy=True)
        values.append(take(dense, index))
        put(dense, index, torch.zeros(()))  # they widen no block's scale
        chunks.append(quantize_rows(dense))
    zero = chunks[0][0].new_zeros(()).expand_as(weight)
    parameter = torch.nn.Parameter(zero, requires_grad=False)
    parameter.int8 = Int8(selected, torch.cat(values), chunks)
    return parameter


def dense_rows(weight, dtype):
    """Yield (rows, their values): all of a plain weight, an int8 one's chunks in `dtype`."""
    if not hasattr(weight, "int8"):
        yield slice(None), weight.detach()
        return
    selected, values, chunks = weight.int8
    for (rows, entries, index), packed in zip(selected.chunks(), chunks):
        dense = dequantize_rows(*packed, dtype)
        put(dense, index, values[entries])
        yield rows, dense


class Keep(torch.autograd.Function):
    """x [N,I] as it is, kept for dW; `handle` asks for a gradient, where x does not.

    Backward runs Product first, which puts dy [N,O] into the list `later`; then Keep, which has
    both: dW = dy^T x. They are two, since making activations again for backward ends at the last
    tensor that was kept: of a block's last product that is x, and y is not made again.
    """

    @staticmethod
    def forward(ctx, x, handle, slot, later):
        ctx.slot, ctx.later = slot, later
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        x, = ctx.saved_tensors
        dy = ctx.later.pop()
        ctx.slot.add(lambda rows: dy[:, rows].T @ x)
        return dx, None, None, None


class Product(torch.autograd.Function):
    """y = x W^T: x [N,I], W [O,I] -> [N,O]. later: see Keep."""

    @staticmethod
    def forward(ctx, x, weight, later):
        ctx.weight, ctx.later = weight, later
        columns = [x @ dense.T for _, dense in dense_rows(weight, x.dtype)]
        return torch.cat(columns, 1) if columns[1:] else columns[0]

    @staticmethod
    def backward(ctx, dy):
        if ctx.later is not None:
            ctx.later.append(dy)
        dx = None
        for rows, dense in dense_rows(ctx.weight, dy.dtype):
            part = dy[:, rows] @ dense
            dx = part if dx is None else dx.float().add_(part)
        return dx.to(dy.dtype), None, None


def linear(x, weight, bias=None):
    """x [..., I], weight [O,I] -> [..., O]: F.linear, unless the weight is in training, or int8."""
    slot = getattr(weight, "slot", None)
    if slot is None and weight.is_floating_point():
        return F.linear(x, weight, bias)
    flat = x.flatten(0, -2)
    later = None
    if slot:
        later = []
        handle = torch.zeros(1, requires_grad=True)
        flat = Keep.apply(flat, handle, slot, later)
    y = Product.apply(flat, weight, later).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias
