"""The one training loop, and what each stage minimizes in it.

One training step in two files: this loop (batches -> log-probs -> loss -> backward -> clip -> step) and losses.py
(the equations). Backward hands every gradient to the optimizer's flat buffer (optim.py) as soon as it exists.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from allo_mini import UserError, losses, parallel
from allo_mini.config import OFFICIAL, SETTINGS, Stage
from allo_mini.data import Example
from allo_mini.device import peak_gb
from allo_mini.files import load_tensors
from allo_mini.log import progress, say
from allo_mini.logprobs import by_response, pack, size_of, token_logps
from allo_mini.optim import MaskedAdamW, cosine_lr
from allo_mini.resume import StageProgress
from allo_mini.run import Run
from allo_mini.scoring import with_reference

LN2 = math.log(2)


@dataclass
class Objective:
    """What a stage minimizes. The loss is a sum; the loop divides it by the units of the whole step.

    loss(logps, ref, mask, examples) -> (sum of losses, {metric: one value per example or pair})
        logps, ref [R,T] per-token log-probs of the R responses, mask [R,T] bool; for pairs, rows alternate y+, y-
    units(example)   what the sum is divided by: pairs, tokens or token weights that are not 0
    step0(examples)  the loss while theta = theta_ref; None: the stage needs no reference
    state            what the loss remembers of earlier steps, saved in checkpoints; after(values) changes it
    """
    loss: Callable[[Tensor, Tensor, Tensor, list[Example]], tuple[Tensor, dict[str, Tensor]]]
    units: Callable[[Example], float]
    step0: Callable[[list[Example]], float] | None = None
    shown: tuple[str, ...] = ("loss", "grad_norm", "learning_rate")
    state: dict[str, float] = field(default_factory=dict)
    after: Callable[[dict[str, float]], None] = lambda values: None


def run_stage(run: Run, name: str, model, examples: list[Example], objective: Objective, mask=None,
              validate: Callable | None = None, exact: Path | None = None) -> MaskedAdamW:
    """Train `model` in place on `examples`; only the weights in `mask` (None: all) move. Returns the optimizer.

    exact: file of the fp32 weights with which the stage before ended, of which `model` holds the rounded ones.
    """
    cfg, size = run.cfg, sum(p.numel() for p in model.parameters())
    flags = cfg.stages[SETTINGS.get(name, name)]  # baselines have sft's or dpo's
    s = resolve_stage(name, flags, size, len(examples))
    order = steps_of(len(examples), s.batch, s.epochs, cfg.seed, cfg.max_steps)
    planned = [[examples[i] for i in rows] for rows in order]
    steps = [group for group in planned if units_of(group, objective)]
    if not steps:
        raise UserError(f"{name}: no token of {len(examples)} rows has a weight; nothing to train on")
    optimizer = MaskedAdamW(model.named_parameters(), mask, s.lr, weight_decay=cfg.weight_decay,
                            state_bits=cfg.state_bits, offload=cfg.offload)
    if exact:
        try:
            optimizer.begin_at(load_tensors(exact)[0])
        except torch.OutOfMemoryError:
            raise
        except (UserError, LookupError, ValueError, RuntimeError, AttributeError) as e:
            raise UserError(f"{exact}: broken, or of another model ({e}); delete it and the folder forget") from None
    if objective.step0:
        steps = or_halve(run, lambda: [add_references(run, model, group)
                                       for group in progress(steps, label=f"{name}: reference", unit="step")])
    place = StageProgress(run, name, len(steps), len(planned) - len(steps), optimizer, examples, mask, objective.state)
    say(f"{name}: {len(examples)} rows, {len(steps)} steps of {s.batch}, lr {s.lr:g}, "
        f"{len(optimizer.master):,} weights in training")
    run.log.note(name, rows=len(examples), steps=len(steps), lr=s.lr, batch=s.batch, epochs=s.epochs, warmup=s.warmup)
    bar = progress(place.steps(), total=len(steps) - place.step, label=name, unit="step")
    for step in bar:
        began, group = time.monotonic(), steps[step]
        optimizer.lr = cosine_lr(step, len(steps), s.lr, s.warmup)
        sums = or_halve(run, lambda: accumulate(run, model, group, objective), optimizer.grad.zero_)
        parallel.sum_over_ranks(optimizer.grad, run.device)
        values = {"learning_rate": optimizer.lr, "epoch": s.epochs * (step + 1) / len(steps), "loss": sums.pop("loss")}
        values |= {key: total / len(group) for key, total in sums.items()}
        values["grad_norm"] = optimizer.clip(cfg.clip)
        run.check_numbers(name, step, values, examples, group, objective.step0)
        optimizer.step()
        objective.after(values)
        values["tokens/s"] = sum(map(size_of, group)) / (time.monotonic() - began)
        values["mem/peak_gb"] = peak_gb(run.device)
        if validate and ((step + 1) % cfg.eval_every == 0 or step + 1 == len(steps)):
            values["eval/score"] = validate(model)
            place.keep_if_best(values["eval/score"])
        run.log.step(name, step + 1, len(steps), values, ("eval/score", *objective.shown))
        bar.set_postfix(loss=f"{values['loss']:.4g}")
        place.save(step + 1)
    place.finish()
    return optimizer


def resolve_stage(name: str, stage: Stage, parameters: int, rows: int) -> Stage:
    """Fill in lr and batch where they are 0.

    lr: the official value is for 7B; smaller models take steps larger by sqrt(7e9 / parameters), at most 100x (ours).
    batch: the official one, but small enough for at least 50 steps an epoch, and not below 8 (ours).
    """
    official = OFFICIAL[SETTINGS.get(name, name)]
    scale = min(100.0, max(1.0, math.sqrt(7e9 / parameters)))
    lr = stage.lr or float(f"{official.lr * scale:.2g}")
    return replace(stage, lr=lr, batch=stage.batch or max(1, min(official.batch, max(8, rows // 50), rows)))


def steps_of(count: int, batch: int, epochs: float, seed: int, max_steps: int = 0) -> list[list[int]]:
    """Row numbers of every optimizer step: epochs are seeded shuffles laid end to end, then cut into batches."""
    order, rng, total = [], random.Random(seed), round(count * epochs)
    while len(order) < total:
        epoch = list(range(count))
        rng.shuffle(epoch)
        order += epoch
    steps = [order[i:min(i + batch, total)] for i in range(0, total, batch)]
    return steps[:max_steps or None]


def accumulate(run: Run, model, group: list[Example], objective: Objective) -> dict[str, float]:
    """Forward and backward of a step's examples; gradients gather in the optimizer's flat buffer.

    Returns {"loss": sum of losses / units of the whole step, metric: its sum over the step's examples}.
    """
    units, total = units_of(group, objective), {}  # of the whole step, before any micro-batch
    mine, part = run.micro_batches(group, parallel.share), 1.0
    if not mine:  # fewer micro-batches than ranks: this one computes along, so that all ranks sum up the same keys
        mine, part = run.micro_batches(group)[:1], 0.0
    for micro in mine:
        batch = pack(micro, run.device)
        logps, real = by_response(token_logps(model, batch), batch.lengths)
        ref = logps.detach()  # without a reference every ratio is 0, and so every token useful
        if micro[0].ref is not None:
            flat = torch.cat([e.ref for e in micro]).to(run.device, non_blocking=True)
            ref, _ = by_response(flat, batch.lengths)
        loss, metrics = objective.loss(logps, ref, real, micro)
        (loss * (part / units)).backward()
        for key, values in {**metrics, "loss": loss / units}.items():
            total[key] = total.get(key, 0.0) + part * values.detach().float().sum()
    sums = torch.stack(list(total.values()))
    parallel.sum_over_ranks(sums, run.device)
    return dict(zip(total, sums.tolist()))  # the step's first wait for the device


def add_references(run: Run, model, group: list[Example]) -> list[Example]:
    """A step's examples, in their order, with reference log-probs; under torchrun those that this rank computes on."""
    mine = {id(e.responses): e for e in with_reference(model, run.micro_batches(group, parallel.share))}
    return [mine.get(id(e.responses), e) for e in group]


def or_halve(run: Run, work: Callable, undo: Callable = lambda: None):
    """work(); when memory runs out, once more with micro-batches of half the size, which then stay so.

    `undo` takes back what the failed try left behind. Raises torch.OutOfMemoryError when the second try fails too, or
    nothing can be halved (any more).
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        if run.halved or run.cfg.micro_batch == 1:
            raise
    run.halved = True
    say("out of memory: going on with micro-batches of half the size; lower --micro-tokens to keep it so")
    torch.cuda.empty_cache()  # outside of `except`, where the failed try's tensors are gone
    undo()
    return work()


def units_of(group: list[Example], objective: Objective) -> float:
    """What the loss sum of a step is divided by."""
    return sum(objective.units(e) for e in group)


def sft_objective() -> Objective:
    """Mean negative log-likelihood of the response tokens."""
    def loss(logps, ref, real, examples):
        return losses.sft_loss(logps).sum(), {"logps/chosen": logps.sum(-1)}
    return Objective(loss, units=lambda e: len(e.responses[0]))


def npo_objective(beta: float) -> Objective:
    """Forgetting: token-weighted NPO over y-, divided by the number of tokens with a weight that is not 0."""
    def loss(logps, ref, real, examples):
        flat = torch.tensor([x for e in examples for x in e.weights]).to(logps.device, non_blocking=True)
        w, _ = by_response(flat, [len(e.weights) for e in examples])  # [R,T]
        rejected = beta * (logps - ref).sum(-1)
        return losses.npo_loss(logps, ref, w, beta).sum(), {
            "rewards/rejected": rejected, "logps/rejected": logps.sum(-1),
            "token_weight/fraction": (w != 0).sum(-1) / real.sum(-1)}

    def counted(example):
        return sum(w != 0 for w in example.weights)

    def step0(examples):
        return LN2 * sum(sum(e.weights) for e in examples) / sum(map(counted, examples))

    return Objective(loss, counted, step0,
                     ("loss", "rewards/rejected", "token_weight/fraction", "grad_norm", "tokens/s"))


def dpo_objective(beta: float, epsilon: float = 1.0) -> Objective:
    """DPO over whole pairs; with epsilon < 1, improving: only the most useful share of y-'s tokens counts."""
    return pair_objective(lambda c, r, ref_c, ref_r, n_c, n_r: losses.dpo_loss(c, r, ref_c, ref_r, beta),
                          beta, lambda examples: LN2, epsilon)


def pair_objective(values: Callable[..., Tensor], beta: float, step0, epsilon: float = 1.0) -> Objective:
    """Mean over pairs of values(chosen, rejected, ref_chosen, ref_rejected, tokens of chosen, of rejected), all [B].

    The first four are log-probs summed over tokens, those of y- over the useful ones. With step0 None there is no
    reference, pi_ref's are pi_theta's, and the logged rewards are beta times mean log-probs; else they are
    beta log pi_theta/pi_ref. Another beta than cfg.beta puts check_numbers' nats into other units.
    """
    def loss(logps, ref, real, examples):
        keep = losses.useful_token_mask(logps[1::2], ref[1::2], real[1::2], epsilon)  # [B,T]
        counted, n = real.clone(), real.sum(-1)
        counted[1::2] = keep
        sums, ref_sums = (logps * counted).sum(-1), (ref * counted).sum(-1)  # [R]
        rewards = beta * ((logps - ref).sum(-1) if step0 else logps.sum(-1) / n)  # of whole responses in every stage
        up, down = rewards[0::2], rewards[1::2]  # [B]
        return values(sums[0::2], sums[1::2], ref_sums[0::2], ref_sums[1::2], n[0::2], n[1::2]).sum(), {
            "rewards/chosen": up, "rewards/rejected": down, "rewards/margins": up - down,
            "rewards/accuracies": (up > down), "logps/chosen": logps[0::2].sum(-1),
            "logps/rejected": logps[1::2].sum(-1), "useful/fraction": keep.sum(-1) / n[1::2]}
    return Objective(loss, units=lambda e: 1, step0=step0,
                     shown=("loss", "rewards/margins", "rewards/accuracies",
                            *(["useful/fraction"] if epsilon < 1 else []), "grad_norm", "tokens/s"))
