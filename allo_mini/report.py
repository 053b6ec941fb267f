"""What a run says at its end: the result table, and report.html, one file with everything there is to look at.

    python -m allo_mini.report RUN_FOLDER      writes RUN_FOLDER/report.html anew
"""

import itertools
import json
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from allo_mini import UserError, parallel
from allo_mini.checkpoint import open_safetensors
from allo_mini.config import SETTINGS
from allo_mini.data import Example, plain
from allo_mini.disk import remove, write_jsonl, write_text
from allo_mini.jsonio import read_json, read_jsonl
from allo_mini.log import say, table
from allo_mini.logprobs import score
from allo_mini.losses import useful_token_mask
from allo_mini.mask import density_by, kind_of, layer_of, mask_hash, selected
from allo_mini.run import Run

BIG = ("sft", *SETTINGS, "dpo", "movement.safetensors", "reward", "forget", "improve")  # as large as a model
SHOWN = 12  # negatives, and rows where the models differ
CHART = {"width": 300, "height": 110, "points": 240}  # plotting area in SVG units; more steps are averaged
CURVES = (("loss", ("loss",), ()),  # title, metrics, values the axis must hold
          ("rewards", ("rewards/margins", "rewards/chosen", "rewards/rejected"), (0.0,)),
          ("accuracy", ("rewards/accuracies", "eval/score"), (0.0, 1.0)))


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), as two numbers in 0..1."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959964, correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low, high = (centre - spread) / (1 + z * z / total), (centre + spread) / (1 + z * z / total)
    return max(0.0, low), min(1.0, high)  # rounding must not print -0.0


def summary(items: list[dict]) -> dict[str, float]:
    """Accuracy with its 95 % interval; for pairs the mean log-prob margin, for QA tasks the official grader's accuracy."""
    correct, n = sum(item["correct"] for item in items), len(items)
    low, high = wilson(correct, n)
    result = {"n": n, "correct": correct, "accuracy": correct / max(1, n), "low": low, "high": high}
    for key in ("margin", "official"):  # of preference rows; of the QA tasks, whose second grader it is
        if items and key in items[0]:
            result[key] = sum(item[key] for item in items) / n
    return result


def summary_row(name: str, s: dict[str, float]) -> list[str]:
    """One line of the result table."""
    return [name, f"{100 * s['accuracy']:.1f} %", f"[{100 * s['low']:.1f}, {100 * s['high']:.1f}]", str(s["n"]),
            *([f"{s['margin']:.2f}"] if "margin" in s else [])]


def describe_mask(run: Run, mask, percent: float) -> None:
    """Print the achieved density: in total, per kind of matrix and per layer."""
    total = selected(mask) / sum(m.numel() for m in mask.values())
    kinds, layers = density_by(mask, kind_of), density_by(mask, layer_of)
    run.log.note("locate", percent=percent, **{"mask/density": total}, kinds=kinds, layers=layers, hash=mask_hash(mask))
    say(f"mask: {selected(mask):,} weights, {100 * total:.3f} % (asked: {percent:g} %)")
    for label, groups in (("by kind ", kinds), ("by layer", layers)):
        say(f"  {label}  " + "  ".join(f"{name} {100 * share:.1f}" for name, share in groups.items()))


@contextmanager
def watch_tokens(run: Run, model, examples: list[Example]):
    """Record what improving, the block inside, does to a dozen of the negatives: token_examples.jsonl for the report.

    A row holds the question, the response's tokens as text, their weights and scores in forgetting, log pi/pi_ref
    after improving, and which of them the filter keeps then.
    """
    shown = [examples[int(i)] for i in np.linspace(0, len(examples) - 1, min(SHOWN, len(examples)))]
    t, (head, _, tail) = run.encoder.tokenizer, run.encoder.frame("\0").partition("\0")
    before = score(model, shown, run.cfg.micro_tokens)
    yield
    rows = []
    for e, [ref], [now] in zip(shown, before, score(model, shown, run.cfg.micro_tokens)):
        real = torch.ones(1, len(now), dtype=torch.bool)
        rows.append({"prompt": t.decode(e.prompt).removeprefix(head).removesuffix(tail),
                     "tokens": pieces(t, e.responses[0]), "weights": e.weights, "scores": e.scores,
                     "log_ratios": (now - ref).tolist(),
                     "kept": useful_token_mask(now[None], ref[None], real, run.cfg.epsilon)[0].tolist()})
    if not parallel.RANK:
        write_jsonl(run.folder / "token_examples.jsonl", rows)


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds; of a character made of several tokens, all of it comes with the last one."""
    texts = [tokenizer.inner.decode(ids[:n], skip_special_tokens=False).rstrip("\ufffd") for n in range(len(ids) + 1)]
    return [longer[len(text):] for text, longer in itertools.pairwise(texts)]


def reprint(run: Run) -> bool:
    """A finished run prints its table again."""
    path = run.folder / "results.json"
    if path.exists():
        say(f"{run.folder}: this run is finished\n\n" + str(read_json(path).get("table")))
        if not parallel.RANK:
            if not (run.folder / "report.html").exists():  # the run was stopped just before
                try_report(run.folder)
            prune(run)
    return path.exists()


def try_report(folder: Path) -> str:
    """Write report.html; returns its path or, for a run is not to fail over its report, why there is none."""
    try:
        return str(write_report(folder))
    except Exception as e:  # files of the folder that were changed by hand can break anything
        return f"could not be made ({' '.join(str(e).split())[:200]})"


def prune(run: Run) -> None:
    """A finished run keeps its last --keep big outputs; the same command with --restart makes the others again."""
    for state in run.folder.glob(".*.state.safetensors"):  # a run was killed between finishing a stage and saying so
        remove(state)
    there = [path for name in BIG if (path := run.folder / name).exists()]
    for path in there[:-run.cfg.keep] if run.cfg.keep else ():
        remove(path)
        say(f"--keep {run.cfg.keep}: deleted {path}")


def finish(run: Run, models: dict[str, Path]) -> None:
    """Evaluate every model on the test rows, print the table, and say where everything is."""
    results, rows = {}, []
    for name, folder in models.items() if run.cfg.eval and run.test else ():
        path = run.folder / f"eval-{name}.jsonl"
        if path.exists():
            items = [row for _, row in read_jsonl(path)]
        else:
            model = run.load(folder)
            began = time.monotonic()
            items = run.evaluate(model, run.test, f"test {name}")
            run.seconds[f"test {name}"] = time.monotonic() - began
            write_jsonl(path, items)
        try:
            results[name] = summary(items)
        except (LookupError, TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"{path}: holds no answers of ours ({e!r}); delete it to evaluate again") from None
        rows.append(summary_row(name, results[name]))
    columns = ["model", "accuracy", "95 % interval", "rows"] + (["margin"] if rows and len(rows[0]) > 4 else [])
    text = table(columns, rows) if rows else "no test rows: nothing was evaluated (--test)"
    final = json.dumps({"models": {n: str(f) for n, f in models.items()}, "results": results,
                        "table": text, "seconds": run.seconds}, indent=2)
    write_text(run.folder / "results.json", final + "\n")
    spent = ", ".join(f"{name} {s:.0f}" for name, s in run.seconds.items())
    say(f"\n{text}\n\nseconds: {spent}")
    for name, folder in models.items():
        say(f"{name + ' model':>12}  {folder}")
    say(f"{'report':>12}  {try_report(run.folder)}")
    say(f"{'everything':>12}  {run.folder}/  (config.json, metrics.jsonl, masks, samples, pairs, eval-*.jsonl)")
    prune(run)


# ---- report.html: each function reads the artefacts of one section and returns what the template shows ------

def mcnemar(first: list[bool], second: list[bool]) -> tuple[int, int, float]:
    """Rows right only in the first, only in the second, and the exact two-sided p of McNemar's paired test (1947)."""
    a, b = (sum(x and not y for x, y in pairs) for pairs in (zip(first, second), zip(second, first)))
    n = a + b
    chances = (math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
               for i in range(min(a, b) + 1))  # of i heads in n throws of a fair coin
    return a, b, min(1.0, 2 * sum(chances))


def compare(evals: dict[str, list[dict]]) -> list[tuple[str, str, int, int, float]]:
    """(later model, earlier model, mcnemar of them) for every pair of models with answers to the same rows."""
    right = {name: [item["correct"] for item in items] for name, items in evals.items()}
    return [(after, before, *mcnemar(right[after], right[before])) for before, after in itertools.combinations(right, 2)
            if len(right[after]) == len(right[before])]


def differing(evals: dict[str, list[dict]]) -> list[dict]:
    """A dozen rows on which the first and the last model differ: half of them won, half lost, where there are."""
    rows = [{"question": plain(said[0].get("input", said[0].get("prompt", ""))), "gold": said[0].get("gold"),
             "said": dict(zip(evals, said)), "change": said[-1]["correct"] - said[0]["correct"]}
            for said in zip(*evals.values()) if len(set(map(len, evals.values()))) == 1]
    won, lost = ([row for row in rows if row["change"] == sign] for sign in (1, -1))
    return won[:max(SHOWN // 2, SHOWN - len(lost))] + lost[:max(SHOWN // 2, SHOWN - len(won))]


def curves(steps: list[dict]) -> dict[str, list[dict]]:
    """Stage -> its charts, in the order the stages ran."""
    charts = {row["stage"]: [] for row in steps}
    for stage, (title, keys, bounds) in itertools.product(charts, CURVES):
        lines = {key: [(row["step"], row[key]) for row in steps if row["stage"] == stage
                       and isinstance(row.get(key), (int, float))] for key in keys}
        if any(lines.values()):
            charts[stage].append(chart(title, {key: points for key, points in lines.items() if points}, bounds))
    return charts


def chart(title: str, lines: dict[str, list[tuple[int, float]]], bounds: tuple[float, ...]) -> dict:
    """Lines of (step, value) -> polylines in the plotting area: the points, and their moving average over a tenth."""
    values = [*bounds, *(value for points in lines.values() for _, value in points)]
    low, high, last = min(values), max(values), max(points[-1][0] for points in lines.values())
    scale = np.array([CHART["width"] / max(1, last - 1), CHART["height"] / (low - high or -1)])

    def drawn(points):
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (np.array(points) - (1, high)) * scale)

    polylines = []
    for name, points in lines.items():
        raw = [part.mean(0) for part in np.array_split(points, min(len(points), CHART["points"]))]
        reach = len(raw) // 20
        smooth = [(x, np.mean(raw[max(0, i - reach):i + reach + 1], 0)[1]) for i, (x, _) in enumerate(raw)]
        polylines.append({"name": name, "raw": drawn(raw), "smooth": drawn(smooth), "ends": (points[0], points[-1])})
    return {"title": title, "low": low, "high": high, "steps": last, "lines": polylines}


def density(path: Path) -> dict:
    """Share of selected weights per matrix kind and layer ("all": together), counted on a mask file's packed bits."""
    counts = {}
    with open_safetensors(path) as f:
        for name, shape in json.loads(f.metadata()["shapes"]).items():
            ones = int(np.bitwise_count(f.get_tensor(name).numpy()).sum())  # the last byte's padding is zeros
            for key in itertools.product({kind_of(name), "all"}, {layer_of(name), "all"}):
                counts[key] = np.add(counts.get(key, 0), (ones, math.prod(shape)))
    shares = {key: hits / size for key, (hits, size) in counts.items()}
    shades = {key: 0.5 + 0.5 * math.log10(max(share, 1e-9) / shares["all", "all"]) for key, share in shares.items()}
    layers = sorted({layer for _, layer in counts if layer.isdigit()}, key=int)
    kinds = sorted({kind for kind, _ in counts} - {"all"}, key=[kind for kind, _ in counts].index)
    return {"name": path.name, "counts": counts, "shares": shares, "shades": shades, "layers": layers, "kinds": kinds}


def costs(notes: list[dict], steps: list[dict], seconds: dict[str, float]) -> dict[str, dict]:
    """Seconds, peak memory in GB and median tokens/s of every stage that was measured, then of the evaluations."""
    measured = {note["stage"]: note for note in notes if "seconds" in note}
    for name, note in measured.items():
        speeds = [row["tokens/s"] for row in steps if row["stage"] == name and "tokens/s" in row]
        measured[name] = {"seconds": note["seconds"], "gb": note["mem/peak_gb"], "speed": np.median(speeds or [0])}
    return measured | {name: {"seconds": s} for name, s in seconds.items() if name not in measured}


def write_report(folder: Path) -> Path:
    """Make report.html of what a run folder holds; sections whose files are missing are left out.

    Everything is escaped, and the page holds no script and loads nothing. Raises UserError for a folder that is no
    run's, or a broken file in it.
    """
    def rows(name):
        return [row for _, row in read_jsonl(folder / name)] if (folder / name).exists() else []

    written = read_json(folder / "config.json")
    if not isinstance(config := written.get("config"), dict):
        raise UserError(f"{folder}: no run folder: its config.json holds no settings of a run")
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    evals = {name: items for name in results.get("results", {}) if (items := rows(f"eval-{Path(name).name}.jsonl"))}
    logged, own_mask = rows("metrics.jsonl"), Path(config.get("mask") or "")
    steps, notes = ([row for row in logged if ("step" in row) == wanted] for wanted in (True, False))
    masks = [p for p in (folder / "mask-forget.safetensors", folder / "mask.safetensors", own_mask) if p.is_file()]
    environment = ImmutableSandboxedEnvironment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).render(
        name=folder.resolve().name, config=config, machine=written.get("machine", {}), results=results.get("results", {}),
        compared=compare(evals), differing=differing(evals), size=CHART, curves=curves(steps), notes=notes,
        costs=costs(notes, steps, results.get("seconds", {})), masks=[density(path) for path in masks],
        tokens_seen=rows("token_examples.jsonl"))
    write_text(folder / "report.html", page)
    return folder / "report.html"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(write_report(Path(sys.argv[1])))
    except Exception as e:  # files of the folder that were changed by hand can break anything
        print("error:", e if isinstance(e, UserError) else f"{sys.argv[1]}: cannot be shown: {e!r}", file=sys.stderr)
        sys.exit(2)
