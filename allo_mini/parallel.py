"""More than one GPU: `torchrun --nproc_per_node=N train.py ...` starts N ranks of one run (torch.distributed as it is).

Every rank holds the whole model and takes its share of each step's micro-batches; what travels is the flat gradient of
the selected weights, p % of what ordinary data parallelism sends. Rank 0 alone writes, samples, scores and evaluates,
the others wait. Without torchrun there is one rank, and nothing here does anything.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
HERE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine


def join(device: str) -> str:
    """Meet the other ranks, if there are any; returns this rank's device."""
    if WORLD == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a rank may wait through hours of sampling
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=7))
    return device


def share(items: list) -> list:
    """This rank's part of a list."""
    return items[RANK::WORLD]


def sum_over_ranks(values: Tensor, device) -> None:
    """Add up a tensor over all ranks, in place; a large one in host memory travels through the device in parts."""
    for part in values.split(1 << 26) if WORLD > 1 else ():
        there = part.to(device)
        dist.all_reduce(there)
        part.copy_(there)


def wait() -> None:
    """Go on when every rank is here."""
    if WORLD > 1:
        dist.barrier()
