"""Evaluate a model: answers to the ten tasks of allo_mini/tasks.py or to own task rows, log-probs of preference rows.

    python eval.py --model runs/demo-2023/improve --test rows.jsonl [more.jsonl ...] [--out results/] [--against other/]
    python eval.py --model runs/demo-2023/improve --chat

The same command again goes on where it was cut off, or prints its table again.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from allo_mini import UserError
from allo_mini.checkpoint import apply_patch, eos_ids, find_folder, load_model, load_tokenizer, shard_files
from allo_mini.config import Config, Parser, add_knob, check, check_together, flat, similar
from allo_mini.data import Encoder, Task, is_pairs, read_pairs, read_tasks, text_of
from allo_mini.device import pick_device
from allo_mini.disk import read_json, read_jsonl, rows_text, write_jsonl, write_text
from allo_mini.inputs import both_sides, need_answers, need_usable, style_of, unused_template
from allo_mini.log import exit_code, say, table
from allo_mini.report import COLUMNS, summary, summary_row
from allo_mini.tasks import JUDGED, RULES, evaluate, respond, task_name

SHARED = ("revision", "prompt", "max_length", "max_new_tokens", "sample_batch", "stop", "micro_tokens", "dtype",
          "device", "int8", "stream")  # flags that train.py has too
TASKS = (*RULES, *JUDGED, "generic")
PART = ".part.jsonl"  # ends the name of a per-item file that is still growing


def make_parser() -> Parser:
    """The flags; those that train.py has too mean the same and have the same defaults."""
    parser = Parser(prog="eval.py", allow_abbrev=False, argument_default="", description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="a folder or hub id; needed")
    patch_or_int8 = parser.add_mutually_exclusive_group()  # to int8 weights no patch can be applied
    patch_or_int8.add_argument("--patch", metavar="FILE", help="patch.safetensors of a run, put into the model; "
                       "not with --int8: apply it first, python -m allo_mini.checkpoint apply")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--test", nargs="+", metavar="FILE", help="JSONL files, one table row each")
    what.add_argument("--chat", action="store_true", help="talk with the model instead; its answers are greedy")
    parser.add_argument("--task", metavar="NAME", help=f"what the --test files hold: {', '.join(TASKS)} (default: "
                        "what each one's name says, generic if that is none of the ten tasks)")
    parser.add_argument("--out", metavar="FOLDER", help="for <file>.jsonl, one line per row, and for the judges' "
                        "files, in which its name is the model's (default: eval/RUN-STAGE of --model runs/RUN/STAGE, "
                        "eval/RUN-patch of --patch runs/RUN/patch.safetensors)")
    parser.add_argument("--against", metavar="FOLDER", help="--out of another model on the same files: shows the "
                        "difference with a 95 %% interval and p, by paired bootstrap")
    parser.add_argument("--limit", type=int, default=0, metavar="ROWS", help="of each file at most (0: all)")
    for name in SHARED:
        add_knob(patch_or_int8 if name == "int8" else parser, name, flat(Config())[name])
    return parser


def settings_of(args) -> Config:
    """The flags; for a patch or model out of a train.py run, its prompt style and lengths are the defaults."""
    given, written = vars(args), {}
    for path in (Path(file).resolve().parent / "config.json" for file in (args.patch, args.model) if file):
        found = read_json(path).get("config") if path.is_file() else None
        if isinstance(found, dict):
            written = found
            break
    own = {k: written[k] for k in ("prompt", "max_length", "max_new_tokens", "stop") if k in written and k not in given}
    check(own, str(path))
    if shown := ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in own.items() if v):
        say(f"as in {path}: {shown}")
    settings = Config(**own, **{k: given[k] for k in SHARED if k in given})
    check_together(settings)
    return settings


def read_rows(file: Path, args) -> tuple[str, list]:
    """(task, rows) of a --test file; the task of preference rows and of rows that are none of the ten is ""."""
    task = task_name(args.task or str(file))
    if is_pairs(file):
        return "", read_pairs(file, args.limit)
    if task in JUDGED:
        questions = [[text_of(row, key, where) for key in JUDGED[task]] for where, row in read_jsonl(file)]
        return task, [Task(i, q[0], None, None, source=task) for i, q in enumerate(questions[:args.limit or None])]
    return task, [replace(row, source=task) for row in need_answers(read_tasks([file], args.limit, False), task)]


def claim(out: Path, asked: dict[str, dict]) -> None:
    """Write into OUT/eval.json what each file's answers depend on; refuse when OUT has some that depend on else."""
    path = out / "eval.json"
    record = read_json(path) if os.path.isfile(path) else {}
    for name, mine in asked.items():
        target, old = out / name, record.get(name)
        if os.path.exists(target) or os.path.exists(target.with_suffix(PART)):
            if not isinstance(old, dict):
                raise UserError(f"{target}: exists already, and eval.py did not write it; choose another --out")
            if other := [k if k in ("model", "test file") else f"{k} ({old.get(k)!r}, now {v!r})"
                         for k, v in mine.items() if old.get(k) != v]:
                raise UserError(f"{target}: made with another {', another '.join(other)}; choose another --out")
    write_text(path, json.dumps({**record, **asked}, indent=2) + "\n")


def made_with(out: Path, name: str) -> dict:
    """What the answers of a file depend on, as `claim` has written it; {} where nobody has."""
    path = out / "eval.json"
    found = read_json(path).get(name) if path.exists() else None
    return found if isinstance(found, dict) else {}


def state_of(path: Path) -> list[int]:
    """Size and time of change: enough to notice that a file is another one, and quick on any size."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def verdicts(path: Path) -> dict[str, bool]:
    """Question -> whether its answer was right, from a file that eval.py wrote."""
    rows = [row for _, row in read_jsonl(path)]
    if not all(isinstance(row.get("correct"), bool) for row in rows):
        raise UserError(f"{path}: holds no graded answers; --against takes the --out folder of another model")
    return {key_of(row): row["correct"] for row in rows}


def key_of(row: dict) -> str:
    """The question of a task row, the prompt of a preference row."""
    return json.dumps(row.get("input", row.get("prompt")))


def bootstrap(mine: list[bool], theirs: list[bool], draws: int = 10_000, seed: int = 0) -> tuple[float, ...]:
    """Accuracy of `mine` - `theirs` on the same rows, low and high of its 95 % interval, two-sided p of no difference:
    the paired bootstrap (Koehn 2004).

    A row's difference is -1, 0 or 1, so resampling n rows is one multinomial draw of how often each occurs.
    """
    differences = np.subtract(mine, theirs, dtype=int)
    counts = np.random.default_rng(seed).multinomial(len(mine), [(differences == d).mean() for d in (-1, 0, 1)], draws)
    means = (counts[:, 2] - counts[:, 0]) / len(mine)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return differences.mean(), *np.quantile(means, [0.025, 0.975]), min(1.0, 2 * (tail + 1) / (draws + 1))


def compare(path: Path, folder: Path) -> list[str]:
    """Table row: accuracy here minus accuracy in the other folder over the questions that both have, interval and p."""
    mine, theirs = verdicts(path), verdicts(folder / path.name)
    here, there = (made_with(out, path.name) for out in (path.parent, folder))
    matter = ["task", "prompt", "max_length", "dtype", "int8"]
    if "response" in next(read_jsonl(path))[1]:
        matter += ["max_new_tokens", "stop"]
    if other := [f"{k} ({here[k]!r}, there {there[k]!r})" for k in matter
                 if k in here and k in there and here[k] != there[k]]:
        say(f"{path.name}: WARNING: compared with answers that were made with another {', another '.join(other)}")
    both = [key for key in mine if key in theirs]
    difference, low, high, p = bootstrap([mine[key] for key in both], [theirs[key] for key in both])
    return [path.name, f"{100 * difference:+.1f}", f"[{100 * low:+.1f}, {100 * high:+.1f}]", f"{p:.4f}", str(len(both))]


def write_for_judges(task: str, file: Path, items: list[dict], folder: Path) -> None:
    """AlpacaEval's model_outputs.json (github.com/tatsu-lab/alpaca_eval), or Arena-Hard's answers as now and as in
    2024 (github.com/lmarena/arena-hard-auto; its add_markdown_info.py prepares style control), in a folder beside
    the per-item file. Files that are there already stay."""
    both = [(row, item) for (_, row), item in zip(read_jsonl(file), items)]
    name, tstamp = folder.parent.name, time.time()
    if task == "alpaca_eval":
        rows = [{"dataset": r.get("dataset", ""), "instruction": r["instruction"], "output": i["response"],
                 "generator": name} for r, i in both]
        files = {"model_outputs.json": json.dumps(rows, ensure_ascii=False, indent=1) + "\n"}
    else:
        now = [{"uid": r["uid"], "ans_id": f"{name}-{r['uid']}", "model": name, "tstamp": tstamp, "messages": [
            {"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": {"answer": i["response"]}}]}
            for r, i in both]
        old = [{"question_id": r["uid"], "answer_id": f"{name}-{r['uid']}", "model_id": name, "tstamp": tstamp,
                "choices": [{"index": 0, "turns": [{"content": i["response"], "token_len": i["tokens"]}]}]}
               for r, i in both]
        files = {f"model_answer/{name}.jsonl": rows_text(now), f"model_answer_2024/{name}.jsonl": rows_text(old)}
    for path, text in files.items():
        if not (folder / path).exists():
            write_text(folder / path, text)
        say(f"{file}: for its judge: {folder / path}")


def encoder_for(tokenizer, settings: Config, rows=None) -> Encoder:
    """Prompts in the style that --prompt or graded rows ask for, else by the checkpoint's chat template if any."""
    auto = settings.prompt == "auto" and rows is None
    style = ("chat" if tokenizer.template else "alpaca") if auto else style_of(settings.prompt, rows)
    return Encoder(tokenizer, style, settings.max_length)


def talk(model, encoder: Encoder, settings: Config, eos: set[int]) -> None:
    """A conversation in the terminal; every answer is greedy and follows all that was said before."""
    print("/reset begins anew, an empty line ends\n> ", end="", flush=True)
    messages: list[dict] = []
    while line := sys.stdin.readline().strip():
        said = {"role": "user", "content": line.encode(errors="replace").decode()}  # bytes that are no text as "?"
        messages = [] if line == "/reset" else [*messages, said]
        if messages:
            [[(text, ended)]] = respond(model, encoder, [messages], settings, eos, temperature=0.0)
            messages.append({"role": "assistant", "content": text})
            print(text if ended else text + " ... (cut: --max-new-tokens, --max-length)")
            if encoder.report():
                print("(the talk has outgrown --max-length: its beginning is left out)")
        print("> ", end="", flush=True)


def answer(model, encoder: Encoder, rows: list, settings: Config, eos: set[int], target: Path) -> list[dict]:
    """The lines of a per-item file: read back if it is there, else made, going on where an earlier try was cut off."""
    part = target.with_suffix(PART)
    if not target.exists():
        write_jsonl(target, evaluate(model, encoder, rows, settings, eos, target.stem, part))
        if report := encoder.report():
            say(f"{target.stem}: {report}")
    part.unlink(missing_ok=True)
    return [row for _, row in read_jsonl(target)]


class Job(NamedTuple):
    """A --test file, its task ("": none of the ten) and rows, and where its answers go."""
    file: Path
    task: str
    rows: list
    target: Path


def jobs_of(args) -> list[Job]:
    """What there is to answer, read before the model, so that a bad file shows at once."""
    source = Path(os.path.abspath(Path(args.patch).with_suffix("") if args.patch else args.model))
    jobs, out = [], Path(args.out or "eval/" + "-".join(source.parts[-2:]))
    for file in map(Path, args.test or []):
        task, rows = read_rows(file, args)
        target = out / f"{file.stem}.jsonl"
        if any(job.target == target for job in jobs):
            raise UserError(f"{target}: two --test files would be answered in one file; rename one")
        other, compared = Path(args.against) / target.name, args.against and task not in JUDGED
        if compared and not verdicts(other).keys() & {key_of(vars(row)) for row in rows}:
            raise UserError(f"{other}: has no question in common with the --test file of that name")
        jobs.append(Job(file, task, rows, target))
    return jobs


def run(args) -> None:
    """Answer every --test file and print the table, or talk."""
    check({name: value for name, value in vars(args).items() if name in (*SHARED, "limit")})
    if not (args.model and (args.test or args.chat)):
        raise UserError("expected --model FOLDER, and --test FILE or --chat; see --help")
    if args.task not in ("", *TASKS):
        raise UserError(f"--task is {args.task}, expected one of {', '.join(TASKS)}{similar(args.task, TASKS)}")
    settings = settings_of(args)
    device, dtype = pick_device(settings.device, settings.dtype)
    jobs, folder = jobs_of(args), find_folder(args.model, settings.revision)
    model = load_model(str(folder), dtype, device, int8=settings.int8, stream=settings.stream)
    if args.patch:
        apply_patch(model, args.patch)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    settings = replace(settings, max_length=model.config.length(settings.max_length, str(folder / "config.json")))
    ends = eos_ids(model, tokenizer)
    if args.chat:
        encoder = encoder_for(tokenizer, settings)
        return talk(model, encoder, settings, {*ends, encoder.closing})
    encoders = [encoder_for(tokenizer, settings, None if job.task in JUDGED else job.rows) for job in jobs]
    for job, encoder in zip(jobs, encoders):
        say(f"{job.file}: {len(job.rows)} rows, prompts: {encoder.style}" + unused_template(encoder, settings.prompt))
        need_usable(encoder, both_sides(job.rows), str(job.file))
    read = [*sorted(set(shard_files(folder).values())), *([Path(args.patch)] if args.patch else [])]
    asked = {"model": [state_of(path) for path in read], **{k: getattr(settings, k) for k in SHARED if k != "stream"},
             "device": device, "dtype": str(dtype)}
    claim(jobs[0].target.parent, {job.target.name: {
        **asked, "prompt": encoder.style, "limit": args.limit, "task": job.task, "test file": state_of(job.file)}
        for job, encoder in zip(jobs, encoders)})
    lines = []
    for job, encoder in zip(jobs, encoders):
        began = time.monotonic()
        items = answer(model, encoder, job.rows, settings, {*ends, encoder.closing}, job.target)
        if job.task in JUDGED:
            write_for_judges(job.task, job.file, items, job.target.with_suffix(""))
        else:
            row = summary_row(f"{job.file.name} ({job.task or 'generic'})", summary(items))
            lines.append([*row, f"{time.monotonic() - began:.0f}"])
    if lines:
        say("\n" + table(["file", *COLUMNS, "seconds"], lines))
    if args.against:
        say(f"\nagainst {args.against}:\n" + table(["file", "difference", "95 % interval", "p", "rows"], [
            compare(job.target, Path(args.against)) for job in jobs if job.task not in JUDGED]))
    say("\noutputs: " + ", ".join(str(job.target) for job in jobs))


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
