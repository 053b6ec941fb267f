"""What a run stands on: device, rows, tokenizer and the run folder, checked before the first stage starts."""

import hashlib
import json
import os
import random
from pathlib import Path

import torch

from allo_mini import UserError, demo, memory, parallel
from allo_mini.checkpoint import (DTYPES, TOKENIZER_FILES, eos_ids, find_folder, load_model, load_tokenizer,
                                  shard_files)
from allo_mini.config import HOME, Config, flat
from allo_mini.data import Encoder, Pair, Task, is_pairs, plain, read_pairs, read_tasks
from allo_mini.disk import lock, move_aside, write_jsonl, write_text
from allo_mini.files import load_mask, read_samples, read_weights
from allo_mini.jsonio import open_bytes, read_json
from allo_mini.log import Log, say
from allo_mini.model import compile_pointwise
from allo_mini.run import Run
from allo_mini.tasks import gold_answer, is_correct

NOT_THE_RUN = ("dry_run", "out", "save_minutes", "restart", "keep", "revision")  # settings that change no result


def pick_device(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """--device and --dtype -> what is really there. Raises UserError when it is not."""
    works = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind in works if works[kind]]  # the best first
    device = there[0] if device == "auto" else device
    kind = device.split(":")[0]
    if kind not in there or device.startswith("cpu:"):
        raise UserError(f"--device is {device}, but this machine offers {', '.join(there)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device is {device}, which torch refuses: {str(e).splitlines()[0]}") from None
    bf16 = kind == "cuda" and torch.cuda.is_bf16_supported()
    if dtype == "bf16" and kind == "cuda" and not bf16:
        raise UserError("--dtype is bf16, which this card cannot compute; use --dtype fp32")
    return device, DTYPES[("bf16" if bf16 else "fp32") if dtype == "auto" else dtype]


def fingerprints(cfg: Config, base: Path) -> dict[str, str]:
    """Name -> hash of everything the run reads: data files, own artefacts, all that counts in the models' folders."""
    files = {*cfg.train, *cfg.val, *cfg.test, *cfg.pairs, cfg.samples, cfg.mask, cfg.token_weights_file} - {""}
    others = filter(None, (cfg.reward_base, cfg.reward_model))
    for folder in (base, *(find_folder(name, download=not cfg.dry_run) for name in others)):
        names = {"config.json", *TOKENIZER_FILES, *(file.name for file in shard_files(folder).values())}
        files |= {str(folder / name) for name in names if (folder / name).exists()}
    prints = {}
    for file in sorted(files):
        with open_bytes(file) as f:
            name = f"{Path(file).name}@{hashlib.sha256(file.encode()).hexdigest()[:6]}"
            prints[name] = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    return prints


def folder_of(cfg: Config) -> Path:
    """--out, or a name made from the data and the seed."""
    data = [*cfg.pairs, *cfg.train, "demo"][0]
    return Path(cfg.out or f"runs/{Path(data).stem}-{cfg.seed}")


def names_in(folder: Path) -> list[str]:
    """What a folder holds, hidden files left out; [] when it is not there. Raises UserError when that cannot be told."""
    try:
        return [name for name in os.listdir(folder) if name[0] != "."]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror}; choose another --out") from None


def check_folder(folder: Path, mine: dict, compare: bool = True) -> None:
    """Raise UserError when --out holds what is no run, or (with `compare`) a run that differs from `mine`: says where."""
    there = names_in(folder)
    theirs = read_json(folder / "config.json") if "config.json" in there else {}
    if there and not mine.keys() <= theirs.keys():
        raise UserError(f"{folder}: is there already and is no run of ours; choose another --out")
    olds = {part: theirs[part] if isinstance(theirs[part], dict) else {} for part in theirs if part in mine}
    differ = [f"another {key} ({old.get(key)!r}, now {mine[part].get(key)!r})" for part, old in olds.items()
              for key in {**old, **mine[part]} if old.get(key) != mine[part].get(key)]
    if differ and compare:
        raise UserError(f"{folder}: holds a run with {', '.join(differ)}; choose another --out, or --restart")


def claim_folder(cfg: Config, base: Path, machine: dict) -> Path:
    """Make and lock the run folder, or find the same run in it; with --dry-run only look. Raises UserError when
    something else is there."""
    folder = folder_of(cfg)
    if cfg.dry_run and not names_in(folder):
        return folder
    settings = {name: value for name, value in flat(cfg).items() if name not in NOT_THE_RUN}
    text = json.dumps({"config": settings, "files": fingerprints(cfg, base), "machine": machine}, indent=2)
    text = text.replace(HOME, '"~/')  # names of people stay out of the file
    mine = json.loads(text)
    check_folder(folder, mine, compare=not cfg.restart)
    if cfg.dry_run:
        return folder
    if not parallel.RANK:
        lock(folder)
        if cfg.restart and (folder / "config.json").exists():
            say(f"--restart: what was {folder} is now {move_aside(folder)}")
            lock(folder)
        if not (folder / "config.json").exists():
            write_text(folder / "config.json", text + "\n")
    check_folder(folder, mine)  # again, for another process may have begun a run in between
    return folder


def read_rows(cfg: Config) -> tuple[list[Task], list[Pair], list, list]:
    """(tasks, pairs, val, test) as the flags say; overlaps between train and test are dropped and counted."""
    if not (cfg.model or cfg.train or cfg.pairs):
        tasks, val, test = demo.splits(cfg)
        return tasks, [], val, test
    tasks = read_tasks(cfg.train, need_output=cfg.sft or cfg.only_sft or not cfg.pairs)
    pairs = [p for path in cfg.pairs for p in read_pairs(path)]
    test, val = held_rows(cfg, "test"), held_rows(cfg, "val")
    drop_held(tasks, [*test, *val], "training rows")
    drop_held(pairs, [*test, *val], "pairs")
    main = pairs if cfg.pairs else tasks
    random.Random(f"{cfg.seed} rows").shuffle(main)
    if cfg.pairs and not test:  # a tenth of the pairs, at most 500, is held out for the table
        cut = max(1, min(500, len(main) // 10))
        test, main[:cut] = main[:cut], []
    if not val:
        cut = cfg.val_rows or (200 if cfg.eval_every else 0)
        val, main[:cut] = main[:cut], []
    for rows in (tasks, pairs):  # what has just been held out may stand in other rows too
        drop_held(rows, [*test, *val], "rows")
    del main[cfg.limit or len(main):]
    if not main:
        raise UserError(f"{', '.join(cfg.train or cfg.pairs)}: no rows are left to train on")
    return tasks, pairs, val, test[:cfg.test_limit or None]


def held_rows(cfg: Config, flag: str) -> list[Task] | list[Pair]:
    """The rows of --test or --val: all of one kind, and preference rows in a --pairs run only."""
    files = getattr(cfg, flag)
    kinds = {is_pairs(path) for path in files}
    if len(kinds) > 1:
        raise UserError(f"--{flag} mixes task rows and preference rows in {', '.join(files)}; give one kind")
    if kinds != {True}:
        return read_tasks(files, need_output=False, need_answer=True)
    if not cfg.pairs:
        raise UserError(f"{', '.join(files)}: --{flag} holds preference rows; a run on --train rows needs task rows")
    return [p for path in files for p in read_pairs(path)]


def drop_held(rows: list, held: list, name: str) -> None:
    """Take out of `rows` the questions that are in `held` too, and say how many."""
    before, keys = len(rows), {key_of(row) for row in held}
    rows[:] = [row for row in rows if key_of(row) not in keys]
    if before > len(rows):
        say(f"{before - len(rows)} {name} dropped: they are also test or validation rows")


def key_of(row) -> str:
    """What makes two rows the same question."""
    return (row.input if isinstance(row, Task) else plain(row.prompt)).strip()


def style_of(prompt: str, row: Task | Pair) -> str:
    """What --prompt says; for auto alpaca for task rows and pairs made from them, chat for message lists, else none."""
    if prompt != "auto":
        return prompt
    if isinstance(row, Task) or row.task is not None:
        return "alpaca"
    return "chat" if isinstance(row.prompt, list) else "none"


def check_rows(run: Run) -> None:
    """Refuse rows without an answer to grade by, and files of which no row can be encoded."""
    cfg = run.cfg
    if not (cfg.pairs or cfg.only_sft or any(gold_answer(t) is not None for t in run.tasks)):
        raise UserError(f"{', '.join(cfg.train)}: no row has an 'answer' or an 'output' that says \"The answer is X\"")
    for rows, files in ((run.pairs, cfg.pairs), (run.test, cfg.test), (run.val, cfg.val)):
        need_usable(run.encoder, both_sides(rows), ", ".join(files or cfg.pairs))
    if cfg.sft or cfg.only_sft:
        need_usable(run.encoder, [(t.input, [t.output]) for t in run.tasks], ", ".join(cfg.train))
    for row in run.test:
        if isinstance(row, Task) and gold_answer(row) is None:
            raise UserError(f"{', '.join(cfg.test)}: row {row.id + 1} has neither 'answer' nor \"The answer is X\"")


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
    if rows and not any(encoder.example(*row) for row in rows):
        raise UserError(f"{where}: no row can be used; {encoder.report()}")
    encoder.clear()


def check_own_files(run: Run) -> None:
    """Read what replaces a stage before anything starts; raise UserError naming what does not fit the run."""
    cfg, weights = run.cfg, run.parameters
    for flag in ("p", "p_forget", "p_improve"):
        if 0 < getattr(cfg, flag) * weights < 100 and not (cfg.mask or cfg.only_sft):
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(cfg, flag)}, which selects none of the model's "
                            f"{weights} weights; expected at least {100 / weights:.2g}")
    if cfg.mask:
        load_mask(cfg.mask, run.shapes)
    if cfg.samples:
        samples, _ = read_samples(cfg.samples)
        graded = [{is_correct(s, t) for s in samples[t.input]} for t in run.tasks if t.input in samples]
        if not graded:
            raise UserError(f"{cfg.samples}: none of its 'input' is a training question of {', '.join(cfg.train)}")
        if all(len(kinds) < 2 for kinds in graded):
            raise UserError(f"{cfg.samples}: no question has both a correct and a wrong sample")
    if cfg.token_weights_file:
        rows = read_weights(cfg.token_weights_file)
        if {key_of(row) for row in [*run.tasks, *run.pairs]}.isdisjoint(map(key_of, rows)):
            raise UserError(f"{cfg.token_weights_file}: none of its 'input' is a training question or prompt")
        need_usable(run.encoder, [(n.prompt, [n.response]) for n in rows], cfg.token_weights_file)
        pairs = ((n, run.encoder.example(n.prompt, [n.response])) for n in rows)
        sizes = [(len(n.scores), len(e.responses[0])) for n, e in pairs if e]
        run.encoder.clear()
        if all(given != wanted for given, wanted in sizes):
            raise UserError(f"{cfg.token_weights_file}: no row has one score a token; the first usable one has "
                            f"{sizes[0][0]}, expected {sizes[0][1]} (the closing token included)")
    for folder in filter(None, (cfg.reward_base, cfg.reward_model)):  # a given model is what scores
        other = load_model(str(run.same_tokenizer(folder)), run.dtype, "meta")
        other.config.check_length(cfg.max_length, f"{folder}/config.json")
        run.rewriter = other.config, {name: p.shape for name, p in other.named_parameters()}


def open_run(cfg: Config) -> Run:
    """Check everything that can be checked without training, then claim the run folder (not with --dry-run)."""
    device, dtype = pick_device(cfg.device, cfg.dtype)
    device = parallel.join(device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product starts
        torch.use_deterministic_algorithms(True)
    base = find_folder(cfg.model or str(demo.FOLDER), cfg.revision or None, download=not cfg.dry_run)
    model = load_model(str(base), dtype, "meta")  # compares names and shapes, reads no weights
    model.config.check_length(cfg.max_length, str(base / "config.json"))
    tokenizer = load_tokenizer(base, model.config.vocab_size)
    eos_ids(model, tokenizer)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tasks, pairs, val, test = read_rows(cfg)
    if cfg.compile and not device.startswith("cuda"):
        raise UserError(f"--compile is for CUDA, and this run is on {device}; leave it out")
    if cfg.compile:
        compile_pointwise()
    is_demo = not (cfg.model or cfg.train or cfg.pairs)
    prompt = "chat" if is_demo and cfg.prompt == "auto" else cfg.prompt  # the demo model's template is a line break
    encoder = Encoder(tokenizer, style_of(prompt, [*tasks, *pairs][0]), cfg.max_length)
    run = Run(cfg, folder_of(cfg), base, device, dtype, shapes, encoder, Log(None), tasks, pairs, val, test, config=model.config)
    check_rows(run)
    check_own_files(run)
    if cfg.memory:
        run.cfg, run.needs = cfg, _ = memory.plan(cfg, run.config, shapes, dtype.itemsize, run.rewriter)
        memory.show(cfg, run.needs, shapes)
    threads = {"threads": torch.get_num_threads()} if device == "cpu" else {}  # sums depend on how they are split
    for rank in (0, 1):  # rank 0 makes the folder, then the others find it
        if bool(parallel.RANK) == bool(rank):
            run.folder = claim_folder(cfg, base, {"device": device.split(":")[0], "dtype": str(dtype), **threads})
        parallel.wait()
    if cfg.dry_run:
        return run
    run.log = Log(run.folder)
    if is_demo and not parallel.RANK and not (run.folder / "test.jsonl").exists():
        write_jsonl(run.folder / "test.jsonl", ({"input": t.input, "answer": t.answer} for t in test))
    return run
