"""A pretended GPU, so that machines without one run the lines for CUDA.

    python tests/pretend_cuda.py SCRIPT ...

Every tensor's memory remembers a place, "cuda" or "cpu"; all is computed on the CPU. An operation
whose tensors are in different places fails, as on a GPU, and so does a copy to the host that nobody
waits for. At the end each place of our code that waited for the GPU is printed, and how often. The
bytes of tensors on "cuda" are metered. It cannot show speed, rounding, or what kernels take.
"""

import os
import runpy
import sys
import traceback
import weakref
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.autograd.function import BackwardCFunction  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

REAL = {name: getattr(torch.Tensor, name) for name in ("to", "numpy", "tolist")}
real_device, real_tensor = torch._C.TensorBase.device.__get__, torch.tensor
WAITS = Counter()  # place in our code -> how often the host waited there for the GPU
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}
MOVES = {"copy_", "_to_copy"}
INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_"}  # positions may be on the host
SIZE = 80 << 30  # bytes that the GPU seems to have
moving = []  # where the tensor that `to` is moving goes
meter = Counter()  # bytes on the GPU: now, and at the peak


def place_of(t) -> str:
    """"cuda", "cpu" or "meta"; "any": made in autograd's C++, where whatever it meets is."""
    kind = real_device(t).type
    return getattr(t.untyped_storage(), "place", "cpu") if kind == "cpu" else kind


def settle(t, place: str) -> None:
    """A tensor's memory is going to stay in this place, unless it already has one."""
    storage = t.untyped_storage()
    if getattr(storage, "place", "any") == "any":
        storage.place = place
        if place == "cuda":
            meter["now"] += storage.nbytes()
            meter["peak"] = max(meter["peak"], meter["now"])
            weakref.finalize(storage, meter.subtract, {"now": storage.nbytes()})


def line() -> str:
    """The function of our code that is at work."""
    ours = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT))
            and not {"tests", "site-packages"} & {*Path(f.filename).relative_to(ROOT).parts}]
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"


class Pretend(TorchDispatchMode):
    """Sees every operation: checks the places of its tensors, remembers those of what it makes.
    hollow: matrix products are zeros, random weights what was there; for who wants bytes alone."""

    def __init__(self, hollow=False):
        super().__init__()
        self.hollow = hollow

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.removeprefix("aten::")
        if torch.is_inference_mode_enabled():  # where operations made of others arrive whole
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        asked = kwargs["device"].type if kwargs.get("device") is not None else None
        if asked == "cuda":
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = self.checked(name, tensors, args)
        node = torch._C._current_autograd_node()
        if name == "_to_copy" and not moving:  # torch's own C++, which knows the real device
            asked = None
        elif asked == "cpu" and node is not None and not isinstance(node, BackwardCFunction):
            asked = "any"
        place = moving[-1] if moving and name in ("_to_copy", "clone") else asked or there
        if self.hollow and name in ("mm", "normal_"):
            made = args[0]
            if name == "mm":
                made = made.new_zeros(len(made), args[1].shape[1])
        else:
            made = func(*args, **kwargs)
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and real_device(t).type == "cpu":
                settle(t, place)
        return made

    def checked(self, name: str, tensors: list, args) -> str:
        """Where an operation computes. Raises RuntimeError when its tensors disagree."""
        places = [place_of(t) for t in tensors]
        on_gpu = "cuda" in places
        for i, t in enumerate(tensors):
            if places[i] == "any" and {"cuda", "cpu"} & {*places}:
                places[i] = "cuda" if on_gpu else "cpu"
                settle(t, places[i])
        free = name in MOVES or name in INDEXED and places[0] == "cuda"
        if on_gpu and {*places} != {"cuda"} and not free:
            strict = "fused" in name or "foreach" in name  # elsewhere a number may be on the host
            if any(p != "cuda" and (strict or t.dim()) for t, p in zip(tensors, places)):
                raise RuntimeError(f"{name} at {line()}: its tensors are on {', '.join(places)}")
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        to_host = name == "copy_" and places == ["cpu", "cuda"]
        if to_host and len(args) > 2 and args[2]:
            raise RuntimeError(f"copy_ at {line()}: to the host without waiting for it")
        if on_gpu and (name in WAITING or by_mask or to_host):
            WAITS[f"{line()} {name}"] += 1
        return "cuda" if on_gpu else "cpu"


def to(self, *args, copy=False, **kwargs):
    """Tensor.to."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype)
    device, dtype, unwaited, _ = torch._C._nn._parse_to(*args, **kwargs)
    now, dtype = place_of(self), dtype or self.dtype
    wanted = device.type if device is not None else now
    if "meta" in (wanted, now):
        return REAL["to"](self, device=device, dtype=dtype, copy=copy)
    if wanted == now:
        return REAL["to"](self, dtype=dtype, copy=copy)
    if wanted == "cpu":
        WAITS[f"{line()} to"] += 1
        if unwaited:
            raise RuntimeError(f"to at {line()}: to the host without waiting for it")
    moving.append(wanted)
    try:
        return REAL["to"](self, dtype=dtype, copy=True)
    finally:
        moving.pop()


def host_only(self):
    assert place_of(self) != "cuda", f"numpy() at {line()}: of a tensor on the GPU"
    return REAL["numpy"](self)


def tolist(self):
    WAITS[f"{line()} tolist"] += place_of(self) == "cuda"
    return REAL["tolist"](self)


def tensor(data, *args, device=None, **kwargs):
    made = real_tensor(data, *args, **kwargs)
    return made if device is None else to(made, device)


def install() -> None:
    """Let torch look as if it had one GPU of 80 GB."""
    import torch.nn.attention.bias as bias

    from allo_mini import logprobs

    def nothing(*args):
        return 0

    for name in ("_lazy_init", "empty_cache", "set_per_process_memory_fraction", "synchronize"):
        setattr(torch.cuda, name, nothing)
    torch.cuda.reset_peak_memory_stats = lambda *args: meter.__setitem__("peak", meter["now"])
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda *args: meter["peak"]
    torch.cuda.get_device_name = lambda *args: "pretended GPU"
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda **kind: True
    torch.cuda.device_count = lambda: 1
    torch.compile = lambda plain, **how: plain
    torch.cuda.mem_get_info = lambda *args: (SIZE - meter["now"], SIZE)
    pretended = torch.device("cuda", 0)
    torch.Tensor.device = property(lambda t: pretended if place_of(t) == "cuda" else real_device(t))
    torch.Tensor.is_cuda = property(lambda t: place_of(t) == "cuda")
    torch.Tensor.to, torch.Tensor.numpy, torch.tensor = to, host_only, tensor
    torch.Tensor.cpu = lambda t: to(t, "cpu")
    torch.Tensor.tolist = tolist
    real_generator, real_bias = torch.Generator, bias.causal_lower_right
    torch.Generator = lambda device="cpu": real_generator()

    def causal_lower_right(*sizes):
        with _disable_current_modes():
            return real_bias(*sizes)

    def pad_sequence(rows, batch_first):  # torch's own makes its zeros in C++, without a place
        longest = max(map(len, rows))
        return torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])

    bias.causal_lower_right, logprobs.pad_sequence = causal_lower_right, pad_sequence


if __name__ == "__main__":
    install()
    sys.argv = [os.path.abspath(sys.argv[1]), *sys.argv[2:]]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    code = 0
    with Pretend():
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as e:
            code = e.code
    for place, count in (+WAITS).most_common():
        print(f"waited {count:5d} times at {place}", file=sys.stderr)
    sys.exit(code)
