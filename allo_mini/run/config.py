"""Every setting in one place: default, meaning, bounds. Flags, --help and checks are made from it.

Later wins: defaults, the demo's settings, those of a card (CARDS) that --config FILE names, the
file's, those of a card that is a flag, flags.
"""

import argparse
import difflib
from collections import namedtuple
from copy import copy

from allo_mini import UserError
from allo_mini.objectives import BASELINES
from allo_mini.run.files import read_json, reading
from allo_mini.run.log import say

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
FLAGS = {bool: {"action": argparse.BooleanOptionalAction}, list: {"nargs": "+"}}

# A setting has its default's type. A number is above 0 (or 0, where that is the default), at most
# `most`.
Knob = namedtuple("Knob", "default text choices most", defaults=[(), 1e9])


class Config:
    """A run's settings; saved as config.json in the run folder."""
    model = Knob("", "the policy: a folder, or a hub id owner/name[@revision]")
    pairs = Knob([], "preferences {prompt, chosen, rejected}, one a line of JSON Lines")
    train = Knob([], "{input, output} questions that the model answers, or rows for sft")
    test = Knob([], "rows of the result table (of pairs: a tenth, held out)")
    val = Knob([], "rows that --eval-every scores")
    limit = Knob(0, "training rows at most (0: all)")
    prompt = Knob("auto", "auto: alpaca for questions, none for strings, chat for messages",
                  ("auto", "alpaca", "chat", "none"))
    max_length = Knob(0, "tokens, prompt + response (0: 1200 at most)")
    out = Knob("", "the run's folder; it goes on if begun (runs/FILE-SEED)")
    seed = Knob(2023, "decides data order, samples and splits")
    eval = Knob(True, "grade the models on --test at the end")
    dry_run = Knob(False, "print stages, steps, rates and memory, and stop")

    method = Knob(["dpo", "allo"], "trained from one start; sft alone does not sample; "
                  "masked-dpo is dpo of the located weights", METHODS)
    sft = Knob(False, "fine-tune first, on the solutions, or on what pairs have chosen")
    masked = Knob(False, "the other methods train allo's weights only, too")
    locate = Knob("movement", "rank weights by how far a DPO epoch moves them, by their "
                  "gradient's signal-to-noise ratio, its size, or at random",
                  ("movement", "snr", "gradient", "random"))
    locate_pairs = Knob(512, "pairs that snr and gradient look at")
    p = Knob(5.0, "percent of all weights that are trained", most=100)
    p_forget = Knob(0.0, "percent in forgetting (0: --p)", most=100)
    forget = Knob(True, "allo's first phase; --no-forget improves alone")
    token_weights = Knob("threshold", "forget tokens that the rewriting model scores below "
                         "0.5; soft: by 1 - score; released: by the score; edit: those that "
                         "a rewrite replaces; uniform: all",
                         ("threshold", "soft", "released", "edit", "uniform"))
    epsilon = Knob(0.1, "share of a rejected response that counts in improving", most=1)
    beta = Knob(0.1, "how strongly the reference holds the model")

    n = Knob(10, "responses sampled for a question")
    temperature = Knob(0.7, "divides the logits")
    top_p = Knob(0.95, "probability mass sampled from", most=1)
    max_new_tokens = Knob(1024, "tokens of a response at most")
    stop = Knob([], "strings that end a response (for base models)")
    sample_batch = Knob(320, "samples running at once, at most")

    lr_sft = Knob(0.0, "peak learning rate of sft and rft (0: by the model's size)")
    lr_warmup = Knob(0.0, "the same, of the DPO epoch that locates weights")
    lr_rewrite = Knob(0.0, "of the rewriting model")
    lr_forget = Knob(0.0, "of allo's forgetting")
    lr_improve = Knob(0.0, "of allo's improving, and of masked-dpo")
    lr_dpo = Knob(0.0, "of dpo, rdpo, ipo, bco, simpo and npo")
    batch = Knob(0, "rows of an optimizer step (0: 8 to 128, by stage and rows)")
    max_steps = Knob(0, "steps of a stage at most (0: all)")
    eval_every = Knob(0, "steps between scores on --val, of pairs the raw accuracy (0: off)")
    dtype = Knob("auto", "of the weights: bf16 on a GPU, else fp32", ("auto", "bf16", "fp32"))
    device = Knob("auto", "cuda, cuda:1 or cpu")

    memory = Knob("", "settings by which a 7B model fits it: also --locate snr, --p-sft",
                  tuple(CARDS))
    int8 = Knob(False, "8 bits for matrices' weights that are not trained")
    state_bits = Knob(32, "bits of each optimizer moment", (8, 32))
    offload = Knob(False, "optimizer and its gradient in host memory")
    recompute = Knob(False, "make activations again in backward, not keep them")
    micro_tokens = Knob(4096, "tokens in a forward pass")
    p_sft = Knob(0.0, "percent that sft and the rewriting model train (0: all)", most=100)

    test_limit = Knob(0, "test rows at most (0: all)")
    threshold = Knob(0.5, "score under which a token is unaligned", most=1)
    rdpo_alpha = Knob(0.01, "reward that a token of length costs in rdpo")
    simpo_beta = Knob(2.0, "scale of simpo's mean log-probs")
    simpo_gamma = Knob(1.0, "margin that simpo asks for")
    sample_questions = Knob(0, "questions that are sampled (0: all)")
    pairs_per_question = Knob(5, "(right, wrong) pairs drawn at most")
    schedules = Knob({}, "stage -> {lr (of a 7B model), batch (at most), epochs, warmup}")
    clip = Knob(1.0, "norm of the selected weights' gradient at most")
    weight_decay = Knob(0.0, "of the selected weights")
    save_minutes = Knob(10.0, "between checkpoints inside a stage")

    def __init__(self, **values):
        """values: those that are not the defaults."""
        if values.keys() - KNOBS:
            raise TypeError(f"no settings: {values.keys() - KNOBS}")
        defaults = {name: copy(knob.default) for name, knob in KNOBS.items()}
        vars(self).update(defaults | values)

    @property
    def sft_alone(self):
        """Whether the run is fine-tuning alone, which needs no pairs."""
        return self.method == ["sft"] and not self.masked

    def masks(self, method):
        """Whether a method trains the located weights alone."""
        return self.masked or method in ("masked-dpo", "allo")


# setting -> its Knob, in the order of --help
KNOBS = {name: knob for name, knob in vars(Config).items() if isinstance(knob, Knob)}


def schedule(cfg, stage, parameters, rows):
    """How a stage trains `rows` rows on a model of so many parameters.

    lr: the table's is for 7B; smaller models take sqrt(7e9 / parameters) times that, at most 100
    times. batch: the table's, but small enough for 50 steps an epoch, and not below 8. (ours)
    """
    shared = SHARED.get(stage, stage.split("-")[0])  # a fork's forget-2 is as forget; see forks.md
    plan = SCHEDULES[shared]._replace(**cfg.schedules.get(shared, {}))
    scale = min(100.0, max(1.0, (7e9 / parameters) ** 0.5))
    lr = getattr(cfg, f"lr_{shared}", 0) or float(f"{plan.lr * scale:.2g}")
    return plan._replace(lr=lr, batch=cfg.batch or min(plan.batch, max(8, rows // 50), rows or 1))


def training_stages(cfg):
    """The run's training stages in their order, and the percent of the weights that each trains."""
    own = cfg.p_sft or 100
    forget = {"forget": cfg.p_forget or cfg.p} if cfg.forget else {}
    stages = {"sft": own} if cfg.sft else {}
    for method in cfg.method:
        masked = cfg.masks(method)
        if masked and cfg.locate == "movement" and min([cfg.p, *forget.values()]) < 100:
            stages["warmup"] = 100
        if method == "allo":
            if forget and cfg.token_weights not in ("edit", "uniform"):
                stages["rewrite"] = own
            stages |= forget | {"improve": cfg.p}
        elif method == "sft":
            stages["more-sft" if cfg.sft else "sft"] = cfg.p if masked else own
        else:
            stages[method] = cfg.p if masked else 100
    return stages


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
    default, text, choices, _ = KNOBS[name]
    shown = " ".join(default) if isinstance(default, list) else default
    text = text.replace("%", "%%") + (f" [{shown}]" if shown else "")
    about = FLAGS.get(type(default), {"type": type(default)})
    if choices:
        about = about | {"choices": choices}
    group.add_argument(flag_of(name), help=text, default=argparse.SUPPRESS, **about)


def make_parser():
    """The flags of train.py, in the order of their use."""
    parser = Parser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="train.py [--model FOLDER (--pairs FILE | --train FILE)] [flags]",
        description="ALLO: align a language model by training few weights on few tokens.\n\n"
                    "  python train.py                            the demo, a minute or two\n"
                    "  python train.py --model M --pairs prefs.jsonl --memory 24gb --method allo\n"
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
    default, _, choices, most = KNOBS[name]
    kind = type(default)
    wanted = f"one of {', '.join(map(str, choices))}" if choices else kind.__name__
    if kind is list:
        right = isinstance(value, list) and set(map(type, value)) <= {str} and all(value)
        right = right and (not choices or value and set(value) <= set(choices))
    elif choices:
        right = value in choices or value == default
    elif kind in (int, float):
        right = type(value) in (int, kind) and (0 < value <= most or value == default)
        wanted += f" {'above' if default else 'at least'} 0, at most {most:g}"
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
    rates = {SHARED.get(stage, stage) for stage in training_stages(cfg)}
    for name in given:  # of flags alone: a file may serve many runs
        if name.startswith("lr_") and name.removeprefix("lr_") not in rates:
            say(f"{flag_of(name)} does nothing here: no stage of this run trains at it")
    return cfg
