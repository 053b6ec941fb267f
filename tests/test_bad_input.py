"""Every mistake of the user's: exit code 2, one line `error: ...` naming the place."""

import json
import math
import re
import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from helpers import LLAMA3, RAW, error_of, tiny_model, write_tokenizer
from runs import ROOT, lines, pair, run, task
from safetensors.torch import load, save

import eval as evaluation
import train
from allo_mini import UserError
from allo_mini.checkpoint import find_folder
from allo_mini.mask import Selected, to_tensors
from allo_mini.run.config import Config

T, P = "train --model model --train t.jsonl", "train --model model --pairs p.jsonl"
E, Q, J = (f"eval --model model --test {name}.jsonl" for name in ("t", "q", "arena_hard"))
GOOD = {"t.jsonl": lines(*(task(f"2 + {i}?") for i in range(4))),
        "test.jsonl": lines(task("5 + 5?", "10")),
        "p.jsonl": lines(*(pair(f"Is {i}?") for i in range(12)))}


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A working directory with good task rows, test rows, pairs and a tiny model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "model", tmp_path / "model")
    write(tmp_path, GOOD)
    return tmp_path


def write(folder, files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(command, says: str, place, capsys) -> None:
    """Run a command, which must fail as promised, its line naming `says`; what was there stays."""
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    name, *words = command.split()
    assert {"train": train, "eval": evaluation}[name].main(words) == 2
    assert says in error_of(capsys)
    assert before == {p: p.read_bytes() for p in before}


# ---- rows: what the file holds, what the line says -----------------------------------------------

USER, SO = [{"role": "user", "content": "b"}], {"role": "assistant", "content": "c"}
ROWS = {
    "broken JSON": (lines(task("a")) + '{"input": "b", \n', "t.jsonl:2"),
    "not UTF-8": (b'{"input": "caf\xe9", "output": "x"}\n', "t.jsonl"), "empty": ("", "t.jsonl"),
    "an array": (json.dumps([task("a")]), "t.jsonl"), "blank lines": ("\n\r\n \n", "t.jsonl"),
    "very deep": ('{"input": ' + "[" * 100_000 + "\n", "t.jsonl"),
    "half a surrogate": ('{"input": "a \\ud800", "output": "x"}\n', "t.jsonl:1"),
    "a number for a string": (lines(task("a"), {"input": 5, "output": "x"}), "t.jsonl:2"),
    "a list as answer": (lines(task("a") | {"answer": [1]}), "t.jsonl:1"),
    "no input": (lines({"inputs": "a", "output": "x"}), "input"),
    "no output": (lines({"input": "a", "answer": "x"}), "t.jsonl:1: missing key 'output' beside"),
    "an empty question": (lines(task("  ")), "t.jsonl:1"),
    "preferences": (GOOD["p.jsonl"], "t.jsonl:1"),
    "no assistant's turn": (lines(task("a"), {"messages": [USER[0], USER[0]]}), "t.jsonl:2"),
    "a number as completion": (lines({"prompt": "a", "completion": 5}), "t.jsonl:1"),
    **{f"with {key}": (lines(task("a"), task("b") | {key: ["x"]}), f"t.jsonl:2: '{key}' is not read")
       for key in ("history", "context", "options", "thinking")},
    "two questions": (lines(task("a"), task("b") | {"question": "c"}), "t.jsonl:2: two names"),
    "several messages to learn": (lines({"prompt": "a", "completion": 2 * USER}), "t.jsonl:1: sev"),
    "KTO's bad ones": (lines({"prompt": "a", "completion": "b", "label": False}), "t.jsonl:1: 'la"),
    "another's role": (lines({"messages": [*USER, {"role": "bard", "content": "b"}]}), "1: 'messages"),
    "a thought beside": (lines({"messages": [*USER, SO | {"reasoning_content": "d"}]}),
                         "t.jsonl:1: 'reasoning_content' is not"),
    "no instruction": (lines(task("a"), {"instruction": None, "output": "x"}), "t.jsonl:2"),
    "no answer anywhere": (lines({"input": "a", "output": "four"}), "The answer is X")}
PAIRS = {
    "task rows": (GOOD["t.jsonl"], "p.jsonl:1"),
    "no rejected": (lines({"prompt": "a", "chosen": "b"}), "p.jsonl:1"),
    "a list and a string": (lines(pair("a", USER)), "p.jsonl:1"),
    "a message without content": (lines(pair([{"role": "user"}], "b", "c")), "p.jsonl:1"),
    "nothing in common": (lines({"chosen": "yes", "rejected": "no"}), "p.jsonl:1"),
    "identical pairs": (lines(*(pair(str(i), "x", "x") for i in range(12))), "identical"),
    "too long rows": (lines(*(pair(str(i), "x" * 1300) for i in range(12))), "longer"),
    "another prompt": (lines(pair("c", 2 * USER, 2 * USER)), "p.jsonl:1: 'prompt' is nowhere"),
    "a system prompt": (lines(pair("a") | {"system": "Hm."}), "p.jsonl:1: 'system' is not read"),
    "a thought beside an answer": (lines(pair(USER, [SO | {"reasoning_content": "d"}], [SO])),
                                   "p.jsonl:1: 'reasoning_content' is not"),
    "one beside messages": (lines(pair(USER, USER, USER) | {"system": "Hm."}), "p.jsonl:1: 'sys"),
    "a single pair": (lines(pair("a")), "p.jsonl")}


# ---- flags and files: the command, files, what the line says -----------------------------------

BAD = """--p 0, --p 100.5, --p -5, --p nan, --p-forget -1, --p-sft 101, --epsilon 0, --epsilon 1.5,
--top-p 0, --n 0, --n 1, --temperature 0, --temperature inf, --max-new-tokens 0,
--limit -1, --max-steps -1, --seed -1, --beta 0, --lr-sft -1, --lr-improve nan, --batch -1,
--locate-pairs 0, --micro-tokens 0, --sample-batch 0, --state-bits 16, --dtype fp23,
--locate movment, --token-weights hard, --prompt Alpaca, --method ppo, --memory 8gb, --device tpu,
--device cuda:99, --n 1.5, --temperature warm, --n, --lr 1e-5, -p 5"""
FLAGS = [
    *[(f"{T} {flag}", {}, flag.split()[0]) for flag in " ".join(BAD.split()).split(", ")],
    (T + " --sft yes", {}, "yes"), ("train --mdel model", {}, "--model"),
    ("train --model model", {}, "--train"), ("train --test test.jsonl", {}, "--train"),
    (T + " --pairs p.jsonl", {}, "--train beside --pairs"),
    ("train --model model --train c.jsonl t.jsonl", {"c.jsonl": lines({"prompt": "a", "completion": "b"})},
     "c.jsonl: strings beside questions"),
    (T + " --eval-every 2", {}, "--val"), (T + " --val test.jsonl", {}, "--eval-every"),
    (T + " --max-length 5000", {}, "--max-length"), ("train --pairs t.jsonl", {}, "give --model"),
    ("train --model model --train nowhere.jsonl", {}, "nowhere.jsonl"),
    ("train --model model --train model", {}, "model"),
    (T + " --test " + "n" * 300, {}, "File name too long"),
    ("train --model no/such/model --train t.jsonl", {}, "no/such/model"),
    ("train --model t.jsonl --train t.jsonl", {}, "t.jsonl"),
    ("train --model nobody/nothing --train t.jsonl", {}, "hub"),
    ("train --model a/b --train t.jsonl --dry-run", {}, "not cached: `hf download a/b"),
    ("train --model nobody/no@v1 --train t.jsonl --dry-run", {}, "nobody/no --revision v1`"),
    *[(f"{words} t.jsonl --model lora", {"lora/adapter_config.json": "{}"},
       "lora: adapter_config.json says this is a LoRA adapter; merge it into its base model")
      for words in ("train --train", "eval --test")],
    ("train --train t.jsonl --model r", {"r/.lock": ""}, "r: a run's folder; say which model"),
    (T + " --test t.jsonl", {}, "t.jsonl"),
    (T + " --test q.jsonl", {"q.jsonl": lines({"input": "a"})}, "q.jsonl"),
    (T + " --test p.jsonl", {}, "preference"), (P + " --test p.jsonl test.jsonl", {}, "preference"),
    (T + " --out t.jsonl", {}, "t.jsonl"), (T + " --out t.jsonl/run", {}, "t.jsonl/run"),
    (T + " --out foreign", {"foreign/thesis.tex": "years"}, "thesis.tex"),
    (T + " --out /proc/nothing/run", {}, "/proc/nothing/run"),
    *[(T + " --out foreign", {"foreign/config.json": content}, "foreign") for content in
      ("{}", "{", "[]", b"\xff", '{"config": 5, "inputs": 5, "machine": 5}')],
    (T + " --out old", {"old/config.json": '{"config": {}, "data": {}, "machine": {}}'}, "old"),
    (T + " --config c.json", {}, "c.json"),
    *[(T + " --config c.json", {"c.json": content}, says) for content, says in [
        ("{\n'p': 5}", "c.json"), ("[]", "c.json"), (b'{"model": "\xe9"}', "c.json"),
        ('{"epsilom": 0.1}', "epsilom"), ('{"p": "5"}', "p is '5'"), ('{"n": true}', "n is True"),
        ('{"sft": 1}', "sft is 1"), ('{"test": "t.jsonl"}', "test is"), ('{"p": NaN}', "p is nan"),
        ('{"save_minutes": 0}', "save_minutes"), ('{"schedules": {"sft": 5}}', "schedules"),
        ('{"schedules": {"stf": {"batch": 5}}}', "stf"),
        ('{"schedules": {"sft": {"warmup": 100}}}', "warmup a share of the steps"),
        ('{"schedules": {"sft": {"batch": 2.5}}}', "batch is a number of rows"),
        ('{"schedules": {"sft": {"epochs": Infinity}}}', "sft"), ('{"stop": [""]}', "stop is"),
        ('{"config": {"sfd": 1}}', "sfd")]],
    ("eval --model model", {}, "--test"), ("eval --model model --tset t.jsonl", {}, "--test?"),
    (E + " --lmit 5", {}, "--limit"),
    (E + " --limit -1", {}, "--limit"), (E + " --max-length 5000", {}, "--max-length"),
    (E + " --patch nowhere", {}, "nowhere"), (E + " --patch t.jsonl", {}, "t.jsonl"),
    (E + " --task gms8k", {}, "'gms8k' (choose from 'ecqa'"), (E + " --chat", {}, "--chat"),
    (E + " --against nowhere", {}, "nowhere/t.jsonl"),
    (E + " --against bad", {"bad/t.jsonl": lines({"input": "a"})}, "which should hold answers"),
    (E + " --task alpaca_eval", {}, "t.jsonl:1: missing key 'instruction'"),
    (J, {"arena_hard.jsonl": lines({"uid": "x"})}, "arena_hard.jsonl:1: missing key 'prompt'"),
    (Q, {"q.jsonl": lines({"input": "a"})}, "q.jsonl:1: a --test row needs 'answer'"),
    (Q, {"q.jsonl": ""}, "q.jsonl"), (E + " --out run", {"run": "a file"}, "run"),
    (E + " --out run", {"run/t.jsonl": '{"a": 1}\n'}, "run/t.jsonl"),
    (E + " a/t.jsonl --out run", {"a/t.jsonl": GOOD["t.jsonl"]}, "--test"),
    ("eval --model nowhere --test t.jsonl", {}, "nowhere")]


NAMES = [*ROWS, *PAIRS, *(case[0][-60:] for case in FLAGS)]
CASES = [*((T, {"t.jsonl": content}, says) for content, says in ROWS.values()),
         *((P, {"p.jsonl": content}, says) for content, says in PAIRS.values()), *FLAGS]


@pytest.mark.parametrize("command, files, says", CASES, ids=NAMES)
def test_rows_flags_and_files(command, files, says, place, capsys):
    write(place, files)
    refused(command, says, place, capsys)


NORM = "model.norm.weight"
VALUES = {  # a key of config.json -> values that the line names it for
    "architectures": [["GPT2LMHeadModel"], None, []], "hidden_size": [-16, "16"],
    "vocab_size": [True, "120", None, 0, 120.0, []], "intermediate_size": [None],
    "num_hidden_layers": [10 ** 12], "num_attention_heads": [0], "head_dim": ["4"],
    "rms_norm_eps": ["1e-6", True, math.nan], "hidden_act": ["gelu", 3],
    "tie_word_embeddings": ["false"], "attention_bias": ["no"], "max_position_embeddings": [0],
    "rope_theta": ["1e4", 0, True, math.inf, 10 ** 400], "sliding_window": ["4096", -1]}
CONFIGS = [  # a key, a value, what the line says
    *((key, value, f"config.json: {key} is ") for key in VALUES for value in VALUES[key]),
    *(("architectures", value, "config.json: ") for value in ("Llama", 2, [["LlamaForCausalLM"]])),
    ("vocab_size", 119, "[119, 16]"), ("num_key_value_heads", 3, "[12, 16]"),
    ("head_dim", 7, "[28, 16]"), ("rope_parameters", [1], "config.json: "),
    ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}, "'longrope'"),
    *(("rope_scaling", value, "config.json: ") for value in (4, "linear", {"type": ["linear"]})),
    ("rope_scaling", {"type": "yarn", "factor": 2.0}, "'yarn'"), ("is_causal", False, "is_causal"),
    ("num_attention_heads", 99, "more than hidden_size"),
    ("tie_word_embeddings", True, "true, but model.safetensors holds an lm_head of its own"),
    *(("rope_scaling", {"type": "linear", "factor": value}, "factor is") for value in (None, "2")),
    ("rope_scaling", LLAMA3 | {"low_freq_factor": None}, "low_freq_factor"),
    ("rope_scaling", LLAMA3 | {"original_max_position_embeddings": "8"}, "original_max_position"),
    *(("eos_token_id", value, "eos_token_id") for value in ("x", [[2]]))]
W = "model.safetensors"
MODELS = {  # a file of the model's folder; its new content, or how it is made of the old; the line
    **{f"{key} {str(value)[:30]}": ("config.json", json.dumps({**RAW, key: value}), says)
       for key, value, says in CONFIGS},
    **{f"no {name}": (name, None, name) for name in ("config.json", "tokenizer.json", W)},
    **{f"{size} bytes of {name}": (name, lambda data, size=size: data[:size], name)
       for name, size in [("config.json", 200), ("tokenizer.json", 1000), (W, -1), (W, 20_000),
                          (W, 500), (W, 8), (W, 0)]},
    "another shape": (W, lambda data: save(load(data) | {NORM: torch.ones(15)}), f"{NORM} is"),
    "integers": (W, lambda data: save(load(data) | {NORM: torch.ones(16).int()}), f"{NORM} is"),
    "a tensor too few": (
        W, lambda data: save({n: t for n, t in load(data).items() if n != NORM}), f"{NORM} is mis"),
    "a tensor too many": (W, lambda data: save(load(data) | {"extra": torch.ones(1)}), "extra is"),
    "broken settings": ("tokenizer_config.json", "{", "tokenizer_config.json"),
    "unknown eos": ("tokenizer_config.json", '{"eos_token": "<end>"}', "eos_token"),
    "no eos": ("tokenizer_config.json", "{}", "eos_token"),
    "odd generation": ("generation_config.json", '{"eos_token_id": {}}', "eos_token_id"),
    "no template in UTF-8": ("chat_template.jinja", b"\xff", "chat_template.jinja")}


@pytest.mark.parametrize("program", [T + " --method sft", E], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_model_folders(name, program, place, capsys):
    file, content, says = MODELS[name]
    path = place / "model" / file
    if content is None:
        path.unlink()
    else:
        write(path.parent, {file: content(path.read_bytes()) if callable(content) else content})
    refused(program, says, place, capsys)


TEMPLATES = [None, "{% for %}", "{{ raise_exception('only\\nin pairs') }}", "{{ nothing.at.all }}",
             "{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}",
             "{{ raise_exception.__globals__.os }}", "{{ ''.__class__.__base__.__subclasses__() }}",
             "{% import 'os' as os %}{{ os }}", "{% include '/etc/passwd' %}",
             "{{ cycler.__init__.__globals__.os }}", "{{ range(10**7) | list }}"]


@pytest.mark.parametrize("program", [P, E], ids=["pairs", "eval"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(template, program, place, capsys):
    """They fail in one line, and reach nothing outside their sandbox."""
    write_tokenizer(place / "model", **({"chat_template": template} if template else {}))
    refused(program + " --prompt chat", "template", place, capsys)


def masked(change=lambda mask: None, fill=True) -> bytes:
    """A mask file."""
    mask = {name: torch.full(p.shape, fill) for name, p in tiny_model().named_parameters()}
    change(mask)
    shapes = {name: " ".join(map(str, m.shape)) for name, m in mask.items()}
    return save(to_tensors({name: Selected.from_dense(m) for name, m in mask.items()}), shapes)


SAMPLES = lines(*({"input": f"2 + {i}?", "samples": ["The answer is 4", "The answer is 5"]}
                  for i in range(4)))
SCORED = {"input": "2 + 1?", "output": "The answer is 5"}
SAMPLED = {"input": "2 + 1?", "samples": ["a", "b"]}
LAID = {
    "samples.jsonl": ["", "[1]\n", lines({"input": "2 + 1?"}), lines({"samples": ["a"]}),
                      lines(SAMPLED | {"input": 1}), lines(SAMPLED | {"samples": [5]}),
                      lines(SAMPLED | {"input": ["a"]}), lines(SAMPLED | {"samples": "x"}),
                      lines(SAMPLED), lines(SAMPLED | {"input": "else"}),
                      lines(SAMPLED | {"unfinished": "x"})],
    "token_weights.jsonl": ["", "{", lines(SCORED), lines(SCORED | {"reward": [0.5, "x"]}),
                            lines(SCORED | {"reward": [0.5]}), lines(SCORED | {"reward": 5}),
                            lines(SCORED | {"reward": [3.0] * 16}),
                            lines(SCORED | {"input": "else", "reward": [0.5] * 16})],
    "mask.safetensors": ["no tensors", masked(fill=False), masked(lambda mask: mask.pop(NORM)),
                         masked(lambda mask: mask.update({NORM: torch.ones(8).bool()})),
                         masked(lambda mask: mask.update(other=torch.ones(8).bool())),
                         masked()[:-9]],
    "movement.safetensors": ["x", masked()], "forget.safetensors": ["x"],
    "rewriter/config.json": ["{}"], "improve/model.safetensors": ["x"]}
LAID = [(name, content) for name, contents in LAID.items() for content in contents]


@pytest.mark.parametrize("name, content", LAID, ids=[f"{n} {str(c)[:30]}" for n, c in LAID])
def test_artefacts_laid_in_by_hand(name, content, place, capsys):
    """Those of another model or run, or broken."""
    write(place, {"run/samples.jsonl": SAMPLES, f"run/{name}": content})
    command = T + " --max-length 600 --max-steps 1 --method allo --out run"
    command += " --locate random" * (name[:4] != "move")
    refused(command, name.split("/")[0].split(".")[0].rstrip("s"), place, capsys)


# ---- trust: no code from data, named downloads only, no paths told -----------------------------

SOURCES = [*ROOT.glob("*.py"), *(ROOT / "allo_mini").rglob("*.py")]
CODE_FROM_DATA = (r"torch\.load\b|pickle|\bdill\b|\bjoblib|\bmarshal\b|\bshelve\b|trust_remote|"
                  r"\bexec\(|(?<![\w.])eval\(|(?<![\w.])compile\(|__import__|importlib\b|yaml\.|"
                  r"\bnp\.load\b|torch\.hub|shell=True")
OFFERED = ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors",
           "adapter_config.json", "modeling_evil.py", "pytorch_model.bin", "model.py", "model.pt",
           "model.safetensors.py", "requirements.txt", "training_args.bin"]


def test_no_source_turns_data_into_code():
    assert len(SOURCES) > 20
    assert [f"{path.name}: {line}" for path in SOURCES for line in path.read_text().splitlines()
            if re.search(CODE_FROM_DATA, line)] == []


def test_downloads_are_the_named_files_of_the_pinned_revision(tmp_path, monkeypatch):
    asked, commit = [], tmp_path / ("a" * 40)
    commit.mkdir()

    def download(name, revision=None, allow_patterns=(), local_files_only=False):
        asked.append((name, revision, local_files_only))
        wanted = {file for file in OFFERED if any(fnmatch(file, p) for p in allow_patterns)}
        assert wanted == {*OFFERED[:5]}
        return str(commit)

    def fail(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for revision in ("", "@v1", "@" + "a" * 40):
        assert find_folder(f"some/model{revision}") == commit
    find_folder("some/model", download=False)
    assert asked == [("some/model", r, False) for r in (None, "v1", "a" * 40)] + [
        ("some/model", None, True)]
    (commit / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="says this is a LoRA adapter; merge it"):
        find_folder("some/model")
    (commit / "model.safetensors").touch()  # merged already
    assert find_folder("some/model") == commit
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="some/model.*no network"):
        find_folder("some/model")


def test_no_path_token_or_code_of_a_model_is_passed_on(world, tmp_path, monkeypatch):
    shutil.copytree(world / "model", tmp_path / "model")
    secret = {"_name_or_path": "/home/other/secret", "auto_map": {"AutoModel": "evil.Model"}}
    write(tmp_path, {"model/config.json": json.dumps({**RAW, **secret})})
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    out = run(world, tmp_path / "run", "--method", "dpo", "--model", tmp_path / "model")
    for path in out.rglob("*"):
        if path.is_file():
            for secret in (b"/home/other", b"hf_verysecret", b"evil.Model"):
                assert secret not in path.read_bytes(), (path, secret)


def test_settings_that_are_none_and_lists_of_ones_own():
    with pytest.raises(TypeError, match="bta"):
        Config(bta=0.5)
    Config().stop.append("x")
    assert Config().stop == []
