"""Patches: what training changed of a checkpoint, as positions and values: a few per cent of its size.

    python -m allo_mini.checkpoint apply BASE PATCH OUT        the whole model again, as a Hugging Face folder
    python eval.py --model BASE --patch FILE ...               or without writing it

For each changed tensor, NAME.offsets and NAME.counts (mask.Selection) and NAME.values, in the trained model's dtype.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from allo_mini import UserError
from allo_mini.checkpoint import find_folder, load_model, open_safetensors, save_model, shard_files
from allo_mini.files import load_tensors, save_tensors
from allo_mini.selection import Selection, put, take
from allo_mini.model import CausalLM

FORMAT = "allo_mini patch"


def read(files: dict[str, Path], name: str) -> Tensor:
    """One tensor of a model folder."""
    with open_safetensors(files[name]) as f:
        return f.get_tensor(name)


def save_patch(base: Path, tuned: Path, path: Path) -> None:
    """Keep the entries in which two model folders differ; tied to the base by a hash of what stood there."""
    before, after, tensors, digest = shard_files(base), shard_files(tuned), {}, hashlib.sha256()
    for name in after:
        old, new = read(before, name), read(after, name)
        changed = old.to(new.dtype) != new
        if changed.any():
            selection = Selection(new.shape, changed)
            tensors |= {f"{name}.offsets": selection.offsets, f"{name}.counts": selection.counts,
                        f"{name}.values": new[changed]}
            digest.update(name.encode() + old[changed].float().numpy().tobytes())
    names = [key.removesuffix(".values") for key in tensors if key.endswith(".values")]
    save_tensors(tensors, path, {"format": FORMAT, "names": json.dumps(names), "base": digest.hexdigest()[:16]})


def read_patch(path: str | Path, shapes: dict[str, torch.Size]) -> tuple[dict[str, tuple[Selection, Tensor]], str]:
    """{name: (positions, values)} of a patch that fits parameters of these shapes, and the hash of its base."""
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a patch file of ours")
    patch, at = {}, f"{path}: broken, or a patch of another model"
    try:
        for name in json.loads(metadata["names"]):
            offsets, counts, values = (tensors[f"{name}.{part}"] for part in ("offsets", "counts", "values"))
            size, total = shapes[name].numel(), int(counts.clamp(0, 256).sum())
            if (offsets.dtype, counts.dtype, len(counts)) != (torch.uint8, torch.int16, -(-size // 256)) or not (
                    total == int(counts.sum()) == len(offsets) == len(values) and values.is_floating_point()):
                raise ValueError(name)
            last = offsets[len(offsets) - int(counts[-1]):]  # of the last block, which may be shorter than 256
            if len(last) and (len(counts) - 1) * 256 + int(last.max()) >= size:
                raise ValueError(name)
            patch[name] = Selection.from_parts(shapes[name], offsets, counts), values
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{at} ({' '.join(str(e).split())[:80]})") from None
    return patch, metadata.get("base", "")


@torch.no_grad()
def apply_patch(model: CausalLM, path: str | Path) -> CausalLM:
    """Put a patch's values into a freshly loaded model. Raises UserError when it was made for another base."""
    patch, wanted = read_patch(path, {name: p.shape for name, p in model.named_parameters()})
    files, digest = shard_files(model.folder), hashlib.sha256()
    for name, (selection, values) in patch.items():
        old, p = read(files, name), model.get_parameter(name)
        for rows, entries, index in selection.chunks():
            digest.update((name.encode() if rows.start == 0 else b"") + take(old[rows], index).float().numpy().tobytes())
            put(p[rows], None if index is None else index.to(p.device), values[entries])
    if digest.hexdigest()[:16] != wanted:
        raise UserError(f"{path}: made for another base model than {model.folder}")
    return model


def main(argv: list[str]) -> None:
    """The command `apply BASE PATCH OUT`."""
    if len(argv) != 4 or argv[0] != "apply":
        raise UserError("usage: python -m allo_mini.checkpoint apply BASE PATCH OUT")
    save_model(apply_patch(load_model(str(find_folder(argv[1])), None), argv[2]), argv[3])
