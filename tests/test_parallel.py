"""parallel.py: two ranks of one run, on CPUs with gloo, against the same run with one rank."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from allo_mini import parallel
from test_stages import negatives, start
from test_train import arguments, world  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
# What a rank runs: train.py, then the files it has made or moved below the run folder, as one line of JSON.
RANK = """
import json, os, sys, torch
torch.set_num_threads(1)
made, out = set(), os.path.abspath(sys.argv[1])
def watch(event, args):
    name = {"open": 0, "os.rename": 1, "os.mkdir": 0, "shutil.copyfile": 1}.get(event)
    if name is not None and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)):
        made.add(os.path.abspath(str(args[name])))
sys.addaudithook(watch)
import train
code = train.main(sys.argv[2:])
print(json.dumps([code, sorted(os.path.relpath(path, out) for path in made if path.startswith(out))]))
"""


def run_ranks(out, argv, count=2):
    """Start the ranks as torchrun does; for each of them (what it printed, exit code of train.main, files it made).

    Before torch 2.11 gloo itself tells on standard output that its ranks are connected.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(out), *argv], cwd=ROOT, text=True,
                              env={**os.environ, **where, "RANK": str(i), "LOCAL_RANK": str(i)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(count)]
    try:
        ends = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), [stderr for _, stderr in ends]
    printed = [[line for line in stdout.splitlines() if not line.startswith("[Gloo]")] for stdout, _ in ends]
    return [("\n".join(said), *json.loads(last)) for *said, last in printed]


def steps_of(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "step" in row]


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_two_ranks_give_the_run_of_one(world, tmp_path):
    """sft, dpo, forget and improve: losses, every metric and the saved weights; forget's steps are of a single
    micro-batch, along which the second rank computes for nothing. All files are there, made by rank 0 alone."""
    options = ["--sft", "--locate", "gradient", "--token-weights", "edit", "--max-steps", "2", "--micro-batch", "2",
               "--sft-batch", "6", "--dpo-batch", "5", "--improve-batch", "8", "--forget-batch", "2", "--p", "10",
               "--test-limit", "2", "--sft-lr", "1e-4", "--dpo-lr", "1e-5", "--improve-lr", "1e-4", "--forget-lr", "1e-4"]
    assert train.main(arguments(world, tmp_path / "one", *options)) == 0
    (said, code, made), (silent, other, none) = run_ranks(tmp_path / "two", arguments(world, tmp_path / "two", *options))
    assert (code, other) == (0, 0) and "ALLO" in said and (silent, none) == ("", [])
    assert names_in(tmp_path / "one") == names_in(tmp_path / "two")
    assert {"improve", "sft", "config.json", "results.json", "pairs.jsonl", "mask.safetensors"} <= set(made)
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert [(row["stage"], row["step"]) for row in one] == [(row["stage"], row["step"]) for row in two]
    assert {row["stage"] for row in one} == {"sft", "dpo", "forget", "improve"} and len(one) == 8
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key in a.keys() - {"time", "tokens/s", "mem/peak_gb"}:
            assert a[key] == (pytest.approx(b[key], abs=1e-6, rel=1e-5) if key != "stage" else b[key]), (a["stage"], key)
    for stage in ("sft", "dpo", "forget", "improve"):
        a, b = (load_file(tmp_path / name / stage / "model.safetensors") for name in ("one", "two"))
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-6, stage
        before = load_file(world / "model/model.safetensors")
        assert max(float((a[n] - before[n]).abs().max()) for n in a) > 1e-5, stage


def test_ranks_take_every_example_once_even_when_one_has_halved(world, tmp_path, monkeypatch):
    """Memory runs out on one rank alone: what the others do must not change by that."""
    run, _ = start(world, tmp_path, "--micro-batch", "3")
    group = [e._replace(prompt=[7] * (2 + i)) for i, e in enumerate(negatives(11))]
    monkeypatch.setattr(parallel, "WORLD", 3)
    taken = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        run.halved = rank == 1
        mine = run.micro_batches(group, parallel.share)
        assert max(map(len, mine)) == (2 if run.halved else 3)
        taken += [len(e.prompt) for micro in mine for e in micro]
    assert sorted(taken) == list(range(2, 13))


def test_one_rank_shares_and_sums_nothing():
    values = torch.arange(3.0)
    parallel.sum_over_ranks(values, "cpu")
    parallel.wait()
    assert parallel.WORLD == 1 and parallel.share([1, 2, 3]) == [1, 2, 3] and values.tolist() == [0, 1, 2]
    assert parallel.join("cpu") == "cpu"
