"""The comparison: every method, the paper's empirical study and the ablations, over seeds, with tuned learning rates.

    python tests/benchmarks/reproduce.py OUT                                   the demo task
    python tests/benchmarks/reproduce.py OUT --name ecqa --model DIR --train FILE --val FILE --test FILE --share --more ...

OUT holds the runs; samples, masks and token weights of a seed are made once and serve all its cells (--share: those of
the first seed serve all seeds). A finished cell is one line of tests/benchmarks/results/NAME.jsonl, answers included,
and is never made again: kill it at any time, and call it again. Learning rates are chosen on the --tune seeds'
validation rows, as many for every method, and one more while the best stands at the end of a row of three or more. ALLO
has two, improving's and forgetting's: with several --ratios the best of those comes first, at the first of --allo-factors.
Writes NAME.md beside the lines.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from allo_mini.config import Config  # noqa: E402
from allo_mini.files import load_tensors, save_mask  # noqa: E402
from allo_mini.disk import read_json, read_jsonl  # noqa: E402
from allo_mini.log import say  # noqa: E402
from allo_mini.loop import resolve_stage  # noqa: E402
from allo_mini.mask import each_selected, pack_mask  # noqa: E402
from allo_mini.report import summary, write_report  # noqa: E402

ALLO = ["--method", "allo"]
OWN = "own rates"  # an ablation whose learning rates are tuned, as one more method, and not ALLO's
PARTS = {  # part -> cell -> flags
    "methods": {"start": ["--method", "dpo", "--max-steps", "1"], "+SFT": ["--method", "sft"], "RFT": ["--method", "rft"],
                "DPO": ["--method", "dpo"], "R-DPO": ["--method", "rdpo"], "IPO": ["--method", "ipo"],
                "BCO": ["--method", "bco"], "SimPO": ["--method", "simpo"], "NPO": ["--method", "npo"], "ALLO": ALLO},
    "empirical": {f"DPO, {name} 10 %": ["--method", "dpo", "--mask-source", source, "--p", "10"] for name, source in (
        ("top", "top"), ("last", "bottom"), ("random", "random"))},
    "ablations": {"ALLO, all weights": [*ALLO, "--mask-source", "none"],
                  "ALLO, all tokens of y-": [*ALLO, "--token-weights", "uniform"],
                  "ALLO, edit weights": [*ALLO, "--token-weights", "edit"],
                  "ALLO, no forgetting": [*ALLO, "--no-forget"], "ALLO, no token filter": [*ALLO, "--epsilon", "1"],
                  "ALLO, gradient location": [*ALLO, "--locate", "gradient"],
                  "ALLO, snr location": [*ALLO, "--locate", "snr"],
                  f"ALLO, no forgetting, {OWN}": [*ALLO, "--no-forget"],
                  f"ALLO, gradient location, {OWN}": [*ALLO, "--locate", "gradient"],
                  f"ALLO, all weights, {OWN}": [*ALLO, "--mask-source", "none"]}}
CURVES = ("loss", "rewards/margins", "rewards/accuracies")


def flags_of(cell: str) -> list[str]:
    return next(cells[cell] for cells in PARTS.values() if cell in cells)


def middle(cell: str, study) -> float:
    """The learning rate that --factors multiply: of improving in ALLO, see `setting`."""
    cell = "ALLO" if cell.startswith("ALLO") else cell
    if not study.model:  # the demo, whose model is far from what the defaults are made for
        return {"+SFT": 1.6e-4, "RFT": 1.6e-4, "NPO": 2e-5, "ALLO": 2e-5}.get(cell, 8e-5 if "%" in cell else 4e-5)
    stage = {"+SFT": "sft", "RFT": "sft", "ALLO": "improve"}.get(cell, "dpo")
    rate = resolve_stage(stage, Config().stages[stage], study.parameters, 1000).lr
    return rate * (2 if "%" in cell else 1)


def tuned_as(cell: str) -> str:
    """Whose rates a cell has: most ablations are ALLO, as tuned, with one thing changed."""
    return "ALLO" if cell.startswith("ALLO") and OWN not in cell else cell


def setting(cell: str, rate: float, ratio: float) -> list[str]:
    """Flags for a learning rate; for ALLO it is improving's, and forgetting has `ratio` times as much."""
    rate, stage = float(f"{rate:.3g}"), "sft" if cell in ("+SFT", "RFT") else "dpo"
    if cell.startswith("ALLO"):
        return ["--forget-lr", f"{rate * ratio:.3g}", "--improve-lr", f"{rate:g}"]
    return [f"--{stage}-lr", f"{rate:g}"]


class Study:
    """The grid's settings, its finished rows, and how long it still takes."""

    def __init__(self, args):
        self.__dict__.update(vars(args))
        self.file = args.rows or Path(__file__).parent / "results" / f"{args.name}.jsonl"
        self.done = [row for _, row in read_jsonl(self.file)] if self.file.exists() else []
        self.ratios, self.parameters = self.ratios or [0.1 if self.model else 4.0], 0
        if self.model:
            from allo_mini.checkpoint import load_model
            self.parameters = sum(p.numel() for p in load_model(self.model, torch.float32, "meta").parameters())
        self.began, self.made, self.left = time.monotonic(), 0, 0

    def find(self, part: str, cell: str, seed: int, flags=None) -> dict | None:
        return next((row for row in self.done if (row["part"], row["cell"], row["seed"]) == (part, cell, seed)
                     and (flags is None or row["setting"] == flags)), None)

    def data(self, seed: int, tuning: bool) -> list[str]:
        limit = ["--test-limit", str(self.val_limit if tuning else self.test_limit)]
        if not self.model:
            return ["--seed", str(seed), *limit, *self.more]
        return ["--seed", str(seed), "--model", self.model, "--train", self.train, *limit,
                "--test", self.val if tuning else self.test, *self.more]

    def base(self, seed: int) -> Path:
        """The run that makes a seed's samples, mask and token weights."""
        seed = [*self.tune, *self.seeds][0] if self.share else seed
        out = self.out / f"{self.name}-{seed}-base"
        if not (out / "results.json").exists():
            call([*self.data(seed, seed in self.tune), *ALLO, "--no-eval", "--keep", "1", "--out", str(out),
                  "--forget-epochs", "0.02", "--improve-epochs", "0.02"])  # what these two make is not used
        return out

    def moved_mask(self, seed: int, samples: Path, source: str) -> Path:
        """The 10 % that the warm-up moves most, or least; one warm-up serves both, and with --share all seeds."""
        owner = [*self.tune, *self.seeds][0] if self.share else seed
        path = self.out / f"{self.name}-{owner}-{source}-10.safetensors"
        if not path.exists():
            run = self.out / f"{self.name}-{owner}-moved"
            call([*self.data(owner, owner in self.tune), "--method", "dpo", "--mask-source", "top", "--p", "10", "--no-eval",
                  "--samples", str(samples), "--locate", "movement", "--dpo-epochs", "0.02", "--out", str(run)])
            movement = load_tensors(run / "movement.safetensors")[0]
            save_mask(pack_mask(each_selected(movement, 0.1, lowest=source == "bottom")), path)
        return path

    def cell(self, part: str, cell: str, seed: int, flags: list[str]) -> dict:
        """One finished row, made now if it is not there."""
        if row := self.find(part, cell, seed, flags):
            return row
        base, more = self.base(seed), list(flags_of(cell))
        more += ["--samples", str(base / "samples.jsonl")]
        if "allo" in more:
            own = {"--token-weights-file": "token_weights.jsonl"} if "--token-weights" not in more else {}
            own |= {"--mask": "mask.safetensors"} if not {"--mask-source", "--locate"} & set(more) else {}
            more += [word for flag, name in own.items() for word in (flag, str(base / name))]
        elif "%" in cell and "random" not in cell:
            source = more[more.index("--mask-source") + 1]
            more[more.index("--mask-source") + 1] = "top"  # of the mask given
            more += ["--mask", str(self.moved_mask(seed, base / "samples.jsonl", source))]
        began = time.monotonic()
        out = self.out / "-".join([self.name, str(seed), part, *cell.replace("%", "").replace(",", "").split(), *flags[1::2]])
        call([*self.data(seed, part == "tune"), *more, *flags, "--no-eval", "--keep", "1", "--out", str(out)])
        items = self.graded(cell, out, part == "tune")
        bits = "".join("01"[item["correct"]] for item in items)
        row = {"part": part, "cell": cell, "seed": seed, "setting": flags, "n": len(bits), "correct": f"{int('1' + bits, 2):x}",
               "accuracy": bits.count("1") / len(bits), "seconds": round(time.monotonic() - began), "curve": [] if part == "tune" else curve(out),
               "date": f"{date.today()}", "torch": torch.__version__, "python": platform.python_version(),
               "device": str(read_json(out / "config.json")["machine"])}
        self.done.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as f:
            f.write(json.dumps(row) + "\n")
        self.made, self.left = self.made + 1, max(0, self.left - 1)
        each = (time.monotonic() - self.began) / self.made
        say(f"\n=== {part}, seed {seed}, {cell} {' '.join(flags)}: {100 * row['accuracy']:.1f} %; {self.left} cells left, "
            f"about {each * self.left / 60:.0f} minutes\n")
        return row

    def graded(self, cell: str, out: Path, tuning: bool) -> list[dict]:
        """The answers of the one model that a cell is about; train.py would grade the one it began with, too."""
        models = list(read_json(out / "results.json")["models"].values())
        file = (self.val if tuning else self.test) if self.model else str(out / "test.jsonl")
        limit = str(self.val_limit if tuning else self.test_limit) if self.model else "0"
        at = self.more.index("--dtype") if "--dtype" in self.more else len(self.more)
        style = "auto" if self.model else "chat"
        if evaluation.main(["--model", models[0 if cell == "start" else -1], "--test", file, "--limit", limit, *self.more[at:at + 2],
                            "--out", str(out / "graded"), "--prompt", style, *self.lengths(out)]):
            raise SystemExit(1)
        return [row for _, row in read_jsonl(out / "graded" / f"{Path(file).stem}.jsonl")]

    def lengths(self, out: Path) -> list[str]:
        """The run's own limits, which eval.py knows only for models inside the run folder."""
        config = read_json(out / "config.json")["config"]
        return [word for key in ("max_length", "max_new_tokens") for word in (f"--{key.replace('_', '-')}", str(config[key]))]

    def tuned(self, cell: str) -> list[str]:
        """The best setting of a cell, by mean accuracy on the validation rows of the --tune seeds."""
        if cell == "start" or not self.tune:
            return []
        cell = tuned_as(cell)
        allo = cell == "ALLO"
        factors = self.allo_factors or self.factors if allo else self.factors
        rates, ratio = [middle(cell, self) * f for f in factors], self.ratios[0]
        if OWN in cell:
            forget, improve = (float(rate) for rate in self.tuned("ALLO")[1::2])
            ratio = forget / improve

        def score(rate, ratio):
            rows = [self.cell("tune", cell, seed, setting(cell, rate, ratio)) for seed in self.tune]
            return statistics.mean(row["accuracy"] for row in rows)

        if allo and len(self.ratios) > 1:
            ratio = max(self.ratios, key=lambda ratio: score(rates[0], ratio))
        scores = {}
        while True:
            scores |= {rate: score(rate, ratio) for rate in rates}
            best = max(scores, key=scores.get)
            more = best / 2 if best == min(scores) else best * 2 if best == max(scores) else None
            if more is None or self.allo_factors or not 3 <= len(scores) < len(factors) + 2:
                return setting(cell, best, ratio)
            rates = [more]


def call(argv: list[str]) -> None:
    if train.main(argv):
        raise SystemExit(1)


def curve(out: Path) -> list[dict]:
    """Step, loss, margin and accuracy of the last stage that trained."""
    rows = [row for _, row in read_jsonl(out / "metrics.jsonl") if "step" in row and "loss" in row]
    return [{"step": row["step"], **{key: round(row[key], 5) for key in CURVES if key in row}}
            for row in rows if row["stage"] == rows[-1]["stage"]]


def answers(row: dict) -> list[int]:
    """1 for every right answer, in the order of the test rows."""
    return [int(bit) for bit in f"{int(row['correct'], 16):b}"[1:]]


def paired(mine: list[dict], theirs: list[dict], shared: bool) -> tuple[float, float]:
    """Mean difference in accuracy and its two-sided p: z-test over questions, each averaged over the seeds that saw it."""
    by_question: dict = {}
    for a in mine:
        for b in theirs:
            if a["seed"] == b["seed"]:
                for i, (x, y) in enumerate(zip(answers(a), answers(b), strict=True)):
                    by_question.setdefault(i if shared else (a["seed"], i), []).append(x - y)
    means = [statistics.mean(values) for values in by_question.values()]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    difference = statistics.mean(means) if means else 0.0
    return difference, math.erfc(abs(difference) / error / math.sqrt(2)) if error else 1.0


def tables(study: Study) -> str:
    """Markdown: a table per part, every cell against DPO (ablations: against ALLO), then the loss curves at a glance."""
    out = []
    for part, cells in PARTS.items():
        base = "ALLO" if part == "ablations" else "DPO"
        finished = {cell: [row for row in study.done if row["part"] != "tune" and row["cell"] == cell]
                    for cell in ({} if part == "methods" else {"DPO": 0} | ({"ALLO": 0} if part == "ablations" else {})) | cells}
        lines = []
        for cell, rows in finished.items():
            if rows and any(finished[own] for own in cells):
                scores = [100 * row["accuracy"] for row in rows]
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                difference, p = paired(rows, finished[base], bool(study.model))
                lines.append(f"| {cell} | {' '.join(rows[0]['setting'])} | {statistics.mean(scores):.1f} +- {spread:.1f} | "
                             + ("- | - |" if cell == base else f"{100 * difference:+.1f} | {'< 1e-9' if p < 1e-9 else f'{p:.2g}'} |") + f" {len(rows)} |")
        if lines:
            out += [f"### {study.name}: {part}", "", "| | setting | accuracy in %, mean +- std over seeds | "
                    f"against {base} | p | seeds |",
                    "|---|---|---|---|---|---|", *lines, ""]
    curves = {cell: [row["curve"] for row in study.done if row["part"] != "tune" and row["cell"] == cell]
              for cell in ("DPO", *PARTS["empirical"])}
    if all(curves.values()):
        marks = (0.1, 0.25, 0.5, 0.75, 1.0)
        out += ["Training loss, mean of a tenth of the steps up to a share of them, over all seeds:", "",
                "| | " + " | ".join(f"{100 * m:.0f} %" for m in marks) + " |", "|---" * 6 + "|"]
        out += [f"| {cell} | " + " | ".join(f"{statistics.mean(loss_at(c, m) for c in many):.3f}" for m in marks) + " |"
                for cell, many in curves.items()]
    return "\n".join(out) + "\n"


def loss_at(points: list[dict], share: float) -> float:
    """Mean loss of the tenth of the steps that ends at `share` of them."""
    end = max(1, round(share * len(points)))
    return statistics.mean(p["loss"] for p in points[max(0, end - max(1, len(points) // 10)):end])


def page(study: Study) -> Path:
    """report.html of the study's first seed: its table with paired tests, and the curve of every cell."""
    folder = study.out / f"{study.name}-study"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in study.done if row["part"] != "tune" and row["seed"] == study.seeds[0]]
    write = {"config.json": {"config": {"study": study.name, "seed": study.seeds[0]}, "files": {}, "machine": {}}}
    notes = [{"stage": r["cell"], "rows": r["n"], "steps": len(r["curve"]), "batch": "", "lr": float((r["setting"] or [0, 0])[1]),
              "seconds": r["seconds"]} for r in rows]
    steps = [{"stage": r["cell"], **point} for r in rows for point in r["curve"]]
    write["results.json"] = {"results": {r["cell"]: summary([{"correct": bool(x)} for x in answers(r)]) for r in rows}, "models": {}}
    for name, value in write.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*notes, *steps]))
    return write_report(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tune", type=int, nargs="*", default=[11, 12], help="seeds to choose learning rates on")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0],
                        help="learning rates to try, as multiples of the middle one")
    parser.add_argument("--allo-factors", type=float, nargs="+", help="other ones for ALLO; then no row is prolonged")
    parser.add_argument("--ratios", type=float, nargs="+",
                        help="ALLO's forgetting rates to try, as multiples of improving's (default: 0.1 as in the official "
                             "scripts; in the demo, where nearly all there is to learn is a habit to forget, 4)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cells", nargs="+", help="only these")
    parser.add_argument("--model", default="")
    parser.add_argument("--train", default="")
    parser.add_argument("--val", default="", help="validation rows for --tune")
    parser.add_argument("--test", default="")
    parser.add_argument("--val-limit", type=int, default=500)
    parser.add_argument("--test-limit", type=int, default=0)
    parser.add_argument("--share", action="store_true", help="samples, mask and token weights of the first seed serve all")
    parser.add_argument("--rows", type=Path, help="file of finished cells")
    parser.add_argument("--table", action="store_true", help="print the tables of what is finished, and stop")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further train.py flags for every run")
    study = Study(parser.parse_args())
    todo = [(part, cell, seed) for seed in study.seeds  # a whole seed after the other: what is finished can be compared
            for part in study.parts for cell in PARTS[part] if not study.cells or cell in study.cells
            if not (study.share and cell == "start" and seed != study.seeds[0])]  # it depends on no seed there
    if not study.table:
        tuned_cells = {tuned_as(cell) for _, cell, _ in todo} - {"start"}
        made = sum(row["part"] == "tune" and row["cell"] in tuned_cells for row in study.done)
        tries = {"ALLO": len(study.allo_factors or study.factors) + len(study.ratios) - 1}
        study.left = max(0, sum(tries.get(cell, len(study.factors)) for cell in tuned_cells) * len(study.tune) - made) + sum(
            not study.find(*one) for one in todo)
        settings = {}
        for part, cell, seed in todo:
            settings[cell] = settings.get(cell) or study.tuned(cell)
            study.cell(part, cell, seed, settings[cell])
        say(f"report: {page(study)}")
    text = tables(study)
    study.file.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
