"""The lines for CUDA on a pretended GPU (pretend_cuda.py): no tensor in the wrong place, the host
waits where it must and nowhere else, and what comes out is what a CPU gives. The runs begin when
the tests are collected (conftest.py), and take a second core."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, steps_of

from allo_mini.run.folder import load_mask

SMALL = ("train.py --limit 6 --n 4 --max-new-tokens 60 --seed 7 --no-eval --method allo --batch 2 "
         "--max-steps 2")
PRETENDED = "tests/pretend_cuda.py " + SMALL + " --device cuda"
RUNS = {"cpu": SMALL + " --device cpu --dtype fp32", "plain": PRETENDED + " --dtype fp32",
        "card": PRETENDED + " --memory 12gb --state-bits 8 --sft"}
begun = []  # the folder, the process


def begin(folder: Path):
    """Start all runs; conftest.py calls this, and what it returns when the tests end."""
    lines = [f"{sys.executable} {command} --out {folder}/{name} > {folder}/{name}.txt 2>&1"
             for name, command in RUNS.items()]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(["sh", "-c", "; ".join(lines)], cwd=ROOT, env=alone,
                               start_new_session=True)
    begun[:] = folder, process

    def end():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return end


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[Path, str, dict[str, int]]]:
    """name -> (run folder, what it printed, {where the host waited: how often})."""
    folder, process = begun
    process.wait(300)
    ended = {}
    for name in RUNS:
        said = (folder / f"{name}.txt").read_text()
        assert (folder / name / "results.json").exists(), f"{name}: {said[-4000:]}"
        waits = re.findall(r"waited +(\d+) times at (.*)", said)
        ended[name] = folder / name, said, {where: int(count) for count, where in waits}
    return ended


def test_a_gpu_gives_what_a_cpu_gives(runs):
    """Samples, mask and every logged loss; only sums may round differently."""
    cpu, gpu = (runs[name][0] for name in ("cpu", "plain"))
    assert (cpu / "samples.jsonl").read_text() == (gpu / "samples.jsonl").read_text()
    one, two = (load_mask(folder / "mask.safetensors") for folder in (cpu, gpu))
    common = sum(int((one[n].dense() & two[n].dense()).sum()) for n in one)
    assert common >= 0.999 * sum(map(len, one.values()))
    a, b = steps_of(cpu), steps_of(gpu)
    assert len(a) == len(b) > 5
    for x, y in zip(a, b):
        assert x["stage"] == y["stage"] and x["loss"] == pytest.approx(y["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "card"])
def test_training_waits_for_the_gpu_twice_a_step(runs, name):
    """For the step's sums and for the gradient's norm, which are printed; nothing in the model.
    card: int8 weights, 8-bit moments, host memory in every stage; first losses as they must be."""
    folder, said, waits = runs[name]
    assert re.search(r"improve: first loss 0.6931\d+, expected", said) and "WARNING" not in said
    assert (folder / "improve/model.safetensors").exists()
    steps = len(steps_of(folder))
    assert steps > 5
    sums, norms = (sum(count for where, count in waits.items() if where.startswith(place))
                   for place in ("train.py", "masked_adamw.py:clip"))
    assert sums == steps and norms == (0 if name == "card" else steps)  # there the host's own
    inside = ("model", "attention", "losses", "objectives", "logprobs.py:[^s]", "linear.py:[dfl]")
    inside += ("linear.py",) * (name == "plain")  # else gradients go to the host
    assert not [place for place in waits if re.match("|".join(inside), place)]
