"""How much a loss's gradient asks of every weight, without moving any.

    gradient   I_i = |sum_t g_ti|                        g_t: a few pairs' gradient at theta_ref
    snr        I_i = |sum_t g_ti| / sqrt(sum_t g_ti^2)   its signal-to-noise ratio (ours)

The first asks how large a weight's gradient is. But Adam divides by a running root mean square, so
a weight moves far in the warm-up when its gradient points the same way every time, however small it
is: the second.

A 7B model's importance is 27 GB of fp32. It is made a group of tensors at a time, lies in a
memory-mapped file, and is ranked from there (mask.py) without ever being rounded.
"""

import os
import tempfile

import numpy as np
import torch

from allo_mini.logprobs import grouped, micro_batches, responses_of
from allo_mini.masked_adamw import FlatGradient
from allo_mini.run.files import reading
from allo_mini.run.log import progress

TOGETHER = 8  # examples whose gradients are one g_t; from 1 to 9 the masks are alike (demo)


def scratch(folder, count):
    """fp32 zeros [count] in a nameless file of the folder, which is gone with the tensor.

    The disk has to hold it beforehand: a mapped file that finds no room ends the process.
    """
    with reading(folder), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 4 * count)
        return torch.from_numpy(np.memmap(file, np.float32, shape=count))


def gradient_importance(model, examples, objective, folder, snr, groups, tokens, offload):
    """{name: fp32 tensor of the weight's shape}, by as many passes over the examples as groups.

    For L_DPO g is -(beta/2)(grad log pi(y+) - grad log pi(y-)): the policy is its own reference.
    tokens: of a micro-batch; folder: where the memory-mapped file stands; offload: gradients gather
    in host memory.
    """
    batches = [examples[at:at + TOGETHER] for at in range(0, len(examples), TOGETHER)]
    parameters = list(model.named_parameters())
    size = sum(p.numel() for _, p in parameters)
    importance = {}
    rest = scratch(folder, size)
    for group in grouped(parameters, lambda pair: pair[1].numel(), -(-size // groups)):
        flat = FlatGradient(group, offload=offload)
        place, rest = rest.tensor_split([len(flat.grad)])
        total = torch.zeros_like(flat.grad)  # written once: the file may be on a slow disk
        squares = torch.zeros_like(total) if snr else None
        for batch in progress(batches, "locate", "step"):
            for micro in micro_batches(batch, tokens):
                objective.loss(*responses_of(model, micro), micro)[0].backward()
            total += flat.grad  # g_t [n]
            if snr:
                squares.addcmul_(flat.grad, flat.grad)
            flat.grad.zero_()
        if snr:
            total /= squares.sqrt_().clamp_(min=1e-19)  # 0 where no gradient has come
        flat.close()
        importance |= flat.shaped(place.copy_(total))
        del flat, total, squares  # before the next group's is made
    return importance


def random_importance(shapes, seed):
    """For --locate random: a number in [0, 1) for every weight."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
