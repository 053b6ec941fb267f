"""What stands between the matrix products and only reads and writes memory: rotary angles, RMSNorm, SwiGLU.

RMSNorm and SwiGLU keep their inputs alone for backward, a third of a block's memory less than autograd's own graph, and
their gradients are written out, in half its passes over memory. The twins in the tests are the formulas under autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i + d/2}) of every head by its angle; x [..., heads, d], cos and sin [..., 1, d]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x r, r) with r = 1 / sqrt(mean(x^2) + eps), in fp32 as every reference implementation has it. x [..., H]."""
    y = x.float()
    r = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)  # [..., 1]
    return y * r, r


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps); x [..., H], weight [H]."""
    return weight * normalized(x, eps)[0].to(x.dtype)


def rms_norm_grad(x: Tensor, weight: Tensor, eps: float, dy: Tensor) -> tuple[Tensor, Tensor]:
    """With y = x r and g = weight dy:  dx = r (g - y mean(g y)),  dweight = sum over rows of dy y."""
    y, r = normalized(x, eps)
    g = (weight * dy).float()
    dx = (g - y * (g * y).mean(-1, keepdim=True)) * r
    return dx.to(x.dtype), (dy * y.to(x.dtype)).flatten(0, -2).sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


def swiglu_grad(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dgate = dy up silu'(gate), dup = dy silu(gate)."""
    return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


class RMSNormFunction(torch.autograd.Function):
    """rms_norm with the gradient above."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, dy):
        return *rms_norm_grad(*ctx.saved_tensors, ctx.eps, dy), None


class SwiGLUFunction(torch.autograd.Function):
    """swiglu with the gradient above."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx, dy):
        return swiglu_grad(*ctx.saved_tensors, dy)


def compile_pointwise() -> None:
    """Let torch.compile fuse each of these into one pass (--compile); they compute the same."""
    for name in ("rotate", "rms_norm", "rms_norm_grad", "swiglu", "swiglu_grad"):
        globals()[name] = torch.compile(globals()[name], dynamic=True)
