"""The tests that need a GPU, where there is one, then every benchmark that needs no files of yours.

    python tests/benchmarks/all.py OUT [--minutes 60] [--only memory speed ...]

OUT gets NAME.json and NAME.txt of each. What has not ended after the minutes is stopped; the same
command goes on with what OUT does not have yet.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

HERE = Path(__file__).parent
JOBS = {"tests": f"-m pytest -q {HERE.parent} -k gpu", "memory": "memory.py", "speed": "speed.py",
        "generate": "speed.py --generate", "peer": "peer.py --shape smollm2-135m"}
if torch.cuda.is_available():
    JOBS["peer"] = "peer.py --shape llama-3.2-1b --batch 8 16 --turns 1"


def run(command: list[str], log: Path, seconds: float) -> str:
    """What became of a command; nothing that it started goes on after it."""
    with log.open("w") as file:
        work = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT,
                                start_new_session=True)
        try:
            return "FAILED" if work.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            return "stopped: the time is up"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(work.pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of it [60]")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, states = time.monotonic() + 60 * args.minutes, []
    for name in args.only:
        command, log = JOBS[name].split(), args.out / f"{name}.txt"
        if name != "tests":
            command[0] = str(HERE / command[0])
            command += ["--json", str(args.out / f"{name}.json")]
        if not (args.out / f"{name}.json").exists() and time.monotonic() < end:
            states.append(run(command, log, end - time.monotonic()))
            print(f"=== {name}: {states[-1]}\n{log.read_text()[-4000:]}", flush=True)
    return int("FAILED" in states)


if __name__ == "__main__":
    sys.exit(main())
