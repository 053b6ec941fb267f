"""The planner: what it prints is what it chose, what it chose fits, and its formulas hold against metered bytes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from allo_mini import UserError, memory
from allo_mini.architecture import parse_config
from allo_mini.config import parse
from allo_mini.model import CausalLM
from allo_mini.optim import MaskedAdamW

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
MODELS = {"llama-1b": ("Llama", 32000, 2048, 5632, 16, 32, 32), "llama-2-7b": ("Llama", 32000, 4096, 11008, 32, 32, 32), "llama-3-8b": ("Llama", 128256, 4096, 14336, 32, 32, 8),
          "qwen2.5-7b": ("Qwen2", 152064, 3584, 18944, 28, 28, 4)}
EIGHT = ("streamed", "gradient", 5)
CHOSEN = {  # p = 5 %: (int8, offload, p_sft)
    "llama-2-7b": {"24gb": ("", "none", 10), "16gb": ("int8", "state", 10), "12gb": ("int8", "gradient", 10), "8gb": EIGHT},
    "llama-3-8b": {"24gb": ("", "state", 10), "16gb": ("int8", "gradient", 10), "12gb": ("int8", "gradient", 5), "8gb": EIGHT},
    "qwen2.5-7b": {"24gb": ("", "state", 10), "16gb": ("int8", "state", 10), "12gb": ("int8", "gradient", 5), "8gb": EIGHT}}


def shape_of(name):
    family, vocab, hidden, inner, layers, heads, kv = MODELS[name]
    config = parse_config({"architectures": [f"{family}ForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
                           "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
                           "num_key_value_heads": kv, "max_position_embeddings": 4096})
    with torch.device("meta"):
        return config, {n: p.shape for n, p in CausalLM(config).named_parameters()}


def settings(card, *more):
    return parse(["--model", "x", "--train", "x", "--memory", card, "--sft", "--max-length", "1024", *more])


@pytest.mark.parametrize("name, card", [(name, card) for name in CHOSEN for card in memory.CARDS])
def test_what_is_printed_is_what_was_chosen_and_fits(name, card, capsys):
    config, shapes = shape_of(name)  # README's table says the same
    chosen, needs = memory.plan(settings(card, "--method", "allo"), config, shapes)
    kind = "streamed" if chosen.stream else "int8" if chosen.int8 else ""
    assert (kind, chosen.offload, chosen.p_sft) == CHOSEN[name][card] and chosen.locate == "snr"
    assert list(needs) == ["sft-locate", "sft", "sample", "locate", "reward-locate", "reward", "score", "forget", "improve"]
    for stage, terms in needs.items():
        assert terms == memory.estimate(stage, chosen, config, shapes, groups=chosen.locate_groups)
        assert sum(terms.values()) <= memory.CARDS[card] * 2**30
    readme = (Path(__file__).parents[1] / "README.md").read_text().lower()
    row = next(line for line in readme.splitlines() if line.startswith(f"| {name} |")).split("|")[2:]
    cell = row[list(memory.CARDS).index(card)]
    assert f" {max(sum(terms.values()) for terms in needs.values()) / 1e9:.1f} " in cell
    assert ("int8" in cell, "stream" in cell, "host" in cell, "5 %" in cell) == (
        chosen.int8, chosen.stream, chosen.offload != "none", chosen.p_sft == 5)
    assert chosen.micro_tokens >= 2 * chosen.max_length and chosen.sample_batch >= 1
    memory.show(chosen, needs, shapes)
    said = capsys.readouterr().out
    groups = memory.tensor_groups(shapes, chosen.locate_groups)
    assert f"locate: {len(groups)} passes" in said and [n for g in groups for n in g] == list(shapes)
    assert chosen.offload == "gradient" or needs["locate"]["gradient"] == 4 * max(sum(shapes[n].numel() for n in g) for g in groups)


@pytest.mark.parametrize("flags, names", [((), "--method allo"),
                                          (("--method", "allo", "--locate", "movement"), "--locate snr"),
                                          (("--method", "allo", "--p-sft", "100"), "--p-sft")])
def test_what_cannot_fit_names_its_flag(flags, names):
    config, shapes = shape_of("llama-2-7b")
    with pytest.raises(UserError, match=rf"--memory is 16gb, .* needs [\d.]+ GB of it at best: .*{names}"):
        memory.plan(settings("16gb", *flags), config, shapes)


def test_the_rewriting_model_is_estimated_by_its_own_size():
    (config, shapes), small = shape_of("llama-2-7b"), shape_of("llama-1b")
    cfg = settings("24gb", "--method", "allo", "--reward-base", "x", "--p-sft", "5")
    plain, own = memory.needs_of(cfg, config, shapes, 2), memory.needs_of(cfg, config, shapes, 2, small)
    changed = {stage for stage in plain if plain[stage] != own[stage]}
    assert changed == {"reward", "score"} and "reward-locate" not in plain
    for stage in changed:
        assert own[stage] == memory.estimate(stage, cfg, *small)
    n = sum(s.numel() for s in small[1].values())  # all of its weights are trained: --p-sft is for the policy
    assert own["reward"]["weights"] == 2 * n and own["reward"]["optimizer"] == 12 * n and own["reward"]["gradient"] == 4 * n


def test_a_small_rewriting_model_fits_where_one_of_the_policys_size_does_not():
    (config, shapes), small = shape_of("llama-2-7b"), shape_of("llama-1b")
    cfg = settings("24gb", "--method", "allo", "--reward-base", "x")
    with pytest.raises(UserError, match="reward needs .*: take a smaller --reward-base"):
        memory.plan(cfg, config, shapes)
    chosen, needs = memory.plan(cfg, config, shapes, rewriter=small)
    assert max(sum(terms.values()) for terms in needs.values()) <= memory.CARDS["24gb"] * 2**30
    assert needs == memory.needs_of(chosen, config, shapes, 2, small)


def test_a_rewriting_model_with_more_layers_recomputes_them_all_where_it_must():
    config, shapes = shape_of("llama-1b")
    narrow = replace(config, num_hidden_layers=36, hidden_size=256, intermediate_size=4096, num_attention_heads=4,
                     num_key_value_heads=4, head_dim=64)
    with torch.device("meta"):
        rewriter = narrow, {n: p.shape for n, p in CausalLM(narrow).named_parameters()}
    for card in ("24gb", "12gb", "8gb"):
        chosen, needs = memory.plan(settings(card, "--method", "allo", "--reward-base", "x", "--max-length", "4096"), config,
                                    shapes, rewriter=rewriter)
        assert max(sum(terms.values()) for terms in needs.values()) <= memory.CARDS[card] * 2**30
    assert chosen.checkpoint_blocks > config.num_hidden_layers


@pytest.mark.parametrize("flags", [(), ("--offload", "state"), ("--offload", "gradient"), ("--offload", "state", "--state-bits", "8")])
def test_host_memory_is_what_the_optimizer_keeps_there(flags):
    cfg = parse(["--model", "x", "--train", "x", "--p", "100", "--method", "allo", *flags])
    layer = torch.nn.Linear(512, 64, bias=False)  # whole blocks of 256
    optimizer = MaskedAdamW(layer.named_parameters(), None, state_bits=cfg.state_bits, offload=cfg.offload)
    state = optimizer.state_dict()
    held = [state.pop("start"), *([] if cfg.offload == "none" else [t for name, t in state.items() if name != "steps"]),
            *([optimizer.grad] if cfg.offload == "gradient" else [])]
    assert memory.host_bytes("improve", cfg, {"weight": layer.weight.shape}) == sum(t.nbytes for t in held)
    pinned, shapes = ("none", "state", "gradient").index(cfg.offload), {"weight": torch.Size([3000])}
    assert (memory.host_bytes("improve", cfg, shapes, pinned=True) - memory.host_bytes("improve", cfg, shapes)
            == pinned * 4 * 1096)  # for 3,000 weights torch makes room for 4,096


def test_host_memory_of_locating_is_said_and_compared_with_what_there_is(capsys, monkeypatch):
    config, shapes = shape_of("llama-2-7b")
    chosen, needs = memory.plan(settings("24gb", "--method", "allo"), config, shapes)
    most = max(sum(shapes[n].numel() for n in names) for names in memory.tensor_groups(shapes, chosen.locate_groups))
    assert memory.host_bytes("locate", chosen, shapes) == 8 * most  # two sums in fp32
    assert memory.host_bytes("locate", replace(chosen, offload="gradient"), shapes) == 12 * most
    assert memory.host_bytes("locate", replace(chosen, locate="gradient"), shapes) == memory.host_bytes("score", chosen, shapes) == 0
    for there, warned in ((64 << 30, False), (4 << 30, True), (0, False)):  # 0: the system does not say
        monkeypatch.setattr(memory, "host_memory", lambda: there)
        memory.show(chosen, needs, shapes)
        said = capsys.readouterr().out
        assert f"host memory: locate keeps {8 * most / 1e9:.1f} GB" in said and ("WARNING" in said) == warned


def test_what_was_asked_for_stays():
    config, shapes = shape_of("llama-2-7b")
    chosen, _ = memory.plan(settings("24gb", "--method", "allo", "--int8", "--p-sft", "7"), config, shapes)
    assert chosen.int8 and chosen.p_sft == 7


@pytest.mark.parametrize("stage, changes", [("improve", {}), ("improve", {"int8": True}), ("improve", {"int8": True, "stream": True}),
                                            ("locate", {"int8": True, "stream": True}), ("locate", {}), ("locate", {"locate": "snr"}),
                                            ("forget", {"checkpoint_blocks": 0, "state_bits": 8})])
def test_estimates_hold_against_metered_bytes(stage, changes, monkeypatch):
    """No stage needs 5 % more than its estimate, which is not padded by more than a quarter either."""
    import memory as bench  # tests/benchmarks/memory.py
    monkeypatch.setitem(bench.SHAPES, "narrow", bench.shape("LlamaForCausalLM", 2000, 256, 768, 3, 4, 4))
    base = parse(["--model", "x", "--train", "x", "--max-length", "512", "--p-sft", "10", "--max-steps", "1"])
    cfg = replace(base, **{"checkpoint_blocks": 99, "head_mb": 2, "locate_groups": 2, **changes})
    assert 0.75 < bench.one_stage("narrow", stage, cfg, "fp32", "cpu", 384)["ratio"] < 1.05
