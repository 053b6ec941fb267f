"""Memory of every stage under every --memory setting: the planner's estimate against what was allocated.

    python tests/benchmarks/memory.py [--shape llama-2-7b ...] [--card 24gb 16gb 12gb 8gb] [--p 5 10] [--json FILE]

On CUDA each stage runs on a random model of the shape, one pair of 2x1024 tokens, under the card's hard cap
(23.0, 15.0, 11.0 or 7.0 GiB), in a process of its own, as many at a time as the caps leave room for (a process's peaks do
not depend on the others); allocated and reserved are the allocator's peaks, "host" is host memory, planned / resident
(with Python and torch). On a CPU, where no 7B model trains in minutes, a small shape runs with a micro-model's card,
and "allocated" is the sum of live tensors that a meter counted (meter.py): it checks the planner's formulas, and is no
measurement of a card.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Lock

from common import (DTYPES, SHAPES, RandomMask, finish, fresh_process, gb, guarded, make_parser, parse_config,
                    peak_memory, random_model, random_pairs, reset_peak, shape, shapes_of, start)

import torch

from allo_mini import UserError, memory, resume
from allo_mini.config import parse
from allo_mini.data import Example
from allo_mini.disk import append_rows, keep_whole, read_jsonl
from allo_mini.generate import sample
from allo_mini.device import peak_gb, pick_device
from allo_mini.locate import gradient_importance
from allo_mini.log import Log
from allo_mini.logprobs import score
from allo_mini.loop import dpo_objective, npo_objective, run_stage, sft_objective
from allo_mini.run import Run
from meter import Meter

SHAPES |= {"micro-wide": shape("LlamaForCausalLM", 8000, 1024, 2752, 4, 8, 8),
           "micro-vocabulary": shape("LlamaForCausalLM", 30000, 512, 1408, 6, 8, 2)}
SHOWN = ("int8", "stream", "state_bits", "offload", "checkpoint_blocks", "locate_groups")  # settings that a row names
RUNGS = ({}, {"checkpoint_blocks": 0}, {"int8": True}, {"int8": True, "state_bits": 8}, {"int8": True, "offload": "gradient"},
         {"int8": True, "stream": True})


class RandomRun(Run):
    """A run whose models are random ones of a shape, made on the device."""
    name: str = ""

    def load(self, folder, mask=None, **more):
        model = random_model(self.name, self.dtype, self.device, self.cfg.int8, mask, self.cfg.stream)
        model.head_bytes, model.checkpoint_blocks = self.cfg.head_mb << 20, max(0, self.cfg.checkpoint_blocks)
        return model


def settings(name: str, card: str, p: float, tokens: int):
    """The planner's choice for a shape and card; raises UserError when nothing fits."""
    cfg = parse(["--model", "x", "--train", "x", "--memory", card, "--sft", "--method", "allo", "--p", str(p),
                 "--max-length", str(tokens), "--max-new-tokens", str(tokens - 256), "--max-steps", "1"])
    return memory.plan(cfg, parse_config(SHAPES[name]), shapes_of(name))[0]


def one_or_none(name: str, stage: str, cfg, *more) -> dict:
    """one_stage, or, when memory runs out, a row that says so."""
    resume.need_room = lambda *_: None  # for checkpoints, of which one step writes none
    try:
        pick_device(more[1], more[0])
        return one_stage(name, stage, cfg, *more)
    except (torch.OutOfMemoryError, UserError) as e:
        return failed(name, stage, cfg, e)


def failed(name: str, stage: str, cfg, error) -> dict:
    return {"shape": name, "stage": stage, "memory": cfg.memory, "p": cfg.p, "failed": str(error)[:200]}


def one_stage(name: str, stage: str, cfg, dtype: str, device: str, tokens: int, cap: float = 0.0) -> dict:
    """Run a stage's work on one pair (or response, or batch of samples); estimate and peaks in bytes."""
    if device.startswith("cuda") and cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total), torch.device(device).index or 0)
    shapes, config, folder = shapes_of(name), parse_config(SHAPES[name]), Path(tempfile.mkdtemp())
    (folder / "config.json").write_text("{}")  # a run folder has one
    prompt, (a, b) = random_pairs(1, tokens, config.vocab_size)[0]
    pair, single = Example(prompt, [a, b]), Example(prompt, [a], [1.0] * len(a))
    examples = [single if stage in ("sft", "reward", "forget", "score") else pair]
    cfg = replace(cfg, micro_tokens=len(prompt) + len(a) + (len(b) if examples[0] is pair else 0))
    run = RandomRun(cfg, folder, folder, device, DTYPES[dtype], shapes, None, Log(None))
    run.name, percent = name, memory.percent_of(cfg, stage)
    mask = RandomMask(shapes, percent, device) if percent < 100 and stage in memory.TRAINING else None
    host = memory.host_bytes(stage, cfg, shapes, pinned=device.startswith("cuda"))
    on_disk = 4 * run.parameters * (stage == "locate")  # the gradients' file, which the meter takes for memory
    meter = nullcontext() if device.startswith("cuda") else Meter()
    reset_peak(device)
    with meter:
        if stage == "locate":
            gradient_importance(run, folder, examples, dpo_objective(0.1), snr=cfg.locate == "snr")
        elif stage == "sample":
            sample(run.load(folder), [prompt[:256]] * 2, cfg.sample_batch,
                   cfg.max_new_tokens if device.startswith("cuda") else 8, slots=cfg.sample_batch)
        elif stage == "score":
            score(run.load(folder), examples, cfg.micro_tokens)
        else:
            objective = {"forget": npo_objective(0.1), "improve": dpo_objective(0.1, 0.1)}.get(stage, sft_objective())
            run_stage(run, stage, run.load(folder, mask), examples, objective, mask)
    peaks = peak_memory(device) if device.startswith("cuda") else {
        "allocated": meter.peak - host - on_disk, "reserved": None}
    terms = memory.estimate(stage, cfg, config, shapes, DTYPES[dtype].itemsize, cfg.locate_groups or 1)
    return {"shape": name, "stage": stage, "memory": cfg.memory, "p": cfg.p, "terms": terms, **peaks,
            "host": host, "resident": int(peak_gb("cpu") * 1e9), "estimate": sum(terms.values()),
            "ratio": peaks["allocated"] / sum(terms.values())}


def in_processes(jobs: list[tuple], device: str, tokens: int, part: Path | None) -> list[dict]:
    """one_or_none of every job, several at a time. What has come out is said at once and kept in the file `part`, so
    that the same command after a kill makes the other rows alone."""
    total, disk, began = torch.cuda.get_device_properties(device).total_memory / 2**30, Lock(), time.monotonic()
    known = [row for _, row in read_jsonl(part)] if part and keep_whole(part) else []

    def one(job) -> dict:
        name, stage, cfg, dtype, cap = job
        for row in known:
            if (row["shape"], row["stage"], row["memory"], row["p"], row["tokens"]) == (name, stage, cfg.memory, cfg.p, tokens):
                return row
        with disk if stage == "locate" else nullcontext():  # the gradient's file has 4 bytes a weight
            try:
                row = fresh_process(one_or_none, name, stage, cfg, dtype, device, tokens, cap)
            except Exception as e:  # the process died, or CUDA did: the other rows are worth having all the same
                row = failed(name, stage, cfg, e)
        row["tokens"] = tokens
        if part and "failed" not in row:
            append_rows(part, [row])
        figures = f"FAILED: {row['failed']}" if "failed" in row else (
            f"{gb(row['allocated'])} GB allocated, {gb(row['reserved'])} reserved, {gb(row['estimate'])} estimated")
        print(f"{time.monotonic() - began:5.0f} s  {name}, {cfg.memory}, {cfg.p:g} %, {stage}: {figures}", flush=True)
        return row

    # 1 GiB: CUDA's own; no more than three, for the planner's stages ask how much memory of the card is free
    at_once = max(1, min(3, int(total / (1 + max((job[-1] for job in jobs), default=total)))))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // at_once)))  # of each process
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, jobs))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", nargs="+", default=None)
    parser.add_argument("--card", nargs="+", default=list(memory.CARDS), choices=tuple(memory.CARDS))
    parser.add_argument("--p", type=float, nargs="+", default=[5.0, 10.0])
    parser.add_argument("--tokens", type=int, default=1024, help="of each of a pair's two sequences")
    args = parser.parse_args()
    device, jobs, notes = start(args), [], []
    if device.startswith("cuda"):
        for name in args.shape or ("llama-2-7b", "llama-3-8b", "qwen2.5-7b"):
            for card, p in ((card, p) for card in args.card for p in args.p):
                try:
                    cfg = settings(name, card, p, args.tokens)
                    jobs += [(name, stage, cfg, "bf16", memory.CARDS[card]) for stage in memory.stages_of(cfg)
                             if not stage.endswith("-locate")]  # they are as locate
                except UserError as e:
                    notes.append(f"{name}, {card}, {p:g} %: refused: {e}")
        jobs.sort(key=lambda job: job[1] in ("forget", "reward"))  # last: they are as improve and sft
    else:
        base = parse(["--model", "x", "--train", "x", "--max-length", str(args.tokens), "--p-sft", "10", "--max-steps", "1"])
        for name in args.shape or ("micro-wide", "micro-vocabulary"):
            for rung in RUNGS:
                cfg = replace(base, **{"checkpoint_blocks": 99, "head_mb": 16, "locate_groups": 3, **rung})
                jobs += [(name, stage, cfg, "fp32", 0.0) for stage in ("improve", "forget", "locate", "score")]
    part = Path(f"{args.json}.part") if args.json else None
    done = in_processes(jobs, device, args.tokens, part) if device.startswith("cuda") else [
        one_stage(name, stage, cfg, dtype, device, args.tokens) for name, stage, cfg, dtype, _ in jobs]
    for row, (_, _, cfg, _, _) in zip(done, jobs):
        row["settings"] = {k: getattr(cfg, k) for k in SHOWN}
    rows = [[f"{d['shape']}, {d['stage']}", f"{d['memory'] or ' '.join(f'{k}={v}' for k, v in d['settings'].items())}",
             f"{d['p']:g}", *(["-", "failed", "-", "-", "-"] if "failed" in d else [
                 gb(d["estimate"]), gb(d["allocated"]), gb(d["reserved"]) if d["reserved"] else "-", f"{d['ratio']:.3f}",
                 f"{gb(d['host'])} / {gb(d['resident'])}" if d["reserved"] else "-"])] for d in done]
    notes += [f"{d['shape']}, {d['memory']}, {d['stage']}: {d['failed']}" for d in done if "failed" in d]
    if part and any("failed" in d for d in done):
        args.json = None
        notes.append(f"the same command makes the failed rows again; the others are kept in {part}")
    finish(args, ["GB", "settings", "p %", "estimate", "allocated" if device.startswith("cuda") else "metered", "reserved",
                  "of estimate", "host"], rows, notes, stages=done)
    if part and args.json:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
