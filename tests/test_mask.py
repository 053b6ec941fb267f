"""mask.py: exact global selection against sorting everything, and mask files."""

import json
import math
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from allo_mini import UserError, selection as selection_module
from allo_mini.files import load_mask, save_mask
from allo_mini.mask import (PackedMask, each_selected, mask_hash, overlap,
                            pack_mask, select_neurons, selected)
from allo_mini.selection import Selection, put, take

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
    monkeypatch.setattr(selection_module, "CHUNK", chunk)
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
        monkeypatch.setattr(selection_module, "CHUNK", chunk)
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


# ---- from files, one tensor at a time ----------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1 << 24, 37])
@pytest.mark.parametrize("levels", [None, 3])
def test_importance_in_a_memory_mapped_file_gives_the_same_masks(monkeypatch, tmp_path, chunk, levels):
    """What locating does with a 7B model: the values lie in a file; ties among them go over chunks and tensors."""
    monkeypatch.setattr(selection_module, "CHUNK", chunk)
    importance = random_importance(7)
    if levels:
        importance = {n: (t * 10).round().clamp(-levels, levels) for n, t in importance.items()}
    sizes = [t.numel() for t in importance.values()]
    store = torch.from_file(str(tmp_path / "importance"), shared=True, size=sum(sizes))
    store.copy_(flat(importance))
    parts = {n: part.view(t.shape) for (n, t), part in zip(importance.items(), store.split(sizes))}
    for fraction in (0.05, 0.4, 1.0):
        lazy = each_selected(parts, fraction, "cpu")
        name, first = next(lazy)
        found = {name: first, **dict(lazy)}
        expected = brute_force(importance, math.floor(Fraction(str(fraction)) * sum(sizes)))
        assert torch.equal(flat(found), expected) and torch.equal(flat(select_neurons(importance, fraction)), expected)
        assert list(found) == list(importance) and first.shape == importance[name].shape
    assert torch.equal(store, flat(importance))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counting_on_a_gpu_gives_the_same_masks(monkeypatch):
    monkeypatch.setattr(selection_module, "CHUNK", 37)
    importance = {n: t.round() for n, t in random_importance(7).items()}
    found = dict(each_selected(importance, 0.3, "cuda"))
    assert all(m.device.type == "cpu" for m in found.values())
    assert torch.equal(flat(found), flat(select_neurons(importance, 0.3)))


@pytest.mark.parametrize("fraction", [0, 1.5, math.nan])
def test_fractions_are_checked_there_too(fraction):
    with pytest.raises(ValueError):
        list(each_selected(random_importance(0), fraction))


# ---- positions of selected entries -------------------------------------------------------------------------

def random_tensor(seed):
    """A shape and a mask: one, two or three dimensions, more than 256 rows among them, densities from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(1, high, (1,), generator=generator))
    shape = [(draw(2000),), (draw(900), draw(40)), (draw(40), draw(900)), (draw(600), 3, 5), (512, 256)][seed % 5]
    density = [0.0, 0.003, 0.05, 0.5, 1.1][seed // 5 % 5]
    values = torch.randn(shape, generator=generator)
    return values, torch.rand(shape, generator=generator) < density


@pytest.mark.parametrize("chunk", [1, 2048, 1 << 24])
def test_a_selection_walks_over_exactly_the_selected_entries(monkeypatch, chunk):
    """take gives what indexing by the mask gives, put changes these entries only; chunk after chunk of whole rows."""
    monkeypatch.setattr(selection_module, "CHUNK", chunk)
    for seed in range(50):
        values, mask = random_tensor(seed)
        for m in (mask, None) if seed % 2 else (mask,):
            where, expected = Selection(values.shape, m), values[mask] if m is not None else values.flatten()
            assert len(where) == len(expected)
            taken, new, filled, row, at = [], torch.arange(len(where)) + 100.0, values.clone(), 0, 0
            for rows, entries, index in where.chunks():
                assert (rows.start, entries.start) == (row, at) and rows.stop > rows.start
                assert rows.stop - rows.start <= max(256, chunk // math.prod(values.shape[1:]))
                row, at = rows.stop, entries.stop
                taken.append(take(values[rows], index))
                assert len(taken[-1]) == entries.stop - entries.start
                put(filled[rows], index, new[entries])
            assert (row, at) == (len(values), len(where))
            assert torch.equal(torch.cat(taken), expected), seed
            twin = values.clone()
            twin[mask if m is not None else ...] = new if m is not None else new.view(values.shape)
            assert torch.equal(filled, twin), seed
            for _ in "12":  # what a CPU keeps is what a GPU decodes anew
                for (*mine, kept), (*theirs, index) in zip(where.chunks(), where.decoded(), strict=True):
                    assert mine == theirs and (kept is index is None or torch.equal(kept, index))


def test_a_selection_of_5_percent_takes_1_2_bytes_an_entry():
    """One for the entry and two for its block of 256, of which 12.8 entries share them."""
    mask = torch.rand(2048, 512, generator=torch.Generator().manual_seed(0)) < 0.05
    where = Selection(mask.shape, mask)
    held = sum(t.numel() * t.element_size() for t in vars(where).values() if isinstance(t, torch.Tensor))
    assert 1.1 < held / int(mask.sum()) < 1.2
    assert not [t for t in vars(Selection(mask.shape)).values() if isinstance(t, torch.Tensor)]


def test_selections_are_equal_when_they_select_the_same():
    mask = torch.rand(300, 20, generator=torch.Generator().manual_seed(0)) < 0.05
    other = mask.flip(0)
    assert Selection(mask.shape, mask) == Selection(mask.shape, mask.clone()) != Selection(mask.shape, other)
    moved = torch.zeros(300, 256, dtype=torch.bool)
    moved[3, 7] = True
    assert Selection(moved.shape, moved) != Selection(moved.shape, moved.roll(1, 0))  # another block, the same offset


@pytest.mark.parametrize("percent", ["7", "0.57", "5", "29", "58", "100"])
def test_shares_of_a_percent_are_exact_from_either_end(percent):
    """As floats 1 - 7/100 and 0.57/100 fall beside what they mean, and a weight with them."""
    importance = {"a": torch.arange(100_000.0).view(100, 1000)}
    share = Fraction(percent) / 100
    count = math.floor(share * 100_000)
    highest, lowest = (dict(each_selected(importance, share, lowest=end))["a"].flatten() for end in (False, True))
    assert highest.nonzero().flatten().tolist() == list(range(100_000 - count, 100_000))
    assert lowest.nonzero().flatten().tolist() == list(range(count))


def test_overlap_counts_the_share_of_the_smaller_mask():
    a = {"x": torch.tensor([1, 1, 0, 0, 0]).bool(), "y": torch.tensor([1, 0]).bool()}
    b = {"x": torch.tensor([0, 1, 1, 1, 1]).bool(), "y": torch.tensor([1, 0]).bool()}
    assert overlap(a, b) == overlap(b, a) == 2 / 3
    assert overlap(a, a) == 1
    assert overlap(a, {n: ~m for n, m in a.items()}) == 0


# ---- mask files --------------------------------------------------------------------------------------------

def test_pack_and_unpack_are_inverses_at_one_bit_a_weight(tmp_path):
    chosen = select_neurons(random_importance(1, {**SHAPES, "odd": (3, 7), "one": (1,)}), 0.3)
    packed = pack_mask(chosen.items())
    assert all(packed.bits[n].numel() == -(-m.numel() // 8) for n, m in chosen.items())
    save_mask(chosen, tmp_path / "mask.safetensors")
    shapes = {n: m.shape for n, m in chosen.items()}
    back = load_mask(tmp_path / "mask.safetensors", shapes)
    assert back.keys() == chosen.keys()
    assert all(torch.equal(back[n], m) and back[n].dtype == torch.bool for n, m in chosen.items())


def test_a_packed_mask_is_a_mapping_that_unpacks_what_is_asked_for():
    chosen = select_neurons(random_importance(1, {**SHAPES, "odd": (3, 7)}), 0.3)
    packed = pack_mask((n, m) for n, m in chosen.items())
    assert isinstance(packed, PackedMask) and list(packed) == list(chosen) and len(packed) == len(chosen)
    assert "odd" in packed and "even" not in packed and packed["odd"].shape == (3, 7)
    assert selected(packed) == selected(chosen) and mask_hash(packed) == mask_hash(chosen)
    assert overlap(packed, chosen) == 1
    packed["odd"][:] = False  # a copy: the bits stay
    assert torch.equal(packed["odd"], chosen["odd"])
    with pytest.raises(KeyError):
        packed["even"]


def test_hash_tells_masks_apart():
    chosen = select_neurons(random_importance(1), 0.3)
    other = {n: m.clone() for n, m in chosen.items()}
    assert mask_hash(chosen) == mask_hash(other)
    other["model.norm.weight"][0] ^= True
    assert mask_hash(chosen) != mask_hash(other)


CORRUPT = {
    "no metadata": lambda bits, meta: (bits, {}),
    "no shapes": lambda bits, meta: (bits, {"format": "pt"}),
    "shapes not JSON": lambda bits, meta: (bits, {**meta, "shapes": "{"}),
    "shapes a list": lambda bits, meta: (bits, {**meta, "shapes": '["a", "b"]'}),
    "shape not a list": lambda bits, meta: (bits, {**meta, "shapes": '{"a": "x", "b": [9]}'}),
    "shape negative": lambda bits, meta: (bits, {**meta, "shapes": '{"a": [-2, -4], "b": [9]}'}),
    "shape with a fraction": lambda bits, meta: (bits, {**meta, "shapes": '{"a": [2.5, 4], "b": [9]}'}),
    "a tensor missing": lambda bits, meta: ({"a": bits["a"]}, meta),
    "a tensor too many": lambda bits, meta: ({**bits, "c": bits["a"].clone()}, meta),
    "a byte missing": lambda bits, meta: ({**bits, "b": bits["b"][:1]}, meta),
    "a byte too many": lambda bits, meta: ({**bits, "a": torch.cat((bits["a"], bits["a"]))}, meta),
    "not bytes": lambda bits, meta: ({**bits, "a": bits["a"].float()}, meta),
    "larger shape": lambda bits, meta: (bits, {**meta, "shapes": json.dumps({"a": [100, 100], "b": [9]})}),
}


@pytest.mark.parametrize("how", CORRUPT)
def test_corrupted_masks_are_refused(how, tmp_path):
    good = {"a": torch.ones(2, 4, dtype=torch.bool), "b": torch.ones(9, dtype=torch.bool)}
    packed = pack_mask(good.items())
    bits, meta = CORRUPT[how](packed.bits, {"shapes": json.dumps(packed.shapes)})
    path = tmp_path / "mask.safetensors"
    save_file(bits, path, metadata=meta or None)
    with pytest.raises(UserError, match="mask.safetensors"):
        load_mask(path, {"a": torch.Size([2, 4]), "b": torch.Size([9])})


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
