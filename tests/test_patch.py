"""Patches: the difference of two checkpoints, applied again bit for bit; broken ones and foreign bases are refused."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from allo_mini import UserError, checkpoint
from allo_mini.checkpoint import apply_patch, load_model, save_model, save_patch
from helpers import tiny_model


def changed_copy(model, share: float, seed: int = 0):
    """A few entries of every tensor moved; one tensor left alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("q_proj.weight"):
                p += (torch.rand(p.shape, generator=generator) < share) * 0.25
    return model


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def folders(request, tmp_path):
    wide = {"vocab_size": 700, "hidden_size": 32}  # more than one block of 256 entries a tensor, and norms of 32
    base = tiny_model(**wide).to(request.param)
    save_base = tmp_path / "base"
    save_model(base, save_base)
    save_model(changed_copy(base, 0.05), tmp_path / "tuned")
    save_patch(save_base, tmp_path / "tuned", tmp_path / "patch.safetensors")
    return tmp_path


def test_base_and_patch_are_the_tuned_model(folders):
    tuned = load_file(folders / "tuned" / "model.safetensors")
    dtype = next(iter(tuned.values())).dtype
    model = apply_patch(load_model(str(folders / "base"), dtype), folders / "patch.safetensors")
    assert all(torch.equal(p, tuned[name]) for name, p in model.named_parameters())
    paths = (folders / name for name in ("base", "patch.safetensors", "out"))
    command = [sys.executable, "-m", "allo_mini.checkpoint", "apply", *paths]
    assert subprocess.run(command, capture_output=True).returncode == 0
    written = load_file(folders / "out" / "model.safetensors")
    assert written.keys() == tuned.keys() and all(torch.equal(written[n], tuned[n]) for n in tuned)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert "exists already" in again.stderr


def test_what_an_fp32_run_changed_of_a_bf16_base_is_not_rounded_away(folders):
    base = load_model(str(folders / "base"), torch.float32)
    with torch.no_grad():
        base.model.norm.weight += 2.0**-12  # lost in bf16
    save_model(base, folders / "fine")
    save_patch(folders / "base", folders / "fine", folders / "fine.safetensors")
    paths = [str(folders / name) for name in ("base", "fine.safetensors", "whole")]
    assert checkpoint.main(["apply", *paths]) == 0
    written, wanted = (load_file(folders / name / "model.safetensors") for name in ("whole", "fine"))
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)


def test_a_patch_is_small(folders):
    """5 % of the entries: a byte and a value each, two bytes for every block, and a header."""
    with safe_open(folders / "patch.safetensors", "pt") as f:
        size = sum(f.get_tensor(k).nbytes for k in f.keys())
        values = [f.get_tensor(k) for k in f.keys() if k.endswith(".values")]
        assert not any("q_proj" in k for k in f.keys())
    whole = sum(t.nbytes for t in load_file(folders / "tuned" / "model.safetensors").values())
    assert sum(map(len, values)) > 0 and size < 0.12 * whole


def test_another_base_is_refused(folders):
    save_model(changed_copy(load_model(str(folders / "base")), 0.5, seed=9), folders / "other")
    with pytest.raises(UserError, match="no patch for .*digest differs.* was made for the folder base"):
        apply_patch(load_model(str(folders / "other")), folders / "patch.safetensors")
    save_model(tiny_model(vocab_size=300, hidden_size=32), folders / "smaller")
    with pytest.raises(UserError, match="no patch for"):
        apply_patch(load_model(str(folders / "smaller")), folders / "patch.safetensors")


BROKEN = {
    "not a patch": lambda t, m: m.clear(),
    "unknown tensor": lambda t, m: t.update({k.replace("norm", "x"): t.pop(k) for k in [*t] if k[:10] == "model.norm"}),
    "a tensor too few": lambda t, m: [t.pop(k) for k in [*t] if k.startswith("model.norm")],
    "a part missing": lambda t, m: t.pop("model.norm.weight.counts"),
    "too few values": lambda t, m: t.update({k: v[:-1] for k, v in t.items() if k.endswith("norm.weight.values")}),
    "counts below zero": lambda t, m: t.update({k: -v for k, v in t.items() if k.endswith(".counts")}),
    "one value changed": lambda t, m: t.update({k: v * 2 for k, v in t.items() if k.endswith("layers.0.mlp.up_proj.weight.values")}),
    "counts of other blocks": lambda t, m: t.update({k: v.roll(1) for k, v in t.items() if k.endswith("embed_tokens.weight.counts")}),
    "offset past the end": lambda t, m: t.update({k: torch.full_like(v, 255) for k, v in t.items()
                                                  if k.endswith("norm.weight.offsets")}),
    "one offset past the end, not the last": lambda t, m: t.update({
        k: torch.cat((torch.full_like(v[:1], 255), v[1:])) for k, v in t.items()
        if k.endswith("norm.weight.offsets") and len(v) > 1}),
    "values no floats": lambda t, m: t.update({k: v.int() for k, v in t.items() if k.endswith(".values")}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_patch_is_one_line(folders, how):
    path = folders / "patch.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        metadata = dict(f.metadata())
    BROKEN[how](tensors, metadata)
    save_file(tensors, path, metadata)
    before = load_model(str(folders / "base"))
    with pytest.raises(UserError) as caught:
        apply_patch(before, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
