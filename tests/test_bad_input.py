"""Every mistake of the user's: exit code 2, one line `error: ...` naming the place, and no file touched."""

import json
import shutil
import struct

import pytest
import torch
from helpers import RAW, tiny_model, write_tokenizer, write_folder
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from allo_mini.files import save_mask

TEMPLATE = ("{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '|' }}"
            "{% endfor %}")
T, P = "train --model model --train t.jsonl", "train --model model --pairs p.jsonl"
E = "eval --model model --test t.jsonl"
OUT = " --out run"


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def task(question, answer="4", **more):
    return {"input": question, "output": f"Add.\nThe answer is {answer}", **more}


def pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def talk(*words):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": word} for i, word in enumerate(words)]


GOOD = {"t.jsonl": lines(*(task(f"2 + {i}?") for i in range(4))), "test.jsonl": lines(task("5 + 5?", "10")),
        "p.jsonl": lines(*(pair(f"Is {i}?") for i in range(12)))}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny") / "model", chat_template=TEMPLATE)


@pytest.fixture
def place(model_folder, tmp_path, monkeypatch):
    """A working directory with good task rows, test rows, pairs and a tiny model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "model")
    write(tmp_path, GOOD)
    return tmp_path


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(command, says, place, capsys):
    """Run a command; it must fail as promised, its message holding every string of `says`."""
    before = tree(place)
    words = command.split() if isinstance(command, str) else command
    program = train if words[0] == "train" else evaluation
    code, errors = program.main(words[1:]), capsys.readouterr().err
    assert code == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
    for part in [says] if isinstance(says, str) else says:
        assert part in errors, errors
    assert tree(place) == before


# ---- rows: (name, what t.jsonl holds, what the message says) -----------------------------------------------

ROWS = [
    ("broken JSON", lines(task("a")) + '{"input": "b", \n', ["t.jsonl:2", "JSON"]),
    ("list of objects", json.dumps([task("a")]), ["t.jsonl: is a JSON array, expected JSON Lines (one object a line)"]),
    ("a list over many lines", "[\n" + lines(task("a")) + "]\n", ["t.jsonl: is a JSON array", "one object a line"]),
    ("a list further on", lines(task("a")) + "[1]\n", ["t.jsonl:2", "expected a JSON object, found list"]),
    ("Parquet", b"PAR1\x15\x04\x15\n\x80", ["t.jsonl: is Parquet", "how to convert"]),
    ("gzip", b"\x1f\x8b\x08\x00\n\xff", ["t.jsonl: is gzip", "how to convert"]),
    ("an end that is missing", '{"input": "b", "output": \n', ["t.jsonl:1", "column 25"]),
    ("a word", '"input"\n', ["t.jsonl:1", "found str"]),
    ("null", "null\n", ["t.jsonl:1", "found NoneType"]),
    ("not UTF-8", b'{"input": "caf\xe9", "output": "x"}\n', ["t.jsonl:1", "UTF-8"]),
    ("UTF-16", lines(task("a")).encode("utf-16"), ["t.jsonl:1", "UTF-8"]),
    ("lone surrogate", '{"input": "a \\ud800", "output": "x"}\n', ["t.jsonl:1", "'input'", "surrogate"]),
    ("NaN", '{"input": "a", "output": "The answer is 1", "answer": NaN}\n', ["t.jsonl:1", "NaN"]),
    ("key twice", '{"input": "a", "input": "b", "output": "x"}\n', ["t.jsonl:1", "'input' appears twice"]),
    ("empty file", "", ["t.jsonl", "no rows"]),
    ("blank lines only", "\n\r\n \n", ["t.jsonl", "no rows"]),
    ("number for a string", lines(task("a"), {"input": 5, "output": "x"}), ["t.jsonl:2", "'input' is int"]),
    ("null for a string", lines({"input": "a", "output": None}), ["t.jsonl:1", "'output' is NoneType"]),
    ("list as answer", lines(task("a", answer=1) | {"answer": [1]}), ["t.jsonl:1", "'answer' is list"]),
    ("true as answer", lines(task("a") | {"answer": True}), ["t.jsonl:1", "'answer' is bool"]),
    ("number as rewrite", lines(task("a", rewrite=3)), ["t.jsonl:1", "'rewrite' is int"]),
    ("no input", lines({"inputs": "a", "output": "x"}), ["t.jsonl:1", "missing key 'input'", "'inputs'"]),
    ("no output", lines({"input": "a", "answer": "x"}), ["t.jsonl:1", "missing key 'output'"]),
    ("empty object", "{}\n", ["t.jsonl:1", "missing key 'input'", "no keys"]),
    ("empty question", lines(task("  ")), ["t.jsonl:1", "'input' is empty"]),
    ("preference rows", GOOD["p.jsonl"], ["t.jsonl:1", "missing key 'input'", "--pairs"]),
    ("both kinds", lines(task("a"), pair("b")), ["t.jsonl:2", "missing key 'input'"]),
    ("no answer anywhere", lines({"input": "a", "output": "four"}), ["t.jsonl", "The answer is X"]),
    ("very deep JSON", '{"input": ' + "[" * 100_000 + "\n", ["t.jsonl:1", "JSON"]),
    ("a very long number", '{"input": ' + "9" * 5000 + "}\n", ["t.jsonl:1"]),
]


@pytest.mark.parametrize("content, says", [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_task_rows(content, says, place, capsys):
    write(place, {"t.jsonl": content})
    refused(T, says, place, capsys)


PAIRS = [
    ("task rows", GOOD["t.jsonl"], ["p.jsonl:1", "missing key 'chosen'", "'input'"]),
    ("both kinds", lines(pair("a"), task("b")), ["p.jsonl:2", "missing key 'chosen'"]),
    ("no rejected", lines({"prompt": "a", "chosen": "b"}), ["p.jsonl:1", "missing key 'rejected'"]),
    ("number as chosen", lines(pair("a", 5)), ["p.jsonl:1", "'chosen' is int"]),
    ("null as prompt", lines(pair(None)), ["p.jsonl:1", "'prompt' is NoneType"]),
    ("list and string", lines(pair("a", talk("b"), "c")),
     ["p.jsonl:1", "all be strings or all message lists"]),
    ("a message without content", lines(pair([{"role": "user"}], talk("b"), talk("c"))),
     ["p.jsonl:1", "'prompt'"]),
    ("a message that is a string", lines(pair(["hi"], talk("b"), talk("c"))), ["p.jsonl:1", "'hi'"]),
    ("no messages", lines(pair([], talk("b"), talk("c"))), ["p.jsonl:1", "'prompt'"]),
    ("half a surrogate in a message", '{"prompt": "a", "chosen": [{"role": "user", "content": "\\ud800"}], '
     '"rejected": "x"}\n', ["p.jsonl:1", "surrogate"]),
    ("nothing in common", lines({"chosen": "yes", "rejected": "no"}), ["p.jsonl:1", "no 'prompt'"]),
    ("a misspelt prompt", lines(pair("a"), {"promt": "2 + 2", "chosen": "The answer is 4", "rejected": "The answer is 5"}),
     ["p.jsonl:2", "no 'prompt', but 'promt'; rename it"]),
    ("another name for the prompt", lines({"chosen": "It is 4", "rejected": "It is 5", "question": "2 + 2"}),
     ["p.jsonl:1", "no 'prompt', but 'question'"]),
    ("implicit, two kinds", lines({"chosen": "yes", "rejected": talk("a")}),
     ["p.jsonl:1", "'rejected' must all be strings or all message lists"]),
    ("unpaired rows", lines({"prompt": "a", "completion": "b", "label": True}), ["p.jsonl:1", "unpaired", "'rejected'"]),
    ("a misspelt role", lines(pair([{"role": "usr", "content": "a"}], talk("b"), talk("c"))),
     ["p.jsonl:1", "'prompt' has the role 'usr', expected one of system,", "did you mean user?"]),
    ("ShareGPT's roles", lines(pair([{"role": "human", "content": "a"}], talk("b"), talk("c"))),
     ["p.jsonl:1", "'prompt' has the role 'human', expected one of"]),
    ("a system prompt beside", lines({"system": "Be terse.", **pair("a", "b", "c")}), ["p.jsonl:1", "'system' is not read"]),
    ("turns beside", lines({"conversations": [], "chosen": "The b", "rejected": "The c"}), ["p.jsonl:1", "'conversations'"]),
    ("only empty responses", lines(*(pair(str(i), "", "x") for i in range(12))),
     ["p.jsonl", "empty response"]),
    ("only identical pairs", lines(*(pair(str(i), "x", "x") for i in range(12))),
     ["p.jsonl", "identical pair"]),
    ("only too long rows", lines(*(pair(str(i), "x" * 1300) for i in range(12))), ["p.jsonl", "longer than"]),
    ("a single pair", lines(pair("a")), ["p.jsonl", "no rows are left"]),
]


@pytest.mark.parametrize("content, says", [r[1:] for r in PAIRS], ids=[r[0] for r in PAIRS])
def test_pair_rows(content, says, place, capsys):
    write(place, {"p.jsonl": content})
    refused(P, says, place, capsys)


# ---- flags and files: (command, files, what the message says) ----------------------------------------------

LONG = "n" * 300
RANGES = """
--p 0, --p 100.5, --p -5, --p nan, --p-forget -1, --p-improve 101, --epsilon 0, --epsilon 1.5, --top-p 0,
--n 0, --temperature -1, --temperature inf, --max-new-tokens 0, --sample-batch 0,
--pairs-per-question 0, --locate-pairs 0, --micro-tokens 0, --max-length 7, --limit -1, --test-limit -1,
--val-rows -1, --max-steps -1, --seed -1, --micro-batch -1, --eval-every -1, --weight-decay -1,
--save-minutes -1, --beta 0, --clip 0, --threshold 1.5, --checkpoint-blocks -2, --sft-lr -1,
--improve-lr nan, --forget-batch -1, --dpo-epochs 0, --warmup-warmup 2, --p 1e-07"""
RANGES = " ".join(RANGES.split()).split(", ")
FLAGS = [
    ("train --mdel model", {}, ["--mdel", "did you mean --model?"]),
    (T + " --lr 1e-5", {}, ["unknown flag --lr"]),
    (T + " -p 5", {}, ["unknown flag -p", "--p?"]),
    (T + " --sft yes", {}, "yes"),
    (T + " --n", {}, ["--n", "expected one argument"]),
    (T + " --dtype fp23", {}, ["--dtype is fp23", "did you mean fp32?"]),
    (T + " --locate movment", {}, ["--locate is movment", "did you mean movement?"]),
    (T + " --token-weights hard", {}, ["--token-weights is hard", "threshold"]),
    (T + " --prompt Alpaca", {}, ["--prompt is Alpaca", "did you mean alpaca?"]),
    *[(f"{T} {flag}", {}, [flag.replace(" ", " is "), "expected"]) for flag in RANGES],
    (T + " --n 1.5", {}, ["--n", "invalid int value: '1.5'"]),
    (T + " --temperature warm", {}, ["--temperature", "invalid float value: 'warm'"]),
    (T + " --state-bits 16", {}, ["--state-bits is 16", "one of 8, 32"]),
    ([*T.split(), "--stop", ""], {}, "--stop"),
    (T + " --temperature 0", {}, ["--temperature 0", "--n"]),
    (T + " --max-length 5000", {}, ["model/config.json", "max_position_embeddings is 4096", "--max-length"]),
    (T + " --device cuda:99", {}, "--device is cuda:99"),
    (T + " --device cpu:1", {}, "--device is cpu:1"),
    (T + f" --test {LONG}", {}, "File name too long"),
    (T + " --device gpu", {}, ["--device is gpu", "cpu"]),
    ("train --model model", {}, "--train FILE"),
    ("train --test test.jsonl", {}, "--train FILE"),
    (P + " --samples s.jsonl", {}, ["--samples", "--pairs"]),
    (T + " --token-weights edit --token-weights-file w.jsonl", {}, ["--token-weights is edit", "threshold"]),
    (T + " --method dpo --mask t.jsonl", {}, "--mask is for allo"),
    (T + " --method dpo --token-weights-file t.jsonl", {}, "--token-weights-file is for allo"),
    (T + " --only-sft --reward-model model", {}, "--reward-model is for allo, which this run does not train"),
    (T + " --stream", {}, ["--stream", "--int8"]),
    (E + " --stream", {}, ["--stream", "--int8"]),
    ("train --model model --train nowhere.jsonl", {}, ["nowhere.jsonl", "No such file"]),
    ("train --model model --train model", {}, ["model: cannot be read", "Is a directory"]),
    ("train --model model --train t.jsonl/x", {}, ["t.jsonl/x", "Not a directory"]),
    ("train --model no/such/model --train t.jsonl", {}, ["no/such/model", "no such model folder"]),
    ("train --model t.jsonl --train t.jsonl", {}, ["t.jsonl", "no such model folder"]),
    ("train --model nobody/nothing --train t.jsonl", {}, ["nobody/nothing", "hub"]),
    (T + " --test t.jsonl", {}, ["t.jsonl", "no rows are left"]),
    (T + " --val-rows 4", {}, ["t.jsonl", "no rows are left"]),
    (T + " --test q.jsonl", {"q.jsonl": lines({"input": "a"})}, ["q.jsonl:1", "'answer'"]),
    (T + " --test q.jsonl", {"q.jsonl": lines(task("a"), {"input": "b", "output": "5"})},
     ["q.jsonl:2", "'answer'"]),
    (T + " --test q.jsonl", {"q.jsonl": lines({"input": "a", "answer": ""})}, ["q.jsonl:1", "'answer'"]),
    (T + " --test q.jsonl", {"q.jsonl": lines({"input": "a", "output": "The answer is"})},
     ["q.jsonl", "'answer'"]),
    (T + " --test p.jsonl", {}, ["p.jsonl", "preference rows"]),
    (T + " --val p.jsonl", {}, ["p.jsonl", "preference rows"]),
    (T + " --lr 1", {}, ["unknown flag --lr", "each stage has its own, as --improve-lr"]),
    (E + " --model model/..", {"config.json": json.dumps({"config": {}, "files": {}, "machine": {}})},
     ["belongs to a run, not to a model"]),
    (T + " --revision main", {}, ["--revision is main", "local folder"]),
    (P + " --test p.jsonl test.jsonl", {}, ["--test holds preference rows", "p.jsonl, test.jsonl"]),
    (P + " --val p.jsonl t.jsonl", {}, ["--val holds preference rows", "p.jsonl, t.jsonl"]),
    (T + " --out t.jsonl", {}, ["t.jsonl", "choose another --out"]),
    (T + " --out t.jsonl/run", {}, ["t.jsonl/run", "cannot be written"]),
    (T + " --out foreign", {"foreign/thesis.tex": "years"}, ["foreign", "no run of ours"]),
    (T + " --out foreign", {"foreign/config.json": "{}"}, ["foreign", "another"]),
    (T + " --out foreign", {"foreign/config.json": "{"}, ["foreign/config.json:1", "JSON"]),
    (T + " --out /proc/nothing/run", {}, ["/proc/nothing/run", "cannot be written"]),
    (T + f" --out {LONG}", {}, "cannot be written"),
    (T + " --samples nowhere.jsonl", {}, "nowhere.jsonl"),
    (T + " --samples s.jsonl", {"s.jsonl": ""}, ["s.jsonl", "no rows"]),
    (T + " --samples s.jsonl", {"s.jsonl": lines({"input": "2 + 1?"})}, ["s.jsonl:1", "'samples'"]),
    (T + " --samples s.jsonl", {"s.jsonl": lines({"input": "2 + 1?", "samples": [5]})},
     ["s.jsonl:1", "'samples'"]),
    (T + " --samples s.jsonl", {"s.jsonl": lines({"input": "2 + 1?", "samples": ["a", "b"]})},
     ["s.jsonl", "both a correct and a wrong sample"]),
    (T + " --samples s.jsonl", {"s.jsonl": lines({"samples": ["a"]})}, ["s.jsonl:1", "missing key 'input'"]),
    (T + " --samples s.jsonl", {"s.jsonl": lines({"input": "x", "samples": ["a"]})},
     ["s.jsonl", "training question"]),
    *[(T + " --token-weights-file w.jsonl", {"w.jsonl": content}, ["w.jsonl", *says]) for content, says in [
        ("", ["no rows"]),
        (lines({"input": "2 + 1?", "output": "a"}), [":1", "'reward'"]),
        (lines({"input": "2 + 1?", "output": "a", "reward": [0.5, "x"]}), [":1", "'reward'"]),
        (lines({"input": "2 + 1?", "output": "a", "reward": [0.5, 3.0]}), [":1", "'reward'"]),
        (lines({"input": "2 + 1?", "output": "a", "reward": [0.5, True]}), [":1", "'reward'"]),
        (lines({"input": "2 + 1?", "reward": [0.5]}), [":1", "missing key 'output'"]),
        (lines({"input": [5], "output": "a", "reward": [0.5]}), [":1", "'input'"]),
        (lines({"input": "else", "output": "a", "reward": [0.5, 0.5]}), ["has a training question as 'input'"]),
        (lines({"input": "2 + 1?", "output": "abc", "reward": [0.5]}), ["one score for each token of 'output'"]),
        (lines({"input": "2 + 1?", "output": "", "reward": [0.5]}), ["empty response"])]],
    (T + " --mask nowhere.safetensors", {}, "nowhere.safetensors: file not found"),
    (T + " --mask m", {"m": "no tensors"}, ["m: not a complete safetensors file"]),
    (T + " --mask model/model.safetensors", {}, ["model/model.safetensors", "not a mask"]),
    (T + " --reward-model model/none", {}, "model/none"),
    (T + " --config c.json", {}, ["c.json", "No such file"]),
    *[(T + " --config c.json", {"c.json": content}, ["c.json", *says]) for content, says in [
        ("{\n'p': 5}", [":2", "JSON"]), ("[]", ["expected a JSON object"]), ("5", ["expected a JSON object"]),
        (b'{"model": "\xe9"}', ["UTF-8"]), ('{"stages": {}}', ["stages is no setting"]),
        ('{"epsilom": 0.1}', ["epsilom", "did you mean epsilon?"]), ('{"p": "5"}', ["p is '5'", "number above 0"]),
        ('{"n": 1.5}', ["n is 1.5", "whole number"]), ('{"n": true}', ["n is True", "whole number"]),
        ('{"sft": 1}', ["sft is 1", "true or false"]), ('{"test": "t.jsonl"}', ["test is 't.jsonl'", "list"]),
        ('{"test": [5]}', ["test is [5]", "list of strings"]),
        ('{"dtype": "fp23"}', ["dtype is 'fp23'", "bf16"]),
        ('{"sft_lr": "x"}', ["sft_lr is 'x'", "number at least 0"]),
        ('{"config": {"sfd_lr": 1}}', ["sfd_lr", "did you mean sft_lr?"]),
        ('{"config": 5}', ["config is no setting"])]],
    (T + " --config c.json", {"c.json": '{"p": NaN}'}, ["c.json: p is nan", "finite"]),
    (T + " --config c.json", {"c.json": '{"test": ["a\\u0000b"]}'}, ["null"]),
    ("eval --model model", {}, "--test"),
    (E + " --lmit 5", {}, ["--lmit", "did you mean --limit?"]),
    (E + " --limit -1", {}, "--limit is -1"),
    (E + " --max-new-tokens 0", {}, "--max-new-tokens is 0"),
    (E + " --micro-tokens -4", {}, "--micro-tokens is -4"),
    (E + " --max-length 5000", {}, ["config.json", "max_position_embeddings"]),
    (E + " --device tpu", {}, "--device is tpu"),
    (E + OUT, {"run/t.jsonl": "{}"}, ["run/t.jsonl", "exists already"]),
    (E + OUT, {"run": "a file"}, ["run", "cannot be written"]),
    (E + " a/t.jsonl --out run", {"a/t.jsonl": GOOD["t.jsonl"]}, ["run/t.jsonl", "two --test files"]),
    ("eval --model model --test t.jsonl q.jsonl --out run", {"q.jsonl": lines({"input": "a", "output": "b"})},
     ["q.jsonl:1", "'answer'"]),
    ("eval --model model --test t.jsonl q.jsonl --out run", {"q.jsonl": lines(pair("a", "", "b"))},
     ["q.jsonl", "empty response"]),
    ("eval --model model --test q.jsonl --out run", {"q.jsonl": ""}, ["q.jsonl", "no rows"]),
    ("eval --model nowhere --test t.jsonl", {}, ["nowhere", "no such model folder"]),
]


def label(command):
    """A test's name: the command, shortened."""
    return (command if isinstance(command, str) else " ".join(command)).replace(T, "T").replace(E, "E")[:60]


@pytest.mark.parametrize("command, files, says", FLAGS, ids=[label(case[0]) for case in FLAGS])
def test_flags_and_files(command, files, says, place, capsys):
    write(place, files)
    refused(command, says, place, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
@pytest.mark.parametrize("program", (T, E))
def test_no_cuda(program, place, capsys):
    refused(program + " --device cuda", ["--device is cuda", "offers cpu"], place, capsys)


# ---- model folders: (name, what to do to the folder, what the message says) --------------------------------

def config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps({**RAW, **changes}))


def settings(text):
    return lambda folder: (folder / "tokenizer_config.json").write_text(text)


def generation(text):
    return lambda folder: (folder / "generation_config.json").write_text(text)


def weights(change):
    def do(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
    return do


def index(table, **more):
    def do(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table, **more}))
    return do


def cut(name, share):
    def do(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:int(len(data) * share)])
    return do


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


NORM = "model.norm.weight"
MODELS = [
    ("no weights", lambda f: (f / "model.safetensors").unlink(), ["model/model.safetensors: file not found"]),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), ["model: no tokenizer.json"]),
    ("no config", lambda f: (f / "config.json").unlink(), ["model/config.json", "No such file"]),
    ("broken config", cut("config.json", 0.5), ["model/config.json:", "JSON"]),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), ["model/config.json", "object"]),
    ("config is binary", lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
     ["model/config.json", "UTF-8"]),
    ("config has a key of another type", config(hidden_size="16"),
     ["model/config.json", "hidden_size is '16'"]),
    ("config has a negative size", config(vocab_size=-1), ["model/config.json", "vocab_size is -1"]),
    ("config of another family", config(architectures=["GPT2LMHeadModel"]),
     ["config.json", "GPT2LMHeadModel"]),
    ("config without a size", config(intermediate_size=None), ["config.json", "intermediate_size"]),
    ("config with odd heads", config(num_key_value_heads=3), ["config.json", "num_key_value_heads 3"]),
    ("config with another activation", config(hidden_act="gelu"), ["config.json", "hidden_act is 'gelu'"]),
    ("config with unknown rope", config(rope_scaling={"rope_type": "yarn"}),
     ["config.json", "rope_type is 'yarn'"]),
    ("truncated weights", cut("model.safetensors", 0.5),
     ["model/model.safetensors", "not a complete safetensors"]),
    ("empty weights", cut("model.safetensors", 0), ["model/model.safetensors", "not a complete safetensors"]),
    ("huge header", huge_header, ["model/model.safetensors", "not a complete safetensors"]),
    ("wrong shape", weights(lambda s: s.update({NORM: torch.ones(15)})),
     ["model.safetensors", NORM, "[15]", "[16]"]),
    ("integer weights", weights(lambda s: s.update({NORM: torch.ones(16).int()})),
     ["model.safetensors", NORM, "int32"]),
    ("missing tensor", weights(lambda s: s.pop(NORM)), [f"model: weight {NORM} is missing"]),
    ("extra tensor", weights(lambda s: s.update(extra=torch.ones(1))), ["model: weight extra"]),
    ("index without map", index(None), ["index.json", "weight_map"]),
    ("index that leaves the folder", index({NORM: "../a.safetensors"}), ["index.json", "'../a.safetensors'"]),
    ("index with a list", index({NORM: ["a.safetensors"]}), ["index.json", "not a plain file name"]),
    ("index naming no file", index(dict.fromkeys(tiny_model().state_dict(), "b.safetensors")),
     ["model/b.safetensors"]),
    ("vocabulary too large", lambda f: write_tokenizer_size(f, 130),
     ["model: tokenizer.json", "vocab_size of 120"]),
    ("broken tokenizer", cut("tokenizer.json", 0.5), ["model/tokenizer.json", "not a tokenizer file"]),
    ("tokenizer is an object", lambda f: (f / "tokenizer.json").write_text("{}"), ["model/tokenizer.json"]),
    ("broken tokenizer_config", settings("{"), ["model/tokenizer_config.json:1", "JSON"]),
    ("unknown eos", settings('{"eos_token": "<end>"}'), ["tokenizer_config.json", "eos_token '<end>'"]),
    ("no eos", settings("{}"), ["tokenizer_config.json", "eos_token is missing"]),
    ("eos in config is a word", config(eos_token_id="x"), ["config.json", "eos_token_id holds 'x'"]),
    ("eos in config is nested", config(eos_token_id=[[2]]), ["config.json", "eos_token_id holds [2]"]),
    ("broken generation_config", generation("{"), ["generation_config.json:1", "JSON"]),
    ("odd generation_config", generation('{"eos_token_id": {}}'),
     ["generation_config.json", "eos_token_id holds {}"]),
    ("eos is a number", settings('{"eos_token": 2}'), ["tokenizer_config.json", "eos_token 2"]),
]


def write_tokenizer_size(folder, size):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["a word"] = size  # one id, far behind the others
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize("program", (T, E + OUT), ids=("train", "eval"))
@pytest.mark.parametrize("change, says", [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_model_folder(change, says, program, place, capsys):
    change(place / "model")
    refused(program, says, place, capsys)


RAISES = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no\\nsystem') }}" \
         "{% endif %}{{ m['content'] }}|{% endfor %}"
TEMPLATES = [("none", None, "no chat template"), ("syntax", "{% for %}", "the chat template fails"),
             ("raises", "{{ raise_exception('only\\nin pairs') }}", "fails: only in pairs"),
             ("drops the answer", "{{ messages[0]['content'] }}", "leaves out what the assistant says"),
             ("unknown name", "{{ nothing.at.all }}", "the chat template fails"),
             ("forbidden", "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", "template fails")]


@pytest.mark.parametrize("program", (T, P, E), ids=("tasks", "pairs", "eval"))
@pytest.mark.parametrize("template, says", [t[1:] for t in TEMPLATES], ids=[t[0] for t in TEMPLATES])
def test_chat_template(template, says, program, place, capsys):
    write_tokenizer(place / "model", **({"chat_template": template} if template else {}))
    refused(program + " --prompt chat", ["model: ", says], place, capsys)


@pytest.mark.parametrize("program", ("train --model model --pairs", "eval --model model --test"))
def test_a_conversation_that_the_template_refuses(program, place, capsys):
    write_tokenizer(place / "model", chat_template=RAISES)
    odd = pair([{"role": "system", "content": "Be brief"}], talk("", "a")[1:], talk("", "b")[1:])
    good = [{**odd, "prompt": talk(f"question {i}")} for i in range(20)]
    write(place, {"p.jsonl": lines(*good, odd)})
    refused(f"{program} p.jsonl", ["p.jsonl", "'Be brief'", "no system"], place, capsys)


def test_no_template_file_in_utf_8(place, capsys):
    (place / "model/chat_template.jinja").write_bytes(b"\xff")
    refused(T, ["model/chat_template.jinja", "utf-8"], place, capsys)


# ---- artefacts of another model or run ---------------------------------------------------------------------

def shaped(change=lambda mask: None, fill=True):
    mask = {name: torch.full(p.shape, fill) for name, p in tiny_model().named_parameters()}
    change(mask)
    return mask


MASKS = [
    ("selects nothing", shaped(fill=False), ["m.safetensors", "selects nothing"]),
    ("other shape", shaped(lambda m: m.update({NORM: torch.ones(8).bool()})),
     ["m.safetensors", NORM, "[8]", "[16]"]),
    ("a tensor too few", shaped(lambda m: m.pop(NORM)), ["m.safetensors", NORM, "missing"]),
    ("a tensor too many", shaped(lambda m: m.update(other=torch.ones(8).bool())), ["m.safetensors", "other"]),
]


@pytest.mark.parametrize("mask, says", [m[1:] for m in MASKS], ids=[m[0] for m in MASKS])
def test_mask(mask, says, place, capsys):
    save_mask(mask, place / "m.safetensors")
    refused(T + " --mask m.safetensors", says, place, capsys)


@pytest.mark.parametrize("shapes", ("{", "[]", '["a"]', "5", '{"a": [-8]}', '{"a": "x"}', '{"a": [1.5]}',
                                    '{"b": [8]}'))
def test_mask_that_contradicts_itself(shapes, place, capsys):
    metadata = {"format": "allo_mini mask", "shapes": shapes}
    save_file({"a": torch.ones(1, dtype=torch.uint8)}, place / "m.safetensors", metadata=metadata)
    refused(T + " --mask m.safetensors", "m.safetensors: ", place, capsys)


def test_truncated_mask(place, capsys):
    save_mask(shaped(), place / "m.safetensors")
    cut("m.safetensors", 0.9)(place)
    refused(T + " --mask m.safetensors", ["m.safetensors", "not a complete safetensors"], place, capsys)


@pytest.mark.parametrize("flag", ("--reward-model", "--reward-base"))
def test_reward_model(flag, place, capsys):
    shutil.copytree(place / "model", place / "other")
    data = (place / "other/tokenizer.json").read_text()
    (place / "other/tokenizer.json").write_text(data.replace('"z"', '"zz"'))
    refused(f"{T} {flag} other", ["other", "must share the vocabulary"], place, capsys)
    shutil.copyfile(place / "model/tokenizer.json", place / "other/tokenizer.json")
    cut("model.safetensors", 0.5)(place / "other")
    refused(f"{T} {flag} other", ["other/model.safetensors", "not a complete"], place, capsys)


def started(place):
    """A run folder as `train --out run` leaves it when it is stopped before its first stage."""
    from allo_mini.config import parse
    from allo_mini.inputs import open_run
    open_run(parse((T + OUT).split()[1:]))
    assert (place / "run/config.json").exists()


OTHERS = [(T + OUT + " --n 4", {}, "another n"), (T + OUT + " --sft-lr 1e-3", {}, "another sft_lr"),
          (T + OUT, {"t.jsonl": lines(task("7 + 7?", "14"))}, "another content of t.jsonl;"),
          (T + OUT, {"model/tokenizer.json": None}, "another content of model/tokenizer.json;"), (P + OUT, {}, "another"),
          (T + OUT + " --test test.jsonl", {}, "another test")]


@pytest.mark.parametrize("command, files, says", OTHERS, ids=[f"{label(c)} {list(f)}" for c, f, _ in OTHERS])
def test_out_holds_a_different_run(command, files, says, place, capsys):
    started(place)
    for name, content in files.items():
        write(place, {name: content or (place / name).read_text() + "\n"})
    refused(command, ["run", says, "choose another --out"], place, capsys)


def test_the_same_run_goes_on(place, capsys):
    started(place)
    before = tree(place)
    started(place)
    assert tree(place) == before


# ---- bytes that are no text, no JSON, no rows --------------------------------------------------------------

GOOD_ROW = lines(task("a")).encode()
DAMAGE = [("a NUL byte", b'{"input": "a\x00b", "output": "x"}\n'),
          ("bytes of half a surrogate", b'{"input": "\xed\xa0\x80", "output": "x"}\n'),
          ("an overlong slash", b'{"input": "\xc0\xaf", "output": "x"}\n'),
          ("UTF-32", GOOD_ROW.decode().encode("utf-32")),
          ("Infinity", b'{"input": "a", "output": "x", "answer": -Infinity}\n'), ("single quotes", b"{'input': 'a'}\n"),
          ("a comma too many", b'{"input": "a", "output": "x",}\n'),
          ("two objects in a line", GOOD_ROW.strip() + b" " + GOOD_ROW),
          ("a row over two lines", GOOD_ROW.replace(b", ", b",\n", 1)),
          ("a line break in a string", b'{"input": "a\nb", "output": "x"}\n'),
          ("an unfinished escape", b'{"input": "a\\u12", "output": "x"}\n'),
          ("a key twice, deep inside", b'{"input": "a", "output": "x", "z": {"k": 1, "k": 2}}\n'),
          ("a comment", b"// rows\n" + GOOD_ROW), ("CSV", b"input,output\na,b\n"), ("cut off", GOOD_ROW[:-9]),
          ("only a BOM", b"\xef\xbb\xbf"),
          ("two BOMs", b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD_ROW), ("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00"),
          ("a very deep object", b'{"a":' * 50_000 + b"\n")]


@pytest.mark.parametrize("command, name", [(T, "t.jsonl"), (P.replace("p.jsonl", "q.jsonl"), "q.jsonl"),
                                           (T + " --samples s.jsonl", "s.jsonl")],
                         ids=("train", "pairs", "samples"))
@pytest.mark.parametrize("content", [d[1] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damaged_rows(content, command, name, place, capsys):
    write(place, {name: content})
    refused(command, name, place, capsys)


def test_a_line_of_50_megabytes(place, capsys):
    write(place, {"t.jsonl": GOOD_ROW + b'{"input": "' + b"x" * 50_000_000 + b'", "output": "y"}\n'})
    refused(T, ["t.jsonl:2", "line is longer than"], place, capsys)


@pytest.mark.parametrize("change", [lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n"),
                                    lambda b: b"\n\n" + b.rstrip(b"\n"),
                                    lambda b: b.replace(b"}\n", b' , "more": [1, null]}\n')],
                         ids=("BOM", "CRLF", "blank lines", "more keys"))
def test_what_text_editors_and_other_tools_do_is_harmless(change, place):
    write(place, {"t.jsonl": change(GOOD["t.jsonl"].encode())})
    assert train.main((T + OUT + " --only-sft --max-steps 1").split()[1:]) == 0


# ---- something else where a file is expected ---------------------------------------------------------------

PLACES = [(T, "t.jsonl"), (T + " --test q.jsonl", "q.jsonl"), (T + " --val q.jsonl", "q.jsonl"), (P, "p.jsonl"),
          (T + " --config c.json", "c.json"),
          (T + " --samples s.jsonl", "s.jsonl"), (T + " --token-weights-file w.jsonl", "w.jsonl"),
          (T + " --mask m", "m"),
          (T, "model/config.json"), (T, "model/tokenizer.json"), (T, "model/tokenizer_config.json"),
          (T, "model/model.safetensors"), (E, "t.jsonl")]


@pytest.mark.parametrize("kind", ("a folder", "a link to nothing", "a link to itself", "an empty file", "a device"))
@pytest.mark.parametrize("command, name", PLACES, ids=[f"{name} {i}" for i, (_, name) in enumerate(PLACES)])
def test_something_else_where_a_file_is_expected(command, name, kind, place, capsys):
    path = place / name
    path.unlink(missing_ok=True)
    if kind == "a folder":
        path.mkdir()
    elif kind == "an empty file":
        path.touch()
    else:
        path.symlink_to({"a link to nothing": "nowhere", "a link to itself": path.name, "a device": "/dev/null"}[kind])
    if name == "model/tokenizer_config.json" and kind in ("a link to nothing", "a link to itself"):
        return refused(command, "eos_token is missing", place, capsys)  # as if it were not there
    refused(command, name.split("/")[-1], place, capsys)


# ---- headers of safetensors files --------------------------------------------------------------------------

def header(change, size=None):
    """A safetensors file whose header is changed: change(dict) -> dict or bytes."""
    def damaged(data):
        length = struct.unpack("<Q", data[:8])[0]
        new = change(json.loads(data[8:8 + length]))
        new = new if isinstance(new, bytes) else json.dumps(new).encode()
        return struct.pack("<Q", len(new) if size is None else size) + new + data[8 + length:]
    return damaged


def first(**changes):
    def change(table):
        name = next(n for n in table if n != "__metadata__")
        table[name].update(changes)
        return table
    return header(change)


HEADERS = {"no header": header(lambda t: t, 0), "a header of 1 byte": header(lambda t: t, 1),
           "longer than the file": header(lambda t: t, 1 << 40),
           "length -1": header(lambda t: t, (1 << 64) - 1), "not JSON": header(lambda t: b"{" * 40),
           "not UTF-8": header(lambda t: b"\xff" * 40),
           "a list": header(lambda t: b"[]"), "offsets below 0": first(data_offsets=[-4, 0]),
           "offsets behind the end": first(data_offsets=[0, 1 << 50]),
           "offsets backwards": first(data_offsets=[64, 0]), "three offsets": first(data_offsets=[0, 1, 2]),
           "offsets of words": first(data_offsets=["0", "4"]),
           "a size below 0": first(shape=[-16]), "a size of 1e18": first(shape=[10 ** 18]),
           "sizes that overflow": first(shape=[1 << 40, 1 << 40]),
           "a size of a half": first(shape=[0.5]), "no shape": first(shape=None), "unknown dtype": first(dtype="F31"),
           "dtype that does not fit": first(dtype="I64"),
           "a name twice": header(lambda t: json.dumps(t).encode()[:-1] + b',"a":{"dtype":"F32","shape":[0],"data_offsets":'
                                  b'[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
           "cut off": lambda data: data[:-1], "something behind": lambda data: data + b"\0" * 8,
           "seven bytes": lambda data: data[:7]}


@pytest.mark.parametrize("file", ("model", "mask"))
@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers(name, file, place, capsys):
    path = place / "model/model.safetensors"
    if file == "mask":
        save_mask(shaped(), path := place / "m.safetensors")
    path.write_bytes(HEADERS[name](path.read_bytes()))
    refused(T + (" --mask m.safetensors" if file == "mask" else ""), path.parent.name if file == "model" else path.name,
            place, capsys)


# ---- settings of model folders -----------------------------------------------------------------------------

SETTINGS = [("architectures", "LlamaForCausalLM"), ("architectures", []), ("architectures", ["LlamaForCausalLM"] * 2),
            ("architectures", [None]),
            ("vocab_size", 0), ("vocab_size", 119), ("vocab_size", "120"), ("vocab_size", 10 ** 12),
            ("hidden_size", True), ("hidden_size", 16.5),
            ("hidden_size", [16]), ("num_hidden_layers", -2), ("num_attention_heads", 0), ("num_attention_heads", 5),
            ("num_key_value_heads", 8), ("head_dim", 7), ("head_dim", "4"), ("rms_norm_eps", 0),
            ("rms_norm_eps", "1e-6"), ("rms_norm_eps", -1.0),
            ("rope_theta", 0), ("rope_theta", "x"), ("rope_theta", 10 ** 400), ("rope_scaling", [1]),
            ("rope_scaling", 4), ("rope_scaling", {"type": "linear"}),
            ("rope_scaling", {"rope_type": "linear", "factor": 0}), ("rope_scaling", {"rope_type": ["linear"]}),
            ("rope_scaling", {"rope_type": "llama3"}),
            ("tie_word_embeddings", "no"), ("tie_word_embeddings", 1), ("attention_bias", "x"), ("mlp_bias", 0),
            ("max_position_embeddings", 0),
            ("max_position_embeddings", "4096"), ("hidden_act", ["silu"]),
            ("quantization_config", {"bits": 4}),
            ("eos_token_id", True), ("eos_token_id", 2.5), ("eos_token_id", "2"), ("eos_token_id", {"a": 2})]


@pytest.mark.parametrize("key, value", SETTINGS, ids=[f"{k} {str(v)[:20]}" for k, v in SETTINGS])
def test_config_json(key, value, place, capsys):
    config(**{key: value})(place / "model")
    refused(T, "config.json", place, capsys)


TOKENS = [("eos_token", ["</s>"]), ("eos_token", {"content": 5}), ("eos_token", {"content": "<end>"}),
          ("eos_token", ""), ("eos_token", "\ud800"), ("bos_token", 7),
          ("bos_token", "<begin>"), ("bos_token", {"content": ["<s>"]})]


@pytest.mark.parametrize("key, value", TOKENS, ids=[f"{k} {v}" for k, v in TOKENS])
def test_tokenizer_config(key, value, place, capsys):
    write_tokenizer(place / "model", **{key: value})
    refused(T, "tokenizer_config.json", place, capsys)


@pytest.mark.parametrize("content", ("[]", "null", "{}", '{"model": null}', '{"model": {"type": "BPE"}}',
                                     '{"model": {"type": "XYZ", "vocab": {}}}', "\x00", "{" * 9999,
                                     '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
                                     '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}'))
def test_tokenizer_json(content, place, capsys):
    write(place, {"model/tokenizer.json": content})
    refused(T, "model/tokenizer.json: not a tokenizer file", place, capsys)


# ---- a run folder that somebody changed by hand ------------------------------------------------------------

FULL = (T + " --samples s.jsonl --max-length 600 --max-steps 1 --max-new-tokens 2 --test test.jsonl --method allo"
        " --locate gradient" + OUT)
SAMPLES = lines(*({"input": f"2 + {i}?", "samples": ["The answer is 4", "The answer is 5"]} for i in range(4)))


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """A working directory with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(model_folder, folder / "model")
    write(folder, {**GOOD, "s.jsonl": SAMPLES})
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert train.main(FULL.split()[1:]) == 0
    return folder


CHANGED = [("config.json", "[]"), ("config.json", '{"config": 5, "files": 5, "machine": 5}'),
           ("config.json", '{"config": {}}'), ("config.json", "{"),
           ("results.json", "{"), ("results.json", "[]"), ("results.json", b"\xff"),
           ("eval-start.jsonl", "{}\n"), ("eval-start.jsonl", '{"correct": "yes"}\n'), ("eval-start.jsonl", ""),
           ("eval-start.jsonl", '{"correct": tr'),
           ("token_weights.jsonl", "{}\n"), ("token_weights.jsonl", ""),
           ("token_weights.jsonl", '{"input": "a", "output": "b", "reward": ["x"]}\n'),
           ("mask.safetensors", ""), ("mask.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
           ("forget/model.safetensors", "x"), ("forget/config.json", "{}")]


def test_a_folder_where_the_run_keeps_a_file(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, place := tmp_path / "place")
    monkeypatch.chdir(place)
    (place / "run/results.json").unlink()
    (place / "run/metrics.jsonl").unlink()
    (place / "run/metrics.jsonl").mkdir()
    refused(FULL, ["run/metrics.jsonl", "Is a directory"], place, capsys)


@pytest.mark.parametrize("name, content", CHANGED, ids=[f"{n} {str(c)[:24]}" for n, c in CHANGED])
def test_a_run_folder_that_was_changed_by_hand(finished, name, content, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, place := tmp_path / "place")
    monkeypatch.chdir(place)
    if name not in ("config.json", "results.json"):  # all that comes after it is to be made again
        (place / "run/results.json").unlink()
        shutil.rmtree(place / "run/improve")
    if name == "token_weights.jsonl":
        shutil.rmtree(place / "run/forget")
    write(place, {f"run/{name}": content})
    before = tree(place)
    code, errors = train.main(FULL.split()[1:]), capsys.readouterr().err
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and "run" in errors, errors
    after = tree(place)
    assert {n: after[n] for n in before if "metrics" not in n} == {n: v for n,
                                                                   v in before.items() if "metrics" not in n}
