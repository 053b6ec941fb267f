"""What a run says and remembers of its steps: lines, metrics.jsonl, checkpoints, errors in one line."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from allo_mini import UserError
from allo_mini.run import parallel
from allo_mini.run.files import keep_whole, load_tensors, read_jsonl, reading, save_tensors

LINES = 100  # steps of a stage that are printed, evenly spaced; metrics.jsonl has all


def progress(items=None, total: int | None = None, label: str = "", unit: str = "it"):
    """A tqdm bar that is silent where the output is no terminal."""
    silent = parallel.RANK > 0 or not sys.stderr.isatty()
    return tqdm(items, total=total, desc=label, unit=unit, disable=silent, leave=False)


def say(text: str):
    """Print a line (rank 0 alone) without tearing a progress bar."""
    if parallel.RANK == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def exit_code(work, stopped: str = "stopped") -> int:
    """work() as a command: 0; 2 and one line after a mistake; 130 after Ctrl-C, with `stopped`."""
    try:
        work()
        return 0
    except BrokenPipeError:  # whoever reads our output (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as e:
        error = " ".join(str(e).split())
    except torch.OutOfMemoryError:
        error = ("out of memory: lower --micro-tokens, --sample-batch, --p or --max-length, or use "
                 "a smaller --memory")
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    print(f"error: {error}", file=sys.stderr)
    return 2


class Log:
    """metrics.jsonl: a line a training step, and notes about stages. After a restart the steps since
    the last checkpoint stand there twice; `read` takes the later ones."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        if parallel.RANK == 0:
            keep_whole(self.path)
            self.file = self.path.open("a", buffering=1)

    def write(self, stage: str, **values):
        """Append a line."""
        if parallel.RANK == 0:
            self.file.write(json.dumps({"stage": stage, **values}) + "\n")

    @staticmethod
    def read(folder: Path) -> list[dict]:
        """The lines of a run: one a step, one for all notes of a stage."""
        path, lines = folder / "metrics.jsonl", {}
        for _, row in read_jsonl(path) if path.exists() else ():
            key = row["stage"], row.get("step")
            lines[key] = lines.get(key, {}) | row
        return list(lines.values())


class Progress:
    """Where a training stage of `total` steps stands: its lines, and checkpoints inside it.

    A stage that was killed goes on from the last checkpoint, bit for bit (on a CPU): the optimizer's
    vectors, the step and the objective's state. No random generator is saved: the order of the data
    follows from --seed and the step.
    """

    def __init__(self, run, stage: str, total: int, optimizer, objective):
        self.run, self.stage, self.total = run, stage, total
        self.optimizer, self.objective = optimizer, objective
        self.path, self.step, self.saved_at = run.folder / f".{stage}.state.safetensors", 0, time.monotonic()
        if self.path.exists():
            self.load()
            say(f"{stage}: goes on after step {self.step} of {total}")
        self.began = time.monotonic()

    def load(self):
        """Read the checkpoint. Raises UserError when it is broken or of other weights or rows."""
        tensors, metadata = load_tensors(self.path)
        with reading(self.path):
            known = json.loads(metadata["progress"])
            if known["total"] != self.total or not tensors["start"].equal(self.optimizer.start):
                raise UserError(f"{self.path}: of other weights or rows; delete it to begin again")
            self.step = known["step"]
            self.objective.state.update(known["state"])
            self.optimizer.load_state_dict(tensors)

    def check(self, metrics: dict, first_loss: float | None):
        """Before a step moves weights: its numbers are numbers, the first loss what it must be."""
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise UserError(f"{self.stage}, step {self.step + 1}: loss {metrics['loss']}, gradient "
                            f"norm {metrics['grad_norm']}; lower the rate, or use --dtype fp32")
        if self.step == 0 and first_loss is not None:
            close = math.isclose(metrics["loss"], first_loss, rel_tol=1e-4, abs_tol=1e-4)
            warning = "" if close else "   <-- WARNING: policy and reference do not agree"
            say(f"{self.stage}: first loss {metrics['loss']:.6f}, expected {first_loss:.6f} where "
                f"theta = theta_ref{warning}")

    def after_step(self, metrics: dict, tokens: int):
        """Log a step, print it (unless there are very many), write a checkpoint when one is due."""
        now, stage, total = time.monotonic(), self.stage, self.total
        self.step += 1
        metrics |= {"tokens/s": tokens / (now - self.began), "learning_rate": self.optimizer.lr}
        self.run.log.write(stage, step=self.step, **metrics)
        if self.step in (1, total) or self.step % -(-total // LINES) == 0:
            columns = [f"{key} {metrics[key]:>9.4g}" for key in self.objective.shown]
            say(f"{stage:>8} {self.step:>{len(str(total))}}/{total}  {'  '.join(columns)}")
        due = now - self.saved_at >= 60 * self.run.cfg.save_minutes and self.step < total
        if due and parallel.RANK == 0:
            known = {"step": self.step, "total": total, "state": self.objective.state}
            metadata = {"progress": json.dumps(known)}
            save_tensors(self.optimizer.state_dict(), self.path, metadata)
            self.saved_at = now
        self.began = time.monotonic()


def table(header: list[str], rows: list[list[str]]) -> str:
    """Plain text in aligned columns, the first to the left; those of nothing but "-" are left out."""
    lines = [""] * (1 + len(rows))
    for title, *cells in zip(header, *rows):
        if set(cells) != {"-"}:
            width = max(map(len, [title, *cells]))
            for i, text in enumerate([title, *cells]):
                lines[i] += "  " + text.rjust(width) if lines[i] else text.ljust(width)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
