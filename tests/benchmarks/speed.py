"""Speed of training, of sampling and of the optimizer, with random weights of a known shape.

all.py runs what stands here. A training step is the improving stage's (p % of the weights) on
random pairs of two sequences of `length` tokens, a quarter of which is their common prompt.
*Physical* tokens are those the model reads: the prompt once a pair. *Logical* ones count it for
each response, as trainers do that read it twice. MFU: 6 x weights in matrix products x physical
tokens/s (recomputing does not count) over the bf16 FLOP/s of the data sheet; "of GEMM" over a large
matrix product's, measured in the same run.
"""

import tempfile
from pathlib import Path
from statistics import median

import torch
from common import (DTYPES, SHAPES, device_name, meta_of, peaks, random_mask, random_model,
                    random_pairs, random_run, timed, train_steps)

from allo_mini.data.encoder import Example
from allo_mini.generate import sample
from allo_mini.logprobs import size_of
from allo_mini.masked_adamw import MaskedAdamW
from allo_mini.objectives import dpo_objective

# Dense bf16 FLOP/s on the vendors' data sheets, by the beginning of the device's name.
PEAK_FLOPS = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
              "NVIDIA GH200": 989e12, "NVIDIA A100": 312e12}


def gemm_rate(device: str, dtype: str, size: int) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    out = torch.empty_like(a)
    return 2 * size**3 / min(timed(lambda: torch.matmul(a, b, out=out), device, 10))


def multiplied(name: str) -> int:
    """Weights in a matrix product for every token: all matrices but an untied embedding."""
    tied = SHAPES[name]["tie_word_embeddings"]
    return sum(p.numel() for key, p in meta_of(name).named_parameters()
               if p.dim() == 2 and (tied or "embed_tokens" not in key))


def training(a, shape: str, recompute: bool) -> dict:
    """Improving steps of a.micros micro-batches of about a.tokens physical tokens."""
    vocab, device = SHAPES[shape]["vocab_size"], a.device
    size = size_of(random_pairs(1, a.length, vocab)[0])
    each = max(1, a.tokens // size)  # pairs of a micro-batch
    step = [Example(*pair) for pair in random_pairs(each * a.micros, a.length, vocab)]
    settings = {"lr_improve": 1e-9, "batch": len(step), "micro_tokens": each * size,
                "schedules": {"improve": {"epochs": a.repeat + 1}}, "recompute": recompute}
    with tempfile.TemporaryDirectory() as place:
        run = random_run(shape, settings, device, a.dtype, Path(place))
        train_steps(run, "improve", step, dpo_objective(0.1, 0.1), a.p)
    seconds = median(run.log.seconds(1))
    physical, prompts = size * len(step), sum(len(example.prompt) for example in step)
    flops, found = 6 * multiplied(shape) * physical / seconds, peaks(device)
    sheet = [PEAK_FLOPS[key] for key in PEAK_FLOPS if device_name(device).startswith(key)]
    gemm = gemm_rate(device, a.dtype, a.gemm)
    return {"physical_per_s": physical / seconds, "mfu": flops / sheet[0] if sheet else None,
            "of_gemm": flops / gemm, "gemm_flops": gemm, "micro_tokens": each * size,
            "logical_per_s": (physical + prompts) / seconds, "seconds": seconds, **found}


def generation(a, shape: str, int8: bool) -> dict:
    """New tokens/s, prompts read included: a.n responses to each of a.prompts random prompts."""
    model = random_model(shape, DTYPES[a.dtype], a.device, int8)
    vocab, size = model.config.vocab_size, a.length // 4
    prompts = [prompt for prompt, _ in random_pairs(a.prompts, size + 1, vocab, size)]

    def run():  # random weights spread their probability: cold, a nucleus is as narrow as trained
        sample(model, prompts, a.n, a.new_tokens, temperature=0.05, top_p=0.95,
               slots=a.prompts * a.n)

    seconds = median(timed(run, a.device, 1))
    new = a.prompts * a.n * a.new_tokens
    return {"tokens_per_s": new / seconds, "new_tokens": new, "seconds": seconds,
            **peaks(a.device)}


def optimizer_step(a, shape: str) -> dict:
    """A step of AdamW over a.p % of the weights, written back into the model."""
    model = random_model(shape, DTYPES[a.dtype], a.device)
    mask = random_mask({name: p.shape for name, p in model.named_parameters()}, a.p, a.device)
    optimizer = MaskedAdamW(model.named_parameters(), mask, 1e-9)
    optimizer.grad.normal_()
    seconds = median(timed(optimizer.step, a.device, 5))
    return {"seconds": seconds, "weights": len(optimizer.master), **peaks(a.device)}
