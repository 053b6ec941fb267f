"""Models in and out of Hugging Face folders: a path or hub id -> CausalLM, and back, atomically.

Only safetensors, only the files we name, no code from anywhere. What is saved loads in transformers and vLLM.

Patches: what training changed of a checkpoint, as positions and values: a few per cent of its size.

    python -m allo_mini.checkpoint apply BASE PATCH OUT        the whole model again, as a Hugging Face folder
    python eval.py --model BASE --patch FILE ...               or without writing it

For each changed tensor, NAME.offsets, NAME.counts (selection.Selection) and NAME.values, in the trained model's dtype.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from allo_mini import UserError
from allo_mini.architecture import parse_config
from allo_mini.device import DTYPES
from allo_mini.disk import atomic, read_json
from allo_mini.files import load_tensors, open_safetensors, save_tensors
from allo_mini.linear import is_quantized, to_int8
from allo_mini.log import exit_code, say
from allo_mini.selection import Selection, put, take
from allo_mini.model import CausalLM, build
from allo_mini.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json")
DOWNLOADS = ["config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
             *TOKENIZER_FILES]
NOT_KEPT = ("torch_dtype", "dtype", "_name_or_path", "auto_map")  # of config.json: somebody's paths, somebody's code
SHARD = 4 << 30  # bytes of one weights file


def find_folder(path_or_id: str, revision: str | None = None, download: bool = True) -> Path:
    """A local folder as it is; otherwise a hub id (owner/name, or owner/name@revision), of which the files we name are
    downloaded or, where that is not possible or not wanted, found in the cache. Raises UserError when there is neither.
    """
    if os.path.isdir(path_or_id):
        if revision:
            raise UserError(f"--revision is {revision}, but {path_or_id} is a local folder, which has no revisions")
        return Path(path_or_id)
    name, _, commit = path_or_id.partition("@")
    if os.path.exists(path_or_id) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{path_or_id}: no such model folder, and not a hub id (owner/name) either")
    from huggingface_hub import snapshot_download
    commit = commit or revision or None
    try:
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=DOWNLOADS, local_files_only=not download))
    except Exception as e:  # no network, no such repository, no access, and the cache does not have it
        reason = str(e).strip().split("\n")[0][:200] or type(e).__name__
        failed = f"the hub did not give it: {reason}" if download else "not in the hub's cache on this machine"
        raise UserError(f"{path_or_id}: no such local folder, and {failed}") from None
    if commit != folder.name:
        say(f"{name}: this is commit {folder.name}; {name}@{folder.name} pins it")
    return folder


def shard_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, in model.safetensors or in the files that an index names."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict):
            raise UserError(f"{index}: weight_map is {type(table).__name__}, expected a table of file names")
        names = list(table.values())
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{index}: {name!r} is not a plain file name (NAME.safetensors)")
    files = {}
    for path in sorted({folder / name for name in names}):
        with open_safetensors(path) as f:
            files |= dict.fromkeys(f.keys(), path)
    return files


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file."""
    with open_safetensors(path) as f:
        return f.get_tensor(name)


def load_model(path_or_id: str, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu",
               int8: bool = False, mask=None, stream: bool = False) -> CausalLM:
    """Read a Llama, Mistral, Qwen2 or Qwen3 checkpoint; the weights end in `dtype` on `device`.

    Built on the meta device and filled tensor by tensor from memory-mapped files, so the peak is one model.
    int8: store the linear layers' weights in 8 bits, but the entries selected by `mask` (name -> bool) as they are;
    with `stream` in host memory.
    Raises UserError for anything missing, truncated, misshapen or unsupported.
    """
    dtype, folder = DTYPES.get(dtype, dtype), find_folder(str(path_or_id))
    config = parse_config(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        model = build(config)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    files = {name: path for name, path in shard_files(folder).items() if not name.endswith("rotary_emb.inv_freq")
             and not (name == "lm_head.weight" and config.tie_word_embeddings)}
    for name in sorted(files.keys() ^ wanted.keys()):
        what = "is missing" if name in wanted else f"does not belong to {config.raw['architectures'][0]}"
        raise UserError(f"{folder}: weight {name} {what}")
    state, beside = {}, {}
    for path in sorted(set(files.values())):
        with open_safetensors(path) as f:
            for name in (n for n in wanted if files[n] == path):
                tensor = f.get_tensor(name)
                if tensor.shape != wanted[name] or not tensor.is_floating_point():
                    raise UserError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, config.json asks for "
                                    f"floating point {list(wanted[name])}")
                if int8 and is_quantized(name, tensor.shape):
                    state[name], beside[name] = to_int8(tensor.to(dtype), mask and mask[name], device, stream)
                else:
                    state[name] = tensor.to(device=device, dtype=dtype)
    model.requires_grad_(False).load_state_dict(state, strict=True, assign=True)
    for name, int8 in beside.items():
        model.get_parameter(name).int8 = int8
    model.folder = folder
    return model


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model folder. Raises UserError when it knows more ids than the model has rows."""
    tokenizer = Tokenizer(folder)
    if tokenizer.size > vocab_size:
        raise UserError(f"{folder}: tokenizer.json has ids up to {tokenizer.size - 1}, too many for config.json's "
                        f"vocab_size of {vocab_size}")
    return tokenizer


def dense_weight(model: CausalLM, name: str, files: dict[str, Path]) -> torch.Tensor:
    """A weight as it is to be saved, on the CPU. For an int8 one: the file it came from, selected entries replaced."""
    p = model.get_parameter(name)
    if not hasattr(p, "int8"):
        return p.detach().contiguous().cpu()
    dense = read_tensor(files[name], name).to(p.int8.values.dtype, copy=True)
    for rows, entries, index in p.int8.selection.chunks():
        put(dense[rows], index.cpu(), p.int8.values[entries])
    return dense


def save_model(model: CausalLM, folder: str | Path) -> None:
    """Config, weights (in shards of SHARD bytes) and the model's own tokenizer files in Hugging Face format, in a new
    folder, all or nothing. Raises UserError when the folder exists or cannot be written."""
    from huggingface_hub import split_torch_state_dict_into_shards
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; nothing was overwritten")
    dtype, source = model.model.embed_tokens.weight.dtype, model.folder
    raw = {k: v for k, v in model.config.raw.items() if k not in NOT_KEPT}
    raw["dtype"] = str(dtype).removeprefix("torch.")
    files = shard_files(source) if source else {}
    sizes = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in model.named_parameters()}
    shards = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD)
    with atomic(folder, shards.metadata["total_size"]) as new:
        new.mkdir()
        (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for file, names in shards.filename_to_tensors.items():  # host memory never holds the whole model
            save_file({name: dense_weight(model, name, files) for name in names}, new / file, metadata={"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if source and (source / name).is_file():
                shutil.copyfile(source / name, new / name)


def eos_ids(model: CausalLM, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id that ends a response: config.json's, generation_config.json's and the tokenizer's."""
    path = (model.folder or Path()) / "generation_config.json"
    settings = [model.config.raw, read_json(path) if path.is_file() else {}]
    named = [tokenizer.eos_id, *(found.get("eos_token_id") for found in settings)]
    ids = [i for one in named for i in (one if isinstance(one, list) else [one]) if i is not None]
    for i in ids:
        if type(i) is not int:
            raise UserError(f"{path.with_name('config.json')}, {path.name}: eos_token_id holds {i!r}, not token ids")
    return tuple(sorted(set(ids)))


# ---- patches -----------------------------------------------------------------------------------------------

def bytes_of(values: torch.Tensor) -> bytes:
    """What a digest is made of: exact for every floating-point type up to fp32."""
    return values.float().numpy().tobytes()


def save_patch(base: Path, tuned: Path, path: Path) -> None:
    """Keep the entries in which two model folders differ, with a digest of what stood and what stands there."""
    before, after, tensors, digest = shard_files(base), shard_files(tuned), {}, hashlib.sha256()
    for name in sorted(after):
        old, new = read_tensor(before[name], name), read_tensor(after[name], name)
        changed = old.to(new.dtype) != new
        if changed.any():
            tensors |= Selection(new.shape, changed).named(name, new[changed])
            digest.update(name.encode() + bytes_of(old[changed]) + bytes_of(new[changed]))
    save_tensors(tensors, path, {"digest": digest.hexdigest(), "base": base.resolve().name})


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
        why = " ".join(str(e).split())[:80]
        why += f"; it was made for the folder {metadata['base']}" if "base" in metadata else ""
        raise UserError(f"{path}: no patch for {model.folder}, or broken ({why})") from None
    return model


def main(argv: list[str]) -> int:
    """The command `python -m allo_mini.checkpoint apply BASE PATCH OUT`."""
    def work():
        if len(argv) != 4 or argv[0] != "apply":
            raise UserError("expected: python -m allo_mini.checkpoint apply BASE PATCH OUT")
        _, base, patch, out = argv
        kinds = {t.dtype for name, t in load_tensors(patch)[0].items() if name.endswith(".values")}
        save_model(apply_patch(load_model(base, kinds.pop() if kinds else None), patch), out)
    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
