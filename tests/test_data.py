"""Rows that must be read, how they become ids, which a run gets; chats under real templates."""

import json
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace as Stub

import pytest
import torch
from runs import TEMPLATE, pair, task
from tokenizers import (Tokenizer as HFTokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

import train
from allo_mini import UserError
from allo_mini.data import demo
from allo_mini.data.encoder import ALPACA, Encoder
from allo_mini.data.rows import Pair, is_pairs, plain, read_pairs, read_tasks
from allo_mini.data.tokenizer import Tokenizer
from allo_mini.evaluation import answers
from allo_mini.evaluation.graders import gold_answer
from allo_mini.run.config import parse
from allo_mini.run.inputs import read_rows, style_of
from helpers import save_tokenizer, write_folder, write_tokenizer

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
            {"input": "i", "output": "o", "answer": "# 5"}, {"question": "a?", "n": "wrong"},
            {"input": "b", "answer": "5"}]
    tasks = read_tasks([write(tmp_path / "t.jsonl", *rows)], need_output=False)
    assert [(task.prompt, task.output, task.answer) for task in tasks] == [
        ("How many?", "He has 1,200.\nSo 1,200.\nThe answer is 1,200", "1200"),
        ("p", "Thus $\\boxed{5}$.", None), ("i", "o", "# 5"), ("a?", None, None), ("b", None, "5")]
    worked = {"question": "c?", "answer": "Add.\nThe answer is 4."}
    [task] = read_tasks([write(tmp_path / "u.jsonl", worked)])
    assert (task.output, task.answer) == (worked["answer"], None)


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
ASK = [user("hi"), assistant("hello"), user("how?")]
SO, NO = [assistant("so")], [assistant("no")]
SYSTEM = [{"role": "system", "content": "Be brief."}]
SAID = [{"from": name, "value": text}
        for name, text in (("human", "how?"), ("gpt", "so"), ("gpt", "no"))]
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
    "a system message": (SYSTEM + ASK, SO, NO, (SYSTEM + ASK, SO, NO)),
    "ShareGPT": (SAID[:1], *SAID[1:], ([SAID[0] | user("how?")], [SAID[1] | SO[0]],
                                       [SAID[2] | NO[0]]))}


@pytest.mark.parametrize("prompt, chosen, rejected, expected", FORMS.values(), ids=FORMS)
def test_preference_forms(prompt, chosen, rejected, expected, tmp_path):
    row = {"chosen": chosen, "rejected": rejected, "score_chosen": 9}
    if prompt == SYSTEM + ASK:
        row["system"] = "Be brief."  # said again
    if prompt:
        row["conversations" if prompt == SAID[:1] else "prompt"] = prompt
    path = write(tmp_path / "p.jsonl", row)
    assert is_pairs(path)
    [pair] = read_pairs([path])
    assert (pair.prompt, pair.chosen, pair.rejected, pair.task) == (*expected, None)


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
        shared, rests, changed = tokenizer.split(prompt, texts, bos)
        alone = tokenizer.encode(prompt, bos)
        for text, rest in zip(texts, rests, strict=True):
            assert shared + rest == tokenizer.encode(prompt + text, bos)
        assert changed == len(alone) - len(shared)
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
    assert encoder.prompt_ids("<s>the cat").count(0) == 1  # as apply_chat_template writes it


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


@pytest.mark.parametrize("length", range(8, 40, 4))
def test_truncation_trims_the_prompts_left_and_no_response(make, length):
    """BOS and the prompt's end are kept; a response is never empty or cut."""
    tokenizer, row = make(bos=True), "x" * 30 + "the cat"
    encoder, unlimited = Encoder(tokenizer, "none", length), Encoder(tokenizer, "none", 10**6)
    for count in range(1, 45):
        example, whole = (one.example(row, ["y" * count, "w"]) for one in (encoder, unlimited))
        fits = count + 1 + 2 <= length  # closing token, BOS and one prompt token beside it
        assert (example is not None) == fits
        if fits:
            assert example.responses == whole.responses
            assert [len(ids) for ids in example.responses] == [count + 1, 2]
            assert len(example.prompt) == min(len(whole.prompt), length - count - 1)
            assert list(example.prompt) == [0, *whole.prompt[1 - len(example.prompt):]]


def test_a_long_prompt_leaves_room_to_sample_a_response(make):
    encoder = Encoder(make(bos=True), "none", 40)
    assert encoder.example("x" * 60, ["y"])
    assert len(encoder.prompt_ids("x" * 38)) == 39
    assert len(encoder.prompt_ids("x" * 60)) == 20
    assert encoder.report() == "2 with a trimmed prompt" and encoder.report() == ""


def test_dropped_rows_are_counted(make):
    encoder = Encoder(make(), "none", 30)
    rows = [("a", ["", "b"]), ("a", ["b", " \n"]), ("a", ["b", "b"]), ("", ["b", "c"]),
            ("a", ["z" * 50, "b"]), ([user("a")], [ASK, SO]), ("a", ["b", "c"])]
    assert [encoder.example(*row) is not None for row in rows] == [False] * 6 + [True]
    report = encoder.report()
    assert report.startswith("2 dropped (empty response), 1 dropped (identical pair), 1 dropped (")
    assert "(empty prompt), 1" in report and "max_length), 1" in report and "one mess" in report


def test_tokens_over_the_boundary_are_counted(make):
    """A model is trained behind another prompt there than it is asked with."""
    encoder = Encoder(make(), "none", 60)
    rows = [("x th", ["e cat", "x"]), ("x the", [" cat", "x"]), ("x the ", ["cat", "y"])]
    changed = [encoder.split(*row)[2] > 0 for row in rows]
    assert all(encoder.example(*row) for row in rows) and any(changed)
    assert encoder.report() == f"{sum(changed)} with a token that is half prompt, half response"


def test_responses_that_begin_with_their_prompt_are_counted(make):
    """Some files hold whole texts beside the prompt: a model would read it twice."""
    encoder = Encoder(make(), "none", 60)
    assert encoder.example("the cat", ["the cat x", "x"]) and encoder.example("x", ["y", "z"])
    assert encoder.report() == "1 with a response that repeats the prompt"


def test_a_dialogue_that_parts_before_its_last_turn_is_dropped(make, tmp_path):
    """What a human said between would be learned."""
    asked, end = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Bye\n\nAssistant: Bye"
    write(tmp_path / "p.jsonl", {"chosen": f"{asked} Hello{end}", "rejected": f"{asked} Go{end}"})
    [row], encoder = read_pairs([tmp_path / "p.jsonl"]), Encoder(make(), "none", 400)
    assert encoder.example(*row.sides) is None
    assert encoder.report() == "1 dropped (response of several turns)"


def test_answers_that_are_none_and_whole_solutions_are_no_gold(tmp_path):
    write(tmp_path / "t.jsonl", {"problem": "a", "solution": "b", "answer": "proof"},
          {"question": "a", "answer": "b\nThe answer is 4"}, {"question": "a", "answer": " 4\n"})
    rows = read_tasks([tmp_path / "t.jsonl"], need_output=False)
    assert [row.answer for row in rows] == [None, None, " 4\n"]
    assert list(map(gold_answer, rows))[:2] == [None, "4"]


# ---- a run's rows ----------------------------------------------------------------------------

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with t.jsonl of 20 questions and p.jsonl of 50 pairs of 10 prompts."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", *(pair(f"{i % 10}?", f"a{i}", "b") for i in range(50)))
    write(tmp_path / "t.jsonl", *(task(f"{i}?", i) for i in range(20)))
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


def test_a_system_prompt_makes_no_other_question(place):
    """But a text in it does, of which all rows ask the same."""
    write(place / "one.jsonl", {"input": "4?", "answer": "1"})
    told = [{"messages": [*SYSTEM, user(f"{i}?"), *SO]} for i in range(9)]
    write(place / "told.jsonl", *told)
    assert len(rows_of("--train told.jsonl --test one.jsonl --method sft")[0]) == 8
    write(place / "system.jsonl", {"input": [*SYSTEM, user("4?")], "answer": "1"})
    assert len(rows_of("--train t.jsonl --test system.jsonl --prompt chat")[0]) == 19
    texts = [{"prompt": [{"role": "system", "content": f"Text {i}"}, *asked], "chosen": SO,
              "rejected": NO} for i in range(20) for asked in ([], [user("In short?")])]
    write(place / "texts.jsonl", *texts)
    assert sum(map(len, rows_of("--pairs texts.jsonl")[1::2])) == 40


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
    assert "1 training rows make no pairs: they have no answer" in capsys.readouterr().out
    assert len(rows_of("--train t.jsonl t.jsonl")[0]) == 40
    assert "20 training rows make no pairs" in capsys.readouterr().out


def test_the_style_follows_the_rows(place):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "task": 3, "rewrite": None}  # as we write
    [ours] = read_pairs([write(place / "pairs.jsonl", row)])
    tasks, strings, talk = read_tasks(["t.jsonl"]), read_pairs(["p.jsonl"]), Pair(ASK, SO, NO)
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


# ---- conversations: where prompts end and responses begin ------------------------------------

CHATML = ("{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}"
          "{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
          "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '" + HEADER.format("assistant") + "' }}{% endif %}")
MISTRAL = (  # the system prompt stands in the last turn, unless an answer follows
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' %}{{ bos_token }}"
    "{% for m in (messages[1:] if system else messages) %}"
    "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}")
IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
IM_ASK = ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
          "<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n")
LLAMA_ASK = (HEADER.format("user") + "hi<|eot_id|>" + HEADER.format("assistant") + "hello<|eot_id|>"
             + HEADER.format("user") + "how?<|eot_id|>" + HEADER.format("assistant"))
FAMILIES = {  # template, settings, how ASK and SYSTEM + ASK are asked, the shape of a response
    "smollm2": (CHATML, {**IM, "bos_token": "<|im_start|>"},
                "<|im_start|>system\nBe kind<|im_end|>\n" + IM_ASK,
                "<|im_start|>system\nBe brief.<|im_end|>\n" + IM_ASK, "{}<|im_end|>"),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
               "<|begin_of_text|>" + LLAMA_ASK,
               f"<|begin_of_text|>{HEADER.format('system')}Be brief.<|eot_id|>{LLAMA_ASK}",
               "{}<|eot_id|>"),
    "mistral 0.3": (MISTRAL, {}, "<s>[INST] hi[/INST] hello</s>[INST] how?[/INST]",
                    "<s>[INST] hi[/INST] hello</s>[INST] Be brief.\n\nhow?[/INST]", " {}</s>"),
    "no end of turn": ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", {},
                       "hi\nhello\nhow?\n", None, "{}\n</s>")}
CASES = [(family, i) for family in FAMILIES for i in (0, 1) if FAMILIES[family][2 + i]]


def encoder_of(make, family):
    template, settings, *_ = FAMILIES[family]
    return Encoder(make(bos=True, chat_template=template, **settings), "chat", 400)


def text_of(encoder, ids):
    return encoder.tokenizer.inner.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family, system", CASES)
def test_prompts_end_as_they_are_asked_and_responses_with_their_turn(make, family, system):
    said = "sat.\nThe answer is 4"
    encoder, shape = encoder_of(make, family), FAMILIES[family][-1]
    prompt, text = SYSTEM * system + ASK, FAMILIES[family][2 + system]
    example = encoder.example(prompt, [[assistant(said)], SO])
    assert text_of(encoder, example.prompt) == text
    texts = [text_of(encoder, ids) for ids in example.responses]
    assert texts == [shape.format(said), shape.format("so")]
    # cut nowhere but in the text as a whole, and BOS is there only where the template wrote it
    joint = encoder.tokenizer.encode(text + shape.format(said), bos=False)
    assert [*example.prompt, *example.responses[0]] == joint
    assert encoder.prompt_ids(prompt) == encoder.tokenizer.encode(text, bos=False)
    assert example.responses[0].count(encoder.closing) == 1
    # what is sampled is trained on as if it had been a message
    assert encoder.example(prompt, [said, "so"]) == example
    # spaces around a response follow the template, of which some trim
    said = "sat" if family in ("llama3", "mistral 0.3") else "  sat \n"
    [ids] = encoder.example(prompt, [[assistant("  sat \n")]]).responses
    assert text_of(encoder, ids) == shape.format(said)


def test_a_string_is_one_user_turn_and_a_string_of_a_dialogue_is_refused(make):
    encoder = encoder_of(make, "smollm2")
    assert encoder.prompt_ids("the cat") == encoder.prompt_ids([user("the cat")])
    assert encoder.example("q", [HH, "b"])  # as a response it is one
    assert encoder.example("Say\n\nAssistant: x", ["a"]) and encoder.example("Human: a", ["b"])
    with pytest.raises(UserError, match="is a dialogue in one string.*--prompt none"):
        encoder.example(HH, [" so", " no"])
    strings = Encoder(encoder.tokenizer, "none", 400)
    assert strings.frame(HH) == HH and strings.example(HH, [" so", " no"])


def test_pairs_that_are_no_pairs_are_dropped(make, tmp_path):
    write(tmp_path / "p.jsonl",
          {"chosen": [*ASK[:2], user("x")], "rejected": [*ASK[:2], user("y")]},
          {"chosen": ASK + SO, "rejected": [ASK[0], assistant("ba"), ASK[2], *SO]},
          {"prompt": ASK, "chosen": [assistant("use <|im_end|> to end, good")],
           "rejected": [assistant("use <|im_end|> to end, bad")]})  # as tokens they would be one
    encoder = encoder_of(make, "smollm2")
    for pair in read_pairs([tmp_path / "p.jsonl"]):
        assert encoder.example(pair.prompt, [pair.chosen, pair.rejected]) is None
    assert encoder.report() == ("1 dropped (prompt that ends in an answer), 1 dropped (response "
                                "not one message of the assistant), 1 dropped (response with "
                                "<|im_end|> inside, which ends responses)")


# ---- templates -------------------------------------------------------------------------------

ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\nEND' }}{% endif %}"
THINKS = CHATML[:CHATML.index("{% if add_generation")] + ASSISTANT


def test_an_empty_thought_of_the_generation_prompt_is_not_learned_an_open_one_is_closed(make):
    """As Qwen3 writes it when it is not to think; as DeepSeek-R1 does. A message must close it;
    a sample may break off in its thought."""
    template = THINKS.replace("END", "\\n</think>\\n\\n")
    encoder = Encoder(make(chat_template=template, **IM), "chat", 400)
    example = encoder.example(ASK, [SO])
    assert text_of(encoder, example.prompt).endswith("<think>\n\n</think>\n\n")
    assert text_of(encoder, example.responses[0]) == "so<|im_end|>"
    encoder = Encoder(make(chat_template=THINKS.replace("END", ""), **IM), "chat", 400)
    for response in ("sum</think>sat", [assistant("sum</think>sat")],
                     [assistant("<think>\nsum</think>sat")], "<think>sum</think>sat"):
        assert text_of(encoder, encoder.response_ids(ASK, response)) == "sum</think>sat<|im_end|>"
    assert encoder.example(ASK, ["the sum"])
    assert encoder.report() == "1 with a response that ends inside its thought"
    with pytest.raises(UserError, match="opens a thought with <think>.*does not close"):
        encoder.example(ASK, [[assistant("sat")]])
    run = Stub(tasks=[Stub(prompt="q", output="sat")], encoded=lambda rows, name: rows)
    with pytest.raises(UserError, match="does not close"):  # fine-tuning rows are messages
        encoder.example(*train.solutions(run)[0])


@pytest.mark.parametrize("kept", ["m['content'].split('</think>')[-1]",
                                  "m['content'].replace('<think>', '<think>\\n')"])
def test_a_thought_that_a_template_drops_or_moves_is_trained_on_as_it_is(make, kept):
    template = CHATML.replace("m['content']", f"({kept} if m['role'] == 'assistant' else "
                              "m['content'])")
    assert template != CHATML
    encoder = Encoder(make(chat_template=template, **IM), "chat", 400)
    for response in ("<think>sum</think>sat", [assistant("<think>sum</think>sat")]):
        said = text_of(encoder, encoder.response_ids(ASK, response))
        assert said == "<think>sum</think>sat<|im_end|>"
    assert text_of(encoder, encoder.response_ids(ASK, "sat")).startswith("sat<|im_end|>")


def test_an_end_of_turn_that_is_added_but_not_called_special_ends_a_response(bpe, tmp_path):
    inner = HFTokenizer.from_str(re.sub('"special": ?true', '"special": false', bpe))
    folder = save_tokenizer(inner, tmp_path, chat_template=CHATML, eos_token="</s>")
    encoder = Encoder(Tokenizer(folder), "chat", 400)
    assert encoder.ending == "<|im_end|>"
    assert text_of(encoder, encoder.response_ids(ASK, "sat")) == "sat<|im_end|>"


@pytest.mark.parametrize("form", ["file", "string", "named"])
def test_where_templates_are_found(make, tmp_path, form):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    make(chat_template={"file": "y", "string": CHATML, "named": named}[form])
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert Tokenizer(tmp_path).template == CHATML


def test_what_published_templates_ask_for(make):
    """Llama 3.2's date, tags around what an assistant says, tojson's arguments: as transformers."""
    template = ("{{ strftime_now('%d %b %Y') }}|{%- for m in messages %}{% if not loop.first -%}\n"
                "{%- generation -%} {{ m['content'] }}\n{% endgeneration %}\n{%- else %}"
                "{{ m['content'] | tojson }}{% continue %}{% endif %}{% endfor %}|"
                "{{ {'b': 1, 'é': 2} | tojson(ensure_ascii=True, indent=1) }}")
    assert make(chat_template=template).render([user("é<"), assistant("generation")], False) == (
        '26 Jul 2024|"é<"generation\n|{\n "b": 1,\n "\\u00e9": 2\n}')


def test_conversations_train_as_they_are_and_the_saved_model_ends_as_trained(tmp_path, capsys):
    """A base model's EOS is not the template's end of turn: generation_config.json has both."""
    model = write_folder(tmp_path / "model")
    inner = Tokenizer(model).inner
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    save_tokenizer(inner, model, chat_template=CHATML, eos_token="<|endoftext|>")
    rows = [{"chosen": [user(f"Hi {i}"), *SO], "rejected": [user(f"Hi {i}"), *NO]}
            for i in range(12)]
    pairs = write(tmp_path / "p.jsonl", *rows)
    assert train.main(["--model", str(model), "--pairs", pairs, "--max-steps", "1", "--locate",
                       "gradient", "--token-weights", "edit", "--out", str(tmp_path / "run")]) == 0
    assert "dropped" not in capsys.readouterr().out
    settings = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert settings["prompt"] == "chat"  # in which eval.py will ask
    saved = json.loads((tmp_path / "run/improve/generation_config.json").read_text())
    assert saved == {"eos_token_id": [2, 100, 101]}  # 2: config.json's
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run/improve")
    for end in (100, 101):  # as the third token
        say = [lambda ids, scores: torch.eye(120)[[end if ids.shape[1] == 5 else 50]]]
        ids = theirs.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=9, logits_processor=say)
        assert ids[0, 3:].tolist() == [50, 50, end]


DO = {"instruction": "Do", "output": "ok"}
SHARED = [{"from": name, "value": name} for name in ("system", "human", "gpt")]
FINE_TUNING = {  # a row, the style it gets, its prompt, what is trained on
    "strings": ({"prompt": "1 + 1 =", "completion": " 2"}, "none", "1 + 1 =", " 2</s>"),
    "TRL's": ({"prompt": ASK, "completion": SO}, "chat", "hi|hello</s>how?|", "so</s>"),
    "messages": ({"messages": ASK + SO + ASK[:1]}, "chat", "hi|hello</s>how?|", "so</s>"),
    "ShareGPT": ({"conversations": SHARED}, "chat", "system|human|", "gpt</s>"),
    "Alpaca's": (DO | {"input": "", "text": "Do ok"}, "alpaca", ALPACA.format("Do"), " ok</s>"),
    "braces": (DO | {"instruction": "{x} {}"}, "alpaca", ALPACA.format("{x} {}"), " ok</s>"),
    "an input": (DO | {"input": "x"}, "alpaca", ALPACA.format("Do\n\nx"), " ok</s>"),
    "a text": ({"text": "The cat"}, "none", "T", "he cat</s>"),
    "a text after BOS": ({"text": "The cat"}, "none", "<s>", "The cat</s>")}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_rows(tmp_path, monkeypatch, capsys, name):
    """Nothing is sampled, and no answer needed."""
    row, style, *expected = FINE_TUNING[name]
    folder = write_folder(tmp_path / "model", chat_template=TEMPLATE, add_bos_token="BOS" in name)
    trained, optimize = [], train.optimize
    monkeypatch.setattr(train, "optimize", lambda *args: trained.extend(args[3]) or optimize(*args))
    rows = write(tmp_path / "t.jsonl", row)
    command = f"--model {folder} --train {rows} --method sft --out {tmp_path}/run"
    assert train.main(command.split()) == 0
    said, encoder = capsys.readouterr().out, Encoder(Tokenizer(folder), "none", 99)
    assert f"prompts: {style}" in said and not re.search("dropped|sampl|grade  ", said)
    [[prompt, [response], *_]] = trained
    assert [text_of(encoder, prompt), text_of(encoder, response)] == expected


@with_data
@pytest.mark.parametrize("name, style, used, report", [
    ("ultrafeedback_train", "chat", 994, "4 dropped (identical pair), 2 dropped (empty response)"),
    ("hh_harmless_pairs", "none", 2303,
     "4 dropped (empty response), 1 dropped (response of several turns)")])
def test_whole_files_of_preference_data(make, name, style, used, report):
    """Every row is used, or dropped for a reason; responses follow their prompt, whole."""
    encoder = Encoder(make(chat_template=CHATML, **IM), style, 10**6)
    for pair in read_pairs([DATA / f"{name}.jsonl"]):
        example = encoder.example(pair.prompt, [pair.chosen, pair.rejected])
        used -= example is not None
        for text, ids in zip((pair.chosen, pair.rejected), example.responses if example else []):
            assert ids[-1] == encoder.closing and len(ids) > 1
            assert text_of(encoder, example.prompt + ids).endswith(text + "<|im_end|>")
    assert (used, encoder.report()) == (0, report)
