"""What a run says and remembers of its steps: lines, metrics.jsonl, checkpoints, errors."""

import json
import math
import os
import sys
import time

from tqdm import tqdm

from allo_mini import UserError
from allo_mini.run import files, parallel

IN_A_LINE = ("loss", "rewards/margins", "rewards/accuracies", "token_weight/fraction",
             "useful/fraction", "grad_norm", "tokens/s")  # of a step's metrics, in its line
LINES = 100  # steps of a stage that are printed, evenly spaced; metrics.jsonl has all
OUT_OF_MEMORY = "out of memory", "allocate memory", "ALLOC_FAILED"
MINUTE = 60  # seconds between two lines of a bar


class Lines:
    """The error output where it is no terminal: every state of a bar is a line of its own."""

    def write(self, text):
        """tqdm writes a bar over the one before."""
        sys.stderr.write(text.strip("\r ") and text.replace("\r", "") + "\n")


def progress(items, label, unit="it", total=None):
    """A tqdm bar; where the output is no terminal a line a minute."""
    quiet = {} if sys.stderr.isatty() else {  # miniters: tqdm's own thread shows nothing then
        "file": Lines(), "mininterval": MINUTE, "delay": MINUTE, "miniters": 1, "ncols": 80}
    return tqdm(items, label, total, leave=False, unit=unit, disable=parallel.RANK > 0, **quiet)


def say(text):
    """Print a line (rank 0 alone) without tearing a progress bar."""
    if parallel.RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


def exit_code(work, stopped="stopped"):
    """work() as a command: 0; 2 and one line after a mistake; 130 after Ctrl-C, with `stopped`."""
    try:
        work()
        return 0
    except BrokenPipeError:  # whoever reads our output (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as e:
        error = " ".join(str(e).split())
    except RuntimeError as e:  # torch's, of the host's memory, or of the GPU's libraries
        if not any(words in str(e) for words in OUT_OF_MEMORY):
            raise
        error = "out of memory: lower --micro-tokens, --sample-batch, --p, --max-length or --memory"
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    print(f"error: {error}", file=sys.stderr)
    return 2


class Log:
    """metrics.jsonl: a line a training step, and notes about stages.

    After a restart the steps since the last checkpoint stand there twice; `read` takes the later.
    """

    def __init__(self, folder):
        self.path = folder / "metrics.jsonl"
        self.seconds = {row["stage"]: row["seconds"]
                        for row in Log.read(folder) if "seconds" in row}

    def begin(self, stage):
        """A stage goes on from what the sittings before this one have taken."""
        self.began = time.monotonic() - self.seconds.get(stage, 0)

    def note_time(self, stage, **more):
        """Note, and return, how many seconds a stage has taken until now, in all sittings."""
        seconds = self.seconds[stage] = round(time.monotonic() - self.began, 2)
        self.write(stage, seconds=seconds, **more)
        return seconds

    def write(self, stage, **values):
        """Append a line."""
        if parallel.RANK == 0:
            files.append_rows(self.path, [{"stage": stage, **values}])

    @staticmethod
    def read(folder):
        """The lines of a run: one a step, one for all notes of a stage."""
        path = folder / "metrics.jsonl"
        lines = {}
        with files.reading(path):
            for row in files.rows_if_there(path):
                key = row["stage"], row.get("step")
                lines.setdefault(key, {}).update(row)
                row.get("seconds", 0) + 0.0  # a number, or it is refused: they are added up
        return list(lines.values())


class Progress:
    """Where a training stage of `total` steps stands: its lines, and checkpoints inside it.

    A stage that was killed goes on from the last checkpoint, bit for bit (on a CPU): the
    optimizer's vectors, the step and the objective's state. No random generator is saved: the order
    of the data follows from --seed and the step.
    """

    def __init__(self, run, stage, total, optimizer, objective):
        """Raises UserError where the checkpoint is broken or of other weights or rows."""
        self.run = run
        self.stage = stage
        self.total = total
        self.optimizer = optimizer
        self.objective = objective
        self.step = 0
        self.path = run.folder / f".{stage}.state.safetensors"
        if self.path.exists():
            tensors, metadata = files.load_tensors(self.path)
            with files.reading(self.path):
                known = json.loads(metadata["progress"])
                if known["total"] != total or not tensors["start"].equal(optimizer.start):
                    raise UserError(f"{self.path}: of other weights or rows; delete it to begin "
                                    "again")
                self.step = known["step"]
                objective.state.update(known["state"])
                optimizer.load_state_dict(tensors)
            say(f"{stage}: goes on after step {self.step} of {total}")
        self.began = self.saved_at = time.monotonic()

    def check(self, metrics, examples):
        """Before a step moves weights: its numbers are numbers, the first loss what it must be."""
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise UserError(f"{self.stage}, step {self.step + 1}: loss {metrics['loss']}, gradient "
                            f"norm {metrics['grad_norm']}; lower the rate, or use --dtype fp32")
        if self.step == 0 and self.objective.first_loss:
            first_loss = self.objective.first_loss(examples)
            close = math.isclose(metrics["loss"], first_loss, rel_tol=1e-4, abs_tol=1e-4)
            warning = "" if close else "   <-- WARNING: policy and reference do not agree"
            say(f"{self.stage}: first loss {metrics['loss']:.6f}, expected {first_loss:.6f} where "
                f"theta = theta_ref{warning}")

    def after_step(self, metrics, tokens, model):
        """Validate and log a step, print it (unless there are very many), write a checkpoint when
        one is due."""
        self.step += 1
        now = time.monotonic()
        step = self.step
        total = self.total
        metrics |= {"tokens/s": tokens / (now - self.began), "learning_rate": self.optimizer.lr}
        every = self.run.cfg.eval_every
        scored = every and self.stage not in ("warmup", "rewrite")
        if scored and (step % every == 0 or step == total):
            metrics["eval/score"] = self.run.validate(self.stage, model)
        self.run.log.write(self.stage, step=step, **metrics)
        if step in (1, total) or step % -(-total // LINES) == 0:
            columns = [f"{key} {metrics[key]:>9.4g}" for key in IN_A_LINE if key in metrics]
            say(f"{self.stage:>8} {step:>{len(str(total))}}/{total}  {'  '.join(columns)}")
        due = now - self.saved_at >= 60 * self.run.cfg.save_minutes and step < total
        if due and parallel.RANK == 0:
            known = {"step": step, "total": total, "state": self.objective.state}
            files.save_tensors(self.optimizer.state_dict(), self.path,
                               {"progress": json.dumps(known)})
            self.run.log.note_time(self.stage)
            self.saved_at = now
        self.began = time.monotonic()


def table(header, rows):
    """Rows of strings as plain text in aligned columns, the first to the left; columns of nothing
    but "-" are left out."""
    columns = []
    for column in zip(header, *rows):
        if set(column[1:]) != {"-"}:
            width = max(map(len, column))
            pad = str.rjust if columns else str.ljust
            columns.append([pad(text, width) for text in column])
    head, *lines = map("  ".join, zip(*columns))
    return "\n".join([head, "-" * len(head), *lines])
