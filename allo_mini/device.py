"""The device a run computes on: which there is, what memory it has, and what is set for it once."""

import contextlib
import ctypes
import os
import sys

import torch

from allo_mini import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """--device and --dtype -> what is really there, the best for "auto". Raises UserError when it is not.

    Products of fp32 matrices stay exact on every device (no TF32, which rounds factors to 11 bits): the fast way is
    --dtype bf16. For every new size of a bf16 product on a CPU oneDNN keeps a megabyte, a thousand times, and hardly
    two steps have the same sizes: the last 64 are enough.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN makes a plan for every new length, half a second each
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # torch reads them at the first product
        os.environ.setdefault(cache, "64")
    there = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    there += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    device = there[0] if device == "auto" else device
    if device not in there:
        raise UserError(f"--device is {device}, but this machine offers {', '.join(there)}")
    if device == "cpu":
        keep_freed_memory()
    best = "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return device, DTYPES[best if dtype == "auto" else dtype]


def keep_freed_memory() -> None:
    """On Linux: large tensors' memory is used again, not given back to the system and fetched anew, page by page and
    filled with zeros, a thousand times a step: 5 % of a training step. -3 and -1 are glibc's M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**31 - 1) or libc.mallopt(-3, 32 << 20)  # older ones take no more
        libc.mallopt(-1, 2**31 - 1)


def free_memory(device) -> int:
    """Bytes of a GPU that can still be allocated; what torch keeps of earlier work is given back first."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def host_memory() -> int:
    """Bytes of memory that this machine has (a container's limit is not seen); 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0


def peak_gb(device: str) -> float:
    """Peak memory: allocated on the GPU since the stage began, or resident of this process since its start."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
