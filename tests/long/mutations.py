"""Broken inputs by the thousand: every file and flag we read, damaged at random, through main(argv) in this process.

    python tests/long/mutations.py [--count 10000] [--seed 1] [--only KIND] [--list]

Each mutant must end in exit code 2 with one line `error: ...` and an untouched folder, or (where the damage happens to
be harmless) in 0. Anything else, a traceback above all, is printed with its number; `--seed S --only KIND` repeats it.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from helpers import tiny_model, write_tokenizer  # noqa: E402
from test_bad_input import GOOD, TEMPLATE, lines, shaped  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from allo_mini import checkpoint  # noqa: E402
from allo_mini.checkpoint import save_model  # noqa: E402
from allo_mini.files import save_mask  # noqa: E402
from allo_mini.report import write_report  # noqa: E402

os.fsync = lambda handle: None
SHORT = ("--max-steps 1 --max-new-tokens 2 --max-length 1200 --method allo --locate gradient --token-weights edit "
         "--n 2 --out run")
T, P = f"train --model model --train t.jsonl {SHORT}", f"train --model model --pairs p.jsonl {SHORT}"
B = T.replace("--out run", "--samples s.jsonl --save-minutes 0 --improve-batch 2").replace("--max-steps 1",
                                                                                           "--max-steps 2")
E = "eval --model model --test t.jsonl --max-new-tokens 2 --out run"
VALUES = [None, True, False, 0, -1, 1, 2, 1.5, 1e308, -1e308, 1 << 31, 1 << 63, 10 ** 400, "", "x", "0", "\ud800",
          "\x00", "é" * 300,
          [], {}, [[]], [None], {"a": 1}, [1, "a", None], float("nan"), float("inf"), "../x", "/etc/passwd", [-1],
          [[[[]]]], " ",
          "</s>", "<s>", "{{", "{% for %}", {"content": "<s>"}, {"content": 5}, [0.5] * 3]
BYTES = [b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"{", b"}", b'"', b"[" * 2000, b"\xe9", b"NaN",
         b"\\ud800", b"1e999", b",",
         b"9" * 5000, b"null", b"\xed\xa0\x80", b":", b"\x1a", b"\xe2\x80\xa8"]


def talk(*words):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": word} for i, word in enumerate(words)]


SAMPLES = lines(*({"input": f"2 + {i}?", "samples": ["The answer is 4", "The answer is 5"],
                   "unfinished": 0} for i in range(4)))
WEIGHTS = lines(*({"input": f"2 + {i}?", "output": "ab", "reward": [0.1, 0.9, 0.2, 0.4],
                   "ref_prob": [-1.0, -2.0, -0.5, -1.5]} for i in range(4)))
FILES = {**GOOD, "s.jsonl": SAMPLES, "w.jsonl": WEIGHTS,
         "o.jsonl": lines(*({"question": f"2 + {i}?", "prediction": "The answer is 5",
                             "output": "The answer is 4"} for i in range(4))),
         "c.jsonl": lines(*({"prompt": talk(f"Is {i}?"), "chosen": talk("", "yes")[1:], "rejected": talk("", "no")[1:]}
                            for i in range(12))),
         "h.jsonl": lines(*({"chosen": f"\n\nHuman: {i}?\n\nAssistant: yes",
                             "rejected": f"\n\nHuman: {i}?\n\nAssistant: no"}
                            for i in range(12))),
         "c.json": json.dumps({"p": 5.0, "n": 2, "test": ["test.jsonl"], "sft_lr": 1e-4, "sft_batch": 2, "seed": 3})}

# kind of input -> (the file that is damaged, the command that reads it)
KINDS = {
    "task rows": ("t.jsonl", T + " --samples s.jsonl"), "task rows, sft": ("t.jsonl", T + " --only-sft"),
    "task rows, eval": ("t.jsonl", E), "test rows": ("test.jsonl", T + " --samples s.jsonl --test test.jsonl"),
    "pairs": ("p.jsonl", P), "pairs, eval": ("p.jsonl", E.replace("t.jsonl", "p.jsonl")),
    "conversations": ("c.jsonl", P.replace("p.jsonl", "c.jsonl")),
         "HH strings": ("h.jsonl", P.replace("p.jsonl", "h.jsonl")),
    "samples": ("s.jsonl", T + " --samples s.jsonl"), "official rows": ("o.jsonl",
                                                                        T.replace("t.jsonl",
                                                                                  "o.jsonl") + " --only-sft"),
    "token weights": ("w.jsonl", T.replace("edit", "soft") + " --samples s.jsonl --token-weights-file w.jsonl"),
    "config.json": ("model/config.json", E), "config.json, train": ("model/config.json", P),
    "tokenizer.json": ("model/tokenizer.json", E), "tokenizer_config.json": ("model/tokenizer_config.json",
                                                                             E + " --prompt chat"),
    "chat template": ("model/chat_template.jinja", E + " --prompt chat"),
    "generation_config.json": ("model/generation_config.json", E),
    "weights": ("model/model.safetensors", E), "index": ("shards/model.safetensors.index.json",
                                                         E.replace("model model", "model shards")),
    "shard": ("shards/model-00001-of-00002.safetensors", E.replace("model model", "model shards")),
    "mask": ("m.safetensors", T + " --samples s.jsonl --mask m.safetensors"),
    "--config": ("c.json", T + " --samples s.jsonl --config c.json"),
    "reward model": ("other/tokenizer.json", T.replace("edit",
                                                       "threshold") + " --samples s.jsonl --reward-model other"),
    "run config.json": ("begun/config.json", B + " --out begun"),
    "checkpoint": ("begun/.improve.state.safetensors", B + " --out begun"),
    "mask of the run": ("begun/mask.safetensors", B + " --out begun"),
    "metrics of the run": ("begun/metrics.jsonl", B + " --out begun"),
    "results of the run": ("done/results.json", B + " --out done"),
    "answers of the run": ("half/eval-start.jsonl", B + " --out half --test test.jsonl"),
    "report": ("done/metrics.jsonl", "report done"), "patch": ("done/patch.safetensors",
                                                               "apply model done/patch.safetensors out"),
    "stage of the run": ("begun/forget/model.safetensors", B + " --out begun"),
    "command line": ("",
                     T + " --samples s.jsonl --p 5 --improve-lr 1e-4 --temperature 0.7 --dtype fp32 --test test.jsonl"),
    "command line, eval": ("", E + " --limit 2 --dtype fp32 --prompt none")}


def make_world(place: Path) -> None:
    """A folder with one good example of every input, a run cut off inside its last stage and a finished one."""
    for name, content in FILES.items():
        (place / name).write_text(content)
    save_model(tiny_model(), place / "model")
    write_tokenizer(place / "model", chat_template=TEMPLATE, add_bos_token=True)
    (place / "model/chat_template.jinja").write_text(TEMPLATE)
    (place / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [2], "pad_token_id": 2}))
    shutil.copytree(place / "model", place / "other")
    shutil.copytree(place / "model", place / "shards")
    from safetensors.torch import load_file, save_file
    state = load_file(place / "shards/model.safetensors")
    (place / "shards/model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(where.values()):
        save_file({n: t for n, t in state.items() if where[n] == file}, place / "shards" / file)
    (place / "shards/model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1},
                                                                           "weight_map": where}))
    save_mask(shaped(), place / "m.safetensors")
    from allo_mini.log import Log
    step = Log.step

    def stop(self, stage, number, *rest):
        if (stage, number) == ("improve", 2):
            raise KeyboardInterrupt
        step(self, stage, number, *rest)
    Log.step = stop
    assert call(KINDS["checkpoint"][1]) == 130, "the run that is cut off"
    Log.step = step
    assert call(KINDS["results of the run"][1]) == 0, "the finished run"
    assert call(KINDS["answers of the run"][1]) == 0, "the run that is to be evaluated again"
    (place / "half/results.json").unlink()


def call(command) -> int:
    """Run a command in this process, silently."""
    words = command.split() if isinstance(command, str) else command
    program = {"train": train.main, "eval": evaluation.main, "apply": apply, "report": report}[words[0]]
    with contextlib.redirect_stdout(io.StringIO()):
        return program(words[1:])


def apply(argv) -> int:
    """python -m allo_mini.checkpoint apply BASE PATCH OUT"""
    return checkpoint.main(["apply", *argv])


def report(argv) -> int:
    """python -m allo_mini.report FOLDER"""
    try:
        write_report(Path(argv[0]))
        return 0
    except Exception as e:  # as the command itself does
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


# ---- damage ------------------------------------------------------------------------------------------------

def places_of(value, path=()):
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, inner in list(items)[:200]:
        found += places_of(inner, (*path, key))
    return found


def change_json(value, rng):
    """Change, remove, add, double or swap one place of a JSON value."""
    paths = places_of(value)
    if not paths:
        return rng.choice(VALUES)
    path = rng.choice([p for p in paths if len(p) == min(len(p), rng.choice([1, 1, 2, 3, 9]))] or paths)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    kind, key = rng.random(), path[-1]
    if kind < 0.55:
        holder[key] = rng.choice(VALUES)
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.8 and isinstance(holder, dict):
        holder[rng.choice(["", "x", key + " ", key.upper()])] = holder.pop(key)
    elif kind < 0.9:
        holder[key] = [holder[key]]
    else:
        holder[key] = json.loads(json.dumps(holder[key])) if rng.random() < 0.5 else {"a": holder[key]}
    return value


def change_bytes(data: bytes, rng) -> bytes:
    """Cut, flip, insert, repeat or drop bytes."""
    kind, at = rng.randrange(7), rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice([1, 2, 8, 100]))
    if kind == 0:
        return data[:at]
    if kind == 1 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:]
    if kind == 2:
        return data[:at] + rng.choice(BYTES) + data[at:]
    if kind == 3:
        return data[:at] + data[end:]
    if kind == 4:
        return data[:end] + data[at:]
    if kind == 5:
        return data[:at] + bytes(rng.randrange(256) for _ in range(end - at)) + data[end:]
    return data.replace(b"\n", b"\r\n") if rng.random() < 0.5 else rng.choice(BYTES) + data


def change_tensors(data: bytes, rng) -> bytes:
    """Damage the header of a safetensors file (its length, its JSON), or its data."""
    kind = rng.random()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8:8 + size], data[8 + size:]
    if kind < 0.1:
        wrong = rng.choice([0, 1, size - 1, size + 1, size + 8, len(data), 1 << 31, 1 << 40, (1 << 63) - 1,
                            (1 << 64) - 1])
        return struct.pack("<Q", wrong) + header + body
    if kind < 0.6:
        header = json.dumps(change_json(json.loads(header), rng)).encode()
    elif kind < 0.75:
        header = change_bytes(header, rng)
    else:
        return data[:8 + size] + change_bytes(body, rng)
    return struct.pack("<Q", len(header)) + header + body


def change_words(words: list[str], rng) -> list[str]:
    """Damage a command line."""
    words, at = list(words), rng.randrange(1, len(words))
    other = rng.choice(["", "-1", "0", "nan", "inf", "1e400", "x", "\ud800", "a\0b", "n" * 5000, "--", "-", "--p",
                        "--help-me", "é", " ",
                        "t.jsonl", "model", ".", "/", "/dev/null", "/proc/self/mem", "1" * 5000, "auto", "meta",
                        "cuda:0:1", "cpu:0"])
    kind = rng.randrange(4)
    if kind == 0:
        words[at] = other
    elif kind == 1:
        words.insert(at, other)
    elif kind == 2:
        del words[at]
    else:
        words[at] = "".join(rng.choice(words[at] + "-=x0") for _ in words[at])
    return words


def replace_file(path: Path, rng) -> str:
    """Put something else where a file is expected."""
    kind = rng.choice(["nothing", "folder", "dangling link", "looping link", "empty", "device"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "looping link":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.touch()
    elif kind == "device":
        path.symlink_to("/dev/null")
    return kind


def damage(place: Path, name: str, command: str, rng) -> list[str]:
    """Damage one input in place; returns the command to run."""
    words = command.split()
    if not name:
        return change_words(words, rng)
    path = place / name
    if rng.random() < 0.03:
        replace_file(path, rng)
        return words
    data = path.read_bytes()
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.random()
        with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError, RecursionError,
                                 struct.error):  # damaged before
            if path.suffix == ".safetensors" and kind < 0.85:
                data = change_tensors(data, rng)
            elif path.suffix == ".json" and kind < 0.75:
                data = json.dumps(change_json(json.loads(data), rng)).encode()
            elif path.suffix == ".jsonl" and kind < 0.7:
                rows = data.decode().splitlines(keepends=True)
                at = rng.randrange(len(rows))
                rows[at] = json.dumps(change_json(json.loads(rows[at]), rng)) + "\n"
                data = "".join(rows).encode()
            else:
                data = change_bytes(data, rng)
    path.write_bytes(data)
    return words


# ---- the trial ---------------------------------------------------------------------------------------------

def state_of(place: Path) -> dict:
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
            for p in place.rglob("*")}


def trial(world: Path, place: Path, kind: str, seed: str) -> str:
    """One mutant: 'refused', 'harmless', or what went wrong."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place, symlinks=True)
    os.chdir(place)
    name, command = KINDS[kind]
    words = damage(place, name, command, random.Random(seed)) if seed else command.split()
    before, errors = state_of(place), io.StringIO()
    began = time.monotonic()
    try:
        with contextlib.redirect_stderr(errors):
            code = call(words)
    except SystemExit as e:
        code = 0 if e.code in (0, None) else f"SystemExit {e.code}"  # --help
    except BaseException:
        if isinstance(sys.exception(), KeyboardInterrupt):
            raise
        return "TRACEBACK\n" + "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
    said = errors.getvalue()
    if time.monotonic() - began > 15:
        return f"SLOW: {time.monotonic() - began:.0f} s"
    if code == 0:
        return "harmless"
    if code != 2 or not said.startswith("error: ") or said.count("\n") != 1 or not said.endswith("\n"):
        return f"CODE {code}: {said[:300]!r}"
    after = state_of(place)
    begun = {"begun", "done", "half"} & {*words} or (place / "run").exists() and "run" not in before
    lost = [f for f in before if before[f] != after.get(f) and before[f] and not (begun and f.startswith(("begun",
                                                                                                          "done",
                                                                                                          "half")))]
    if lost:
        return f"CHANGED {lost}: {said}"
    return ("refused late: " if begun and not {"begun", "done", "half"} & {*words} else "refused: ") + said.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true", help="print every refusal")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [k for k in KINDS if args.only in k]
    outcomes, bad, began = {k: collections.Counter() for k in kinds}, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        world, place = Path(folder) / "world", Path(folder) / "place"
        world.mkdir()
        os.chdir(world)
        make_world(world)
        for kind in kinds:
            assert (found := trial(world, place, kind, "")) == "harmless", f"{kind}, undamaged: {found}"
        for number in range(args.count):
            kind, seed = kinds[number % len(kinds)], f"{args.seed}/{number}"
            outcome = trial(world, place, kind, seed)
            outcomes[kind][outcome.split(":")[0].split("\n")[0][:60]] += 1
            if not outcome.startswith(("refused", "harmless")):
                bad += 1
                print(f"--- {number} {kind}: {outcome}", flush=True)
            if args.list:
                print(number, kind, outcome.split("\n")[0], flush=True)
        os.chdir("/")
    for kind, found in outcomes.items():
        print(f"{kind:24}", dict(found))
    total = sum(sum(found.values()) for found in outcomes.values())
    print(f"{total} mutants tried, {total - bad} survived (refused in one line with exit code 2, or harmless), "
          f"{bad} not; {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
