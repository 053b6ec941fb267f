"""Reading files that may be broken, and writing so that nothing is lost, whatever kills the process or fills the disk.

JSON and JSONL files become dicts; whatever is wrong with one ends in a line that names it and the place. What we write
is whole or not there: everything is written under a temporary name in the same folder, flushed to the disk and renamed;
files that grow are cut back to their last whole rows when they are opened again. A run folder belongs to one process at
a time. Symbolic links are followed for reading (the hub's cache consists of them); writing replaces a link, never what
it points to.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError

from allo_mini import UserError

HELD = {}  # run folder -> its open lock file; the system lets go of it when the process ends, however it ends
NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
MAX_LINE = 16 << 20  # bytes; a longer line is no row of ours
OTHERS = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"[": "a JSON array"}  # how files begin that are no JSON Lines


# ---- reading -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_bytes(path: str | Path):
    """The file, open for reading. Raises UserError, also when reading it fails."""
    try:
        with open(path, "rb") as f:
            yield f
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', e)}") from None


def parse_object(raw: bytes, path: str | Path, line: int | None = None, **hooks) -> dict:
    """One JSON object, all of a file or the `line` of one. Raises UserError."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), **hooks)
    except (ValueError, RecursionError) as e:
        column = f" (column {e.colno})" if hasattr(e, "colno") else ""
        raise UserError(f"{path}:{line or getattr(e, 'lineno', 1)}: not valid JSON in UTF-8, expected one object"
                        f"{' a line' if line else ''}: {getattr(e, 'msg', e)}{column}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:{line or 1}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: str | Path) -> dict:
    """A JSON file holding an object. Raises UserError naming file and line."""
    with open_bytes(path) as f:
        return parse_object(f.read(), path)


def read_jsonl(path: str | Path):
    """Yield ("FILE:LINE", object) for every line that is not blank.

    Raises UserError for anything that is not one object a line, for NaN, a key given twice, and a file without rows.
    """
    with open_bytes(path) as f:
        lines = [(number, raw) for number, raw in enumerate(iter(lambda: f.readline(MAX_LINE), b""), 1) if raw.strip()]
    if not lines:
        raise UserError(f"{path}: no rows")
    if kind := next((kind for start, kind in OTHERS.items() if lines[0][1].lstrip().startswith(start)), None):
        raise UserError(f"{path}: is {kind}, expected JSON Lines (one object a line); README says how to convert it")
    for number, raw in lines:
        if len(raw) == MAX_LINE:
            raise UserError(f"{path}:{number}: line is longer than {MAX_LINE} bytes")
        row = parse_object(raw.rstrip(), path, number, object_pairs_hook=no_duplicates, parse_constant=no_constant)
        yield f"{path}:{number}", row


def no_duplicates(pairs):
    """A JSON object hook that refuses {"a": 1, "a": 2} instead of silently keeping the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"key {Counter(k for k, _ in pairs).most_common(1)[0][0]!r} appears twice")
    return row


def no_constant(name):
    """Refuses NaN and Infinity, which Python's json reads though they are no JSON."""
    raise ValueError(f"{name} is no JSON value")


# ---- writing -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path: Path, size: int = 0):
    """Around writing `size` bytes to `path`, whose folder is made: a UserError says what is missing, where possible
    before anything is written."""
    free = 0
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise OSError(errno.ENOSPC, NO_ROOM[0])
        yield
    except (OSError, SafetensorError) as e:  # safetensors tells the system's words, but no errno
        why = next((f"{words}; {size:,} bytes are needed, {free:,} are free, {max(0, size - free):,} are missing"
                    for words in NO_ROOM if words in str(e)), getattr(e, "strerror", None) or e)
        raise UserError(f"{path}: cannot be written: {why}; what was saved before stays as it is") from None


def need_room(path: Path, size: int) -> None:
    """Raises UserError when `size` bytes have no room beside `path`."""
    with writing(path, size):
        pass


@contextlib.contextmanager
def atomic(target: Path, size: int = 0):
    """Yield a temporary path beside `target` to make a file or a folder of files at; it becomes `target` in one
    rename when the block ends well. A file is replaced, a folder that holds anything is not: UserError."""
    target = Path(target)
    temporary = target.with_name(f".{target.name}.tmp")
    with writing(target, size):
        try:
            remove(temporary)
            yield temporary
            for path in (*temporary.glob("*"), temporary):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes private files
                sync(path)
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            with contextlib.suppress(OSError):
                remove(temporary)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on the disk."""
    if os.name != "nt" or path.is_file():  # Windows opens no folders
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    data = text.encode(errors="replace")
    with atomic(path, len(data)) as temporary:
        temporary.write_bytes(data)


def rows_text(rows) -> str:
    """An iterable of dicts, one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path: Path, rows) -> None:
    """Write an iterable of dicts, atomically."""
    write_text(path, rows_text(rows))


def append_rows(path: Path, rows) -> None:
    """Append an iterable of dicts in one go and make sure they are on the disk."""
    data = rows_text(rows).encode()
    with writing(path, len(data)), path.open("ab") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def keep_whole(path: Path, group: int = 1, total: int = 0) -> int:
    """Cut a file that was being appended to back to whole groups of rows (or all `total`); how many rows stay."""
    if not path.exists():
        return 0
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a whole line ends in a newline
    count = len(lines) if len(lines) == total else len(lines) - len(lines) % group
    if torn or count < len(lines):
        write_text(path, "".join(line + "\n" for line in lines[:count]))
    return count


def lock(folder: Path) -> None:
    """Hold a run folder until this process ends, and clear what a killed one left half written (no lock on Windows).

    Raises UserError when another process holds it.
    """
    HELD.pop(folder, None)  # and with it this process's own lock
    with writing(folder / ".lock"):
        HELD[folder] = (folder / ".lock").open("a+")
    with contextlib.suppress(ImportError):
        import fcntl
        try:
            fcntl.lockf(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):  # else: a file system without locks
                raise UserError(f"{folder}: another process is working in it; wait, or choose another --out") from None
    for half in (*folder.glob(".*.tmp"), *folder.glob(".tmp*")):  # ours, and safetensors' own on the way to them
        remove(half)


def move_aside(folder: Path) -> Path:
    """Rename a run folder to the first free FOLDER.1, FOLDER.2, ..."""
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    HELD.pop(folder).close()  # Windows renames no folder with an open file in it
    with writing(aside):
        return folder.rename(aside)
