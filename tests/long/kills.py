"""SIGKILL at random moments of the whole method, and inside writes.

    python tests/long/kills.py [--count 30] [--seed 1]

The demo model runs through all stages once undisturbed. Then the same run is killed again and
again: after a random time, or at a random write (before it, or with half of it on the disk). When a
run reaches its end, everything it left must equal the undisturbed run's, and the next one begins.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import torch  # noqa: E402
from kill import at_write, die, in_child  # noqa: E402
from runs import demo_command, difference, results_of  # noqa: E402

import train  # noqa: E402

WRITES = 220  # about as many as a run has


def attempt(command: list[str], said: Path, before=lambda: None) -> int:
    """The run's exit code, -9 where it was killed; what it says goes to a file."""
    def begin():
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        before()
    return in_child(lambda: train.main(command), begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=30, help="kills")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train.GROUP = 4  # questions sampled together
    rng, began = random.Random(args.seed), time.monotonic()
    kills, runs, wrong = Counter(), 0, 0
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        folder, said = place / "run", place / "said.txt"
        command = demo_command(place)
        assert attempt(command, said) == 0, said.read_text()
        seconds, expected = time.monotonic() - began, results_of(folder)
        print(f"undisturbed: {seconds:.1f} s, {len(expected)} files", flush=True)
        shutil.rmtree(folder)
        while kills.total() < args.count or folder.exists():
            arm, kind = (lambda: None), "none"  # to finish the run that was killed last
            if kills.total() < args.count:
                kind = rng.choice(["time", "a write", "half a write"])
                arm = at_write(folder, rng.randint(1, WRITES), kind == "half a write")
                if kind == "time":
                    timer = threading.Timer(rng.uniform(0, seconds), die)
                    arm = timer.start
            code = attempt(command, said, arm)
            if code == -signal.SIGKILL:
                stages = len(list(folder.glob("[!.]*")))
                kills[f"{kind}, {stages} files there"] += 1
                continue
            other = difference(expected, results_of(folder))
            runs += 1
            if code != 0 or other:
                wrong += 1
                print(f"after {kills.total()} kills: exit code {code}, different: {other}")
                print(said.read_text()[-1500:], flush=True)
            shutil.rmtree(folder)
            said.unlink()
    print(dict(kills))
    print(f"{kills.total()} kills in {runs} runs: {runs - wrong} ended bit for bit as the "
          f"undisturbed one, {wrong} did not; {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
