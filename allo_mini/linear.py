"""Products with trained weights whose dense gradient never exists, for plain and for int8 weights.

    y = x W^T        dx = dy W        dW = dy^T x

dW is made a group of rows at a time: its selected entries are added to the optimizer's flat buffer (optim.py) and the
rest is dropped at once; autograd itself sees no gradient of W. The plain twin of all this is F.linear with the
post-accumulate hook of optim.py, and the tests compare the two.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allo_mini.selection import Selection, chunk_of, put, take
from allo_mini.quant import dequantize_rows, quantize_rows


@dataclass
class Int8:
    """What an int8 weight [O,I] is made of. The parameter itself is a single zero in its shape."""
    selection: Selection
    values: Tensor  # [selected entries], exact
    parts: list[tuple[Tensor, Tensor]]  # of every chunk of rows: codes int8 [R, I], scale fp32 [R, I / block]


def is_quantized(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is int8 under --int8: every matrix but the embedding, which is read a row at a time."""
    return len(shape) == 2 and "embed_tokens" not in name


def to_int8(weight: Tensor, mask: Tensor | None, device, stream: bool = False) -> tuple[Tensor, Int8]:
    """weight [O,I] -> (what stands for it in the model, what it is made of); entries in `mask` (bool [O,I]) stay exact.

    stream: the codes stay in host memory.
    """
    mask = torch.zeros(weight.shape, dtype=torch.bool) if mask is None else mask
    int8 = Int8(Selection(weight.shape, mask, device), weight[mask].to(device), [])
    for rows, _, _ in int8.selection.chunks():
        codes, scale = quantize_rows(weight[rows].to(device), mask[rows].to(device))
        if stream and codes.is_cuda:
            codes = torch.empty(codes.shape, dtype=torch.int8, pin_memory=True).copy_(codes)
        int8.parts.append((codes, scale))
    return torch.zeros(1, 1, dtype=torch.int8, device=device).expand(weight.shape), int8


def dense_rows(weight: Tensor, dtype: torch.dtype):
    """Yield (row slice, dense rows in `dtype`) of a weight: all rows if it is plain, dequantised chunks if int8."""
    int8 = getattr(weight, "int8", None)
    if int8 is None:
        yield slice(0, weight.shape[0]), weight.detach().to(dtype)
        return
    for (rows, entries, index), (codes, scale) in zip(int8.selection.chunks(), int8.parts):
        dense = dequantize_rows(codes.to(scale.device, non_blocking=True), scale, dtype)  # moved if it is streamed
        put(dense, index, int8.values[entries])
        yield rows, dense


def slow_bf16(x: Tensor) -> bool:
    """Whether x is bf16 on a CPU without bf16 units: there a product through fp32 is about seven times as fast."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class MaskedLinear(torch.autograd.Function):
    """y = x W^T. x [N,I], W [O,I] -> [N,O]. `handle` stands in for an int8 W, which itself cannot need a gradient."""

    @staticmethod
    def forward(ctx, x, weight, handle):
        ctx.weight, ctx.dtype = weight, torch.float32 if slow_bf16(x) else x.dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None)  # dx alone does not need x
        parts = [x.to(ctx.dtype) @ dense.T for _, dense in dense_rows(weight, ctx.dtype)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,), weight, dx = ctx.saved_tensors, ctx.weight, None
        kind, dy = dy.dtype, dy.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            for rows, dense in dense_rows(weight, ctx.dtype):
                part = dy[:, rows] @ dense
                dx = part if dx is None else dx.float() + part
            dx = dx.to(kind)
        if x is not None:
            x = x.to(ctx.dtype)
            for rows, entries, index in weight.slot.selection.chunks():
                if entries.stop > entries.start:
                    weight.slot.add(entries, take(dy[:, rows].T @ x, index))
        return dx, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O,I] -> [..., O]: F.linear, unless the weight is trained by a FlatGradient, or is int8."""
    slot = getattr(weight, "slot", None)
    if slot is None and weight.is_floating_point() and (weight.requires_grad or not slow_bf16(x)):
        return F.linear(x, weight, bias)
    y = MaskedLinear.apply(x.flatten(0, -2), weight, None if slot is None else slot.handle).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class MaskedEmbedding(torch.autograd.Function):
    """Rows of W [V,H] for ids [N] -> [N,H]. Of its gradient only selected entries of the ids' own rows are read."""

    @staticmethod
    def forward(ctx, ids, weight):
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        (ids,), slot = ctx.saved_tensors, ctx.weight.slot
        if slot.selection.all:
            slot.add_at(ids, dy)
            return None, None
        ends, columns, most = slot.by_row
        reach = torch.arange(most, device=ids.device)
        step = max(1, chunk_of(ids.device) // (8 * most))  # an entry takes eight times the bytes of a value here
        for ids, dy in zip(*(x.split(step) for x in (ids, dy))):
            # [n,most]: of each row as many entries as the fullest one has; those beyond its own end are not real
            entries = ends[ids, None] + reach
            real = entries < ends[ids + 1, None]
            entries = entries.clamp(max=len(columns) - 1)
            values = torch.where(real, dy.gather(1, columns[entries].long()).float(), 0.0)
            slot.add_at(entries.flatten(), values.flatten())
        return None, None


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids [...] -> [..., H]: F.embedding, unless the weight is trained by a FlatGradient."""
    if getattr(weight, "slot", None) is None:
        return F.embedding(ids, weight)
    return MaskedEmbedding.apply(ids.flatten(), weight).unflatten(0, ids.shape)
