"""Evaluate a model: answers to the ten tasks or to own questions, log-probs of preference rows.

    python eval.py --model runs/demo-2023/improve --test rows.jsonl [more.jsonl ...] [--out results]
    python eval.py --model FOLDER --test rows.jsonl --against results     the difference of two
    python eval.py --model FOLDER --chat                                  talk with it

Every --test file gives a file of that name in --out: a line a row, with the answer and whether it
is right. Of alpaca_eval and arena_hard prompts it holds answers alone, which their own tools judge.
"""

import sys
from pathlib import Path

from allo_mini import UserError
from allo_mini.checkpoint import load_model
from allo_mini.data.rows import Task, is_pairs, read_pairs, text_of, turns_of
from allo_mini.evaluation.answers import COLUMNS, bootstrap, evaluate, respond, summary, summary_row
from allo_mini.evaluation.graders import JUDGED, RULES, task_name
from allo_mini.run.config import KNOBS, Config, Parser, add_flag, check
from allo_mini.run.device import pick_device
from allo_mini.run.files import read_if_there, read_jsonl, reading, write_jsonl
from allo_mini.run.inputs import encoder_for, read_questions, unused_template
from allo_mini.run.log import exit_code, say, table

OF_A_RUN = ("prompt", "max_length", "max_new_tokens", "stop")  # by default as the run had them


def make_parser():
    """The flags; those that train.py has too mean the same."""
    parser = Parser(allow_abbrev=False, description="grade a model, compare two, talk with one "
                    "(prompt, lengths and stop as in the model's run)")
    add = parser.add_argument
    add("--model", required=True, help="a folder or hub id")
    add("--patch", help="patch.safetensors of a run, put into the model")
    add("--test", nargs="+", default=[], help="files of questions or pairs, a table row each")
    add("--chat", action="store_true", help="talk with the model instead")
    add("--task", choices=(*RULES, *JUDGED, "generic"), help="for files whose names do not tell")
    add("--out", default="", help="folder for answers (of runs/RUN/STAGE: eval/RUN-STAGE)")
    add("--against", help="another model's --out: their difference, its interval, p (bootstrap)")
    add("--limit", type=int, default=0, help="rows of a file at most (0: all)")
    for name in (*OF_A_RUN, "sample_batch", "micro_tokens", "dtype", "device", "int8"):
        add_flag(parser, name)
    return parser


def settings_of(args, path):
    """The flags; what they leave out is as in the config.json of a run, where `path` is one."""
    run = read_if_there(path).get("config", {})
    values = {key: run[key] for key in OF_A_RUN if key in run}
    if values:
        say(f"as in {path}, where no flag says otherwise: {', '.join(values)}")
    values |= {key: value for key, value in vars(args).items() if key in KNOBS}
    check(values)
    return Config(**values)


# ---- files -----------------------------------------------------------------------------------

def read_rows(file, task):
    """(its task, rows) of a --test file; preferences are of no task, "". Raises UserError."""
    if is_pairs(file):
        return "", read_pairs([file])
    name = task_name(task or file)
    if name in JUDGED:
        return name, [Task(0, text_of(row, JUDGED[name], where)) for where, row in read_jsonl(file)]
    return name, read_questions([file], task)


def verdicts(path):
    """{question, prompt style, reference, rejected: whether the answer was right} of our file.

    Raises UserError.
    """
    with reading(f"{path}, which should hold answers that eval.py wrote"):
        return {f"{row['input']} {row['prompt']} {row.get('gold')} {row.get('rejected')}":
                bool(row["correct"]) for _, row in read_jsonl(path)}


def compare(target, theirs):
    """Cells of the table: our accuracy minus theirs over the questions both have."""
    ours = verdicts(target)
    both = ours.keys() & theirs
    if not both:
        raise UserError(f"{target}: has no question in common with the file --against it, asked in "
                        "the same style; say --prompt and --test as there (pairs graded by an "
                        "earlier version cannot be compared)")
    difference, low, high, p = bootstrap([ours[key] for key in both], [theirs[key] for key in both])
    return [f"{100 * difference:+.1f}", f"[{100 * low:+.1f}, {100 * high:+.1f}]", f"{p:.4f}",
            f"{len(both)}"]


# ---- work ------------------------------------------------------------------------------------

def talk(model, settings):
    """A conversation in the terminal; every answer is greedy and follows all that was said."""
    encoder = encoder_for(model, settings, [])
    messages = []
    sys.stdin.reconfigure(errors="replace")  # bytes that are no text
    say("an empty line begins anew, Ctrl-D ends")
    for text in map(str.strip, sys.stdin):
        if not text:
            messages = []
            continue
        messages += turns_of(text)
        [[(text, ended)]] = respond(model, encoder, [messages], settings)
        messages += turns_of(text, "assistant")
        say(text if ended else f"{text} ... (cut: --max-new-tokens, --max-length)")
        say(encoder.report())  # when the talk has outgrown --max-length


def grade(model, settings, jobs):
    """Answer the rows of every file, write the answers, and print the table."""
    lines = []
    for target, (task, rows, theirs) in jobs.items():
        rows = rows[:settings.limit or None]
        encoder = encoder_for(model, settings, [] if task in JUDGED else rows)
        items = evaluate(model, encoder, rows, settings, target.stem)
        if not items:
            raise UserError(f"{target.stem}: no row can be used; {encoder.report()}")
        say(f"{target}: {len(items)} rows, {encoder.report() or 'none dropped'}; prompts: "
            f"{encoder.style}{unused_template(encoder, settings.prompt)}")
        write_jsonl(target, items)
        if task not in JUDGED:
            row = summary_row(f"{target.name} ({task or 'generic'})", summary(items))
            lines.append(row + compare(target, theirs) if theirs else row)
    if lines:
        say("\n" + table(["file", *COLUMNS, "difference", "its interval", "p", "compared"], lines))


def run(args):
    """Read every --test file, then the model; grade it or talk with it."""
    if args.chat == bool(args.test):
        raise UserError("give one of --test FILES and --chat")
    source = Path(args.patch or args.model).resolve()
    settings = settings_of(args, source.parent / "config.json")
    jobs = {}  # file to write -> task, rows, verdicts on --against's answers
    for file in args.test:
        target = Path(args.out or f"eval/{source.parent.name}-{source.name}", Path(file).name)
        if target in jobs:
            raise UserError(f"two --test files would have their answers in {target}; rename one")
        if target.exists():
            raise UserError(f"{target}: holds answers already; choose another --out")
        theirs = args.against and verdicts(Path(args.against, target.name))
        jobs[target] = *read_rows(file, args.task), theirs
    device, dtype = pick_device(settings.device, settings.dtype)
    model = load_model(args.model, dtype, device, settings.int8, changes=filter(None, [args.patch]))
    if args.chat:
        talk(model, settings)
    grade(model, settings, jobs)


def main(argv=None):
    """The command."""
    return exit_code(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
