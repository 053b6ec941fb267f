"""Broken inputs by the thousand: every file and flag, damaged at random, through main(argv).

    python tests/long/mutations.py [--count 3000] [--seed 1] [--only KIND] [--list]

Each must end in exit code 2 with one line `error: ...`, or (where the damage happens to be
harmless) in 0. All else, a traceback above all, is printed; `--seed S --only KIND` repeats it.
"""

import argparse
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
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from kill import Watched, press  # noqa: E402
from runs import TEMPLATE, lines, make_world, pair, with_samples  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from allo_mini import checkpoint, patch  # noqa: E402
from allo_mini.evaluation import report  # noqa: E402
from allo_mini.run.log import exit_code  # noqa: E402

SHORT = ("--limit 4 --max-steps 1 --max-new-tokens 2 --max-length 1200 --method allo --locate snr "
         "--token-weights edit --n 2")
T = f"train --model model --train train.jsonl {SHORT}"
P = f"train --model model --pairs pairs.jsonl {SHORT} --out run"
R, S = T + " --out run", T.replace("edit", "soft") + " --out run"  # run holds samples.jsonl
B = T.replace("steps 1", "steps 2") + " --batch 2 --config settings.json --test test.jsonl"
E = "eval --model model --test test.jsonl --max-new-tokens 2 --out answers"
VALUES = [None, True, 0, -1, 2, 1.5, 1e308, 1 << 31, 1 << 63, 10**400, "", "x", "\ud800", "\x00",
          "é" * 300, [], {}, [[]], [None], {"a": 1}, [1, "a", None], float("nan"), float("inf"),
          "../x", [-1], " ", "</s>", "{{", {"content": "<s>"}, {"content": 5}, [0.5] * 3]
BYTES = [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"{", b"}", b'"', b"[" * 2000, b"\xe9",
         b"NaN", b"\\ud800", b"1e999", b",", b"9" * 5000, b"null", b"\xed\xa0\x80", b"\xe2\x80\xa8"]
WORDS = ["", "-1", "0", "nan", "inf", "1e400", "x", "\ud800", "a\0b", "n" * 5000, "--", "--p", " ",
         "test.jsonl", "model", ".", "/dev/null", "/proc/self/mem", "1" * 5000, "meta", "cuda:0:1"]
FILES = {  # beside those of runs.make_world
    "talks.jsonl": lines(*(pair([{"role": "user", "content": f"Is {i}?"}], *(
        [{"role": "assistant", "content": word}] for word in ("yes", "no"))) for i in range(12))),
    "model/chat_template.jinja": TEMPLATE,
    "model/generation_config.json": '{"eos_token_id": [2], "pad_token_id": 2}',
    "c.json": json.dumps({"p": 5.0, "n": 2, "test": ["test.jsonl"], "lr_sft": 1e-4, "seed": 3,
                          "schedules": {"sft": {"batch": 2, "epochs": 1}}})}
KINDS = {  # kind of input -> the file that is damaged, the command that reads it
    "task rows": ("train.jsonl", R), "task rows, sft": ("train.jsonl", R + " --method sft"),
    "task rows, eval": ("test.jsonl", E), "test rows": ("test.jsonl", R + " --test test.jsonl"),
    "pairs": ("pairs.jsonl", P), "pairs, eval": ("pairs.jsonl", E.replace("test.j", "pairs.j")),
    "conversations": ("talks.jsonl", P.replace("pairs.j", "talks.j")),
    "samples": ("run/samples.jsonl", R), "--config": ("c.json", R + " --config c.json"),
    "config.json": ("model/config.json", E), "config.json, train": ("model/config.json", P),
    **{name: (f"model/{name}", E + " --prompt chat") for name in (
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json")},
    "weights": ("model/model.safetensors", E), "weights, train": ("model/model.safetensors", P),
    "shard": ("shards/model-00001-of-00002.safetensors", E.replace("model model", "model shards")),
    **{f"{name} of the run": (f"begun/{name}", B + " --out begun") for name in
       ("config.json", ".improve.state.safetensors", "mask.safetensors", "forget.safetensors",
        "metrics.jsonl")},
    "token weights": ("scored/token_weights.jsonl", B.replace("edit", "soft") + " --out scored"),
    "results": ("done/results.json", B + " --out done"),
    "answers": ("half/eval-start.jsonl", B + " --out half"),
    "trained": ("half/improve/model.safetensors", B + " --out half"),
    "report": ("done/metrics.jsonl", "report done"),
    "patch": ("done/patch.safetensors", "apply model done/patch.safetensors out"),
    "patch, eval": ("done/patch.safetensors", E + " --patch done/patch.safetensors"),
    "command line": ("", R + " --p 5 --lr-improve 1e-4 --temperature 0.7 --dtype fp32"),
    "command line, eval": ("", E + " --limit 2 --dtype fp32 --prompt none")}


def call(command) -> int:
    """Run a command in this process, silently."""
    name, *words = command.split() if isinstance(command, str) else command
    with contextlib.redirect_stdout(io.StringIO()):
        if name == "apply":
            return exit_code(lambda: patch.apply([name, *words]))
        if name == "report":
            return exit_code(lambda: report.write_report(Path(*words)))
        return {"train": train, "eval": evaluation}[name].main(words)


def fill(place: Path) -> None:
    """A folder with one good example of every input, runs that are begun, half done and done."""
    make_world(place)
    for name, content in FILES.items():
        (place / name).write_text(content)
    with_samples(place, place / "run")
    with mock.patch.object(checkpoint, "SHARD", 20_000):
        checkpoint.save_model(checkpoint.load_model(place / "model"), place / "shards")
    for name in ("begun", "done", "half", "scored"):
        shutil.copytree(place / "run", place / name)
    with contextlib.redirect_stdout(Watched(io.StringIO(), "^ improve 2/2", press)):
        assert train.main((B + " --out begun").split()[1:]) == 130, "the run that is cut off"
    assert (place / "begun/.improve.state.safetensors").exists()
    for kind in ("results", "answers", "token weights"):
        assert call(KINDS[kind][1]) == 0, kind
    for name in ("half/results.json", "half/eval-ALLO.jsonl", "scored/results.json",
                 "scored/forget.safetensors"):
        (place / name).unlink()
    shutil.rmtree(place / "scored/improve")


# ---- damage ------------------------------------------------------------------------------------

def keys_of(value) -> list:
    """Of a JSON object or array."""
    keys = range(len(value)) if isinstance(value, list) else value
    return list(keys)[:200] if isinstance(value, (list, dict)) else []


def change_json(value, rng):
    """Change, remove, add, double or swap one place of a JSON value."""
    places = [(value, key) for key in keys_of(value)]
    for holder, key in places:  # grows as it goes
        places += [(holder[key], inner) for inner in keys_of(holder[key])]
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places[:rng.choice([8, 99, 9999])])
    kind = rng.random()
    if kind < 0.6:
        holder[key] = rng.choice([*VALUES, [holder[key]], {"a": holder[key]}])
    elif kind < 0.8:
        del holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice(["", "x", key + " ", key.upper()])] = holder.pop(key)
    return value


def change_bytes(data: bytes, rng, kept=False) -> bytes:
    """Change bytes, or (unless the length is to be kept) cut, insert, repeat or drop some."""
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice([1, 2, 8, 100]))
    other = bytes(rng.randrange(256) for _ in range(end - at))
    if kept or rng.random() < 0.2:
        return data[:at] + other + data[end:]
    return rng.choice([data[:at], data[:at] + rng.choice(BYTES) + data[at:], data[:at] + data[end:],
                       data[:end] + data[at:], data.replace(b"\n", b"\r\n")])


def change_tensors(data: bytes, rng) -> bytes:
    """Damage the header of a safetensors file (its length, its JSON), or its data."""
    kind = rng.random()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8:8 + size], data[8 + size:]
    if kind < 0.1:
        wrong = [0, 1, size - 1, size + 1, size + 8, len(data), 1 << 31, 1 << 40, (1 << 64) - 1]
        return struct.pack("<Q", rng.choice(wrong)) + header + body
    if kind < 0.4:
        header = json.dumps(change_json(json.loads(header), rng)).encode()
    elif kind < 0.5:
        header = change_bytes(header, rng)
    else:
        return data[:8 + size] + change_bytes(body, rng, kept=kind < 0.8)
    return struct.pack("<Q", len(header)) + header + body


def change_words(words: list[str], rng) -> list[str]:
    """Damage a command line."""
    at = rng.randrange(1, len(words))
    mixed = "".join(rng.choice(words[at] + "-=x0") for _ in words[at])
    put = rng.choice([[rng.choice(WORDS)], [rng.choice(WORDS), words[at]], [], [mixed]])
    return [*words[:at], *put, *words[at + 1:]]


def damage(place: Path, name: str, command: str, rng) -> list[str]:
    """Damage one input in place; returns the command to run."""
    words = command.split()
    if not name:
        return change_words(words, rng)
    path = place / name
    if rng.random() < 0.03:  # something else where a file is expected
        path.unlink()
        link = rng.choice(["nowhere", path.name, "/dev/null"])
        rng.choice([path.mkdir, path.touch, lambda: None, lambda: path.symlink_to(link)])()
        return words
    data = path.read_bytes()
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.random()
        with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError,
                                 RecursionError, struct.error):  # damaged before
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


def trial(world: Path, place: Path, kind: str, seed: str) -> str:
    """One mutant: 'refused', 'harmless', or what went wrong."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place, symlinks=True)
    os.chdir(place)
    name, command = KINDS[kind]
    words = damage(place, name, command, random.Random(seed)) if seed else command.split()
    errors, began = io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stderr(errors):
            code = call(words)
    except SystemExit as e:
        code = 0 if e.code in (0, None) else f"SystemExit {e.code}"  # --help
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "TRACEBACK\n" + "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
    line = errors.getvalue()
    if time.monotonic() - began > 15:
        return f"SLOW: {time.monotonic() - began:.0f} s"
    if code == 0:
        return "harmless"
    if code != 2 or not line.startswith("error: ") or line.count("\n") != 1:
        return f"CODE {code}: {line[:300]!r}"
    return "refused: " + line.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("--count", 3000), ("--seed", 1), ("--only", "")):
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--list", action="store_true", help="print every refusal")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [kind for kind in KINDS if args.only in kind]
    outcomes, bad, began = {kind: Counter() for kind in kinds}, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        world, place = Path(folder) / "world", Path(folder) / "place"
        world.mkdir()
        os.chdir(world)
        fill(world)
        for kind in kinds:
            outcome = trial(world, place, kind, "")
            assert outcome == "harmless", f"{kind}, undamaged: {outcome}"
        for number in range(args.count):
            kind = kinds[number % len(kinds)]
            outcome = trial(world, place, kind, f"{args.seed}/{number}")
            outcomes[kind][outcome.split(":")[0].split("\n")[0][:60]] += 1
            wrong = not outcome.startswith(("refused", "harmless"))
            bad += wrong
            if wrong or args.list:
                print(f"{'--- ' * wrong}{number} {kind}: {outcome}", flush=True)
        os.chdir("/")
    for kind, counts in outcomes.items():
        print(f"{kind:24}", dict(counts))
    print(f"{args.count} mutants, {bad} neither refused in one line nor harmless; "
          f"{time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
