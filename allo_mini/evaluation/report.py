"""What a run says at its end: its table, and report.html with everything there is to look at.

    python -m allo_mini.evaluation.report RUN_FOLDER      writes RUN_FOLDER/report.html anew

The page is made of a run folder's files alone; a section whose files are missing is left out. The
first functions here prepare what the template, report.html beside this file, lays out. Everything
is escaped; the page holds no script and loads nothing.
"""

import sys
from collections import defaultdict
from datetime import date
from itertools import combinations, product
from pathlib import Path

import torch
from jinja2 import Template
from tokenizers.decoders import DecodeStream

from allo_mini.evaluation.answers import COLUMNS, bootstrap, summary, summary_row
from allo_mini.logprobs import score
from allo_mini.losses import useful_token_mask
from allo_mini.run import parallel
from allo_mini.run.config import schedule, training_stages
from allo_mini.run.files import (read_if_there, read_json, reading, rows_if_there, rows_of,
                                 write_json, write_jsonl, write_text)
from allo_mini.run.folder import load_mask
from allo_mini.run.log import Log, exit_code, say, table

SHOWN = 12  # negatives, and rows where the models differ
TOKENS = "token_examples.jsonl"
CARD = """---
base_model: {base}
library_name: transformers
tags: [allo, preference-optimization]
# license: yours to say
---
# {name} of {base}

Trained on {data} by allo_mini (ALLO: https://arxiv.org/abs/2406.12606):
p = {p:g} % of the weights, peak rate {rate:g}, seed {seed}.

```
{text}
```
"""


def right_of(evals):
    """{model: whether each of its answers is right}; of a preference whether the margin is above
    that of the first model, which is left out."""
    start, *others = evals or [""]
    if not others or "margin" not in evals[start][0]:
        return {name: [row["correct"] for row in rows] for name, rows in evals.items()}
    before = [row["margin"] for row in evals[start]]
    return {name: [row["margin"] > old for row, old in zip(evals[name], before)] for name in others}


def compare(evals):
    """(later model, earlier model, their paired test) for every two models; see `bootstrap`."""
    right = right_of(evals)
    return [(b, a, bootstrap(right[b], right[a])) for a, b in combinations(right, 2)]


def verdict(evals):
    """The last model beside the one before it, in a sentence; "" where nothing can be said."""
    compared = compare(evals)
    if not compared:
        return ""
    later, earlier, (difference, _, _, p) = compared[-1]
    rows = len(evals[later])
    if p > 0.05:
        return f"{later} and {earlier}: no difference that {rows:,} rows can show (p = {p:.2g})."
    side = "above" if difference > 0 else "below"
    points = f"{100 * abs(difference):.1f} points {side} {earlier}"
    return f"{later} is {points} on {rows:,} rows (p = {p:.2g})."


def differing(evals):
    """A dozen rows' answers, one a model, where the last model differs from the first: half of them
    won, half lost."""
    rows = list(zip(*evals.values()))
    won = [row for row in rows if row[-1]["correct"] > row[0]["correct"]]
    lost = [row for row in rows if row[-1]["correct"] < row[0]["correct"]]
    return won[:SHOWN // 2] + lost[:SHOWN // 2]


def curve(logged, stage, metric):
    """(percent of the stage's steps, value) of a metric at every step."""
    steps = [row for row in logged if row["stage"] == stage and "step" in row]
    return [(100 * row["step"] / steps[-1]["step"], row[metric])
            for row in steps if metric in row]


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
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"),
                        autoescape=True, trim_blocks=True, lstrip_blocks=True)
    with reading(folder):
        about = read_if_there(folder / "results.json")
        evals = {name: rows_of(folder / f"eval-{name}.jsonl") for name in about.get("results", {})}
        masks = sorted(folder.glob("mask*.safetensors"))
        page = template.render(
            read_json(folder / "config.json"), name=folder.resolve().name,
            compared=compare(evals), differing=differing(evals), curve=curve,
            logged=Log.read(folder), examples=rows_if_there(folder / TOKENS), about=about,
            verdict=verdict(evals),
            masks={path.name: density(load_mask(path)) for path in masks})
    target = folder / "report.html"
    write_text(target, page)
    return target


# ---- at the end of a run, and on the way -------------------------------------------------------
# run: a Run; before, after and what `models` holds: Policies, models on disk.

def describe_mask(run, name, mask, percent):
    """Print and log how many weights are selected."""
    selected, weights = density(mask)["all", "all"]
    say(f"{name}: {selected:,} weights, {100 * selected / weights:.3f} % (asked: {percent:g} %)")
    run.log.write(name, percent=percent, **{"mask/density": selected / weights})


def pieces(tokenizer, ids):
    """The text that each token adds; a character of several tokens comes whole, with the last."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.inner, id) or "" for id in ids]


def record_tokens(run, before, after, examples):
    """Record in token_examples.jsonl what improving did to a dozen negatives at most.

    A row holds the prompt, the response's tokens as text, their weights and scores in forgetting,
    log pi/pi_ref after improving, and which of them the filter keeps then.
    """
    cfg = run.cfg
    tokenizer = run.encoder.tokenizer
    shown = examples[::len(examples) // SHOWN + 1]

    def make(target):
        refs, logps = (score(run.load(p), shown, cfg.micro_tokens) for p in (before, after))
        rows = []
        for example, [ref], [now] in zip(shown, refs, logps):
            real = ref[None].isfinite()  # as all are
            useful = useful_token_mask(now[None], ref[None], real, cfg.epsilon)[0]
            rows.append({"prompt": tokenizer.decode(example.prompt),
                         "tokens": pieces(tokenizer, example.responses[0]),
                         "weights": example.weights, "scores": example.scores,
                         "log_ratios": (now - ref).tolist(), "kept": useful.tolist()})
        write_jsonl(target, rows)

    run.stage("tokens", TOKENS, make)


def reprint(run):
    """Whether the run is finished; if so, what it said last is said again."""
    finished = run.has("results.json", "report.html")  # the page is written last
    if finished:
        said = read_json(run.folder / "results.json").get("said")
        say(f"{run.folder}: this run is finished\n\n{said}")
    return finished


def evaluated(run, name, policy):
    """A model's answers to the test rows; in 8 bits only if no stage had all weights exact."""
    whole = 100 in training_stages(run.cfg).values()

    def make(target):
        write_jsonl(target, run.evaluate(run.load(policy, training=whole), run.test,
                                         f"test {name}"))

    return rows_of(run.stage(f"test {name}", f"eval-{name}.jsonl", make))


def add_rewards(answers, beta):
    """Give answers to pairs beta log pi/pi_start(y+) - the same of y- as their reward, pi_start
    being the model that all others began with: they are right where it is > 0."""
    for row, *tuned in zip(*answers.values()):
        for item in tuned if "margin" in row else ():
            item["reward"] = beta * (item["margin"] - row["margin"])


def finish(run, models):
    """Evaluate every model on the test rows, print what came out, and say where everything is."""
    results = {}
    text = "nothing was evaluated: no --test rows, or --no-eval"
    if run.cfg.eval and run.test:
        answers = {name: evaluated(run, name, policy) for name, policy in models.items()}
        with reading(f"answers in {run.folder}"):
            add_rewards(answers, run.cfg.beta)
            results = {name: summary(items) for name, items in answers.items()}
            text = table(["model", *COLUMNS], [summary_row(*result) for result in results.items()])
            text = f"{verdict(answers)}\n\n{text}".strip()
    if parallel.RANK > 0:
        return
    test = " ".join(run.cfg.test) or run.folder / "test.jsonl"
    if run.test and not run.cfg.test:  # the demo's, or held out: for eval.py
        write_jsonl(test, map(vars, run.test))
    folders = {name: str(policy.folder) for name, policy in models.items()}
    lines = [text, ""]
    for name, folder in folders.items():
        lines.append(f"{name:>10}  {folder}")
        if Path(folder).parent == run.folder:
            write_text(f"{folder}/README.md", card(run, name, Path(folder).name, text))
    lines.append(f"    report  {run.folder / 'report.html'}\n")
    if run.test:
        lines.append(f"grade  {sys.executable} eval.py --model {folder} --test {test}")
    lines += [f"talk   {sys.executable} eval.py --model {folder} --chat",
              f"share  {Path(sys.executable).parent}/hf upload YOU/NAME {folder}"]
    said = "\n".join(lines)
    write_json(run.folder / "results.json", {
        "models": folders, "results": results, "table": text, "said": said,
        "seconds": run.log.seconds, "command": " ".join(sys.argv), "date": str(date.today()),
        "torch": torch.__version__})
    write_report(run.folder)
    say(said)


def card(run, name, stage, text):
    """The README.md of the folder of a stage's model: a model card, as the hub shows it.

    Of a base model on disk it names the last folder alone: the hub takes no paths.
    """
    cfg = run.cfg
    local = Path(cfg.model).is_dir()  # of the demo, too
    base = run.base.folder.resolve().name if local else cfg.model.partition("@")[0]
    data = ", ".join(Path(path).name for path in cfg.pairs + cfg.train) or "the demo's questions"
    rate = schedule(cfg, stage, run.parameters, 1).lr
    percent = training_stages(cfg).get(stage, cfg.p)  # of a fork's stage --p
    return CARD.format(base=base, name=name, data=data, p=percent, rate=rate, seed=cfg.seed,
                       text=text)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: print(write_report(Path(*sys.argv[1:])))))
