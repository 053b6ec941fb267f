"""Chains of pointwise operations as one kernel on a GPU; one by one each goes through memory again.

They are what autograd does not see: forward and backward of its Functions (model.py). So with and
without a gradient the same kernel runs, and log-probs are the same to the bit.
"""

import torch

KERNELS = {}  # function -> what a GPU runs in its place


def fused(plain):
    """`plain`, compiled by its first call on a GPU; as it is on a CPU, and where Triton fails."""
    def call(x, *rest):
        if not x.is_cuda:
            return plain(x, *rest)
        if plain not in KERNELS:
            KERNELS[plain] = torch.compile(plain, dynamic=True)
            try:
                KERNELS[plain](x, *rest)
            except Exception:  # there is no Triton, or no compiler and headers that it needs
                KERNELS[plain] = plain
        return KERNELS[plain](x, *rest)
    return call
