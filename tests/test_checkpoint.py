"""checkpoint.py: int8 models (loaded, trained, saved as what they came from) and weights in several files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from allo_mini import checkpoint
from allo_mini.checkpoint import eos_ids, load_model, save_model
from allo_mini.generate import generate
from allo_mini.linear import dense_rows
from allo_mini.logprobs import pack, token_logps
from allo_mini.mask import pack_mask
from allo_mini.optim import FlatGradient, MaskedAdamW
from allo_mini.tokenizer import Tokenizer
from helpers import FIXTURES, random_ids, tiny_model, write_tokenizer

TREES = [(random_ids(5, 0), [random_ids(6, 1), random_ids(3, 2)]), (random_ids(2, 3), [random_ids(4, 4)])]
FAMILIES = ["llama_gqa_tied", "qwen2", "llama3_rope"]  # tied; biases; two shards


def stored(folder):
    return {n: t for path in sorted(folder.glob("model*.safetensors")) for n, t in load_file(path).items()}


def random_mask(folder, share=0.1):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(t.shape, generator=generator) < share for n, t in stored(folder).items()}


def is_int8(name, tensor) -> bool:
    return tensor.dim() == 2 and "embed_tokens" not in name


def train_a_little(model, mask, steps=3, **settings):
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-2, **settings)
    for _ in range(steps):
        token_logps(model, pack(TREES)).sum().neg().backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.clip(1.0)
        optimizer.step()
    return optimizer


# ---- int8 --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("blocks", [0, 2])
def test_an_int8_model_is_its_dequantised_twin(name, blocks, tmp_path):
    """Log-probs, gradients and trained weights, with blocks recomputed too: bit for bit."""
    folder = FIXTURES / "hf" / name
    mask, original = random_mask(folder), stored(folder)
    ours = load_model(folder, int8=True, mask=pack_mask(mask.items()))
    ours.checkpoint_blocks = blocks
    dense = {n: torch.cat([rows.clone() for _, rows in dense_rows(p, torch.float32)]) for n, p in ours.named_parameters()}
    shutil.copytree(folder, tmp_path / "twin", ignore=shutil.ignore_patterns("model*"))
    save_file(dense, tmp_path / "twin" / "model.safetensors")
    theirs = load_model(tmp_path / "twin")
    for n, p in ours.named_parameters():
        assert (p.dtype == torch.int8) == is_int8(n, p) == hasattr(p, "int8")
        assert torch.equal(dense[n][mask[n]], original[n][mask[n]])
        if is_int8(n, p):
            scale = torch.cat([scale for _, scale in p.int8.parts])
            step = scale.repeat_interleave(p.shape[1] // scale.shape[1], 1)
            assert ((dense[n] - original[n]).abs() <= step / 2 * 1.0001)[~mask[n]].all()
    with torch.no_grad():
        assert torch.equal(token_logps(ours, pack(TREES)), token_logps(theirs, pack(TREES)))
        assert generate(ours, [random_ids(5, 0)], 6) == generate(theirs, [random_ids(5, 0)], 6)
    a, b = (train_a_little(model, mask) for model in (ours, theirs))
    assert torch.equal(a.master, b.master) and a.change(torch.float32)[0] > 1e-2
    assert torch.equal(token_logps(ours, pack(TREES)), token_logps(theirs, pack(TREES)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_saving_an_int8_model_gives_the_original_with_the_selected_entries_replaced(name, dtype, tmp_path):
    folder, kind = FIXTURES / "hf" / name, checkpoint.DTYPES[dtype]
    mask, original = random_mask(folder), stored(folder)
    model = load_model(folder, dtype, int8=True, mask=mask)
    save_model(model, tmp_path / "untouched")
    optimizer = train_a_little(model, mask)
    save_model(model, tmp_path / "saved")
    untouched, saved = stored(tmp_path / "untouched"), stored(tmp_path / "saved")
    assert saved.keys() == untouched.keys() == original.keys()
    values = {s.name: optimizer.master[s.where].to(kind) for s in optimizer.slots}
    for n, t in original.items():
        assert torch.equal(untouched[n], t.to(kind))
        expected = t.to(kind, copy=True)
        expected[mask[n]] = values.get(n, expected[:0].flatten())  # a small bias may have no selected entry
        assert saved[n].dtype == kind and torch.equal(saved[n], expected), n
    assert any(not torch.equal(saved[n], untouched[n]) for n in saved)
    again = load_model(tmp_path / "saved", dtype, int8=True, mask=mask)
    for (n, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        if is_int8(n, p):
            assert torch.equal(p.int8.values, q.int8.values)
            assert all(torch.equal(a, b) for mine, theirs in zip(p.int8.parts, q.int8.parts) for a, b in zip(mine, theirs))


def test_without_a_mask_everything_is_int8_and_can_only_be_read():
    """For sampling, scoring and locating; the log-probs stay near, and training is refused."""
    folder = FIXTURES / "hf" / "qwen2"
    model, plain = load_model(folder, int8=True), load_model(folder)
    with torch.no_grad():
        difference = token_logps(model, pack(TREES)) - token_logps(plain, pack(TREES))
    assert 0 < difference.abs().max() < 0.5
    assert len(generate(model, [random_ids(5, 0)], 4)[0]) == 4
    for name, p in model.named_parameters():
        assert not p.requires_grad and (not hasattr(p, "int8") or len(p.int8.selection) == len(p.int8.values) == 0)
    with pytest.raises(ValueError, match="int8 weights can only be trained through a mask"):
        MaskedAdamW(model.named_parameters())
    with pytest.raises(ValueError, match="is int8 and keeps other entries"):
        MaskedAdamW(model.named_parameters(), random_mask(folder))
    flat = FlatGradient(load_model(folder, int8=True).named_parameters())
    assert len(flat.grad) == sum(p.numel() for p in plain.parameters())


def test_an_int8_model_and_another_mask_do_not_go_together():
    folder = FIXTURES / "hf" / "qwen2"
    mask = random_mask(folder)
    model, other = load_model(folder, int8=True, mask=mask), {n: m.clone() for n, m in mask.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    other[name] = mask[name].flip(0)  # as many entries, elsewhere
    with pytest.raises(ValueError, match=f"{name} is int8 and keeps other entries than the mask selects"):
        MaskedAdamW(model.named_parameters(), other)
    MaskedAdamW(load_model(folder, int8=True, mask=mask).named_parameters(), mask)


def test_every_id_that_ends_a_response_is_known(tmp_path):
    """A number or a list in either file, and the tokenizer's own."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    for ours, theirs, ends in ((7, None, (2, 7)), ([7, 9], 5, (2, 5, 7, 9)), (None, [2, 11], (2, 11))):
        model = tiny_model(eos_token_id=ours)
        model.folder = tmp_path
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": theirs}))
        assert eos_ids(model, tokenizer) == ends


# ---- several files -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("limit, count", [(1, None), (20_000, None), (1 << 30, 1)])
@pytest.mark.parametrize("int8", [False, True])
def test_weights_in_several_files_load_again(monkeypatch, tmp_path, limit, count, int8):
    """No file over the limit unless one tensor alone is; the table's names and total are right."""
    monkeypatch.setattr(checkpoint, "SHARD", limit)
    folder = FIXTURES / "hf" / "llama_mha"
    save_model(load_model(folder, int8=int8, mask=random_mask(folder)), tmp_path / "saved")
    files, index = sorted((tmp_path / "saved").glob("model*.safetensors")), tmp_path / "saved/model.safetensors.index.json"
    original = stored(folder)
    assert len(files) == (count or len(original) if limit < 2 else len(files)) and index.exists() == (limit < 1 << 30)
    for path in files:
        held = load_file(path)
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
    if index.exists():
        table = json.loads(index.read_text())
        assert table["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
        assert table["weight_map"] == {n: path.name for path in files for n in load_file(path)}
        assert [p.name for p in files] == [f"model-{i:05}-of-{len(files):05}.safetensors"
                                           for i in range(1, len(files) + 1)] and len(files) > 1
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(p, original[n]) for n, p in again.named_parameters())
    save_model(again, tmp_path / "twice")
    assert stored(tmp_path / "twice").keys() == original.keys()


@pytest.mark.parametrize("limit", [20_000, 1 << 30])
def test_transformers_reads_what_an_int8_model_saved(monkeypatch, tmp_path, limit):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(checkpoint, "SHARD", limit)
    folder = FIXTURES / "hf" / "llama_gqa_tied"
    mask = random_mask(folder)
    model = load_model(folder, int8=True, mask=mask)
    train_a_little(model, mask)
    save_model(model, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([random_ids(12, 0)])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "saved").logits(ids), theirs(ids).logits, atol=1e-4, rtol=0)
