"""linear.py, quant.py, masked_adamw.py: by autograd, code by code, by the official numbers."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, golden, random_mask, whole
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from allo_mini import mask as mask_module
from allo_mini.linear import is_quantized, linear, to_int8
from allo_mini.mask import Selected, to_tensors
from allo_mini.masked_adamw import FlatGradient, MaskedAdamW, cosine_lr
from allo_mini.patch import begin_at
from allo_mini.quant import BLOCK, decode, dequantize_rows, dynamic_map, encode, quantize_rows
from allo_mini.run.files import save_tensors

SHAPES = {"embed": (600, 8), "up": (520, 8), "bias": (520,), "down": (8, 520), "norm": (8,)}
KINDS = {"many": 0.3, "few": 0.003, "all": 1.1, "frozen": 0.1}  # few: most rows hold no entry


def int8_parameter(dense, mask) -> nn.Parameter:
    return to_int8(dense, None if mask is None else Selected.from_dense(mask), "cpu")


def twins(kind, dtype=torch.float32, int8=False):
    """(parameters, twins that autograd trains, mask or None); with int8, up and down are. Of kind
    "frozen" `up` has no selected entry."""
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


class Watch(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes (views do not count), and the
    number of matrix products."""
    bytes = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
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
        with Watch() as seen:
            y.sum().backward()
        assert seen.bytes == 4 * rows * 32 and (weight.grad is None)


@pytest.mark.parametrize("recompute, products", [(False, 9), (True, 10)])
def test_recomputation_leaves_out_a_blocks_last_product(recompute, products):
    """Of up, down and the head: y, dx and dW; again up's y alone."""
    ours, _, mask = twins("many")
    FlatGradient(ours.items(), mask)
    with Watch() as seen:
        loss_of(ours, 0, linear, recompute).backward()
    assert seen.products == products


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
    with pytest.raises(ValueError, match="up is in 8 bits but for the entries of another mask"):
        MaskedAdamW(ours.items(), {**mask, "up": ~mask["up"]})
    optimizer = MaskedAdamW(ours.items(), mask)
    assert len(optimizer.master) == sum(int(m.sum()) for m in mask.values())
    with pytest.raises(ValueError, match="is in an optimizer already"):  # it would get no gradient
        MaskedAdamW(ours.items(), mask)


def test_what_a_fork_reads_by_rows_is_not_made_int8():
    matrices = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    names = [f"model.layers.0.{name}.weight" for name in matrices] + ["lm_head.weight"]
    assert all(is_quantized(name, (8, 8)) for name in names)
    others = "model.embed_tokens.weight", "wpe.weight", "model.layers.0.q_proj.bias"
    assert not any(is_quantized(name, (8, 8)) for name in others)


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


# ---- the optimizer -------------------------------------------------------------------------------

def net(dtype=torch.float32, *more):
    torch.manual_seed(0)
    layers = nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers, *more).to(dtype)


def distance(model, step=0, rows=slice(None)):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (8, 5), generator=generator)
    targets = torch.randn(8, 5, 3, generator=generator)
    return (model(ids[rows]).float() - targets[rows]).square().sum() / 8


def train(model, optimizer, steps):
    for step in steps:
        optimizer.lr = cosine_lr(step, 6, 3e-2, 0.5)
        distance(model, step).backward()
        optimizer.clip(1.0)
        optimizer.step()


def test_equals_the_official_masked_adamw():
    """It adds eps before bias correction (departure h): less than 2e-5 in five steps of 1e-2."""
    data = golden("masked_adamw")
    parameters = {f"p{i}": nn.Parameter(data[f"p{i}.init"].clone()) for i in range(3)}
    mask = {n: data[f"{n}.mask"].bool() for n in parameters}
    optimizer = MaskedAdamW(parameters.items(), mask, lr=1e-2)
    for t in range(5):
        sum((p * data[f"{n}.grad{t}"]).sum() for n, p in parameters.items()).backward()
        optimizer.step()
        for n, p in parameters.items():
            assert torch.equal(p[~mask[n]], data[f"{n}.init"][~mask[n]])
            torch.testing.assert_close(p.detach(), data[f"{n}.after{t}"], atol=2e-5, rtol=0)
    assert float(optimizer.moved().max()) > 2e-2


@pytest.mark.parametrize("decay, all_true", [(0.0, False), (0.3, False), (0.3, True)])
def test_full_mask_is_torch_adamw(decay, all_true):
    """20 steps with a moving rate, mask None or all True; a tiny gradient shows eps's place."""
    ours, theirs = net(), net()
    mask = random_mask(ours, share=2.0) if all_true else None
    mine = MaskedAdamW(ours.named_parameters(), mask, weight_decay=decay)
    torchs = torch.optim.AdamW(theirs.parameters(), weight_decay=decay)
    for step in range(20):
        mine.lr = torchs.param_groups[0]["lr"] = cosine_lr(step, 20, 1e-2, 0.2)
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            (distance(model, step) * (1e-6 if step < 10 else 1)).backward()
            optimizer.step()
        torchs.zero_grad()
    assert_close(ours.state_dict(), theirs.state_dict(), atol=2e-6, rtol=1e-5)
    assert float(mine.moved().max()) > 1e-2


def test_backward_gathers_what_is_selected_and_leaves_no_dense_gradient():
    """In four micro-batches as in one; close() undoes everything; masks that do not fit."""
    model, twin = net(), net()
    mask = random_mask(model)
    for bad, says in ({**mask, "1.weight": mask["1.weight"].t()}, "1.weight"), ({}, "0.weight"):
        with pytest.raises(ValueError, match=says):
            MaskedAdamW(net().named_parameters(), bad)
    mask["1.weight"][:] = False
    optimizer = MaskedAdamW(model.named_parameters(), mask)
    for i in range(4):
        distance(model, 0, slice(2 * i, 2 * i + 2)).backward()
    distance(twin).backward()
    assert all(p.grad is None for p in model.parameters())
    wanted = torch.cat([p.grad[mask[n]] for n, p in twin.named_parameters()])
    assert len(optimizer.master) == len(optimizer.exp_avg) == len(wanted)
    torch.testing.assert_close(optimizer.grad, wanted)
    assert optimizer.clip(10.0) == optimizer.clip(0.1) == pytest.approx(float(wanted.norm()))
    torch.testing.assert_close(optimizer.grad, wanted * 0.1 / wanted.norm())
    optimizer.step()
    optimizer.close()
    distance(model).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert not optimizer.grad.any()


def test_the_norm_of_a_long_gradient_is_no_smaller_than_it_is():
    """torch's own sums in fp32, in order: 0.2 % are lost of so many."""
    generator = torch.Generator().manual_seed(0)
    held = SimpleNamespace(grad=torch.randn(30_000_000, generator=generator))
    assert MaskedAdamW.clip(held, 1e9) == pytest.approx(30_000_000 ** 0.5, rel=5e-4)


def test_bf16_weights_take_steps_too_small_for_bf16():
    """100 steps of 1e-4 at 1.0: each is lost in bf16 (spacing 3.9e-3), but not in the master."""
    p = nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16))
    optimizer = MaskedAdamW([("p", p)], lr=1e-4)
    for step in range(100):
        (p * 2).sum().backward()
        optimizer.step()
        assert step or (torch.equal(p, torch.ones_like(p)) and (optimizer.master < 1).all())
    moved = optimizer.shaped(optimizer.moved())
    assert_close(moved, {"p": torch.full((2, 4), 0.01)}, atol=1e-5, rtol=0)
    assert torch.equal(p.flatten(), optimizer.master.bfloat16()) and (p < 1).all()
    assert float(optimizer.moved().max()) == pytest.approx(1e-2, rel=1e-3)
    optimizer.master[3] = math.nan
    assert math.isnan(float(optimizer.moved().max()))


@pytest.mark.parametrize("first, second", [(0.5, 0.4), (None, None), (0.5, None), (None, 0.5)])
def test_the_next_stage_goes_on_from_the_fp32_weights(tmp_path, first, second):
    """Where both masks select, the masters; elsewhere, the weights as they are stored."""
    model = net(torch.bfloat16)
    first, second = (share and random_mask(model, share) for share in (first, second))
    one = MaskedAdamW(model.named_parameters(), first)
    train(model, one, range(1))
    selected, values = one.selected_weights()
    save_tensors(to_tensors(selected, values), tmp_path / "exact")
    one.close()
    two = MaskedAdamW(model.named_parameters(), second)
    stored = two.master.clone()
    begin_at(two, tmp_path / "exact")
    for slot in two.slots:
        wanted = slot.p.detach().float()
        selected[slot.name].scatter(wanted, values[slot.name])
        assert torch.equal(two.master[slot.where], slot.selected.gather(wanted))
    assert (two.master != stored).float().mean() > 0.2 and torch.equal(two.start, two.master)


@pytest.mark.parametrize("noise, bound", [(False, 2), (True, 8)])
def test_8_bit_moments_do_not_blow_a_step_up(noise, bound):
    """A block whose gradients span 12 decades. (Storing v, not its root: 100 times too large.)"""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (-12 * torch.rand(256, generator=generator))
    largest = {32: 0.0, 8: 0.0}
    for bits in largest:
        p = nn.Parameter(torch.zeros(256))
        optimizer = MaskedAdamW([("p", p)], lr=1, eps=1e-20, state_bits=bits)
        for _ in range(30):
            before = optimizer.master.clone()
            optimizer.grad.copy_(size * (torch.randn(256, generator=generator) if noise else 1))
            optimizer.step()
            largest[bits] = max(largest[bits], float((optimizer.master - before).abs().max()))
    assert 0 < largest[8] <= bound * largest[32] < math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_slices_host_memory_and_going_on_change_no_bit(monkeypatch, tmp_path, dtype, bits):
    """Slices of 256 weights, the last cut short; 3 steps, state to a file, 3 more."""
    def fresh(chunk, bits=bits, **settings):
        monkeypatch.setattr(mask_module, "CHUNK", chunk)  # a CPU's slice is a 64th of it
        model = net(dtype, nn.Linear(3, 300), nn.Linear(300, 3))
        return model, MaskedAdamW(model.named_parameters(), random_mask(model, 0.7),
                                  weight_decay=0.1, state_bits=bits, **settings)

    model, optimizer = fresh(1 << 24)
    train(model, optimizer, range(6))
    first, middle = fresh(256 << 6, offload=True)
    assert len(middle.master) > 3 * 256 and len(middle.master) % 256
    train(first, middle, range(3))
    save_file(middle.state_dict(), tmp_path / "state")
    again, restored = fresh(256 << 6, offload=True)
    restored.load_state_dict(load_file(tmp_path / "state"))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))
    train(again, restored, range(3, 6))
    assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert_close(restored.state_dict(), optimizer.state_dict(), atol=0, rtol=0)
    model, exact = fresh(1 << 24, bits=32)
    train(model, exact, range(6))
    off = optimizer.master - exact.master
    assert float(off.norm() / (exact.master - exact.start).norm()) < (0.2 if bits == 8 else 1e-6)


@pytest.mark.parametrize("total, share", [(1, 0.1), (2, 0.5), (10, 0.0), (100, 0.03), (5, 1.0)])
def test_cosine_rises_linearly_then_falls_to_nearly_zero(total, share):
    up = math.ceil(share * total)
    rates = [cosine_lr(step, total, 2e-6, share) for step in range(total)]
    assert rates[:up] == pytest.approx([2e-6 * (i + 1) / up for i in range(up)])
    angles = [math.pi * i / (total - up) for i in range(total - up)]
    assert rates[up:] == pytest.approx([1e-6 * (1 + math.cos(angle)) for angle in angles])
