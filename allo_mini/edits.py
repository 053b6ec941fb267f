"""Minimal edits between token lists: which tokens of a wrong response a rewrite would change."""

import numpy as np


def edit_table(a: list[int], b: list[int]) -> np.ndarray:
    """Levenshtein distances of all prefixes: [len(a)+1, len(b)+1] int32; table[-1, -1] is the distance.

    One row at a time: min(up + 1, diagonal + cost), then insertions spread to the right, which is a running
    minimum once the column number is subtracted.
    """
    columns = np.arange(len(b) + 1, dtype=np.int32)
    other = np.asarray(b, dtype=np.int64)
    table = np.empty((len(a) + 1, len(b) + 1), dtype=np.int32)
    table[0] = columns
    for i, token in enumerate(a, 1):
        row = table[i - 1] + 1
        row[1:] = np.minimum(row[1:], table[i - 1, :-1] + (other != token))
        table[i] = np.minimum.accumulate(row - columns) + columns
    return table


def edit_weights(response: list[int], rewrite: list[int]) -> list[float]:
    """1 for the tokens of `response` outside a minimal edit alignment with `rewrite` (FIGA, arXiv 2311.04072)."""
    table, i, j = edit_table(response, rewrite), len(response), len(rewrite)
    weights = [1.0] * i
    while i and j:
        if response[i - 1] == rewrite[j - 1]:
            weights[i - 1] = 0.0
            i, j = i - 1, j - 1
        elif table[i, j] == table[i - 1, j - 1] + 1:
            i, j = i - 1, j - 1
        elif table[i, j] == table[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return weights


def nearest(response: list[int], candidates: list[list[int]]) -> int:
    """Index of the candidate with the smallest edit distance to the response (the first of equals)."""
    return int(np.argmin([edit_table(response, c)[-1, -1] for c in candidates]))
