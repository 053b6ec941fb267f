"""The run object that all stages share: folder, rows, clock, checks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from allo_mini import UserError, memory, parallel
from allo_mini.architecture import ModelConfig
from allo_mini.checkpoint import eos_ids, load_model, save_model
from allo_mini.config import Config, rate_flag
from allo_mini.data import Encoder, Example, Pair, Task
from allo_mini.device import free_memory, host_memory, peak_gb
from allo_mini.files import save_tensors
from allo_mini.log import Log, say
from allo_mini.logprobs import micro_batches, size_of
from allo_mini.mask import selected
from allo_mini.model import CausalLM
from allo_mini.tasks import evaluate, gold_answer


@dataclass
class Run:
    """Everything the stages share. Models are not in here: each stage loads what it needs and lets it go."""
    cfg: Config
    folder: Path
    base: Path
    device: str
    dtype: torch.dtype
    shapes: dict[str, torch.Size]  # of the policy's parameters
    encoder: Encoder
    log: Log
    tasks: list[Task] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    val: list = field(default_factory=list)   # Tasks, or Pairs in a run that starts from pairs
    test: list = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    config: ModelConfig | None = None  # of the policy
    rewriter: tuple[ModelConfig, dict] | None = None  # config and parameter shapes of --reward-base or --reward-model
    needs: dict[str, dict[str, int]] = field(default_factory=dict)  # --memory's estimate: {stage: {term: bytes}}
    halved: bool = False  # memory ran out: micro-batches are half as large
    warned: set[str] = field(default_factory=set)  # stages that have been warned about

    @property
    def questions(self) -> list[Task]:
        """What is sampled: of training rows with the same question the first that gives an answer, or the first."""
        first = {}
        for t in sorted(self.tasks, key=lambda t: gold_answer(t) is None):
            first.setdefault(t.input, t)
        return [t for t in self.tasks if first[t.input] is t]

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def load(self, folder: Path | str, mask=None, train_all: bool = False) -> CausalLM:
        """A model of this run, on its device, with its activation checkpointing.

        mask: what is going to be trained. Under --int8 all but that is kept in 8 bits: nothing, with `train_all`.
        """
        int8 = self.cfg.int8 and not train_all
        model = load_model(str(folder), self.dtype, self.device, int8, mask, self.cfg.stream)
        model.head_bytes, model.checkpoint_blocks = self.cfg.head_mb << 20, self.cfg.checkpoint_blocks
        self.spend_memory(model, selected(mask) if mask else sum(p.numel() for p in model.parameters()))
        return model

    def spend_memory(self, model: CausalLM, trained: int) -> None:
        """Unless --checkpoint-blocks says it, as few blocks recompute as memory allows beside `trained` weights."""
        if self.cfg.checkpoint_blocks < 0:
            model.checkpoint_blocks = memory.blocks_to_checkpoint(self.cfg, model.config, trained, self.device,
                                                                  self.dtype.itemsize)

    def micro_batches(self, group: list[Example], mine=list) -> list[list[Example]]:
        """A step's examples as micro-batches of --micro-batch rows or --micro-tokens tokens, at least one a rank.

        `mine` picks this rank's; only then are they halved, since the other ranks' memory may have been enough.
        """
        share = -(-sum(map(size_of, group)) // parallel.WORLD)
        micros = mine(micro_batches(group, self.cfg.micro_batch, min(self.cfg.micro_tokens, share)))
        if not self.halved:
            return micros
        return [half for m in micros for half in (m[:len(m) // 2], m[len(m) // 2:]) if half]

    def stage(self, name: str, make: Callable[[Path], None], artefact: str | None = None, ranks: bool = False) -> Path:
        """The path of a stage's artefact, made by make(path) unless it is there; says seconds and peak memory then.

        Under torchrun all ranks take part if `ranks`, else the others wait for rank 0.
        """
        target = self.folder / (artefact or name)
        found = target.exists()
        parallel.wait()  # all have looked, rank 0 may write
        if found:
            say(f"{name}: found {target}, skipped")
        elif ranks or not parallel.RANK:
            self.measured(name, make, target)
        parallel.wait()
        return target

    def measured(self, name: str, make: Callable[[Path], None], target: Path) -> None:
        """make(target), with its seconds and peak memory printed and logged. Raises UserError when memory runs out."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.monotonic()
        try:
            make(target)
        except torch.OutOfMemoryError:
            raise UserError(f"{name}, peak {peak_gb(self.device):.2f} GB: {memory.advice(self.cfg)}") from None
        if not parallel.RANK:  # which may still have been writing when the others were done
            self.state_file(name).unlink(missing_ok=True)
        self.seconds[name], peak = time.monotonic() - began, peak_gb(self.device)
        self.log.note(name, seconds=round(self.seconds[name], 2), **{"mem/peak_gb": peak})
        estimate = f" (estimate {sum(self.needs[name].values()) / 1e9:.2f} GB)" if name in self.needs else ""
        say(f"{name}: {self.seconds[name]:.1f} s, peak memory {peak:.2f} GB{estimate}\n")

    def save(self, what, target: Path) -> None:
        """A model's folder, or a file of tensors; written by rank 0."""
        if not parallel.RANK:
            save_model(what, target) if isinstance(what, CausalLM) else save_tensors(what, target)

    def locate_groups(self, snr: bool = False) -> int:
        """In how many passes the fp32 gradient of all weights is made, and with `snr` its two sums in host memory: as
        many as let them fill half of what a GPU has free, and half of the host's memory."""
        if self.cfg.locate_groups:
            return self.cfg.locate_groups
        on_card = self.device.startswith("cuda") and self.cfg.offload != "gradient"
        here, room = 8 * snr + 4 * (not on_card), self.parameters  # bytes of host memory a weight; weights at a time
        if on_card:
            room = min(room, free_memory(self.device) // 8)
        if here and host_memory():
            room = min(room, host_memory() // (2 * here))
        return -(-self.parameters // room)

    def state_file(self, name: str) -> Path:
        return self.folder / f".{name}.state.safetensors"

    def check_numbers(self, name: str, step: int, values: dict[str, float], examples: list, group: list,
                      step0=None) -> None:
        """Before a step on `group`, some of `examples`, moves the weights: stop when loss or gradient is no number. In
        stages with a reference, hold the first loss against `step0(group)`, what the mathematics says, and warn once
        when chosen responses lose probability while the margin rises (likelihood displacement, arXiv 2410.08847)."""
        for key in ("loss", "grad_norm"):
            if not math.isfinite(values[key]):
                rows = [str(i) for i, e in enumerate(examples) if any(e.prompt is some.prompt for some in group)]
                raise UserError(f"{name}, step {step + 1}: {key} is {values[key]}, in rows {', '.join(rows)} of "
                                f"{len(examples)}; lower {rate_flag(name)} or use --dtype fp32")
        if step0 and step == 0:
            expected = step0(group)
            close = abs(values["loss"] - expected) <= 1e-4 * max(1.0, abs(expected))
            say(f"{name}: first loss {values['loss']:.6f}, expected {expected:.6f} where theta = theta_ref"
                + ("" if close else "   <-- WARNING: reference and policy do not agree, or the objective's step0 is "
                                    "wrong"))
        fallen = -values.get("rewards/chosen", 0.0) / self.cfg.beta  # nats
        if step0 and fallen > 1 and values.get("rewards/margins", 0.0) > 0 and name not in (*self.warned, "warmup"):
            self.warned.add(name)
            say(f"{name}: WARNING: at step {step + 1} the chosen responses have lost {fallen:.2f} nats of "
                f"log-probability on average while the margin is up at {values['rewards/margins']:.3g}; consider a "
                f"lower {rate_flag(name)}")

    def validator(self):
        """model -> validation accuracy, or None when --eval-every is off."""
        if not self.cfg.eval_every or not self.val:
            return None
        return lambda model: fmean(item["correct"] for item in self.evaluate(model, self.val, "validate"))

    def evaluate(self, model: CausalLM, rows: list, label: str) -> list[dict]:
        """Greedy answers to tasks, log-prob comparison of pairs; one dict a row."""
        items = evaluate(model, self.encoder, rows, self.cfg, self.eos(model), label)
        self.report_dropped(f"{label} rows", len(items))
        return items

    def eos(self, model: CausalLM) -> tuple[int, ...]:
        """Ids that end a response of this model in this prompt style."""
        return tuple({*eos_ids(model, self.encoder.tokenizer), self.encoder.closing})

    def encode(self, rows, name: str) -> list[Example]:
        """(prompt, responses) rows -> examples; says what was dropped and why, refuses to go on with nothing."""
        examples = [e for prompt, responses in rows if (e := self.encoder.example(prompt, responses))]
        self.report_dropped(name, len(examples))
        return examples

    def report_dropped(self, name: str, kept: int) -> None:
        """Say what the encoder dropped or trimmed since it was last asked. Raises UserError when nothing is left."""
        if report := self.encoder.report():
            say(f"{name}: {kept} kept; {report}")
        if not kept:
            raise UserError(f"none of the {name} can be used; {report or 'there are none'}")
