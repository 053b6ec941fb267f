"""What a run says at its end, and what it records for report.html on the way."""

from allo_mini.evaluation.answers import COLUMNS, summary, summary_row
from allo_mini.evaluation.report import SHOWN, density, write_report
from allo_mini.logprobs import score
from allo_mini.losses import useful_token_mask
from allo_mini.run import parallel
from allo_mini.run.files import read_json, read_jsonl, reading, write_json, write_jsonl
from allo_mini.run.log import say, table


# run: a Run; before, after and what `models` holds: Policies, models on disk.

def describe_mask(run, mask, percent):
    """Print and log how many weights are selected."""
    selected, weights = density(mask)["all", "all"]
    say(f"mask: {selected:,} weights, {100 * selected / weights:.3f} % (asked: {percent:g} %)")
    run.log.write("locate", percent=percent, **{"mask/density": selected / weights})


def pieces(decode, ids):
    """The text that each token adds; a character of several tokens comes whole, with the last."""
    texts = []
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count], skip_special_tokens=False).rstrip("\ufffd")
        texts.append(text.removeprefix("".join(texts)))
    return texts


def record_tokens(run, before, after, examples):
    """Record in token_examples.jsonl what improving did to a dozen negatives at most.

    A row holds the prompt, the response's tokens as text, their weights and scores in forgetting,
    log pi/pi_ref after improving, and which of them the filter keeps then.
    """
    cfg, tokenizer = run.cfg, run.encoder.tokenizer
    shown = examples[::len(examples) // SHOWN + 1]

    def make(target):
        refs, logps = (score(run.load(p), shown, cfg.micro_tokens) for p in (before, after))
        rows = []
        for example, [ref], [now] in zip(shown, refs, logps):
            real = ref[None].isfinite()  # as all are
            useful = useful_token_mask(now[None], ref[None], real, cfg.epsilon)[0]
            rows.append({"prompt": tokenizer.decode(example.prompt),
                         "tokens": pieces(tokenizer.inner.decode, example.responses[0]),
                         "weights": example.weights, "scores": example.scores,
                         "log_ratios": (now - ref).tolist(), "kept": useful.tolist()})
        write_jsonl(target, rows)

    run.stage("tokens", "token_examples.jsonl", make)


def reprint(run):
    """Whether the run is finished; if so, its table is printed again."""
    path = run.folder / "results.json"
    if path.exists():
        say(f"{run.folder}: this run is finished\n\n{read_json(path).get('table')}")
    return path.exists()


def evaluated(run, name, policy):
    """A model's answers to the test rows."""
    def make(target):
        write_jsonl(target, run.evaluate(run.load(policy), run.test, f"test {name}"))

    path = run.stage(f"test {name}", f"eval-{name}.jsonl", make)
    return [row for _, row in read_jsonl(path)]


def summaries(run, models):
    """{model's name: summary of its answers}; of pairs with beta log pi/pi_start(y+) - the same
    of y- as the reward, pi_start being the model that all others began with."""
    answers = {name: evaluated(run, name, policy) for name, policy in models.items()}
    start, *others = answers.values()
    with reading(run.folder):
        for row, *tuned in zip(start, *others):
            for item in tuned if "margin" in row else ():
                item["reward"] = run.cfg.beta * (item["margin"] - row["margin"])
        return {name: summary(items) for name, items in answers.items()}


def finish(run, models):
    """Evaluate every model on the test rows, print the table, and say where everything is."""
    results = {}
    text = "nothing was evaluated: no --test rows, or --no-eval"
    if run.cfg.eval and run.test:
        results = summaries(run, models)
        text = table(["model", *COLUMNS], [summary_row(*result) for result in results.items()])
    if parallel.RANK > 0:
        return
    if run.test and not run.cfg.test:  # the demo's, or held out: for eval.py
        write_jsonl(run.folder / "test.jsonl", map(vars, run.test))
    folders = {name: str(policy.folder) for name, policy in models.items()}
    write_json(run.folder / "results.json", {
        "models": folders, "results": results, "table": text, "seconds": run.seconds})
    say(text + "\n")
    for name, folder in folders.items():
        say(f"{name:>10}  {folder}")
    say(f"    report  {write_report(run.folder)}\neverything  {run.folder}/")
