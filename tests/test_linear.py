"""linear.py against F.linear and autograd's gradients; quant.py code by code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from allo_mini import mask as mask_module
from allo_mini.linear import linear, to_int8
from allo_mini.mask import Selected
from allo_mini.masked_adamw import FlatGradient, MaskedAdamW
from allo_mini.quant import BLOCK, decode, dequantize_rows, dynamic_map, encode, quantize_rows
from helpers import whole

SHAPES = {"embed": (600, 8), "up": (520, 8), "bias": (520,), "down": (8, 520), "norm": (8,)}
KINDS = {"many": 0.3, "few": 0.003, "all": 1.1, "frozen": 0.1}  # few: most rows hold no entry


def int8_parameter(dense, mask) -> nn.Parameter:
    return to_int8(dense, None if mask is None else Selected.from_dense(mask), "cpu")


def twins(kind, dtype=torch.float32, int8=False):
    """(parameters, twins that autograd trains, mask or None); with int8, up and down are.

    Of kind "frozen" `up` has no selected entry.
    """
    generator = torch.Generator().manual_seed(0)
    ours = {n: (torch.randn(s, generator=generator) * 0.5).to(dtype) for n, s in SHAPES.items()}
    mask = kind and {n: torch.rand(s, generator=generator) < KINDS[kind] for n, s in SHAPES.items()}
    if kind == "frozen":
        mask["up"][:] = False
    for n, dense in ours.items():
        ours[n] = nn.Parameter(dense)
        if int8 and n in ("up", "down"):
            ours[n] = int8_parameter(dense, mask and mask[n])
    return ours, {n: nn.Parameter(whole(p, dtype)) for n, p in ours.items()}, mask


def loss_of(p, step, linear, recompute=False):
    """A block between an embedding and the same matrix as head; ids repeat, so that rows add up."""
    generator = torch.Generator().manual_seed(step)
    ids, target = (torch.randint(0, 600, (n,), generator=generator) for n in (7, 14))

    def block(x):
        return linear(linear(x * p["norm"], p["up"], p["bias"]).tanh(), p["down"])
    x = F.embedding(torch.stack((ids, ids)), p["embed"])
    x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return F.cross_entropy(linear(x, p["embed"]).float().flatten(0, 1), target)


@pytest.fixture(params=["one chunk", "several"])
def chunks(request, monkeypatch):
    if request.param == "several":  # the smallest there are: 256 rows
        monkeypatch.setattr(mask_module, "chunk_of", lambda device: 2048)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("int8, recompute", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_the_gathered_gradient_is_autograds(chunks, kind, int8, recompute, dtype, error):
    """Of an fp32 twin; bias, tied head, three micro-batches; no parameter ever has a .grad."""
    ours, theirs, mask = twins(kind, dtype, int8)
    theirs = {n: nn.Parameter(p.detach().float()) for n, p in theirs.items()}
    flat = FlatGradient(ours.items(), mask)
    for step in range(3):
        loss_of(ours, step, linear, recompute).backward()
        loss_of(theirs, step, F.linear).backward()
        assert all(p.grad is None for p in ours.values())
    grads = {n: p.grad[mask[n]] if mask else p.grad.flatten() for n, p in theirs.items()}
    expected = torch.cat(list(grads.values()))
    assert flat.grad.dtype == torch.float32 and expected.norm() > 1e-2
    assert (flat.grad - expected).norm() < error * expected.norm()


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes (views do not count)."""
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known, made = ({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                        for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
                       for tree in ((args, kwargs), out))
        self.bytes = max([self.bytes, *(made[key] for key in made.keys() - known.keys())])
        return out


@pytest.mark.parametrize("int8", [False, True])
def test_backward_of_a_matrix_makes_no_tensor_of_its_size(monkeypatch, int8):
    """[1024, 32] in chunks of 256 rows. The twin shows that the measure sees a dense gradient."""
    monkeypatch.setattr(mask_module, "chunk_of", lambda device: 256 * 32)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1024, 32, generator=generator)
    mask = torch.rand(1024, 32, generator=generator) < 0.05
    weight = int8_parameter(dense, mask) if int8 else nn.Parameter(dense.clone())
    MaskedAdamW([("w", weight)], {"w": mask})
    x = torch.randn(6, 32, generator=generator).requires_grad_()
    for rows, w, f in ((256, weight, linear), (1024, nn.Parameter(dense), F.linear)):
        y = f(x, w)
        with Largest() as seen:
            y.sum().backward()
        assert seen.bytes == 4 * rows * 32 and (weight.grad is None)


@pytest.mark.parametrize("width", [8, 96, 256, 520, 768])
def test_int8_is_the_rows_quantised_with_the_selected_entries_exact(chunks, width):
    generator = torch.Generator().manual_seed(width)
    dense, mask = (torch.rand(300, width, generator=generator) for _ in range(2))
    mask = mask < 0.2
    dense[mask] *= 100  # what is selected stands out: it must not widen its block
    p = int8_parameter(dense, mask)
    codes, scale = (torch.cat(tensors) for tensors in zip(*p.int8.chunks))
    plain = quantize_rows(dense * ~mask)
    assert torch.equal(codes, plain[0]) and torch.equal(scale, plain[1])
    assert p.shape == dense.shape and p.untyped_storage().nbytes() == 1  # it takes no memory
    expected = dequantize_rows(codes, scale, torch.float32)
    assert torch.equal(whole(p), torch.where(mask, dense, expected))
    assert ((expected - dense).abs() <= scale.max() / 2)[~mask].all() and scale.max() < 0.01


def test_int8_weights_are_trained_where_they_are_kept_exact():
    ours, _, mask = twins("many", int8=True)
    for given in (mask, {**mask, "up": ~mask["up"]}):
        optimizer = MaskedAdamW(ours.items(), given)
        assert len(optimizer.master) == sum(int(m.sum()) for m in mask.values())


# ---- int8 rows, 8-bit moments ------------------------------------------------------------------

def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width, block", [(256, 256), (512, 256), (24, 8), (96, 32), (7, 1)])
def test_rows_are_the_nearest_codes_of_their_blocks(width, block):
    """A block is a power of two that divides the row; the error is at most half a step."""
    weight = noise(16, width) * torch.logspace(-20, 3, 16)[:, None]
    weight[3] = 0
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) == 127
    assert scale.dtype == torch.float32 and scale.shape == (16, width // block)
    step = scale.repeat_interleave(block, 1)
    exact = dequantize_rows(codes, scale, torch.float32)
    assert ((exact - weight).abs() <= step / 2 * 1.0001).all()
    rounded = dequantize_rows(codes, scale, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and not rounded[3].any()
    assert ((rounded.float() - weight).abs() <= step / 2 + weight.abs() * 2.0 ** -7).all()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_moments_come_back_as_the_nearest_codes(size, signed):
    """Over 25 decades; each block by its own scale, each value the closest of 256 codes."""
    table = dynamic_map(signed)
    assert torch.equal(table, table.unique()) and len(table) == 256 and table[-1] == 1
    values = noise(size) * 10.0 ** torch.linspace(-25, 0, size)[noise(size).argsort()]
    values = values if signed else values.abs()
    values[:: 7] = 0
    codes, scale = encode(values, signed)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    assert scale.shape == (-(-size // BLOCK),) and scale.min() > 0
    for block, got in zip(values.split(BLOCK), decode(codes, scale, signed).split(BLOCK)):
        top = block.abs().max().clamp(min=1e-30)
        best = ((block / top)[:, None] - table).abs().argmin(1)
        best = best if signed else best.maximum((block > 0).long())
        torch.testing.assert_close(got, table[best] * top, atol=0, rtol=1e-5)
        assert (got - block).abs().max() <= 0.01 * top
        assert signed or torch.equal(got > 0, block > 0)  # a step is divided by it
