"""masked_adamw.py against the official numbers, torch.optim.AdamW, and its own promises."""

import math

import pytest
import torch
from helpers import assert_close, golden, random_mask, state_of
from safetensors.torch import load_file, save_file
from torch import nn

from allo_mini import mask as mask_module
from allo_mini.mask import to_tensors
from allo_mini.masked_adamw import MaskedAdamW, cosine_lr
from allo_mini.patch import begin_at
from allo_mini.run.files import save_tensors


def net(dtype=torch.float32, *more):
    torch.manual_seed(0)
    layers = nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers, *more).to(dtype)


def loss_of(model, step=0, rows=slice(None)):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (8, 5), generator=generator)
    targets = torch.randn(8, 5, 3, generator=generator)
    return (model(ids[rows]).float() - targets[rows]).square().sum() / 8


def train(model, optimizer, steps):
    for step in steps:
        optimizer.lr = cosine_lr(step, 6, 3e-2, 0.5)
        loss_of(model, step).backward()
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
            (loss_of(model, step) * (1e-6 if step < 10 else 1)).backward()
            optimizer.step()
        torchs.zero_grad()
    assert_close(state_of(ours), state_of(theirs), atol=2e-6, rtol=1e-5)
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
        loss_of(model, 0, slice(2 * i, 2 * i + 2)).backward()
    loss_of(twin).backward()
    assert all(p.grad is None for p in model.parameters())
    wanted = torch.cat([p.grad[mask[n]] for n, p in twin.named_parameters()])
    assert len(optimizer.master) == len(optimizer.exp_avg) == len(wanted)
    torch.testing.assert_close(optimizer.grad, wanted)
    assert optimizer.clip(10.0) == optimizer.clip(0.1) == pytest.approx(float(wanted.norm()))
    torch.testing.assert_close(optimizer.grad, wanted * 0.1 / wanted.norm())
    optimizer.step()
    optimizer.close()
    loss_of(model).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert not optimizer.grad.any()


def test_bf16_weights_take_steps_too_small_for_bf16():
    """100 steps of 1e-4 at 1.0: each is lost in bf16 (spacing 3.9e-3), but not in the master."""
    p = nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16))
    optimizer = MaskedAdamW([("p", p)], lr=1e-4)
    for step in range(100):
        (p * 2).sum().backward()
        optimizer.step()
        assert step or (torch.equal(p, torch.ones_like(p)) and (optimizer.master < 1).all())
    assert_close(optimizer.movement(), {"p": torch.full((2, 4), 0.01)}, atol=1e-5, rtol=0)
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
    assert_close(state_of(again), state_of(model), atol=0, rtol=0)
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
