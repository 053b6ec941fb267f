"""Location of neurons: how much the loss's gradient asks of every weight, and the masks made from that.

A 7B model's importance is 27 GB of fp32. It is made a group of tensors at a time, as many as the memory allows, lies in
a memory-mapped file of the run folder, and is ranked from there in exact passes (mask.py), without ever being rounded.
"""

from pathlib import Path

import torch
from torch import Tensor

from allo_mini.data import Example
from allo_mini.disk import reserve
from allo_mini.files import load_mask, save_mask
from allo_mini.log import progress
from allo_mini.logprobs import by_response, pack, token_logps
from allo_mini.loop import Objective, or_halve, sft_objective
from allo_mini.mask import PackedMask, each_selected, pack_mask
from allo_mini.memory import tensor_groups
from allo_mini.optim import FlatGradient
from allo_mini.run import Run

COMPARE = 10**9  # weights; above, the gradients of two halves are not kept apart: they would double the file


def gradient_importance(run: Run, theta: Path, name: str, examples: list[Example], objective: Objective,
                        compare: bool = False) -> list[dict[str, Tensor]]:
    """sum_t dL/dtheta_i at theta = theta_ref; for L_DPO that is -(beta/2)(grad log pi(y+) - grad log pi(y-)).

    No reference pass is needed: the policy is its own. A group of tensors at a time is accumulated, in as many passes
    over the examples as that takes; what is done lies in a memory-mapped file. Returns the importance of all weights
    and, with `compare`, that of each half of the examples, whose masks' overlap says how noisy the location is.
    """
    model, at = run.load(theta), 0
    named, groups = dict(model.named_parameters()), tensor_groups(run.shapes, run.locate_groups())
    for i in range(1 + compare):
        reserve(importance_file(run, name, i), 4 * run.parameters)
    stores = [torch.from_file(str(importance_file(run, name, i)), shared=True, size=run.parameters)
              for i in range(1 + compare)]  # the gradient of all examples, and of the first half of them
    for number, names in enumerate(groups, 1):
        flat = FlatGradient(((n, named[n]) for n in names), host=run.cfg.offload == "gradient")

        def both_halves():
            with progress(total=len(examples), label=f"gradient {number}/{len(groups)}", unit="row") as bar:
                for half in (0, 1):
                    backward(run, model, examples[half::2], objective, bar)
                    if half or compare:
                        stores[half == 0][at:at + len(flat.grad)] = flat.grad
        or_halve(run, both_halves, flat.grad.zero_)
        at += len(flat.grad)
        flat.close()
    sizes = [shape.numel() for shape in run.shapes.values()]
    total, *first = [dict(zip(run.shapes, store.split(sizes))) for store in stores]
    every = [total, *first, *({n: total[n] - half[n] for n in half} for half in first)]
    return [{n: values.view(run.shapes[n]) for n, values in one.items()} for one in every]


def backward(run: Run, model, examples: list[Example], objective: Objective, bar) -> None:
    """Add the gradient of the examples' summed loss to where the model's gradients gather; theta is its own reference."""
    for micro in run.micro_batches(examples):
        batch = pack(micro, run.device)
        logps, real = by_response(token_logps(model, batch), batch.lengths)
        objective.loss(logps, logps.detach(), real, micro)[0].backward()
        bar.update(len(micro))


def importance_file(run: Run, name: str, i: int) -> Path:
    return run.folder / f".{name}-{i}.tmp"  # the next process clears it away


def forget_importance(run: Run, name: str) -> None:
    """Remove the memory-mapped files; the masks are made."""
    for i in (0, 1):
        importance_file(run, name, i).unlink(missing_ok=True)


def importance_mask(run: Run, importance: dict[str, Tensor], percent: float) -> PackedMask:
    """The exact top `percent`, counted on the run's device; for --mask-source bottom, what the top of the rest leaves."""
    if run.cfg.mask_source == "bottom" and percent < 100:
        return pack_mask((name, ~mask) for name, mask in each_selected(importance, 1 - percent / 100, run.device))
    return pack_mask(each_selected(importance, percent / 100, run.device))


def random_importance(run: Run) -> dict[str, Tensor]:
    """For --mask-source random: a number in [0, 1) for every weight, fixed by --seed."""
    generator = torch.Generator().manual_seed(run.cfg.seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in run.shapes.items()}


def located(run: Run, theta: Path, name: str, examples: list[Example]) -> PackedMask | None:
    """The weights that sft or the rewriting model train: all (None), or --p-sft % by the gradient of their own loss."""
    if not run.cfg.p_sft or run.cfg.p_sft == 100:
        return None
    with run.stage(f"{name}-locate", f"mask-{name}.safetensors") as target:
        if target:
            [gradient] = gradient_importance(run, theta, name, examples[:run.cfg.locate_pairs], sft_objective())
            save_mask(importance_mask(run, gradient, run.cfg.p_sft), target)
            forget_importance(run, name)
    return load_mask(run.folder / f"mask-{name}.safetensors", run.shapes)
