"""A run and its folder: what all stages share, one artefact a stage, refusal of another run.

A stage whose artefact is there is skipped. So a killed run goes on, and a file made elsewhere
replaces a stage: put it into the folder under its name (ARTEFACTS) before the run begins.
"""

import functools
import hashlib
from collections import namedtuple
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

import torch

from allo_mini import UserError
from allo_mini.checkpoint import (TOKENIZER_FILES, eos_ids, find_folder, load_model, meta_model,
                                  read_tensor, save_model)
from allo_mini.data import demo
from allo_mini.data.encoder import Encoder
from allo_mini.data.rows import Pair, Task
from allo_mini.evaluation.answers import evaluate, summary
from allo_mini.evaluation.graders import gold_answer
from allo_mini.mask import from_tensors, to_tensors
from allo_mini.model import ModelConfig
from allo_mini.run import parallel
from allo_mini.run.config import METHODS, Config
from allo_mini.run.device import peak_gb, pick_device
from allo_mini.run.files import (keep_whole, load_tensors, lock, read_if_there, reading,
                                 save_tensors, write_json)
from allo_mini.run.inputs import encoder_for, read_rows, unused_template
from allo_mini.run.log import Log, progress, say

ARTEFACTS = (*METHODS, "more-sft", "samples.jsonl", "pairs.jsonl", "negatives.jsonl",
    "movement.safetensors", "mask.safetensors", "mask-forget.safetensors", "token_weights.jsonl",
    "forget.safetensors", "rewriter", "improve")
NO_MATTER = ("dry_run", "out", "save_minutes")  # settings that change no result


# A model on disk: a Hugging Face folder (a Path), and patches to put on top of it, in order
Policy = namedtuple("Policy", "folder changes", defaults=[()])


@dataclass
class Run:
    """What the stages share. Each stage loads the models it needs, and lets them go."""
    cfg: Config
    folder: Path
    base: Policy
    device: str
    dtype: torch.dtype
    config: ModelConfig  # of the policy
    shapes: dict[str, torch.Size]  # of its parameters
    encoder: Encoder
    tasks: list[Task]
    pairs: list[Pair]
    val: list  # Tasks, or Pairs in a run that starts from pairs
    test: list
    log: Log | None = None

    @property
    def parameters(self):
        """How many weights the policy has."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def questions(self):
        """Tasks that are sampled: of rows with the same question the first that has an answer."""
        first = {}
        for task in sorted(self.tasks, key=lambda task: gold_answer(task) is None):
            first.setdefault(task.question, task)
        return list(first.values())

    def load(self, policy, mask=None, training=False):
        """A model on the run's device; under --int8 in 8 bits, but for the weights in `mask`.

        training: `mask` is what will be trained (None: all, and nothing is in 8 bits). Else the
        weights of mask.safetensors, once it exists, are exact in every model: a table of 8 bits
        alone would not show what was trained.
        """
        int8 = self.cfg.int8 and not (training and mask is None)
        if int8 and mask is None and self.has("mask.safetensors"):
            mask = load_mask(self.folder / "mask.safetensors")
        model = load_model(policy.folder, self.dtype, self.device, int8, mask, policy.changes)
        model.recompute = self.cfg.recompute
        return model

    def save(self, what, target):
        """A model's folder, or a file of tensors; written by rank 0."""
        if parallel.RANK == 0:
            if isinstance(what, dict):
                save_tensors(what, target)
            else:
                save_model(what, target, eos_ids(what, self.encoder))

    def save_mask(self, mask, path):
        """Write a mask, which has all tensors; its file knows their shapes."""
        shapes = {name: " ".join(map(str, mask[name].shape)) for name in self.shapes}
        save_tensors(to_tensors(mask), path, shapes)

    def stage(self, name, artefact, make, ranks=False):
        """The path of a stage's artefact, made by make(path) unless it is there.

        Under torchrun all ranks take part if `ranks`, else the others wait for rank 0.
        """
        target = self.folder / artefact
        there = target.exists()
        parallel.wait()  # all have looked, rank 0 may write
        if there:
            say(f"{name}: {target} is there, skipped")
        elif ranks or parallel.RANK == 0:
            if self.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(self.device)
            self.log.begin(name)
            make(target)
            peak = peak_gb(self.device)
            seconds = self.log.note_time(name, **{"mem/peak_gb": peak})
            say(f"{name}: {seconds:.1f} s, peak memory {peak:.2f} GB\n")
        parallel.wait()
        (self.folder / f".{name}.state.safetensors").unlink(missing_ok=True)
        return target

    def has(self, *names):
        """Whether all these artefacts are there."""
        return all((self.folder / name).exists() for name in names)

    def validate(self, name, model):
        """The share of the validation rows that are right; of pairs the raw accuracy."""
        score = summary(self.evaluate(model, self.val, "validate"))["accuracy"]
        say(f"{name}: {score:.4f} of the validation rows right (of pairs: raw accuracy)")
        return score

    def report_change(self, name, optimizer, skipped):
        """Say how far the weights moved, and how many of them still differ in the model's dtype."""
        change, changed = 0.0, 0
        parts = optimizer.start.split(1 << 20), optimizer.master.split(1 << 20)
        for before, after in zip(*parts):  # whole copies would be the stage's peak
            after = after.cpu()
            change = max(change, float((after - before).abs().max()))
            changed += int((before.to(self.dtype) != after.to(self.dtype)).sum())
        share = changed / len(optimizer.start)
        warning = "" if share else "   <-- WARNING: no weight moved; raise the learning rate"
        say(f"{name}: {int(optimizer.steps)} steps, {skipped} skipped, largest weight change "
            f"{change:.3g}, {100 * share:.3g} % of the trained weights changed as {self.dtype}"
            f"{warning}")

    def encoded(self, rows, name):
        """A function: (prompt, responses) rows -> examples, without those that are dropped (and
        counted). It encodes when it is first called: a finished stage does not."""
        @functools.cache
        def encode():
            bar = progress(rows, f"read {name}", "row")
            examples = list(filter(None, starmap(self.encoder.example, bar)))
            self.report_dropped(name, len(examples))
            return examples

        return encode

    def report_dropped(self, name, usable):
        """Say what the encoder dropped or trimmed just now. Raises UserError if that was all."""
        report = self.encoder.report()
        if not usable:
            raise UserError(f"none of the {name} can be used; {report or 'there are none'}")
        if report:
            say(f"{name}: {usable} can be used; {report}")

    def evaluate(self, model, rows, label):
        """Greedy answers to tasks, margins of pairs; one dict a row."""
        items = evaluate(model, self.encoder, rows, self.cfg, label)
        self.report_dropped(f"{label} rows", len(items))
        return items


def load_mask(path, shapes=None):
    """A mask file -> {name: Selected}; with `shapes` held against a model's. Raises UserError."""
    tensors, metadata = load_tensors(path)
    with reading(path):
        own = {name: torch.Size(map(int, shape.split())) for name, shape in metadata.items()}
        mask = from_tensors(tensors, own)
    if shapes and own != shapes:
        raise UserError(f"{path}: a mask of another model, or none")
    if not any(map(len, mask.values())):
        raise UserError(f"{path}: the mask selects nothing")
    return mask


# ---- opening a run -----------------------------------------------------------------------------

def fingerprint(path):
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def record_of(run, model):
    """What makes a run, for its config.json: settings, files that it reads, the machine."""
    cfg = run.cfg
    data = map(Path, cfg.train + cfg.pairs + cfg.val + cfg.test)
    beside = [model.folder / name for name in ("config.json", *TOKENIZER_FILES)]
    files = {*data, *model.files.values(), *filter(Path.exists, beside)}
    return {"config": {key: value for key, value in vars(cfg).items() if key not in NO_MATTER},
            "inputs": {str(path): fingerprint(path) for path in sorted(files)},
            "machine": {"device": run.device.split(":")[0], "dtype": str(run.dtype),
                        "threads": torch.get_num_threads()}}


def check_folder(folder, record):
    """Raise UserError when --out holds anything but this run, or artefacts laid in for it."""
    path = folder / "config.json"
    known = read_if_there(path)
    if not known:
        for file in folder.glob("[!.]*"):
            if file.name not in ARTEFACTS:
                raise UserError(f"{folder}: holds {file.name}, not a run; choose another --out")
        return
    with reading(f"{path}: of an earlier version, or nothing of ours; choose another --out"):
        for key, values in record.items():
            for name in known[key] | values:
                before, now = known[key].get(name), values.get(name)
                if before == now:
                    continue
                if name != "threads":
                    raise UserError(f"{folder}: holds a run with another {name} ({before!r}, now "
                                    f"{now!r}); choose another --out")
                say(f"begun with {before} threads, now {now}: sums may round differently")


def claim_folder(run, record):
    """Make and lock the run folder, or go on in it; with --dry-run only look."""
    check_folder(run.folder, record)
    parallel.wait()  # all have looked, rank 0 may write
    if run.cfg.dry_run:
        return
    if parallel.RANK == 0:
        with reading(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
        lock(run.folder)
        if not run.has("config.json"):
            write_json(run.folder / "config.json", record)
        keep_whole(run.folder / "metrics.jsonl")  # before any rank reads it
    parallel.wait()
    run.log = Log(run.folder)


def open_run(cfg):
    """Config -> Run. Check what can be checked without training, then claim the run folder.

    Raises UserError for whatever would stop the run later.
    """
    device, dtype = pick_device(cfg.device, cfg.dtype)
    model = meta_model(find_folder(cfg.model or demo.FOLDER, download=not cfg.dry_run))
    rows = read_rows(cfg)
    encoder = encoder_for(model, cfg, sum(rows, []))
    encoder.rewrite_length = min(encoder.rewrite_length, model.config.max_position_embeddings,
                                 model.config.sliding_window)
    eos_ids(model, encoder)  # reads generation_config.json
    data = Path((cfg.pairs or cfg.train or ["demo"])[0]).stem
    folder = Path(cfg.out or f"runs/{data}-{cfg.seed}")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    style = {"prompt": encoder.style, "max_length": encoder.max_length}
    known = Config(**vars(cfg) | style)  # eval.py asks so
    run = Run(known, folder, Policy(model.folder), parallel.join(device), dtype, model.config,
              shapes, encoder, *rows)
    say(f"model: {cfg.model or 'the demo model'}, {run.parameters:,} weights, "
        f"{str(dtype).removeprefix('torch.')} on {run.device}; prompts: {encoder.style}"
        f"{unused_template(encoder, cfg.prompt)}")
    stored = read_tensor(model.files, "model.norm.weight").dtype
    if stored != dtype == torch.bfloat16:
        say(f"its file holds {stored}: all weights are rounded to {dtype} (--dtype fp32: none)")
    held = [row.sides for row in run.test + run.val if isinstance(row, Pair)]
    if held and not run.has("config.json"):  # else they were looked at
        run.encoded(held, "test and validation rows")()
    claim_folder(run, record_of(run, model))
    return run
