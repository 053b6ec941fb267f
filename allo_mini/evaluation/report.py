"""report.html: one page with everything there is to look at, made of a run folder's files alone.

    python -m allo_mini.evaluation.report RUN_FOLDER      writes RUN_FOLDER/report.html anew

The functions here prepare what the template, report.html beside this file, lays out. A section
whose files are missing is left out. Everything is escaped; the page holds no script and loads
nothing.
"""

import sys
from collections import defaultdict
from itertools import combinations, product
from pathlib import Path

from jinja2 import Template

from allo_mini.evaluation.answers import bootstrap
from allo_mini.run.files import read_json, read_jsonl, reading, write_text
from allo_mini.run.folder import load_mask
from allo_mini.run.log import Log, exit_code

SHOWN = 12  # negatives, and rows where the models differ
POINTS = 150  # of a curve


def compare(evals):
    """(later model, earlier model, their paired test) for every two models; see `bootstrap`."""
    def right(name):
        return [row["correct"] for row in evals[name]]

    return [(later, earlier, bootstrap(right(later), right(earlier)))
            for earlier, later in combinations(evals, 2)]


def differing(evals):
    """A dozen rows' answers, one a model, where the last model differs from the first: half of them
    won, half lost."""
    def rows(change):
        return [row for row in zip(*evals.values())
                if row[-1]["correct"] - row[0]["correct"] == change][:SHOWN // 2]

    return rows(1) + rows(-1)


def curve(logged, stage, metric):
    """(step, value) of a stage's metric; of long stages every so-many-th step, with the last."""
    points = [(row["step"], row[metric]) for row in logged
              if row["stage"] == stage and metric in row]
    every = len(points) // POINTS + 1
    return points[(len(points) - 1) % every::every]


def density(mask):
    """(kind, layer) -> [how many weights are selected, of how many]; either may be "all".

    "model.layers.3.mlp.up_proj.weight" is of kind "up_proj", in layer "3"; what stands outside the
    layers has its kind ("embed_tokens") for a layer.
    """
    cells = defaultdict(lambda: [0, 0])
    for name, tensor in mask.items():
        words = name.split(".")
        layer = words[2 if words[1] == "layers" else -2]
        for cell in product((words[-2], "all"), (layer, "all")):
            cells[cell][0] += len(tensor)
            cells[cell][1] += tensor.shape.numel()
    return cells


def write_report(folder):
    """Make report.html of a run folder, and return its path.

    Raises UserError for a file that is broken or missing.
    """
    def rows(name):
        path = folder / name
        return [row for _, row in read_jsonl(path)] if path.exists() else []

    results = folder / "results.json"
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"),
                        autoescape=True, trim_blocks=True, lstrip_blocks=True)
    with reading(folder):
        results = read_json(results)["results"] if results.exists() else {}
        evals = {name: rows(f"eval-{name}.jsonl") for name in results}
        page = template.render(
            read_json(folder / "config.json"), name=folder.resolve().name, results=results,
            compared=compare(evals), differing=differing(evals), curve=curve,
            logged=Log.read(folder), examples=rows("token_examples.jsonl"),
            masks={path.name: density(load_mask(path))
                   for path in sorted(folder.glob("mask*.safetensors"))})
    target = folder / "report.html"
    write_text(target, page)
    return target


if __name__ == "__main__":
    sys.exit(exit_code(lambda: print(write_report(Path(*sys.argv[1:])))))
