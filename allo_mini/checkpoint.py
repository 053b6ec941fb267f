"""Models in and out of Hugging Face folders: a path or hub id -> CausalLM, and back.

Only safetensors, only the files we name, no code from anywhere. What is saved loads in transformers
and vLLM.
"""

import os
import re
import shutil
from pathlib import Path

import torch

from allo_mini import UserError
from allo_mini.linear import is_quantized, to_int8
from allo_mini.model import build, parse_config
from allo_mini.patch import put_changes, read_patch
from allo_mini.run.device import DTYPES
from allo_mini.run.files import (atomic, open_tensors, read_if_there, read_json, reading,
                                 save_tensors, write_json)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "added_tokens.json", "vocab.json", "merges.txt",
                   "tokenizer.model", "generation_config.json")
DOWNLOADS = ["config.json", "adapter_config.json", "model*.safetensors",
             "model.safetensors.index.json", *TOKENIZER_FILES]
NOT_KEPT = ("torch_dtype", "dtype", "_name_or_path", "auto_map")  # somebody's paths and code
SHARD = 4 << 30  # bytes of one weights file


# ---- reading -------------------------------------------------------------------------------------

def find_folder(path_or_id, download=True):
    """A local folder as it is; of a hub id (owner/name[@revision]) the files we name.

    They are downloaded or, where that is not possible or not wanted, found in the cache. Raises
    UserError when there is neither.
    """
    if os.path.isdir(path_or_id):
        if (os.path.exists(f"{path_or_id}/adapter_config.json")
                and not any(Path(path_or_id).glob("model*.safetensors"))):
            raise UserError(f"{path_or_id}: adapter_config.json says this is a LoRA adapter; merge "
                            "it into its base model first (peft's merge_and_unload), and save that")
        if os.path.exists(f"{path_or_id}/.lock"):
            raise UserError(f"{path_or_id}: a run's folder; say which model in it, as RUN/improve")
        return Path(path_or_id)
    name, _, revision = path_or_id.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{path_or_id}: no such model folder, and no hub id (owner/name) either")
    from huggingface_hub import snapshot_download
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=DOWNLOADS,
                                  local_files_only=not download)
    except Exception as e:  # no network, no such repository, no access, and not in the cache
        why = e if download else f"not cached: `hf download {name} --revision {revision or 'main'}`"
        raise UserError(f"{path_or_id}: no such folder, and not from the hub: {why}") from None
    return find_folder(found)


def shard_files(folder):
    """{tensor name: the safetensors file that holds it}. Beside others model.safetensors counts, as
    in transformers, or the shards that the index names, if all are there. Raises UserError."""
    files = {}
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    paths = [one] if one.exists() else sorted(folder.glob("model-*-of-*.safetensors"))
    with reading(index):
        named = {folder / name for name in read_if_there(index).get("weight_map", {}).values()}
    if named and named <= {*paths}:
        paths = sorted(named)
    if len({path.stem.rpartition("-of-")[2] for path in paths}) > 1:
        raise UserError(f"{folder}: shards of different sets; keep one, with its index")
    if not paths:
        raise UserError(f"{folder}: no model.safetensors; transformers' save_pretrained makes one "
                        "of pytorch_model.bin")
    for path in paths:
        with open_tensors(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def read_tensor(files, name):
    """One tensor; files: as shard_files gives them."""
    with open_tensors(files[name]) as file:
        return file.get_tensor(name)


def meta_model(folder):
    """The folder's model without weights; `files` has each one's file. Raises UserError."""
    path = folder / "config.json"
    with reading(path), torch.device("meta"):
        config = parse_config(read_json(path), path)
        model = build(config)
    files = shard_files(folder)
    for name in sorted(files.keys() ^ dict(model.named_parameters()), reverse=True):
        # it is the last of these names: where the embedding is missing, that was said before
        if name == "lm_head.weight" and config.tie_word_embeddings:
            if not read_tensor(files, name).equal(read_tensor(files, "model.embed_tokens.weight")):
                raise UserError(f"{path}: tie_word_embeddings is true, but {files[name].name} "
                                "holds an lm_head of its own; say false, or take it out")
        elif not name.endswith("rotary_emb.inv_freq"):
            what = f"not one of {config.family}'s" if name in files else "missing"
            raise UserError(f"{folder}: weight {name} is {what}")
    model.folder, model.files = folder, files
    return model.requires_grad_(False)


def load_model(path_or_id, dtype=torch.float32, device="cpu", int8=False, mask=None, changes=()):
    """Read a Llama, Mistral, Qwen2 or Qwen3 checkpoint; the weights end in `dtype` on `device`.

    Built on the meta device and filled tensor by tensor from memory-mapped files: the peak is one
    model. int8: the linear layers' weights in 8 bits, but the entries selected by `mask` as they
    are. changes: patches that are put on top, one after the other.
    Raises UserError for anything missing, truncated, misshapen or unsupported.
    """
    dtype = DTYPES.get(dtype, dtype)
    model = meta_model(find_folder(str(path_or_id)))
    model.changes = [read_patch(path, model.state_dict()) for path in changes]
    state = {}
    for name, p in model.named_parameters():
        tensor = read_tensor(model.files, name)
        if tensor.shape != p.shape or not tensor.is_floating_point():
            raise UserError(f"{model.files[name]}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                            f"config.json asks for floating point {list(p.shape)}")
        tensor = put_changes(tensor, name, dtype, model.changes)
        if int8 and is_quantized(name, tensor.shape):
            state[name] = to_int8(tensor, mask and mask[name], device)
        else:
            state[name] = tensor.to(device)
    model.load_state_dict(state, assign=True)
    return model


def eos_ids(model, encoder):
    """Ids that end a response: config.json's, generation_config.json's, the tokenizer's, and what
    ends one in the encoder's prompt style."""
    ids = [encoder.tokenizer.eos_id, encoder.closing]
    for config in (model.config.raw, read_if_there(model.folder / "generation_config.json")):
        value = config.get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    with reading(f"{model.folder}: eos_token_id"):
        return tuple(sorted({*ids} - {None}))


# ---- writing -------------------------------------------------------------------------------------

def dense_weight(model, name):
    """A weight as it is saved. Of an int8 one: the file it came from, selected entries replaced."""
    p = model.get_parameter(name)
    if not hasattr(p, "int8"):
        return p.detach()
    values = p.int8.values
    dense = put_changes(read_tensor(model.files, name), name, values.dtype, model.changes)
    p.int8.selected.to("cpu").scatter(dense, values)
    return dense


def save_model(model, folder, eos=()):
    """Config, weights (in shards of SHARD bytes) and the model's own tokenizer files.

    eos: ids that end its responses, for who generates with it elsewhere (generation_config.json).
    All or nothing: raises UserError when the folder exists or cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; nothing was overwritten")
    dtype = model.model.embed_tokens.weight.dtype
    config = {key: value for key, value in model.config.raw.items() if key not in NOT_KEPT}
    config["dtype"] = str(dtype).removeprefix("torch.")
    empty = {n: torch.empty_like(p, dtype=dtype, device="meta")
             for n, p in model.named_parameters()}
    shards = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD)
    with atomic(folder) as new:
        new.mkdir()
        write_json(new / "config.json", config)
        for file, names in shards.filename_to_tensors.items():  # the host holds one of them
            save_tensors({n: dense_weight(model, n) for n in names}, new / file, {"format": "pt"})
            (new / file).chmod(0o644)  # safetensors makes private files
        if shards.is_sharded:
            write_json(new / "model.safetensors.index.json", {
                "metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
        for name in TOKENIZER_FILES:
            if model.folder and (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, new / name)
        if eos:
            path = new / "generation_config.json"
            write_json(path, read_if_there(path) | {"eos_token_id": sorted(eos)})
