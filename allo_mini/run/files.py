"""Reading files that may be broken, and writing files that are whole or not there.

Whatever is wrong with a file ends in one line that names it and the place. Everything we write is
made under a temporary name beside its target and renamed, so a kill leaves the old file or the new
one. Files that grow (metrics, samples) are cut back to their last whole rows when they are opened
again. A path is a string or a Path; what is locked or cut back is a Path.
"""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from allo_mini import UserError

HELD = {}  # run folder -> its open lock file; the system lets go of it when the process ends


# ---- reading ---------------------------------------------------------------------------------

@contextmanager
def reading(path):
    """Turns whatever goes wrong while `path` is in hand into one line that names it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        reason = getattr(e, "strerror", None) or f"{type(e).__name__} {e}"
        raise UserError(f"{path}: cannot be read: {reason}") from None


def parse_object(raw, where):
    """One JSON object, from bytes. Raises UserError."""
    with reading(f"{where} as JSON in UTF-8 (of rows: an object a line)"):
        value = json.loads(raw)
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object (of rows: one a line), found "
                        f"{type(value).__name__}")
    return value


def read_json(path):
    """The object that a JSON file holds, a dict. Raises UserError."""
    with reading(path):
        return parse_object(Path(path).read_bytes(), path)


def read_jsonl(path):
    """Yield ("FILE:LINE", object) for every line that is not blank. Raises UserError."""
    where = ""
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, parse_object(line, where)
    if not where:
        raise UserError(f"{path}: no rows; expected JSON Lines, one object a line")


def read_if_there(path):
    """The object that a JSON file of ours holds; {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


def rows_of(path):
    """The rows of a JSON Lines file, without their places. Raises UserError."""
    return [row for _, row in read_jsonl(path)]


def rows_if_there(path):
    """The rows of a file of ours that grows; [] where there is none, or nothing in it yet."""
    return rows_of(path) if path.is_file() and path.stat().st_size else []


def open_tensors(path):
    """A safetensors file, open for reading. Raises UserError when it is missing or broken."""
    with reading(path):
        return safe_open(path, "pt")


def load_tensors(path):
    """({name: tensor}, the strings beside them) of a safetensors file. Raises UserError."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


# ---- writing ---------------------------------------------------------------------------------

def remove(path):
    """Delete a file, a link or a folder, if it is there and can be deleted."""
    shutil.rmtree(path, ignore_errors=True)  # leaves all but a folder alone
    with suppress(OSError):
        path.unlink()


@contextmanager
def atomic(target):
    """Yield a temporary path to make a file or a folder at; it becomes `target` in one rename.

    A file is replaced, a folder that holds anything is not. Raises UserError.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        os.replace(temporary, target)
    except (OSError, SafetensorError) as e:  # a full disk, a folder that is not ours
        raise UserError(f"{target}: cannot be written: {e}; nothing was changed") from None
    finally:
        remove(temporary)


def write_text(path, text):
    """Write a text file, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8", "replace")


def write_json(path, value):
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def rows_text(rows):
    """An iterable of dicts, one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path, rows):
    """Write an iterable of dicts, atomically."""
    write_text(path, rows_text(rows))


def append_rows(path, rows):
    """Append an iterable of dicts in one go."""
    with open(path, "ab") as file:
        file.write(rows_text(rows).encode(errors="replace"))


def keep_whole(path, group=1, total=0):
    """Cut a file that was being appended to back to whole groups of rows, or all `total` rows.

    Returns how many rows stay; a file that is not there begins with none.
    """
    path.touch()
    data = path.read_bytes()
    count = data.count(b"\n")  # a torn row has none
    if count != total:
        count -= count % group
    os.truncate(path, sum(map(len, data.splitlines(keepends=True)[:count])))
    return count


def save_tensors(tensors, path, metadata=None):
    """Write a safetensors file of {name: tensor} and strings beside them, atomically."""
    with atomic(path) as temporary:
        save_file({name: x.contiguous().cpu() for name, x in tensors.items()}, temporary, metadata)


def lock(folder):
    """Hold a run folder until this process ends, and clear what a killed one left half written.

    Raises UserError when another process holds it.
    """
    HELD[folder] = open(folder / ".lock", "a")  # where this process held it, it no longer does
    try:
        fcntl.lockf(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is at work in it; take another --out") from None
    for half in folder.glob(".*.tmp"):
        remove(half)
