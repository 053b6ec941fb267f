"""train.py --dry-run: what would run, on how much, and what memory, disk and time it takes. Writes nothing.

Rows are encoded and counted as the run itself will do it. Where they depend on responses that nobody has sampled yet,
they are the most there can be, and responses are taken to be as long as the reference solutions. Times come from a
random model with some of the policy's layers, timed for a moment on the run's device: right within a factor of about
two. Left out are stages that hold no model (random masks, the patch), and texts, which take little.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from allo_mini import memory, tasks
from allo_mini.config import SETTINGS
from allo_mini.data import Example, Negative, Pair, steps_of
from allo_mini.files import load_mask, read_samples, read_weights
from allo_mini.generate import sample
from allo_mini.locate import COMPARE
from allo_mini.log import say, table
from allo_mini.logprobs import pack, size_of, token_logps
from allo_mini.loop import resolve_stage
from allo_mini.mask import selected
from allo_mini.model import build
from allo_mini.run import Run
from allo_mini.scoring import rewrite_examples

MOST = 1000  # rows of a kind that are encoded; more are scaled up from these
KIND = {"sft": "training rows", "more-sft": "training rows", "rft": "correct samples", "npo": "negatives",
        "reward": "rewrites", "score": "rewrites", "forget": "negatives"}  # other stages: pairs
FILES = {"sample": ("samples.jsonl",), "warmup": ("movement.safetensors",), "score": ("token_weights.jsonl",),
         "sft-locate": ("mask-sft.safetensors",), "reward-locate": ("mask-reward.safetensors",)}
INSIDE = {"warmup": "locate", "sft-locate": "sft", "reward-locate": "reward"}  # not needed once that stage is done


class Rows(NamedTuple):
    """Rows of a stage: how many, the tokens the model reads (or samples) of one on average, and how sure the count is."""
    count: int
    tokens: float
    sure: str = ""  # or "about " or "at most "


class Speed(NamedTuple):
    """Seconds for a token that is read, read and learned from, sampled."""
    forward: float
    both: float
    decode: float


# ---- rows --------------------------------------------------------------------------------------------------

def preferences(run: Run) -> tuple[list[Pair], list[Negative], list[tuple]] | None:
    """Pairs, negatives and (question, [correct sample]) as the run will have them; None before anything is sampled."""
    cfg, path = run.cfg, Path(run.cfg.samples or run.folder / "samples.jsonl")
    if cfg.pairs:
        negatives = [Negative(p.prompt, p.rejected, p.chosen, p.rewrite or p.chosen) for p in run.pairs]
        return run.pairs, negatives, [(p.prompt, [p.chosen]) for p in run.pairs]
    if not (cfg.samples or is_made(run, "sample")):
        return None
    samples, _ = read_samples(path)
    asked = [t for t in run.tasks if t.input in samples]
    pairs, negatives, _ = tasks.label(asked, samples, cfg.pairs_per_question, cfg.seed, run.encoder)
    correct = [(t.input, [s]) for t in asked for s in dict.fromkeys(samples[t.input]) if tasks.is_correct(s, t)]
    return pairs, negatives, correct


def counted(examples: list[Example], tried: int, total: int) -> Rows:
    """`total` rows, of which the first `tried` gave these examples."""
    mean = fmean(map(size_of, examples)) if examples else 0.0
    return Rows(round(len(examples) * total / tried), mean, "about " * (tried < total))


def rows_of(run: Run) -> dict[str, Rows]:
    """Rows of every kind in KIND that a stage of the run wants. Raises UserError when none of a kind can be used."""
    cfg, found = run.cfg, preferences(run)
    wanted = {KIND.get(stage.removesuffix("-locate"), "pairs") for stage in memory.stages_of(cfg)}
    texts = {"training rows": [(t.input, [t.output]) for t in run.tasks] or [(p.prompt, [p.chosen]) for p in run.pairs]}
    rows = {} if found else most_rows(run)
    if found:
        pairs, negatives, correct = found
        texts |= {"pairs": [(p.prompt, [p.chosen, p.rejected]) for p in pairs], "correct samples": correct,
                  "negatives": [(n.prompt, [n.response]) for n in negatives]}
        if "rewrites" in wanted:
            some = [n for n in negatives[:MOST] if run.encoder.example(n.prompt, [n.response])]
            rows["rewrites"] = counted(rewrite_examples(run.encoder, some), len(negatives[:MOST]), len(negatives))
    for kind in wanted & texts.keys():
        some = texts[kind][:MOST]
        rows[kind] = counted(run.encode(some, kind), len(some), len(texts[kind]))
    return rows


def most_rows(run: Run) -> dict[str, Rows]:
    """The most rows that sampling can give."""
    cfg, (prompt, answer), asked = run.cfg, lengths(run), len(run.tasks[:run.cfg.sample_questions or None])
    pairs = asked * min(cfg.pairs_per_question, cfg.n**2 // 4)  # half of the samples right, half wrong
    return {"pairs": Rows(pairs, prompt + 2 * answer, "at most ")} | {
        kind: Rows(asked * cfg.n, prompt + several * answer, "at most ")
        for kind, several in (("negatives", 1), ("correct samples", 1), ("rewrites", 3))}


def lengths(run: Run) -> tuple[float, float]:
    """Mean tokens of a prompt and of a response, of some rows."""
    rows = [(p.prompt, [p.chosen]) for p in run.pairs[:200]] or [(t.input, [t.output]) for t in run.tasks[:200]]
    kept = [e for row in rows if (e := run.encoder.example(*row))]
    run.encoder.clear()
    if not kept:
        return run.cfg.max_length / 2, run.cfg.max_length / 2
    return fmean(len(e.prompt) for e in kept), fmean(len(e.responses[0]) for e in kept)


def stages_of(run: Run) -> dict[str, Rows]:
    """The rows of all stages, in their order."""
    cfg, kinds, stages = run.cfg, rows_of(run), {}
    for stage in memory.stages_of(cfg):
        if stage == "sample":
            stages[stage] = Rows(len(run.tasks[:cfg.sample_questions or None]) * cfg.n, lengths(run)[1])
            continue
        rows = stages[stage] = kinds[KIND.get(stage.removesuffix("-locate"), "pairs")]
        if stage in memory.LOCATING:
            stages[stage] = rows._replace(count=min(rows.count, cfg.locate_pairs))
        elif stage == "forget" and cfg.token_weights_file:
            given = read_weights(cfg.token_weights_file)
            stages[stage] = rows._replace(count=len(given), sure="at most ")
    return stages


# ---- time, memory, disk ------------------------------------------------------------------------------------

def speed_of(run: Run) -> Speed:
    """Of the policy, in small micro-batches and batches of samples.

    Measured with one of its layers and with as many as make 2e8 weights (at least two); the others take as long as these.
    """
    cfg, cpu, every = run.cfg, run.device == "cpu", run.config.num_hidden_layers
    tokens, slots = min(cfg.micro_tokens, 256 if cpu else 4096), min(cfg.sample_batch, 32 if cpu else 320)
    layer = sum(shape.numel() for name, shape in run.shapes.items() if ".layers.0." in name)
    some = min(every, max(2, int(2e8 / layer)))
    ids = torch.randint(run.config.vocab_size, (tokens + 1,)).tolist()
    batch, measured = pack([(ids[:tokens // 2 + 1], [ids[tokens // 2 + 1:]])], run.device), []
    for layers in dict.fromkeys((1, some) if some < every else (every,)):
        model = build(replace(run.config, num_hidden_layers=layers)).to(run.device, run.dtype)
        for p in model.parameters():
            p.data.uniform_(-0.03, 0.03)
        decode = timed(run.device, lambda: sample(model, [ids[:32]], slots, 4, 0.01, slots=slots)) / 4 / slots
        with torch.no_grad():
            forward = timed(run.device, lambda: token_logps(model, batch)) / tokens
        model.requires_grad_(True)
        measured.append((forward, timed(run.device, lambda: token_logps(model, batch).sum().backward()) / tokens, decode))
    one, most = measured[0], measured[-1]
    return Speed(*(b + (every - some) * max(0.0, b - a) / max(1, some - 1) for a, b in zip(one, most)))


def timed(device: str, work) -> float:
    """Seconds of one call: the least of two after one that is not counted, or of the first one if it took long."""
    spent = []
    while len(spent) < 3 and sum(spent) < 1:
        began = time.monotonic()
        work()
        torch.zeros(1, device=device).item()  # waits for what is before it
        spent.append(time.monotonic() - began)
    return min(spent[1:] or spent)


def parameters_of(run: Run, stage: str) -> int:
    """Weights of the model in a stage: the policy's, or the rewriting model's own."""
    other = run.rewriter if stage in ("reward", "score") else None
    return sum(shape.numel() for shape in other[1].values()) if other else run.parameters


def trained(run: Run, stage: str) -> int:
    """How many weights a stage trains."""
    percent = memory.percent_of(run.cfg, stage)
    if run.cfg.mask and percent < 100 and stage not in ("sft", "reward"):
        return selected(load_mask(run.cfg.mask, run.shapes))
    return int(parameters_of(run, stage) * percent / 100)


def answering(run: Run, rows: list, speed: Speed) -> float:
    """Seconds in which a model answers task rows, or compares preference rows."""
    prompt, answer = lengths(run)
    if rows and isinstance(rows[0], Pair):
        return len(rows) * (prompt + 2 * answer) * speed.forward
    return len(rows) * (prompt * speed.forward + answer * speed.decode)


def is_made(run: Run, stage: str) -> bool:
    """Whether the run folder holds what a stage makes."""
    masks = ["mask.safetensors", *["mask-forget.safetensors"] * ((run.cfg.p_forget or run.cfg.p)
                                                               != (run.cfg.p_improve or run.cfg.p))]
    files = masks if stage == "locate" else FILES.get(stage, (stage,))
    return not run.cfg.restart and (all((run.folder / name).exists() for name in files)
                                    or (stage in INSIDE and is_made(run, INSIDE[stage])))


def line_of(run: Run, stage: str, rows: Rows, speed: Speed) -> tuple[list[str], float]:
    """A stage's line of the plan, and the seconds that it takes."""
    cfg, cells, tokens = run.cfg, ["-"] * 4, rows.count * rows.tokens
    seconds = tokens * (speed.decode if stage == "sample" else speed.forward)
    if stage in memory.TRAINING:
        s = resolve_stage(stage, cfg.stages[SETTINGS.get(stage, stage)], parameters_of(run, stage), max(1, rows.count))
        groups = steps_of(rows.count, s.batch, s.epochs, cfg.seed, cfg.max_steps)
        reference = stage not in ("sft", "more-sft", "rft", "reward", "simpo")
        seconds = sum(map(len, groups)) * rows.tokens * (speed.both + speed.forward * reference)
        if cfg.eval_every and stage not in ("warmup", "reward"):
            seconds += -(-len(groups) // cfg.eval_every) * answering(run, run.val, speed)
        some = bool(rows.sure) or (stage == "forget" and cfg.token_weights != "uniform")  # may skip steps without a weight
        cells = ["about " * some + str(len(groups)), str(s.batch), f"{s.lr:g}", f"{trained(run, stage):,}"]
    elif stage in memory.LOCATING:
        seconds = tokens * speed.both * len(memory.tensor_groups(run.shapes, run.locate_groups()))
    seconds *= parameters_of(run, stage) / run.parameters * (not is_made(run, stage))
    return [stage, rows.sure + str(rows.count), *cells,
            "is there, skipped" if is_made(run, stage) else rows.sure + spell(seconds)], seconds


def plan(run: Run, speed: Speed) -> list[list[str]]:
    """The lines of the table: the stages in their order, the test, and the time of all."""
    lines, spent = zip(*(line_of(run, stage, rows, speed) for stage, rows in stages_of(run).items()))
    test = 0.0
    if run.test and run.cfg.eval:
        models = 1 + len(run.cfg.method) * (not run.cfg.only_sft)
        test = models * answering(run, run.test, speed)
        lines += (["test", str(len(run.test) * models), *"----", spell(test)],)
    most = "at most " * any("at most" in line[-1] for line in lines)
    return [*lines, ["together", *"-----", most + spell(sum(spent) + test)]]


def spell(seconds: float) -> str:
    """90 -> "1.5 min"."""
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= s or s == 1)
    return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"


def disk_of(run: Run) -> tuple[dict[str, int], int]:
    """Bytes that the stages still to run will write: {what stays: bytes}, and the most that is there beside it meanwhile."""
    size, cfg, n = run.dtype.itemsize, run.cfg, run.parameters
    todo = [stage for stage in memory.stages_of(cfg) if not is_made(run, stage)]
    writes = [stage for stage in todo if stage in memory.TRAINING]
    patch = "improve" in writes and cfg.mask_source != "none"
    stay = {"models": sum(size * parameters_of(run, stage) for stage in writes if stage != "warmup"),
            "movement.safetensors": 4 * n * ("warmup" in writes),
            "patch.safetensors": int((size + 1.1) * trained(run, "improve")) * patch}  # a value, a position
    state = 8 + (8 if cfg.state_bits == 32 else 2) + 4 * bool(cfg.eval_every)  # master, start, moments, best
    checkpoints = [2 * state * trained(run, stage) for stage in writes]  # the last one and the next
    gradients = [4 * n * (1 + (stage == "locate" and n < COMPARE)) for stage in todo if stage in memory.LOCATING]
    return {name: value for name, value in stay.items() if value}, max([0, *checkpoints, *gradients])


def disk_line(run: Run) -> str:
    """disk_of in words and GB (1e9 bytes), and what is free."""
    stay, meanwhile = disk_of(run)
    there = next(folder for folder in (run.folder.resolve(), *run.folder.resolve().parents) if folder.exists())
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in stay.items())
    return (f"disk: about {sum(stay.values()) / 1e9:.2f} GB{f' ({parts})' if parts else ''}, and up to {meanwhile / 1e9:.2f} "
            f"GB meanwhile for checkpoints or gradients; {shutil.disk_usage(there).free / 1e9:.1f} GB are free")


def show(run: Run) -> None:
    """Print the plan of a run that open_run has checked: stages, time, disk and memory."""
    cfg, gb = run.cfg, run.parameters * run.dtype.itemsize / 1e9
    there = ("there already, would be renamed" if cfg.restart else "there already") if run.folder.exists() else "new"
    say(f"dry run: nothing is written. {run.parameters:,} weights ({gb:.2f} GB), {run.device}, "
        f"{str(run.dtype).removeprefix('torch.')}, prompts: {run.encoder.style}\nrun folder: {run.folder} ({there})\n")
    if (run.folder / "results.json").exists() and not cfg.restart:
        return say("this run is finished: the same command prints its table again")
    speed = speed_of(run)
    lines = plan(run, speed)
    say(table(["stage", "rows", "steps", "batch", "lr", "weights trained", "estimated time"], lines))
    if not (cfg.pairs or cfg.samples or cfg.only_sft or is_made(run, "sample")):
        say(f"\nat most: nothing is sampled yet, and a question's {cfg.n} responses could all be wrong, or give "
            f"{cfg.pairs_per_question} pairs.\nFewer rows make fewer steps, and smaller batches where none is asked for.")
    say("\nTimes are estimates from a random model timed just now, with responses as long as the reference solutions: "
        f"{1 / speed.forward:,.0f} tokens/s\nread, {1 / speed.both:,.0f} trained on, {1 / speed.decode:,.0f} sampled; "
        f"--int8, --offload and recomputed activations cost more.\n{disk_line(run)}\n")
    if not run.needs:  # with --memory they have been printed
        blocks = 0 if cfg.checkpoint_blocks < 0 and run.device == "cpu" else cfg.checkpoint_blocks
        cfg = replace(cfg, locate_groups=run.locate_groups(), checkpoint_blocks=blocks)
        memory.show_needs(memory.needs_of(cfg, run.config, run.shapes, run.dtype.itemsize, run.rewriter))
