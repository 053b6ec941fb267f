"""The artefacts stages hand to each other, read back and checked: samples, token weights, masks, importance."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from allo_mini import UserError
from allo_mini.data import Negative, messages_of, text_of
from allo_mini.disk import atomic, read_jsonl, writing
from allo_mini.mask import PackedMask, pack_mask

EXACT = "forget.exact.safetensors"  # the fp32 weights with which forgetting ended; its folder may have them in bf16


def read_samples(path: str | Path) -> tuple[dict[str, list[str]], int]:
    """Question -> sampled responses, and how many were left out as unfinished. Raises UserError naming the line."""
    samples, unfinished = {}, 0
    for where, row in read_jsonl(path):
        texts = row.get("samples")
        if not isinstance(texts, list):
            raise UserError(f"{where}: 'samples' is {type(texts).__name__}, expected a list of strings")
        texts = [text_of({"samples": text}, "samples", where) for text in texts]
        samples.setdefault(text_of(row, "input", where), []).extend(texts)
        unfinished += row["unfinished"] if isinstance(row.get("unfinished"), int) else 0
    return samples, unfinished


def read_weights(path: str | Path) -> list[Negative]:
    """Rows {input, output, reward: one score in 0..1 a token, EOS included}; also the official release's files."""
    negatives = []
    for where, row in read_jsonl(path):
        scores = row.get("reward")
        if not isinstance(scores, list) or not all(type(s) in (int, float) and 0 <= s <= 1.001 for s in scores):
            raise UserError(f"{where}: 'reward' must be a list of probabilities, one for each token of 'output' and "
                            "EOS")
        prompt, output = (messages_of(row, key, where) for key in ("input", "output"))
        negatives.append(Negative(prompt, output, "", None, [float(s) for s in scores]))
    return negatives


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic(path, sum(t.nbytes for t in tensors.values())) as temporary:
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, temporary, metadata=metadata)


def open_safetensors(path: Path):
    """safe_open with a one-line error."""
    if not path.is_file():
        raise UserError(f"{path}: file not found")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a complete safetensors file: {e}") from None


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. Raises UserError when it is missing or broken."""
    with open_safetensors(Path(path)) as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}


def scratch(folder: Path, count: int) -> Tensor:
    """fp32 [count] in a nameless file of the folder, which is gone with the tensor, however the process ends.

    The disk has to hold all of it beforehand: writing into a mapped file that finds no room would end the process.
    """
    with writing(folder / "a temporary file", 4 * count), tempfile.TemporaryFile(dir=folder) as f:
        os.posix_fallocate(f.fileno(), 0, 4 * count) if hasattr(os, "posix_fallocate") else f.truncate(4 * count)
        return torch.from_numpy(np.memmap(f, np.float32, shape=count))


def save_mask(mask: Mapping[str, Tensor], path: Path) -> None:
    """Write a mask (name -> bool tensor), 1 bit a weight."""
    packed = mask if isinstance(mask, PackedMask) else pack_mask(mask.items())
    save_tensors(packed.bits, path, {"shapes": json.dumps(packed.shapes)})


def load_mask(path: str | Path, shapes: dict[str, torch.Size]) -> PackedMask:
    """A mask for a model with these parameter shapes. Raises UserError naming what does not fit."""
    bits, metadata = load_tensors(path)
    wanted = {name: list(shape) for name, shape in shapes.items()}
    try:
        held = dict(json.loads(metadata["shapes"]))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path}: not a mask of ours") from None
    for name in {**wanted, **held}:
        if held.get(name) != wanted.get(name):
            raise UserError(f"{path}: mask of {name} is {held.get(name, 'missing')}, the model has {wanted.get(name)}")
    sizes = {name: (torch.uint8, -(-shape.numel() // 8)) for name, shape in shapes.items()}
    if {name: (packed.dtype, packed.numel()) for name, packed in bits.items()} != sizes:
        raise UserError(f"{path}: a broken mask: its tensors are not the bits of its shapes")
    if not any(packed.any() for packed in bits.values()):
        raise UserError(f"{path}: the mask selects nothing")
    return PackedMask(bits, wanted)
