"""What only a real GPU can show: its kernels give a CPU's numbers, in single steps and whole runs.

    CUDA_VISIBLE_DEVICES=0 python -m pytest -q tests -k gpu
"""

import shutil

import pytest
import torch

import train
from allo_mini.checkpoint import save_model
from allo_mini.data.encoder import Example
from allo_mini.generate import sample
from allo_mini.logprobs import score
from allo_mini.run.device import pick_device
from helpers import last_step, random_ids, tiny_model
from runs import steps_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = {"hidden_size": 256, "intermediate_size": 384}  # heads of 64
SMALL = "--limit 12 --n 4 --max-new-tokens 70 --seed 7 --no-eval --method allo".split()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype, most, change", [("fp32", 1e-4, 0.02), ("bf16", 0.05, 0.5)])
def test_a_step_on_a_gpu_is_a_cpus(dtype, most, change, int8, tmp_path):
    """Adam's first step has the gradient's signs, of which rounding turns the smallest."""
    save_model(tiny_model(std=0.05, **WIDE), tmp_path / "model")
    expected = last_step(tmp_path / "model", "cpu", "fp32", int8)
    pick_device("cuda", dtype)
    for recompute in (False, True):
        found = last_step(tmp_path / "model", "cuda", dtype, int8, recompute)
        apart = [(a - b).norm() / b.norm() for a, b in zip(found, expected)]
        assert apart[0] < most / 5 and apart[1] < most and apart[2] < change


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_sampling_on_a_gpu_takes_what_training_finds_probable(dtype, most):
    """Greedy answers: each token is the most probable one, or as probable as rounding allows."""
    model = tiny_model(std=0.05, trainable=False, **WIDE).to("cuda", dtype)
    prompts = [random_ids(n, n) for n in (3, 60, 20)]
    answers = sample(model, prompts, 1, 12, temperature=0.0)
    rows = [Example(prompt, answer) for prompt, answer in zip(prompts, answers)]
    for row, [logps] in zip(rows, score(model, rows)):
        ids = torch.tensor([row.prompt + row.responses[0]], device="cuda")
        logits = model.logits(ids)[0, len(row.prompt) - 1:-1].float()
        assert (logits.log_softmax(-1).amax(-1).cpu() - logps).max() < most


def test_a_run_on_a_gpu_is_a_cpus(tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        if device == "cuda":
            shutil.copy(tmp_path / "cpu/samples.jsonl", tmp_path / device)
        argv = ["--device", device, "--dtype", "fp32", "--out", str(tmp_path / device), *SMALL]
        assert train.main(argv) == 0
        losses.append([row["loss"] for row in steps_of(tmp_path / device)])
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=1e-4)


@pytest.mark.parametrize("flags", [
    "--memory 12gb --eval-every 1 --max-steps 3",
    "--int8 --offload --state-bits 8 --sft --p-sft 10 --locate gradient --recompute --max-steps 3"])
def test_settings_for_small_cards_train_on_a_gpu(flags, tmp_path, capsys):
    out = ["--device", "cuda", "--out", str(tmp_path / "run")]
    assert train.main([*out, *SMALL, *flags.split()]) == 0
    said = capsys.readouterr().out
    assert "improve: first loss 0.693147" in said and "do not agree" not in said
