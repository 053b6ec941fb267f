"""What a run says at its end (the result table) and about its masks."""

import json
import math
import time
from pathlib import Path

from allo_mini.checkpoint import atomic_file, write_jsonl
from allo_mini.log import say, table
from allo_mini.mask import density_by, kind_of, layer_of, mask_hash, selected
from allo_mini.run import Run


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


def reprint(run: Run) -> bool:
    """A finished run prints its table again."""
    path = run.folder / "results.json"
    if path.exists():
        say(f"{run.folder}: this run is finished\n\n" + json.loads(path.read_text())["table"])
    return path.exists()


def finish(run: Run, models: dict[str, Path]) -> None:
    """Evaluate every model on the test rows, print the table, and say where everything is."""
    results, rows = {}, []
    for name, folder in models.items() if run.cfg.eval and run.test else ():
        path = run.folder / f"eval-{name}.jsonl"
        if path.exists():
            items = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        else:
            model = run.load(folder)
            began = time.monotonic()
            items = run.evaluate(model, run.test, f"test {name}")
            run.seconds[f"test {name}"] = time.monotonic() - began
            write_jsonl(path, items)
        results[name] = summary(items)
        rows.append(summary_row(name, results[name]))
    columns = ["model", "accuracy", "95 % interval", "rows"] + (["margin"] if rows and len(rows[0]) > 4 else [])
    text = table(columns, rows) if rows else "no test rows: nothing was evaluated (--test)"
    with atomic_file(run.folder / "results.json") as temporary:
        temporary.write_text(json.dumps({"models": {n: str(f) for n, f in models.items()}, "results": results,
                                         "table": text, "seconds": run.seconds}, indent=2) + "\n")
    spent = ", ".join(f"{name} {s:.0f}" for name, s in run.seconds.items())
    say(f"\n{text}\n\nseconds: {spent}")
    for name, folder in models.items():
        say(f"{name + ' model':>12}  {folder}")
    say(f"{'everything':>12}  {run.folder}/  (config.json, metrics.jsonl, masks, samples, pairs, eval-*.jsonl)")
