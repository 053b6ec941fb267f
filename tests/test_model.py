"""model, checkpoint, logprobs, generate: equal to Hugging Face, and every shortcut to the plain way."""

import inspect
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from allo_mini import UserError, attention, checkpoint, logprobs, selection
from allo_mini import generate as generate_module
from allo_mini.architecture import FAMILIES as ARCHITECTURES, parse_config
from allo_mini.attention import TreeAttention, causal_attention
from allo_mini.checkpoint import load_model, save_model
from allo_mini.generate import generate, pick, sample
from allo_mini.logprobs import TargetLogps, by_response, head_logps, micro_batches, pack, score, token_logps
from allo_mini.pointwise import RMSNormFunction, RotateFunction, SwiGLUFunction
from helpers import (FIXTURES, HF, RAW, assert_close, fixture_model, golden, gradients, random_ids,
                     separate_logps, tiny_model)

TREES = [(random_ids(7, 1), [random_ids(5, 2), random_ids(9, 3)]),
         (random_ids(1, 4), [random_ids(1, 5), random_ids(1, 6)]),  # the smallest possible pair
         (random_ids(12, 7), [random_ids(4, 8)]),
         (random_ids(3, 9), [random_ids(6, 10), random_ids(2, 11), random_ids(8, 12)])]


# ---- Hugging Face ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", HF)
def test_logits_and_greedy_tokens_equal_hugging_face(name):
    model, expected = fixture_model(name), golden(f"hf/{name}/expected")
    with torch.no_grad():
        logits = model.logits(expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    greedy = expected["greedy"][0].tolist()
    assert generate(model, [greedy[:20]], 24) == [greedy[20:]]


def test_fixtures_would_show_a_wrong_rope_or_a_missing_norm():
    """The comparison above has teeth: small changes of the config move the logits by far more than 1e-4."""
    def distance(name, change):
        expected = golden(f"hf/{name}/expected")
        model = fixture_model(name)
        change(model)
        with torch.no_grad():
            return float((model.logits(expected["input_ids"]) - expected["logits"]).abs().max())

    def rescale(model, **changes):
        object.__setattr__(model.config, "rope_scaling", {**model.config.rope_scaling, **changes})

    assert distance("llama3_rope", lambda m: rescale(m, rope_type="default")) > 0.1
    assert distance("llama3_rope", lambda m: rescale(m, high_freq_factor=5.0)) > 0.01
    assert distance("qwen3", lambda m: m.model.layers[1].self_attn.k_norm.weight.fill_(1)) > 0.1
    assert distance("qwen2", lambda m: m.model.layers[0].self_attn.v_proj.bias.zero_()) > 0.1
    assert distance("mistral", lambda m: object.__setattr__(m.config, "rope_theta", 1e5)) > 0.1


def test_linear_rope_scaling_stretches_positions():
    """factor 4 at position 4 t turns as far as no scaling at t."""
    ids = torch.tensor(random_ids(9, 0))
    plain, scaled = tiny_model(), tiny_model(rope_scaling={"type": "linear", "factor": 4.0})
    with torch.no_grad():
        expected = plain(ids[None])
        torch.testing.assert_close(scaled(ids[None], 4 * torch.arange(9)), expected)
        assert (scaled(ids[None]) - expected).abs().max() > 1e-2


# ---- shared prompts, packing, chunks, checkpointing --------------------------------------------------------

@pytest.mark.parametrize("heads,groups", [(4, 4), (4, 2), (6, 1)])
def test_tree_attention_equals_separate_sequences(heads, groups):
    """Values and gradients in fp64, prompts shared by one, two and three responses."""
    trees = [(len(p), tuple(map(len, rs))) for p, rs in TREES]
    size = sum(p + sum(rs) for p, rs in trees)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, n, 8, generator=generator, dtype=torch.float64).requires_grad_()
               for n in (heads, groups, groups))
    out = TreeAttention(trees)(q, k, v, 0)
    expected, at = [], 0
    for p, responses in trees:
        end = at + p
        for i, length in enumerate(responses):
            rows = torch.cat((torch.arange(at, at + p), torch.arange(end, end + length)))
            alone = causal_attention(q[rows][None], k[rows][None], v[rows][None], 0)[0]
            expected.append(alone if i == 0 else alone[p:])
            end += length
        at = end
    expected = torch.cat(expected)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(torch.autograd.grad((out * upstream).sum(), (q, k, v)),
                            torch.autograd.grad((expected * upstream).sum(), (q, k, v))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["llama_gqa_tied", "qwen2", "qwen3", "llama3_rope"])
def test_packed_logps_equal_separate_sequences(name):
    """A stream of shared prompts against one sequence per response: log-probs and all gradients."""
    model = fixture_model(name, trainable=True)
    ours = token_logps(model, pack(TREES))
    theirs = torch.cat([separate_logps(model, p, r) for p, rs in TREES for r in rs])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * upstream).sum().backward()
    packed = gradients(model)
    (theirs * upstream).sum().backward()
    assert_close(packed, gradients(model), atol=2e-4, rtol=1e-4)


def test_company_and_order_in_a_batch_change_nothing():
    model = fixture_model("llama_gqa_tied")
    alone = [token_logps(model, pack([tree])) for tree in TREES]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 0], [1, 3]):
        together = token_logps(model, pack([TREES[i] for i in order]))
        torch.testing.assert_close(together, torch.cat([alone[i] for i in order]), atol=2e-5, rtol=1e-5)
    prompt, (first, second) = TREES[0]
    swapped = token_logps(model, pack([(prompt, [second, first])]))
    torch.testing.assert_close(torch.cat((swapped[9:], swapped[:9])), alone[0], atol=2e-5, rtol=1e-5)


def test_pack_lays_out_the_documented_example():
    batch = pack([([5, 6], [[7, 8], [9]])])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9] and batch.positions.tolist() == [0, 1, 2, 3, 2]
    assert batch.predictors.tolist() == [1, 2, 1] and batch.targets.tolist() == [7, 8, 9]
    assert batch.lengths == [2, 1] and batch.trees == [(2, (2, 1))]
    for empty in (([], [[1]]), ([1], [[1], []])):
        with pytest.raises(ValueError):
            pack([empty])


def test_score_keeps_the_given_order_whatever_the_budget():
    model = fixture_model("llama_gqa_tied")
    expected = [[separate_logps(model, p, r) for r in rs] for p, rs in TREES]
    for tokens in (1, 25, 8192):
        for ours, theirs in zip(score(model, TREES, tokens), expected):
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_micro_batches_lose_nothing_and_go_by_length():
    examples = [([1] * n, [[2] * 3]) for n in (5, 30, 2, 2, 2, 9, 1)]
    longest_first = sorted(examples, key=lambda e: -len(e[0]))
    for group, sizes in ((1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (50, [7])):
        by_rows = micro_batches(examples, rows=group)
        assert [len(b) for b in by_rows] == sizes and [e for b in by_rows for e in b] == longest_first
    by_tokens = micro_batches(examples, tokens=15)
    assert [e for b in by_tokens for e in b] == longest_first
    assert [[len(e[0]) + 3 for e in b] for b in by_tokens] == [[33], [12], [8, 5], [5, 5, 4]]


def test_by_response_pads_on_the_right_and_masks_by_length():
    rows, mask = by_response(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]), [3, 2])
    assert rows.tolist() == [[1, 2, 3], [4, 0, 0]] and mask.tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_chunked_head_equals_plain(monkeypatch, rows):
    """17 tokens over chunks of `rows`: values and both gradients; `peak`: rows of logits made at once."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(17, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (17,), generator=generator)
    peak, linear = [], F.linear
    monkeypatch.setattr(logprobs, "linear", lambda x, w: peak.append(len(x)) or linear(x, w))
    results = []
    for size in (rows * 50 * 4, 1 << 28):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = head_logps(h, w, targets, size)
        results.append((logps, *torch.autograd.grad((logps * torch.arange(17)).sum(), (h, w))))
        with torch.no_grad():
            assert torch.equal(head_logps(hidden, weight, targets, size), logps)
        assert max(peak) == (rows if size < 1 << 28 else 17)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(17), targets]
    torch.testing.assert_close(results[0][0], expected)


def test_chunked_head_gives_the_model_the_same_gradients():
    model, batch = fixture_model("llama_gqa_tied", trainable=True), pack(TREES)
    token_logps(model, batch).sum().backward()
    plain = gradients(model)
    model.head_bytes = 5 * 256 * 4
    token_logps(model, batch).sum().backward()
    assert_close(plain, gradients(model), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 24])
def test_log_probs_of_targets_are_cross_entropys(dtype, chunk, monkeypatch):
    """With several rows at a time and with one; twice, for nothing is used up."""
    monkeypatch.setattr(selection, "CHUNK", 16 * chunk)  # of which a CPU takes a sixteenth
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(17, 50, generator=generator)).to(dtype).requires_grad_()
    targets, dy = torch.randint(0, 50, (17,), generator=generator), torch.randn(17, generator=generator)
    mine, plain = TargetLogps.apply(logits, targets), -F.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(mine, plain)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(mine, logits, dy, retain_graph=True),
                                   torch.autograd.grad(plain, logits, dy, retain_graph=True))


def plain_rms_norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_rotate(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def plain_swiglu(gate, up):
    return F.silu(gate) * up


def assert_as_in_fp32(mine, plain, inputs, wanted, dy):
    """Value of mine(*inputs), and the gradients of the first `wanted` inputs, against the plain formula in fp32."""
    results = []
    for f, kind in ((mine, inputs[0].dtype), (plain, torch.float32)):
        leaves = [x.detach().to(kind).requires_grad_(i < wanted) for i, x in enumerate(inputs)]
        y = f(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves[:wanted], dy.to(kind))])
    for a, b in zip(*results, strict=True):
        assert a.dtype == inputs[0].dtype and a.shape == b.shape
        assert (a - b).norm() <= (1e-6 if a.dtype == torch.float32 else 2**-7) * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_the_formula_and_turn_the_gradient_back(dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(6, 3, 8, generator=generator).to(dtype) for _ in "xd")
    angles = torch.rand(6, 1, 4, generator=generator) * 6
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(dtype) for f in (torch.cos, torch.sin))
    assert_as_in_fp32(RotateFunction.apply, plain_rotate, (x, cos, sin), 1, dy)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pointwise_gradients_are_autograds_and_only_the_arguments_are_kept(dtype, frozen):
    generator = torch.Generator().manual_seed(0)
    x, y, dy = (torch.randn(3, 6, 8, generator=generator).to(dtype) for _ in "xyd")
    pairs = ((SwiGLUFunction.apply, plain_swiglu, y),
             (lambda x, w: RMSNormFunction.apply(x, w, 1e-6), plain_rms_norm, y[0, 0].clone()))
    for mine, plain, second in pairs:
        assert_as_in_fp32(mine, plain, (x, second), 2 - frozen, dy)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            mine(x.requires_grad_(), second.requires_grad_(not frozen))
        assert kept == [x.data_ptr(), second.data_ptr()]


def test_training_on_a_cpu_does_not_load_the_compiler():
    """torch._dynamo is a second and 70 MB of a process; the model must call nothing of torch that imports it."""
    code = """
import sys; from helpers import tiny_model; from allo_mini import loop; from allo_mini.logprobs import pack, token_logps
from allo_mini.optim import MaskedAdamW
model = tiny_model(); optimizer = MaskedAdamW(model.named_parameters())
token_logps(model, pack([([5, 6], [[7, 8], [9]])])).sum().backward(); optimizer.step()
sys.exit("torch._dynamo" in sys.modules)"""
    subprocess.run([sys.executable, "-c", code], cwd=FIXTURES.parent, check=True, env={**os.environ, "PYTHONPATH": "..:."})


@pytest.mark.parametrize("blocks", [1, 2])
def test_activation_checkpointing_gives_the_same_gradients(blocks):
    model, batch = fixture_model("qwen3", trainable=True), pack(TREES)
    token_logps(model, batch).sum().backward()
    plain, runs = gradients(model), [0, 0]
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    model.checkpoint_blocks = blocks
    token_logps(model, batch).sum().backward()
    assert runs == [2, 2] if blocks == 2 else [2, 1]  # it did recompute, and only the blocks asked for
    assert_close(plain, gradients(model), atol=1e-6, rtol=1e-5)


# ---- generation --------------------------------------------------------------------------------------------

def greedy_without_cache(model, prompt, count, eos=()):
    tokens = []
    while len(tokens) < count and not (tokens and tokens[-1] in eos):
        with torch.no_grad():
            tokens.append(int(model.logits(torch.tensor([prompt + tokens]))[0, -1].argmax()))
    return tokens


PROMPTS = [random_ids(n, 40 + n) for n in (4, 11, 1, 23, 6, 9, 2)]


@pytest.mark.parametrize("name", ["llama_gqa_tied", "qwen3"])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_cached_generation_equals_none(name, slots):
    """Ragged prompts, samples that end at different times and free their slots for waiting ones."""
    model = fixture_model(name)
    free = [greedy_without_cache(model, p, 12) for p in PROMPTS]
    eos = {free[0][3], free[3][6], free[5][0]}
    expected = [greedy_without_cache(model, p, 12, eos) for p in PROMPTS]
    assert len({len(t) for t in expected}) > 2
    assert generate(model, PROMPTS, 12, eos_ids=tuple(eos), slots=slots) == expected
    assert generate(model, PROMPTS, 1, slots=slots) == [t[:1] for t in free]


@pytest.mark.parametrize("most", [1, 12, 30])
def test_prompts_are_read_a_few_tokens_at_a_time(most, monkeypatch):
    """A hundred long prompts at once would take more memory than the cache; what is said stays the same."""
    model, sizes = fixture_model("llama_gqa_tied"), []
    expected = sample(model, PROMPTS, 2, 6, 1.0, 0.9, seed=3)
    real = generate_module.read_prompts

    def read(model, cache, fresh, slot):
        sizes.append(sum(len(p) for p in {s.number: s.prompt for s in fresh}.values()))
        return real(model, cache, fresh, slot)
    monkeypatch.setattr(generate_module, "read_prompts", read)
    monkeypatch.setattr(generate_module, "PREFILL", most)
    assert sample(model, PROMPTS, 2, 6, 1.0, 0.9, seed=3) == expected
    assert len(sizes) > 1 and max(sizes) <= max(most, 23) and sum(sizes) == sum(map(len, PROMPTS))


@pytest.mark.parametrize("most, new", [(None, 120), (131, 101)])
def test_the_cache_grows_past_its_first_size(monkeypatch, most, new):
    """The cache starts with room for 64 new tokens, and never has more than the longest sample can take."""
    caches, real = [], generate_module.Cache
    monkeypatch.setattr(generate_module, "Cache", lambda *args: caches.append(real(*args)) or caches[-1])
    model = tiny_model(trainable=False)
    prompts = [random_ids(3, 0), random_ids(30, 1)]
    for prompt, tokens in zip(prompts, generate(model, prompts, 120, max_length=most)):
        assert len(tokens) == (new if len(prompt) == 30 else 120)
        with torch.no_grad():
            again = model.logits(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1].argmax(-1)
        assert again.tolist() == tokens
    assert caches[0].stores[0].shape[2] <= (most or 150)


def test_sampling_does_not_depend_on_slots_company_or_order():
    model = fixture_model("llama_gqa_tied")
    def run(order, n=3, **kwargs):
        prompts = [PROMPTS[i] for i in order]
        out = sample(model, prompts, n, 10, 1.0, 0.9, (5, 9), 7, rows=list(order), **kwargs)
        return dict(zip(order, out))

    everything = run(range(7))
    for other in (run(range(7), slots=3), run(range(7), slots=4), run(range(7), slots=10),
                  run([6, 2, 0, 5, 1, 4, 3]), run([4]), run([5, 1], slots=5)):
        for row, texts in other.items():
            assert texts == everything[row]
    fewer = run(range(7), n=2)
    assert all(fewer[i] == everything[i][:2] for i in fewer)


def test_samples_differ_and_seeds_reproduce():
    model = fixture_model("llama_gqa_tied")
    run = lambda seed: sample(model, PROMPTS[:2] + PROMPTS[:1], 4, 8, 1.0, 1.0, seed=seed)
    first = run(3)
    assert [len(texts) for texts in first] == [4, 4, 4]
    assert len({tuple(t) for texts in first for t in texts}) == 12  # also two rows with the same prompt
    assert run(3) == first
    other = run(4)
    assert all(a != b for texts, others in zip(first, other) for a, b in zip(texts, others))


def test_samples_end_with_their_first_eos_or_stop_and_are_handed_over_once():
    model, seen = fixture_model("llama_gqa_tied"), []
    eos, note = set(range(0, 256, 9)), lambda p, tokens: seen.append((p, tuple(tokens)))
    out = sample(model, PROMPTS, 3, 15, 1.0, 1.0, eos, 1, slots=4, on_done=note)
    for texts in out:
        for tokens in texts:
            assert not eos & set(tokens[:-1]) and (tokens[-1] in eos or len(tokens) == 15)
    assert sorted(seen) == sorted((p, tuple(t)) for p, texts in enumerate(out) for t in texts)
    assert {len(t) for texts in out for t in texts} >= {1, 2, 3}
    stopped = sample(model, PROMPTS, 3, 15, 1.0, 1.0, (), 1, stopped=lambda tokens: tokens[-1] in eos)
    assert stopped == out
    assert sample(model, [], 3, 15) == []
    with pytest.raises(ValueError):
        sample(model, [[3], []], 1, 5)


@pytest.mark.parametrize("vocab,scale", [(7, 1.5), (1000, 3.0), (1000, 0.1)])
@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_pick_draws_from_the_nucleus_exactly(vocab, scale, top_p, temperature):
    """u scanned over a fine grid gives each token its share of the renormalised nucleus, to one grid step.

    scale 0.1 over 1000 tokens is nearly flat: the nucleus is far larger than the first topk looks.
    """
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)).double() * scale
    probs = (logits / temperature).softmax(-1)
    order = sorted(range(vocab), key=lambda i: -probs[i])
    nucleus, mass = [], 0.0
    while mass < top_p - 1e-7 and len(nucleus) < vocab:
        nucleus.append(order[len(nucleus)])
        mass += float(probs[nucleus[-1]])
    grid = 4000
    u = (torch.arange(grid) + 0.5) / grid
    picked = pick(logits.float().expand(grid, vocab), temperature, top_p, u)
    share = torch.bincount(picked, minlength=vocab) / grid
    expected = torch.zeros(vocab)
    expected[nucleus] = (probs[nucleus] / mass).float()
    assert (share - expected).abs().max() <= 1.01 / grid
    assert set(picked.tolist()) <= set(nucleus)


def test_pick_at_the_ends_of_u_stays_in_the_nucleus():
    """u = 0 and the largest float below 1, for a nucleus of one, of some and of all tokens."""
    ends = torch.tensor([0.0, 1 - 2 ** -24])
    logits = torch.tensor([.05, .5, .15, .3]).log()
    for top_p, allowed in ((0.4, {1}), (0.6, {1, 3}), (0.9, {1, 3, 2}), (1.0, {0, 1, 2, 3})):
        assert set(pick(logits.expand(2, 4), 1.0, top_p, ends).tolist()) <= allowed
    certain = torch.full((1, 500), -math.inf)
    certain[0, 321] = 0.0
    for u in ends:
        assert pick(certain, 1.0, 1.0, u[None]).item() == pick(certain, 1.0, 0.9, u[None]).item() == 321


def test_pick_treats_rows_alone_and_temperature_0_takes_the_largest():
    generator, scales = torch.Generator().manual_seed(0), torch.tensor([.01, .1, 1, 2, 5, 9])
    logits, u = torch.randn(6, 300, generator=generator) * scales[:, None], torch.rand(6, generator=generator)
    together = pick(logits, 1.0, 0.9, u)
    assert together.tolist() == [pick(logits[i:i + 1], 1.0, 0.9, u[i:i + 1]).item() for i in range(6)]
    assert torch.equal(pick(logits, 0, 0.1, u), logits.argmax(-1))
    assert torch.equal(pick(logits, 1e-4, 1.0, u), logits.argmax(-1))


# ---- folders -----------------------------------------------------------------------------------------------

def stored(name):
    parts = [load_file(p) for p in sorted((FIXTURES / "hf" / name).glob("model*.safetensors"))]
    return {n: t for part in parts for n, t in part.items()}


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_save_and_load_are_bit_exact(name, dtype, tmp_path):
    """The file holds what was loaded, under Hugging Face's names, and what is loaded again is the same."""
    model = load_model(str(FIXTURES / "hf" / name), dtype)
    save_model(model, tmp_path / "saved")
    original, written = stored(name), load_file(tmp_path / "saved" / "model.safetensors")
    assert written.keys() == original.keys()
    for n, t in written.items():
        assert t.dtype == checkpoint.DTYPES[dtype] and torch.equal(t, original[n].to(t.dtype)), n
    again = load_model(tmp_path / "saved", dtype)
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    raw, before = (json.loads((folder / "config.json").read_text())
                   for folder in (tmp_path / "saved", FIXTURES / "hf" / name))
    for settings in (raw, before):
        for key in checkpoint.NOT_KEPT:
            settings.pop(key, None)
    assert raw == before


def test_saving_overwrites_nothing_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_model(trainable=False)
    save_model(model, tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save_model(tiny_model(seed=1), tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before

    def fail(*_, **__):
        raise OSError("no space left")
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(UserError, match="b: cannot be written: no space left"):
        save_model(model, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_copies_the_tokenizer_files(tmp_path):
    shutil.copytree(FIXTURES / "hf" / "llama_mha", tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "base" / name).write_text(f'"{name}"')
    (tmp_path / "base" / "notes.txt").write_text("stay")
    save_model(load_model(tmp_path / "base"), tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == '"chat_template.jinja"'
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == sorted(
        p.name for p in (tmp_path / "base").iterdir() if p.name not in ("notes.txt", "expected.safetensors"))


def copy_of(name, tmp_path):
    """A writable copy of a fixture with its weights as a dict."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / "hf" / name, folder)
    single = folder / "model.safetensors"
    return folder, load_file(single) if single.exists() else None


def refused(folder, *words):
    with pytest.raises(UserError) as e:
        load_model(folder)
    message = str(e.value)
    assert all(w in message for w in words), message
    assert "\n" not in message


def test_truncated_weights_are_refused(tmp_path):
    folder, _ = copy_of("llama_mha", tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (0, 4, 8, 500, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        refused(folder, "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 10)
    refused(folder, "model.safetensors")


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    folder, state = copy_of("llama_mha", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    extra = "model.layers.1.mlp.gate.weight"
    for change, words in (({}, (name, "missing")),
                          ({name: state[name].t().contiguous()}, (name, "[56, 32]")),
                          ({name: state[name].to(torch.int8)}, (name, "int8")),
                          ({name: state[name], extra: torch.ones(2)}, (extra, "does not belong"))):
        save_file({n: t for n, t in state.items() if n != name} | change, folder / "model.safetensors")
        refused(folder, *words)
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors: file not found")
    shutil.rmtree(folder)
    refused(folder, "no such model folder")


def test_a_superfluous_lm_head_in_a_tied_checkpoint_is_ignored(tmp_path):
    """Some checkpoints store the tied matrix twice, and old ones store the rope frequencies."""
    folder, state = copy_of("llama_gqa_tied", tmp_path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone(),
               "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    model = load_model(folder)
    assert {n for n, _ in model.named_parameters()} == set(state)


@pytest.mark.parametrize("table", [None, [], {"a": "../x.safetensors"}, {"a": 3}, {"a": []}, {},
                                   {"model.norm.weight": "model-00009-of-00002.safetensors"}])
def test_broken_shard_tables_are_refused(table, tmp_path):
    folder, _ = copy_of("llama3_rope", tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    refused(folder)


def test_missing_and_truncated_shards_are_refused_and_swapped_ones_do_no_harm(tmp_path):
    folder, _ = copy_of("llama3_rope", tmp_path)
    a, b = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    first, second = a.read_bytes(), b.read_bytes()
    b.unlink()
    refused(folder, b.name)
    b.write_bytes(second[:-10])
    refused(folder, b.name)
    a.write_bytes(second), b.write_bytes(first)
    whole = dict(fixture_model("llama3_rope").named_parameters())
    assert all(torch.equal(p, whole[n]) for n, p in load_model(folder).named_parameters())


def test_broken_config_files_are_refused(tmp_path):
    folder, _ = copy_of("llama_mha", tmp_path)
    for text in ("", "{", '{\n"vocab_size": }', "[1]", "null", '"x"'):
        (folder / "config.json").write_text(text)
        refused(folder, "config.json")
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "config.json")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


CONFIG_ERRORS = [  # what is changed in RAW, a word the message must hold
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures"), ({"architectures": None}, "architectures"),
    ({"architectures": []}, "architectures"), ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": ["LlamaForCausalLM", "LlamaForCausalLM"]}, "architectures"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
    ({"vocab_size": True}, "vocab_size"), ({"vocab_size": "120"}, "vocab_size"),
    ({"vocab_size": None}, "vocab_size"), ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 120.0}, "vocab_size"),
    ({"hidden_size": -16}, "hidden_size"), ({"num_hidden_layers": 10 ** 12}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"head_dim": 5}, "head_dim"),
    ({"intermediate_size": []}, "intermediate_size"), ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"rms_norm_eps": True}, "rms_norm_eps"), ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"hidden_act": 3}, "hidden_act"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ({"attention_bias": "no"}, "attention_bias"), ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"rope_theta": "1e4"}, "rope_theta"), ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": True}, "rope_theta"), ({"rope_theta": math.nan}, "rope_theta"),
    ({"rope_theta": math.inf}, "rope_theta"),
    ({"rope_parameters": [1]}, "rope"), ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": [1]}, "rope_scaling"), ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "low_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "original_max_position"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": "4096"}, "sliding_window"),
    ({"num_hidden_layers": 1 << 31}, "num_hidden_layers"), ({"hidden_size": 1 << 31}, "hidden_size"),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": -1}, "sliding"),
]


@pytest.mark.parametrize("change,key", CONFIG_ERRORS, ids=str)
def test_config_errors_name_the_key(change, key):
    with pytest.raises(UserError, match=key):
        parse_config({**RAW, **change})


def test_both_spellings_of_rope_settings_mean_the_same():
    old = parse_config({**RAW, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    bare = {k: v for k, v in RAW.items() if k != "rope_theta"}
    new = parse_config({**bare, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert old.rope_theta == new.rope_theta == 5e5
    assert all(old.rope_scaling[k] == new.rope_scaling[k] == v for k, v in LLAMA3.items())
    assert parse_config({**RAW, "rope_scaling": None}).rope_scaling["rope_type"] == "default"


def test_optional_keys_have_hugging_face_defaults():
    optional = ("num_key_value_heads", "tie_word_embeddings", "rope_theta")
    bare = {k: v for k, v in RAW.items() if k not in optional}
    config = parse_config(bare)
    assert config.num_key_value_heads == 4 and config.head_dim == 4 and config.rope_theta == 10000.0
    assert not config.tie_word_embeddings and not config.attention_bias
    assert parse_config({**bare, "head_dim": None}).head_dim == 4
    for family, attention_bias, biased in (("Qwen2", None, "qkv"), ("Qwen2", True, "qkv"), ("Qwen3", True, "qkvo"),
                                           ("Qwen3", None, ""), ("Llama", True, "qkvo"), ("Llama", False, "")):
        model = tiny_model(architectures=[f"{family}ForCausalLM"], attention_bias=attention_bias)
        attention = model.model.layers[0].self_attn
        assert "".join(x for x in "qkvo" if getattr(attention, f"{x}_proj").bias is not None) == biased


def test_lengths_the_model_was_not_made_for_are_refused(monkeypatch):
    """Longer than max_position_embeddings, or than a sliding window where one is in use."""
    base = {**RAW, "sliding_window": 64, "max_position_embeddings": 100}
    mistral, qwen = ({**base, "architectures": [f"{family}ForCausalLM"]} for family in ("Mistral", "Qwen2"))
    assert parse_config(mistral).length(64) == 64 and parse_config(mistral).length(0) == 64
    assert parse_config({**mistral, "sliding_window": None, "max_position_embeddings": 4096}).length(0) == 1200
    parse_config({**mistral, "sliding_window": None}).length(100)
    parse_config({**qwen, "use_sliding_window": False}).length(100)
    parse_config({**base, "architectures": ["LlamaForCausalLM"]}).length(100)
    monkeypatch.setitem(ARCHITECTURES, "OwnForCausalLM", "own")  # a fork's: a window that is named is one
    for raw, tokens, key in ((mistral, 65, "sliding_window"), ({**base, "architectures": ["OwnForCausalLM"]}, 65, "sliding_window"),
                             ({**qwen, "use_sliding_window": True}, 65, "sliding_window"),
                             (qwen, 101, "max_position_embeddings")):
        with pytest.raises(UserError, match=key):
            parse_config(raw).length(tokens)


@pytest.mark.parametrize("trees", [[(60, (40, 70)), (1, (1, 1)), (90, (30,))], [(20, (30, 10, 40))], [(5, (0,))]])
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (2, 1)])
def test_bf16_attention_on_a_cpu_is_fp32s_but_for_rounding(trees, heads):
    """Values and gradients: within a few bf16 roundings (2^-9 each)."""
    (h, g), size = heads, sum(p + sum(r) for p, r in trees)
    generator = torch.Generator().manual_seed(h)
    q, k, v, up = (torch.randn(size, n, 16, generator=generator).bfloat16() for n in (h, g, g, h))

    def all_of(kind):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out = TreeAttention(trees)(*inputs, 0)
        assert out.dtype == kind
        return [x.double() for x in (out, *torch.autograd.grad(out, inputs, up.to(kind)))]
    exact = all_of(torch.float64)
    for ours, theirs in zip(all_of(torch.bfloat16), exact):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_initialize_is_seeded_and_scaled():
    a, b, c = tiny_model(seed=1, std=0.02), tiny_model(seed=1, std=0.02), tiny_model(seed=2, std=0.02)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.head_weight, c.head_weight)
    assert a.head_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (a.model.norm.weight == 1).all()


# ---- one call of a variable-length kernel ------------------------------------------------------------------

def plain_varlen(q, k, v, q_starts, k_starts, longest_q, longest_k):
    """What the kernel computes, segment by segment: causal, aligned at the lower right."""
    out = []
    for i in range(len(q_starts) - 1):
        (a, b), (c, d) = ((int(x[i]), int(x[i + 1])) for x in (q_starts, k_starts))
        assert b - a <= longest_q and d - c <= longest_k
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        out.append(F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])),
                                                  attn_mask=seen, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("trees", [[(3, (4, 2))], [(5, (1, 6)), (2, (3, 3, 4)), (1, (2,))], [(4, (0,)), (2, (0,))]])
def test_one_call_sees_what_the_tree_sees(trees):
    total = sum(p + sum(r) for p, r in trees)
    q, k, v = (torch.randn(total, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    tree = TreeAttention(trees)
    torch.testing.assert_close(tree.in_one_call(q, k, v, plain_varlen), tree(q, k, v, 0))


@pytest.mark.parametrize("names", [("is_causal",), ("window_size",), ("window_size", "enable_gqa")])
def test_varlen_kernel_speaks_every_torchs_dialect(monkeypatch, names):
    """2.10 takes is_causal, later ones a window; only some share key heads themselves."""
    from torch.nn.attention import varlen
    seen = {}

    def fake(q, k, v, *cuts, **more):
        seen.update(more, heads=k.shape[1])
        return q
    fake.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names])
    monkeypatch.setattr(varlen, "varlen_attn", fake)
    attention.varlen_kernel.cache_clear()
    attention.varlen_kernel(torch.device("cpu"))(torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), 0, 0, 3, 3)
    attention.varlen_kernel.cache_clear()
    assert seen["heads"] == (2 if "enable_gqa" in names else 4)
    assert seen.get("is_causal") is True or seen["window_size"] == (-1, 0)
