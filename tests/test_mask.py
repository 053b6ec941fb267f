"""mask.py: exact global selection against sorting everything, and mask files."""

import json
import math
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from allo_mini import UserError, mask as mask_module
from allo_mini.files import load_mask, save_mask
from allo_mini.mask import (density_by, kind_of, layer_of, mask_hash, mask_metadata, overlap, pack_mask, select_neurons,
                            selected, read_mask)

SHAPES = {"model.embed_tokens.weight": (30, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8),
          "model.layers.0.mlp.up_proj.weight": (13, 8), "model.layers.1.mlp.up_proj.weight": (13, 8),
          "model.norm.weight": (8,)}


def random_importance(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    scales = [10.0 ** (i - 3) for i in range(len(shapes))]
    return {n: torch.randn(s, generator=generator) * scale for (n, s), scale in zip(shapes.items(), scales)}


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def brute_force(importance, count):
    """The first `count` of all weights sorted by |value| descending, then tensor order, then flat index."""
    values = flat(importance).abs().tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


@pytest.mark.parametrize("fraction", [0.05, 0.07, 0.1, 0.29, 0.5, 0.999, 1.0])
def test_equals_topk_over_everything(fraction):
    """Tensors at scales 1e-3 to 10: a per-tensor rule would choose differently."""
    for seed in range(3):
        importance = random_importance(seed)
        chosen = select_neurons(importance, fraction)
        count = math.floor(Fraction(str(fraction)) * flat(importance).numel())
        expected = torch.zeros(flat(importance).numel(), dtype=torch.bool)
        expected[flat(importance).abs().topk(count).indices] = True
        assert torch.equal(flat(chosen), expected)
        assert {n: m.shape for n, m in chosen.items()} == {n: t.shape for n, t in importance.items()}
        assert all(m.dtype == torch.bool for m in chosen.values())


@pytest.mark.parametrize("size,fraction,count", [
    (100, 0.07, 7), (100, 0.29, 29), (1000, 0.001, 1), (999, 0.001, 0), (10, 0.3, 3), (57, 0.57, 32),
    (700, 0.05, 35), (7, 1.0, 7), (7, 1, 7), (50, 1e-9, 0), (3, 0.34, 1)])
def test_count_is_the_floor_in_decimal_arithmetic(size, fraction, count):
    importance = {"a": torch.rand(size // 3), "b": torch.rand(size - size // 3)}
    assert selected(select_neurons(importance, fraction)) == count


@pytest.mark.parametrize("chunk", [1 << 24, 1, 5, 16])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_ties_go_to_the_earlier_tensor_and_index_across_chunks(monkeypatch, chunk, levels):
    """Few distinct values (zeros and both signs among them): nearly everything is a tie."""
    monkeypatch.setattr(mask_module, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(levels)
    importance = {n: torch.randint(1 - levels, levels, s, generator=generator).float()
                  for n, s in {"b": (5, 4), "a": (17,), "c": (3, 2, 2)}.items()}
    for count in range(1, 50, 4):
        chosen = select_neurons(importance, float(f"{(count + 0.5) / 49:.4f}") if count < 49 else 1.0)
        assert torch.equal(flat(chosen), brute_force(importance, count)), count


def test_chunks_change_nothing(monkeypatch):
    importance = random_importance(5)
    whole = flat(select_neurons(importance, 0.1))
    for chunk in (3, 64, 100):
        monkeypatch.setattr(mask_module, "CHUNK", chunk)
        assert torch.equal(flat(select_neurons(importance, 0.1)), whole)


def test_neighbouring_floats_are_told_apart():
    """Values equal in their upper 16 bits, subnormal ones, and -0.0 beside 0.0."""
    one = torch.tensor([1.0]).view(torch.int32)
    close = (one + torch.arange(64, dtype=torch.int32)).view(torch.float32)  # 64 successive floats
    tiny = torch.arange(64, dtype=torch.int32).view(torch.float32)  # 0 and the 63 smallest subnormals
    for values in (close, tiny):
        shuffled = values[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
        chosen = select_neurons({"a": shuffled[:40], "b": -shuffled[40:]}, 0.25)
        bits = shuffled.view(torch.int32)[flat(chosen)]
        assert sorted(bits.tolist()) == values.view(torch.int32)[48:].tolist()
    zeros = {"a": torch.tensor([-0.0, 0.0, 0.0, -0.0])}
    assert select_neurons(zeros, 0.5)["a"].tolist() == [True, True, False, False]


def test_all_zero_importance_still_gives_the_exact_count():
    chosen = select_neurons({"a": torch.zeros(3, 3), "b": torch.zeros(11)}, 0.5)
    assert flat(chosen).tolist() == [True] * 10 + [False] * 10


def test_bf16_views_scalars_and_empty_tensors():
    generator = torch.Generator().manual_seed(0)
    importance = {"t": torch.randn(6, 4, generator=generator).t(), "e": torch.zeros(0, 3),
                  "s": torch.tensor(9.0), "h": torch.randn(9, generator=generator).bfloat16()}
    chosen = select_neurons(importance, 0.5)
    assert torch.equal(flat(chosen), brute_force({n: t.float() for n, t in importance.items()}, 17))
    assert chosen["t"].shape == (4, 6) and chosen["e"].shape == (0, 3) and bool(chosen["s"])


def test_the_sign_of_importance_is_ignored():
    importance = random_importance(2)
    flipped = {n: -t for n, t in importance.items()}
    assert torch.equal(flat(select_neurons(importance, 0.2)), flat(select_neurons(flipped, 0.2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_importance_that_is_not_finite_is_refused(bad):
    importance = random_importance(0)
    importance["model.norm.weight"][3] = bad
    with pytest.raises(ValueError):
        select_neurons(importance, 0.05)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.0001, 5, math.nan])
def test_fractions_outside_0_1_are_refused(fraction):
    with pytest.raises(ValueError):
        select_neurons(random_importance(0), fraction)


def test_overlap_counts_the_share_of_the_smaller_mask():
    a = {"x": torch.tensor([1, 1, 0, 0, 0]).bool(), "y": torch.tensor([1, 0]).bool()}
    b = {"x": torch.tensor([0, 1, 1, 1, 1]).bool(), "y": torch.tensor([1, 0]).bool()}
    assert overlap(a, b) == overlap(b, a) == 2 / 3
    assert overlap(a, a) == 1
    assert overlap(a, {n: ~m for n, m in a.items()}) == 0


def test_densities_by_layer_and_by_kind():
    chosen = {n: torch.zeros(s, dtype=torch.bool) for n, s in SHAPES.items()}
    chosen["model.layers.0.mlp.up_proj.weight"][:3] = True  # 24 of 104
    chosen["model.layers.1.mlp.up_proj.weight"][:1] = True  # 8 of 104
    chosen["model.norm.weight"][:2] = True
    assert density_by(chosen, layer_of) == {"embed_tokens": 0, "0": 24 / 168, "1": 8 / 104, "norm": 2 / 8}
    assert density_by(chosen, kind_of) == {"embed_tokens": 0, "q_proj": 0, "up_proj": 32 / 208, "norm": 2 / 8}


# ---- mask files --------------------------------------------------------------------------------------------

def test_pack_and_unpack_are_inverses_at_one_bit_a_weight(tmp_path):
    chosen = select_neurons(random_importance(1, {**SHAPES, "odd": (3, 7), "one": (1,)}), 0.3)
    packed = pack_mask(chosen.items())
    bits, metadata = packed.bits, mask_metadata(packed)
    assert all(bits[n].numel() == -(-m.numel() // 8) for n, m in chosen.items())
    save_mask(chosen, tmp_path / "mask.safetensors")
    shapes = {n: m.shape for n, m in chosen.items()}
    for back in (read_mask(bits, metadata), load_mask(tmp_path / "mask.safetensors", shapes)):
        assert back.keys() == chosen.keys()
        assert all(torch.equal(back[n], m) and back[n].dtype == torch.bool for n, m in chosen.items())


def test_hash_tells_masks_apart():
    chosen = select_neurons(random_importance(1), 0.3)
    other = {n: m.clone() for n, m in chosen.items()}
    assert mask_hash(chosen) == mask_hash(other)
    other["model.norm.weight"][0] ^= True
    assert mask_hash(chosen) != mask_hash(other)


CORRUPT = {
    "no metadata": lambda bits, meta: (bits, {}),
    "another format": lambda bits, meta: (bits, {**meta, "format": "pt"}),
    "no shapes": lambda bits, meta: (bits, {"format": meta["format"]}),
    "shapes not JSON": lambda bits, meta: (bits, {**meta, "shapes": "{"}),
    "shapes a list": lambda bits, meta: (bits, {**meta, "shapes": '["a", "b"]'}),
    "shape not a list": lambda bits, meta: (bits, {**meta, "shapes": '{"a": "x", "b": [9]}'}),
    "shape negative": lambda bits, meta: (bits, {**meta, "shapes": '{"a": [-2, -4], "b": [9]}'}),
    "shape with a fraction": lambda bits, meta: (bits, {**meta, "shapes": '{"a": [8.0], "b": [9]}'}),
    "a tensor missing": lambda bits, meta: ({"a": bits["a"]}, meta),
    "a tensor too many": lambda bits, meta: ({**bits, "c": bits["a"].clone()}, meta),
    "a byte missing": lambda bits, meta: ({**bits, "b": bits["b"][:1]}, meta),
    "a byte too many": lambda bits, meta: ({**bits, "a": torch.cat((bits["a"], bits["a"]))}, meta),
    "not bytes": lambda bits, meta: ({**bits, "a": bits["a"].float()}, meta),
    "larger shape": lambda bits, meta: (bits, {**meta, "shapes": json.dumps({"a": [100, 100], "b": [9]})}),
}


@pytest.mark.parametrize("how", CORRUPT)
def test_corrupted_masks_are_refused(how, tmp_path):
    """ValueError from read_mask, as it promises; one UserError line naming the file from load_mask."""
    good = {"a": torch.ones(2, 4, dtype=torch.bool), "b": torch.ones(9, dtype=torch.bool)}
    packed = pack_mask(good.items())
    bits, meta = CORRUPT[how](packed.bits, mask_metadata(packed))
    path = tmp_path / "mask.safetensors"
    save_file(bits, path, metadata=meta or None)
    with pytest.raises(UserError, match="mask.safetensors"):
        load_mask(path, {"a": torch.Size([2, 4]), "b": torch.Size([9])})
    with pytest.raises(ValueError):
        read_mask(bits, meta)


def test_mask_files_that_do_not_fit_the_model_are_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_mask({"a": torch.ones(2, 4, dtype=torch.bool)}, path)
    for shapes in ({"a": torch.Size([4, 2])}, {"b": torch.Size([2, 4])}):
        with pytest.raises(UserError, match="mask of"):
            load_mask(path, shapes)
    save_mask({"a": torch.zeros(2, 4, dtype=torch.bool)}, path)
    with pytest.raises(UserError, match="selects nothing"):
        load_mask(path, {"a": torch.Size([2, 4])})
    whole = path.read_bytes()
    for cut in (0, 7, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="mask.safetensors"):
            load_mask(path, {"a": torch.Size([2, 4])})
