"""The comparison: every method, the paper's empirical study, ablations; over seeds, rates tuned.

    python tests/benchmarks/reproduce.py OUT                                       the demo task
    python tests/benchmarks/reproduce.py OUT --name ecqa --model DIR --train FILE --val FILE ...

OUT holds the runs; samples, masks and token weights of a seed serve all its cells (--share: of the
first seed all seeds). A finished cell is a line of tests/benchmarks/results/NAME.jsonl, tables are
NAME.md beside it; it is never made again: kill it at any time. Rates are chosen on --tune seeds'
validation rows, as many for every method, and one more while the best stands at the end of three or
more. ALLO has two: with several --ratios the best of those comes first.
"""

import argparse
import math
import platform
import re
import shutil
import sys
import time
from collections import defaultdict
from datetime import date
from itertools import permutations, product
from pathlib import Path
from statistics import mean, stdev, variance

import numpy as np
import torch
from common import Selected, UserError, exit_code, parse, train, write_json
from peer import dpo_trainer

import eval as evaluation
from allo_mini.checkpoint import find_folder, meta_model
from allo_mini.run.config import Config, from_file, schedule
from allo_mini.run.files import (append_rows, atomic, load_tensors, read_json, read_jsonl, remove,
                                 write_text)
from allo_mini.run.folder import load_mask, open_run
from allo_mini.run.log import Log, say

TEN = "--method dpo --masked --p 10"
OWN = "own rates"  # an ablation whose learning rates are tuned, as one more method, and not ALLO's
MASKED = "masked DPO"
LORA = "LoRA-DPO"  # TRL's and PEFT's (peer.py), the only cell that this project does not train
METHODS = {title: f"--method {name}" for name, (title, _) in train.BASELINES.items()}
CHANGES = {"all weights": "--p 100", "all tokens of y-": "--token-weights uniform",
           "edit weights": "--token-weights edit", "no forgetting": "--no-forget",
           "no token filter": "--epsilon 1", "gradient location": "--locate gradient",
           "snr location": "--locate snr", f"no forgetting, {OWN}": "--no-forget",
           f"gradient location, {OWN}": "--locate gradient", f"all weights, {OWN}": "--p 100"}
LOCATIONS = {f"{count} pairs": f"--locate-pairs {count}" for count in (64, 128, 256, 512)} | {
    f"p = {p} %": f"--p {p}" for p in (1, 2, 10, 20)} | {
    how: f"--locate {how}" for how in ("random", "movement")}
PARTS = {  # part -> cell -> flags
    "methods": {"start": "--method dpo --max-steps 1", **METHODS, "ALLO": "--method allo",
                MASKED: "--method dpo --masked",  # as its rows were made, with --lr-dpo
                LORA: "--method dpo"},
    "empirical": {"DPO, top 10 %": TEN, "DPO, last 10 %": TEN,
                  "DPO, random 10 %": f"{TEN} --locate random"},
    "ablations": {f"ALLO, {name}": f"--method allo {flags}" for name, flags in CHANGES.items()},
    "location": {f"{MASKED}, {name}": f"--method dpo --masked --locate snr {flags}"
                 for name, flags in LOCATIONS.items()}}
CELLS = {cell: flags for cells in PARTS.values() for cell, flags in cells.items()}
ABOVE = {"empirical": ["DPO"], "ablations": ["DPO", "ALLO"], "location": ["DPO", MASKED],
         "methods": []}  # part -> rows above its own; with the last one, or DPO, all are compared
DEMO_RATES = {"+SFT": 1.6e-4, "RFT": 1.6e-4, "NPO": 2e-5, "ALLO": 2e-5}
CURVES = ("step", "loss", "rewards/margins", "rewards/accuracies")
MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)  # shares of a stage's steps
RESULTS = Path(__file__).parent / "results"


def middle(cell: str, study) -> float:
    """The learning rate that --factors multiply: of improving in ALLO, see `setting`."""
    if cell == LORA:
        return 2e-4
    name = cell.partition(",")[0]
    if not study.model:  # the demo, whose model is far from what the defaults are made for
        return DEMO_RATES.get(name, 8e-5 if "%" in cell else 4e-5)
    stages = {"+SFT": "sft", "RFT": "sft", "ALLO": "improve", MASKED: "improve"}
    stage = stages.get(name, "dpo")
    model = meta_model(find_folder(study.model))
    rate = schedule(Config(), stage, sum(p.numel() for p in model.parameters()), 1000).lr
    return rate * (2 if "%" in cell else 1)


def setting(cell: str, rate: float, ratio: float) -> list[str]:
    """Flags for a rate; in ALLO it is improving's, and forgetting has `ratio` times as much."""
    rate = float(f"{rate:.3g}")
    if cell.startswith("ALLO"):
        return ["--lr-forget", f"{rate * ratio:.3g}", "--lr-improve", f"{rate:g}"]
    return ["--lr-sft" if cell in ("+SFT", "RFT") else "--lr-dpo", f"{rate:g}"]


class Study:
    """The grid's settings and its finished rows."""

    def __init__(self, args):
        self.__dict__.update(vars(args))
        self.file = args.rows or RESULTS / f"{args.name}.jsonl"
        self.done = [row for _, row in read_jsonl(self.file)] if self.file.exists() else []
        self.ratios = args.ratios or [0.1 if args.model else 4.0]  # the demo has a habit to forget
        self.settings = from_file(args.config) if args.config else {}
        self.bases = {}

    def argv(self, out: Path, seed: int, tuning: bool, flags: list[str]) -> list[str]:
        """Flags of a run; what has none goes into OUT.json."""
        limit, config = self.val_limit if tuning else self.test_limit, f"{out}.json"
        write_json(config, self.settings | {"test_limit": limit})
        rows = ["--train", self.train, "--test", self.val if tuning else self.test]
        data = ["--model", self.model, *rows] if self.model else []
        return [*data, "--seed", str(seed), *self.more, *flags, "--no-eval", "--out", str(out),
                "--config", config]

    def base(self, seed: int) -> tuple:
        """(run, its pairs) that makes a seed's samples, mask and token weights, once."""
        if self.share:
            seed = [*self.tune, *self.seeds][0]
        if seed not in self.bases:
            out = self.out / f"{self.name}-{seed}-base"
            run = open_run(parse(self.argv(out, seed, seed in self.tune, ["--method", "allo"])))
            train.sample(run, run.base)
            rows, negatives = train.preferences(run)
            pairs = run.encoded([(row.prompt, [row.chosen, row.rejected]) for row in rows], "pairs")
            train.locate(run, run.base, pairs)
            train.token_weights(run, run.base, negatives)
            remove(out / "rewriter")
            self.bases[seed] = run, pairs
        return self.bases[seed]

    def moved_mask(self, seed: int, last: bool) -> Path:
        """The 10 % that the warm-up moves most, or least: what the top 90 % leave."""
        run, pairs = self.base(seed)
        path = run.folder / f"{'last' if last else 'top'}-10.safetensors"
        if not path.exists():
            train.warmup(run, run.base, pairs)
            movement, _ = load_tensors(run.folder / train.MOVEMENT)
            mask = train.select(movement, 90 if last else 10, run.device)
            if last:
                mask = {name: Selected.from_dense(~most.dense()) for name, most in mask.items()}
            run.save_mask(mask, path)
        return path

    def shared(self, cell: str, seed: int) -> dict[str, Path]:
        """{name in the run folder: file} of what a cell does not make itself."""
        folder, flags = self.base(seed)[0].folder, CELLS[cell]
        files = {"samples.jsonl": folder / "samples.jsonl"}
        if flags == TEN:
            files["mask.safetensors"] = self.moved_mask(seed, last="last" in cell)
        if "allo" in flags:
            files["token_weights.jsonl"] = folder / "token_weights.jsonl"
        masked = "allo" in flags or "--masked" in flags
        if masked and "--p" not in flags and "--locate" not in flags:
            files["mask.safetensors"] = folder / "mask.safetensors"
        return {name: file for name, file in files.items() if file.exists()}

    def cell(self, part: str, cell: str, seed: int, flags: list[str]) -> dict:
        """One finished row, made now if it is not there."""
        for row in self.done:
            if [row["part"], row["cell"], row["seed"], row["setting"]] == [part, cell, seed, flags]:
                return row
        began, words = time.monotonic(), [part, *re.findall(r"[^\s%,]+", cell), *flags[1::2]]
        out = self.out / "-".join([self.name, str(seed), *words])
        for name, file in self.shared(cell, seed).items():
            if not (out / name).exists():
                with atomic(out / name) as temporary:
                    shutil.copyfile(file, temporary)
        argv = self.argv(out, seed, part == "tune", [*CELLS[cell].split(), *flags])
        if cell == LORA:
            self.train_lora(seed, parse(argv))
        elif train.main(argv):
            raise SystemExit(1)
        bits = "".join("01"[item["correct"]] for item in self.graded(cell, out))
        row = {"part": part, "cell": cell, "seed": seed, "setting": flags, "n": len(bits),
               "correct": f"{int('1' + bits, 2):x}", "accuracy": bits.count("1") / len(bits),
               "seconds": round(time.monotonic() - began), "date": str(date.today()),
               "curve": [] if part == "tune" or cell == LORA else curve(out),
               "torch": torch.__version__, "python": platform.python_version(),
               "device": str(read_json(out / "config.json")["machine"])}
        self.done.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_rows(self.file, [row])
        for path in out.iterdir():  # what is left to read is small
            kept = part == "location" and path.name == "mask.safetensors"  # for `overlaps`
            if path.suffix == ".safetensors" and not kept or (path / "config.json").exists():
                remove(path)
        say(f"\n=== {part}, seed {seed}, {cell} {' '.join(flags)}: {100 * row['accuracy']:.1f} %\n")
        return row

    def train_lora(self, seed: int, cfg) -> None:
        """The run folder cfg.out with a merged model, trained on the pairs that all cells have."""
        run, out = self.base(seed)[0], Path(cfg.out)
        frame, answer, rows = run.encoder.frame, run.encoder.answer, []
        for pair in train.preferences(run)[0]:
            framed = frame(pair.prompt)
            sides = {side: answer(pair.prompt, framed, getattr(pair, side))
                     for side in ("chosen", "rejected")}
            rows.append({"prompt": framed, **sides})
        plan = schedule(cfg, "dpo", run.parameters, len(rows))
        trainer = dpo_trainer(run.base.folder, rows, out / "trl", cfg.dtype, True, plan.batch,
                              learning_rate=plan.lr, warmup_steps=plan.warmup,
                              lr_scheduler_type="cosine", num_train_epochs=plan.epochs,
                              seed=cfg.seed, max_length=cfg.max_length, use_cpu=True)
        trainer.train()
        trainer.model.merge_and_unload().save_pretrained(out / "lora")
        trainer.processing_class.save_pretrained(out / "lora")
        machine = read_json(run.folder / "config.json")["machine"]
        write_json(out / "config.json", {"config": vars(cfg), "machine": machine})
        write_json(out / "results.json", {"models": {LORA: str(out / "lora")}})

    def graded(self, cell: str, out: Path) -> list[dict]:
        """Answers of the one model a cell is about; train.py would grade the first one, too."""
        settings = read_json(out / "config.json")["config"]
        models = list(read_json(out / "results.json")["models"].values())
        test = Path([*settings["test"], out / "test.jsonl"][0]).expanduser()
        argv = ["--model", models[0 if cell == "start" else -1], "--test", str(test), "--limit",
                str(settings["test_limit"]), "--out", str(out / "graded")]
        for key in ("prompt", "max_length", "max_new_tokens", "dtype", "device"):
            argv += ["--" + key.replace("_", "-"), str(settings[key])]
        remove(out / "graded")  # by a killed process
        if evaluation.main(argv):
            raise SystemExit(1)
        return [row for _, row in read_jsonl(out / "graded" / f"{test.stem}.jsonl")]

    def tuned(self, cell: str) -> list[str]:
        """A cell's best setting, by mean accuracy on the validation rows of the --tune seeds."""
        if cell == "start" or not self.tune:
            return []
        if cell.startswith("ALLO") and OWN not in cell:
            cell = "ALLO"  # an ablation is ALLO, as tuned, with one thing changed
        if "pairs" in cell:
            cell = MASKED  # so is a mask of other pairs; one of another size has its own rate
        allo = cell == "ALLO"
        factors = self.allo_factors if allo and self.allo_factors else self.factors
        rates, ratio = [middle(cell, self) * factor for factor in factors], self.ratios[0]
        if OWN in cell:
            forgetting, improving = map(float, self.tuned("ALLO")[1::2])
            ratio = forgetting / improving

        def score(rate, ratio):
            rows = [self.cell("tune", cell, seed, setting(cell, rate, ratio)) for seed in self.tune]
            return mean(row["accuracy"] for row in rows)

        if allo and len(self.ratios) > 1:
            ratio = max(self.ratios, key=lambda ratio: score(rates[0], ratio))
        scores = {}
        while True:
            scores |= {rate: score(rate, ratio) for rate in rates}
            best = max(scores, key=scores.get)
            inside = min(scores) < best < max(scores)
            if inside or self.allo_factors or not 3 <= len(scores) < len(factors) + 2:
                return setting(cell, best, ratio)
            rates = [best / 2 if best == min(scores) else best * 2]


def curve(out: Path) -> list[dict]:
    """Step, loss, margin and accuracy of the last stage that trained."""
    rows = [row for row in Log.read(out) if "step" in row]
    return [{key: round(row[key], 5) for key in CURVES if key in row}
            for row in rows if row["stage"] == rows[-1]["stage"]]


def answers(row: dict) -> list[int]:
    """1 for every right answer, in the order of the test rows."""
    return [int(bit) for bit in f"{int(row['correct'], 16):b}"[1:]]


def matched(mine: list[dict], theirs: list[dict], shared: bool) -> list[tuple[dict, dict]]:
    """Rows of the same seed; where all saw the same questions, each beside one start."""
    mine, theirs = (rows[:1] if shared and rows and rows[0]["cell"] == "start" else rows
                    for rows in (mine, theirs))
    return [(a, b) for a, b in product(mine, theirs)
            if a["seed"] == b["seed"] or shared and "start" in (a["cell"], b["cell"])]


def gains(pairs: list[tuple[dict, dict]], shared: bool) -> list[float]:
    """Difference in accuracy at each question, averaged over the seeds that saw it."""
    differences = defaultdict(list)
    for a, b in pairs:
        for i, (x, y) in enumerate(zip(answers(a), answers(b), strict=True)):
            differences[i if shared else (a["seed"], i)].append(x - y)
    return [mean(values) for values in differences.values()]


def t_test(difference: float, parts: list[tuple[float, int]]) -> float:
    """Two-sided p of a difference, by Student's t.

    Its variance is the sum of `parts`, (variance, degrees of freedom) each; the sum's degrees are
    Satterthwaite's. The density is added up over the angle a of t = sqrt(degrees) tan(a), where it
    is cos(a)^(degrees - 1) and the tails end at a right angle.
    """
    total = sum(part for part, _ in parts)
    if not total:
        return float(not difference)
    degrees = total**2 / sum(part**2 / free for part, free in parts)
    angles = np.linspace(0, math.pi / 2, 10**6, endpoint=False)
    heights = np.cos(angles) ** (degrees - 1)
    tail = angles >= math.atan(abs(difference) / math.sqrt(total * degrees))
    return heights[tail].sum() / heights.sum()


def spread(values: list[float]) -> tuple[float, int]:
    """Variance of their mean, its degrees of freedom; of one value nobody knows it."""
    return (variance(values) / len(values), len(values) - 1) if values[1:] else (0.0, 10**9)


def compared(sets: list[list[tuple[dict, dict]]], shared: bool) -> tuple[float, float]:
    """Two cells, their matched rows on each set of questions -> the difference of the sets' average
    accuracies, its p.

    Its variance is that between questions plus that between seeds, which is a little too much: how
    a run differs at each question is in both. Where seeds have their own questions (not shared) the
    seeds' holds the questions', and is no less.
    """
    difference, parts = 0.0, []
    for pairs in sets:
        means = gains(pairs, shared)
        difference += mean(means) / len(sets)
        both = [spread(means), spread([a["accuracy"] - b["accuracy"] for a, b in pairs])]
        variances, degrees = zip(*both)
        parts += both if shared else [(max(variances), min(degrees))]
    parts = [(part / len(sets) ** 2, free) for part, free in parts]
    return difference, t_test(difference, parts)


def against(sets: list[list[tuple[dict, dict]]], shared: bool) -> str:
    """Two cells of a table: a difference in points, its p; see `compared`."""
    if not all(sets):
        return "- | -"
    difference, p = compared(sets, shared)
    return f"{100 * difference:+.1f} | {'< 1e-9' if p < 1e-9 else f'{p:.2g}'}"


def accuracy(rows: list[dict]) -> str:
    """A cell's, in %: its mean over seeds and, of several, their standard deviation."""
    scores = [100 * row["accuracy"] for row in rows]
    return f"{mean(scores):.1f}" + (f" +- {stdev(scores):.1f}" if len(scores) > 1 else "")


def line(cell: str, rows: list[dict], base: list[dict], shared: bool) -> str:
    """A row of a table; `base`: the rows it is compared with."""
    versus = against([[] if rows is base else matched(rows, base, shared)], shared)
    flags = " ".join(rows[0]["setting"])
    return f"| {cell} | {flags} | {accuracy(rows)} | {versus} | {len(rows)} |"


def by_cell(rows: list[dict]) -> dict[str, list[dict]]:
    """Finished rows that are not of tuning, of a cell's latest setting."""
    latest, finished = {row["cell"]: row["setting"] for row in rows if row["part"] != "tune"}, {}
    for row in rows:
        if row["part"] != "tune" and row["setting"] == latest[row["cell"]]:
            finished.setdefault(row["cell"], []).append(row)
    return finished


def starts(finished: dict[str, list[dict]]) -> int:
    """How many sets of answers the start gave: one where all seeds have the same questions."""
    return len({row["correct"] for row in finished.get("start", [])})


def pooled(names: list[str], base: str) -> str:
    """Markdown: all cells' accuracies on these sets (a name of ours, or a file of rows); of those
    that all have the average of the sets and its difference to `base`. Raises UserError."""
    files = [Path(name) if name.endswith(".jsonl") else RESULTS / f"{name}.jsonl" for name in names]
    sets = [by_cell([row for _, row in read_jsonl(file)]) for file in files]
    if max(map(starts, sets)) > 1:
        raise UserError("--pool is for sets whose seeds share the questions and one start")
    head = ["", *(file.stem for file in files), "average", f"against {base}", "p"]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cell in PARTS["methods"]:
        found = [finished.get(cell, []) for finished in sets]
        average, versus = "", " | "
        if all(found):
            average = f"{100 * mean(mean(row['accuracy'] for row in rows) for rows in found):.1f}"
            both = [[] if cell == base else matched(rows, finished.get(base, []), True)
                    for rows, finished in zip(found, sets)]
            versus = against(both, True)
        if any(found):
            figures = " | ".join(accuracy(rows) if rows else "" for rows in found)
            text.append(f"| {cell} | {figures} | {average} | {versus} |")
    return "\n".join(text) + "\n"


def overlaps(study: Study) -> str:
    """Markdown: how much of a mask of the part "location" is in another, in %, mean over seeds."""
    masks, shares = {}, defaultdict(list)
    for path in sorted(study.out.glob(f"{study.name}-*-location-*/mask.safetensors")):
        seed, _, cell = path.parent.name[len(study.name) + 1:].partition("-location-")
        mask = load_mask(path)
        masks[seed, cell] = {name: selected.dense() for name, selected in mask.items()}
    for ((seed, cell), mine), ((another, other), theirs) in permutations(masks.items(), 2):
        both = sum(int((mine[name] & theirs[name]).sum()) for name in mine)
        size = sum(int(selected.sum()) for selected in mine.values())
        if seed == another:
            shares[cell, other].append(both / size)
        elif cell == other:
            shares[cell, "the same of another seed"].append(both / size)
    text = ["| of | also in | % |", "|---" * 3 + "|"]
    text += [f"| {one} | {other} | {100 * mean(values):.1f} |"
             for (one, other), values in shares.items()]
    return "\n".join(text) + "\n"


def tables(study: Study) -> str:
    """Markdown: a table a part, every cell against DPO (ablations: ALLO; or --against), the loss
    curves, the rates that were tried."""
    finished, text = by_cell(study.done), []
    shared = bool(study.model) or starts(finished) == 1
    for part, cells in PARTS.items():
        base = study.against or ["DPO", *ABOVE[part]][-1]
        if finished.keys() & cells:
            text += [f"### {study.name}: {part}", "", "| | setting | accuracy in %, mean +- std "
                     f"over seeds | against {base} | p | seeds |", "|---" * 6 + "|"]
            text += [line(cell, finished[cell], finished.get(base, []), shared)
                     for cell in (*ABOVE[part], *cells) if cell in finished]
            text.append("")
    curves = ("DPO", *PARTS["empirical"])
    if finished.keys() >= {*curves}:
        text += ["Training loss, mean of a tenth of the steps up to a share of them, over all "
                 "seeds:", "", "| | 10 % | 25 % | 50 % | 75 % | 100 % |", "|---" * 6 + "|"]
        for cell in curves:
            losses = [mean(loss_at(row["curve"], mark) for row in finished[cell]) for mark in MARKS]
            text.append(f"| {cell} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |")
        text.append("")
    return "\n".join([*text, *tuning(study.done)]) + "\n"


def tuning(rows: list[dict]) -> list[str]:
    """Lines of Markdown: what every setting scored on the validation rows, the best one in bold."""
    scores = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["part"] == "tune":
            rates = tuple(map(float, row["setting"][1::2]))
            scores[row["cell"]][rates].append(100 * row["accuracy"])
    if not scores:
        return []
    text = ["Accuracy in % on the validation rows by learning rate (of ALLO: forgetting's / "
            "improving's), mean over the seeds they were tuned on:", "", "| | |", "|---|---|"]
    for cell, found in scores.items():
        best = max(found, key=lambda rates: mean(found[rates]))
        shown = {rates: f"{' / '.join(map('{:g}'.format, rates))}: {mean(found[rates]):.1f}"
                 for rates in sorted(found, key=lambda rates: rates[::-1])}
        shown[best] = f"**{shown[best]}**"
        text.append(f"| {cell} | {', '.join(shown.values())} |")
    return text


def loss_at(points: list[dict], share: float) -> float:
    """Mean loss of the tenth of the steps that ends at `share` of them."""
    end = max(1, round(share * len(points)))
    first = max(0, end - max(1, len(points) // 10))
    return mean(point["loss"] for point in points[first:end])


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path)
    add("--name", default="demo")
    add("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5], help="none: only tune rates")
    add("--tune", type=int, nargs="*", default=[11, 12], help="seeds to choose learning rates on")
    add("--factors", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0],
        help="rates to try, as multiples of the middle one")
    add("--allo-factors", type=float, nargs="+", help="ALLO's; then no row is prolonged")
    add("--ratios", type=float, nargs="+", help="ALLO's forgetting rates to try, of improving's")
    add("--parts", nargs="+", choices=PARTS, default=["methods", "empirical", "ablations"])
    add("--cells", nargs="+", choices=CELLS, default=[c for c in CELLS if c != LORA],
        help="only these (all but LoRA-DPO, which needs trl and peft)")
    for flag in ("--model", "--train", "--val", "--test", "--config"):
        add(flag, help="as train.py's, but --val serves --tune; without --model the demo")
    add("--val-limit", type=int, default=500)
    add("--test-limit", type=int, default=0)
    add("--share", action="store_true", help="one seed's samples, mask and token weights for all")
    add("--rows", type=Path, help="file of finished cells")
    add("--table", action="store_true", help="print the tables of what is finished, and stop")
    add("--pool", nargs="+", metavar="NAME", help="print these sets' cells side by side, and stop")
    add("--against", choices=CELLS, help="compare with this cell, in tables that are printed alone")
    add("--more", nargs=argparse.REMAINDER, default=[], help="further train.py flags of every run")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.pool:
        print(pooled(args.pool, args.against or "DPO"))
        return
    study = Study(args)
    for flag in ("train", "test", *["val"] * bool(study.tune)):
        if study.model and not getattr(study, flag):
            raise UserError(f"--model needs --{flag} FILE as well")
    if not study.table:
        cells = [one for one in product(study.parts, study.cells) if one[1] in PARTS[one[0]]]
        settings = {cell: study.tuned(cell) for _, cell in cells}
        for seed, (part, cell) in product(study.seeds, cells):  # what is done can be compared
            if cell != "start" or not study.share or seed == study.seeds[0]:
                study.cell(part, cell, seed, settings[cell])
    text = tables(study)
    if not study.against:
        write_text(study.file.with_suffix(".md"), text)
    print(text + "\n" + overlaps(study) * ("location" in study.parts))


if __name__ == "__main__":
    sys.exit(exit_code(main))
