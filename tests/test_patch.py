"""patch.py: the difference of two folders, applied again bit for bit; what does not fit."""

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file

from allo_mini import UserError
from allo_mini.checkpoint import load_model, save_model
from allo_mini.patch import apply, save_patch
from allo_mini.run.files import load_tensors, save_tensors

NORM = "model.norm.weight"


def changed(model, share, by):
    """A few entries of every tensor moved; the q_proj left alone."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.requires_grad_(False).named_parameters():
        if not name.endswith("q_proj.weight"):
            p += (torch.rand(p.shape, generator=generator) < share) * by
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bf16 base, runs of it in bf16 and fp32 (which bf16 cannot hold), a smaller model."""
    place = tmp_path_factory.mktemp("folders")
    save_model(tiny_model(vocab_size=700, hidden_size=32).bfloat16(), place / "base")
    runs = ("tuned", "bf16", 0.05, 0.25), ("fine", "fp32", 0.05, 1e-6), ("other", "bf16", 0.5, 0.25)
    for name, dtype, share, by in runs:
        save_model(changed(load_model(place / "base", dtype), share, by), place / name)
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


BROKEN = {"a value": lambda t: {f"{NORM}.values": t[f"{NORM}.values"] * 2},
          "too few values": lambda t: {f"{NORM}.values": t[f"{NORM}.values"][1:]},
          "a column too far": lambda t: {f"{NORM}.columns": t[f"{NORM}.columns"] + 32},
          "an unknown tensor": lambda t: {"other.values": torch.ones(3)}}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_patch_or_another_model_is_one_line(folders, tmp_path, how):
    path, broken = folders / "tuned.patch", tmp_path / "broken.patch"
    tensors, digests = load_tensors(path)
    save_tensors(tensors | BROKEN[how](tensors), broken, digests)
    for base, patch in (("base", broken), ("smaller", path), ("other", path)):
        with pytest.raises(UserError, match=rf"^{patch}: .*\Z"):
            load_model(folders / base, "bf16", changes=[patch])
