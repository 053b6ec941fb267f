"""The model, log-probs, sampling: equal to Hugging Face, every shortcut to the plain way."""

import math
import os
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from allo_mini import UserError, logprobs
from allo_mini import generate as generate_module
from allo_mini import mask as mask_module
from allo_mini.attention import causal_attention
from allo_mini.data.encoder import Example
from allo_mini.generate import generate, pick, sample
from allo_mini.logprobs import (head_logps, margins, micro_batches, pack, responses_of, score,
                                size_of, token_logps, with_reference)
from allo_mini.masked_adamw import FlatGradient
from allo_mini.model import KERNELS, SwiGLU, fused, parse_config
from allo_mini.run import device
from helpers import (FIXTURES, HF, LLAMA3, RAW, assert_close, fixture_model, golden, gradients,
                     random_ids, separate_logps, tiny_model)

TREES = [(random_ids(7, 1), [random_ids(5, 2), random_ids(9, 3)]),
         (random_ids(1, 4), [random_ids(1, 5), random_ids(1, 6)]),  # the smallest possible pair
         (random_ids(12, 7), [random_ids(4, 8)]),
         (random_ids(3, 9), [random_ids(6, 10), random_ids(2, 11), random_ids(8, 12)])]
ROUNDING = {"atol": 2e-5, "rtol": 1e-5}


# ---- Hugging Face ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", HF)
def test_logits_and_greedy_tokens_equal_hugging_face(name):
    model, expected = fixture_model(name), golden(f"hf/{name}/expected")
    logits = model.logits(expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    greedy = expected["greedy"][0].tolist()
    assert generate(model, [greedy[:20]], 24) == [greedy[20:]]


def test_linear_rope_scaling_stretches_positions():
    """factor 4 at position 4 t turns as far as no scaling at t."""
    ids = torch.tensor(random_ids(9, 0))
    plain, scaled = tiny_model(), tiny_model(rope_scaling={"type": "linear", "factor": 4.0})
    expected = plain(ids[None])
    torch.testing.assert_close(scaled(ids[None], 4 * torch.arange(9)), expected)
    assert (scaled(ids[None]) - expected).abs().max() > 1e-2


# ---- log-probs -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama_gqa_tied", "qwen2", "qwen3", "llama3_rope"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_packed_logps_equal_separate_sequences(name, dtype, error):
    """Shared prompts against a sequence per response: log-probs, gathered gradients, also tied."""
    model, plain = (fixture_model(name, trainable=True) for _ in range(2))
    flat = FlatGradient(model.to(dtype).named_parameters())
    ours = token_logps(model, pack(TREES))
    plain.load_state_dict(model.state_dict())
    theirs = torch.cat([separate_logps(plain, p, r) for p, rs in TREES for r in rs])
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    ours.backward(upstream)
    theirs.backward(upstream)
    expected = {"log-probs": theirs, **gradients(plain)}
    found = {slot.name: slot.grad.view(slot.p.shape) for slot in flat.slots}
    assert found.keys() == expected.keys() - {"log-probs"}
    for n, x in {"log-probs": ours, **found}.items():
        assert (x - expected[n]).norm() <= error * expected[n].norm(), n


def test_packs_and_micro_batches_lose_nothing():
    """A packed token is predicted by the one before it in its own sequence; prompts stand once."""
    rng = random.Random(0)
    for _ in range(200):
        examples = []
        for _ in range(rng.randrange(1, 12)):
            lists = [rng.choices(range(99), k=rng.randrange(1, 7)) for _ in range(4)]
            examples.append((lists[0], lists[rng.randrange(1, 4):]))
        batch, at = pack(examples), 0
        assert len(batch.input_ids) == sum(map(size_of, examples))  # no padding
        assert batch.trees == [(len(p), tuple(map(len, rs))) for p, rs in examples]
        for prompt, response in [(p, r) for p, responses in examples for r in responses]:
            here = batch.predictors[at:at + len(response)]
            assert batch.targets[at:at + len(response)].tolist() == response
            assert batch.input_ids[here].tolist() == (prompt[-1:] + response)[:-1]
            first = len(prompt) - 1
            assert batch.positions[here].tolist() == [*range(first, first + len(response))]
            at += len(response)
        assert at == len(batch.targets) == sum(batch.lengths)
        tokens = rng.randrange(1, 60)
        groups = micro_batches(examples, tokens)
        assert sum(groups, []) == sorted(examples, key=size_of, reverse=True)  # longest first
        assert all(len(group) == 1 or sum(map(size_of, group)) <= tokens for group in groups)
    assert pack([([5, 6], [[], []])]).predictors.tolist() == [1, 1]
    with pytest.raises(ValueError, match="at least one token"):
        pack([([], [[1]])])


def test_scores_margins_and_references_keep_the_given_order_whatever_the_budget():
    model, counts = fixture_model("llama_gqa_tied"), []
    expected = [[separate_logps(model, p, r) for r in rs] for p, rs in TREES]
    examples = [Example(*tree) for tree in TREES]
    for tokens in (1, 25, 8192):
        for ours, theirs in zip(score(model, examples, tokens, counts.append), expected):
            torch.testing.assert_close(ours, theirs, **ROUNDING)
        for ours, theirs in zip(with_reference(model, examples, tokens), expected):
            torch.testing.assert_close(ours.ref, torch.cat(theirs), **ROUNDING)
        pairs = [float(chosen.sum() - rejected.sum()) for chosen, rejected in expected[:2]]
        assert margins(model, examples[:2], tokens, [].append) == pytest.approx(pairs, abs=1e-3)
    assert sum(counts) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_ratios_start_at_exactly_0(dtype):
    """The same micro-batches through the same code: in any precision, rows of all lengths."""
    model = fixture_model("qwen2", trainable=True).to(dtype)
    examples = [Example(*tree) for tree in TREES]
    assert [e[:2] for e in with_reference(model, examples, 40)] == TREES
    for micro in micro_batches(with_reference(model, examples, 40), 40):
        logps, ref, real = responses_of(model, micro)
        assert torch.equal(logps, ref) and logps.requires_grad and not ref.requires_grad
        assert real.sum(1).tolist() == [len(r) for e in micro for r in e.responses]
        unknown = responses_of(model, [e._replace(ref=None) for e in micro])
        assert torch.equal(unknown[1], ref) and not unknown[1].requires_grad


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows, chunk", [(1, 1), (3, 50), (16, 200), (17, 200), (17, 1 << 24)])
def test_chunked_head_equals_plain(monkeypatch, rows, chunk, dtype, error):
    """17 tokens, `rows` of them at once (`made`): values in fp32, both gradients. Of one chunk the
    gradient takes the logits' place, and whoever asks for it twice is told."""
    made, linear = [], logprobs.linear
    monkeypatch.setattr(logprobs, "linear", lambda x, w: made.append(len(x)) or linear(x, w))
    monkeypatch.setattr(mask_module, "CHUNK", 16 * chunk)  # of which a CPU takes a sixteenth
    torch.manual_seed(0)
    both = hidden, weight = [torch.randn(n, 8).to(dtype).requires_grad_() for n in (17, 50)]
    targets, dy = torch.randint(0, 50, (17,)), torch.randn(17)
    plain = -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    chunked = head_logps(hidden, weight, targets, rows * 50 * 4)
    torch.testing.assert_close(chunked, plain)
    for ours, theirs in zip(torch.autograd.grad(chunked, both, dy, retain_graph=True),
                            torch.autograd.grad(plain, both, dy)):
        torch.testing.assert_close(ours, theirs, atol=error, rtol=error)
    assert max(made) == rows
    if rows == 17:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(chunked, both, dy)


def test_swiglus_gradients_are_autograds_and_only_the_arguments_are_kept():
    generator = torch.Generator().manual_seed(0)
    gate, up, dy = (torch.randn(3, 8, generator=generator).requires_grad_() for _ in range(3))
    saved, plain = [], F.silu(gate) * up
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t,
                                                  lambda t: t):
        ours = SwiGLU.apply(gate, up)
    assert saved == [gate.data_ptr(), up.data_ptr()]
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, (gate, up), dy),
                               torch.autograd.grad(plain, (gate, up), dy))


def test_recomputation_gives_the_same_gradients():
    model, batch = fixture_model("qwen3", trainable=True), pack(TREES)
    token_logps(model, batch).sum().backward()
    plain, runs = gradients(model), []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    model.recompute = True
    token_logps(model, batch).sum().backward()
    assert len(runs) == 4  # two blocks, twice each
    assert_close(plain, gradients(model), atol=1e-6, rtol=1e-5)


def test_what_a_gpu_compiles_traces_whole_and_counts_the_same(monkeypatch):
    """By torch's tracer alone. With a gradient, without, and made again: the same to the bit."""
    compiler = partial(torch.compile, backend="aot_eager", fullgraph=True)
    made, model, batch = [], fixture_model("qwen3", trainable=True), pack(TREES)
    token_logps(model, batch).sum().backward()
    plain = gradients(model)
    monkeypatch.setattr(torch, "compile", lambda f, **how: made.append(f) or compiler(f, **how))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    KERNELS.clear()
    expected = torch.no_grad()(token_logps)(model, batch)
    for model.recompute in (False, True):
        model.zero_grad()
        logps = token_logps(model, batch)
        logps.sum().backward()
        assert torch.equal(logps, expected)
        assert_close(plain, gradients(model), atol=1e-4, rtol=1e-4)
    assert len(made) == len(KERNELS) == 3 and not {*made} & {*KERNELS.values()}


def test_fp32_of_grouped_heads_takes_a_kernel_that_a_gpu_has(monkeypatch):
    """torch's fused ones take groups in 16 bits alone; the others make [T, T] for every head."""
    kinds, plain = [], F.scaled_dot_product_attention
    q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
    expected = causal_attention(q, k, k, 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *heads, enable_gqa, **sight: (
        kinds.append((heads[1].shape[1], enable_gqa)) or plain(*heads, **sight)))
    torch.testing.assert_close(causal_attention(q, k, k, 0), expected)
    assert kinds == [(4, False)]


def test_where_nothing_can_be_compiled_functions_stay_as_they_are(monkeypatch):
    tried = []  # what stands for a kernel raises TypeError
    monkeypatch.setattr(torch, "compile", lambda f, **how: tried.append(f))
    twice = fused(lambda x: 2 * x)
    assert twice(torch.ones(1)) == 2 and not tried
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    given = []  # a kernel for each of them is more than torch keeps
    asked = fused(lambda x, eps: given.append(x.requires_grad))
    with pytest.warns(UserWarning, match="slower, for torch.compile fails .TypeError"):
        assert twice(torch.ones(1)) == twice(torch.ones(1)) == 2 and len(tried) == 1
        asked(torch.ones(1, requires_grad=True), 1e-6)
    assert given == [False]


def test_a_gpu_asked_for_by_its_number_is_the_current_one(monkeypatch):
    chosen = []
    for name, value in ("is_available", True), ("device_count", 2):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device.pick_device("cuda:1", "bf16") == ("cuda:1", torch.bfloat16)
    assert device.pick_device("cpu", "fp32") and chosen == ["cuda:1"]


def test_training_on_a_cpu_does_not_load_the_compiler():
    """torch._dynamo is a second and 70 MB of a process: nothing of the model may import it."""
    code = """
import sys; from allo_mini.checkpoint import load_model
from allo_mini.logprobs import pack, token_logps; from allo_mini.masked_adamw import MaskedAdamW
model = load_model("fixtures/hf/qwen3"); optimizer = MaskedAdamW(model.named_parameters())
token_logps(model, pack([([5, 6], [[7, 8], [9]])])).sum().backward(); optimizer.step()
sys.exit("torch._dynamo" in sys.modules)"""
    subprocess.run([sys.executable, "-c", code], cwd=FIXTURES.parent, check=True,
                   env={**os.environ, "PYTHONPATH": ".."})


# ---- generation ------------------------------------------------------------------------------

def greedy_without_cache(model, prompt, count, eos=()):
    tokens = []
    while len(tokens) < count and not (tokens and tokens[-1] in eos):
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
    """Each once, though samples share it; what is said stays the same."""
    model, calls = fixture_model("llama_gqa_tied"), []
    expected = sample(model, PROMPTS, 2, 6, 1.0, 0.9, seed=3)
    model.register_forward_pre_hook(lambda _, args: calls.append((len(args[0]), args[2])))
    monkeypatch.setattr(generate_module, "PREFILL", most)
    assert sample(model, PROMPTS, 2, 6, 1.0, 0.9, seed=3) == expected
    sizes = [size for size, attend in calls if not isinstance(attend, generate_module.Cache)]
    assert len(sizes) > 1 and max(sizes) <= max(most, 23) and sum(sizes) == sum(map(len, PROMPTS))


@pytest.mark.parametrize("most, new", [(10**9, 120), (131, 101)])
def test_the_cache_grows_past_its_first_size(monkeypatch, most, new):
    """It starts with room for 64 new tokens, and never has more than the longest sample takes."""
    caches, real = [], generate_module.Cache
    monkeypatch.setattr(generate_module, "Cache", lambda *a: caches.append(real(*a)) or caches[-1])
    model, prompts = tiny_model(trainable=False), [random_ids(3, 0), random_ids(30, 1)]
    for prompt, tokens in zip(prompts, generate(model, prompts, 120, max_length=most)):
        assert len(tokens) == (new if len(prompt) == 30 else 120)
        assert tokens == greedy_without_cache(model, prompt, len(tokens))
    assert 94 < caches[0].stores[0].shape[3] <= min(most, 150)
    host = {"SC_PAGE_SIZE": 31 * 128}  # bytes of the longest of the samples below
    for samples, slots in ((10, 3), (2, 1), (100, 8)):  # it could hold; 60 % of half of it is taken
        monkeypatch.setattr(device.os, "sysconf", (host | {"SC_PHYS_PAGES": samples}).get)
        generate(model, prompts * 4, 1)
        assert caches[-1].slots == caches[-1].stores[0].shape[1] == slots


@pytest.mark.parametrize("tokens", [1, 200, 700])
def test_samples_that_memory_does_not_hold_wait_and_are_read_again(monkeypatch, tokens):
    """What they say stays the same, and no more than so many tokens are ever held."""
    model, most = tiny_model(trainable=False), []
    given = model, [random_ids(n, n) for n in (4, 30, 11)], 3, 150, 1.0, 1.0, {3, 50}
    expected = sample(*given)
    resize = generate_module.Cache.resize

    def resized(cache, room):
        if not cache.running:
            cache.tokens = tokens
        resize(cache, room)
        most.append((cache.slots, cache.room))
    monkeypatch.setattr(generate_module.Cache, "resize", resized)
    assert sample(*given) == expected
    assert all(slots * room <= max(tokens, room) for slots, room in most)
    assert len(most) == 3 and most[0][0] == max(1, tokens // 94) >= most[-1][0]


def test_sampling_does_not_depend_on_slots_company_or_order():
    model = fixture_model("llama_gqa_tied")

    def run(order, n=3, **kwargs):
        prompts = [PROMPTS[i] for i in order]
        out = sample(model, prompts, n, 10, 1.0, 0.9, (5, 9), 7, rows=list(order), **kwargs)
        return dict(zip(order, out))
    everything = run(range(7))
    for other in (run(range(7), slots=3), run(range(7), slots=4), run(range(7), slots=10),
                  run([6, 2, 0, 5, 1, 4, 3]), run([4]), run([5, 1], slots=5)):
        assert all(texts == everything[row] for row, texts in other.items())
    fewer = run(range(7), n=2)
    assert all(fewer[i] == everything[i][:2] for i in fewer)
    first, other = (sample(model, PROMPTS[:2] + PROMPTS[:1], 4, 8, 1.0, 1.0, seed=seed)
                    for seed in (3, 4))
    assert len({tuple(tokens) for tokens in sum(first + other, [])}) == 24  # one comes twice


def test_samples_end_with_their_first_eos_or_stop_and_are_handed_over_once():
    model, seen = fixture_model("llama_gqa_tied"), []
    eos = set(range(0, 256, 9))
    out = sample(model, PROMPTS, 3, 15, 1.0, 1.0, eos, 1, slots=4,
                 on_done=lambda prompt, tokens: seen.append((prompt, tuple(tokens))))
    for tokens in sum(out, []):
        assert not eos & set(tokens[:-1]) and (tokens[-1] in eos or len(tokens) == 15)
    assert sorted(seen) == sorted((p, tuple(t)) for p, texts in enumerate(out) for t in texts)
    stopped = sample(model, PROMPTS, 3, 15, 1.0, 1.0, (), 1, stopped=lambda t: t[-1] in eos)
    assert stopped == out and sample(model, [], 3, 15) == []
    with pytest.raises(ValueError, match="at least one token"):
        sample(model, [[3], []], 1, 5)


@pytest.mark.parametrize("vocab, scale", [(7, 1.5), (1000, 3.0), (1000, 0.1)])
@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_pick_draws_from_the_nucleus_exactly(vocab, scale, top_p, temperature):
    """u over a fine grid gives each token its share of the renormalised nucleus, to one grid step;
    scale 0.1 over 1000 tokens is nearly flat: the nucleus is larger than the first topk looks."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)).double() * scale
    probs = (logits / temperature).softmax(-1)
    expected, mass, grid = torch.zeros(vocab), 0.0, 4000
    for token in probs.argsort(descending=True).tolist():
        if mass < top_p - 1e-7:
            mass += float(probs[token])
            expected[token] = probs[token]
    u = (torch.arange(grid) + 0.5) / grid
    picked = pick(logits.float().expand(grid, vocab), temperature, top_p, u)
    share = torch.bincount(picked, minlength=vocab) / grid
    assert (share - expected / mass).abs().max() <= 1.01 / grid
    assert (expected[picked] > 0).all()


def test_pick_at_the_ends_of_u_stays_in_the_nucleus():
    """u = 0 and the largest float below 1; temperature 0 takes the largest."""
    ends = torch.tensor([0.0, 1 - 2 ** -24])
    logits = torch.tensor([.05, .5, .15, .3]).log().expand(2, 4)
    for top_p, allowed in ((0.4, {1}), (0.6, {1, 3}), (0.9, {1, 3, 2}), (1.0, {0, 1, 2, 3})):
        assert set(pick(logits, 1.0, top_p, ends).tolist()) <= allowed
    certain = torch.full((2, 500), -math.inf)
    certain[:, 321] = 0.0
    assert pick(certain, 1.0, 0.9, ends).tolist() == [321, 321]
    wide = torch.randn(2, 50000, generator=torch.Generator().manual_seed(0))
    assert pick(wide, 1.0, 1.0, ends).tolist() == [wide[0].argmax(), wide[1].argmin()]
    assert torch.equal(pick(wide, 0, 0.1, ends), wide.argmax(-1))


# ---- config.json -----------------------------------------------------------------------------

def test_both_spellings_of_rope_settings_mean_the_same():
    old = parse_config({**RAW, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    bare = {k: v for k, v in RAW.items() if k != "rope_theta"}
    new = parse_config({**bare, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    for key, value in {**LLAMA3, "rope_theta": 5e5}.items():
        assert getattr(old, key) == getattr(new, key) == value
    assert parse_config({**RAW, "rope_scaling": None}).rope_type == "default"
    both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}
    assert parse_config({**RAW, **both}).rope_type == "llama3"


def test_optional_keys_have_hugging_face_defaults():
    optional = ("num_key_value_heads", "tie_word_embeddings", "rope_theta", "head_dim")
    for raw in ({k: v for k, v in RAW.items() if k not in optional}, RAW | dict.fromkeys(optional)):
        config = parse_config(raw)
        assert config.num_key_value_heads == 4 and config.head_dim == 4
        assert config.rope_theta == 10000.0 and not config.tie_word_embeddings


@pytest.mark.parametrize("family, attention_bias, biased", [
    ("Qwen2", None, "qkv"), ("Qwen2", True, "qkv"), ("Qwen3", True, "qkvo"), ("Qwen3", None, ""),
    ("Llama", True, "qkvo"), ("Llama", False, "")])
def test_biases_are_where_each_family_has_them(family, attention_bias, biased):
    model = tiny_model(architectures=[f"{family}ForCausalLM"], attention_bias=attention_bias)
    attention = model.model.layers[0].self_attn
    assert "".join(x for x in "qkvo" if getattr(attention, f"{x}_proj").bias is not None) == biased


def test_lengths_the_model_was_not_made_for_are_refused():
    """Longer than max_position_embeddings, or than a sliding window where one is in use."""
    base = {**RAW, "sliding_window": 64, "max_position_embeddings": 100}
    mistral, qwen = ({**base, "architectures": [f"{family}ForCausalLM"]}
                     for family in ("Mistral", "Qwen2"))
    for raw, limit in ((mistral, 64), ({**mistral, "sliding_window": None}, 100), (qwen, 100),
                       ({**qwen, "use_sliding_window": True}, 64), (base, 100)):
        config = parse_config(raw)
        assert config.length(limit) == config.length(0) == limit
        with pytest.raises(UserError, match=f"most {limit} .*max_position_embeddings, sliding_w"):
            config.length(limit + 1)
    assert parse_config({**RAW, "max_position_embeddings": 4096}).length(0) == 1200
