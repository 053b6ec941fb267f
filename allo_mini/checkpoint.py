"""Models in and out of Hugging Face folders: a path or hub id -> CausalLM, and back, atomically.

Only safetensors, only the files we name, no code from anywhere. What is saved loads in transformers and vLLM.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from allo_mini import UserError
from allo_mini.disk import atomic
from allo_mini.jsonio import read_json
from allo_mini.linear import to_int8
from allo_mini.log import say
from allo_mini.selection import put
from allo_mini.model import CausalLM, build, parse_config
from allo_mini.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json")
DOWNLOADS = ["config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
             *TOKENIZER_FILES]
NOT_KEPT = ("torch_dtype", "dtype", "_name_or_path", "auto_map")  # of config.json: somebody's paths, somebody's code
SHARD = 4 << 30  # bytes of one weights file
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def find_folder(path_or_id: str, revision: str | None = None, download: bool = True) -> Path:
    """A local folder as it is; otherwise a hub id (owner/name, or owner/name@revision), downloaded or found in the
    cache, with only the files we name. Raises UserError when there is neither; without `download` only the cache counts.
    """
    if os.path.isdir(path_or_id):
        if revision:
            raise UserError(f"--revision is {revision}, but {path_or_id} is a local folder, which has no revisions")
        return Path(path_or_id)
    name, _, commit = path_or_id.partition("@")
    if os.path.exists(path_or_id) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{path_or_id}: no such model folder, and not a hub id (owner/name) either")
    from huggingface_hub import snapshot_download
    commit, reasons = commit or revision, []
    for cached in (False, True) if download else (True,):  # no network, no such repository, no access: the cache may still have it
        try:
            folder = Path(snapshot_download(name, revision=commit, allow_patterns=DOWNLOADS, local_files_only=cached))
            if commit != folder.name:
                say(f"{name}: this is commit {folder.name}; {name}@{folder.name} pins it")
            return folder
        except Exception as e:
            reasons.append(str(e).strip().split("\n")[0][:200] or type(e).__name__)
    failed = f"the hub did not give it: {reasons[0]}" if download else "not in the hub's cache on this machine"
    raise UserError(f"{path_or_id}: no such local folder, and {failed}")


def shard_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, from one file or from an index of shards."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict):
            raise UserError(f"{index}: weight_map is missing")
        for file in table.values():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise UserError(f"{index}: {file!r} is not a plain file name (NAME.safetensors)")
        return {name: folder / file for name, file in table.items()}
    if not single.exists():
        raise UserError(f"{folder}: no weights (model.safetensors or model.safetensors.index.json)")
    with open_safetensors(single) as f:
        return {name: single for name in f.keys()}


def open_safetensors(path: Path):
    """safe_open with a one-line error."""
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a complete safetensors file: {e}") from None


def load_model(path_or_id: str, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu",
               revision: str | None = None, int8: bool = False, mask=None) -> CausalLM:
    """Read a Llama, Mistral, Qwen2 or Qwen3 checkpoint; the weights end in `dtype` on `device`.

    Built on the meta device and filled tensor by tensor from memory-mapped files, so the peak is one model.
    int8: store the linear layers' weights in 8 bits, but the entries selected by `mask` (name -> bool) as they are.
    Raises UserError for anything missing, truncated, misshapen or unsupported.
    """
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    folder = find_folder(str(path_or_id), revision)
    config = parse_config(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        model = build(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    files = shard_files(folder)
    if missing := sorted(set(wanted) - set(files)):
        raise UserError(f"{folder}: weight {missing[0]} is missing ({len(missing)} missing in all)")
    ignored = {name for name in set(files) - set(wanted) if name.endswith("rotary_emb.inv_freq")
               or (name == "lm_head.weight" and config.tie_word_embeddings)}
    if extra := sorted(set(files) - set(wanted) - ignored):
        raise UserError(f"{folder}: weight {extra[0]} does not belong to {config.raw['architectures'][0]}")
    state, beside = {}, {}
    for path in sorted(set(files[name] for name in wanted)):
        with open_safetensors(path) as f:
            held = set(f.keys())
            for name in (n for n in wanted if files[n] == path):
                if name not in held:
                    raise UserError(f"{path}: weight {name} is missing, though the index names this file")
                tensor = f.get_tensor(name)
                if tuple(tensor.shape) != wanted[name]:
                    raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for "
                                    f"{list(wanted[name])}")
                if not tensor.is_floating_point():
                    raise UserError(f"{path}: {name} holds {tensor.dtype}, only floating point is supported")
                if int8 and tensor.dim() == 2 and "embed_tokens" not in name:  # an embedding is read a row at a time
                    state[name], beside[name] = to_int8(tensor.to(dtype), mask and mask[name], device)
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
    with open_safetensors(files[name]) as f:
        dense = f.get_tensor(name).to(p.int8.values.dtype, copy=True)
    for rows, entries, index in p.int8.selection.chunks():
        put(dense[rows], None if index is None else index.cpu(), p.int8.values[entries])
    return dense


def write_model(model: CausalLM, folder: Path) -> None:
    """Write config, weights (in shards of SHARD bytes) and the model's own tokenizer files into an existing empty folder."""
    dtype, shards, size = model.model.embed_tokens.weight.dtype, [[]], 0
    for name, p in model.named_parameters():
        if size + p.numel() * dtype.itemsize > SHARD and shards[-1]:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += p.numel() * dtype.itemsize
    raw = {k: v for k, v in model.config.raw.items() if k not in NOT_KEPT}
    (folder / "config.json").write_text(json.dumps({**raw, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
    files, table = shard_files(model.folder) if model.folder else {}, {}
    for i, names in enumerate(shards, 1):  # a shard at a time: host memory never holds the whole model
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({name: dense_weight(model, name, files) for name in names}, folder / file, metadata={"format": "pt"})
        table.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {"total_size": total}, "weight_map": table}, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if model.folder and (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)


def save_model(model: CausalLM, folder: str | Path) -> None:
    """Save in Hugging Face format to a new folder, all or nothing. Raises UserError when the folder exists."""
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; nothing was overwritten")
    size = sum(p.numel() for p in model.parameters()) * model.model.embed_tokens.weight.itemsize
    with atomic(folder, size) as temporary:
        temporary.mkdir()
        write_model(model, temporary)


def eos_ids(model: CausalLM, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id that ends a response: config.json's, generation_config.json's and the tokenizer's."""
    ids, path = [*model.config.eos_token_ids, tokenizer.eos_id], (model.folder or Path()) / "generation_config.json"
    if path.is_file():
        more = read_json(path).get("eos_token_id")
        ids += more if isinstance(more, list) else [more]
    for i in ids:
        if i is not None and type(i) is not int:
            raise UserError(f"{path.with_name('config.json')}, {path.name}: eos_token_id holds {i!r}, expected token ids")
    return tuple(sorted({i for i in ids if i is not None}))


if __name__ == "__main__":
    from allo_mini import patch  # which needs this module
    try:
        patch.main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"error: {e}")
