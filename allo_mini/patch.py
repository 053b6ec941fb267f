"""Patches: what training changed of a checkpoint, as positions and values: a few per cent of its size.

    python -m allo_mini.checkpoint apply BASE PATCH OUT        the whole model again, as a Hugging Face folder
    python eval.py --model BASE --patch FILE ...               or without writing it

For each changed tensor, NAME.offsets and NAME.counts (selection.Selection) and NAME.values, in the trained model's dtype.
"""

import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from allo_mini import UserError
from allo_mini.checkpoint import load_model, read_tensor, save_model, shard_files
from allo_mini.files import load_tensors, save_tensors
from allo_mini.model import CausalLM
from allo_mini.selection import Selection, put, take


def bytes_of(values: Tensor) -> bytes:
    """What a digest is made of: exact for every floating-point type up to fp32."""
    return values.float().numpy().tobytes()


def save_patch(base: Path, tuned: Path, path: Path) -> None:
    """Keep the entries in which two model folders differ, with a digest of what stood there and what stands there now."""
    before, after, tensors, digest = shard_files(base), shard_files(tuned), {}, hashlib.sha256()
    for name in sorted(after):
        old, new = read_tensor(before[name], name), read_tensor(after[name], name)
        changed = old.to(new.dtype) != new
        if changed.any():
            tensors |= Selection(new.shape, changed).named(name, new[changed])
            digest.update(name.encode() + bytes_of(old[changed]) + bytes_of(new[changed]))
    save_tensors(tensors, path, {"digest": digest.hexdigest()})


@torch.no_grad()
def apply_patch(model: CausalLM, path: str | Path) -> CausalLM:
    """Put a patch's values into a freshly loaded model. Raises UserError, the model then half changed, when it was made
    for another base or is broken: the digest tells either."""
    tensors, metadata = load_tensors(path)
    files, digest = shard_files(model.folder), hashlib.sha256()
    try:
        for name in sorted(key.removesuffix(".values") for key in tensors if key.endswith(".values")):
            old, p = read_tensor(files[name], name), model.get_parameter(name)
            values, where = tensors[f"{name}.values"], Selection.read(tensors, name, p.shape, "cpu")
            digest.update(name.encode())
            for rows, entries, index in where.chunks():
                digest.update(bytes_of(take(old[rows], index)))
                put(p[rows], index.to(p.device), values[entries])
            digest.update(bytes_of(values))
        if digest.hexdigest() != metadata["digest"]:
            raise ValueError("its digest differs")
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path}: no patch for {model.folder}, or broken ({' '.join(str(e).split())[:80]})") from None
    return model


def main(argv: list[str]) -> int:
    """The command `python -m allo_mini.checkpoint apply BASE PATCH OUT`."""
    try:
        if len(argv) != 4 or argv[0] != "apply":
            raise UserError("expected: python -m allo_mini.checkpoint apply BASE PATCH OUT")
        save_model(apply_patch(load_model(argv[1], None), argv[2]), argv[3])
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
