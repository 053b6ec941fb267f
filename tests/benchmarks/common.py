"""What the benchmarks share: random models of well-known shapes, random masks, clocks, memory peaks, the JSON file.

Every benchmark prints a table and, with --json FILE, writes

    {"benchmark", "command", "date", "torch", "python", "device", "dtype", "threads", "args": {...}, ...its own keys}

with figures as numbers in plain units (seconds, bytes, FLOP/s). Peaks are the allocator's on CUDA; on a CPU they are
the process's resident memory, so whatever is compared there runs in a process of its own (`fresh_process`).
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from allo_mini import UserError, demo  # noqa: E402
from allo_mini.architecture import FAMILIES, parse_config  # noqa: E402
from allo_mini.checkpoint import save_model  # noqa: E402
from allo_mini.device import DTYPES, pick_device  # noqa: E402
from allo_mini.linear import is_quantized, slow_bf16, to_int8  # noqa: E402
from allo_mini.log import table  # noqa: E402
from allo_mini.model import CausalLM  # noqa: E402
from allo_mini.tokenizer import Tokenizer  # noqa: E402


def shape(family, vocab, hidden, inner, layers, heads, kv_heads, tied=False, theta=10000.0, length=8192):
    return {"architectures": [family], "model_type": FAMILIES[family], "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied, "rope_theta": theta, "rms_norm_eps": 1e-5, "max_position_embeddings": length,
            "eos_token_id": 2}


LLAMA, QWEN = "LlamaForCausalLM", "Qwen2ForCausalLM"
SHAPES = {  # as in each model's published config.json
    "tiny": shape(LLAMA, 512, 64, 160, 2, 4, 2),
    "smollm2-135m": shape(LLAMA, 49152, 576, 1536, 30, 9, 3, tied=True, theta=1e5),
    "llama-3.2-1b": shape(LLAMA, 128256, 2048, 8192, 16, 32, 8, tied=True, theta=5e5),
    "llama-2-7b": shape(LLAMA, 32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": shape(LLAMA, 128256, 4096, 14336, 32, 32, 8, theta=5e5),
    "qwen2.5-7b": shape(QWEN, 152064, 3584, 18944, 28, 28, 4, theta=1e6)}

# Dense bf16 FLOP/s on the vendor's data sheets (tensor cores, no sparsity), by the beginning of the device's name.
PEAK_FLOPS = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA GH200": 989e12,
              "NVIDIA A100": 312e12}


# ---- command line and result file --------------------------------------------------------------------------

def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cuda, cpu or cuda:1 (default: the best there is)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


def start(args, dtype: str = "auto") -> str:
    """Resolve args.device (and args.dtype, where there is one) to what is there; returns the device."""
    args.device, kind = pick_device(args.device, getattr(args, "dtype", dtype))
    if hasattr(args, "dtype"):
        args.dtype = {v: k for k, v in DTYPES.items()}[kind]
    if args.json and Path(args.json).exists():
        raise UserError(f"{args.json}: exists already; nothing is overwritten")
    return args.device


def device_name(device: str) -> str:
    """The card's name, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def finish(args, header: list[str], rows: list[list], notes: list[str] = (), **figures) -> dict:
    """Print the table and the notes; write the JSON file if one was asked for. Returns what was written."""
    result = {"benchmark": Path(sys.argv[0]).stem, "command": " ".join(["python", *sys.argv]), "date": str(date.today()),
              "torch": torch.__version__, "python": platform.python_version(), "device": device_name(args.device),
              "dtype": getattr(args, "dtype", None), "threads": torch.get_num_threads(), "args": vars(args), **figures}
    print(f"{result['device']}, torch {result['torch']}, {result['threads']} threads, {result['date']}\n")
    print("\n".join([table(header, rows), "", *notes]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def guarded(main: Callable) -> int:
    """Run a benchmark's main(); a user's mistake becomes one line and exit code 2, as in train.py."""
    try:
        main()
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


# ---- models and masks --------------------------------------------------------------------------------------

class RandomMask(Mapping):
    """`percent` of every tensor's weights, drawn anew when asked for: whole, a 7B model's mask would be 7 GB of bool."""

    def __init__(self, shapes: dict[str, torch.Size], percent: float, device: str = "cpu", seed: int = 0):
        self.shapes, self.share, self.device, self.seed = shapes, percent / 100, device, seed

    def __getitem__(self, name: str) -> Tensor:
        number = list(self.shapes).index(name)
        generator = torch.Generator(self.device).manual_seed(1_000_003 * self.seed + number)
        chosen = torch.empty(self.shapes[name], dtype=torch.bool, device=self.device)
        return chosen.bernoulli_(self.share, generator=generator)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(name: str) -> dict[str, torch.Size]:
    """Parameter name -> shape of a model in SHAPES."""
    with torch.device("meta"):
        model = CausalLM(parse_config(SHAPES[name]))
    return {n: p.shape for n, p in model.named_parameters()}


def random_model(name: str, dtype: torch.dtype, device: str, int8: bool = False, mask=None, stream: bool = False,
                 seed: int = 0) -> CausalLM:
    """A model of a shape in SHAPES with normal(0, 0.02) weights, made tensor by tensor where it is going to stand.

    int8, mask, stream: as checkpoint.load_model.
    """
    with torch.device("meta"):
        model = CausalLM(parse_config(SHAPES[name])).requires_grad_(False)
    generator, state, beside = torch.Generator(device).manual_seed(seed), {}, {}
    for key, p in model.named_parameters():
        w = torch.empty(p.shape, dtype=dtype, device=device)
        w = w.normal_(0, 0.02, generator=generator) if w.dim() == 2 else w.fill_(0.0 if key.endswith("bias") else 1.0)
        if int8 and is_quantized(key, w.shape):
            w, beside[key] = to_int8(w, mask and mask[key], device, stream)
        state[key] = w
    model.load_state_dict(state, strict=True, assign=True)
    for key, extra in beside.items():
        model.get_parameter(key).int8 = extra
    return model.requires_grad_(False)


def random_folder(name: str, dtype: torch.dtype, folder: Path) -> Path:
    """A model folder of a shape in SHAPES, with random weights and the demo's tokenizer."""
    model = random_model(name, dtype, "cpu")
    model.folder = demo.FOLDER  # from where the tokenizer files come
    model.config = replace(model.config, raw=model.config.raw | {"eos_token_id": Tokenizer(demo.FOLDER).eos_id})
    save_model(model, folder)
    return folder


def matmul_parameters(shapes: dict[str, torch.Size], tied: bool) -> int:
    """Weights that take part in a matrix product for every token: all matrices but an untied embedding."""
    return sum(s.numel() for n, s in shapes.items() if len(s) == 2 and (tied or "embed_tokens" not in n))


def random_pairs(count: int, tokens: int, vocab: int, prompt_share: float = 0.25, seed: int = 0) -> list:
    """Pairs of two sequences of `tokens` tokens each, a share of which is their common prompt: [(prompt, [y+, y-])]."""
    generator, p = torch.Generator().manual_seed(seed), max(1, round(tokens * prompt_share))

    def draw(n):
        return torch.randint(3, vocab, (n,), generator=generator).tolist()
    return [(draw(p), [draw(tokens - p), draw(tokens - p)]) for _ in range(count)]


# ---- time --------------------------------------------------------------------------------------------------

def wait(device: str) -> None:
    """Until the device has done all it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(run: Callable, device: str, repeat: int = 5, warm: int = 2, before: Callable = lambda: None) -> list[float]:
    """Seconds of each of `repeat` calls, after `warm` calls that are not counted; `before` each call is not timed."""
    seconds = []
    for i in range(warm + repeat):
        before()
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        if i >= warm:
            seconds.append(time.perf_counter() - began)
    return seconds


def median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def gemm_rate(device: str, dtype: torch.dtype, size: int = 0) -> float:
    """FLOP/s of a large square matrix product, the best of several; on a CPU without bf16 units in fp32, as linear.py."""
    size = size or (8192 if device.startswith("cuda") else 1536)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    if slow_bf16(a):
        a, b = a.float(), b.float()
    out = torch.empty_like(a)
    return 2 * size**3 / min(timed(lambda: torch.matmul(a, b, out=out), device, repeat=10, warm=3))


def copy_rate(device: str, size: int = 0) -> float:
    """Bytes/s read plus written by a large copy, the best of several: the roofline of whatever only moves bytes."""
    size = size or (1 << 30 if device.startswith("cuda") else 1 << 28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(timed(lambda: target.copy_(source), device, repeat=10, warm=3))


def peak_flops(device: str) -> float | None:
    """The device's data-sheet bf16 FLOP/s, if we know it."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((v for k, v in PEAK_FLOPS.items() if name.startswith(k)), None)


# ---- memory ------------------------------------------------------------------------------------------------

def status_bytes(key: str) -> int:
    """VmHWM (highest resident memory so far) or VmRSS (resident now) of this process; Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise UserError("memory peaks on a CPU are read from /proc, which this system lacks: use Linux, or CUDA") from None
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(key + ":"))


def memory_now(device: str) -> int:
    """Bytes held now: allocated on the card, or resident of this process."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else status_bytes("VmRSS")


def reset_peak(device: str) -> None:
    """Measure peaks from here on. (Where /proc does not allow it, peaks on a CPU count from the process's start.)"""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory(device: str) -> dict[str, int]:
    """{"allocated", "reserved"}: peaks since reset_peak (CUDA), or twice the resident peak (CPU)."""
    if device.startswith("cuda"):
        return {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return dict.fromkeys(("allocated", "reserved"), status_bytes("VmHWM"))


def fresh_process(function: Callable, *args, **kwargs):
    """function(...) of a benchmark file in a new process, so that its memory is its own. Returns its result.

    Raises UserError when the process dies, as it does when the system runs out of memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise UserError(f"{function.__name__}: its process died, most likely out of memory; "
                            "choose a smaller --shape or fewer tokens") from None


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def number(value: float, digits: int = 3) -> str:
    """1234567.8 -> '1.23e+06', 12.34 -> '12.3', NaN -> '-'."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}g}"
