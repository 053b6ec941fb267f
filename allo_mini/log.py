"""What a run says: aligned lines of steps, metrics.jsonl beside them, progress bars on terminals, errors in a line."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from allo_mini import UserError, parallel
from allo_mini.disk import append_rows, keep_whole, rows_text, write_text


LINES = 100  # of a stage's steps are printed, evenly spaced; metrics.jsonl has all


def progress(items=None, total: int | None = None, label: str = "", unit: str = "it"):
    """A tqdm bar that is silent when the output is not a terminal."""
    silent = parallel.RANK > 0 or not sys.stderr.isatty()
    return tqdm(items, total=total, desc=label, unit=unit, disable=silent, leave=False, dynamic_ncols=True)


def say(text: str) -> None:
    """Print a line (rank 0 alone) without tearing a progress bar."""
    if not parallel.RANK:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def exit_code(work: Callable[[], object], stopped: str = "stopped") -> int:
    """work() as a command: 0, or 2 after a mistake of the user's, told in one line; 130 after Ctrl-C, with what
    `stopped` says; 141, as a shell has it, when whoever reads our output (`| head`) has seen enough."""
    try:
        work()
        if sys.stdout:  # not closed
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 141
    except (UserError, OSError) as e:  # OSError: a file of ours that somebody made unreadable
        error = " ".join(str(e).split())
    except torch.OutOfMemoryError:
        error = "out of memory: lower --sample-batch, --micro-tokens or --max-length"
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    print(f"error: {error}", file=sys.stderr)
    return 2


class Log:
    """Writes metrics.jsonl (one object a training step, on the disk before a checkpoint can be) and the step lines."""

    def __init__(self, folder: Path | None):
        self.path = Path(folder) / "metrics.jsonl" if folder and not parallel.RANK else None
        self.began = time.time()
        if self.path:
            keep_whole(self.path)

    def step(self, stage: str, step: int, total: int, values: dict[str, float], shown: tuple[str, ...]) -> None:
        """Record all `values`; print those named in `shown` as one aligned line, unless there are very many steps."""
        if self.path:
            spent = round(time.time() - self.began, 2)
            append_rows(self.path, [{"stage": stage, "step": step, "time": spent, **values}])
        if step in (1, total) or step % -(-total // LINES) == 0 or "eval/score" in values:
            columns = "  ".join(f"{name} {values[name]:>9.4g}" for name in shown if name in values)
            say(f"{stage:>8} {step:>{len(str(total))}}/{total}  {columns}")

    def rewind(self, stage: str, step: int) -> None:
        """Forget the lines of a stage after `step`: they are about to be written again."""
        if self.path and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            of_step = [re.match(rf'{{"stage": "{stage}", "step": (\d+),', line) for line in lines]
            write_text(self.path, "".join(x for x, m in zip(lines, of_step) if not m or int(m[1]) <= step))

    def note(self, stage: str, **values) -> None:
        """Record a fact about a stage (counts, densities, seconds), once, without printing it."""
        row = {"stage": stage, **values}
        if self.path and not (self.path.exists() and rows_text([row]).encode() in self.path.read_bytes()):
            append_rows(self.path, [row])


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned plain-text table; first column left, the others right; columns of nothing but "-" are left out."""
    kept = [i for i in range(len(header)) if not rows or any(row[i] != "-" for row in rows)]
    header, *rows = [[row[i] for i in kept] for row in (header, *rows)]
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
             for r in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
