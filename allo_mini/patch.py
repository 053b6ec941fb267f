"""What training changed of a checkpoint, as positions and values: a few per cent of its size.

    python -m allo_mini.patch apply BASE PATCH OUT      the whole model again, as a folder
    python eval.py --model BASE --patch PATCH ...       or without writing it

For each changed tensor NAME.columns, NAME.counts (mask.Selected) and NAME.values. Two kinds of
files look so: a run's patch.safetensors, in the model's dtype and with a digest of each tensor's
old and new values, and what a stage hands to the next one (forget.safetensors): fp32 weights, which
a bf16 model cannot hold.
"""

import hashlib
import json
import sys

import torch

from allo_mini import UserError
from allo_mini.mask import Selected, from_tensors, to_tensors
from allo_mini.run.files import load_tensors, read_if_there, reading, save_tensors
from allo_mini.run.log import exit_code


def digest(old, new):
    """Of the values that stood and stand at the changed places, as fp32, which is exact."""
    return hashlib.sha256(torch.cat([old, new]).float().numpy()).hexdigest()[:16]


def read_patch(path, names):
    """(path, tensors, digests) of a patch. Raises UserError when it changes others than `names`."""
    tensors, digests = load_tensors(path)
    for key in tensors:
        name = key.rpartition(".")[0]
        if name not in names or f"{name}.values" not in tensors:
            raise UserError(f"{path}: made for another model, or no patch: it has {key}")
    return path, tensors, digests


def put_changes(tensor, name, dtype, patches):
    """A checkpoint's tensor in `dtype`, with the values of patches put into it.

    Raises UserError when a patch was made for other values than those that stand there, or is
    broken.
    """
    out = tensor.to(dtype)
    for path, tensors, digests in patches:
        values = tensors.get(f"{name}.values")
        if values is not None:
            with reading(path):
                selected = from_tensors(tensors, {name: tensor.shape})[name]
                if digests and digests[name] != digest(selected.gather(tensor), values):
                    raise UserError(f"{path}: made for other values of {name}, or broken")
                selected.scatter(out, values)
    return out


def begin_at(optimizer, path):
    """Before the first step: take over the fp32 weights of a file that another stage wrote.

    A bf16 parameter holds only what they round to: of a step of 1e-6 on 0.02, nothing.
    """
    patch = path, *load_tensors(path)
    for slot in optimizer.slots:
        selected = slot.selected.to("cpu")
        dense = torch.zeros(selected.shape)
        selected.scatter(dense, optimizer.master[slot.where])
        values = selected.gather(put_changes(dense, slot.name, dense.dtype, [patch]))
        optimizer.master[slot.where] = optimizer.start[slot.where] = values


def save_patch(base, tuned, path):
    """Keep the entries in which two model folders differ, their digests, what ends a response."""
    from allo_mini.checkpoint import read_tensor, shard_files
    before, after = shard_files(base), shard_files(tuned)
    tensors, digests = {}, {}
    for name in after:
        old, new = read_tensor(before, name), read_tensor(after, name)
        changed = old.to(new.dtype) != new
        if changed.any():
            tensors |= to_tensors({name: Selected.from_dense(changed)}, {name: new[changed]})
            digests[name] = digest(old[changed], new[changed])
    ends = read_if_there(tuned / "generation_config.json").get("eos_token_id", [])
    save_tensors(tensors, path, digests | {"eos_token_ids": str(ends).strip("[]")})


def apply(argv):
    """The command `python -m allo_mini.patch apply BASE PATCH OUT`; OUT is in the patch's dtype."""
    from allo_mini.checkpoint import load_model, save_model
    if argv[:-3] != ["apply"]:
        raise UserError("expected: python -m allo_mini.patch apply BASE PATCH OUT")
    _, base, patch, out = argv
    tensors, notes = load_tensors(patch)
    dtypes = [x.dtype for x in tensors.values() if x.is_floating_point()]
    with reading(patch):
        ends = json.loads(f"[{notes.get('eos_token_ids', '')}]")
    save_model(load_model(base, *dtypes[:1], changes=[patch]), out, ends)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: apply(sys.argv[1:])))
