"""optim.py against the official numbers, torch.optim.AdamW, and its own promises."""

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from allo_mini import optim, quant
from allo_mini.logprobs import pack, token_logps
from allo_mini.optim import FlatGradient, MaskedAdamW, adamw, cosine_lr
from helpers import assert_close, fixture_model, golden, random_ids, tiny_model
from meter import Meter


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).to(dtype)


def loss_of(model, step=0, rows=slice(None)):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (8, 5), generator=generator)
    targets = torch.randn(8, 5, 3, generator=generator)
    return (model(ids[rows]).float() - targets[rows]).square().sum() / 8


def random_mask(model, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()}


def state_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ---- the arithmetic ----------------------------------------------------------------------------------------

def test_equals_the_official_masked_adamw():
    """Five steps of the official optimizer; unselected weights bit-identical.

    The official code adds eps to sqrt(v) before bias correction (departure h): its effective eps at step t is
    eps / sqrt(1 - beta2^t), 3.2e-7 at t = 1, where ours is 1e-8. With r = sqrt(v_hat) that changes a step
    lr * m_hat / (r + eps) by at most lr * |m_hat| / r^2 * (difference of the two eps). Each weight gets the
    sum of these as its own bound, plus 1e-6 for the fp32 rounding of five steps. That the bounds are far
    smaller than the distance the weights travel is asserted too.
    """
    data, lr, eps = golden("masked_adamw"), 1e-2, 1e-8
    parameters = {f"p{i}": nn.Parameter(data[f"p{i}.init"].clone()) for i in range(3)}
    mask = {n: data[f"{n}.mask"].bool() for n in parameters}
    optimizer = MaskedAdamW(parameters.items(), mask, lr=lr, eps=eps, weight_decay=0.0)
    zeros = lambda: {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in parameters.items()}
    m, v, bound = zeros(), zeros(), zeros()
    for t in range(5):
        sum((p * data[f"{n}.grad{t}"]).sum() for n, p in parameters.items()).backward()
        optimizer.step()
        for n, p in parameters.items():
            g, expected, where = data[f"{n}.grad{t}"].double(), data[f"{n}.after{t}"], mask[n]
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            m_hat, r = m[n] / (1 - 0.9 ** (t + 1)), (v[n] / (1 - 0.999 ** (t + 1))).sqrt()
            bound[n] += lr * m_hat.abs() / r ** 2 * (eps / math.sqrt(1 - 0.999 ** (t + 1)) - eps)
            assert torch.equal(p[~where], data[f"{n}.init"][~where])
            assert ((p - expected).abs() <= bound[n] + 1e-6)[where].all()
            assert bound[n][where].max() < 2e-5 < (expected - data[f"{n}.init"]).abs()[where].max()


@pytest.mark.parametrize("g", [1e-5, 1e-6])
def test_eps_is_added_after_bias_correction(g):
    """Departure h, where it shows: the first step at a tiny gradient is torch's, lr g / (g + eps)."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = MaskedAdamW([("p", p)], lr=1.0, eps=1e-8)
    (p * g).sum().backward()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-g / (g + 1e-8)]), atol=0, rtol=1e-5)


def plain_adamw(master, grad, m, v, step, lr, betas, eps, decay):
    """The readable twin of adamw(): the formula of its docstring, line by line."""
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad ** 2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return (1 - lr * decay) * master - lr * m_hat / (v_hat.sqrt() + eps), m, v


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_one_update_is_the_formula(decay):
    """Gradients over eight decades, late and early steps; moments and weights to fp32's rounding."""
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 1000):
        master, grad, m, v = (torch.randn(1003, generator=generator) for _ in range(4))
        grad, v = grad * 10.0 ** torch.linspace(-8, 0, 1003), v.square()
        settings = (step, 1e-2, (0.9, 0.999), 1e-8, decay)
        expected = plain_adamw(*(x.double() for x in (master, grad, m, v)), *settings)
        adamw(master, grad, m, v, *settings)
        for mine, wanted in zip((master, m, v), expected):
            torch.testing.assert_close(mine.double(), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("all_true", [False, True])
def test_full_mask_is_torch_adamw(weight_decay, all_true):
    """20 steps with a moving learning rate, mask None or all True."""
    ours, theirs = net(), net()
    mask = random_mask(ours, share=2.0) if all_true else None
    mine = MaskedAdamW(ours.named_parameters(), mask, lr=0.0, weight_decay=weight_decay)
    torchs = torch.optim.AdamW(theirs.parameters(), lr=0.0, weight_decay=weight_decay)
    start = state_of(ours)
    for step in range(20):
        mine.lr = torchs.param_groups[0]["lr"] = cosine_lr(step, 20, 1e-2, 0.2)
        loss_of(ours, step).backward()
        loss_of(theirs, step).backward()
        mine.step()
        torchs.step()
        torchs.zero_grad()
    assert_close(state_of(ours), state_of(theirs), atol=2e-6, rtol=1e-5)
    assert all((start[n] - p).abs().max() > 1e-2 for n, p in ours.named_parameters() if n != "4.bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_selected_weights_change_with_weight_decay(dtype):
    """Unselected entries are bit-identical, whole unselected tensors too; selected ones moved."""
    model = net(dtype=dtype)
    mask = random_mask(model)
    mask["1.weight"][:] = False
    start = state_of(model)
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=3e-2, weight_decay=0.5)
    for step in range(5):
        loss_of(model, step).backward()
        optimizer.clip(1.0)
        optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p[~mask[n]], start[n][~mask[n]]), n
        assert not torch.equal(p[mask[n]], start[n][mask[n]]) or n == "1.weight"
    assert optimizer.master.numel() == optimizer.exp_avg.numel() == sum(int(m.sum()) for m in mask.values())


def test_weight_decay_acts_on_selected_weights_without_gradient():
    """Decoupled: each step multiplies by 1 - lr * decay and nothing else when the gradient is 0."""
    p = nn.Parameter(torch.tensor([2.0, 2.0]))
    optimizer = MaskedAdamW([("p", p)], {"p": torch.tensor([True, False])}, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        (p * 0).sum().backward()
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([2 * 0.95 ** 3, 2.0]))


# ---- gradients ---------------------------------------------------------------------------------------------

def test_backward_leaves_no_dense_gradient_and_gathers_the_selected_entries():
    model, twin = net(), net()
    mask = random_mask(model)
    optimizer = MaskedAdamW(model.named_parameters(), mask)
    loss_of(model).backward()
    loss_of(twin).backward()
    assert all(p.grad is None for p in model.parameters())
    expected = torch.cat([p.grad[mask[n]] for n, p in twin.named_parameters()])
    torch.testing.assert_close(optimizer.grad, expected)
    optimizer.step()
    assert not optimizer.grad.any()


def test_accumulation_4x1_equals_1x4():
    """Four micro-batches whose losses are divided by the whole step's units, against one batch."""
    ours, whole = net(), net()
    a, b = (MaskedAdamW(m.named_parameters(), random_mask(m), lr=1e-2) for m in (ours, whole))
    for step in range(3):
        for i in range(4):
            loss_of(ours, step, slice(2 * i, 2 * i + 2)).backward()
        loss_of(whole, step).backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)
        assert a.clip(0.5) == pytest.approx(b.clip(0.5), rel=1e-5)
        a.step()
        b.step()
    assert_close(state_of(ours), state_of(whole), atol=1e-5, rtol=1e-4)


def test_clip_uses_the_selected_norm_only():
    """A huge unselected gradient neither counts nor shrinks the others; returns the norm before."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = MaskedAdamW([("p", p)], {"p": torch.tensor([True, False, True, False])})
    (p * torch.tensor([3.0, 1e6, 4.0, -1e6])).sum().backward()
    assert optimizer.clip(10.0) == pytest.approx(5.0)
    assert optimizer.grad.tolist() == [3.0, 4.0]
    assert optimizer.clip(1.0) == pytest.approx(5.0)
    torch.testing.assert_close(optimizer.grad, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)


def test_tied_embedding_is_one_slot_with_both_gradients():
    """Embedding and head share one tensor: one name, one mask entry, the sum of both uses' gradients."""
    model, twin = (fixture_model("llama_gqa_tied", trainable=True) for _ in range(2))
    name = "model.embed_tokens.weight"
    assert "lm_head.weight" not in dict(model.named_parameters())
    optimizer = MaskedAdamW(model.named_parameters())
    assert [slot.name for slot in optimizer.slots].count(name) == 1
    assert optimizer.master.numel() == sum(p.numel() for p in model.parameters())
    batch = pack([(random_ids(5, 0), [random_ids(7, 1), random_ids(3, 2)])])
    token_logps(model, batch).sum().backward()
    token_logps(twin, batch).sum().backward()
    both = dict(twin.named_parameters())[name].grad
    assert (both.abs().sum(-1) > 0).sum() > 15  # rows that were never read get gradient from the head
    torch.testing.assert_close(optimizer.named(optimizer.grad)[name], both)


def test_checkpointed_blocks_reach_the_hooks():
    """Recomputing activations changes neither what is gathered nor that nothing is left."""
    batch = pack([(random_ids(6, 0), [random_ids(5, 1), random_ids(4, 2)])])
    gathered = []
    for blocks in (0, 2):
        model = tiny_model(seed=1)
        model.checkpoint_blocks = blocks
        mask = random_mask(model, 0.2)
        mask["model.embed_tokens.weight"][:] = False  # the first block's input needs no gradient then
        optimizer = MaskedAdamW(model.named_parameters(), mask)
        token_logps(model, batch).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        gathered.append(optimizer.grad.clone())
    assert gathered[0].abs().min() >= 0 and gathered[0].abs().max() > 1e-3
    torch.testing.assert_close(*gathered)


def test_flat_gradient_alone_names_every_gradient():
    """What `locate` accumulates over micro-batches without an optimizer."""
    model, twin = net(), net()
    buffer = FlatGradient(model.named_parameters())
    for step in range(2):
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
    assert_close(buffer.named(buffer.grad), {n: p.grad for n, p in twin.named_parameters()})


def test_close_undoes_everything():
    """Afterwards the module is as before: gradients stay in .grad, and every parameter wants them again."""
    model, twin = net(), net()
    mask = random_mask(model)
    mask["1.weight"][:] = False
    optimizer = MaskedAdamW(model.named_parameters(), mask)
    optimizer.close()
    assert all(p.requires_grad for p in model.parameters())
    loss_of(model).backward()
    loss_of(twin).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert not optimizer.grad.any()


# ---- the master --------------------------------------------------------------------------------------------

def test_bf16_weights_take_steps_too_small_for_bf16():
    """100 steps of 1e-4 at 1.0: each is lost in bf16 (spacing 3.9e-3), but not in the fp32 master."""
    ours, plain = (nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    mine = MaskedAdamW([("p", ours)], lr=1e-4)
    torchs = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for step in range(100):
        (ours * 2).sum().backward()
        (plain * 2).sum().backward()
        mine.step()
        torchs.step()
        torchs.zero_grad()
        if step == 0:
            assert torch.equal(ours, torch.ones_like(ours)) and (mine.master < 1).all()
    assert torch.equal(plain, torch.ones_like(plain))
    torch.testing.assert_close(mine.master, torch.full((8,), 0.99), atol=1e-5, rtol=0)
    assert torch.equal(ours, mine.master.bfloat16()) and (ours < 1).all()
    assert mine.change(torch.float32)[0] == pytest.approx(1e-2, rel=1e-3)


def test_how_far_the_weights_moved_is_asked_for_in_slices(monkeypatch):
    """The largest change and the share of changed weights; while it is asked for, no copy of a whole vector exists."""
    monkeypatch.setattr(optim, "CHUNK", 1 << 10)
    layer = nn.Linear(512, 128, bias=False, dtype=torch.bfloat16)
    optimizer = MaskedAdamW(layer.named_parameters(), lr=1e-3)
    optimizer.master[:100] += 0.5
    optimizer.master[100:200] += 1e-9  # rounded away
    optimizer.write_back()
    meter = Meter()
    with meter:
        largest, moved = optimizer.change(torch.bfloat16)
    assert largest == pytest.approx(0.5) and moved == 100 / 65536 and not optimizer.grad.any()
    held = sum(t.nbytes for t in (optimizer.master, optimizer.start, optimizer.grad, layer.weight))  # seen, not made
    assert meter.peak - held < optimizer.master.nbytes / 10
    optimizer.master[60000] = math.nan
    assert math.isnan(optimizer.change(torch.bfloat16)[0])


@pytest.mark.parametrize("masked", ["both", "neither", "the first", "the second"])
def test_the_next_stage_goes_on_from_the_fp32_weights(masked):
    """exact() and begin_at(): where both masks select, the masters; elsewhere, the weights as they are stored."""
    model = net(dtype=torch.bfloat16)
    first = random_mask(model, 0.5, 1) if masked in ("both", "the first") else None
    second = random_mask(model, 0.5, 2) if masked in ("both", "the second") else None
    one = MaskedAdamW(model.named_parameters(), first, lr=1e-5)
    loss_of(model).backward()
    one.step()
    exact = {name: t.clone() for name, t in one.exact().items()}
    after = {slot.name: slot.selection for slot in one.slots}
    one.close()
    two = MaskedAdamW(model.named_parameters(), second, lr=1e-5)
    stored = two.master.clone()
    two.begin_at(exact)
    for slot in two.slots:
        expected = slot.p.detach().float().clone()
        where = first[slot.name] if first else torch.ones_like(expected, dtype=torch.bool)
        assert len(after[slot.name]) == where.sum()
        expected[where] = exact[f"{slot.name}.values"]
        assert torch.equal(two.master[slot.where], expected[second[slot.name]] if second else expected.flatten())
    assert (two.master != stored).float().mean() > 0.2 and torch.equal(two.start, two.master)
    before = state_of(model)
    two.write_back()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the rounded ones were there already


def test_movement_is_measured_in_fp32():
    """Steps of 1e-6 leave bf16 weights where they are; the importance still sees them, weight by weight."""
    model = net(dtype=torch.bfloat16)
    start = state_of(model)
    optimizer = MaskedAdamW(model.named_parameters(), lr=1e-6)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
    movement = optimizer.movement()
    assert {n: m.shape for n, m in movement.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert torch.equal(model[1].weight, start["1.weight"])
    assert all(m.dtype == torch.float32 and (m >= 0).all() for m in movement.values())
    assert 1e-7 < movement["1.weight"].max() < 4e-6
    assert float(max(m.max() for m in movement.values())) == optimizer.change(torch.float32)[0]


@pytest.mark.parametrize("dtype, bits, offload", [
    (torch.float32, 32, "none"), (torch.bfloat16, 32, "none"), (torch.float32, 8, "none"),
    (torch.bfloat16, 8, "gradient"), (torch.bfloat16, 32, "state")])
def test_state_dict_continues_bit_identically(dtype, bits, offload, tmp_path):
    """3 steps, state to a file, a fresh base model and optimizer, 3 more == 6 steps."""
    def train(model, optimizer, steps):
        for step in steps:
            optimizer.lr = cosine_lr(step, 6, 1e-2, 0.5)
            loss_of(model, step).backward()
            optimizer.clip(1.0)
            optimizer.step()

    def fresh():
        model = net(dtype=dtype)
        return model, MaskedAdamW(model.named_parameters(), random_mask(model), weight_decay=0.1, state_bits=bits,
                                  offload=offload)

    model, optimizer = fresh()
    train(model, optimizer, range(3))
    save_file(optimizer.state_dict(), tmp_path / "state.safetensors")
    middle = state_of(model)
    train(model, optimizer, range(3, 6))
    again, restored = fresh()
    restored.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert all(torch.equal(p, middle[n]) for n, p in again.named_parameters())
    train(again, restored, range(3, 6))
    assert restored.steps == optimizer.steps == 6
    assert restored.change(torch.float32) == optimizer.change(torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    for key, value in optimizer.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key]), key


# ---- 8-bit moments, host memory, slices --------------------------------------------------------------------

def steps_under(gradients, **settings):
    """|step| of every weight in units of the learning rate, a row a step: [steps, n]."""
    p = nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer, rows = MaskedAdamW([("p", p)], lr=1.0, **settings), []
    for g in gradients:
        before = optimizer.master.clone()
        optimizer.grad.copy_(g)
        optimizer.step()
        rows.append((optimizer.master - before).abs())
    return torch.stack(rows)


def storing_v_itself(values, signed):
    """The recipe that quant.encode is an alternative to: v in the same codes, the nearest of them, 0 among them."""
    table, values = quant.dynamic_map(signed), values if signed else values.square()
    scale = values.abs().max().clamp(min=1e-30)
    codes = torch.bucketize(values / scale, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes, scale[None]


@pytest.mark.parametrize("noise, bound", [(False, 2), (True, 8)])
def test_8_bit_moments_do_not_blow_a_step_up(monkeypatch, noise, bound):
    """One block whose gradients span 12 decades, steady or with random signs and sizes: the largest step against that
    of 32-bit moments. The twin that stores v itself takes steps a hundred times too large on the noisy ones."""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (-12 * torch.rand(256, generator=generator))
    gradients = size * (torch.randn(30, 256, generator=generator) if noise else torch.ones(30, 256))
    exact, coarse = (steps_under(gradients, state_bits=bits, eps=1e-20) for bits in (32, 8))
    assert coarse.max() <= bound * exact.max() and coarse.isfinite().all()
    clear = size > 1e-5 * size.max()
    if not noise:
        assert (coarse <= 1.5 * exact)[:, clear].all() and (coarse >= 0.6 * exact)[:, clear].all()
    decode = optim.decode
    monkeypatch.setattr(optim, "encode", storing_v_itself)
    monkeypatch.setattr(optim, "decode", lambda c, s, signed: decode(c, s, signed) if signed else decode(c, s, False).sqrt())
    assert steps_under(gradients, state_bits=8, eps=1e-20).max() > (100 if noise else 4) * exact.max()


def test_8_bit_moments_train_as_32_bit_ones_do():
    """200 steps of a small regression with a mask, 315 weights in training: no multiple of a block."""
    results, sizes = {}, set()
    for bits in (32, 8):
        model = net()
        optimizer = MaskedAdamW(model.named_parameters(), random_mask(model, 0.9), lr=0.0, state_bits=bits)
        losses = []
        for step in range(200):
            optimizer.lr = cosine_lr(step, 200, 1e-2, 0.1)
            loss = loss_of(model, step % 4)
            loss.backward()
            optimizer.clip(1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        results[bits] = losses, optimizer.master - optimizer.start
        sizes.add(len(optimizer.master) % quant.BLOCK)
        assert optimizer.exp_avg.dtype == (torch.uint8 if bits == 8 else torch.float32)
    (exact, way), (coarse, other) = results[32], results[8]
    assert 0 not in sizes and sum(exact[-4:]) < 0.8 * sum(exact[:4])
    assert sum(coarse[-4:]) == pytest.approx(sum(exact[-4:]), rel=0.01)
    assert float((way - other).norm() / way.norm()) < 0.1


@pytest.mark.parametrize("offload", ["none", "state", "gradient"])
@pytest.mark.parametrize("bits", [32, 8])
def test_slices_and_host_memory_change_no_bit(monkeypatch, bits, offload):
    """On a CPU all three are the same arithmetic; updates in slices of 256 weights, the last one cut short."""
    def train(size, **settings):
        monkeypatch.setattr(optim, "SLICE", {"cpu": size, "cuda": size})
        model = nn.Sequential(net(), nn.Linear(3, 300))
        mask = random_mask(model, 0.7)
        optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-2, weight_decay=0.1, **settings)
        assert len(optimizer.master) > 3 * 256 and len(optimizer.master) % 256
        for step in range(5):
            loss = model(torch.randint(0, 11, (8, 5), generator=torch.Generator().manual_seed(step))).square().mean()
            loss.backward()
            optimizer.clip(0.05)
            optimizer.step()
        return state_of(model), optimizer.state_dict()

    (plain, state), (other, same) = train(1 << 18, state_bits=bits), train(256, state_bits=bits, offload=offload)
    assert all(torch.equal(p, other[n]) for n, p in plain.items())
    assert state.keys() == same.keys() and all(torch.equal(t, same[n]) for n, t in state.items())


def test_buffers_for_the_host_are_pinned_where_a_gpu_is_in_play(monkeypatch):
    asked = []
    monkeypatch.setattr(optim.torch, "zeros", lambda size, **settings: asked.append(settings))
    for device, host in (("cuda", True), ("cuda", False), ("cpu", True), ("cpu", False)):
        optim.flat_zeros(3, torch.device(device), host)
    assert asked == [{"pin_memory": True}, {"device": torch.device("cuda")},
                     {"pin_memory": False}, {"device": torch.device("cpu")}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [32, 8])
def test_on_a_gpu_the_offloaded_vectors_lie_in_pinned_host_memory(bits):
    results = []
    for offload in ("none", "state", "gradient"):
        model = net().cuda()
        optimizer = MaskedAdamW(model.named_parameters(), random_mask(model), lr=1e-2, state_bits=bits, offload=offload)
        where = {name: (t.device.type, t.is_pinned()) for name, t in
                 {**optimizer.state_dict(), "grad": optimizer.grad}.items() if name not in ("steps", "start")}
        assert where["master"] == (("cuda", False) if offload == "none" else ("cpu", True))
        assert where["exp_avg"][0] == where["exp_avg_sq"][0] == where["master"][0]
        assert where["grad"] == (("cpu", True) if offload == "gradient" else ("cuda", False))
        for step in range(3):
            model(torch.randint(0, 11, (8, 5), device="cuda", generator=torch.Generator("cuda").manual_seed(step))
                  ).square().mean().backward()
            optimizer.clip(1.0)
            optimizer.step()
        torch.cuda.synchronize()
        results.append({n: p.cpu() for n, p in state_of(model).items()})
    for other in results[1:]:
        assert_close(results[0], other, atol=1e-6, rtol=1e-5)


# ---- errors and schedule -----------------------------------------------------------------------------------

def test_masks_that_do_not_fit_are_refused():
    good = random_mask(net())
    for bad, message in (({n: m for n, m in good.items() if n != "1.bias"}, "1.bias"),
                         ({**good, "1.weight": good["1.weight"].t()}, "1.weight"),
                         ({n: m & False for n, m in good.items()}, "nothing"), ({}, "0.weight")):
        with pytest.raises(ValueError, match=message):
            MaskedAdamW(net().named_parameters(), bad)


def test_state_bits_other_than_known_are_refused():
    with pytest.raises(ValueError, match="7"):
        MaskedAdamW(net().named_parameters(), state_bits=7)


@pytest.mark.parametrize("total,fraction", [(1, 0.1), (2, 0.5), (10, 0.0), (10, 0.1), (100, 0.03), (37, 0.1),
                                            (5, 1.0)])
def test_cosine_rises_linearly_then_falls_to_nearly_zero(total, fraction):
    """Positive everywhere, peak reached exactly, straight up, then half a cosine down."""
    warmup = math.ceil(fraction * total)
    rates = [cosine_lr(step, total, 2e-6, fraction) for step in range(total)]
    assert max(rates) == pytest.approx(2e-6) and min(rates) > 0
    assert rates[:warmup] == pytest.approx([2e-6 * (i + 1) / warmup for i in range(warmup)])
    down = rates[warmup:]
    assert all(a > b for a, b in zip(down, down[1:]))
    if len(down) > 1:
        assert down[0] == pytest.approx(2e-6)
        assert down[-1] == pytest.approx(1e-6 * (1 - math.cos(math.pi / len(down))), rel=1e-6)
        middle = len(down) // 2
        assert down[middle] == pytest.approx(1e-6 * (1 + math.cos(math.pi * middle / len(down))))
