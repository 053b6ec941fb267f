"""JSON and JSONL files -> dicts. Whatever is wrong with a file ends in one line that names it and the place."""

import contextlib
import json
from collections import Counter
from pathlib import Path

from allo_mini import UserError

MAX_LINE = 16 << 20  # bytes; a longer line is no row of ours


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
        raise UserError(f"{path}:{line or getattr(e, 'lineno', 1)}: not valid JSON in UTF-8, expected one object"
                        f"{' a line' if line else ''}: {getattr(e, 'msg', e)}") from None
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
    for number, raw in lines:
        if len(raw) == MAX_LINE:
            raise UserError(f"{path}:{number}: line is longer than {MAX_LINE} bytes")
        row = parse_object(raw, path, number, object_pairs_hook=no_duplicates, parse_constant=no_constant)
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
