"""More than one GPU: `torchrun --nproc_per_node=N -- train.py ...` starts N ranks of one run.

Every rank holds the whole model and takes its share of each step's examples; what travels is the
flat gradient of the selected weights, p % of what ordinary data parallelism sends. Rank 0 alone
writes, samples, scores and evaluates (--eval-every: all do); the others wait. Without torchrun
nothing here does anything.
"""

import os
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PART = 1 << 26  # values that travel through the device at a time


def join(device):
    """Meet the other ranks, if there are any; returns this rank's device's name."""
    if WORLD == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))  # ranks wait for sampling
    return device


def sum_up(grad, sums, device):
    """Add up the ranks' gradients, in place, and their sums, a dict (empty without examples)."""
    for part in grad.split(PART):
        there = part.to(device)
        dist.all_reduce(there)
        part.copy_(there)
    every = [None] * WORLD
    total = Counter()
    dist.all_gather_object(every, {key: value.cpu() for key, value in sums.items()})
    for one in every:
        total.update(one)
    return total


def wait():
    """Go on when every rank is here."""
    if WORLD > 1:
        dist.barrier()
