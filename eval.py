"""Evaluate a model on task rows (greedy answers, accuracy) or on preference rows (log-prob accuracy and margin).

    python eval.py --model runs/demo-2023/improve --test rows.jsonl [more.jsonl ...] [--out results/]
"""

import os
import sys
import time
from pathlib import Path

import torch

from allo_mini import UserError
from allo_mini.checkpoint import eos_ids, find_folder, load_model, load_tokenizer, write_jsonl
from allo_mini.config import Config, Parser, add_knob, check, number
from allo_mini.data import Encoder, is_pairs, read_pairs, read_tasks
from allo_mini.inputs import both_sides, need_usable, pick_device, style_of
from allo_mini.jsonio import read_json
from allo_mini.log import say, table
from allo_mini.report import summary, summary_row
from allo_mini.tasks import evaluate

SHARED = ("revision", "prompt", "max_length", "max_new_tokens", "sample_batch", "stop", "micro_tokens", "dtype", "device")


def make_parser() -> Parser:
    """The flags; those that train.py has too mean the same and have the same defaults."""
    parser = Parser(prog="eval.py", allow_abbrev=False, description="Greedy accuracy on task rows, or log-prob "
                    "accuracy and margin on preference rows, with 95 % intervals.")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a folder or hub id")
    parser.add_argument("--test", required=True, nargs="+", metavar="FILE", help="JSONL files, one table row each")
    parser.add_argument("--out", default="", metavar="FOLDER", help="for <file>.jsonl, one line per row "
                        "(default: eval/<model folder's name>)")
    parser.add_argument("--limit", type=number(int), default=0, metavar="ROWS", help="of each file at most (0: all)")
    for name in SHARED:
        add_knob(parser, name)
    return parser


def settings_of(args) -> Config:
    """The flags; for a model out of a train.py run, its prompt style and lengths are the defaults."""
    path, given = Path(args.model).resolve().parent / "config.json", vars(args)
    written = read_json(path).get("config", {}) if path.is_file() else {}
    own = {k: written[k] for k in ("prompt", "max_length", "max_new_tokens", "stop") if k in written and k not in given}
    check(own, str(path))
    if own:
        say(f"as in {path}: " + ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in own.items() if v))
    return Config(**own, **{k: given[k] for k in SHARED if k in given})


def run(args) -> None:
    check({name: value for name, value in vars(args).items() if name in (*SHARED, "limit")})
    settings, jobs = settings_of(args), []
    device, dtype = pick_device(settings.device, settings.dtype)
    out = Path(args.out or Path("eval") / Path(args.model).name)
    for file in args.test:  # read everything before the model: a bad file shows at once
        pairs, target = is_pairs(file), out / (Path(file).stem + ".jsonl")
        if os.path.exists(target) or target in [job[3] for job in jobs]:
            raise UserError(f"{target}: exists already, or two --test files have this name; choose another --out")
        rows = read_pairs(file, args.limit) if pairs else read_tasks([file], args.limit, False, need_answer=True)
        jobs.append((file, pairs, rows, target))
    folder = find_folder(args.model, settings.revision or None)
    model = load_model(str(folder), dtype, device)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    model.config.check_length(settings.max_length, str(folder / "config.json"))
    lines, saved, ends = [], [], eos_ids(model, tokenizer)
    encoders = [Encoder(tokenizer, style_of(settings.prompt, rows[0]), settings.max_length) for _, _, rows, _ in jobs]
    for encoder, (file, _, rows, _) in zip(encoders, jobs):
        need_usable(encoder, both_sides(rows), file)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror}") from None
    for encoder, (file, pairs, rows, target) in zip(encoders, jobs):
        began = time.monotonic()
        items = evaluate(model, encoder, rows, settings, {*ends, encoder.closing}, Path(file).name)
        if report := encoder.report():
            say(f"{file}: {report}")
        write_jsonl(target, items)
        saved.append(str(target))
        lines.append([*summary_row(Path(file).name, summary(items)), f"{time.monotonic() - began:.0f}"])
    for columns in (["seconds"], ["margin", "seconds"]):  # task files, then preference files
        if some := [line for line in lines if len(line) == 4 + len(columns)]:
            say("\n" + table(["file", "accuracy", "95 % interval", "rows", *columns], some))
    say("\noutputs: " + ", ".join(saved))


def main(argv: list[str] | None = None) -> int:
    try:
        run(make_parser().parse_args(sys.argv[1:] if argv is None else argv))
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: out of GPU memory: lower --sample-batch, --micro-tokens or --max-length", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
