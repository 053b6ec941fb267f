"""What the benchmarks share: random models of well-known shapes, training on them, the table.

Peaks are the allocator's on CUDA; on a CPU (Linux) they are the process's resident memory, so each
measurement runs in a process of its own (`fresh_process`).
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import date
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import train  # noqa: E402
from allo_mini import UserError  # noqa: E402, F401
from allo_mini.linear import is_quantized, to_int8  # noqa: E402
from allo_mini.mask import Selected  # noqa: E402
from allo_mini.model import FAMILIES, CausalLM, build, parse_config  # noqa: E402
from allo_mini.run.config import parse  # noqa: E402
from allo_mini.run.device import DTYPES, pick_device  # noqa: E402
from allo_mini.run.files import write_json  # noqa: E402
from allo_mini.run.folder import Policy, Run  # noqa: E402
from allo_mini.run.log import exit_code, table  # noqa: E402, F401
from helpers import random_ids  # noqa: E402


def shape(family: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int,
          tied: bool = False, theta: float = 10000.0) -> dict:
    """A model's config.json; EOS is the demo tokenizer's."""
    return {"architectures": [family], "model_type": FAMILIES[family], "vocab_size": vocab,
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied, "rope_theta": theta, "max_position_embeddings": 8192,
            "eos_token_id": 1}


LLAMA, QWEN = "LlamaForCausalLM", "Qwen2ForCausalLM"
SHAPES = {  # as in each model's published config.json
    "tiny": shape(LLAMA, 512, 64, 160, 2, 4, 2),
    "smollm2-135m": shape(LLAMA, 49152, 576, 1536, 30, 9, 3, tied=True, theta=1e5),
    "llama-3.2-1b": shape(LLAMA, 128256, 2048, 8192, 16, 32, 8, tied=True, theta=5e5),
    "llama-2-7b": shape(LLAMA, 32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": shape(LLAMA, 128256, 4096, 14336, 32, 32, 8, theta=5e5),
    "qwen2.5-7b": shape(QWEN, 152064, 3584, 18944, 28, 28, 4, theta=1e6)}


def device_name(device: str) -> str:
    """The card's name, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{[*models, platform.machine()][0]}, {os.cpu_count()} cores"


def finish(device: str, header: list[str], rows: list[list], notes: list[str] = ()) -> None:
    """Print where this was measured, the table and the notes."""
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{date.today()}\n")
    cells = [list(map(str, row)) for row in rows]
    print("\n".join([table(header, cells), "", *notes]), flush=True)


def meta_of(name: str) -> CausalLM:
    """A model of a shape in SHAPES without weights."""
    with torch.device("meta"):
        return build(parse_config(SHAPES[name])).requires_grad_(False)


def random_mask(shapes: dict[str, torch.Size], percent: float, device: str) -> dict:
    """About `percent` of every tensor's weights, at random."""
    generator, mask = torch.Generator(device).manual_seed(0), {}
    for name, size in shapes.items():
        numbers = torch.rand(size, generator=generator, device=device)
        mask[name] = Selected.from_dense(numbers < percent / 100)
    return mask


def random_model(name: str, dtype: torch.dtype, device: str, int8=False, mask=None) -> CausalLM:
    """A model of a shape in SHAPES with normal(0, 0.02) weights, made where it is going to stand;
    int8, mask: as checkpoint.load_model."""
    model, generator, state = meta_of(name), torch.Generator(device).manual_seed(0), {}
    for key, p in model.named_parameters():
        p = torch.nn.Parameter(torch.zeros_like(p, dtype=dtype, device=device), requires_grad=False)
        if p.dim() == 2:
            p.normal_(0, 0.02, generator=generator)
        elif not key.endswith("bias"):
            p.fill_(1.0)
        if int8 and is_quantized(key, p.shape):
            p = to_int8(p, mask and mask[key], device)
        state[key] = p
    model.load_state_dict(state, assign=True)
    return model


def random_pairs(count: int, tokens: int, vocab: int, prompt: int = 0) -> list[tuple]:
    """[(prompt, [y+, y-])]: two sequences of `tokens` tokens, of which `prompt` (0: a quarter)."""
    prompt, pairs = prompt or tokens // 4, []
    for i in range(count):
        responses = [random_ids(tokens - prompt, 3 * i + k, vocab) for k in (1, 2)]
        pairs.append((random_ids(prompt, 3 * i, vocab), responses))
    return pairs


@dataclass
class Clock:
    """Stands in for a run's log: keeps what is logged of every step, and when."""
    device: str
    at: list[float] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)

    def write(self, stage: str = "", **values) -> None:
        """A line of the log: a step has ended."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        self.at.append(time.perf_counter())
        self.rows.append(values)

    def seconds(self, warm: int) -> list[float]:
        """Of each step after the first `warm`."""
        return [self.at[i] - self.at[i - 1] for i in range(warm, len(self.at))]


@dataclass
class RandomRun(Run):
    """A run whose policy is a random model of a shape in SHAPES, and which keeps only a clock."""
    name: str = ""

    def load(self, policy: Policy, mask=None, training: bool = False) -> CausalLM:
        int8 = self.cfg.int8 and not (training and mask is None)
        model = random_model(self.name, self.dtype, self.device, int8, mask)
        model.recompute = self.cfg.recompute
        if self.device.startswith("cuda"):  # a folder is read by pieces
            torch.cuda.reset_peak_memory_stats(self.device)
        return model


def random_run(name: str, settings: dict, device: str, dtype: str, folder: Path) -> RandomRun:
    """One with these settings."""
    write_json(folder / "settings.json", {"model": "x", "pairs": ["x"], **settings})
    cfg = parse(["--config", str(folder / "settings.json")])
    pick_device(device, dtype)  # what train.py sets for a device
    model = meta_of(name)
    shapes = {key: p.shape for key, p in model.named_parameters()}
    return RandomRun(cfg, folder, Policy(folder), device, DTYPES[dtype], model.config, shapes, None,
                     [], [], [], [], Clock(device), name=name)


def train_steps(run: Run, stage: str, examples: list, objective, percent: float):
    """Train random `percent` of the weights by train.py's own loop; returns the optimizer."""
    mask = random_mask(run.shapes, percent, run.device) if percent < 100 else None
    return train.optimize(run, stage, run.base, examples, objective, mask)[1]


def timed(run: Callable, device: str, repeat: int) -> list[float]:
    """Seconds of each of `repeat` calls, after one that is not counted."""
    clock = Clock(device)
    for _ in range(repeat + 1):
        run()
        clock.write()
    return clock.seconds(1)


def peaks(device: str) -> dict[str, int]:
    """This process's peaks: allocated and reserved on the card, or twice the resident one."""
    if device.startswith("cuda"):
        return {"peak_bytes": torch.cuda.max_memory_allocated(device),
                "reserved_bytes": torch.cuda.max_memory_reserved(device)}
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return dict.fromkeys(("peak_bytes", "reserved_bytes"), 1024 * int(peak))


def quietly(function: Callable, *args):
    """function(...) without what it prints; None when memory runs out."""
    try:
        with redirect_stdout(StringIO()):
            return function(*args)
    except torch.OutOfMemoryError:
        return None


def fresh_process(function: Callable, *args):
    """quietly(function, ...) in a new process, so that its memory is its own."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                   "TRANSFORMERS_VERBOSITY": "error"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(quietly, function, *args).result()
