"""SIGKILL at random moments of the whole method, sampling, scoring and testing included, and inside file writes.

    python tests/long/kills.py [--count 30] [--seed 1]

The demo model runs through all stages once undisturbed. Then the same run is killed, again and again: after a random
time, at a random write (before it, or when half of it is on the disk), or inside a random stage; whenever a run reaches
its end, everything it left (weights, metrics, sampled texts, answers, masks, scores) must equal the undisturbed
run's bit for bit, and the next run begins.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from kill import at_write, die, difference, on_call, results_of  # noqa: E402

import train  # noqa: E402
from allo_mini import run as run_module, tasks, template  # noqa: E402

ARGUMENTS = ("--limit 24 --test-limit 12 --n 4 --sample-batch 32 --sft --sft-epochs 1 --eval-every 2 --val-rows 4 "
             "--max-steps 4 --max-new-tokens 60 --save-minutes 0").split()
PARTS = [("sft", "sft"), ("sample", "samples.jsonl"), ("dpo", "dpo"), ("warmup", "movement.safetensors"),
         ("locate", "mask.safetensors"), ("reward", "reward"), ("score", "token_weights.jsonl"), ("forget", "forget"),
         ("improve", "improve"), ("test SFT", "eval-SFT.jsonl"), ("test DPO", "eval-DPO.jsonl"),
         ("test ALLO", "eval-ALLO.jsonl"), ("table", "results.json")]


def begin(folder: Path, before=lambda: None) -> int:
    """Start the run in a forked child; returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            template.WORKERS.clear()  # the parent's
            os.dup2(os.open(folder.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            before()
            os._exit(train.main([*ARGUMENTS, "--out", str(folder)]))
        finally:
            os._exit(99)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_stage(name: str, delay: float):
    """Die `delay` seconds after a stage, or the test of a model, has begun."""
    def arm(go, args):
        if name in args[1:4:2]:  # Run.stage(self, name, ...), Run.evaluate(self, model, rows, name)
            threading.Timer(delay, die).start()
        return go()
    on_call(run_module.Run, "stage", arm)
    on_call(run_module.Run, "evaluate", arm)


def stage_of(folder: Path) -> str:
    """The part of the method that a killed run was in: the first whose result is missing."""
    return next((part for part, name in PARTS if not (folder / name).exists()), "end")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=30, help="kills")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks.GROUP = 8
    rng, began = random.Random(args.seed), time.monotonic()
    kills, runs, wrong = collections.Counter(), 0, 0
    with tempfile.TemporaryDirectory() as place:
        whole, folder = Path(place) / "whole", Path(place) / "run"
        read, write = os.pipe()

        def counting():  # how many writes there are
            left = at_write(0, False)
            end = os._exit
            os._exit = lambda code: (os.write(write, str(-left[0]).encode()), end(code))
        assert wait(begin(whole, counting)) == 0, (Path(place) / "said.txt").read_text()
        seconds, writes, expected = time.monotonic() - began, int(os.read(read, 20)), results_of(whole)
        spent = json.loads((whole / "results.json").read_text())["seconds"]
        print(f"undisturbed: {seconds:.1f} s, {writes} writes, {len(expected)} files", flush=True)
        while sum(kills.values()) < args.count or folder.exists():
            last = sum(kills.values()) >= args.count  # only to finish the run that was killed last
            choice = "time" if last else rng.choice(["time", "write", "stage"])
            if choice == "time":
                kind, pid = "time", begin(folder)
                deadline = time.monotonic() + (1e9 if last else rng.uniform(0, seconds))
                while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
                    if time.monotonic() > deadline:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                        deadline = 1e18
                    time.sleep(0.001)
                code = os.waitstatus_to_exitcode(status[1])
            elif choice == "stage":
                name, part = rng.choice(list(spent)), rng.random()
                kind = "in the stage"
                code = wait(begin(folder, lambda: in_stage(name, part * spent[name])))
            else:
                torn, number = rng.random() < 0.6, rng.randint(1, writes)
                kind = "half a write" if torn else "a write"
                code = wait(begin(folder, lambda: at_write(number, torn)))
            if code == -signal.SIGKILL:
                kills[stage_of(folder), kind] += 1
                continue
            other = difference(expected, results_of(folder))
            runs += 1
            if code != 0 or other:
                wrong += 1
                print(f"after {sum(kills.values())} kills: exit code {code}, different: {other}", flush=True)
                print((Path(place) / "said.txt").read_text()[-1500:])
            shutil.rmtree(folder)
            (Path(place) / "said.txt").unlink()
    for part in [*dict.fromkeys(part for part, _ in PARTS), "end"]:
        found = {kind: n for (where, kind), n in sorted(kills.items()) if where == part}
        print(f"{part:10}", sum(found.values()), found)
    print(f"{sum(kills.values())} kills in {runs} runs: {runs - wrong} runs ended bit for bit as the undisturbed one, "
          f"{wrong} did not; {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
