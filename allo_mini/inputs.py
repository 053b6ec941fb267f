"""What a run stands on: rows, tokenizer, own files and the run folder, checked before the first stage starts."""

import hashlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import torch

from allo_mini import UserError, demo, memory, parallel
from allo_mini.checkpoint import TOKENIZER_FILES, eos_ids, find_folder, load_model, load_tokenizer, shard_files
from allo_mini.config import HOME, SETTINGS, Config, flat
from allo_mini.data import Encoder, Negative, Pair, Task, is_pairs, plain, read_pairs, read_tasks
from allo_mini.device import pick_device
from allo_mini.disk import lock, move_aside, open_bytes, read_json, write_jsonl, write_text
from allo_mini.files import load_mask, read_samples, read_weights
from allo_mini.log import Log, say
from allo_mini.pointwise import compile_pointwise
from allo_mini.run import Run
from allo_mini.tasks import gold_answer, is_correct
from allo_mini.tokenizer import Tokenizer

NOT_THE_RUN = ("dry_run", "out", "save_minutes", "restart", "keep", "revision")  # settings that change no result


# ---- the run folder ----------------------------------------------------------------------------------------

def fingerprints(cfg: Config, folders: list[Path]) -> dict[str, str]:
    """Path -> hash of all that the run reads: data, own artefacts, what counts in the models' folders."""
    files = {*cfg.train, *cfg.val, *cfg.test, *cfg.pairs, cfg.samples, cfg.mask, cfg.token_weights_file} - {""}
    for folder in folders:
        named = (folder / name for name in ("config.json", *TOKENIZER_FILES))
        files |= {str(path) for path in (*named, *shard_files(folder).values()) if path.exists()}
    prints = {}
    for file in sorted(files):
        with open_bytes(file) as f:
            prints[file] = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    return prints


def check_folder(folder: Path, mine: dict[str, dict], compare: bool = True) -> None:
    """Raise UserError when --out holds what is no run, or (with `compare`) a run that differs from `mine`: in what."""
    if os.path.lexists(folder) and not (folder.is_dir() and all(name[0] == "." for name in os.listdir(folder))):
        theirs = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        if not all(isinstance(theirs.get(part), dict) for part in mine):
            raise UserError(f"{folder}: is there already and is no run of ours; choose another --out")
        defaults = {key: value for key, value in flat(Config()).items() if key in mine["config"]}
        theirs["config"] = defaults | theirs["config"]  # which does not know the flags made since
        changed = [(part, key) for part in mine for key in {**theirs[part], **mine[part]}
                   if theirs[part].get(key) != mine[part].get(key)]
        said = [f"another {key} ({theirs[part].get(key)!r}, now {mine[part].get(key)!r})" for part, key in changed
                if part != "files"]
        # after a changed setting only files that both runs read are named: the others changed because of it
        read = theirs["files"].keys() & mine["files"].keys() if said else {**theirs["files"], **mine["files"]}
        said += [f"another content of {file}" for part, file in changed if part == "files" and file in read]
        if said and compare:
            raise UserError(f"{folder}: holds a run with {', '.join(said)}; choose another --out, or --restart")


def claim_folder(cfg: Config, folder: Path, models: list[Path], machine: dict[str, str | int]) -> None:
    """Make and lock the run folder, or find the same run in it; with --dry-run only look.

    Raises UserError when something else is there, or another process is at work in it.
    """
    if cfg.dry_run and not os.path.lexists(folder):
        return
    settings = {name: value for name, value in flat(cfg).items() if name not in NOT_THE_RUN}
    mine = {"config": settings, "files": fingerprints(cfg, models), "machine": machine}
    mine = json.loads(json.dumps(mine).replace(HOME, '"~/'))  # names of people stay out of the file
    if not parallel.RANK:
        check_folder(folder, mine, compare=not cfg.restart)
    if not (parallel.RANK or cfg.dry_run):
        lock(folder)
        if cfg.restart and (folder / "config.json").exists():
            say(f"--restart: what was {folder} is now {move_aside(folder)}")
            lock(folder)
        if not (folder / "config.json").exists():
            write_text(folder / "config.json", json.dumps(mine, indent=2) + "\n")
    parallel.wait()  # the other ranks find what rank 0 has made
    if not cfg.dry_run:
        check_folder(folder, mine)  # another process may have begun a run in between


# ---- rows --------------------------------------------------------------------------------------------------

def read_rows(cfg: Config) -> tuple[list[Task], list[Pair], list, list]:
    """(tasks, pairs, val, test) as the flags say; overlaps between train and test are dropped and counted.

    Raises UserError naming the line of a bad row, or when nothing is left to train on.
    """
    if not (cfg.train or cfg.pairs):
        tasks, val, test = demo.splits(cfg)
        return tasks, [], val, test
    tasks = read_tasks(cfg.train, need_output=cfg.sft or cfg.only_sft or not cfg.pairs)
    pairs = [p for path in cfg.pairs for p in read_pairs(path)]
    test, val = held_rows(cfg, "test"), held_rows(cfg, "val")
    main = pairs if cfg.pairs else tasks  # the list itself: what is cut off here is held out
    drop_held(tasks, [*test, *val], "training rows")
    drop_held(pairs, [*test, *val], "pairs")
    random.Random(f"{cfg.seed} rows").shuffle(main)
    if cfg.pairs and not test:  # a tenth of the pairs, at most 500, is held out for the table
        cut = max(1, min(500, len(main) // 10))
        test, main[:cut] = main[:cut], []
        say(f"{cut} of {cut + len(main)} pairs held out as test rows (--test FILE to bring your own)")
    if not val:
        cut = cfg.val_rows or (200 if cfg.eval_every else 0)
        val, main[:cut] = main[:cut], []
    if val:
        say(f"{len(val)} rows held out to validate on" + ("" if cfg.eval_every else ", which needs --eval-every STEPS"))
    drop_held(tasks, [*test, *val], "training rows")  # what has just been held out may stand in other rows too
    drop_held(pairs, [*test, *val], "pairs")
    for rows in (tasks, pairs):
        del rows[cfg.limit or len(rows):]
    if not main:
        raise UserError(f"{', '.join(cfg.train or cfg.pairs)}: no rows are left to train on")
    return tasks, pairs, val, test[:cfg.test_limit or None]


def held_rows(cfg: Config, flag: str) -> list[Task] | list[Pair]:
    """The rows of --test or --val: all of one kind, and preference rows in a --pairs run only. Raises UserError."""
    files = getattr(cfg, flag)
    kinds = {is_pairs(path) for path in files}
    if True in kinds and (False in kinds or not cfg.pairs):
        raise UserError(f"--{flag} holds preference rows ({', '.join(files)}); only a --pairs run takes them, "
                        "and then no others")
    if True in kinds:
        return [p for path in files for p in read_pairs(path)]
    return need_answers(read_tasks(files, need_output=False), flag=flag)


def need_answers(tasks: list[Task], task: str | None = None, flag: str = "test") -> list[Task]:
    """The rows, of the task that their file is named after or of `task`. Raises UserError for one without an answer."""
    for row in tasks:
        if not (gold_answer(row if task is None else replace(row, source=task)) or "").strip():
            raise UserError(f"{row.source}: a --{flag} row needs 'answer', or 'output' ending in \"The answer is X\"")
    return tasks


def drop_held(rows: list, held: list, name: str) -> None:
    """Take out of `rows` the questions that are in `held` too, and say how many."""
    before, keys = len(rows), {key_of(row) for row in held}
    rows[:] = [row for row in rows if key_of(row) not in keys]
    if before > len(rows):
        say(f"{before - len(rows)} {name} dropped: they are also test or validation rows")


def key_of(row) -> str:
    """What makes two rows the same question: of a Task its input, of a Pair or a Negative its prompt."""
    return (row.input if isinstance(row, Task) else plain(row.prompt)).strip()


def style_of(prompt: str, rows: list[Task | Pair]) -> str:
    """What --prompt says; for auto chat where any row is a conversation, for roles mean nothing in another style, else
    by the first row: alpaca for task rows and pairs made from them, none for strings."""
    if prompt != "auto":
        return prompt
    if any(isinstance(row, Pair) and isinstance(row.prompt, list) for row in rows):
        return "chat"
    return "alpaca" if isinstance(rows[0], Task) or rows[0].task is not None else "none"


def unused_template(encoder: Encoder, prompt: str) -> str:
    """A hint for who has not said --prompt, where the model has a chat template that is not used."""
    unused = prompt == "auto" and encoder.style != "chat" and encoder.tokenizer.template
    return " (the model has a chat template: --prompt chat uses it)" if unused else ""


def both_sides(rows: list) -> list:
    """The (prompt, responses) of those rows that are pairs."""
    return [(row.prompt, [row.chosen, row.rejected]) for row in rows if isinstance(row, Pair)]


def need_usable(encoder: Encoder, rows: list, where: str) -> None:
    """Raise UserError when the chat template refuses a (prompt, responses) row, or not one of them can be encoded."""
    for prompt, responses in rows:
        if encoder.style == "chat" and prompt and isinstance(prompt, list):
            try:
                [encoder.answer(prompt, response) for response in responses]
            except UserError as e:
                raise UserError(f"{where}: in the conversation that begins {plain(prompt)[:40]!r}: {e}") from None
    usable, report = any(encoder.example(*row) for row in rows), encoder.report()
    if rows and not usable:
        raise UserError(f"{where}: no row can be used; {report}")


# ---- a run -------------------------------------------------------------------------------------------------

def check_rows(run: Run) -> None:
    """Raise UserError for rows without an answer to grade by, and for files of which no row can be encoded."""
    cfg, encoder = run.cfg, run.encoder
    silent = [t.source for t in run.tasks if gold_answer(t) is None] if not (cfg.pairs or cfg.only_sft) else []
    if silent and len(silent) == len(run.tasks):
        raise UserError(f"{', '.join(cfg.train)}: no row has an 'answer' or an 'output' that says \"The answer is X\"")
    twice = len(run.tasks) - len(run.questions)
    if twice and not (cfg.pairs or cfg.only_sft):
        say(f"training rows whose question stands there already: {twice}; a question is sampled once")
    if silent:
        say(f"training rows without an answer to grade by: {len(silent)}, the first {silent[0]}; they make no pairs")
    for rows, files in ((run.pairs, cfg.pairs), (run.test, cfg.test), (run.val, cfg.val)):
        need_usable(encoder, both_sides(rows), ", ".join(files or cfg.pairs) + ", rows held out" * (not files))
    if cfg.sft or cfg.only_sft:
        need_usable(encoder, [(t.input, [t.output]) for t in run.tasks], ", ".join(cfg.train))


def check_own_files(run: Run, others: list[Path]) -> None:
    """Hold what replaces a stage against rows and policy; `others`: folders of --reward-base and --reward-model.

    Raises UserError naming what does not fit.
    """
    cfg, encoder = run.cfg, run.encoder
    allo = "allo" in cfg.method and not cfg.only_sft
    for flag in ("mask", "token_weights_file", "reward_model"):
        if getattr(cfg, flag) and not (allo or (flag, cfg.mask_source) == ("mask", "top")):
            raise UserError(f"--{flag.replace('_', '-')} is for allo, which this run does not train")
    if cfg.mask and any(getattr(cfg, flag) != getattr(Config, flag) for flag in ("p", "p_forget", "p_improve")):
        say("no effect: --p, --p-forget and --p-improve, for --mask says which weights are trained")
    for flag in ("p_sft", *(() if cfg.mask or cfg.only_sft else ("p", "p_forget", "p_improve"))):
        if 0 < getattr(cfg, flag) < 100 / run.parameters:
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(cfg, flag):g}, which selects none of the model's "
                            f"{run.parameters:,} weights; expected at least {100 / run.parameters:.2g}")
    if cfg.samples:
        samples, _ = read_samples(cfg.samples)
        if all(len({is_correct(s, t) for s in samples.get(t.input, [])}) < 2 for t in run.questions):
            raise UserError(f"{cfg.samples}: no training question has both a correct and a wrong sample in it")
    if path := cfg.token_weights_file:
        own, rows = own_weights(run)
        need_usable(encoder, [(n.prompt, [n.response]) for n in rows], path)
        known = [(encoder.response_ids(n.prompt, n.response), n.scores) for n in own]
        if not any(len(tokens) == len(scores) for tokens, scores in known):
            raise UserError(f"{path}: no row has a training question as 'input' and one score for each token "
                            "of 'output' and its end")
        if len(own) < len(rows):
            say(f"{path}: {len(rows) - len(own)} of {len(rows)} rows left out, which belong to no training question")
    if cfg.mask:
        load_mask(cfg.mask, run.shapes)
    for folder in others:
        if Tokenizer(folder).inner.get_vocab() != encoder.tokenizer.inner.get_vocab():
            raise UserError(f"{folder}: not the policy's tokenizer; a rewriting model must share the vocabulary")
        other = load_model(str(folder), run.dtype, "meta")
        other.config.length(cfg.max_length, f"{folder}/config.json")
        run.rewriter = other.config, {name: p.shape for name, p in other.named_parameters()}


def own_weights(run: Run) -> tuple[list[Negative], list[Negative]]:
    """The rows of --token-weights-file that are about training questions, and all of them."""
    asked, rows = {key_of(row) for row in [*run.tasks, *run.pairs]}, read_weights(run.cfg.token_weights_file)
    return [n for n in rows if key_of(n) in asked], rows


def open_run(cfg: Config) -> Run:
    """Check everything that can be checked without training, then claim the run folder (not with --dry-run).

    Raises UserError for whatever would stop the run later.
    """
    device, dtype = pick_device(cfg.device, cfg.dtype)
    device = parallel.join(device)
    if cfg.compile and not device.startswith("cuda"):
        raise UserError(f"--compile is for CUDA, and this run is on {device}; leave it out")
    if cfg.compile:
        compile_pointwise()
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product starts
        torch.use_deterministic_algorithms(True)
    wanted = ((cfg.model or str(demo.FOLDER), cfg.revision), (cfg.reward_base, ""), (cfg.reward_model, ""))
    base, *others = [find_folder(name, revision, download=not cfg.dry_run) for name, revision in wanted if name]
    model = load_model(str(base), dtype, "meta")  # compares names and shapes, reads no weights
    cfg = replace(cfg, max_length=model.config.length(cfg.max_length, str(base / "config.json")))
    tokenizer = load_tokenizer(base, model.config.vocab_size)
    eos_ids(model, tokenizer)
    tasks, pairs, val, test = read_rows(cfg)
    is_demo = not (cfg.train or cfg.pairs)
    prompt = "chat" if is_demo and cfg.prompt == "auto" else cfg.prompt  # the demo model's template is a line break
    encoder = Encoder(tokenizer, style_of(prompt, [*tasks, *pairs, *test, *val]), cfg.max_length)
    cfg = replace(cfg, prompt=encoder.style)  # written into the run folder: eval.py asks in the same style
    folder = Path(cfg.out or f"runs/{Path([*cfg.pairs, *cfg.train, 'demo'][0]).stem}-{cfg.seed}")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    run = Run(cfg, folder, base, device, dtype, shapes, encoder, Log(None), tasks, pairs, val, test,
              config=model.config)
    say(f"model: {cfg.model or 'the demo model'}, {run.parameters:,} weights, {str(dtype).removeprefix('torch.')} on "
        f"{device}; prompts: {encoder.style}{unused_template(encoder, prompt)}")
    check_rows(run)
    check_own_files(run, others)
    if cfg.memory:
        run.cfg, run.needs = memory.plan(cfg, run.config, run.shapes, dtype.itemsize, run.rewriter)
        memory.show(run.cfg, run.needs, run.shapes, run.rewriter)
    used = {SETTINGS.get(stage, stage) for stage in memory.stages_of(run.cfg)}
    idle = [f"--{name}-..." for name, s in cfg.stages.items() if s != Config().stages[name] and name not in used]
    if idle and not is_demo:  # whose own settings have some for every stage
        say(f"no effect in this run, which does not come to these stages: {', '.join(idle)}")
    threads = {"threads": torch.get_num_threads()} if device == "cpu" else {}  # sums depend on how they are split
    machine = {"device": device.split(":")[0], "dtype": str(dtype), **threads}
    claim_folder(run.cfg, folder, [base, *others], machine)
    if not cfg.dry_run:
        run.log = Log(folder)
        if is_demo and not parallel.RANK:
            write_jsonl(folder / "test.jsonl", ({"input": t.input, "answer": t.answer} for t in test))
    return run
