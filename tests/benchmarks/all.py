"""The tests that need a GPU, then every benchmark that a README row stands for (but sampling.py).

    python tests/benchmarks/all.py OUT [--minutes 60] [--only memory speed ...]

For a rented GPU: OUT gets NAME.json and NAME.txt of each. What does not end within the minutes is stopped; the same
command goes on with what OUT does not have yet. On a CPU it runs the benchmarks at their smaller sizes.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
SMALL = {  # name -> command; --json OUT/NAME.json is added
    "memory": ["memory.py"], "speed": ["speed.py"], "optimizer": ["optimizer.py"], "locate": ["locate.py"],
    "peer": ["peer.py", "--shape", "smollm2-135m"], "generate": ["speed.py", "--generate"]}
LARGE = {
    "tests": ["-m", "pytest", "-q", "-rs", *(str(HERE.parent / f"test_{of}.py") for of in ("gpu", "optim", "mask")), "-k", "gpu"],
    "speed": ["speed.py", "--tokens", "8192", "16384", "--repeat", "3"],
    "generate": ["speed.py", "--generate", "--repeat", "1", "--prompts", "24", "--new-tokens", "64"],  # all at once
    "optimizer": ["optimizer.py"],
    "memory": ["memory.py", "--shape", "llama-2-7b", "--p", "5"],
    "locate": ["locate.py"],
    "peer": ["peer.py", "--shape", "llama-3.2-1b", "--batch", "8", "16", "--turns", "1"],
    "speed-sweep": ["speed.py"],
    "memory-10": ["memory.py", "--shape", "llama-2-7b", "--p", "10"],
    "memory-others": ["memory.py", "--shape", "llama-3-8b", "qwen2.5-7b"]}
JOBS = LARGE if torch.cuda.is_available() else SMALL


def run(name: str, out: Path, seconds: float) -> str:
    """What became of a job."""
    done, command = out / f"{name}.json", list(JOBS[name])
    if done.exists():
        return "there already"
    if name == "peer" and not importlib.util.find_spec("trl"):
        return "left out: trl is not installed"
    if seconds < 30:
        return "left out: no time is left"
    if name != "tests":
        command = [str(HERE / command[0]), *command[1:], "--json", str(done)]
    began = time.monotonic()
    with (out / f"{name}.txt").open("w") as log:
        work = subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                env={"CUDA_VISIBLE_DEVICES": "0", **os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            code = work.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(work.pid, signal.SIGKILL)  # and the processes that it has started
            return f"stopped after {seconds:.0f} s, when the time was up"
        except BaseException:  # Ctrl-C
            os.killpg(work.pid, signal.SIGKILL)
            raise
    if name == "tests" and not code:
        done.write_text("{}\n")
    return f"{'done' if not code else f'FAILED (exit {code})'} in {time.monotonic() - began:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of it (default: %(default)g)")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * args.minutes, False
    for name in args.only:
        said = run(name, args.out, end - time.monotonic())
        failed |= "FAILED" in said
        print(f"=== {name}: {said}", flush=True)
        if not said.startswith(("there already", "left out")):
            print((args.out / f"{name}.txt").read_text()[-4000:], flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
