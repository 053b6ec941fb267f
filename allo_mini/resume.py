"""Checkpoints inside a training stage: a stage that was killed goes on from the last one, bit for bit (on CPU).

A checkpoint holds the optimizer's vectors, the step, the best weights so far and fingerprints of what it belongs to.
No random generator is saved: the order of data follows from --seed and the step, every sample has its own stream.
"""

import hashlib
import json
import math
import signal
import time

from torch import Tensor

from allo_mini import UserError, parallel
from allo_mini.config import rate_flag
from allo_mini.disk import need_room
from allo_mini.files import load_tensors, save_tensors
from allo_mini.log import say
from allo_mini.mask import mask_hash
from allo_mini.optim import MaskedAdamW


class StageProgress:
    """Where a stage of `run` stands: next step, best weights so far; saved every --save-minutes beside the stage."""

    def __init__(self, run, stage: str, total: int, skipped: int, optimizer: MaskedAdamW, examples: list, mask,
                 state: dict[str, float]):
        self.run, self.stage, self.total, self.skipped, self.optimizer = run, stage, total, skipped, optimizer
        self.step, self.best, self.best_master, self.stopping, self.state = 0, None, None, False, state
        self.path, self.saved_at = run.state_file(stage), time.monotonic()
        rows, settings = hashlib.sha256(), hashlib.sha256((run.folder / "config.json").read_bytes())
        for example in examples:
            rows.update(repr(example).encode())
        self.belongs = {"config.json": settings.hexdigest(), "rows": rows.hexdigest(), "number of steps": total,
                        "mask": mask_hash(mask) if mask else None}
        if self.path.exists():
            self._load()
            say(f"{stage}: goes on after step {self.step} of {total}")
        size = sum(t.nbytes for t in self.tensors().values())
        # for the last checkpoint, the next one and the model
        need_room(self.path, size * (1 if self.step else 2) + run.parameters * run.dtype.itemsize)
        run.log.rewind(stage, self.step)

    def _load(self) -> None:
        """Read the checkpoint. Raises UserError when it is broken or belongs to other rows, mask or weights."""
        state, metadata = load_tensors(self.path)
        try:
            known = json.loads(metadata["progress"])
            other = [key for key in self.belongs if known["belongs"][key] != self.belongs[key]]
            other += [] if state["start"].equal(self.optimizer.start) else ["model"]
            if other:
                raise UserError(f"{self.path}: of another {', '.join(other)}; delete it to begin the stage again")
            self.step, self.best, self.best_master = known["step"], known["best"], state.get("best_master")
            fits = [state[name].shape == tensor.shape for name, tensor in self.optimizer.state_dict().items()]
            if self.step not in range(self.total + 1) or not all(fits):
                raise ValueError("its step or its tensors do not fit")
            self.state.update(known["state"])
            self.optimizer.load_state_dict(state)
        except (LookupError, TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"{self.path}: no checkpoint of ours ({e}); delete it to begin the stage again") from None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the optimizer's state and the best weights so far."""
        best = {} if self.best_master is None else {"best_master": self.best_master}
        return self.optimizer.state_dict() | best

    def steps(self):
        """The numbers of the steps still to do. Ctrl-C waits for the end of a step, where `save` acts on it."""
        def stop(*_):
            self.stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            say(f"{self.stage}: stops after this step (Ctrl-C again: at once)")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield from range(self.step, self.total)
        finally:
            signal.signal(signal.SIGINT, before)

    def keep_if_best(self, score: float) -> None:
        """Remember the weights when they validate better than all before (the earliest of equals stays)."""
        if self.best is None or score > self.best:
            self.best, self.best_master = score, self.optimizer.master.to("cpu", copy=True)

    def save(self, step: int) -> None:
        """Write a checkpoint when the last one is old enough, or Ctrl-C was pressed; `step` steps are done."""
        due = time.monotonic() - self.saved_at >= 60 * self.run.cfg.save_minutes and step < self.total
        if (due or self.stopping) and not parallel.RANK:
            progress = {"step": step, "best": self.best, "state": self.state, "belongs": self.belongs}
            save_tensors(self.tensors(), self.path, {"progress": json.dumps(progress)})
            self.saved_at = time.monotonic()
        if self.stopping:
            say(f"{self.stage}: saved after step {step} of {self.total}")
            raise KeyboardInterrupt

    def finish(self) -> None:
        """Put the best weights into the model, say how far it moved, and warn when it did not."""
        if self.best_master is not None:
            self.optimizer.master.copy_(self.best_master)
            self.optimizer.write_back()
            say(f"{self.stage}: kept the weights with the best validation score, {self.best:.4f}")
        change, moved = self.optimizer.change(self.run.dtype)
        say(f"{self.stage}: {self.optimizer.steps} steps, {self.skipped} skipped, largest weight change {change:.3g}; "
            f"{100 * moved:.1f} % of the trained weights changed, rounded to how they are stored")
        if not math.isfinite(change):
            raise UserError(f"{self.stage}: the weights are no longer finite; lower {rate_flag(self.stage)}; nothing "
                            "was saved")
        if moved == 0:
            say(f"{self.stage}: WARNING: the weights did not move; raise {rate_flag(self.stage)}")
        self.optimizer.close()
