"""Every setting in one place: default, meaning, bounds. Flags, --help and checks are made from it.

Later wins: defaults, the demo's settings, those of a card (CARDS) that --config FILE names, the
file's, those of a card that is a flag, flags.
"""

import argparse
import difflib
from collections import namedtuple
from dataclasses import dataclass, field, fields

from allo_mini import UserError
from allo_mini.objectives import BASELINES
from allo_mini.run.files import read_json, reading

METHODS = (*BASELINES, "allo")


# How a stage trains. lr: peak learning rate of a 7B model; batch: rows of a step at most;
# epochs: passes over the rows; warmup: share of the steps in which the rate rises.
Schedule = namedtuple("Schedule", "lr batch epochs warmup")
SCHEDULES = {  # of warmup, forget and improve the official scripts'; the others are ours
    "sft": Schedule(1e-5, 16, 3, 0.1), "rewrite": Schedule(1e-5, 16, 1, 0.1),
    "warmup": Schedule(1e-6, 32, 1, 0.1), "dpo": Schedule(1e-6, 32, 1, 0.1),
    "forget": Schedule(5e-7, 128, 1, 0.03), "improve": Schedule(5e-6, 128, 1, 0.1)}
SHARED = dict.fromkeys(BASELINES, "dpo") | {  # stage -> whose schedule and rate it has
    "sft": "sft", "rft": "sft", "more-sft": "sft", "masked-dpo": "improve"}

# `python train.py` without model and data; rates chosen on validation rows
DEMO = {"prompt": "chat", "max_length": 400, "max_new_tokens": 100, "n": 8,
        "lr_dpo": 3e-5, "lr_forget": 8e-5, "lr_improve": 2e-5}
LEAN = {"locate": "snr", "int8": False, "offload": True, "recompute": True, "micro_tokens": 2400,
        "p_sft": 10.0}
CARDS = {  # --memory: what lets a 7B model fit, at p = 5 %; each takes back what another says
    "24gb": LEAN,
    "16gb": LEAN | {"int8": True},
    "12gb": LEAN | {"int8": True, "p_sft": 5.0}}
GROUPS = {"model": "input and output", "method": "method", "n": "sampling", "lr_sft": "training",
          "memory": "memory"}  # first field -> title in --help
FLAGS = {bool: {"action": argparse.BooleanOptionalAction}, int: {"type": int},
         float: {"type": float}, str: {}, list[str]: {"nargs": "+"}}


def knob(default, text, choices=(), most=1e9):
    """A field of Config. A number is above 0 (or 0, where that is the default), at most `most`."""
    about = {"text": text, "choices": choices, "most": most}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass
class Config:
    """A run's settings; saved as config.json in the run folder."""
    model: str = knob("", "the policy: a folder, or a hub id owner/name[@revision]")
    pairs: list[str] = knob([], "preferences {prompt, chosen, rejected}, one a line of JSON Lines")
    train: list[str] = knob([], "{input, output} questions that the model answers, or rows for sft")
    test: list[str] = knob([], "rows of the result table (of pairs: a tenth, held out)")
    val: list[str] = knob([], "rows that --eval-every scores")
    limit: int = knob(0, "training rows at most (0: all)")
    prompt: str = knob("auto", "auto: alpaca for questions, none for strings, chat for messages",
                       ("auto", "alpaca", "chat", "none"))
    max_length: int = knob(0, "tokens, prompt + response (0: 1200 at most)")
    out: str = knob("", "the run's folder; it goes on if begun (runs/FILE-SEED)")
    seed: int = knob(2023, "decides data order, samples and splits")
    eval: bool = knob(True, "grade the models on --test at the end")
    dry_run: bool = knob(False, "print stages, steps, rates and memory, and stop")

    method: list[str] = knob(["dpo", "allo"], "trained from one start; sft alone does not sample; "
                             "masked-dpo is dpo of the located weights", METHODS)
    sft: bool = knob(False, "fine-tune first, on the solutions, or on what pairs have chosen")
    masked: bool = knob(False, "the other methods train allo's weights only, too")
    locate: str = knob("movement", "rank weights by how far a DPO epoch moves them, by their "
                       "gradient's signal-to-noise ratio, its size, or at random",
                       ("movement", "snr", "gradient", "random"))
    locate_pairs: int = knob(512, "pairs that snr and gradient look at")
    p: float = knob(5.0, "percent of all weights that are trained", most=100)
    p_forget: float = knob(0.0, "percent in forgetting (0: --p)", most=100)
    forget: bool = knob(True, "allo's first phase; --no-forget improves alone")
    token_weights: str = knob("threshold", "forget tokens that the rewriting model scores below "
                              "0.5; soft: by 1 - score; released: by the score; edit: those that "
                              "a rewrite replaces; uniform: all",
                              ("threshold", "soft", "released", "edit", "uniform"))
    epsilon: float = knob(0.1, "share of a rejected response that counts in improving", most=1)
    beta: float = knob(0.1, "how strongly the reference holds the model")

    n: int = knob(10, "responses sampled for a question")
    temperature: float = knob(0.7, "divides the logits")
    top_p: float = knob(0.95, "probability mass sampled from", most=1)
    max_new_tokens: int = knob(1024, "tokens of a response at most")
    stop: list[str] = knob([], "strings that end a response (for base models)")
    sample_batch: int = knob(320, "samples running at once, at most")

    lr_sft: float = knob(0.0, "peak learning rate of sft and rft (0: by the model's size)")
    lr_warmup: float = knob(0.0, "the same, of the DPO epoch that locates weights")
    lr_rewrite: float = knob(0.0, "of the rewriting model")
    lr_forget: float = knob(0.0, "of allo's forgetting")
    lr_improve: float = knob(0.0, "of allo's improving, and of masked-dpo")
    lr_dpo: float = knob(0.0, "of dpo, rdpo, ipo, bco, simpo and npo")
    batch: int = knob(0, "rows of an optimizer step (0: 8 to 128, by stage and rows)")
    max_steps: int = knob(0, "steps of a stage at most (0: all)")
    eval_every: int = knob(0, "steps between scores on --val, of pairs the raw accuracy (0: off)")
    dtype: str = knob("auto", "of the weights: bf16 on a GPU, else fp32", ("auto", "bf16", "fp32"))
    device: str = knob("auto", "cuda, cuda:1 or cpu")

    memory: str = knob("", "settings by which a 7B model fits it: also --locate snr, --p-sft",
                       tuple(CARDS))
    int8: bool = knob(False, "8 bits for matrices' weights that are not trained")
    state_bits: int = knob(32, "bits of each optimizer moment", (8, 32))
    offload: bool = knob(False, "optimizer and its gradient in host memory")
    recompute: bool = knob(False, "make activations again in backward, not keep them")
    micro_tokens: int = knob(4096, "tokens in a forward pass")
    p_sft: float = knob(0.0, "percent that sft and the rewriting model train (0: all)", most=100)

    test_limit: int = knob(0, "test rows at most (0: all)")
    threshold: float = knob(0.5, "score under which a token is unaligned", most=1)
    rdpo_alpha: float = knob(0.01, "reward that a token of length costs in rdpo")
    simpo_beta: float = knob(2.0, "scale of simpo's mean log-probs")
    simpo_gamma: float = knob(1.0, "margin that simpo asks for")
    sample_questions: int = knob(0, "questions that are sampled (0: all)")
    pairs_per_question: int = knob(5, "(right, wrong) pairs drawn at most")
    schedules: dict = knob({}, "stage -> {lr (of a 7B model), batch (at most), epochs, warmup}")
    clip: float = knob(1.0, "norm of the selected weights' gradient at most")
    weight_decay: float = knob(0.0, "of the selected weights")
    save_minutes: float = knob(10.0, "between checkpoints inside a stage")

    @property
    def sft_alone(self):
        """Whether the run is fine-tuning alone, which needs no pairs."""
        return self.method == ["sft"] and not self.masked

    def masks(self, method):
        """Whether a method trains the located weights alone."""
        return self.masked or method in ("masked-dpo", "allo")


KNOBS = {f.name: f for f in fields(Config)}


def schedule(cfg, stage, parameters, rows):
    """How a stage trains `rows` rows on a model of so many parameters.

    lr: the table's is for 7B; smaller models take sqrt(7e9 / parameters) times that, at most 100
    times. batch: the table's, but small enough for 50 steps an epoch, and not below 8. (ours)
    """
    shared = SHARED.get(stage, stage.split("-")[0])  # a fork's forget-2 is as forget; see forks.md
    plan = SCHEDULES[shared]._replace(**cfg.schedules.get(shared, {}))
    scale = min(100.0, max(1.0, (7e9 / parameters) ** 0.5))
    lr = getattr(cfg, f"lr_{shared}") or float(f"{plan.lr * scale:.2g}")
    return plan._replace(lr=lr, batch=cfg.batch or min(plan.batch, max(8, rows // 50), rows or 1))


# ---- the command line --------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the near flag."""

    def error(self, message):
        """Raises UserError; argparse would print its usage and exit."""
        what, _, flag = message.partition(": ")
        close = difflib.get_close_matches(flag.split(" ")[0], self._option_string_actions, 1)
        if what == "unrecognized arguments" and close:
            message += f"; did you mean {close[0]}?"
        raise UserError(message)


def flag_of(name):
    """A setting's flag."""
    return f"--{name.replace('_', '-')}"


def add_flag(group, name):
    """Make a setting's flag, which is absent from the result unless given."""
    knob = KNOBS[name]
    default = getattr(Config(), name)
    text = knob.metadata["text"].replace("%", "%%")
    choices = knob.metadata["choices"]
    shown = " ".join(default) if isinstance(default, list) else default
    text += f" [{shown}]" if shown else ""
    kind = FLAGS[knob.type] | ({"choices": choices} if choices else {})
    group.add_argument(flag_of(name), help=text, default=argparse.SUPPRESS, **kind)


def make_parser():
    """The flags of train.py, in the order of their use."""
    parser = Parser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="train.py [--model FOLDER (--pairs FILE | --train FILE)] [flags]",
        description="ALLO: align a language model by training few weights on few tokens.\n\n"
                    "  python train.py                            the demo, a minute or two\n"
                    "  python train.py --model M --pairs prefs.jsonl --memory 24gb\n"
                    "  python train.py --model M --train gsm8k_train.jsonl --sft")
    parser.add_argument("--config", metavar="FILE", help="settings as JSON, also those without "
                        "flags (allo_mini/run/config.py)")
    for name in KNOBS:
        if name == "test_limit":  # it and the settings after it have no flags
            break
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        add_flag(group, name)
    return parser


def expected(name, value):
    """What a setting wants, in words, when `value` is not that; else ''."""
    knob = KNOBS[name]
    kind = knob.type
    choices = knob.metadata["choices"]
    most = knob.metadata["most"]
    wanted = f"one of {', '.join(map(str, choices))}" if choices else kind.__name__
    if kind == list[str]:
        right = isinstance(value, list) and set(map(type, value)) <= {str} and all(value)
        right = right and (not choices or value and set(value) <= set(choices))
    elif choices:
        right = value in choices or value == knob.default
    elif kind in (int, float):
        right = type(value) in (int, kind) and (0 < value <= most or value == knob.default)
        wanted += f" {'above' if knob.default else 'at least'} 0, at most {most:g}"
    else:
        right = isinstance(value, kind)
    return "" if right else wanted


def check(values, file=""):
    """Refuse settings that cannot mean anything. Raises UserError naming flag, or file and key."""
    for name, value in values.items():
        if name not in KNOBS:
            raise UserError(f"{file}: {name} is no setting of ours")
        wanted = expected(name, value)
        if wanted:
            place = f"{file}: {name}" if file else flag_of(name)
            raise UserError(f"{place} is {value!r}, expected {wanted}")
    for stage, changes in values.get("schedules", {}).items():
        with reading(f"{file}: schedules of {stage}"):
            plan = SCHEDULES[stage]._replace(**changes)
            fits = min(plan[:3]) > 0 and plan.epochs < 1e6 and type(plan.batch) is int
            if not fits or not 0 <= plan.warmup < 1:
                raise ValueError("batch is a number of rows, warmup a share of the steps, lr and "
                                 "epochs are above 0, epochs below a million")


def from_file(path):
    """Checked settings of a --config file, or of another run's config.json. Raises UserError."""
    values = read_json(path)
    if isinstance(values.get("config"), dict):
        values = values["config"]
    check(values, path)
    return values


def parse(argv):
    """Command line -> checked Config. Raises UserError."""
    given = vars(make_parser().parse_args(argv))
    path = given.pop("config")
    check(given)
    read = from_file(path) if path else {}
    values = {}
    for layer in read, given:  # a card that is a flag outranks a file
        values |= CARDS.get(layer.get("memory"), {}) | layer
    if values.get("method") == ["masked-dpo"]:  # alone it needs no warm-up
        values.setdefault("locate", "snr")
    own = any(values.get(key) for key in ("model", "train", "pairs"))
    cfg = Config(**({} if own else DEMO) | values)
    if not cfg.pairs and cfg.n == 1 and not cfg.sft_alone:
        raise UserError("--n 1 gives no two different responses, as pairs need")
    if (own or cfg.test or cfg.val) and not (cfg.model and (cfg.train or cfg.pairs)):
        raise UserError("no model or no rows to train on: give --model, a folder or a hub id, and "
                        "--pairs FILE (preferences) or --train FILE")
    if cfg.pairs and cfg.train and not cfg.sft and "sft" not in cfg.method:
        raise UserError("--train beside --pairs is for fine-tuning alone: add --sft, or drop it")
    if bool(cfg.eval_every) != bool(cfg.val) and own:
        raise UserError("--eval-every N and --val FILE belong together; give both or none")
    return cfg
