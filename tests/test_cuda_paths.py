"""The lines for CUDA on a pretended GPU (pretend_cuda.py): no tensor on the wrong device, the host waits where it must
and nowhere else, and what comes out is what a CPU gives. The runs are processes of their own, one after the other from the
moment the tests are collected (conftest.py), so that they take the second core while the other tests take the first."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--limit", "12", "--n", "4", "--max-new-tokens", "70", "--seed", "7", "--no-eval", "--method", "allo"]
LEAN = ["--int8", "--offload", "gradient", "--state-bits", "8", "--sft", "--sft-epochs", "1", "--p-sft", "10",
        "--locate", "gradient", "--locate-groups", "3", "--checkpoint-blocks", "2", "--deterministic"]
RUNS = {  # name -> device, flags
    "cpu": ("cpu", ["--dtype", "fp32"]), "plain": ("cuda", ["--dtype", "fp32"]),
    "lean": ("cuda", LEAN), "streamed": ("cuda", [*LEAN, "--stream"]),
    "card": ("cuda", ["--memory", "12gb", "--eval-every", "1", "--val-rows", "2"])}
begun: dict[str, tuple[Path, Future]] = {}
running: list[subprocess.Popen] = []


def run(name: str, folder: Path) -> subprocess.CompletedProcess:
    device, flags = RUNS[name]
    command = ["tests/pretend_cuda.py"] if device == "cuda" else []
    command += ["train.py", "--device", device, "--out", str(folder / name), *SMALL, *flags]
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=ONE_THREAD) as process:
        running[:] = [process]
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def begin(folder: Path):
    """Start all runs; conftest.py calls this, and what it returns when the tests end, however they do."""
    pool = ThreadPoolExecutor(1)
    begun.update({name: (folder / name, pool.submit(run, name, folder)) for name in RUNS})

    def end():
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()
        pool.shutdown()
    return end


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[Path, str, dict[str, int]]]:
    """name -> (run folder, what it printed, {where the host waited: how often}), of runs that ended well."""
    found = {}
    for name, (folder, future) in begun.items():
        ended = future.result()
        assert ended.returncode == 0, f"{name}: {ended.stdout[-2000:]}{ended.stderr[-4000:]}"
        waits = {where: int(count) for count, where in re.findall(r"waited +(\d+) times at (.*)", ended.stderr)}
        found[name] = folder, ended.stdout, waits
    return found


def test_a_gpu_gives_what_a_cpu_gives(runs):
    """Samples, mask and every logged loss; only sums may round differently."""
    cpu, gpu = (runs[name][0] for name in ("cpu", "plain"))
    assert (cpu / "samples.jsonl").read_text() == (gpu / "samples.jsonl").read_text()
    masks = [load_file(folder / "mask.safetensors") for folder in (cpu, gpu)]  # 1 bit a weight
    ones, other, both = (sum(int(np.bitwise_count(bits.numpy()).sum()) for bits in tensors) for tensors in (
        masks[0].values(), masks[1].values(), [masks[0][name] & masks[1][name] for name in masks[0]]))
    assert ones == other and both >= 0.999 * ones  # a few stand so near the threshold that rounding decides
    steps = [[row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "step" in row]
             for folder in (cpu, gpu)]
    assert len(steps[0]) == len(steps[1]) > 5
    for a, b in zip(*steps):
        assert a["stage"] == b["stage"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "lean", "streamed", "card"])
def test_training_waits_for_the_gpu_twice_a_step(runs, name):
    """For the step's sums and for the gradient's norm, which are printed; with the gradient in host memory a tensor's
    part of it is waited for as it arrives there."""
    _, out, waits = runs[name]
    steps = len(re.findall(r"^ +[\w-]+ +\d+/\d+  ", out, re.MULTILINE))
    assert steps and waits["loop.py:accumulate tolist"] == steps
    assert waits.get("optim.py:clip _local_scalar_dense", 0) == (0 if name in ("lean", "streamed") else steps)
    inside = ("model.py", "attention.py", "pointwise.py", "linear.py", "losses.py", "logprobs.py:head", "logprobs.py:token")
    assert not [where for where in waits if where.startswith(inside) and "to_int8" not in where]  # which loading calls


def test_weights_that_are_read_from_the_host_give_the_same_run_in_less_memory(runs):
    lean, streamed = ([json.loads(row) for row in (runs[name][0] / "metrics.jsonl").read_text().splitlines()]
                      for name in ("lean", "streamed"))
    for a, b in zip(lean, streamed, strict=True):
        timed = {"time", "seconds", "tokens/s", "mem/peak_gb"}
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
        if "mem/peak_gb" in a and a["stage"] in ("locate", "forget", "improve"):
            assert b["mem/peak_gb"] < a["mem/peak_gb"]
    for model in ("forget", "improve"):
        first, second = (load_file(runs[name][0] / model / "model.safetensors") for name in ("lean", "streamed"))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["lean", "card"])
def test_settings_for_small_cards_train_too(runs, name):
    """int8 weights, 8-bit moments and host memory in every stage; the first losses are what they must be."""
    folder, out, _ = runs[name]
    assert "improve: first loss 0.693147" in out and "WARNING" not in out
    assert (folder / "improve" / "model.safetensors").exists() and (folder / "results.json").exists()
