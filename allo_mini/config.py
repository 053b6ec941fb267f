"""Every knob in one place: name, default, unit and where the default comes from. Flags are made from this.

Sources: [paper] arXiv 2406.12606, [official] its released 8-GPU scripts, [ours] chosen here.
"""

import argparse
import difflib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from allo_mini import UserError

HOME = json.dumps(os.path.expanduser("~/"))[:-1]  # how a path into the home folder begins in JSON; we write `"~/`
STAGES = ("sft", "warmup", "reward", "forget", "improve", "dpo")  # the stages that train


@dataclass
class Stage:
    """Optimizer settings of one training stage; 0 means: chosen from the model's size and the data (`resolve_stage`)."""
    lr: float = 0.0
    batch: int = 0
    epochs: float = 1.0
    warmup: float = 0.1


# Peak learning rate for a 7B model, largest batch, epochs, warm-up share of the steps.
OFFICIAL = {"sft": Stage(1e-5, 16, 3, 0.1),       # [ours]
            "warmup": Stage(1e-6, 32, 1, 0.1),    # [official]
            "reward": Stage(1e-5, 16, 1, 0.1),    # [ours]
            "forget": Stage(5e-7, 128, 1, 0.03),  # [official]
            "improve": Stage(5e-6, 128, 1, 0.1),  # [official]
            "dpo": Stage(1e-6, 32, 1, 0.1)}       # [ours]: as the official warm-up, which is plain DPO


# `python train.py` without a model or data: the demo's settings, learning rates by tests/benchmarks/tune_demo.py. [ours]
DEMO = {"prompt": "chat", "max_length": 400, "max_new_tokens": 100, "n": 8,
        "dpo_lr": 3e-5, "forget_lr": 8e-5, "improve_lr": 2e-5}


def knob(default, group: str, help: str, choices=None):
    """A dataclass field that becomes a flag."""
    about = {"group": group, "help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass
class Config:
    """A run's settings; saved as config.json in the run folder."""
    # input
    model: str = knob("", "input", "folder or hub id of the policy (default: the demo model)")
    revision: str = knob("", "input", "hub revision: branch, tag or commit")
    train: list[str] = knob([], "input", "task rows, JSONL, one or more files")
    val: list[str] = knob([], "input", "validation rows for --eval-every (default: --val-rows of the training rows)")
    test: list[str] = knob([], "input", "test rows: task rows, or preference rows in a --pairs run")
    limit: int = knob(0, "input", "use at most this many training rows (0: all)")
    test_limit: int = knob(0, "input", "use at most this many test rows (0: all)")
    val_rows: int = knob(0, "input", "training rows set aside for validation (with --eval-every: 200 unless --val)")
    prompt: str = knob("auto", "input", "alpaca for task rows, none for strings, chat for message lists, or one for all",
                       ("auto", "alpaca", "chat", "none"))
    max_length: int = knob(1200, "input", "tokens of prompt and response together [official]")
    out: str = knob("", "input", "run folder (default runs/<data>-<seed>); resumes when it holds the same run")
    seed: int = knob(2023, "input", "one seed for data order, sampling and splits [official]")
    # one's own files instead of a stage
    samples: str = knob("", "bring your own", "sampled responses, JSONL {input, samples}: replaces the sample stage")
    pairs: list[str] = knob([], "bring your own", "preference rows, JSONL {prompt, chosen, rejected}, one or more files: "
                            "replaces sample and pairs")
    mask: str = knob("", "bring your own", "mask.safetensors: replaces warmup and locate")
    token_weights_file: str = knob("", "bring your own", "JSONL {input, output, reward: [a score a token]}: replaces reward")
    reward_model: str = knob("", "bring your own", "trained rewriting model: replaces its training")
    # which stages
    sft: bool = knob(False, "stages", "supervised fine-tuning first (makes the paper's 'SFT LLM')")
    only_sft: bool = knob(False, "stages", "stop after supervised fine-tuning")
    allo: bool = knob(True, "stages", "warmup, locate, reward, forget and improve (--no-allo: the baseline alone)")
    dpo_baseline: bool = knob(True, "stages", "also train the full-weight DPO baseline and put it in the table")
    eval: bool = knob(True, "stages", "evaluate the resulting models on --test")
    # sampling
    n: int = knob(10, "sample", "responses per question [paper]")
    temperature: float = knob(0.7, "sample", "sampling temperature [paper]")
    top_p: float = knob(0.95, "sample", "nucleus mass, 0..1 [paper]")
    max_new_tokens: int = knob(1024, "sample", "tokens per response at most [paper]")
    sample_batch: int = knob(320, "sample", "samples running at once [ours]")
    stop: list[str] = knob([], "sample", "strings that end a response (for base models)")
    sample_questions: int = knob(0, "sample", "training questions that are sampled (0: all)")
    pairs_per_question: int = knob(5, "sample", "random (correct, wrong) pairs per question at most [paper]")
    # locating neurons
    locate: str = knob("movement", "locate", "importance of a weight: movement of a DPO warm-up [paper] or its gradient",
                       ("movement", "gradient"))
    p: float = knob(5.0, "locate", "percent of all weights that are trained [paper]")
    p_forget: float = knob(0.0, "locate", "percent for forgetting alone (0: --p)")
    p_improve: float = knob(0.0, "locate", "percent for improving alone (0: --p)")
    locate_pairs: int = knob(512, "locate", "pairs for the gradient, and for the overlap of both strategies [ours]")
    # token weights
    token_weights: str = knob("threshold", "reward", "threshold: 1 where score < --threshold [paper]; soft: 1 - score; "
                              "released: the score [official code]; edit: outside the edit alignment; uniform: 1",
                              ("threshold", "soft", "released", "edit", "uniform"))
    threshold: float = knob(0.5, "reward", "score under which a token is unaligned [paper]")
    reward_base: str = knob("", "reward", "model that the rewriting model is trained from (default: the policy)")
    # losses
    beta: float = knob(0.1, "losses", "strength of the reference in DPO and NPO [paper]")
    epsilon: float = knob(0.1, "losses", "share of rejected tokens kept when improving [official]")
    # optimization: per-stage flags (--improve-lr, ...) are added below
    clip: float = knob(1.0, "optimizer", "largest gradient norm over the selected weights [official]")
    weight_decay: float = knob(0.0, "optimizer", "decay of the selected weights [official]")
    max_steps: int = knob(0, "optimizer", "optimizer steps per stage at most (0: as epochs say)")
    micro_batch: int = knob(0, "optimizer", "pairs or sequences per forward pass (0: as many as fit --micro-tokens)")
    micro_tokens: int = knob(4096, "optimizer", "tokens per forward pass [ours]")
    checkpoint_blocks: int = knob(-1, "optimizer", "first n blocks recompute activations in backward (-1: all on CUDA, "
                                  "none on CPU)")
    dtype: str = knob("auto", "optimizer", "weights: bf16 or fp32 (auto: bf16 on CUDA, fp32 elsewhere)",
                      ("auto", "bf16", "fp32"))
    device: str = knob("auto", "optimizer", "cuda, mps, cpu or cuda:1 (auto: the best there is)")
    # watching
    eval_every: int = knob(0, "watch", "validate every so many steps of sft, forget, improve and dpo; the best weights "
                           "are kept")
    save_minutes: float = knob(10.0, "watch", "minutes between checkpoints inside a stage")
    # per stage
    stages: dict[str, Stage] = field(default_factory=lambda: {name: replace(OFFICIAL[name], lr=0.0, batch=0)
                                                              for name in STAGES})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with a suggestion for a mistyped flag."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (-[\w-]+)", message)
        wrong = re.match(r"argument (\S+): invalid (?:([\w ]+) value|choice): '(.*?)'(?: \(choose from (.*)\))?$", message)
        if unknown:
            message = f"unknown flag {unknown[1]}" + (similar(unknown[1], self._option_string_actions) or "; see --help")
        elif wrong:
            flag, kind, value, choices = wrong.groups()
            choices = (choices or "").replace("'", "")
            message = f"{flag} is {value}, expected {choices or kind}{similar(value, choices.split(', '))}"
        raise UserError(message.removeprefix("argument "))


def similar(word: str, words) -> str:
    """'; did you mean X?' when one of `words` is near, else ''."""
    close = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {close[0]}?" if close else ""


def number(kind):
    """int or float for argparse, refusing NaN and infinity."""
    def parse(text):
        value = kind(text)
        if not math.isfinite(value):
            raise ValueError
        return value
    parse.__name__ = "a whole number" if kind is int else "a finite number"  # argparse's error shows it
    return parse


def make_parser() -> Parser:
    parser = Parser(prog="train.py", allow_abbrev=False, description=(
        "ALLO: align a language model by training few weights on few tokens. Without arguments: the demo, whose "
        "own settings --print-config shows. A learning rate or batch of 0 is chosen for you."))
    parser.add_argument("--config", metavar="FILE.json", help="read settings from a file; flags override it")
    parser.add_argument("--print-config", action="store_true", help="print the settings as JSON and stop")
    groups = {}
    for f in fields(Config):
        if f.name == "stages":
            continue
        group = groups.setdefault(f.metadata["group"], parser.add_argument_group(f.metadata["group"]))
        flag, default = "--" + f.name.replace("_", "-"), f.default
        options = {"default": argparse.SUPPRESS, "help": f.metadata["help"].replace("%", "%%")}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif f.type is str:
            options["choices"] = f.metadata["choices"]
        elif f.type in (int, float):
            options["type"] = number(f.type)
        else:
            options["nargs"], default = "+", None
        if default not in (None, ""):
            options["help"] += f" (default {default})"
        if f.type is not bool:
            options["metavar"] = None if options.get("choices") else "X"
        group.add_argument(flag, **options)
    group = parser.add_argument_group("per stage", "sft, warmup, reward, forget, improve, dpo; "
                                      "0: chosen from the model's size and the data; metrics.jsonl says what was used")
    for stage in STAGES:
        for name, kind, text in (("lr", float, "peak learning rate"), ("batch", int, "rows per optimizer step"),
                                 ("epochs", float, "passes over the rows"), ("warmup", float, "share of rising steps")):
            group.add_argument(f"--{stage}-{name}", type=number(kind), metavar="X", default=argparse.SUPPRESS, help=text)
    return parser


def from_file(path: str) -> dict:
    """Flat, checked settings of a --config file, `config.json` of another run included."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig").replace('"~/', HOME))
        values = dict(values.get("config", values))
        for stage, settings in values.pop("stages", {}).items():
            values.update({f"{stage}_{k}": v for k, v in settings.items()})
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: expected a JSON object of settings: {e}") from None
    kinds = {f.name: (f.type, f.metadata["choices"]) for f in fields(Config) if f.name != "stages"}
    kinds |= {f"{s}_{f.name}": (f.type, None) for s in STAGES for f in fields(Stage)}
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"{path}: {key} is no setting of ours" + similar(key, kinds))
        kind, choices = kinds[key]
        good = (isinstance(value, list) and all(isinstance(v, str) for v in value) if kind not in words else
                isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool))
        if not good or (choices and value not in choices):
            expected = ", ".join(choices) if choices else words.get(kind, "a list of strings")
            raise UserError(f"{path}: {key} is {value!r}, expected {expected}")
    return values


def parse(argv: list[str]) -> Config:
    """Command line -> checked Config; without model and data the demo's settings apply. Raises UserError."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    path, show = given.pop("config", None), given.pop("print_config")
    written = from_file(path) if path else {}
    own = any((given | written).get(key) for key in ("model", "train", "pairs"))
    values = ({} if own else dict(DEMO)) | written | given
    config = Config(**{k: v for k, v in values.items() if k in Config.__dataclass_fields__})
    for stage in STAGES:
        for f in fields(Stage):
            if (key := f"{stage}_{f.name}") in values:
                setattr(config.stages[stage], f.name, values[key])
    check(config)
    if show:
        print(json.dumps(asdict(config), indent=2))
        raise SystemExit(0)
    return config


def check(c: Config) -> None:
    """Refuse values that cannot mean anything. Raises UserError naming flag, value and what was expected."""
    def need(flag, value, good, expected):
        if not good:
            raise UserError(f"--{flag} is {value}, expected {expected}")

    for f in fields(c):
        if f.type in (int, float):  # NaN is not below anything
            need(f.name.replace("_", "-"), getattr(c, f.name), abs(getattr(c, f.name)) < 2**63, "a finite number")
    for flag in ("p", "p_forget", "p_improve"):
        value = getattr(c, flag)
        need(flag.replace("_", "-"), value, 0 < value <= 100 or (value == 0 and flag != "p"), "a percentage in (0, 100]")
    for flag in ("top_p", "epsilon"):
        need(flag.replace("_", "-"), getattr(c, flag), 0 < getattr(c, flag) <= 1, "a share in (0, 1]")
    for flag in ("n", "max_new_tokens", "sample_batch", "pairs_per_question", "locate_pairs", "micro_tokens"):
        need(flag.replace("_", "-"), getattr(c, flag), getattr(c, flag) >= 1, "at least 1")
    for flag in ("limit", "test_limit", "val_rows", "sample_questions", "max_steps", "micro_batch", "eval_every",
                 "weight_decay", "temperature", "seed", "save_minutes"):
        need(flag.replace("_", "-"), getattr(c, flag), getattr(c, flag) >= 0, "0 or more")
    for flag in ("beta", "clip"):
        need(flag, getattr(c, flag), getattr(c, flag) > 0, "more than 0")
    need("threshold", c.threshold, 0 <= c.threshold <= 1, "a probability, 0 to 1")
    need("max-length", c.max_length, c.max_length >= 8, "at least 8")
    need("checkpoint-blocks", c.checkpoint_blocks, c.checkpoint_blocks >= -1, "-1 or more")
    need("stop", c.stop, all(c.stop), "strings that are not empty")
    for name, stage in c.stages.items():
        need(f"{name}-lr", stage.lr, 0 <= stage.lr < math.inf, "0 or more")
        need(f"{name}-batch", stage.batch, stage.batch >= 0, "0 or more")
        need(f"{name}-epochs", stage.epochs, 0 < stage.epochs < math.inf, "more than 0")
        need(f"{name}-warmup", stage.warmup, 0 <= stage.warmup <= 1, "a share, 0 to 1")
    if c.temperature == 0 and c.n > 1 and not (c.samples or c.pairs or c.only_sft):
        raise UserError("--temperature 0 gives --n equal responses; use a temperature above 0")
    if c.token_weights_file and c.token_weights in ("edit", "uniform"):
        raise UserError(f"--token-weights is {c.token_weights}, which uses no scores; with --token-weights-file, "
                        "expected threshold, soft or released")
    if c.samples and c.pairs:
        raise UserError("--samples and --pairs are both given; pairs replace the samples, expected one of them")
    if (c.test or c.val) and not (c.train or c.pairs):
        raise UserError("--test and --val need rows to train on: --train FILE (task rows) or --pairs FILE (preferences)")
    if c.model and not (c.train or c.pairs):
        raise UserError("--model needs rows to train on: --train FILE (task rows) or --pairs FILE (preferences)")


def resolve_stage(name: str, stage: Stage, parameters: int, rows: int) -> Stage:
    """Fill in lr and batch where they are 0.

    lr: the official value is for 7B; smaller models take steps larger by sqrt(7e9 / parameters), at most 100x [ours].
    batch: the official one, but small enough for at least 50 steps an epoch, and not below 8 [ours].
    """
    official = OFFICIAL[name]
    scale = min(100.0, max(1.0, math.sqrt(7e9 / parameters)))
    lr = stage.lr or float(f"{official.lr * scale:.2g}")
    return replace(stage, lr=lr, batch=stage.batch or max(1, min(official.batch, max(8, rows // 50), rows)))
