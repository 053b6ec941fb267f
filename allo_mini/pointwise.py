"""What stands between the matrix products and only reads and writes memory: rotary angles, RMSNorm, SwiGLU.

All three keep at most their inputs for backward, a third of a block's memory less than autograd's own graph, and their
gradients are written out, in half its passes over memory, in place where a tensor is not needed again. The twins in the
tests are the formulas under autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i + d/2}) of every head by its angle; x [..., heads, d], cos and sin [..., 1, d]."""
    y = x * cos
    (left, right), (y_left, y_right), (sin_left, sin_right) = (t.chunk(2, -1) for t in (x, y, sin))
    y_left.addcmul_(right, sin_left, value=-1)
    y_right.addcmul_(left, sin_right)
    return y


def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x r, r) with r = 1 / sqrt(mean(x^2) + eps), in fp32 as every reference implementation has it. x [..., H]."""
    y = x.to(torch.float32, copy=True)
    r = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)  # [..., 1]
    return y.mul_(r), r


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps); x [..., H], weight [H]."""
    return weight * normalized(x, eps)[0].to(x.dtype)


def rms_norm_grad(x: Tensor, weight: Tensor, eps: float, dy: Tensor) -> tuple[Tensor, Tensor]:
    """With y = x r and g = weight dy:  dx = r (g - y mean(g y)),  dweight = sum over rows of dy y."""
    y, r = normalized(x, eps)
    dy, weight = dy.to(torch.float32, copy=True), weight.float()
    dyy = dy * y
    mean = (dyy @ weight)[..., None] / weight.numel()  # of g y
    dx = dy.mul_(weight).addcmul_(y, mean, value=-1).mul_(r)
    return dx.to(x.dtype), dyy.flatten(0, -2).sum(0).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


def swiglu_grad(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dgate = dy up silu'(gate), dup = dy silu(gate)."""
    return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


class RotateFunction(torch.autograd.Function):
    """rotate; its gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, -sin), None, None


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
