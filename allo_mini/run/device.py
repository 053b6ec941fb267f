"""The device a run computes on: which there is, and what is set for it once."""

import contextlib
import ctypes
import os
import resource
import sys

import torch

from allo_mini import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(device, dtype):
    """--device and --dtype -> a device's name and torch's dtype, the best for "auto".

    Raises UserError for a device that is not there.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans half a second for every new length
    there = ["cpu"]
    if torch.cuda.is_available():
        there = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    device = there[0] if device == "auto" else device
    if device not in there:
        raise UserError(f"--device is {device}, but this machine offers {', '.join(there)}")
    if device == "cpu":
        keep_freed_memory()
    if ":" in device:  # where torch asks what a GPU can do, it asks the current one
        torch.cuda.set_device(device)
    if dtype == "auto":
        fast = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if fast else "fp32"
    return device, DTYPES[dtype]


def keep_freed_memory():
    """Use large tensors' memory again, not give it back to the system and fetch it anew a thousand
    times a step: 7 to 13 % of a training step. -3 and -1 are glibc's M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD. oneDNN keeps a megabyte for every size of a bf16 product: the last 64."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**31 - 1) or libc.mallopt(-3, 32 << 20)  # older ones take no more
        libc.mallopt(-1, 2**31 - 1)


def free_memory(device):
    """Bytes that work may take: what is free on a GPU, half of what a host has."""
    if str(device).startswith("cuda"):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_gb(device):
    """Peak memory: allocated on the GPU since the stage began, or resident of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
