"""What tests of whole runs share: models and rows on disk, commands, what a run has left."""

import json
import shutil
from pathlib import Path

import torch
from helpers import write_folder
from safetensors.torch import load_file

import train
from allo_mini.data.demo import FOLDER, problems
from allo_mini.run.files import load_tensors
from allo_mini.run.log import Log

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ("{% for m in messages %}{{ m['content'] }}"
            "{{ eos_token if m['role'] == 'assistant' else '|' }}{% endfor %}")
TIMES = {"time", "tokens/s", "mem/peak_gb", "seconds"}  # what two equal runs may differ in
ALWAYS = 1e-9  # save_minutes: a checkpoint after every step


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def task(question: str, answer="4", **more) -> dict:
    return {"input": question, "output": f"Add.\nThe answer is {answer}", **more}


def pair(prompt, chosen="yes", rejected="no") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_world(folder: Path) -> Path:
    """A tiny random model and 24 questions, samples for them (one right, two wrong each), pairs;
    two questions stand twice, first without an answer."""
    write_folder(folder / "model", chat_template=TEMPLATE)
    questions = [task(f"{i} + {i % 7}?", str(i + i % 7)) for i in range(30)]
    silent = [row | {"output": "Hm."} for row in questions[:2]]
    samples = []
    for row in questions[:24]:
        wrong = row["output"].replace("is ", "is 9")
        texts = [row["output"], wrong, "No idea.", wrong]
        samples.append({"input": row["input"], "samples": texts, "unfinished": 1})
    preferences = [pair(f"Is {i} even?", "It is so", "No") for i in range(24)]
    for name, rows in {"train": silent + questions[:24], "test": questions[20:26],
                       "val": questions[28:], "samples": samples, "pairs": preferences}.items():
        (folder / f"{name}.jsonl").write_text(lines(*rows))
    (folder / "settings.json").write_text(json.dumps({"save_minutes": ALWAYS}))
    return folder


def arguments(world: Path, out: Path, *more) -> list[str]:
    """A command on the tiny world's questions."""
    command = (f"--model {world}/model --train {world}/train.jsonl --test {world}/test.jsonl "
               "--prompt chat --max-length 300 --max-new-tokens 3 --batch 4 --max-steps 3 --out")
    return [*command.split(), str(out), *map(str, more)]


def with_samples(world: Path, out: Path) -> None:
    """Lay samples into a run folder, for a random model is never right."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(world / "samples.jsonl", out)


def run(world: Path, out: Path, *more) -> Path:
    """A run on the tiny world that ends well; its folder."""
    with_samples(world, out)
    assert train.main(arguments(world, out, *more)) == 0
    return out


def demo_command(place: Path, out: Path | None = None) -> list[str]:
    """A command that leads the demo model through all stages, in seconds."""
    place.mkdir(exist_ok=True)
    settings = {"save_minutes": ALWAYS, "weight_decay": 0.1}
    (place / "settings.json").write_text(json.dumps(settings))
    command = (f"--model {FOLDER} --config {place}/settings.json --prompt chat --max-length 400 "
               "--max-new-tokens 60 --n 4 --batch 4 --max-steps 2 --eval-every 2 --sft "
               f"--p-forget 2 --lr-improve 1e-4 --out {out or place / 'run'}")
    tasks = [{"input": t.prompt, "output": t.output, "answer": t.answer} for t in problems(20, 7)]
    for name, part in (("train", tasks[:12]), ("test", tasks[12:16]), ("val", tasks[16:18])):
        (place / f"{name}.jsonl").write_text(lines(*part))
        command += f" --{name} {place}/{name}.jsonl"
    return command.split()


# ---- what a run has left -----------------------------------------------------------------------

def steps_of(folder: Path, stage: str = "") -> list[dict]:
    """The logged training steps, of one stage or all."""
    return [row for row in Log.read(folder) if "step" in row and stage in ("", row["stage"])]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def results_of(folder: Path) -> dict:
    """Everything a run has left but times."""
    left = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in (".lock", "report.html"):  # the report shows seconds
            continue
        left[name] = path.read_bytes()
        if path.suffix == ".safetensors":  # its notes stand in any order
            tensors, notes = load_tensors(path)
            left[name] = notes, {key: (t.dtype, t.shape, t.flatten().view(torch.uint8).numpy()
                                       .tobytes()) for key, t in tensors.items()}
        if name == "metrics.jsonl":
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in Log.read(folder)]
            left[name] = [row for row in rows if len(row) > 1]  # more than the stage's name
        if name == "results.json":
            text = path.read_text().replace(str(folder), "")
            left[name] = {k: v for k, v in json.loads(text).items() if k not in TIMES}
    return left


def difference(a: dict, b: dict) -> list[str]:
    """Names of what differs between two results."""
    return [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
