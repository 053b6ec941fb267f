"""What a run stands on: device, rows, tokenizer and the run folder, checked before the first stage starts."""

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path

import torch

from allo_mini import UserError, demo
from allo_mini.checkpoint import DTYPES, atomic_file, find_folder, load_tokenizer, shard_files
from allo_mini.config import Config
from allo_mini.data import Encoder, Pair, Task, is_pairs, read_pairs, read_tasks
from allo_mini.log import Log, say
from allo_mini.model import CausalLM, parse_config
from allo_mini.run import Run
from allo_mini.tasks import gold_answer
from allo_mini.tokenizer import read_json



def pick_device(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """--device and --dtype -> what is really there. Raises UserError when it is not."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.split(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind):
        raise UserError(f"--device is {device}, but this machine offers {', '.join(k for k, v in there.items() if v)}")
    if dtype == "auto":
        dtype = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if dtype == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("--dtype is bf16, which this card cannot compute; use --dtype fp32")
    return device, DTYPES[dtype]


def file_print(path: Path) -> str:
    """A fingerprint of a file: size and a hash of all of it, or of both ends where it is large."""
    size, edge = path.stat().st_size, 32 << 20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        digest.update(f.read(edge))
        if size > edge:
            f.seek(-min(edge, size - edge), 2)
            digest.update(f.read())
    return digest.hexdigest()[:16]


def fingerprints(cfg: Config, base: Path) -> dict[str, str]:
    """Name -> fingerprint of everything the run reads: data files, own artefacts, the model's files."""
    files = {*cfg.train, *cfg.val, *cfg.test} | {f for f in (cfg.samples, cfg.pairs, cfg.mask, cfg.token_weights_file) if f}
    files |= {str(base / "config.json"), str(base / "tokenizer.json"), *map(str, shard_files(base).values())}
    for folder in (cfg.reward_base, cfg.reward_model):
        files |= {str(f) for f in shard_files(find_folder(folder)).values()} if folder else set()
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{file}: file not found")
    return {Path(file).name + "@" + hashlib.sha256(file.encode()).hexdigest()[:6]: file_print(Path(file))
            for file in sorted(files)}


def claim_folder(cfg: Config, base: Path, threads: dict) -> Path:
    """Make the run folder, or find the same run in it. Raises UserError saying what differs otherwise."""
    data = cfg.pairs or (cfg.train[0] if cfg.train else "demo")
    folder = Path(cfg.out or f"runs/{Path(data).stem}-{cfg.seed}")
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("out", "save_minutes")}
    mine = {"config": settings, "files": fingerprints(cfg, base), **threads}
    path = folder / "config.json"
    if path.exists():
        theirs = read_json(path)
        for part in mine:
            old = theirs.get(part) if isinstance(theirs.get(part), dict) else {}
            for key in {**old, **mine[part]}:
                if old.get(key) != mine[part].get(key):
                    raise UserError(f"{folder}: holds a run with another {key} ({old.get(key)!r}, now "
                                    f"{mine[part].get(key)!r}); choose another --out")
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and is no run of ours; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(mine, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror}") from None
    return folder


def read_rows(cfg: Config) -> tuple[list[Task], list[Pair], list, list]:
    """(tasks, pairs, val, test) as the flags say; overlaps between train and test are dropped and counted."""
    if not cfg.model and not cfg.train and not cfg.pairs:
        test = demo.problems(cfg.test_limit or demo.ROWS["test"], cfg.seed + 1)  # other seeds, and none of the same rows
        seen = {t.input for t in test}
        val = demo.problems(cfg.val_rows or demo.ROWS["val"], cfg.seed + 2, seen)
        return demo.problems(cfg.limit or demo.ROWS["train"], cfg.seed + 3, seen | {t.input for t in val}), [], val, test
    tasks = read_tasks(cfg.train, 0, need_output=cfg.sft or not cfg.pairs) if cfg.train else []
    pairs = read_pairs(cfg.pairs) if cfg.pairs else []
    test = []
    if cfg.test:
        kinds = {is_pairs(path) for path in cfg.test}
        if len(kinds) > 1:
            raise UserError("--test mixes task rows and preference rows; give one kind")
        test = [p for path in cfg.test for p in read_pairs(path)] if kinds.pop() else read_tasks(
            cfg.test, 0, need_output=False, need_answer=True)
    val = []
    if cfg.val:
        val = [p for f in cfg.val for p in read_pairs(f)] if is_pairs(cfg.val[0]) else read_tasks(cfg.val, 0, False, True)
    held = {key_of(row) for row in [*test, *val]}
    for rows, name in ((tasks, "training rows"), (pairs, "pairs")):
        before = len(rows)
        rows[:] = [row for row in rows if key_of(row) not in held]
        if before > len(rows):
            say(f"{before - len(rows)} {name} dropped: they are also test or validation rows")
    main = pairs if cfg.pairs else tasks
    random.Random(f"{cfg.seed} rows").shuffle(main)
    if cfg.pairs and not test:  # a tenth of the pairs, at most 500, is held out for the table
        cut = max(1, min(500, len(main) // 10))
        test, main[:cut] = main[:cut], []
    if (cut := cfg.val_rows or (200 if cfg.eval_every else 0)) and not val:
        val, main[:cut] = main[:cut], []
    if cfg.limit:
        del main[cfg.limit:]
    if not main:
        raise UserError(f"{', '.join(cfg.train or [cfg.pairs])}: no rows are left to train on")
    return tasks, pairs, val, test[:cfg.test_limit or None]


def key_of(row) -> str:
    """What makes two rows the same question."""
    return row.input if isinstance(row, Task) else json.dumps(row.prompt)


def style_of(cfg: Config, tasks: list[Task], pairs: list[Pair]) -> str:
    """The prompt style: what --prompt says, else what the rows are."""
    if cfg.prompt != "auto":
        return cfg.prompt
    if pairs:
        return "chat" if isinstance(pairs[0].prompt, list) else "none"
    return "alpaca" if cfg.train else "chat"  # the demo's template is one line break


def open_run(cfg: Config) -> Run:
    """Check everything that can be checked without training, then claim the run folder."""
    device, dtype = pick_device(cfg.device, cfg.dtype)
    base = find_folder(cfg.model or str(demo.FOLDER), cfg.revision or None)
    config = parse_config(read_json(base / "config.json"), str(base / "config.json"))
    config.check_length(cfg.max_length if cfg.model else 1, str(base / "config.json"))
    tokenizer = load_tokenizer(base, config.vocab_size)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CausalLM(config).named_parameters()}
    tasks, pairs, val, test = read_rows(cfg)
    for row in test:
        if isinstance(row, Task) and gold_answer(row) is None:
            raise UserError(f"{', '.join(cfg.test)}: test row {row.id + 1} has neither 'answer' nor \"The answer is X\"")
    encoder = Encoder(tokenizer, style_of(cfg, tasks, pairs), cfg.max_length)
    folder = claim_folder(cfg, base, {"machine": {"threads": torch.get_num_threads(), "device": device, "dtype": str(dtype)}})
    return Run(cfg, folder, base, device, dtype, shapes, encoder, Log(folder), tasks, pairs, val, test)
