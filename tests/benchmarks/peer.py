"""DPO beside TRL's DPOTrainer, with PEFT's LoRA in it, too: pairs/s, peak bytes; or sampling.

    python tests/benchmarks/peer.py --model DIR --pairs FILE.jsonl [--batch 2] [--dtype bf16]
    python tests/benchmarks/peer.py --shape llama-3.2-1b       random weights, the demo's words
    python tests/benchmarks/peer.py --model DIR --test FILE.jsonl      sampling, by transformers too

They need `pip install trl peft`. All read the same rows in the same order as the same tokens, the
whole batch at once, reference log-probs computed before the first step, each side in a process of
its own, in turns. Ours is the improving stage with a random mask of 5 percent, and once with all
weights, in fp32 masters, gradients and moments. TRL's weights are of --dtype: in bf16 they take no
step of 5e-7. LoRA: r = 16, alpha = 32, all linear layers. Speed is the median of the turns, memory
the highest (CUDA's allocated, a CPU's process); saved: the bytes of a side's tensors in a file, of
ours a patch's if all selected weights change.
"""

import importlib.metadata
import random
import sys
import tempfile
import time
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from common import (DTYPES, SHAPES, Clock, Policy, Run, UserError, exit_code, finish, fresh_process,
                    parse, peaks, pick_device, random_model, train, train_steps)
from torch.nn.utils.rnn import pad_sequence

from allo_mini.checkpoint import eos_ids, find_folder, load_model, meta_model, save_model
from allo_mini.data import demo
from allo_mini.data.encoder import Encoder, Example
from allo_mini.data.rows import Pair, read_pairs, read_tasks
from allo_mini.data.tokenizer import load_tokenizer
from allo_mini.generate import sample
from allo_mini.mask import to_tensors
from allo_mini.objectives import dpo_objective
from allo_mini.run.files import write_jsonl
from allo_mini.run.inputs import style_of

LR, BETA, SEED = 1e-9, 0.1, 2023
LENGTH = 1024  # tokens of a prompt and a response at most
PROMPTS, N = 32, 10  # sampling: questions, answers to each


def make_world(args, folder: Path) -> None:
    """For --shape: a random model with the demo's tokenizer, pairs in the demo's words."""
    model = random_model(args.shape, DTYPES[args.dtype], "cpu")
    model.folder = demo.FOLDER  # from where the tokenizer files come
    save_model(model, folder / args.shape)
    rng, rows = random.Random(SEED), []
    for _ in range((args.warm + args.steps) * args.batch):
        tasks = demo.problems(15, rng.random())
        row = {"prompt": " ".join(task.prompt for task in tasks[:3])}  # a hundred tokens
        for side in ("chosen", "rejected"):  # one to two hundred
            row[side] = "\n".join(task.output for task in rng.sample(tasks, rng.randint(3, 5)))
        rows.append(row)
    write_jsonl(folder / "pairs.jsonl", rows)
    args.model, args.pairs = str(folder / args.shape), str(folder / "pairs.jsonl")


def usable_pairs(args, count: int) -> list[tuple[Pair, Example]]:
    """The first `count` pairs neither empty, identical nor too long, and their ids."""
    pairs, usable = read_pairs([args.pairs]), []
    tokenizer = load_tokenizer(Path(args.model), 10**9)
    encoder = Encoder(tokenizer, style_of("auto", pairs[:1]), LENGTH)
    for pair in pairs:
        example = encoder.example(*pair.sides)
        if example and len(example.prompt) + max(map(len, example.responses)) < LENGTH:
            usable.append((pair, example))
    if len(usable) < count:
        raise UserError(f"{args.pairs}: {len(usable)} usable pairs, {count} are needed: lower "
                        "--steps or --batch")
    return usable[:count]


def figures(args, clock: Clock, saved: int, state: str) -> dict:
    """What all report. saved: bytes; state: its types."""
    seconds = clock.seconds(args.warm)
    return {"pairs_per_s": args.batch * len(seconds) / sum(seconds), **peaks(args.device),
            "saved_bytes": saved, "losses": [row["loss"] for row in clock.rows[:3]],
            "logps_chosen": [row["logps/chosen"] for row in clock.rows[:3]], "state": state}


def ours(args, pairs: list, percent: float) -> dict:
    """The improving stage over the pairs."""
    cfg = parse(["--model", args.model, "--pairs", args.pairs, "--seed", str(SEED), "--lr-improve",
                 str(LR), "--batch", str(args.batch), "--micro-tokens",
                 str(2 * args.batch * LENGTH)])
    device, dtype = pick_device(args.device, args.dtype)
    folder = Path(args.model)
    model = meta_model(folder)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as place:
        run = Run(cfg, Path(place), Policy(folder), device, dtype, model.config, shapes, None,
                  [], [], [], [], Clock(device))
        examples = [example for _, example in pairs]
        optimizer = train_steps(run, "improve", examples, dpo_objective(BETA, 0.1), percent)
    mask, values = optimizer.selected_weights()
    changed = to_tensors(mask, {name: x.to(dtype) for name, x in values.items()})
    saved = sum(x.nbytes for x in changed.values())
    return figures(args, run.log, saved, f"{args.dtype} weights; fp32 master, gradient "
                   f"and moments of {len(optimizer.master):,} weights")


def dpo_trainer(model, rows: list[dict], place, dtype, lora: bool, batch: int, **more):
    """TRL's DPOTrainer over rows {prompt, chosen, rejected}; more: DPOConfig's other settings."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    adapter = None
    if lora:
        from peft import LoraConfig
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear",
                             task_type="CAUSAL_LM")
    config = DPOConfig(
        output_dir=str(place), per_device_train_batch_size=batch, beta=BETA, max_grad_norm=1.0,
        precompute_ref_log_probs=True, bf16=dtype == "bf16", report_to="none", save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": str(DTYPES[dtype]).removeprefix("torch.")}, **more)
    return DPOTrainer(model=str(model), args=config, train_dataset=Dataset.from_list(rows),
                      peft_config=adapter)


def trl(args, pairs: list, lora=False) -> dict:
    """DPOTrainer over the pairs, in the order in which our loop takes them."""
    import transformers
    clock = Clock(args.device)

    class Stamp(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.write()

    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            for step in train.steps_of(pairs, args.batch, 1, SEED) for pair, _ in step]
    with tempfile.TemporaryDirectory() as place:
        trainer = dpo_trainer(
            args.model, rows, place, args.dtype, lora, args.batch, seed=SEED,
            max_steps=len(pairs) // args.batch, learning_rate=LR, max_length=LENGTH,
            train_sampling_strategy="sequential", gradient_checkpointing=False,
            use_cpu=args.device == "cpu", logging_steps=1)
        trainer.add_callback(Stamp())
        trainer.train()
        trainer.save_model(f"{place}/saved")
        saved = sum(path.stat().st_size for path in Path(place).glob("saved/*.safetensors"))
    clock.rows = [row for row in trainer.state.log_history if "loss" in row]
    moments = {str(value.dtype) for state in trainer.optimizer.state.values()
               for value in state.values() if value.dim()}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return figures(args, clock, saved, f"{trained[0].dtype} weights and gradient of "
                   f"{sum(p.numel() for p in trained):,} weights; {trainer.args.optim}, moments "
                   f"{', '.join(sorted(moments))}")


def in_turns(args) -> dict[str, dict | None]:
    """All sides, median speed, highest peak; None for one out of memory."""
    pairs = usable_pairs(args, (args.warm + args.steps) * args.batch)
    jobs = {"allo_mini, 5 % of the weights": (ours, args, pairs, 5.0),
            f"TRL, {args.dtype} weights": (trl, args, pairs),
            "TRL with LoRA, r = 16": (trl, args, pairs, True),
            "allo_mini, all weights": (ours, args, pairs, 100.0)}
    if not find_spec("peft"):
        del jobs["TRL with LoRA, r = 16"]
    turns = {name: [] for name in jobs}
    for number in range(args.turns):
        for name, job in jobs.items():
            if number == 0 or "all weights" not in name:
                turns[name].append(fresh_process(*job))
    sides = dict.fromkeys(jobs)
    for name, results in turns.items():
        if None not in results:
            rates = [result["pairs_per_s"] for result in results]
            highest = {key: max(result[key] for result in results)
                       for key in ("peak_bytes", "reserved_bytes")}
            sides[name] = results[0] | highest | {"pairs_per_s": median(rates)}
    return sides


def show(args) -> None:
    """Measure, and print the table."""
    rows, notes, sides = [], [], in_turns(args)
    for name, side in sides.items():
        cells = ["out of memory", "", "", "", ""]
        if side:
            cells = [f"{side['pairs_per_s']:.3f}", f"{side['peak_bytes'] / 1e9:.2f}",
                     f"{side['saved_bytes'] / 1e6:.2f}",
                     " ".join(f"{loss:.5f}" for loss in side["losses"]),
                     " ".join(f"{value:.1f}" for value in side["logps_chosen"])]
            notes.append(f"{name}: {side['state']}")
        rows.append([name, *cells])
    mine, *others = sides.items()
    for name, peer in others:
        if mine[1] and peer:
            rate, size = (mine[1][key] / peer[key] for key in ("pairs_per_s", "peak_bytes"))
            notes.append(f"{mine[0]} / {name}: {rate:.2f} x pairs/s, {size:.1%} of peak GB")
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    header = ["DPO", "pairs/s", "peak GB", "saved MB", "losses", "logps/chosen"]
    finish(args.device, header, rows, [*notes, str(versions)])


def ours_sampling(folder, prompts: list, eos: tuple, args) -> tuple[int, float]:
    """(tokens, seconds) of our sampling."""
    model = load_model(folder, args.dtype, args.device)
    began = time.perf_counter()
    responses = sample(model, prompts, N, args.max_new_tokens, 0.7, 0.95, eos, slots=PROMPTS * N)
    seconds = time.perf_counter() - began
    return sum(len(response) for row in responses for response in row), seconds


def theirs_sampling(folder, prompts: list, eos: tuple, args) -> tuple[int, float]:
    """(tokens, seconds) of transformers' generate, prompts padded on the left."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype]).to(args.device)
    ids = [torch.tensor(prompt, device=args.device) for prompt in prompts]
    real = [torch.ones_like(prompt) for prompt in ids]
    ids = pad_sequence(ids, True, eos[0], padding_side="left")
    real = pad_sequence(real, True, 0, padding_side="left")
    torch.manual_seed(0)
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=real, do_sample=True, temperature=0.7, top_p=0.95,
                             top_k=0, num_return_sequences=N, pad_token_id=eos[0],
                             max_new_tokens=args.max_new_tokens, eos_token_id=list(eos))
    seconds, count = time.perf_counter() - began, 0
    for row in out[:, ids.shape[1]:].tolist():
        ends = [at for at, token in enumerate(row) if token in eos]
        count += ends[0] + 1 if ends else len(row)
    return count, seconds


def show_sampling(args) -> None:
    """Sampling on both sides; tokens count up to and including EOS."""
    model = load_model(args.model, args.dtype, "meta")
    tasks = read_tasks([args.test], need_output=False)[:PROMPTS]
    tokenizer = load_tokenizer(Path(args.model), model.config.vocab_size)
    encoder = Encoder(tokenizer, style_of("auto", tasks), 2048)
    prompts = [encoder.prompt_ids(task.prompt) for task in tasks]
    sides = {"allo_mini": ours_sampling, "transformers": theirs_sampling}
    rates, rows = {}, []
    for name, side in list(sides.items())[:2 if find_spec("transformers") else 1]:
        count, seconds = side(args.model, prompts, eos_ids(model, encoder), args)
        rates[name] = count / seconds
        rows.append([name, count, f"{seconds:.1f}", f"{rates[name]:.0f}"])
    ratio = rates["allo_mini"] / rates.get("transformers", float("nan"))
    finish(args.device, ["side", "tokens", "seconds", "tokens/s"], rows,
           [f"allo_mini / transformers: {ratio:.2f}"])


def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="folder or hub id")
    add("--pairs", help="preference rows, JSONL")
    add("--shape", choices=SHAPES, help="in the place of both: random weights, pairs of the demo")
    add("--batch", type=int, default=2, help="pairs a step")
    add("--dtype", default="bf16", choices=("bf16", "fp32"))
    add("--steps", type=int, default=12, help="timed steps")
    add("--warm", type=int, default=3, help="steps before the timed ones")
    add("--turns", type=int, default=2)
    add("--test", help="questions: compare sampling")
    add("--max-new-tokens", type=int, default=128)
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    if not args.test and not find_spec("trl"):
        raise UserError("TRL is not installed; for this comparison alone: pip install trl")
    if [bool(args.model), bool(args.pairs or args.test)] != [not args.shape] * 2:
        raise UserError("expected --model, and --pairs or --test; or --shape")
    args.device, _ = pick_device("auto", args.dtype)
    with tempfile.TemporaryDirectory() as place:
        if args.shape:
            make_world(args, Path(place))
        args.model = str(find_folder(args.model))
        show_sampling(args) if args.test else show(args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
