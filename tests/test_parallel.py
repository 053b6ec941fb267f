"""parallel.py: two ranks of one run, on CPUs with gloo, against the same run with one rank."""

import re
import subprocess
import sys

import pytest
from runs import ROOT, arguments, run, steps_of, weights_of, with_samples


def run_ranks(logs, argv) -> list[str]:
    """Two ranks by torchrun; what each has printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "--redirects=1", f"--log-dir={logs}", "train.py", *argv]
    with subprocess.Popen(command, cwd=ROOT) as torchrun:
        try:
            assert torchrun.wait(120) == 0
        finally:
            torchrun.terminate()
    return [re.sub(r".*\[Gloo\].*\n", "", path.read_text())
            for path in sorted(logs.rglob("stdout.log"))]


def test_two_ranks_give_the_run_of_one(world, tmp_path):
    """Losses, every metric and the weights; some steps are of one row, along which the second rank
    has none. All files are there."""
    options = ("--sft --locate gradient --token-weights edit --micro-tokens 300 --batch 3 --p 10 "
               "--max-steps 2 --limit 4 --lr-sft 1e-4 --lr-dpo 1e-5 --lr-forget 1e-4 "
               "--lr-improve 1e-4").split()
    one, two = tmp_path / "one", tmp_path / "two"
    run(world, one, *options)
    with_samples(world, two)
    said, silent = run_ranks(tmp_path / "logs", arguments(world, two, *options))
    assert "ALLO" in said and silent == ""
    names = [{path.relative_to(out) for path in out.rglob("*")} for out in (one, two)]
    assert names[0] == names[1]
    assert {row["stage"] for row in steps_of(one)} == {"sft", "dpo", "forget", "improve"}
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        assert a.keys() == b.keys() and a["stage"] == b["stage"]
        for key in a.keys() - {"stage", "time", "tokens/s", "mem/peak_gb"}:
            assert a[key] == pytest.approx(b[key], abs=1e-6, rel=1e-5), (a["stage"], key)
    start = weights_of(world / "model")
    for stage in ("sft", "dpo", "improve"):
        a, b = weights_of(one / stage), weights_of(two / stage)
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-6, stage
        assert max(float((a[n] - start[n]).abs().max()) for n in a) > 1e-5, stage
