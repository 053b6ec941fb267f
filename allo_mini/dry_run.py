"""train.py --dry-run: what would run, on how much, and what memory, disk and time it takes. Writes nothing.

Rows are counted as the run itself would count them; where they depend on responses that nobody has sampled yet, the
most there can be, responses as long as the reference solutions. Times come from a random model of one and of two of the
policy's layers, timed for a moment on the run's device, so they are no better than within a factor of about two.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch

from allo_mini import memory, tasks
from allo_mini.architecture import ModelConfig
from allo_mini.checkpoint import load_model
from allo_mini.config import SETTINGS
from allo_mini.data import Pair, steps_of
from allo_mini.files import read_samples
from allo_mini.log import say, table
from allo_mini.logprobs import pack, token_logps
from allo_mini.loop import resolve_stage
from allo_mini.model import build
from allo_mini.run import Run

SAMPLE = 200  # rows that are encoded to know how long rows are
ARTEFACTS = {"sample": "samples.jsonl", "warmup": "movement.safetensors", "locate": "mask.safetensors",
             "score": "token_weights.jsonl"}


def lengths(run: Run) -> tuple[float, float]:
    """Mean tokens of a prompt and of a response."""
    rows = [(p.prompt, [p.chosen, p.rejected]) for p in run.pairs] or [(t.input, [t.output or ""]) for t in run.tasks]
    kept = [e for row in rows[:SAMPLE] if (e := run.encoder.example(*row))]
    run.encoder.clear()
    if not kept:
        return run.cfg.max_length / 2, run.cfg.max_length / 2
    answers = [len(r) for e in kept for r in e.responses]
    return sum(len(e.prompt) for e in kept) / len(kept), sum(answers) / len(answers)


def rows_of(run: Run) -> tuple[dict[str, int], bool]:
    """Rows of every kind that the stages train on, and whether they are known (not: at most so many)."""
    cfg, asked = run.cfg, len(run.tasks[:run.cfg.sample_questions or None])
    if cfg.pairs:
        return {"questions": 0, "pairs": len(run.pairs), "negatives": len(run.pairs), "correct": len(run.pairs)}, True
    if cfg.samples:
        samples, _ = read_samples(cfg.samples)
        known = [t for t in run.tasks if t.input in samples]
        pairs, negatives, _ = tasks.label(known, samples, cfg.pairs_per_question, cfg.seed, run.encoder)
        good = sum(tasks.is_correct(s, t) for t in known for s in dict.fromkeys(samples[t.input]))
        return {"questions": 0, "pairs": len(pairs), "negatives": len(negatives), "correct": good}, True
    return {"questions": asked, "pairs": asked * cfg.pairs_per_question, "negatives": asked * cfg.n,
            "correct": asked * cfg.n}, False


def stages_of(run: Run) -> dict[str, tuple[int, float]]:
    """{stage: (rows, tokens of a row)} of all stages, in their order."""
    counts, (prompt, response), cfg = rows_of(run)[0], lengths(run), run.cfg
    pair, single, rewriting = prompt + 2 * response, prompt + response, prompt + 3 * response
    solutions = len(run.tasks) or len(run.pairs)
    rows = {"sft": (solutions, single), "sample": (counts["questions"] * cfg.n, response), "more-sft": (solutions, single),
            "rft": (counts["correct"], single), "npo": (counts["negatives"], single),
            "locate": (min(counts["pairs"], cfg.locate_pairs), pair), "reward": (counts["negatives"], rewriting),
            "score": (counts["negatives"], rewriting), "forget": (counts["negatives"], single)}
    return {stage: rows.get(stage, (counts["pairs"], pair)) for stage in memory.stages_of(cfg)}


def seconds_per_token(run: Run, tokens: int) -> tuple[float, float]:
    """Forward, and forward with backward, of the policy for a token in a micro-batch of `tokens`."""
    config, times = load_config(run), []
    for layers in (1, 2):
        model = build(replace(config, num_hidden_layers=layers)).initialize(0).to(run.device, run.dtype)
        ids = torch.randint(config.vocab_size, (tokens,)).tolist()
        batch = pack([(ids[:tokens // 2], [ids[tokens // 2:]])], run.device)
        times.append([timed(lambda: token_logps(model, batch)), 0.0])
        model.requires_grad_(True)
        times[-1][1] = timed(lambda: token_logps(model, batch).sum().backward())
    return tuple((one + (config.num_hidden_layers - 1) * max(0.0, two - one)) / tokens for one, two in zip(*times))


def load_config(run: Run) -> ModelConfig:
    return load_model(str(run.base), run.dtype, "meta").config


def timed(work) -> float:
    """Seconds of one call, after one that is not counted; the least of two."""
    def once():
        began = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic() - began
    once()
    return min(once(), once())


def plan_lines(run: Run) -> list[list[str]]:
    """A table row a stage: what it does and about how long it takes."""
    cfg, lines, sampled = run.cfg, [], not rows_of(run)[1]
    forward, both = seconds_per_token(run, min(cfg.micro_tokens, 512 if run.device == "cpu" else 4096))
    for stage, (rows, size) in stages_of(run).items():
        about, steps, batch, lr = "at most " if sampled and stage not in ("sft", "more-sft") else "", "-", "-", "-"
        seconds = rows * size * forward
        if stage in memory.TRAINING:
            s = resolve_stage(stage, cfg.stages[SETTINGS.get(stage, stage)], run.parameters, max(1, rows))
            groups = steps_of(rows, s.batch, s.epochs, cfg.seed, cfg.max_steps)
            steps, batch, lr = about + str(len(groups)), str(s.batch), f"{s.lr:g}"
            reference = stage not in ("sft", "more-sft", "rft", "reward", "simpo")
            seconds = sum(map(len, groups)) * size * (both + forward * reference)
        elif stage == "locate":
            seconds = rows * size * both * max(1, cfg.locate_groups)
        found = (run.folder / ARTEFACTS.get(stage, stage)).exists()
        lines.append([stage, about + str(rows), steps, batch, lr, f"{memory.percent_of(cfg, stage):g} %"
                      if stage in memory.TRAINING else "-", "is there, skipped" if found else about + spell(seconds)])
    if run.test and cfg.eval:
        size = sum(lengths(run)) * (2 if isinstance(run.test[0], Pair) else 1)
        models = 1 + len(cfg.method) * (not cfg.only_sft)
        lines.append(["test", str(len(run.test) * models), *"----", spell(len(run.test) * models * size * forward)])
    return lines


def spell(seconds: float) -> str:
    """90 -> "1.5 min"."""
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= s or s == 1)
    return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"


def show(run: Run) -> None:
    """Print the plan of a run that open_run has checked."""
    cfg, bytes_of_model = run.cfg, run.parameters * run.dtype.itemsize
    large = [s for s in memory.stages_of(cfg) if s in memory.TRAINING]
    most = max([memory.percent_of(cfg, s) for s in large] or [0]) / 100
    disk = bytes_of_model * len(large) + 4 * run.parameters * ("warmup" in large) + 24 * run.parameters * most
    say(f"dry run: nothing is written. {run.parameters:,} weights ({bytes_of_model / 1e9:.2f} GB), {run.device}, "
        f"{str(run.dtype).removeprefix('torch.')}, prompts: {run.encoder.style}\nrun folder: {run.folder}"
        f"{' (there already)' if Path(run.folder).exists() else ''}, about {disk / 1e9:.2f} GB at most\n")
    say(table(["stage", "rows", "steps", "batch", "lr", "weights trained", "estimated time"], plan_lines(run)))
    say("\nTimes are estimates from a model of two random layers timed just now; decoding is usually slower than that.\n")
    if not run.needs:  # with --memory they have been printed
        cfg = replace(cfg, locate_groups=cfg.locate_groups or 1)
        memory.show_needs(memory.needs_of(cfg, load_config(run), run.shapes, run.dtype.itemsize))
