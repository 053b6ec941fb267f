"""linear.py: products whose dense gradient never exists, against F.linear, F.embedding and autograd's own gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from allo_mini import linear as linear_module
from allo_mini import selection as selection_module
from allo_mini.generate import generate
from allo_mini.linear import dense_rows, embedding, linear, to_int8
from allo_mini.logprobs import pack, token_logps
from allo_mini.optim import FlatGradient, MaskedAdamW
from allo_mini.quant import dequantize_rows, quantize_rows
from helpers import random_ids, tiny_model

SHAPES = {"embed": (600, 8), "up": (520, 8), "bias": (520,), "down": (8, 520), "norm": (8,)}
MASKS = {"some": 0.3, "few": 0.003, "all": 1.1}  # few: most rows hold no selected entry


def parameters(dtype=torch.float32, seed=0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter((torch.randn(s, generator=generator) * 0.5).to(dtype)) for n, s in SHAPES.items()}


def masks(kind, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return None if kind is None else {n: torch.rand(s, generator=generator) < MASKS[kind] for n, s in SHAPES.items()}


def network(p, step: int, linear, embedding, blocks: bool = False):
    """A block between an embedding and the same matrix as head; ids repeat, so that rows add up. Returns the loss."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 600, (2, 7), generator=generator)
    ids[1] = ids[0]
    target = torch.randint(0, 600, (14,), generator=generator)

    def block(x):
        return linear(linear(x * p["norm"], p["up"], p["bias"]).tanh(), p["down"])
    x = embedding(ids, p["embed"])
    x = checkpoint(block, x, use_reentrant=False) if blocks else block(x)
    return F.cross_entropy(linear(x, p["embed"]).float().flatten(0, 1), target)


def several_chunks(monkeypatch):
    """The smallest chunks there are: 256 rows."""
    monkeypatch.setattr(selection_module, "CHUNK", 1)


def flat_of(dense: dict, mask) -> torch.Tensor:
    """Dense gradients -> the selected entries, one after the other."""
    return torch.cat([t[mask[n]] if mask else t.flatten() for n, t in dense.items()]).float()


# ---- against autograd --------------------------------------------------------------------------------------

@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", [*MASKS, None])
def test_the_gathered_gradient_is_autograds(monkeypatch, kind, chunks, blocks):
    """Bias, head tied to the embedding, recomputed blocks, three micro-batches; no parameter ever has a .grad."""
    if chunks > 1:
        several_chunks(monkeypatch)
    ours, theirs, mask = parameters(), parameters(), masks(kind)
    flat = FlatGradient(ours.items(), mask)
    assert {s.name: len(list(s.selection.chunks())) for s in flat.slots}["embed"] == chunks
    for step in range(3):
        loss = network(ours, step, linear, embedding, blocks)
        twin = network(theirs, step, F.linear, F.embedding)
        torch.testing.assert_close(loss, twin)
        loss.backward()
        twin.backward()
        assert all(p.grad is None for p in ours.values())
    expected = flat_of({n: p.grad for n, p in theirs.items()}, mask)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(flat.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("chunks", [1, 3])
def test_bf16_gradients_are_those_of_the_fp32_twin_but_for_rounding(monkeypatch, chunks, slow):
    """By way of fp32 products (`slow`) and of bf16 ones; the sum over micro-batches is fp32 in both."""
    monkeypatch.setattr(linear_module, "slow_bf16", lambda x: slow and x.dtype == torch.bfloat16)
    if chunks > 1:
        several_chunks(monkeypatch)
    ours, mask = parameters(torch.bfloat16), masks("some")
    theirs = {n: nn.Parameter(p.detach().float()) for n, p in ours.items()}
    flat = FlatGradient(ours.items(), mask)
    for step in range(3):
        network(ours, step, linear, embedding).backward()
        network(theirs, step, F.linear, F.embedding).backward()
    assert all(p.grad is None for p in ours.values()) and flat.grad.dtype == torch.float32
    expected = flat_of({n: p.grad for n, p in theirs.items()}, mask)
    assert float((flat.grad - expected).norm() / expected.norm()) < 0.02
    torch.testing.assert_close(flat.grad, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("slow", [True, False])
def test_ordinary_bf16_autograd_works_where_no_optimizer_is(monkeypatch, slow):
    """A module of ours outside training: gradients land in .grad as ever, on every CPU."""
    monkeypatch.setattr(linear_module, "slow_bf16", lambda x: slow and x.dtype == torch.bfloat16)
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    network(ours, 0, linear, embedding).backward()
    network(theirs, 0, F.linear, F.embedding).backward()
    for n in SHAPES:
        torch.testing.assert_close(ours[n].grad, theirs[n].grad, atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("kind", ["some", "few", None, "frozen"])
def test_the_inputs_gradient_is_autograds(monkeypatch, kind, shape):
    """Any leading dimensions; `frozen`: W itself has no selected entry, and dx still passes through."""
    several_chunks(monkeypatch)
    ours, theirs = parameters(), parameters()
    mask = masks("some" if kind == "frozen" else kind)
    if kind == "frozen":
        mask["up"][:] = False
    flat = FlatGradient(ours.items(), mask)
    assert ours["up"].requires_grad == (kind != "frozen") == ("up" in {s.name for s in flat.slots})
    x, other = (torch.randn(*shape, 8, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in "ab")
    y, twin = linear(x, ours["up"], ours["bias"]), F.linear(other, theirs["up"], theirs["bias"])
    torch.testing.assert_close(y, twin)
    (y * torch.arange(520)).sum().backward()
    (twin * torch.arange(520)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_a_table_without_a_selected_entry_is_an_ordinary_embedding():
    p, mask = parameters(), masks("some")
    mask["embed"][:] = False
    flat = FlatGradient(p.items(), mask)
    network(p, 0, linear, embedding).backward()
    twin = parameters()
    network(twin, 0, F.linear, F.embedding).backward()
    torch.testing.assert_close(flat.grad, flat_of({n: t.grad for n, t in twin.items()}, mask), atol=1e-6, rtol=1e-4)
    assert not p["embed"].requires_grad and p["embed"].grad is None


def test_closing_gives_ordinary_gradients_again():
    p, twin = parameters(), parameters()
    flat = FlatGradient(p.items(), masks("some"))
    flat.close()
    network(p, 0, linear, embedding).backward()
    network(twin, 0, F.linear, F.embedding).backward()
    assert all(torch.equal(p[n].grad, twin[n].grad) for n in SHAPES) and not flat.grad.any()


# ---- what is allocated -------------------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes (views of others do not count)."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = lambda tree: [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in known]
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in made)])
        return out


@pytest.mark.parametrize("form", ["plain", "int8"])
def test_backward_of_a_matrix_makes_no_tensor_of_its_size(monkeypatch, form):
    """[1024, 32] in chunks of 256 rows. The twin shows that the measure sees a dense gradient."""
    several_chunks(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    dense, mask = torch.randn(1024, 32, generator=generator), torch.rand(1024, 32, generator=generator) < 0.05
    weight = nn.Parameter(dense.clone())
    if form == "int8":
        weight = int8_parameter(dense, mask)
    MaskedAdamW([("w", weight)], {"w": mask})
    x = torch.randn(6, 32, generator=generator).requires_grad_()
    y = linear(x, weight)
    with Largest() as seen:
        y.sum().backward()
    assert seen.bytes == 4 * 256 * 32 and weight.grad is None
    with Largest() as twin:
        F.linear(x, nn.Parameter(dense)).sum().backward()
    assert twin.bytes == 4 * 1024 * 32
    if form == "int8":  # nor does forward
        with Largest() as seen:
            linear(x, weight)
        assert seen.bytes == 4 * 256 * 32


def test_backward_of_a_model_makes_no_tensor_of_its_embeddings_size(monkeypatch):
    """Tied and not; norms and small matrices included, blocks recomputed; twice, as micro-batches do."""
    several_chunks(monkeypatch)
    batch = pack([(random_ids(5, 0), [random_ids(4, 1)]), (random_ids(2, 2), [random_ids(3, 3)])])
    for tied in (False, True):
        model = tiny_model(vocab_size=1536, tie_word_embeddings=tied)
        model.checkpoint_blocks = 1
        generator = torch.Generator().manual_seed(0)
        mask = {n: torch.rand(p.shape, generator=generator) < 0.01 for n, p in model.named_parameters()}
        optimizer = MaskedAdamW(model.named_parameters(), mask)
        for _ in range(2):
            logps = token_logps(model, batch)
            with Largest() as seen:
                logps.sum().backward()
            assert 4 * 256 * 16 <= seen.bytes < 4 * 1536 * 16
            assert all(p.grad is None for p in model.parameters())
        assert optimizer.grad.abs().max() > 0


# ---- int8 --------------------------------------------------------------------------------------------------

def int8_parameter(dense, mask) -> nn.Parameter:
    weight, int8 = to_int8(dense, mask, "cpu")
    weight = nn.Parameter(weight, requires_grad=False)
    weight.int8 = int8
    return weight


def int8_twins(kind="some", dtype=torch.float32):
    """(parameters with int8 matrices, the same dequantised, mask); the embedding is never int8."""
    start, mask = parameters(dtype), masks(kind)
    ours, theirs = {}, {}
    for n, p in start.items():
        if n in ("up", "down"):
            ours[n] = int8_parameter(p.detach(), mask[n])
            theirs[n] = nn.Parameter(torch.cat([rows.clone() for _, rows in dense_rows(ours[n], dtype)]))
        else:
            ours[n], theirs[n] = nn.Parameter(p.detach().clone()), nn.Parameter(p.detach().clone())
    return ours, theirs, mask


@pytest.mark.parametrize("width, chunks", [(8, 1), (96, 2), (256, 1), (520, 2), (768, 2)])
def test_int8_is_the_rows_quantised_with_the_selected_entries_exact(monkeypatch, width, chunks):
    if chunks > 1:
        several_chunks(monkeypatch)
    generator = torch.Generator().manual_seed(width)
    dense = torch.randn(300, width, generator=generator)
    mask = torch.rand(300, width, generator=generator) < 0.2
    mask[7], mask[8] = True, False
    dense[mask] *= 100  # what is selected stands out: it must not widen its block
    weight, int8 = to_int8(dense, mask, "cpu")
    (codes, scale), (plain_codes, plain_scale) = map(torch.cat, zip(*int8.parts)), quantize_rows(dense, mask)
    assert codes.dtype == torch.int8 and torch.equal(codes, plain_codes) and torch.equal(scale, plain_scale)
    assert weight.shape == dense.shape and weight.untyped_storage().nbytes() == 1  # what stands for it takes no memory
    assert torch.equal(int8.values, dense[mask]) and len(int8.selection) == int(mask.sum())
    rebuilt = torch.cat([rows for _, rows in dense_rows(int8_parameter(dense, mask), torch.float32)])
    assert torch.equal(rebuilt[mask], dense[mask])
    assert torch.equal(rebuilt[~mask], dequantize_rows(codes, scale, torch.float32)[~mask])
    bound = (scale / 2).repeat_interleave(width // scale.shape[1], 1)
    assert ((rebuilt - dense).abs() <= bound * 1.0001)[~mask].all()
    assert scale[8].max() < 0.05 and (codes[7] == 0).all()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_equals_its_dequantised_twin_exactly(monkeypatch, dtype, blocks):
    """Losses, gradients and weights over four optimizer steps, bit for bit; recomputed blocks of int8 included."""
    monkeypatch.setattr(linear_module, "slow_bf16", lambda x: False)  # there, int8 is not rounded to bf16 at all
    ours, theirs, mask = int8_twins(dtype=dtype)
    a, b = (MaskedAdamW(p.items(), mask, lr=1e-2, weight_decay=0.1) for p in (ours, theirs))
    assert torch.equal(a.master, b.master) and not ours["up"].requires_grad
    codes = {n: ours[n].detach().clone() for n in ("up", "down")}
    for step in range(4):
        loss, twin = network(ours, step, linear, embedding, blocks), network(theirs, step, linear, embedding)
        assert torch.equal(loss, twin)
        loss.backward()
        twin.backward()
        assert torch.equal(a.grad, b.grad) and a.grad.abs().max() > 0
        a.step()
        b.step()
    assert torch.equal(a.master, b.master) and a.change(torch.float32)[0] > 1e-2
    for n in SHAPES:
        now = torch.cat([rows for _, rows in dense_rows(ours[n], dtype)]) if n in codes else ours[n]
        assert torch.equal(now, theirs[n]), n
    assert all(torch.equal(ours[n], codes[n]) for n in codes)  # never quantised again


@pytest.mark.parametrize("kind", ["some", "few"])
def test_int8_in_chunks_equals_the_dequantised_twin(monkeypatch, kind):
    """Several chunks of dx are added up in another order: equal but for that."""
    several_chunks(monkeypatch)
    ours, theirs, mask = int8_twins(kind)
    flat = FlatGradient(ours.items(), mask)
    for step in range(2):
        network(ours, step, linear, embedding).backward()
        network(theirs, step, F.linear, F.embedding).backward()
    expected = flat_of({n: p.grad for n, p in theirs.items()}, mask)
    torch.testing.assert_close(flat.grad, expected, atol=1e-6, rtol=1e-4)


def test_int8_without_a_selected_entry_passes_gradients_through():
    ours, theirs, mask = int8_twins()
    mask = {n: m & (n == "bias") for n, m in mask.items()}
    for n in ("up", "down"):
        ours[n] = int8_parameter(theirs[n].detach(), mask[n])
        theirs[n] = nn.Parameter(next(dense_rows(ours[n], torch.float32))[1])
    flat = FlatGradient(ours.items(), mask)
    network(ours, 0, linear, embedding).backward()
    network(theirs, 0, F.linear, F.embedding).backward()
    torch.testing.assert_close(flat.grad, theirs["bias"].grad[mask["bias"]], atol=1e-6, rtol=1e-4)
    assert flat.grad.abs().max() > 0


def test_all_gradients_of_an_int8_model_can_be_gathered():
    """What locating does: no mask at all, each int8 matrix's dense gradient by way of a handle."""
    start = parameters()
    ours = {n: int8_parameter(p.detach(), None) if n in ("up", "down") else p for n, p in start.items()}
    theirs = {n: nn.Parameter(torch.cat([rows.clone() for _, rows in dense_rows(p, torch.float32)]))
              for n, p in ours.items()}
    flat = FlatGradient(ours.items())
    network(ours, 0, linear, embedding).backward()
    network(theirs, 0, F.linear, F.embedding).backward()
    torch.testing.assert_close(flat.grad, flat_of({n: p.grad for n, p in theirs.items()}, None), atol=1e-6, rtol=1e-4)


def test_int8_weights_are_trained_through_their_own_mask_only():
    ours, _, mask = int8_twins()
    more = {n: m.clone() for n, m in mask.items()}
    more["up"][0] = True
    with pytest.raises(ValueError, match="up is int8"):
        MaskedAdamW(ours.items(), more)
    other = {n: m.clone() for n, m in mask.items()}
    other["down"] = mask["down"].flip(0)  # as many entries, elsewhere
    assert int(other["down"].sum()) == int(mask["down"].sum())
    with pytest.raises(ValueError, match="down is int8"):
        MaskedAdamW(ours.items(), other)
    with pytest.raises(ValueError, match="int8 weights can only be trained through a mask"):
        MaskedAdamW(ours.items())
    assert len(MaskedAdamW(ours.items(), mask).master) == sum(int(m.sum()) for m in mask.values())


def test_sampling_from_int8_weights_equals_sampling_from_their_dequantised_twin():
    """An untied head is int8 as well; keys and values are not."""
    ours, theirs = tiny_model(3, trainable=False), tiny_model(3, trainable=False)
    for name, p in theirs.named_parameters():
        if p.dim() == 2 and "embed_tokens" not in name:
            module, _, _ = name.rpartition(".")
            ours.get_submodule(module).weight = int8_parameter(p.detach(), None)
            p.copy_(torch.cat([rows for _, rows in dense_rows(ours.get_parameter(name), torch.float32)]))
    assert ours.head_weight.dtype == torch.int8
    prompts = [random_ids(n, seed=n) for n in (3, 9, 6)]
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9}):
        assert generate(ours, prompts, 20, **settings) == generate(theirs, prompts, 20, **settings)
