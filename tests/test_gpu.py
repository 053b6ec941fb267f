"""What only a real GPU can show: its kernels give a CPU's numbers, through single steps and through whole runs.

    CUDA_VISIBLE_DEVICES=0 python -m pytest -q tests -k gpu
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from allo_mini.checkpoint import load_model, save_model
from allo_mini.data import Example
from allo_mini.device import pick_device
from allo_mini.generate import sample
from allo_mini.logprobs import pack, score, token_logps
from allo_mini.optim import MaskedAdamW
from helpers import random_ids, tiny_model
from test_cuda_paths import ROOT, RUNS, SMALL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 64
EXAMPLES = [Example(random_ids(n, n), [random_ids(n + 9, n + 1), random_ids(n + 30, n + 2)]) for n in (5, 40, 17)]


def mask_of(model) -> dict:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in model.named_parameters()}


def one_step(model, mask, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probs [S], flat gradient, what a step changes) of a loss over all response tokens, on the CPU, fp32."""
    optimizer, batch = MaskedAdamW(model.named_parameters(), mask, 1e-3), pack(EXAMPLES, device)
    logps = token_logps(model, batch)
    (logps * torch.linspace(-1, 1, len(logps), device=device)).sum().backward()
    gradient = optimizer.grad.to("cpu", copy=True)  # which a step empties
    optimizer.clip(1.0)
    optimizer.step()
    return logps.detach().float().cpu(), gradient, optimizer.master.cpu() - optimizer.start


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of the difference, of the length of b."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_step_on_a_gpu_is_a_cpus(dtype, most, blocks):
    """bf16 goes through the kernel for streams of any lengths, fp32 through one call a part."""
    model = tiny_model(std=0.05, trainable=False, **WIDE).to(dtype)
    there = copy.deepcopy(model).to("cuda")
    there.checkpoint_blocks = blocks
    expected = one_step(model.float(), mask_of(model), "cpu")
    found = one_step(there, mask_of(model), "cuda")
    assert apart(found[0], expected[0]) < most / 5 and apart(found[1], expected[1]) < most
    assert apart(found[2], expected[2]) < (0.02 if dtype == torch.float32 else 0.5)  # Adam's first step: signs


@pytest.mark.parametrize("dtype, most, stream", [("fp32", 1e-4, False), ("bf16", 0.05, False), ("bf16", 0.05, True)])
def test_int8_weights_on_a_gpu_are_a_cpus(dtype, most, stream, tmp_path):
    save_model(tiny_model(std=0.05, **WIDE), tmp_path / "model")
    mask = mask_of(tiny_model(**WIDE))
    expected = one_step(load_model(tmp_path / "model", "fp32", "cpu", int8=True, mask=mask), mask, "cpu")
    there = load_model(tmp_path / "model", dtype, "cuda", int8=True, mask=mask, stream=stream)
    assert all(codes.is_cuda != stream for p in there.parameters() if hasattr(p, "int8") for codes, _ in p.int8.parts)
    found = one_step(there, mask, "cuda")
    assert apart(found[0], expected[0]) < most / 5 and apart(found[1], expected[1]) < most


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_sampling_on_a_gpu_takes_tokens_by_the_probabilities_that_training_sees(dtype, most):
    """Greedy answers, scored by token_logps: each token is the most probable one, or as probable as rounding allows."""
    model = tiny_model(std=0.05, trainable=False, **WIDE).to("cuda", dtype)
    prompts = [random_ids(n, n) for n in (3, 60, 20)]
    answers = [answer for [answer] in sample(model, prompts, 1, 12, temperature=0.0)]
    rows = [Example(prompt, [answer]) for prompt, answer in zip(prompts, answers)]
    for row, [logps] in zip(rows, score(model, rows)):
        ids = torch.tensor([row.prompt + row.responses[0]], device="cuda")
        best = model.logits(ids).float().log_softmax(-1)[0, len(row.prompt) - 1:-1].amax(-1).cpu()
        assert (best - logps).max() < most


@pytest.fixture(autouse=True)
def as_runs_have_it():
    pick_device("cuda", "auto")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """name -> (run folder, what it printed) of the runs of test_cuda_paths.py, on the real thing."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, (device, flags) in RUNS.items():
        command = [sys.executable, "train.py", "--device", device, "--out", str(folder / name), *SMALL, *flags]
        if name == "plain":
            command += ["--samples", str(folder / "cpu" / "samples.jsonl")]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300, env=dict(os.environ))
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        found[name] = folder / name, done.stdout
    return found


def test_a_run_on_a_gpu_is_a_cpus(runs):
    losses = [[(row["stage"], row["loss"]) for row in map(json.loads, (runs[name][0] / "metrics.jsonl").read_text().splitlines())
               if "step" in row] for name in ("cpu", "plain")]
    assert len(losses[0]) == len(losses[1]) > 5
    for (stage, loss), (same, other) in zip(*losses):
        assert stage == same and other == pytest.approx(loss, rel=0.05, abs=1e-4), (stage, losses)


@pytest.mark.parametrize("name", ["lean", "card"])
def test_settings_for_small_cards_train_on_a_gpu(runs, name):
    folder, out = runs[name]
    assert "improve: first loss 0.693147" in out and "do not agree" not in out
    assert (folder / "improve" / "model.safetensors").exists()
