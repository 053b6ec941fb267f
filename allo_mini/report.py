"""What a run says at its end: the result table, and report.html, one file with everything there is to look at.

    python -m allo_mini.report RUN_FOLDER      writes RUN_FOLDER/report.html anew
"""

import itertools
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from allo_mini import UserError, parallel
from allo_mini.config import HOME, SETTINGS
from allo_mini.data import Example, plain
from allo_mini.disk import read_json, read_jsonl, remove, write_jsonl, write_text
from allo_mini.files import EXACT, load_tensors
from allo_mini.log import say, table
from allo_mini.logprobs import score
from allo_mini.losses import useful_token_mask
from allo_mini.mask import PackedMask, kind_of, layer_of, mask_hash, overlap, selected
from allo_mini.run import Run

BIG = ("movement.safetensors", "reward", "sft", *SETTINGS, "dpo", "forget", "improve")  # as large as a model
SHOWN = 12  # negatives, and rows where the models differ
COLUMNS = ("accuracy", "95 % interval", "rows", "official", "margin")  # of the result table
CHART = {"width": 300, "height": 110, "points": 240}  # plotting area in SVG units; more steps are averaged
CURVES = (("loss", ("loss",), ()),  # title, metrics, values the axis must hold
          ("rewards", ("rewards/margins", "rewards/chosen", "rewards/rejected"), (0.0,)),
          ("accuracy", ("rewards/accuracies", "eval/score"), (0.0, 1.0)))


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), as two numbers in 0..1."""
    z = 1.959964
    centre = (correct + z * z / 2) / (total + z * z)
    spread = z * math.sqrt(correct * (total - correct) / max(1, total) + z * z / 4) / (total + z * z)
    return max(0.0, centre - spread), min(1.0, centre + spread)  # rounding must not print -0.0


def summary(items: list[dict]) -> dict[str, float]:
    """Accuracy with its 95 % interval; of pairs the mean log-prob margin, of QA tasks the official grader's too."""
    correct, n = sum(item["correct"] for item in items), len(items)
    low, high = wilson(correct, n)
    more = {key: fmean(item[key] for item in items) for key in ("margin", "official") if items and key in items[0]}
    return {"n": n, "correct": correct, "accuracy": correct / max(1, n), "low": low, "high": high, **more}


def summary_row(name: str, s: dict[str, float]) -> list[str]:
    """One line of the result table: the name, then COLUMNS, "-" for what was not measured."""
    return [name, f"{100 * s['accuracy']:.1f} %", f"[{100 * s['low']:.1f}, {100 * s['high']:.1f}]", str(s["n"]),
            f"{100 * s['official']:.1f} %" if "official" in s else "-", f"{s['margin']:.2f}" if "margin" in s else "-"]


def describe_mask(run: Run, mask: PackedMask, percent: float) -> None:
    """Print the achieved density: in total, per kind of matrix and per layer."""
    shares = density(mask)["shares"]
    total = shares.pop(("all", "all"))
    kinds = {kind: share for (kind, layer), share in shares.items() if layer == "all"}
    layers = {layer: share for (kind, layer), share in shares.items() if kind == "all"}
    layers = dict(sorted(layers.items(), key=lambda item: int(item[0]) if item[0].isdigit() else -1))
    run.log.note("locate", percent=percent, **{"mask/density": total}, kinds=kinds, layers=layers, hash=mask_hash(mask))
    say(f"mask: {selected(mask):,} weights, {100 * total:.3f} % (asked: {percent:g} %)")
    for label, groups in (("by kind, % ", kinds), ("by layer, %", layers)):
        say(f"  {label}  " + "  ".join(f"{name} {100 * share:.1f}" for name, share in groups.items()))


def describe_noise(run: Run, rule, movement: dict | None, gradient: dict, halves: list[dict], percent: float) -> None:
    """How far the location can be trusted: what masks of two kinds, or of two halves of the pairs, have in common.

    rule: locate.importance_mask, or what a fork has in its place.
    """
    pairs = {"movement_gradient": [movement, gradient] if movement else [], "halves": halves}
    shares = {name: overlap(*(rule(run, one, percent) for one in two)) for name, two in pairs.items() if two}
    for name, what in (("movement_gradient", "of movement and gradient masks"),
                       ("halves", "of gradient masks from two halves of the pairs")):
        if name in shares:
            say(f"overlap {what}: {100 * shares[name]:.1f} % (chance {percent:g} %)")
    run.log.note("locate", **{f"{name}_overlap": share for name, share in shares.items()})


@contextmanager
def watch_tokens(run: Run, model, examples: list[Example]):
    """Record what improving, the block inside, does to a dozen of the negatives: token_examples.jsonl for the report.

    A row holds the question, the response's tokens as text, their weights and scores in forgetting, log pi/pi_ref
    after improving, and which of them the filter keeps then.
    """
    shown = [examples[int(i)] for i in np.linspace(0, len(examples) - 1, min(SHOWN, len(examples)))]
    t = run.encoder.tokenizer
    head, tail = (t.decode(t.encode(part)) for part in run.encoder.frame("\0").partition("\0")[::2])
    before = score(model, shown, run.cfg.micro_tokens)
    yield
    rows = []
    for e, [ref], [now] in zip(shown, before, score(model, shown, run.cfg.micro_tokens)):
        [kept] = useful_token_mask(now[None], ref[None], torch.ones_like(now[None]).bool(), run.cfg.epsilon)
        trimmed = "... " if len(e.prompt) + len(e.responses[0]) >= run.encoder.max_length else ""
        rows.append({"prompt": trimmed + t.decode(e.prompt).removeprefix(head).removesuffix(tail),
                     "tokens": pieces(t, e.responses[0]), "weights": e.weights, "scores": e.scores,
                     "log_ratios": (now - ref).tolist(), "kept": kept.tolist()})
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
        say(f"{run.folder}: this run is finished; its report is {run.folder / 'report.html'}\n\n"
            f"{read_json(path).get('table')}")
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
    if run.cfg.keep:
        remove(run.folder / EXACT)


def finish(run: Run, models: dict[str, Path]) -> None:
    """Evaluate every model on the test rows, print the table, and say where everything is."""
    results = {}
    for name, folder in models.items() if run.cfg.eval and run.test else ():
        path = run.folder / f"eval-{name}.jsonl"
        if not path.exists():
            label = f"test {name}"
            run.measured(label, lambda to: write_jsonl(to, run.evaluate(run.load(folder), run.test, label)), path)
        try:
            results[name] = summary([row for _, row in read_jsonl(path)])
        except (LookupError, TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"{path}: holds no answers of ours ({e!r}); delete it to evaluate again") from None
    rows = [summary_row(name, s) for name, s in results.items()]
    text = table(["model", *COLUMNS], rows) if rows else "no test rows: nothing was evaluated (--test)"
    final = json.dumps({"models": {n: str(f) for n, f in models.items()}, "results": results,
                        "table": text, "seconds": run.seconds}, indent=2)
    write_text(run.folder / "results.json", final.replace(HOME, '"~/') + "\n")
    say(f"{text}\n\nseconds: " + ", ".join(f"{name} {s:.0f}" for name, s in run.seconds.items()))
    for name, folder in models.items():
        say(f"{name + ' model':>12}  {folder}")
    say(f"{'report':>12}  {try_report(run.folder)}")
    say(f"{'everything':>12}  {run.folder}/")
    prune(run)


# ---- report.html: each function reads the artefacts of one section and returns what the template shows ------

def mcnemar(first: list[bool], second: list[bool]) -> tuple[int, int, float]:
    """Rows right only in the first, only in the second, and the exact two-sided p of McNemar's paired test (1947)."""
    a, b = (sum(x > y for x, y in zip(*sides)) for sides in ((first, second), (second, first)))
    ways = itertools.accumulate(range(min(a, b)), lambda c, i: c * (a + b - i) // (i + 1), initial=1)  # binomials
    return a, b, min(1.0, 2 * sum(ways) / 2**(a + b))


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
        own = [row for row in steps if row["stage"] == stage]
        lines = {key: points for key in keys if (points := [
            (row["step"], row[key]) for row in own if isinstance(row.get(key), float | int)])}
        if lines:
            charts[stage].append(chart(title, lines, bounds))
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
        ends = smooth[0][1], smooth[-1][1]
        polylines.append({"name": name, "raw": drawn(raw), "smooth": drawn(smooth), "ends": ends})
    ticks = [low + part * (high - low) for part in (0, 0.5, 1)]
    digits = next((n for n in range(2, 7) if len({f"{t:.{n}g}" for t in ticks}) == len({*ticks})), 7)
    return {"title": title, "ticks": [f"{t:.{digits}g}" for t in ticks], "steps": last, "lines": polylines}


def density(mask: PackedMask) -> dict:
    """Share of selected weights per (matrix kind, layer), either of which may be "all": together."""
    counts = {}
    for name, shape in mask.shapes.items():
        ones = int(np.bitwise_count(mask.bits[name].numpy()).sum())  # the last byte's padding is zeros
        for key in itertools.product((kind_of(name), "all"), (layer_of(name), "all")):
            counts[key] = np.add(counts.get(key, 0), (ones, math.prod(shape)))
    shares = {key: hits / size for key, (hits, size) in counts.items()}
    shades = {key: 0.5 + 0.5 * math.log10(max(share, 1e-9) / shares["all", "all"]) for key, share in shares.items()}
    layers = sorted({layer for _, layer in counts if layer.isdigit()}, key=int)
    kinds = sorted({kind for kind, _ in counts} - {"all"}, key=[kind for kind, _ in counts].index)
    return {"counts": counts, "shares": shares, "shades": shades, "layers": layers, "kinds": kinds}


def read_density(path: Path) -> dict:
    """density() of a mask file, and the file's name."""
    bits, metadata = load_tensors(path)
    return {"name": path.name, **density(PackedMask(bits, json.loads(metadata["shapes"])))}


def costs(notes: list[dict], steps: list[dict]) -> dict[str, dict]:
    """Seconds, peak memory in GB and median tokens/s of every stage and evaluation."""
    measured = {note["stage"]: note for note in notes if "seconds" in note}
    for name, note in measured.items():
        speeds = [row["tokens/s"] for row in steps if row["stage"] == name and "tokens/s" in row]
        measured[name] = {"seconds": note["seconds"], "gb": note.get("mem/peak_gb"), "speed": np.median(speeds or [0])}
    return measured


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
        name=folder.resolve().name, config=config, machine=written.get("machine", {}), notes=notes, size=CHART,
        results=results.get("results", {}), compared=compare(evals), differing=differing(evals), curves=curves(steps),
        costs=costs(notes, steps), masks=[read_density(path) for path in masks],
        tokens_seen=rows("token_examples.jsonl"))
    write_text(folder / "report.html", page)
    return folder / "report.html"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print(write_report(Path(sys.argv[1])))
    except Exception as e:  # files of the folder that were changed by hand can break anything
        print("error:", e if isinstance(e, UserError) else f"{sys.argv[1]}: cannot be shown: {e!r}", file=sys.stderr)
        sys.exit(2)
