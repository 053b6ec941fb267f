"""A pretended GPU, so that machines without one run the lines that are for CUDA: `python tests/pretend_cuda.py SCRIPT ...`

Every tensor's memory remembers a device, "cuda" or "cpu"; everything is computed on the CPU. An operation whose tensors
are on different devices fails, as it would on a GPU, and so do numpy() of a GPU's tensor, and a copy to the host that
nobody waits for. At the end each place of our code that waited for the GPU is printed with how often it did.

Peak memory is the most bytes that the GPU's tensors held at one time. What it cannot show: speed, what kernels take for
themselves, fragments, rounding, and kernels that differ (attention on a GPU has others; varlen_attn is a plain twin).
"""

import os
import runpy
import sys
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.autograd.function import BackwardCFunction  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from meter import Meter  # noqa: E402

REAL = {name: getattr(torch.Tensor, name) for name in ("to", "numpy", "tolist")}
real_device, real_tensor = torch._C.TensorBase.device.__get__, torch.tensor
WAITS = Counter()  # place in our code -> how often the host waited there for the GPU
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}
MOVES = {"copy_", "_to_copy"}
INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_"}  # their positions may stand on the host
METER = Meter()
moving = []  # where the tensor that `to` is moving goes


def put(storage, place: str) -> None:
    """Remember where a tensor's memory is; the GPU's is metered."""
    storage.place = place
    if place == "cuda":
        METER.take_in(storage)


def forget_peak(*_) -> None:
    METER.peak = METER.live


def place_of(t) -> str:
    """"cuda" or "cpu" (or "meta"); "any": made inside autograd's C++, on the device of whatever it meets."""
    kind = real_device(t).type
    return getattr(t.untyped_storage(), "place", "cpu") if kind == "cpu" else kind


def line() -> str:
    """The line of our code that is at work."""
    ours = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT))
            and not {"tests", "site-packages"} & {*Path(f.filename).relative_to(ROOT).parts}]
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"


class Pretend(TorchDispatchMode):
    """Sees every operation: checks the places of its tensors, remembers those of what it makes."""

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
        kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = self.checked(name, tensors, args)
        node = torch._C._current_autograd_node()
        if asked == "cpu" and node is not None and not isinstance(node, BackwardCFunction):
            asked = "any"
        place = moving[-1] if moving and name in ("_to_copy", "clone") else asked or there
        made = func(*args, **kwargs)
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and real_device(t).type == "cpu" and not hasattr(t.untyped_storage(), "place"):
                put(t.untyped_storage(), place)
        return made

    def checked(self, name: str, tensors: list, args) -> str:
        """Where an operation computes. Raises RuntimeError when its tensors disagree."""
        places = [place_of(t) for t in tensors]
        on_gpu = "cuda" in places
        for i, t in enumerate(tensors):
            if places[i] == "any" and {"cuda", "cpu"} & {*places}:
                places[i] = "cuda" if on_gpu else "cpu"
                put(t.untyped_storage(), places[i])
        if on_gpu and {*places} != {"cuda"} and name not in MOVES and not (name in INDEXED and places[0] == "cuda"):
            strict = "fused" in name or "foreach" in name  # elsewhere a number may stand on the host
            if any(place != "cuda" and (strict or t.dim()) for t, place in zip(tensors, places)):
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
    args = (args[0].device, args[0].dtype) if args and isinstance(args[0], torch.Tensor) else args
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


def numpy(self, *args, **kwargs):
    if place_of(self) == "cuda":
        raise TypeError(f"numpy() at {line()}: of a tensor on the GPU")
    return REAL["numpy"](self, *args, **kwargs)


def tolist(self):
    WAITS[f"{line()} tolist"] += place_of(self) == "cuda"
    return REAL["tolist"](self)


def tensor(data, *args, device=None, **kwargs):
    made = real_tensor(data, *args, **kwargs)
    return made if device is None else to(made, device)


def varlen_attn(q, k, v, q_starts, k_starts, longest_q, longest_k, *, window_size, enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn, a part at a time; causal from the lower right."""
    q_sizes, k_sizes = (REAL["tolist"](starts.diff()) for starts in (q_starts, k_starts))
    assert q_starts.is_cuda and k_starts.is_cuda and window_size == (-1, 0)
    assert max(q_sizes) == longest_q and max(k_sizes) == longest_k
    out = []
    for one, keys, values in zip(q.split(q_sizes), k.split(k_sizes), v.split(k_sizes)):
        seen = torch.ones(len(one), len(keys), dtype=torch.bool, device=q.device).tril(len(keys) - len(one))
        one, keys, values = (x.transpose(0, 1)[None] for x in (one, keys, values))
        out.append(F.scaled_dot_product_attention(one, keys, values, seen, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(out)


def install() -> None:
    """Let torch look as if it had one GPU of 80 GB."""
    import torch.nn.attention.bias as bias
    import torch.nn.attention.varlen as varlen

    from allo_mini import logprobs
    nothing, peak = (lambda *args: None), (lambda *args: METER.peak)
    for name, value in {
            "_lazy_init": nothing, "empty_cache": nothing, "reset_peak_memory_stats": forget_peak, "synchronize": nothing,
            "set_per_process_memory_fraction": nothing, "is_available": lambda: True, "device_count": lambda: 1,
            "current_device": lambda: 0, "mem_get_info": lambda *args: ((80 << 30) - METER.live, 80 << 30),
            "memory_allocated": lambda *args: METER.live, "memory_reserved": lambda *args: METER.live,
            "max_memory_allocated": peak, "max_memory_reserved": peak,
            "get_device_capability": lambda *args: (9, 0), "is_bf16_supported": lambda **kind: True,
            "get_device_name": lambda *args: "a pretended GPU", "memory_stats": lambda *args: defaultdict(int),
            "get_device_properties": lambda *args: SimpleNamespace(total_memory=80 << 30)}.items():
        setattr(torch.cuda, name, value)
    pretended = torch.device("cuda", 0)
    torch.Tensor.device = property(lambda self: pretended if place_of(self) == "cuda" else real_device(self))
    torch.Tensor.is_cuda = property(lambda self: place_of(self) == "cuda")
    torch.Tensor.to, torch.Tensor.numpy, torch.tensor = to, numpy, tensor
    torch.Tensor.cpu = lambda self: to(self, "cpu")
    torch.Tensor.tolist = tolist
    real_generator, real_bias = torch.Generator, bias.causal_lower_right
    torch.Generator = lambda device="cpu": real_generator()

    def causal_lower_right(*sizes):
        with _disable_current_modes():
            return real_bias(*sizes)
    bias.causal_lower_right, varlen.varlen_attn = causal_lower_right, varlen_attn
    # torch's own makes its zeros in C++, which knows nothing of places
    logprobs.pad_sequence = lambda rows, batch_first: torch.stack(
        [F.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    code = 0
    with Pretend():
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as e:
            code = e.code
    for place, count in (+WAITS).most_common():
        print(f"waited {count:5d} times at {place}", file=sys.stderr)
    sys.exit(code)
