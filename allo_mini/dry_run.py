"""train.py --dry-run: which stages would run, on how much, and what that takes. Writes nothing.

Rows are the most there can be: none has been dropped as too long yet, and before anything is sampled a question's
responses could all be wrong, or give all the pairs asked for. Responses are taken to be as long as the reference
solutions. Times come from a random model with two of the policy's layers, timed for a moment on the run's device:
right within a factor of about two. Left out are texts, the patch and random masks, which take little.
"""

import shutil
import timeit
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

import torch

from allo_mini import memory, tasks
from allo_mini.config import SETTINGS
from allo_mini.data import Pair
from allo_mini.device import host_memory
from allo_mini.files import load_mask, read_samples
from allo_mini.generate import sample
from allo_mini.inputs import own_weights
from allo_mini.locate import COMPARE_BELOW
from allo_mini.log import say, table
from allo_mini.logprobs import pack, token_logps
from allo_mini.loop import resolve_stage, steps_of
from allo_mini.mask import selected
from allo_mini.model import build
from allo_mini.run import Run

# stage -> kind of its rows, and how many responses are read in each; the others read both responses of "pairs"
READS = {"sample": ("questions", 1), "sft": ("solutions", 1), "more-sft": ("solutions", 1), "rft": ("right", 1),
         "npo": ("wrong", 1), "reward": ("wrong", 3), "score": ("wrong", 3), "forget": ("weighted", 1)}
FILES = {"sample": "samples.jsonl", "warmup": "movement.safetensors", "locate": "mask.safetensors",
         "score": "token_weights.jsonl", "sft-locate": "mask-sft.safetensors",
         "reward-locate": "mask-reward.safetensors"}  # of others a folder


class Measured(NamedTuple):
    """Mean tokens of a prompt and of a response; seconds in which the policy reads a token, and samples one."""
    prompt: float
    response: float
    read: float
    sampled: float


class Line(NamedTuple):
    """A stage in the plan; training: steps, batch, lr, trained weights; stay, meanwhile: its bytes on the disk."""
    rows: int
    seconds: float
    training: tuple[str, ...] = ("-",) * 4
    stay: int = 0
    meanwhile: int = 0


def measure(run: Run) -> Measured:
    """Token counts of the first 200 rows, times of a random model."""
    rows = [(p.prompt, [p.chosen]) for p in run.pairs] or [(t.input, [t.output]) for t in run.tasks]
    sizes = [(len(e.prompt), len(e.responses[0])) for row in rows[:200] if (e := run.encoder.example(*row))]
    prompt, response = map(fmean, zip(*sizes or [(run.cfg.max_length / 2, run.cfg.max_length / 2)]))
    small = replace(run.config, num_hidden_layers=min(2, run.config.num_hidden_layers))
    with torch.device("meta"):  # a 7B model's embedding alone is slow to make on the host, and large in fp32
        model = build(small).to(run.dtype).requires_grad_(False)
    for p in model.to_empty(device=run.device).parameters():
        p.uniform_(-0.03, 0.03)
    tokens, slots = (256, 32) if run.device == "cpu" else (4096, 320)  # enough to keep the device busy
    ids = [i % run.config.vocab_size for i in range(tokens)]
    batch = pack([(ids[:tokens // 2], [ids[tokens // 2:]])], run.device)
    read = timeit.repeat(lambda: token_logps(model, batch).sum().item(), number=1, repeat=3)
    sampled = timeit.repeat(lambda: sample(model, [ids[:32]], slots, 4, slots=slots), number=1, repeat=3)
    scale = run.parameters / sum(p.numel() for p in model.parameters())
    return Measured(prompt, response, scale * min(read) / tokens, scale * min(sampled) / (4 * slots))


def rows_of(run: Run) -> dict[str, int]:
    """How many rows of each kind there are at most; a question counts once for each of its responses."""
    cfg, asked = run.cfg, run.questions[:run.cfg.sample_questions or None]
    pairs = len(run.pairs) or len(asked) * min(cfg.pairs_per_question, cfg.n**2 // 4)  # where half is right
    right = wrong = len(run.pairs) or len(asked) * cfg.n
    if cfg.samples or is_made(run, "sample"):
        samples, _ = read_samples(cfg.samples or run.folder / "samples.jsonl")
        graded = [[tasks.is_correct(s, t) for s in {*samples[t.input]}] for t in run.questions if t.input in samples]
        right, wrong = (sum(row.count(side) for row in graded) for side in (True, False))
        pairs = sum(min(cfg.pairs_per_question, row.count(True) * row.count(False)) for row in graded)
    weighted = len(own_weights(run)[0]) if cfg.token_weights_file else wrong
    return {"questions": len(asked) * cfg.n, "solutions": len(run.tasks) or len(run.pairs), "pairs": pairs,
            "right": right, "wrong": wrong, "weighted": weighted}


def is_made(run: Run, stage: str) -> bool:
    """Whether the run folder holds what a stage makes."""
    return not run.cfg.restart and (run.folder / FILES.get(stage, stage)).exists()


def evaluating(rows: list, m: Measured) -> float:
    """Seconds in which the policy answers task rows, or compares preference rows."""
    more = 2 * m.response * m.read if isinstance(rows[0], Pair) else m.response * m.sampled
    return len(rows) * (m.prompt * m.read + more)


def line_of(run: Run, stage: str, rows: dict[str, int], m: Measured) -> Line:
    """The plan of a stage. Training on a token takes as long as reading it four times, once for the reference."""
    cfg, (kind, responses) = run.cfg, READS.get(stage.removesuffix("-locate"), ("pairs", 2))
    count, shapes = rows[kind], run.rewriter[1] if run.rewriter and stage in ("reward", "score") else run.shapes
    n = sum(shape.numel() for shape in shapes.values())
    reading = (m.prompt + responses * m.response) * m.read * n / run.parameters  # seconds a row
    if stage in ("sample", "score"):
        return Line(count, count * (m.response * m.sampled if stage == "sample" else reading))
    if stage in memory.LOCATING:
        count = min(count, cfg.locate_pairs)
        snr = cfg.locate == "snr" and stage == "locate"
        halves = 2 if stage == "locate" and n < COMPARE_BELOW and not snr else 1  # whose gradients are kept apart
        return Line(count, 3 * count * reading * run.locate_groups(snr), meanwhile=4 * halves * n)
    s = resolve_stage(stage, cfg.stages[SETTINGS.get(stage, stage)], n, max(1, count))
    steps, percent = steps_of(count, s.batch, s.epochs, cfg.seed, cfg.max_steps), memory.percent_of(cfg, stage)
    seconds, weights = 4 * reading * sum(map(len, steps)), int(n * percent / 100)
    if cfg.mask and percent < 100 and stage not in ("sft", "reward"):
        weights = selected(load_mask(cfg.mask, run.shapes))
    if cfg.eval_every and run.val and stage not in ("warmup", "reward"):
        seconds += (len(steps) // cfg.eval_every + 1) * evaluating(run.val, m)
    return Line(count, seconds, (str(len(steps)), str(s.batch), f"{s.lr:g}", f"{weights:,}"),
                n * (4 if stage == "warmup" else run.dtype.itemsize) + (5 * weights if stage == "forget" else 0),
                2 * 20 * weights)  # the last checkpoint and the next: master, start, best, two moments, all fp32


def plan_of(run: Run) -> dict[str, Line]:
    """The stages in their order, then the test of every model."""
    cfg, rows, m = run.cfg, rows_of(run), measure(run)
    models = 1 if cfg.only_sft else 1 + len(cfg.method)
    tested = run.test * models if cfg.eval else []
    plan = {stage: line_of(run, stage, rows, m) for stage in memory.stages_of(cfg)}
    return plan | ({"test": Line(len(tested), evaluating(tested, m))} if tested else {})


def show(run: Run) -> None:
    """Print the plan of a run that open_run has checked: stages, time, disk and memory."""
    cfg = run.cfg
    state = "new" if not run.folder.exists() else "would be renamed" if cfg.restart else "there already"
    say(f"dry run: nothing is written. Run folder: {run.folder} ({state})\n")
    if is_made(run, "results.json"):
        return say("this run is finished: the same command prints its table again")
    plan = plan_of(run)
    todo = [line for stage, line in plan.items() if not is_made(run, stage)]
    plan["together"] = Line(0, sum(line.seconds for line in todo))
    say(table(["stage", "rows", "steps", "batch", "lr", "weights trained", "minutes"], [
        [stage, str(line.rows or "-"), *line.training,
         "skipped" if is_made(run, stage) else f"{line.seconds / 60:.1f}"] for stage, line in plan.items()]))
    stay, meanwhile = sum(line.stay for line in todo), max((line.meanwhile for line in todo), default=0)
    there = next(folder for folder in (run.folder, *run.folder.resolve().parents) if folder.exists())
    most = "the most there can be" + ("" if run.pairs else " until responses are sampled; fewer make smaller batches")
    say(f"\nRows, and with them steps and minutes, are {most}.\nTimes are rough: a random model was timed just now; "
        "--int8, --offload and recomputed activations cost more.\n\n"
        f"disk: about {stay / 1e9:.2f} GB, and up to {meanwhile / 1e9:.2f} GB meanwhile for checkpoints or "
        f"gradients; {shutil.disk_usage(there).free / 1e9:.1f} GB are free\n")
    if not run.needs:  # with --memory they have been printed
        blocks = 0 if cfg.checkpoint_blocks < 0 and run.device == "cpu" else cfg.checkpoint_blocks
        cfg = replace(cfg, locate_groups=run.locate_groups(cfg.locate == "snr"), checkpoint_blocks=blocks)
        needs = memory.needs_of(cfg, run.config, run.shapes, run.dtype.itemsize, run.rewriter)
        memory.show_needs(needs)
        room = host_memory()
        if run.device.startswith("cuda"):
            room = torch.cuda.get_device_properties(run.device).total_memory
            needs.pop("sample", None)  # there it takes as many slots as fit
        for stage, terms in needs.items():
            if sum(terms.values()) > room > 0:
                say(f"WARNING: {stage} may take more than the {room / 1e9:.1f} GB there are; lower --sample-batch, "
                    "--micro-tokens or --max-length")
