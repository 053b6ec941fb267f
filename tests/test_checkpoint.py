"""checkpoint.py: what is saved is what was loaded; patch.py: what two folders differ in."""

import json
import shutil

import pytest
import torch
from helpers import (FIXTURES, HF, assert_close, random_ids, random_mask, tiny_model, whole,
                     write_tokenizer)
from safetensors.torch import load_file, save_file

from allo_mini import UserError, checkpoint
from allo_mini.checkpoint import eos_ids, load_model, save_model
from allo_mini.data.encoder import Encoder
from allo_mini.data.tokenizer import Tokenizer
from allo_mini.generate import generate
from allo_mini.locate import random_importance
from allo_mini.logprobs import pack, token_logps
from allo_mini.mask import select_neurons
from allo_mini.masked_adamw import MaskedAdamW
from allo_mini.patch import apply, save_patch
from allo_mini.run.files import load_tensors, save_tensors

PROMPTS = [random_ids(n, n) for n in (3, 9, 6)]
TREES = [(random_ids(5, 0), [random_ids(6, 1), random_ids(3, 2)])]


def stored(folder):
    return {n: t for path in folder.glob("model*.safetensors") for n, t in load_file(path).items()}


def copy_of(name, tmp_path):
    """A writable copy of a fixture, and its weights."""
    folder = shutil.copytree(FIXTURES / "hf" / name, tmp_path / name)
    return folder, stored(folder)


@pytest.mark.parametrize("name, limit, dtype, recompute", [  # tied, biases, two shards
    ("llama_gqa_tied", 1, "bf16", False), ("qwen2", 20_000, "fp32", True),
    ("llama3_rope", 1 << 30, "fp32", False)])
def test_an_int8_model_is_its_dequantised_twin_and_is_saved_as_its_file_with_what_was_trained(
        monkeypatch, tmp_path, name, limit, dtype, recompute):
    """Log-probs, gradients, trained weights, bit for bit; files of at most `limit` bytes."""
    monkeypatch.setattr(checkpoint, "SHARD", limit)
    folder, kind = FIXTURES / "hf" / name, checkpoint.DTYPES[dtype]
    original = stored(folder)
    mask = select_neurons(random_importance({n: t.shape for n, t in original.items()}, 0), 0.1)
    ours, theirs = (load_model(folder, dtype, int8=int8, mask=mask) for int8 in (True, False))
    for n, p in ours.named_parameters():
        assert hasattr(p, "int8") == (p.dtype == torch.int8) == (p.dim() == 2 and "embed" not in n)
        assert torch.equal(mask[n].gather(whole(p, kind)), mask[n].gather(original[n].to(kind)))
        theirs.get_parameter(n).copy_(whole(p, kind))
    ours.recompute = theirs.recompute = recompute
    for sampled in ({}, {"temperature": 1.0, "top_p": 0.9}):
        assert generate(ours, PROMPTS, 20, **sampled) == generate(theirs, PROMPTS, 20, **sampled)
    save_model(ours, tmp_path / "same")
    optimizer, twin = (MaskedAdamW(model.named_parameters(), mask, lr=1e-2)
                       for model in (ours, theirs))
    for model, trained in ((ours, optimizer), (theirs, twin)) * 3:
        token_logps(model, pack(TREES)).sum().neg().backward()
        trained.clip(1.0)
        trained.step()
    assert torch.equal(optimizer.master, twin.master) and float(twin.moved().max()) > 1e-2
    assert torch.equal(token_logps(ours, pack(TREES)), token_logps(theirs, pack(TREES)))
    save_model(ours, tmp_path / "saved")
    same, saved = stored(tmp_path / "same"), stored(tmp_path / "saved")
    assert saved.keys() == same.keys() == original.keys()
    assert all(same[n].equal(t.to(kind)) for n, t in original.items())
    for slot in optimizer.slots:  # a small bias may have no selected entry
        slot.selected.scatter(same[slot.name], optimizer.master[slot.where])
    again = load_model(tmp_path / "saved", dtype)
    assert all(same[n].equal(p) and saved[n].equal(p) for n, p in again.named_parameters())
    held = {path.name: load_file(path) for path in (tmp_path / "saved").glob("*.safetensors")}
    sizes = [sum(t.nbytes for t in one.values()) for one in held.values() if len(one) > 1]
    assert max(sizes, default=0) <= limit
    if limit < 1 << 30:
        table = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
        assert table["weight_map"] == {n: file for file, one in held.items() for n in one}


@pytest.mark.parametrize("name", HF)
def test_transformers_reads_what_we_save(tmp_path, name):
    classes = pytest.importorskip("transformers")
    model = load_model(FIXTURES / "hf" / name)
    save_model(model, tmp_path / "saved")
    theirs = classes.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([random_ids(12, 0)])
    torch.testing.assert_close(model.logits(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_every_id_that_ends_a_response_is_known(tmp_path):
    """A number or a list in either file, and the tokenizer's own."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    for ours, theirs, ends in ((7, None, (2, 7)), ([7, 9], 5, (2, 5, 7, 9)), (None, [2], (2,))):
        model = tiny_model(eos_token_id=ours)
        model.folder = tmp_path
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": theirs}))
        encoder = Encoder(tokenizer, "none", 9)
        assert eos_ids(model, encoder) == ends


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_save_and_load_are_bit_exact(name, dtype, tmp_path):
    """The file holds what was loaded, under Hugging Face's names; loaded again it is the same."""
    model = load_model(FIXTURES / "hf" / name, dtype)
    save_model(model, tmp_path / "saved")
    written, kind = load_file(tmp_path / "saved/model.safetensors"), checkpoint.DTYPES[dtype]
    original = {n: t.to(kind) for n, t in stored(FIXTURES / "hf" / name).items()}
    assert_close(written, original, atol=0, rtol=0)
    again = load_model(tmp_path / "saved", dtype)
    assert_close(dict(again.named_parameters()), written, atol=0, rtol=0)
    names = ("dtype", "torch_dtype", "_name_or_path")
    new, old = ({k: v for k, v in m.config.raw.items() if k not in names} for m in (again, model))
    assert new == old and ("lm_head.weight" in written) != model.config.tie_word_embeddings


def test_saving_overwrites_nothing_and_copies_the_tokenizers_files(tmp_path):
    base, _ = copy_of("llama_mha", tmp_path)
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt")
    for name in files:
        (base / name).write_text(f'"{name}"')
    save_model(load_model(base), tmp_path / "saved")
    assert all((tmp_path / "saved" / name).exists() == (name != "notes.txt") for name in files)
    before = (tmp_path / "saved/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save_model(tiny_model(seed=1), tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == before


def test_a_superfluous_lm_head_in_a_tied_checkpoint_is_ignored(tmp_path):
    """Some checkpoints store the tied matrix twice, and old ones store the rope frequencies."""
    folder, state = copy_of("llama_gqa_tied", tmp_path)
    more = {"lm_head.weight": state["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | more, folder / "model.safetensors")
    assert {n for n, _ in load_model(folder).named_parameters()} == set(state)


def test_a_missing_shard_is_refused_and_swapped_ones_do_no_harm(tmp_path):
    folder, state = copy_of("llama3_rope", tmp_path)
    first, second = sorted(folder.glob("model-*"))
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    model = load_model(folder, torch.bfloat16)
    assert_close(dict(model.named_parameters()), state, atol=0, rtol=0)
    left = folder / "model-00001-of-00003.safetensors"  # by an earlier upload
    shutil.copy(first, left)
    assert_close(dict(load_model(folder, torch.bfloat16).named_parameters()), state, atol=0, rtol=0)
    index = folder / "model.safetensors.index.json"
    index.rename(tmp_path / "index")
    with pytest.raises(UserError, match="shards of different sets; keep one, with its index"):
        load_model(folder)
    left.unlink()
    second.unlink()
    with pytest.raises(UserError, match="is missing"):
        load_model(folder)
    save_file(state, folder / "model.safetensors")  # as in transformers it comes first
    assert_close(dict(load_model(folder, torch.bfloat16).named_parameters()), state, atol=0, rtol=0)


# ---- patches -----------------------------------------------------------------------------------

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bf16 base, runs of it in bf16 and fp32 (which bf16 cannot hold), a smaller model. Runs have
    a few entries of every tensor moved, but of no q_proj."""
    place = tmp_path_factory.mktemp("folders")
    save_model(tiny_model(vocab_size=700, hidden_size=32).bfloat16(), place / "base")
    runs = ("tuned", "bf16", 0.05, 0.25), ("fine", "fp32", 0.05, 1e-6), ("other", "bf16", 0.5, 0.25)
    for name, dtype, share, by in runs:
        model = load_model(place / "base", dtype)
        moved = random_mask(model, share)
        for key, p in model.requires_grad_(False).named_parameters():
            p += moved[key] * by * ("q_proj" not in key)
        save_model(model, place / name)
        save_patch(place / "base", place / name, place / f"{name}.patch")
    save_model(tiny_model(vocab_size=300, hidden_size=32), place / "smaller")
    return place


@pytest.mark.parametrize("name", ["tuned", "fine"])
def test_base_and_patch_are_the_tuned_model(folders, tmp_path, name):
    """Also in a folder, in the dtype of the run; a patch holds what differs, no more."""
    tuned, patch = load_file(folders / name / "model.safetensors"), folders / f"{name}.patch"
    model = load_model(folders / "base", tuned[NORM].dtype, changes=[patch])
    assert all(torch.equal(p, tuned[n]) for n, p in model.named_parameters())
    apply(["apply", str(folders / "base"), str(patch), str(tmp_path / "again")])
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(again[n].dtype == t.dtype and torch.equal(again[n], t) for n, t in tuned.items())
    tensors, _ = load_tensors(patch)
    assert not any("q_proj" in key for key in tensors)
    assert sum(t.nbytes for t in tensors.values()) < 0.2 * sum(t.nbytes for t in tuned.values())


def test_a_broken_patch_or_another_model_is_one_line(folders, tmp_path):
    path, broken = folders / "tuned.patch", tmp_path / "broken.patch"
    kept, digests = load_tensors(path)
    values, columns = f"{NORM}.values", f"{NORM}.columns"
    for change in ({values: kept[values] * 2}, {values: kept[values][1:]},
                   {columns: kept[columns] + 32}, {"other.values": torch.ones(3)}):
        save_tensors(kept | change, broken, digests)
        for base, patch in (("base", broken), ("smaller", path), ("other", path)):
            with pytest.raises(UserError, match=rf"^{patch}: .*\Z"):
                load_model(folders / base, "bf16", changes=[patch])
