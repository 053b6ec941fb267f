"""Location of neurons: how much the loss's gradient asks of every weight, and the masks made from that.

    gradient   I_i = |sum_t g_ti|                        g_t: gradient of a few pairs' loss at theta_ref, t = 1 ... T
    snr        I_i = |sum_t g_ti| / sqrt(sum_t g_ti^2)   its signal-to-noise ratio (ours)

The first asks how large a weight's gradient is. But Adam divides by a running root mean square, so that a weight moves
far in the warm-up when its gradient points the same way every time, however small it is: the second.

A 7B model's importance is 27 GB of fp32. It is made a group of tensors at a time, as many as the memory allows, lies in
a memory-mapped file of the run folder, and is ranked from there in exact passes (mask.py), without ever being rounded.
"""

from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from allo_mini import UserError
from allo_mini.data import Example
from allo_mini.files import load_mask, save_mask, scratch
from allo_mini.log import progress
from allo_mini.logprobs import by_response, pack, token_logps
from allo_mini.loop import Objective, or_halve, sft_objective
from allo_mini.mask import PackedMask, each_selected, pack_mask
from allo_mini.memory import tensor_groups
from allo_mini.optim import FlatGradient
from allo_mini.run import Run
from allo_mini.selection import CHUNK

TOGETHER = 8  # pairs whose gradients are one g_t; from 1 to 9, the masks share the same 70 % with the warm-up's (demo)
COMPARE_BELOW = 10**9  # weights; above, the gradients of two halves are not kept apart: they would double the file


def gradient_importance(run: Run, theta: Path, examples: list[Example], objective: Objective,
                        compare: bool = False, snr: bool = False) -> list[dict[str, Tensor]]:
    """sum_t g_ti, or with `snr` that over sqrt(sum_t g_ti^2).

    For L_DPO g is -(beta/2)(grad log pi(y+) - grad log pi(y-)): no reference pass is needed, the policy is its own. A
    group of tensors at a time is accumulated, in as many passes over the examples as that takes. Returns [{name: fp32
    tensor of the weight's shape}] and, with `compare` (of sums alone), the same of each half of the examples, whose
    masks' overlap says how noisy the location is.
    """
    if compare:
        first, second = (gradient_importance(run, theta, examples[i::2], objective)[0] for i in (0, 1))
        return [{name: first[name] + second[name] for name in first}, first, second]
    model, at, store = run.load(theta), 0, scratch(run.folder, run.parameters)
    named, groups = dict(model.named_parameters()), tensor_groups(run.shapes, run.locate_groups(snr))
    for number, names in enumerate(groups, 1):
        flat = FlatGradient(((n, named[n]) for n in names), host=run.cfg.offload == "gradient")
        run.spend_memory(model, 0)
        label = f"gradient {number}/{len(groups)}"
        store[at:at + len(flat.grad)] = or_halve(
            run, lambda: added_up(run, model, examples, objective, flat.grad, snr, label), flat.grad.zero_)
        at += len(flat.grad)
        flat.close()
        del flat  # its gradient makes room for the next group's
    parts = store.split([shape.numel() for shape in run.shapes.values()])
    return [{name: part.view(shape) for (name, shape), part in zip(run.shapes.items(), parts)}]


def added_up(run: Run, model, examples: list[Example], objective: Objective, grad: Tensor, snr: bool,
             label: str) -> Tensor:
    """The examples' gradient, or its signal-to-noise ratio, [n]; `grad` [n] is where the model's gradients gather."""
    total, squares = torch.zeros(2, len(grad)) if snr else (grad, None)
    for at in progress(range(0, len(examples), TOGETHER), label=label, unit="step"):
        for micro in run.micro_batches(examples[at:at + TOGETHER]):
            batch = pack(micro, run.device)
            logps, real = by_response(token_logps(model, batch), batch.lengths)
            objective.loss(logps, logps.detach(), real, micro)[0].backward()  # theta is its own reference
        if snr:  # summed up in host memory, 8 bytes a weight, so that it takes no more passes than the gradient alone
            for first, second, g in zip(*(x.split(CHUNK) for x in (total, squares, grad))):
                g = g.cpu()
                first.add_(g)
                second.addcmul_(g, g)
            grad.zero_()
    return total.div_(squares.sqrt_().clamp_(min=1e-19)) if snr else total  # 0 where no gradient has come


def importance_mask(run: Run, importance: dict[str, Tensor], percent: float) -> PackedMask:
    """The exact top `percent` (--mask-source bottom: the lowest), counted on the run's device."""
    share = Fraction(str(percent)) / 100  # percent / 100 as a float would be off by one weight here and there
    try:
        return pack_mask(each_selected(importance, share, run.device, lowest=run.cfg.mask_source == "bottom"))
    except ValueError as e:
        raise UserError(f"{e}; use --dtype fp32, or lower --warmup-lr") from None


def random_importance(run: Run) -> dict[str, Tensor]:
    """For --mask-source random: a number in [0, 1) for every weight, fixed by --seed."""
    generator = torch.Generator().manual_seed(run.cfg.seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in run.shapes.items()}


def located(run: Run, theta: Path, name: str, examples: list[Example]) -> PackedMask | None:
    """The weights that sft or the rewriting model train: all (None), or --p-sft % by the gradient of their own loss."""
    if not run.cfg.p_sft or run.cfg.p_sft == 100:
        return None
    def make(target):
        [gradient] = gradient_importance(run, theta, examples[:run.cfg.locate_pairs], sft_objective())
        save_mask(importance_mask(run, gradient, run.cfg.p_sft), target)
    return load_mask(run.stage(f"{name}-locate", make, f"mask-{name}.safetensors"), run.shapes)
