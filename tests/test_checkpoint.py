"""checkpoint.py: int8 models, saved as what they came from; folders that do not fit."""

import json

import pytest
import torch
from helpers import FIXTURES, HF, random_ids, tiny_model, write_tokenizer
from safetensors.torch import load_file, save_file

from allo_mini import UserError, checkpoint
from allo_mini.checkpoint import eos_ids, find_folder, load_model, save_model
from allo_mini.data.tokenizer import Tokenizer
from allo_mini.generate import sample
from allo_mini.linear import dense_rows
from allo_mini.locate import random_importance
from allo_mini.logprobs import pack, token_logps
from allo_mini.mask import select_neurons
from allo_mini.masked_adamw import MaskedAdamW

TREES = [(random_ids(5, 0), [random_ids(6, 1), random_ids(3, 2)])]


def stored(folder):
    return {n: t for path in folder.glob("model*.safetensors") for n, t in load_file(path).items()}


def random_mask(folder, share=0.1):
    shapes = {n: t.shape for n, t in stored(folder).items()}
    return select_neurons(random_importance(shapes, 0), share)


def train_a_little(model, mask):
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-2)
    for _ in range(3):
        token_logps(model, pack(TREES)).sum().neg().backward()
        optimizer.clip(1.0)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name, limit, dtype, recompute", [  # tied, biases, two shards
    ("llama_gqa_tied", 1, "bf16", False), ("qwen2", 20_000, "fp32", True),
    ("llama3_rope", 1 << 30, "fp32", False)])
def test_an_int8_model_is_its_dequantised_twin_and_is_saved_as_its_file_with_what_was_trained(
        monkeypatch, tmp_path, name, limit, dtype, recompute):
    """Log-probs, gradients, trained weights, bit for bit; files of at most `limit` bytes."""
    monkeypatch.setattr(checkpoint, "SHARD", limit)
    folder, kind = FIXTURES / "hf" / name, checkpoint.DTYPES[dtype]
    mask, original = random_mask(folder), stored(folder)
    ours, theirs = (load_model(folder, dtype, int8=int8, mask=mask) for int8 in (True, False))
    for n, p in ours.named_parameters():
        assert hasattr(p, "int8") == (p.dtype == torch.int8) == (p.dim() == 2 and "embed" not in n)
        dense = torch.cat([rows.clone() for _, rows in dense_rows(p, kind)])
        assert torch.equal(mask[n].gather(dense), mask[n].gather(original[n].to(kind)))
        theirs.get_parameter(n).copy_(dense)
    ours.recompute = theirs.recompute = recompute
    said, again = (sample(model, [random_ids(5, 0)], 1, 6, 0) for model in (ours, theirs))
    assert said == again
    save_model(ours, tmp_path / "same")
    optimizer, twin = (train_a_little(model, mask) for model in (ours, theirs))
    assert torch.equal(optimizer.master, twin.master) and twin.largest_change() > 1e-2
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
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_every_id_that_ends_a_response_is_known(tmp_path):
    """A number or a list in either file, and the tokenizer's own."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    for ours, theirs, ends in ((7, None, (2, 7)), ([7, 9], 5, (2, 5, 7, 9)), (None, [2], (2,))):
        model = tiny_model(eos_token_id=ours)
        model.folder = tmp_path
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": theirs}))
        assert eos_ids(model, tokenizer) == ends
    model.config.raw["eos_token_id"] = "x"
    with pytest.raises(UserError, match="eos_token_id"):
        eos_ids(model, tokenizer)


NORM = "model.norm.weight"
CHANGES = {"is missing": lambda t: {name: t[name] for name in t if name != NORM},
           "does not belong": lambda t: t | {"more": torch.ones(2)},
           "floating point": lambda t: t | {NORM: torch.ones(16).int()},
           r"\[17\]": lambda t: t | {NORM: torch.ones(17)}}


@pytest.mark.parametrize("says", CHANGES)
def test_a_folder_that_does_not_fit_is_one_line(tmp_path, says):
    save_model(tiny_model(), tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    save_file(CHANGES[says](load_file(path)), path)
    for match, work in ((says, lambda: load_model(path.parent)),
                        ("exists already", lambda: save_model(tiny_model(), path.parent)),
                        ("no such", lambda: find_folder("no such folder")),
                        ("no such folder", lambda: find_folder("some/model", download=False))):
        with pytest.raises(UserError, match=match):
            work()
