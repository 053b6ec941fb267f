"""DPO with TRL's DPOTrainer and with allo_mini side by side: pairs/s over steady steps, and peak memory.

    python tests/benchmarks/peer.py --model DIR --pairs FILE.jsonl [--batch 2] [--dtype bf16] [--json FILE]
    python tests/benchmarks/peer.py --shape llama-3.2-1b               random weights, pairs of the demo's problems

TRL is not one of our requirements: `pip install trl` beside them for this (from a local wheel where there is no index).
Both sides read the same rows in the same order as the same tokens, one forward and backward over the whole batch a step,
reference log-probs computed before the first step, the same length limit, clipping at 1, a tiny learning rate. Each
runs in a process of its own, in turns: ours, TRL, ours, TRL, ... Ours is run_stage() with the improving objective and a
random mask of --p percent; a further line has the full mask, so that one sees what the mask itself brings.

What TRL keeps is stated: with --trl-weights bf16 (what it does with a bf16 checkpoint) weights, gradients and both
moments are bf16, which cannot take a step of 5e-7; with fp32 it is mixed precision with bf16 autocast. Ours always has
fp32 masters, gradients and moments of the selected weights. Speed is the median of the turns, memory the highest: peak
resident memory of the whole process on a CPU (what it had before its model was read is printed), allocated on CUDA.
"""

import contextlib
import importlib.util
import io
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import (DTYPES, SHAPES, RandomMask, finish, fresh_process, gb, guarded, make_parser, median, memory_now,
                    peak_memory, random_folder, start, wait)

from allo_mini import UserError, demo
from allo_mini.checkpoint import find_folder, load_model, load_tokenizer
from allo_mini.config import parse
from allo_mini.data import Encoder, plain, read_pairs
from allo_mini.device import pick_device
from allo_mini.disk import write_jsonl
from allo_mini.inputs import style_of
from allo_mini.log import Log
from allo_mini.loop import dpo_objective, run_stage, steps_of
from allo_mini.pointwise import compile_pointwise
from allo_mini.run import Run

LR, BETA, SEED = 1e-9, 0.1, 2023


def usable_rows(args, folder: Path, count: int) -> list[dict]:
    """The first `count` pairs that are neither empty, identical nor longer than --max-length, as TRL reads them."""
    pairs = read_pairs(args.pairs)
    encoder = encoder_of(folder, args, pairs[0])
    rows = []
    for p in pairs:
        example = encoder.example(p.prompt, [p.chosen, p.rejected])
        if example and len(example.prompt) + max(map(len, example.responses)) < args.max_length and plain(p.prompt).strip():
            rows.append({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected})
    if len(rows) < count:
        raise UserError(f"{args.pairs}: {len(rows)} usable pairs, {count} are needed: lower --steps or --batch, or raise "
                        "--max-length")
    return rows[:count]


def made_pairs(file: Path, count: int) -> str:
    """`count` pairs of about a hundred tokens of prompt and one to two hundred of response, in the demo's words."""
    rng, rows = random.Random(SEED), []
    for _ in range(count):
        some = demo.problems(15, rng.random())
        rows.append({"prompt": " ".join(t.input for t in some[:3]),
                     **{side: "\n".join(t.output for t in rng.sample(some, rng.randint(3, 5))) for side in ("chosen", "rejected")}})
    write_jsonl(file, rows)
    return str(file)


def encoder_of(folder: Path, args, row) -> Encoder:
    return Encoder(load_tokenizer(folder, 10**9), style_of(args.prompt, [row]), args.max_length)


class Clock(Log):
    """Keeps what run_stage logs of every step, and when."""

    def __init__(self, device: str):
        super().__init__(None)
        self.device, self.at, self.losses, self.logps = device, [], [], []

    def step(self, stage, step, total, values, shown):
        wait(self.device)
        self.at.append(time.perf_counter())
        self.losses.append(values["loss"])
        self.logps.append(values["logps/chosen"])


def quiet() -> contextlib.ExitStack:
    """No progress bars, no lines of either side's own."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                   "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    return stack


def figures(device: str, batch: int, warm: int, began: float, at: list[float], losses, logps, libraries: int, **more) -> dict:
    """What both sides report. `began`: when the reference pass started; `at`: when each step ended."""
    steady = [b - a for a, b in zip(at, at[1:])][warm - 1:]
    peak = peak_memory(device)
    return {"pairs_per_s": batch * len(steady) / sum(steady), "peak_bytes": peak["allocated"],
            "reserved_bytes": peak["reserved"], "before_model_bytes": libraries, "seconds_before_second_step": at[0] - began,
            "losses": losses[:5], "logps_chosen": logps[:5], **more}


def ours(args, folder: str, rows: list[dict], batch: int, percent: float) -> dict | None:
    """run_stage over the rows; None when memory runs out."""
    with quiet(), tempfile.TemporaryDirectory() as temporary:
        cfg = parse(["--model", folder, "--pairs", args.pairs, "--dtype", args.dtype, "--max-length", str(args.max_length),
                     "--improve-batch", str(batch), "--micro-batch", str(batch), "--improve-lr", str(LR), "--state-bits",
                     str(args.state_bits), "--checkpoint-blocks", str(10**6 if args.checkpointing else 0),
                     "--seed", str(SEED), "--head-mb", str(args.head_mb)])
        (Path(temporary) / "config.json").write_text("{}")  # a run folder has one
        (device, dtype), libraries = pick_device(args.device, args.dtype), memory_now(args.device)
        if args.compile:
            compile_pointwise()
        pairs = read_pairs(args.pairs, 1)
        shapes = {n: p.shape for n, p in load_model(folder, dtype, "meta").named_parameters()}
        run = Run(cfg, Path(temporary), Path(folder), device, dtype, shapes, encoder_of(Path(folder), args, pairs[0]),
                  Clock(device))
        examples = run.encode(((r["prompt"], [r["chosen"], r["rejected"]]) for r in rows), "pairs")
        mask = RandomMask(shapes, percent, device) if percent < 100 else None
        model = run.load(Path(folder), mask)
        wait(device)
        began = time.perf_counter()
        try:
            optimizer = run_stage(run, "improve", model, examples, dpo_objective(BETA, 0.1), mask)
        except torch.OutOfMemoryError:
            return None
        log = run.log
        return figures(device, batch, args.warm, began, log.at, log.losses, log.logps, libraries, p=percent,
                       weights=args.dtype, optimizer=f"fp32 master and gradient, {args.state_bits}-bit moments, of "
                       f"{len(optimizer.master):,} selected weights")


def trl(args, folder: str, rows: list[dict], batch: int) -> dict | None:
    """DPOTrainer over the rows, in the order that run_stage takes them; None when memory runs out."""
    with quiet(), tempfile.TemporaryDirectory() as temporary:
        import transformers
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
        at, device = [], args.device

        class Stamp(transformers.TrainerCallback):
            def on_step_end(self, *_, **__):
                wait(device)
                at.append(time.perf_counter())

        order = [i for step in steps_of(len(rows), batch, 1, SEED) for i in step]
        config = DPOConfig(
            output_dir=temporary, per_device_train_batch_size=batch, max_steps=len(rows) // batch, learning_rate=LR, beta=BETA,
            max_length=args.max_length, precompute_ref_log_probs=True, train_sampling_strategy="sequential",
            bf16=args.dtype == "bf16", gradient_checkpointing=args.checkpointing, use_cpu=not device.startswith("cuda"),
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, max_grad_norm=1.0, seed=SEED,
            model_init_kwargs={"dtype": str(DTYPES[args.trl_weights]).removeprefix("torch.")})
        libraries = memory_now(device)
        began = time.perf_counter()
        try:
            trainer = DPOTrainer(model=folder, args=config, train_dataset=Dataset.from_list([rows[i] for i in order]),
                                 callbacks=[Stamp()])
            trainer.train()
        except torch.OutOfMemoryError:
            return None
        logs = [row for row in trainer.state.log_history if "loss" in row]
        moments = {str(v.dtype) for s in trainer.optimizer.state.values() for v in s.values() if v.dim()}
        return figures(device, batch, args.warm, began, at, [r["loss"] for r in logs],
                       [r.get("logps/chosen") for r in logs], libraries, optimizer=(
                           f"{type(trainer.optimizer).__name__} {config.optim}, moments {', '.join(sorted(moments))}"),
                       weights=str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
                       autocast="bf16" if args.dtype == "bf16" else None, precomputed_reference=trainer.precompute_ref_logps)


def in_turns(args, folder: str, batch: int) -> dict[str, dict | None]:
    """All sides at one batch size: the median speed and the highest peak of the turns."""
    rows = usable_rows(args, Path(folder), (args.warm + args.steps) * batch)
    sides = {"ours": (ours, args.p), "trl": (trl,), "ours_full_mask": (ours, 100.0)}
    found = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, (side, *extra) in sides.items():
            if name != "ours_full_mask" or not found[name]:
                found[name].append(fresh_process(side, args, folder, rows, batch, *extra))
    out = {}
    for name, turns in found.items():
        out[name] = None if None in turns else turns[0] | {
            "pairs_per_s": median([t["pairs_per_s"] for t in turns]), "turns": [t["pairs_per_s"] for t in turns],
            **{key: max(t[key] for t in turns) for key in ("peak_bytes", "reserved_bytes")}}
    return out


def ratio(a: dict | None, b: dict | None) -> dict | None:
    return {key: a[key] / b[key] for key in ("pairs_per_s", "peak_bytes")} if a and b else None


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--pairs", help="preference rows, JSONL")
    parser.add_argument("--shape", choices=SHAPES, help="in the place of both: random weights, pairs made on the spot")
    parser.add_argument("--batch", type=int, nargs="+", default=[2],
                        help="pairs a step; several: also each side's best of them is compared")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--trl-weights", choices=("bf16", "fp32"), help="default: as --dtype")
    parser.add_argument("--p", type=float, default=5.0, help="percent of the weights that our side trains")
    parser.add_argument("--state-bits", type=int, default=32, choices=(8, 32))
    parser.add_argument("--head-mb", type=int, default=256, help="as in train.py")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, on both sides")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the pointwise pieces of our side")
    parser.add_argument("--prompt", default="auto", choices=("auto", "none", "chat"))
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--warm", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    if missing := [m for m in ("trl", "transformers", "datasets") if not importlib.util.find_spec(m)]:
        raise UserError(f"{missing[0]} is not installed; for this comparison alone: pip install trl")
    if [bool(args.model), bool(args.pairs)] != [not args.shape] * 2:
        raise UserError("expected --model and --pairs, or --shape")
    start(args)
    args.trl_weights = args.trl_weights or args.dtype
    with tempfile.TemporaryDirectory() as temporary:
        if args.shape:
            args.model = str(random_folder(args.shape, DTYPES[args.trl_weights], Path(temporary, args.shape)))
            args.pairs = made_pairs(Path(temporary, "pairs.jsonl"), (args.warm + args.steps) * max(args.batch))
        show(args)


def show(args) -> None:
    """Measure, and print the table."""
    folder = str(find_folder(args.model))
    by_batch = {batch: in_turns(args, folder, batch) for batch in args.batch}
    rows, labels = [], {"ours": f"allo_mini, {args.p:g} % of the weights", "trl": f"TRL, {args.trl_weights} weights",
                        "ours_full_mask": "allo_mini, all weights"}
    for batch, sides in by_batch.items():
        for name, side in sides.items():
            rows.append([f"batch {batch}: {labels[name]}"] + ([
                f"{side['pairs_per_s']:.3f}", gb(side["peak_bytes"]), gb(side["before_model_bytes"]),
                " ".join(f"{x:.5f}" for x in side["losses"][:3]), " ".join(f"{x:.1f}" for x in side["logps_chosen"][:3])]
                if side else ["out of memory", "", "", "", ""]))
    first = by_batch[args.batch[0]]
    best = {name: max((s[name] for s in by_batch.values() if s[name]), key=lambda x: x["pairs_per_s"], default=None)
            for name in labels}
    result = {**first, "ratio": ratio(first["ours"], first["trl"]), "by_batch": by_batch,
              "best": {**{n: b and b["pairs_per_s"] for n, b in best.items()}, "ratio": ratio(best["ours"], best["trl"])}}
    notes = [f"{name}: weights {first[name]['weights']}; {first[name]['optimizer']}" for name in ("ours", "trl") if first[name]]
    if result["ratio"]:
        notes.append(f"allo_mini / TRL at batch {args.batch[0]}: {result['ratio']['pairs_per_s']:.2f} x pairs/s, "
                     f"{result['ratio']['peak_bytes']:.1%} of the peak memory")
    if len(args.batch) > 1 and result["best"]["ratio"]:
        notes.append(f"each at its best batch: {result['best']['ratio']['pairs_per_s']:.2f} x pairs/s")
    versions = {m: importlib.import_module("importlib.metadata").version(m) for m in ("trl", "transformers")}
    finish(args, ["DPO", "pairs/s", "peak GB", "(before the model)", "first losses", "first logps/chosen"], rows,
           [*notes, ", ".join(f"{k} {v}" for k, v in versions.items())], versions=versions, **result)


if __name__ == "__main__":
    sys.exit(guarded(main))
