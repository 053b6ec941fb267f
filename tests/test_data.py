"""Rows that must be read, how they become ids, what is dropped, which rows a run gets."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace as Stub

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from allo_mini import UserError
from allo_mini.data import demo
from allo_mini.data.encoder import ALPACA, Encoder
from allo_mini.data.rows import Pair, is_pairs, plain, read_pairs, read_tasks
from allo_mini.data.tokenizer import Tokenizer
from allo_mini.evaluation import answers
from allo_mini.run.config import parse
from allo_mini.run.inputs import read_rows, style_of
from helpers import save_tokenizer, write_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>",
           "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]
DATA = Path(os.environ.get("ALLO_DATA", "no data"))
with_data = pytest.mark.skipif(not DATA.is_dir(), reason="ALLO_DATA names a folder of data sets")


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE with merges over spaces: two texts' tokens are not those of both in one."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["the cat sat on the mat", "the answer is 4", "a b a b a b", "ab ab ab", "step by step"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts * 20, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet))
    return tokenizer.to_str()


@pytest.fixture
def make(bpe, tmp_path):
    """make(bos=..., **settings) -> Tokenizer; bos: the post-processor adds <s>."""
    def tokenizer(bos=False, **settings):
        inner = HFTokenizer.from_str(bpe)
        if bos:
            inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
        return Tokenizer(save_tokenizer(inner, tmp_path, **settings))
    return tokenizer


def write(path, *rows, encoding="utf-8", end="\n"):
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    path.write_bytes(text.encode(encoding))
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---- rows ------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding, end", [("utf-8-sig", "\n"), ("utf-8", "\r\n\n \n")])
def test_bom_crlf_and_blank_lines(encoding, end, tmp_path):
    row = {"input": "Café 😀\u2028?", "output": "x", "answer": 5}
    files = [write(tmp_path / name, row, encoding=encoding, end=end) for name in ("a", "b")]
    _, task = read_tasks(files)  # ids go on over the files
    assert (task.id, task.prompt, task.output, task.answer) == (1, row["input"], "x", "5")
    assert task.source == f"{files[1]}:1"


def test_rows_of_gsm8k_of_math_official_ones_and_test_rows_without_output(tmp_path):
    solution = "He has <<2*600=1200>>1,200.\nSo 1,200."
    rows = [{"question": "How many?", "answer": solution + "\n#### 1,200"},
            {"problem": "p", "solution": "Thus $\\boxed{5}$.", "level": 1, "type": "Algebra"},
            {"input": "i", "output": "o", "question": "q", "solution": "s", "answer": "# 5"},
            {"question": "a?", "prediction": "wrong"}, {"input": "b", "answer": "5"}]
    tasks = read_tasks([write(tmp_path / "t.jsonl", *rows)], need_output=False)
    assert [(task.prompt, task.output, task.answer) for task in tasks] == [
        ("How many?", "He has 1,200.\nSo 1,200.\nThe answer is 1,200", "1200"),
        ("p", "Thus $\\boxed{5}$.", None), ("i", "o", "# 5"), ("a?", None, None), ("b", None, "5")]


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
ASK = [user("hi"), assistant("hello"), user("how?")]
SO, NO = [assistant("so")], [assistant("no")]
SYSTEM = [{"role": "system", "content": "Be brief."}]
FORMS = {  # prompt (None: not given), chosen, rejected; what is read
    "strings": ("how?", "so", "no", ("how?", "so", "no")),
    "messages": (ASK, SO, NO, (ASK, SO, NO)),
    "whole conversations": (ASK, ASK + SO, ASK + NO, (ASK, SO, NO)),
    "UltraFeedback": ("how?", [user("how?"), *SO], [user("how?"), *NO], ([user("how?")], SO, NO)),
    "UltraFeedback, answers": ("how?", SO, NO, ([user("how?")], SO, NO)),
    "implicit, messages": (None, ASK + SO, ASK + NO, (ASK, SO, NO)),
    "implicit, strings": (None, "The sky is blue", "The sky is black",
                          ("The sky is", " blue", " black")),
    "Anthropic HH": (None, HH + " Say so", HH + " Say no", (HH, " Say so", " Say no")),
    "Anthropic HH, one empty": (None, HH + " so", HH, (HH, " so", "")),
    "identical messages": (None, ASK + SO, ASK + SO, (ASK, SO, SO)),
    "a system message": (SYSTEM + ASK, SO, NO, (SYSTEM + ASK, SO, NO))}


@pytest.mark.parametrize("prompt, chosen, rejected, expected", FORMS.values(), ids=FORMS)
def test_preference_forms(prompt, chosen, rejected, expected, tmp_path):
    row = {"chosen": chosen, "rejected": rejected, "score_chosen": 9}
    if prompt and prompt[0] in SYSTEM:
        row["system"] = "Be brief."  # said again
    path = write(tmp_path / "p.jsonl", row if prompt is None else row | {"prompt": prompt})
    assert is_pairs(path)
    [pair] = read_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.task) == (*expected, None)


def test_sharegpt_preferences(tmp_path):
    human, so, no = [{"from": name, "value": name} for name in ("human", "gpt", "gpt")]
    row = {"conversations": [human], "chosen": so, "rejected": no | {"value": "no"}}
    [pair] = read_pairs(write(tmp_path / "p.jsonl", row))
    said = [(m["role"], m["content"]) for m in pair.prompt + pair.chosen + pair.rejected]
    assert said == [("user", "human"), ("assistant", "gpt"), ("assistant", "no")]


# ---- encoding --------------------------------------------------------------------------------

ALPHABET = [*"aab  \n\t.,19=+é😀ß\u0301\u200d中\x00\u2028", "the ", "answer", "</s>", "<s>"]
TOKENIZERS = {  # a folder, `make` -> one of each kind
    "characters": lambda folder, _: Tokenizer(write_tokenizer(folder, add_bos_token=True)),
    "the demo's": lambda *_: Tokenizer(demo.FOLDER),
    "merges over spaces": lambda _, make: make(bos=True)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_response_are_encoded_jointly(make, tmp_path, name):
    """Random text: all ids are those of the whole, and what responses share is cut late."""
    tokenizer, rng, moved = TOKENIZERS[name](tmp_path, make), random.Random(0), 0
    for case in range(400):
        prompt, *texts = ("".join(rng.choices(ALPHABET, k=rng.randrange(13)))
                          for _ in range(rng.randrange(2, 5)))
        bos = case % 2 == 0
        shared, rests = tokenizer.split(prompt, texts, bos)
        alone = tokenizer.encode(prompt, bos)
        for text, rest in zip(texts, rests, strict=True):
            assert shared + rest == tokenizer.encode(prompt + text, bos)
        assert alone[:len(shared)] == shared
        firsts = {tuple(rest[:1]) for rest in [*rests, alone[len(shared):]]}
        assert len(firsts) > 1 or () in firsts, (prompt, texts)  # no further token is shared by all
        moved += alone != shared
    assert moved > 9 or name == "characters"  # the boundary often lies inside a token


def test_the_closing_token_once_even_if_it_pads_and_at_the_end_alone(make):
    """A response with its text inside is dropped: what stands behind it would be lost."""
    encoder = Encoder(make(pad_token="</s>"), "none", 100)
    for text in ("the cat", "the cat</s>", "x</s></s>", "a</s>\n</s> \n"):
        [ids] = encoder.example("a b", [text]).responses
        assert ids.index(encoder.tokenizer.eos_id) == len(ids) - 1
    assert encoder.example("a", ["<s>a</s> b"]) is encoder.example("a", ["b", "use </s> s"]) is None
    assert encoder.report() == "2 dropped (response with </s> inside, which ends responses)"


def test_alpaca_form(make):
    encoder = Encoder(make(), "alpaca", 400)
    example = encoder.example("2 + 2?", ["the answer is 4"])
    whole = encoder.tokenizer.decode(example.prompt + example.responses[0])
    assert whole == ALPACA.format("2 + 2?") + " the answer is 4"
    assert "{}" in ALPACA and encoder.example("{x} {}", ["a"])  # braces of a question are text


BOS = [(True, {}, True), (False, {}, False), (False, {"add_bos_token": True}, True),
       (True, {"add_bos_token": False}, False), (True, {"add_bos_token": True}, True),
       (False, {"add_bos_token": True, "bos_token": None}, False)]


@pytest.mark.parametrize("processor, settings, added", BOS)
def test_bos_exactly_when_the_tokenizer_adds_it(make, processor, settings, added):
    encoder = Encoder(make(processor, **settings), "none", 100)
    example = encoder.example("the cat", ["12"])
    assert (example.prompt[0] == 0) == added
    assert (example.prompt + example.responses[0]).count(0) == added
    assert encoder.prompt_ids("the cat").count(0) == added
    assert encoder.response_ids("the cat", "12").count(0) == 0


def test_responses_are_encoded_and_samples_decoded_as_they_follow_the_prompt(tmp_path, monkeypatch):
    """Llama 2's tokenizer sets a space before every text, or takes one away."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "a", "b", ":", "▁▁", "\n"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    inner = HFTokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b"), ("▁", "▁")]))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(spaces)
    inner.add_special_tokens(pieces[:3])
    tokenizer = Tokenizer(save_tokenizer(inner, tmp_path))
    encoder = Encoder(tokenizer, "none", 100)
    ids = encoder.response_ids("a:", "b a")
    assert [pieces[i] for i in ids] == ["b", "▁a", "</s>"]
    tokenizer.inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model = settings = Stub(folder=tmp_path, config=Stub(raw={}), stop=[], seed=1,
                            max_new_tokens=9, top_p=1.0, sample_batch=4)
    for text in ("   a\n  b", " a", "b ", "\n"):
        ids = encoder.response_ids("a:", text)
        monkeypatch.setattr(answers, "sample", lambda *_, **__: [[ids]])
        assert answers.respond(model, encoder, ["a:"], settings, 1, 0.0) == [[(text, True)]]


def test_truncation_trims_the_prompts_left(make):
    tokenizer = make(bos=True)
    encoder = Encoder(tokenizer, "none", 40)
    row = "x" * 60 + "the cat", [" sat", " sat on the mat and the mat and the mat"]
    example, whole = encoder.example(*row), Encoder(tokenizer, "none", 10**6).example(*row)
    assert example.responses == whole.responses  # never shortened, both beside one prompt
    assert len(example.prompt) + max(map(len, example.responses)) == 40
    assert list(example.prompt) == [0, *whole.prompt[1 - len(example.prompt):]]
    assert len(encoder.prompt_ids("x" * 38)) == 39
    assert len(encoder.prompt_ids("x" * 60)) == 20  # leaves room to sample a response
    assert encoder.report() == "2 with a trimmed prompt" and encoder.report() == ""


@pytest.mark.parametrize("length", range(8, 40, 4))
def test_no_response_is_ever_empty_or_cut(make, length):
    encoder = Encoder(make(bos=True), "none", length)
    for count in range(1, 45):
        example = encoder.example("z" * 30, ["y" * count, "w"])
        fits = count + 1 + 2 <= length  # closing token, BOS and one prompt token beside it
        assert (example is not None) == fits
        if fits:
            assert [len(ids) for ids in example.responses] == [count + 1, 2]
            assert 2 <= len(example.prompt) <= length - count - 1


def test_dropped_rows_are_counted(make):
    encoder = Encoder(make(), "none", 30)
    rows = [("a", ["", "b"]), ("a", ["b", " \n"]), ("a", ["b", "b"]), ("", ["b", "c"]),
            ("a", ["z" * 50, "b"]), ([user("a")], [ASK, SO]), ("a", ["b", "c"])]
    assert [encoder.example(*row) is not None for row in rows] == [False] * 6 + [True]
    report = encoder.report()
    assert report.startswith("2 dropped (empty response), 1 dropped (identical pair), 1 dropped (")
    assert "(empty prompt), 1" in report and "max_length), 1" in report and "one mess" in report


# ---- a run's rows ----------------------------------------------------------------------------

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with t.jsonl of 20 questions and p.jsonl of 50 pairs of 10 prompts."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"{i % 10}?", "chosen": f"a{i}", "rejected": "b"} for i in range(50)]
    write(tmp_path / "p.jsonl", *pairs)
    tasks = [{"input": f"{i}?", "output": f"The answer is {i}"} for i in range(20)]
    write(tmp_path / "t.jsonl", *tasks)
    return tmp_path


def rows_of(command):
    return read_rows(parse(["--model", "model", *command.split()]))


def test_what_is_held_out_is_dropped_from_the_rest_and_counted(place, capsys):
    write(place / "test.jsonl", {"input": " 2?\n", "answer": "1"}, {"input": "4?", "answer": "1"})
    tasks, _, _, test = rows_of("--train t.jsonl --test test.jsonl")
    assert len(test) == 2 and len(tasks) == 18 and not {"2?", "4?"} & {t.prompt for t in tasks}
    assert "2 training rows dropped" in capsys.readouterr().out
    assert len(rows_of("--pairs p.jsonl --test test.jsonl")[1]) == 40
    _, pairs, _, test = rows_of("--pairs p.jsonl")
    assert len(test) == 5 and pairs and "5 of 50 pairs held out" in capsys.readouterr().out
    assert not {plain(pair.prompt) for pair in test} & {plain(pair.prompt) for pair in pairs}


def test_order_depends_on_the_seed_alone(place):
    write(place / "test.jsonl", {"input": "other", "answer": "1"})
    first = [task.prompt for task in rows_of("--train t.jsonl")[0]]
    assert first != [f"{i}?" for i in range(20)]
    assert first == [task.prompt for task in rows_of("--train t.jsonl --test test.jsonl")[0]]
    assert first[:7] == [task.prompt for task in rows_of("--train t.jsonl --limit 7")[0]]


def test_rows_without_an_answer_are_counted_where_answers_are_graded(place, capsys):
    write(place / "open.jsonl", {"input": "a", "output": "four"})
    assert rows_of("--train open.jsonl --method sft")[0]
    assert "to grade by" not in capsys.readouterr().out
    assert len(rows_of("--train t.jsonl open.jsonl")[0]) == 21
    assert "1 training rows have no answer to grade by; they make" in capsys.readouterr().out


def test_the_style_follows_the_rows(place):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "task": 3, "rewrite": None}  # as we write
    [ours] = read_pairs(write(place / "pairs.jsonl", row))
    tasks, strings, talk = read_tasks(["t.jsonl"]), read_pairs("p.jsonl"), Pair(ASK, SO, NO)
    assert style_of("auto", tasks) == style_of("auto", [ours]) == "alpaca" and vars(ours) == row
    assert style_of("auto", strings) == "none" == style_of("none", [talk])
    assert style_of("auto", [*tasks, *strings, talk]) == "chat"


def test_demo_problems_are_distinct_right_and_reproducible():
    train, _, val, test = read_rows(parse([]))
    assert (len(train), len(val), len(test)) == (500, 300, 1000)
    assert len({task.prompt for task in train + val + test}) == 1800
    assert train == read_rows(parse([]))[0] != read_rows(parse(["--seed", "1"]))[0]
    for task in train + demo.problems(40, 1, habit=1.0):
        steps = [line.split(" = ") for line in task.output.split("\n")[:-1]]
        assert all(eval(left) == int(right) for left, right in steps)
        assert task.output.endswith(f"= {task.answer}\nThe answer is {task.answer}")
