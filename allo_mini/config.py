"""Every knob in one place: default, unit, meaning, source and bounds. Flags, --help and checks are made from this.

Sources: "paper" arXiv 2406.12606, "official" its released 8-GPU scripts, "ours" chosen here.
"""

import argparse
import difflib
import json
import operator
import os
import re
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import partial

from allo_mini import UserError
from allo_mini.disk import read_json

HOME = json.dumps(os.path.expanduser("~/"))[:-1]  # how a path into the home folder begins in JSON; we write `"~/`
STAGES = ("sft", "warmup", "reward", "forget", "improve", "dpo")  # the stages that train
METHODS = ("sft", "rft", "dpo", "rdpo", "ipo", "bco", "simpo", "npo", "allo")
# stage -> whose flags it has
SETTINGS = {"more-sft": "sft", "rft": "sft", **dict.fromkeys(("rdpo", "ipo", "bco", "simpo", "npo"), "dpo")}
GROUPS = ("input", "own files", "stages", "sft", "sample", "warmup", "locate", "reward", "forget", "improve", "dpo",
          "training", "memory", "watching")  # --help shows the flags so, in the order of the stages
KINDS = {bool: ("true or false", lambda v: type(v) is bool),  # type -> its name, whether a value is of it
         int: ("a whole number", lambda v: type(v) is int and abs(v) < 2**63),
         float: ("a finite number", lambda v: type(v) in (int, float) and abs(v) < 2**63),  # so NaN is none
         str: ("a string", lambda v: type(v) is str),
         list[str]: ("a list of strings that are not empty",
                     lambda v: type(v) is list and all(type(text) is str and text for text in v))}
LIMITS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def knob(default, group: str, unit: str | tuple, help: str, source: str = "ours", **limits):
    """A dataclass field that becomes a flag.

    group: one of GROUPS; unit: what --help shows as the flag's value, or a tuple of the values it may have;
    limits: bounds by the names in LIMITS, as in `above=0, at_most=1`; without any, a number is 0 or more.
    """
    if type(default) in (int, float) and isinstance(unit, str):
        limits = limits or {"at_least": 0}
    about = {"group": group, "unit": unit, "help": help, "source": source, "limits": limits}
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(metadata=about, **value)


@dataclass
class Stage:
    """Optimizer settings of a training stage; 0 means: chosen from the model's size and the data (`resolve_stage`).

    Group and source depend on the stage.
    """
    lr: float = knob(0.0, "", "RATE", "peak learning rate (0: as at 7B, larger for smaller models)", "")
    batch: int = knob(0, "", "ROWS", "for an optimizer step (0: as at 7B, smaller for few rows)", "")
    epochs: float = knob(1.0, "", "PASSES", "over the rows", "", above=0)
    warmup: float = knob(0.1, "", "SHARE", "of the steps in which the learning rate rises", "", at_least=0, at_most=1)


# Peak learning rate for a 7B model, largest batch, epochs, warm-up share of the steps; ours unless in RELEASED.
OFFICIAL = {"sft": Stage(1e-5, 16, 3, 0.1), "warmup": Stage(1e-6, 32, 1, 0.1), "reward": Stage(1e-5, 16, 1, 0.1),
            "forget": Stage(5e-7, 128, 1, 0.03), "improve": Stage(5e-6, 128, 1, 0.1),
            "dpo": Stage(1e-6, 32, 1, 0.1)}  # as the official warm-up, which is plain DPO
RELEASED = ("warmup", "forget", "improve")  # the stages whose settings the official scripts give

# The settings of `python train.py` without a model or data; learning rates by tests/benchmarks/tune_demo.py. (ours)
DEMO = {"prompt": "chat", "max_length": 400, "max_new_tokens": 100, "n": 8,
        "dpo_lr": 3e-5, "forget_lr": 8e-5, "improve_lr": 2e-5}


@dataclass
class Config:
    """A run's settings; saved as config.json in the run folder."""
    model: str = knob("", "input", "FOLDER", "the policy: a folder or hub id (none: the demo model)")
    revision: str = knob("", "input", "NAME", "hub revision: branch, tag or commit")
    train: list[str] = knob([], "input", "FILE", "task rows, JSONL, one or more files")
    val: list[str] = knob([], "input", "FILE", "validation rows for --eval-every (none: see --val-rows)")
    test: list[str] = knob([], "input", "FILE", "test rows: task rows, or preference rows in a --pairs run")
    limit: int = knob(0, "input", "ROWS", "training rows at most (0: all)")
    test_limit: int = knob(0, "input", "ROWS", "test rows at most (0: all)")
    val_rows: int = knob(0, "input", "ROWS", "training rows to validate on, without --val (0: 200 if --eval-every)")
    prompt: str = knob("auto", "input", ("auto", "alpaca", "chat", "none"), "one form for all (auto: official "
                       "alpaca for task rows, none for strings, chat template for message lists)")
    max_length: int = knob(0, "input", "TOKENS", "prompt + response (0: 1200, the model's limit if less)", "official")
    out: str = knob("", "input", "FOLDER", "of the run, which goes on if begun there (none: runs/<data>-<seed>)")
    restart: bool = knob(False, "input", "", "start over: what --out holds is renamed to FOLDER.1, FOLDER.2, ...")
    keep: int = knob(0, "input", "COUNT", "of a finished run's outputs as large as a model stay: the last of sft, dpo, "
                     "movement.safetensors, reward, forget, improve (0: all)")
    seed: int = knob(2023, "input", "NUMBER", "of data order, sampling and splits", "official")

    samples: str = knob("", "own files", "FILE", "{input, samples}, JSONL: replaces the sample stage")
    pairs: list[str] = knob([], "own files", "FILE", "{prompt, chosen, rejected}, JSONL: replaces sample and its pairs")
    mask: str = knob("", "own files", "FILE", "mask.safetensors: replaces warmup and locate")
    token_weights_file: str = knob("", "own files", "FILE", "{input, output, reward: scores}, JSONL: replaces reward")
    reward_model: str = knob("", "own files", "FOLDER", "a trained rewriting model: replaces its training")

    sft: bool = knob(False, "stages", "", "supervised fine-tuning first (makes the paper's 'SFT LLM')", "paper")
    only_sft: bool = knob(False, "stages", "", "stop after supervised fine-tuning")
    method: list[str] = knob(["dpo", "allo"], "stages", METHODS, "trained from the same model on the same samples, "
                             "and compared; all but allo with all weights, --dpo-... flags (sft, rft: --sft-...)",
                             "paper")
    mask_source: str = knob("auto", "locate", ("auto", "top", "bottom", "random", "none"), "which --p percent of the "
                           "weights every --method trains: of highest or lowest importance, random ones, or all (auto: "
                           "top in allo, else none)", "paper")
    forget: bool = knob(True, "stages", "", "allo's first phase (off: improving alone)", "paper")
    dry_run: bool = knob(False, "stages", "", "print what would run, its memory, disk and time; write nothing")
    eval: bool = knob(True, "stages", "", "evaluate the resulting models on --test")

    n: int = knob(10, "sample", "RESPONSES", "sampled for each question", "paper", at_least=1)
    temperature: float = knob(0.7, "sample", "NUMBER", "divides the logits; 0: always the likeliest token", "paper")
    top_p: float = knob(0.95, "sample", "SHARE", "nucleus: probability mass sampled from", "paper", above=0, at_most=1)
    max_new_tokens: int = knob(1024, "sample", "TOKENS", "of a response at most", "paper", at_least=1)
    sample_batch: int = knob(320, "sample", "SAMPLES", "running at once", at_least=1)
    stop: list[str] = knob([], "sample", "TEXT", "strings that end a response (for base models)")
    sample_questions: int = knob(0, "sample", "QUESTIONS", "training questions that are sampled (0: all)")
    pairs_per_question: int = knob(5, "sample", "PAIRS", "(correct, wrong) drawn at most", "paper", at_least=1)

    locate: str = knob("auto", "locate", ("auto", "movement", "gradient", "snr"), "a weight's importance: how far the "
                       "warm-up moves it, its gradient, or (ours) that over its root mean square (auto: movement, but "
                       "snr with --memory)", "paper")
    p: float = knob(5.0, "locate", "PERCENT", "of all weights that are trained", "paper", above=0, at_most=100)
    p_forget: float = knob(0.0, "locate", "PERCENT", "for forgetting alone (0: --p)", at_least=0, at_most=100)
    p_improve: float = knob(0.0, "locate", "PERCENT", "for improving alone (0: --p)", at_least=0, at_most=100)
    locate_pairs: int = knob(512, "locate", "PAIRS", "for the gradient and its overlap with movement", at_least=1)

    token_weights: str = knob("threshold", "reward", ("threshold", "soft", "released", "edit", "uniform"),
                              "threshold: 1 where score < --threshold; soft: 1 - score; released: the score, as in "
                              "the official code; edit: 1 outside the edit alignment; uniform: 1", "paper")
    threshold: float = knob(0.5, "reward", "SCORE", "under which a token is unaligned", "paper", at_least=0, at_most=1)
    reward_base: str = knob("", "reward", "FOLDER", "what the rewriting model is trained from (none: the policy)")
    epsilon: float = knob(0.1, "improve", "SHARE", "of rejected tokens that counts", "official", above=0, at_most=1)

    beta: float = knob(0.1, "training", "NUMBER", "strength of the reference in all losses but SimPO's", "paper",
                       above=0)
    rdpo_alpha: float = knob(0.01, "dpo", "NUMBER", "reward that a token of length costs in rdpo")
    simpo_beta: float = knob(2.0, "dpo", "NUMBER", "scale of simpo's mean log-probs (its paper: 2 to 2.5)", above=0)
    simpo_gamma: float = knob(1.0, "dpo", "NUMBER", "margin that simpo asks for (its paper: 0.3 to 1.6)")
    clip: float = knob(1.0, "training", "NORM", "of the selected weights' gradient at most", "official", above=0)
    weight_decay: float = knob(0.0, "training", "RATE", "of the selected weights", "official")
    max_steps: int = knob(0, "training", "STEPS", "of the optimizer at most (0: as epochs say)")
    micro_batch: int = knob(0, "training", "ROWS", "in a forward pass (0: as --micro-tokens allows)")
    micro_tokens: int = knob(4096, "training", "TOKENS", "in a forward pass", at_least=1)
    dtype: str = knob("auto", "training", ("auto", "bf16", "fp32"), "of the weights (auto: bf16 on CUDA)")
    deterministic: bool = knob(False, "training", "", "bit for bit equal runs on CUDA too, by slower, ordered sums")
    device: str = knob("auto", "training", "NAME", "cuda, cuda:1, mps or cpu (auto: the best there is)")

    memory: str = knob("", "memory", ("", "24gb", "16gb", "12gb", "8gb"), "fit every stage into such a card: chooses "
                       "this group's flags, --micro-tokens and --sample-batch, beginning from what is said of them")
    int8: bool = knob(False, "memory", "", "8 bits for the linear layers' weights that a stage does not train")
    state_bits: int = knob(32, "memory", (8, 32), "of an optimizer moment; 8 are blockwise")
    stream: bool = knob(False, "memory", "", "with --int8, on CUDA: these weights stay in host memory, read from there")
    offload: str = knob("none", "memory", ("none", "state", "gradient"), "on the host: optimizer's state, gradient too")
    p_sft: float = knob(0.0, "memory", "PERCENT", "of the weights that sft and the rewriting model train, located by "
                        "the gradient of their own loss (0: all)", at_least=0, at_most=100)
    locate_groups: int = knob(0, "memory", "PASSES", "over the pairs in locating, each for a group of tensors (0: as "
                              "many as the memory needs)")
    checkpoint_blocks: int = knob(-1, "memory", "BLOCKS", "that recompute activations in backward, the first ones "
                                  "(-1: on CUDA as many as the memory needs, on CPU none)", at_least=-1)
    head_mb: int = knob(256, "memory", "MB", "of fp32 logits made at a time", at_least=1)
    compile: bool = knob(False, "memory", "", "torch.compile for the pointwise pieces (CUDA)")

    eval_every: int = knob(0, "watching", "STEPS", "between validations in sft, forget, improve and dpo; the "
                           "best weights are kept (0: off)")
    save_minutes: float = knob(10.0, "watching", "MINUTES", "between checkpoints inside a stage")
    stages: dict[str, Stage] = field(default_factory=lambda: {s: replace(OFFICIAL[s], lr=0.0, batch=0) for s in STAGES})


KNOBS = {f.name: f for f in fields(Config) if f.metadata} | {f"{s}_{f.name}": f for s in STAGES for f in fields(Stage)}


def flat(config: Config) -> dict:
    """All settings by their names in KNOBS: a stage's lr is "improve_lr"."""
    values = asdict(config)
    stages = values.pop("stages")
    return values | {f"{s}_{k}": v for s, own in stages.items() for k, v in own.items()}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with a suggestion for a mistyped flag."""

    def error(self, message):
        """Raises UserError; argparse would print its usage and exit."""
        if unknown := re.match(r"unrecognized arguments: (-[\w-]+)", message):
            flags = [*self._option_string_actions]
            own = "--improve" + unknown[1].removeprefix("-")  # --lr
            near = f"; each stage has its own, as {own}" if own in flags else similar(unknown[1], flags)
            message = f"unknown flag {unknown[1]}{near or '; see --help'}"
        raise UserError(message.removeprefix("argument "))


def rate_flag(stage: str) -> str:
    """The flag of a stage's learning rate; the methods to compare with use sft's or dpo's."""
    return f"--{SETTINGS.get(stage, stage)}-lr"


def similar(word: str, words) -> str:
    """'; did you mean X?' when one of `words` is near, else ''."""
    close = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {close[0]}?" if close else ""


def add_knob(group, name: str, default) -> None:
    """Make a knob's flag. It is absent from the result unless given, and `check` judges its value."""
    f, unit = KNOBS[name], KNOBS[name].metadata["unit"]
    shown = " ".join(default) if isinstance(default, list) else ("off", "on")[default] if f.type is bool else default
    source = f.metadata["source"] or ("official" if name.startswith(RELEASED) else "ours")
    options = {"help": f"{f.metadata['help']} [{shown if shown != '' else 'none'}; {source}]".replace("%", "%%")}
    if f.type is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = unit if isinstance(unit, str) else "{" + ",".join(str(u) for u in unit if u) + "}"
        options["type"] = f.type if f.type in (int, float) else str
        options["nargs"] = "+" if f.type == list[str] else None
    group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **options)


def make_parser() -> Parser:
    """All flags of train.py, grouped as --help shows them."""
    wide = partial(argparse.HelpFormatter, max_help_position=40)  # a flag and its text on one line
    parser = Parser(usage="train.py [--model FOLDER --train FILE --test FILE] [...]", allow_abbrev=False, description=(
        "ALLO: align a language model by training few weights on few tokens. Without arguments: the demo, whose own "
        "settings --print-config shows. In brackets: default and source."), prog="train.py", formatter_class=wide)
    parser.add_argument("--config", metavar="FILE.json", help="read settings from a file; flags override it")
    parser.add_argument("--print-config", action="store_true", help="print the settings as JSON and stop")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for stage, s in OFFICIAL.items():
        groups[stage].description = f"at 7B: --{stage}-lr {s.lr:g}, --{stage}-batch {s.batch}"
    for name, default in flat(Config()).items():
        add_knob(groups[KNOBS[name].metadata["group"] or name.split("_")[0]], name, default)
    return parser


def expected(f: Field, value) -> str:
    """What the knob `f` wants, in words, when `value` is not that; else ''."""
    (words, is_kind), unit, limits = KINDS[f.type], f.metadata["unit"], f.metadata["limits"].items()
    values = value if isinstance(value, list) else [value]
    odd = [v for v in values if v not in unit] if isinstance(unit, tuple) else []
    if odd:
        return "one of " + ", ".join(str(u) for u in unit if u) + similar(str(odd[0]), map(str, unit))
    if is_kind(value) and all(LIMITS[limit](value, bound) for limit, bound in limits):
        return ""
    return words + " and".join(f" {limit.replace('_', ' ')} {bound}" for limit, bound in limits)


def check(values: dict, file: str = "") -> None:
    """Refuse settings (as `flat` names them) that cannot mean anything.

    Raises UserError naming the flag (or `file` and key), its value and what was expected.
    """
    for name, value in values.items():
        if name not in KNOBS:
            raise UserError(f"{file}: {name} is no setting of ours{similar(name, KNOBS)}")
        if wanted := expected(KNOBS[name], value):
            found = f"{file}: {name} is {value!r}" if file else f"--{name.replace('_', '-')} is {value}"
            raise UserError(f"{found}, expected {wanted}")


def from_file(path: str) -> dict:
    """Checked settings of a --config file: as --print-config shows them, or another run's config.json."""
    values = json.loads(json.dumps(read_json(path)).replace('"~/', HOME))
    if isinstance(values.get("config"), dict):
        values = values["config"]
    check(values, path)
    return values


def parse(argv: list[str]) -> Config:
    """Command line -> checked Config; without model and data the demo's settings apply. Raises UserError."""
    given = vars(make_parser().parse_args(argv))
    path, show = given.pop("config"), given.pop("print_config")
    check(given)
    values = (from_file(path) if path else {}) | given
    own = any(values.get(key) for key in ("model", "train", "pairs"))
    values = flat(Config()) | ({} if own else DEMO) | values
    stages = {s: Stage(*(values.pop(f"{s}_{f.name}") for f in fields(Stage))) for s in STAGES}
    config = Config(**values, stages=stages)
    check_together(config)
    if show:
        print(json.dumps(flat(config), indent=2), flush=True)
        raise SystemExit(0)
    return config


def check_together(c: Config) -> None:
    """Refuse settings that contradict each other, or ask for rows that nobody gave. Raises UserError."""
    if (c.temperature == 0 or c.n == 1) and not (c.samples or c.pairs or c.only_sft):
        raise UserError("--temperature 0 or --n 1 gives a question no two different responses, as pairs need")
    if c.stream and not (c.int8 or c.memory):
        raise UserError("--stream keeps the weights that --int8 makes on the host; give both")
    if c.token_weights_file and c.token_weights in ("edit", "uniform"):
        raise UserError(f"--token-weights is {c.token_weights}, which uses no scores; with --token-weights-file, "
                        "expected threshold, soft or released")
    if c.mask and c.mask_source not in ("auto", "top"):
        raise UserError(f"--mask-source is {c.mask_source}, which makes a mask of its own or none; leave out --mask")
    if 0 < c.max_length < 8:
        raise UserError(f"--max-length is {c.max_length}, expected at least 8 tokens, or 0")
    if c.samples and c.pairs:
        raise UserError("--samples and --pairs are both given; pairs replace the samples, expected one of them")
    if (c.model or c.test or c.val) and not (c.train or c.pairs):
        raise UserError("--model, --test and --val need rows to train on: --train FILE (task rows) or --pairs FILE "
                        "(preferences)")
