"""Checkpoints inside a training stage: a stage that was killed goes on from the last one, bit for bit (on CPU)."""

import json
import math
import time
from pathlib import Path

from allo_mini import UserError, parallel
from allo_mini.files import load_tensors, save_tensors
from allo_mini.log import Log, say
from allo_mini.optim import MaskedAdamW


class StageProgress:
    """Where a stage stands: next step, best weights so far; saved every `minutes` beside the stage."""

    def __init__(self, path: Path, stage: str, total: int, optimizer: MaskedAdamW, log: Log, minutes: float,
                 skipped: int = 0):
        self.path, self.stage, self.total, self.optimizer, self.minutes = path, stage, total, optimizer, minutes
        self.step, self.skipped, self.best, self.best_master = 0, skipped, None, None
        self.saved_at = time.monotonic()
        if path.exists():
            state, metadata = load_tensors(path)
            known = json.loads(metadata["progress"])
            self.step, self.best = known["step"], known["best"]
            self.best_master = state.pop("best_master", None)
            optimizer.load_state_dict(state)
            log.rewind(stage, self.step)
            say(f"{stage}: goes on after step {self.step} of {total}")
        else:
            log.rewind(stage, 0)

    def keep_if_best(self, score: float) -> None:
        """Remember the weights when they validate better than all before (the earliest of equals stays)."""
        if self.best is None or score > self.best:
            self.best, self.best_master = score, self.optimizer.master.to("cpu", copy=True)

    def save(self, step: int) -> None:
        """Write a checkpoint when the last one is old enough; `step` steps are done."""
        if time.monotonic() - self.saved_at < 60 * self.minutes or step == self.total or parallel.RANK:
            return
        state = dict(self.optimizer.state_dict())
        if self.best_master is not None:
            state["best_master"] = self.best_master
        save_tensors(state, self.path, {"progress": json.dumps({"step": step, "best": self.best})})
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        """Put the best weights into the model, say how far it moved, and warn when it did not."""
        if self.best_master is not None:
            self.optimizer.master.copy_(self.best_master)
            self.optimizer.write_back()
            say(f"{self.stage}: kept the weights with the best validation score, {self.best:.4f}")
        change = self.optimizer.largest_change()
        moved = float((self.optimizer.gather_weights().cpu() != self.optimizer.start).float().mean())  # as stored
        say(f"{self.stage}: {self.optimizer.steps} steps, {self.skipped} skipped, largest weight change {change:.3g}; "
            f"{100 * moved:.1f} % of the trained weights differ as stored")
        if not math.isfinite(change):
            raise UserError(f"{self.stage}: the weights are no longer finite; lower --{self.stage}-lr; nothing was saved")
        if moved == 0:
            say(f"{self.stage}: WARNING: the weights did not move; raise --{self.stage}-lr")
        self.optimizer.close()
