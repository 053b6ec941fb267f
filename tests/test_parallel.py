"""parallel.py: two ranks of one run, on CPUs with gloo, against the same run with one rank."""

import os
import socket
import subprocess
import sys

import pytest
from runs import ROOT, arguments, run, steps_of, weights_of, with_samples

RANK = "import sys, torch, train; torch.set_num_threads(1); sys.exit(train.main(sys.argv[1:]))"


def run_ranks(argv) -> list[str]:
    """Start two ranks as torchrun does; what each has printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    where = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, *argv], cwd=ROOT, text=True,
                              env={**where, "RANK": rank, "LOCAL_RANK": rank},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
    try:
        ends = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(stderr for _, stderr in ends)
    return ["".join(line for line in out.splitlines() if "[Gloo]" not in line) for out, _ in ends]


def test_two_ranks_give_the_run_of_one(world, tmp_path):
    """Losses, every metric and the weights; some steps are of one row, along which the second rank
    has none. All files are there."""
    options = ["--sft", "--locate", "gradient", "--token-weights", "edit", "--micro-tokens", "300",
               "--batch", "3", "--p", "10", "--lr-sft", "1e-4", "--lr-dpo", "1e-5", "--max-steps",
               "2", "--lr-improve", "1e-4", "--lr-forget", "1e-4", "--limit", "4"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(world, one, *options)
    with_samples(world, two)
    said, silent = run_ranks(arguments(world, two, *options))
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
