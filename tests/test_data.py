"""Reading that must work: row forms, encoding, chat templates, what is dropped and counted, data order."""

import json
import os
import random
from pathlib import Path

import pytest
from helpers import tiny_model, write_tokenizer
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from allo_mini import UserError
from allo_mini.checkpoint import save_model
from allo_mini.config import parse
from allo_mini.data import ALPACA, Encoder, is_pairs, plain, read_pairs, read_tasks
from allo_mini.loop import steps_of
from allo_mini.files import read_samples, read_weights
from allo_mini.inputs import need_answers, open_run
from allo_mini.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>",
           "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "[INST]", "[/INST]"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
          "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
          "{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
           "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
           "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")
LLAMA2 = MISTRAL.replace("+ eos_token", "+ ' ' + eos_token")
SMOLLM2 = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"
           "{% endif %}" + CHATML)
FAMILIES = {  # template, settings, the token that must close a response
    "smollm2": (SMOLLM2, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
                "<|im_end|>"),
    "smollm2 base": (SMOLLM2, {"eos_token": "<|endoftext|>"}, "<|im_end|>"),
    "qwen2.5": (CHATML, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
                "<|im_end|>"),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, "<|eot_id|>"),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, "</s>"),
    "llama2": (LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}, "</s>"),
    "no closing": ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", {"eos_token": "</s>"}, "</s>"),
}


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE with merges over spaces, so that encoding in two parts is not encoding at once."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["the cat sat on the mat", "the answer is 4", "a b a b a b", "ab ab ab", "step by step. the sum"]
    tokenizer.train_from_iterator(texts * 20, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer.to_str()


@pytest.fixture
def make(bpe, tmp_path):
    """make(bos=..., **settings) -> Tokenizer; bos: the post-processor adds <s>."""
    def tokenizer(bos=False, **settings):
        inner = HFTokenizer.from_str(bpe)
        if bos:
            inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        inner.save(str(tmp_path / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return Tokenizer(tmp_path)
    return tokenizer


def write(path, *rows, encoding="utf-8", end="\n"):
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode(encoding))
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---- rows --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding, end", [("utf-8", "\n"), ("utf-8-sig", "\n"), ("utf-8", "\r\n"),
                                           ("utf-8", "\n\n \n")])
def test_bom_crlf_and_blank_lines(encoding, end, tmp_path):
    rows = [{"input": "Café 😀?", "output": "The answer is 4"},
            {"input": "b\u2028c", "output": "x", "answer": 5}]
    tasks = read_tasks([write(tmp_path / "t.jsonl", *rows, encoding=encoding, end=end)])
    assert [(t.id, t.input, t.output, t.answer) for t in tasks] == [
        (0, "Café 😀?", "The answer is 4", None), (1, "b\u2028c", "x", "5")]


def test_last_line_without_newline(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"input": "a", "output": "b"}')
    assert len(read_tasks([tmp_path / "t.jsonl"])) == 1


def test_tasks_of_several_files_share_ids_and_the_limit(tmp_path):
    rows = [[{"input": f"{i}{j}", "output": "x"} for j in range(3)] for i in range(2)]
    files = [write(tmp_path / f"{i}.jsonl", *rows[i]) for i in range(2)]
    assert [t.id for t in read_tasks(files)] == list(range(6))
    assert [t.input for t in read_tasks(files, limit=4)] == ["00", "01", "02", "10"]


def test_official_rows(tmp_path):
    path = write(tmp_path / "t.jsonl", {"question": "a?", "prediction": "wrong"})
    tasks = read_tasks([path], need_output=False)
    assert (tasks[0].input, tasks[0].output) == ("a?", None)
    row = {"input": "a?", "output": "wrong", "reward": [0.1, 1, 0.25], "ref_prob": [-1.0, -2.0, -3.0]}
    [negative] = read_weights(write(tmp_path / "w.jsonl", row))
    assert (negative.prompt, negative.response, negative.scores) == ("a?", "wrong", [0.1, 1.0, 0.25])


def test_test_rows_need_only_an_answer(tmp_path):
    rows = [{"input": "a", "answer": "5"}, {"input": "b", "output": "So\nthe answer is: 7."}]
    assert len(need_answers(read_tasks([write(tmp_path / "t.jsonl", *rows)], need_output=False))) == 2


@pytest.mark.parametrize("name, row", [("t", {"output": "So. The answer is "}), ("t", {"output": "\\boxed{4}"}),
                                       ("math_x", {"output": "So"})])
def test_a_test_row_without_an_answer_is_named(tmp_path, name, row):
    path = write(tmp_path / f"{name}.jsonl", {"input": "a", **row})
    with pytest.raises(UserError, match=rf"{name}.jsonl:1: a --test row needs 'answer'"):
        need_answers(read_tasks([path], need_output=False))
    with pytest.raises(UserError, match="math_x.jsonl:1"):  # a box is no answer to the generic grader
        need_answers(read_tasks([write(tmp_path / "math_x.jsonl", {"input": "a", "output": "\\boxed{4}"})], need_output=False), "")
    boxed = write(tmp_path / "math_y.jsonl", {"input": "a", "output": "thus \\boxed{4}"})
    assert need_answers(read_tasks([boxed], need_output=False))


def test_samples_of_a_question_on_several_lines(tmp_path):
    rows = [{"input": "a", "samples": ["1", "2"]}, {"input": "b", "samples": [], "unfinished": 4},
            {"input": "a", "samples": ["3"]}]
    assert read_samples(write(tmp_path / "s.jsonl", *rows)) == ({"a": ["1", "2", "3"], "b": []}, 4)


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
ASK = [user("hi"), assistant("hello"), user("how?")]
FORMS = {
    "strings": ({"prompt": "how?", "chosen": "so", "rejected": "no"}, ("how?", "so", "no")),
    "messages": ({"prompt": ASK, "chosen": [assistant("so")], "rejected": [assistant("no")]},
                 (ASK, [assistant("so")], [assistant("no")])),
    "messages, whole conversations": (
        {"prompt": ASK, "chosen": [*ASK, assistant("so")], "rejected": [*ASK, assistant("no")]},
        (ASK, [assistant("so")], [assistant("no")])),
    "messages, implicit prompt": ({"chosen": [*ASK, assistant("so")], "rejected": [*ASK, assistant("no")]},
                                  (ASK, [assistant("so")], [assistant("no")])),
    "Anthropic HH": ({"chosen": HH + " Say so", "rejected": HH + " Say no"}, (HH, " Say so", " Say no")),
    "Anthropic HH, one is empty": ({"chosen": HH + " so", "rejected": HH}, (HH, " so", "")),
    "strings, implicit prompt": ({"chosen": "The sky is blue", "rejected": "The sky is black"},
                                 ("The sky is", " blue", " black")),
    "identical strings": ({"chosen": HH + " so", "rejected": HH + " so"}, (HH, " so", " so")),
    "identical messages": ({"chosen": [*ASK, assistant("so")], "rejected": [*ASK, assistant("so")]},
                           (ASK, [assistant("so")], [assistant("so")])),
}


@pytest.mark.parametrize("row, expected", FORMS.values(), ids=FORMS)
def test_preference_forms(row, expected, tmp_path):
    path = write(tmp_path / "p.jsonl", {**row, "score_chosen": 9, "rewrite": "better"})
    assert is_pairs(path)
    [pair] = read_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == expected
    assert (pair.task, pair.rewrite) == (None, "better")


def test_rows_we_write_are_read_back(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "task": 3, "rewrite": None}
    assert [vars(pair) for pair in read_pairs(write(tmp_path / "p.jsonl", row))] == [row]


@pytest.mark.skipif("ALLO_DATA" not in os.environ, reason="ALLO_DATA names a folder of data sets")
def test_the_data_sets():
    for path in sorted(Path(os.environ["ALLO_DATA"]).glob("*.jsonl")):
        keys = json.loads(path.open(encoding="utf-8").readline())
        if "chosen" in keys:
            assert is_pairs(path) and read_pairs(path)
        elif "input" in keys:
            assert not is_pairs(path) and need_answers(read_tasks([path], need_output=False))


# ---- encoding ----------------------------------------------------------------------------------------------

def test_prompt_and_response_are_encoded_jointly(make):
    """Random cuts of random text, inside words too: prompt ids + response ids are the ids of the whole."""
    tokenizer, rng = make(bos=True), random.Random(0)
    encoder, moved = Encoder(tokenizer, "none", 400), 0
    words = "the cat sat on mat answer is 4 a b ab step by sum 12 é 😀".split()
    for _ in range(200):
        text = " ".join(rng.choices(words, k=12))
        at = rng.randint(1, len(text) - 4)
        e = encoder.example(text[:at], [text[at:]])
        assert e.prompt + e.responses[0] == tokenizer.encode(text) + [tokenizer.eos_id]
        moved += e.prompt != tokenizer.encode(text[:at])
    assert moved > 20  # the boundary often lies inside a token


def test_both_responses_share_one_prompt(make):
    tokenizer = make(bos=True)
    encoder = Encoder(tokenizer, "none", 400)
    e = encoder.example("the answer i", ["s 4", "n the mat"])
    for text, response in zip(("s 4", "n the mat"), e.responses):
        assert tokenizer.decode(e.prompt + response) == "the answer i" + text
        assert e.prompt + response == tokenizer.encode("the answer i" + text) + [tokenizer.eos_id]


@pytest.mark.parametrize("response", ("the cat", "the cat</s>", "the cat</s></s>", "the cat</s> and more"))
def test_closing_token_once_even_if_it_pads(make, response):
    tokenizer = make(pad_token="</s>")
    e = Encoder(tokenizer, "none", 100).example("a b", [response])
    assert e.responses[0].count(tokenizer.eos_id) == 1 and e.responses[0][-1] == tokenizer.eos_id


def test_alpaca_form(make):
    tokenizer = make()
    encoder = Encoder(tokenizer, "alpaca", 400)
    e = encoder.example("2 + 2?", ["the answer is 4"])
    assert tokenizer.decode(e.prompt + e.responses[0]) == ALPACA.format("2 + 2?") + " the answer is 4"
    assert "{}" in ALPACA and encoder.example("{x} {}", ["a"])  # braces in a question are only text


BOS = [(True, {}, True), (False, {}, False), (False, {"add_bos_token": True}, True),
       (True, {"add_bos_token": False}, False), (True, {"add_bos_token": True}, True),
       (False, {"add_bos_token": True, "bos_token": None}, False)]


@pytest.mark.parametrize("processor, settings, added", BOS)
def test_bos_exactly_when_the_tokenizer_adds_it(make, processor, settings, added):
    tokenizer = make(processor, **settings)
    encoder = Encoder(tokenizer, "none", 100)
    e = encoder.example("the cat", [" sat"])
    assert (e.prompt[0] == 0) == added and (e.prompt + e.responses[0]).count(0) == added
    assert encoder.prompt_ids("the cat").count(0) == added
    assert encoder.response_ids("the cat", " sat").count(0) == 0


def test_bos_is_never_added_to_what_a_template_wrote(make):
    for template, count in ((CHATML, 0), (MISTRAL, 1)):
        encoder = Encoder(make(bos=True, chat_template=template), "chat", 200)
        assert encoder.prompt_ids("the cat").count(0) == count
        assert encoder.example("the cat", ["sat"]).prompt.count(0) == count


# ---- chat templates ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("template, settings, closing", FAMILIES.values(), ids=FAMILIES)
def test_end_of_turn(make, template, settings, closing):
    tokenizer = make(chat_template=template, **settings)
    encoder = Encoder(tokenizer, "chat", 200)
    assert encoder.closing == tokenizer.inner.token_to_id(closing)
    for response in ("the cat", [assistant("the cat")]):
        e = encoder.example([user("a b")], [response])
        assert e.responses[0].count(encoder.closing) == 1 and e.responses[0][-1] == encoder.closing
        assert tokenizer.decode(e.responses[0]).strip() == "the cat"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "no closing"])
def test_message_lists_are_what_the_template_writes(make, name):
    template, settings, closing = FAMILIES[name]
    tokenizer = make(chat_template=template, **settings)
    encoder = Encoder(tokenizer, "chat", 300)
    talk = [user("a b"), assistant("ab"), user("the cat?")]
    e = encoder.example(talk, [[assistant("sat on the mat")], [assistant("sat")]])
    whole = tokenizer.encode(tokenizer.render([*talk, assistant("sat on the mat")], False), bos=False)
    assert e.prompt + e.responses[0] == whole[:len(whole) - whole[::-1].index(encoder.closing)]
    assert e.prompt == encoder.prompt_ids(talk)


def test_a_string_prompt_is_one_user_turn(make):
    encoder = Encoder(make(chat_template=CHATML), "chat", 200)
    assert encoder.prompt_ids("the cat") == encoder.prompt_ids([user("the cat")])


@pytest.mark.parametrize("form", ("file", "string", "named"))
def test_where_templates_are_found(make, tmp_path, form):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    tokenizer = make(**{} if form == "file" else {"chat_template": CHATML if form == "string" else named})
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
        tokenizer = Tokenizer(tmp_path)
    assert tokenizer.template == CHATML


# ---- lengths, and what is dropped --------------------------------------------------------------------------

def test_truncation_trims_the_prompts_left(make):
    tokenizer = make(bos=True)
    encoder, short, long = Encoder(tokenizer, "none", 40), " sat", " sat on the mat and the mat and the mat"
    prompt = "x" * 60 + "the cat"
    e = encoder.example(prompt, [short, long])
    whole = Encoder(tokenizer, "none", 10**6).example(prompt, [short, long])
    assert e.responses == whole.responses  # never shortened, and both beside the same prompt
    assert len(e.prompt) + max(map(len, e.responses)) == 40
    assert e.prompt[0] == 0 and e.prompt[1:] == whole.prompt[-(len(e.prompt) - 1):]
    assert encoder.report() == "kept with a trimmed prompt: 1" and not encoder.dropped


@pytest.mark.parametrize("length", range(8, 40))
def test_no_response_is_ever_empty_or_cut(make, length):
    encoder = Encoder(make(bos=True), "none", length)
    for count in range(1, 45):
        e = encoder.example("z" * 30, ["y" * count, "w"])
        assert (e is None) == (count + 1 + 2 > length)  # closing token, BOS and one prompt token beside it
        if e:
            assert [len(r) for r in e.responses] == [count + 1, 2] and len(e.prompt) >= 2
            assert len(e.prompt) + count + 1 <= length


def test_prompts_to_sample_from_leave_room(make):
    encoder = Encoder(make(bos=True), "none", 20)
    assert len(encoder.prompt_ids("z" * 18)) == 19
    ids = encoder.prompt_ids("z" * 100)
    assert len(ids) == 10 and ids[0] == 0


def test_dropped_rows_are_counted(make):
    encoder = Encoder(make(chat_template=CHATML), "none", 30)
    rows = [("a", ["", "b"]), ("a", ["b", " \n"]), ("a", ["b", "b"]), ("", ["b", "c"]),
            ("a", ["z" * 50, "b"]),
            ([user("a")], [[assistant("b"), user("c"), assistant("d")], [assistant("e")]]), ("a", ["b", "c"])]
    kept = [encoder.example(*row) for row in rows]
    assert [e is not None for e in kept] == [False] * 6 + [True]
    assert dict(encoder.dropped) == {
        "empty response": 2, "identical pair": 1, "empty prompt": 1, "response longer than max_length": 1,
        "response not one message of the assistant": 1}


# ---- a run's rows ------------------------------------------------------------------------------------------

@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(), tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    return tmp_path


def opened(command):
    return open_run(parse(["--model", "model", *command.split()]))


def test_training_rows_that_are_test_rows_are_dropped(place, capsys):
    rows = [{"input": f"{i}?", "output": "The answer is 1"} for i in range(6)]
    write(place / "t.jsonl", *rows)
    write(place / "test.jsonl", {"input": " 2?\n", "answer": "1"}, rows[4])
    run = opened("--train t.jsonl --test test.jsonl")
    assert sorted(t.input for t in run.tasks) == ["0?", "1?", "3?", "5?"] and len(run.test) == 2
    assert "2 training rows dropped" in capsys.readouterr().out


def test_a_pairs_prompt_that_is_a_test_question_is_dropped(place, capsys):
    write(place / "p.jsonl", *({"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(6)))
    write(place / "test.jsonl", {"input": "2?", "answer": "1"})
    assert len(opened("--pairs p.jsonl --test test.jsonl").pairs) == 5
    assert "1 pairs dropped" in capsys.readouterr().out


def test_held_out_pairs_share_no_prompt_with_the_rest(place, capsys):
    rows = ({"prompt": f"{i % 10}?", "chosen": f"a{i}", "rejected": "b"} for i in range(50))
    write(place / "p.jsonl", *rows)
    run = opened("--pairs p.jsonl --val-rows 3")
    assert "3 rows held out to validate on, which needs --eval-every" in capsys.readouterr().out
    held = {plain(p.prompt) for p in [*run.test, *run.val]}
    assert len(run.test) == 5 and len(run.val) == 3 and run.pairs
    assert not held & {plain(p.prompt) for p in run.pairs}


def test_conversations_among_the_test_rows_decide_the_style_too(place):
    write(place / "p.jsonl", *({"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(8)))
    talk = {"prompt": [{"role": "user", "content": "t"}], "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}]}
    write(place / "test.jsonl", talk)
    assert opened("--pairs p.jsonl").encoder.style == "none"
    with pytest.raises(UserError, match="no chat template"):  # of this model
        opened("--pairs p.jsonl --test test.jsonl")


def test_a_column_named_task_makes_no_pairs_of_ours(place):
    write(place / "p.jsonl", *({"prompt": f"{i}?", "chosen": "a", "rejected": "b", "task": i} for i in range(8)))
    assert opened("--pairs p.jsonl").encoder.style == "none"


def test_flags_of_stages_that_do_not_run_are_named(place, capsys):
    write(place / "p.jsonl", *({"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(8)))
    opened("--pairs p.jsonl --method dpo --improve-lr 1e-5 --sft-epochs 2 --dpo-lr 1e-5")
    assert "no effect in this run, which does not come to these stages: --sft-..., --improve-..." in capsys.readouterr().out
    opened("--pairs p.jsonl --method dpo --dpo-lr 1e-5 --out other")
    assert "no effect" not in capsys.readouterr().out


def test_unusable_rows_among_good_ones_are_skipped(place, capsys):
    good = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(8)]
    bad = [{"prompt": "x", "chosen": "", "rejected": "b"}, {"prompt": "y", "chosen": "b", "rejected": "b"}]
    write(place / "p.jsonl", *good, *bad)
    write(place / "test.jsonl", {"prompt": "t", "chosen": "a", "rejected": "b"})
    run = opened("--pairs p.jsonl --test test.jsonl")
    examples = run.encode(((p.prompt, [p.chosen, p.rejected]) for p in run.pairs), "pairs")
    assert len(examples) == 8
    assert "8 kept; dropped: 1 empty response, 1 identical pair" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the pairs can be used; dropped: 1 empty response"):
        run.encode([("a", ["", "b"])], "pairs")


def test_trimmed_prompts_are_counted_apart_from_what_is_dropped(place, capsys):
    write(place / "p.jsonl", *({"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(12)))
    run = opened("--pairs p.jsonl --max-length 30")
    examples = run.encode([("x" * 50, ["a", "b"]), ("x", ["", "b"]), ("y", ["a", "b"])], "pairs")
    assert len(examples) == 2 and len(examples[0].prompt) == 28
    assert "pairs: 2 kept; dropped: 1 empty response; kept with a trimmed prompt: 1\n" in capsys.readouterr().out
    run.encode([("x", ["a", "b"])], "pairs")
    assert capsys.readouterr().out == ""  # counted anew each time


def test_order_does_not_depend_on_what_else_is_read(place):
    rows = [{"input": f"{i}?", "output": "The answer is 1"} for i in range(20)]
    write(place / "t.jsonl", *rows)
    write(place / "test.jsonl", {"input": "other", "answer": "1"})
    first = [t.input for t in opened("--train t.jsonl --out a").tasks]
    assert first == [t.input for t in opened("--train t.jsonl --test test.jsonl --out b").tasks]
    assert first != [r["input"] for r in rows]
    assert first[:7] == [t.input for t in opened("--train t.jsonl --limit 7 --out c").tasks]


# ---- data order --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, batch, epochs", [(9, 3, 1), (10, 3, 2.5), (7, 9, 3), (1, 1, 1), (5, 2, 0.5)])
def test_steps_of(count, batch, epochs):
    steps = steps_of(count, batch, epochs, 1)
    order = [row for step in steps for row in step]
    assert steps == steps_of(count, batch, epochs, 1) and len(order) == round(count * epochs)
    assert all(len(step) == batch for step in steps[:-1]) and 1 <= len(steps[-1]) <= batch
    for at in range(0, len(order) - count + 1, count):  # every epoch holds every row once
        assert sorted(order[at:at + count]) == list(range(count))


def test_steps_depend_on_the_seed_and_stop_at_max_steps():
    assert steps_of(50, 5, 1, 1) != steps_of(50, 5, 1, 2)
    assert steps_of(50, 5, 1, 1, max_steps=3) == steps_of(50, 5, 1, 1)[:3]
    assert steps_of(50, 5, 2, 1)[:10] == steps_of(50, 5, 1, 1)  # more epochs do not change the first


def test_the_demo_keeps_its_chat_template_when_prompt_is_auto(place):
    assert open_run(parse(["--prompt", "auto", "--limit", "4", "--out", "a"])).encoder.style == "chat"
    assert open_run(parse(["--limit", "4", "--out", "b"])).encoder.style == "chat"
    assert open_run(parse(["--prompt", "none", "--limit", "4", "--out", "c"])).encoder.style == "none"
