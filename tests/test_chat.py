"""Conversations under published chat templates: where prompts end and responses begin."""

import json
import re

import pytest
import torch
from helpers import save_tokenizer, write_folder
from runs import TEMPLATE
from test_data import ASK, DATA, HH, NO, SO, SYSTEM, assistant, user, with_data, write
from test_data import bpe, make  # noqa: F401 (fixtures)

import train
from allo_mini import UserError
from allo_mini.data.encoder import ALPACA, Encoder
from allo_mini.data.rows import read_pairs
from allo_mini.data.tokenizer import Tokenizer

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


def encoder_of(make, family, length=400):
    template, settings, *_ = FAMILIES[family]
    return Encoder(make(bos=True, chat_template=template, **settings), "chat", length)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_spaces_around_a_response_follow_the_template(make, family):
    encoder = encoder_of(make, family)
    said = "sat" if family in ("llama3", "mistral 0.3") else "  sat \n"  # these trim
    [ids] = encoder.example(ASK, [[assistant("  sat \n")]]).responses
    assert text_of(encoder, ids) == FAMILIES[family][-1].format(said)


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
    for pair in read_pairs(tmp_path / "p.jsonl"):
        assert encoder.example(pair.prompt, [pair.chosen, pair.rejected]) is None
    assert encoder.report() == ("1 dropped (prompt that ends in an answer), 1 dropped (response "
                                "not one message of the assistant), 1 dropped (response with "
                                "<|im_end|> inside, which ends responses)")


# ---- templates -------------------------------------------------------------------------------

ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\nEND' }}{% endif %}"
THINKS = CHATML[:CHATML.index("{% if add_generation")] + ASSISTANT


def test_an_empty_thought_in_the_generation_prompt_is_not_learned(make):
    """As Qwen3 writes it when it is not to think."""
    template = THINKS.replace("END", "\\n</think>\\n\\n")
    encoder = Encoder(make(chat_template=template, **IM), "chat", 400)
    example = encoder.example(ASK, [SO])
    assert text_of(encoder, example.prompt).endswith("<think>\n\n</think>\n\n")
    assert text_of(encoder, example.responses[0]) == "so<|im_end|>"


def test_a_thought_that_the_generation_prompt_opens_must_be_closed(make):
    """As DeepSeek-R1's. A message must close it; a sample may break off in its thought."""
    encoder = Encoder(make(chat_template=THINKS.replace("END", ""), **IM), "chat", 400)
    for response in ("sum</think>sat", [assistant("sum</think>sat")],
                     [assistant("<think>\nsum</think>sat")], "<think>sum</think>sat"):
        assert text_of(encoder, encoder.response_ids(ASK, response)) == "sum</think>sat<|im_end|>"
    assert encoder.example(ASK, ["the sum"])
    with pytest.raises(UserError, match="opens a thought with <think>.*does not close"):
        encoder.example(ASK, [[assistant("sat")]])


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
    "no input": (DO, "alpaca", ALPACA.format("Do"), " ok</s>"),
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
    ("hh_harmless_pairs", "none", 2304, "4 dropped (empty response)")])
def test_whole_files_of_preference_data(make, name, style, used, report):
    """Every row is used, or dropped for a reason; responses follow their prompt, whole."""
    encoder = Encoder(make(chat_template=CHATML, **IM), style, 10**6)
    for pair in read_pairs(DATA / f"{name}.jsonl"):
        example = encoder.example(pair.prompt, [pair.chosen, pair.rejected])
        used -= example is not None
        for text, ids in zip((pair.chosen, pair.rejected), example.responses if example else []):
            assert ids[-1] == encoder.closing and len(ids) > 1
            assert text_of(encoder, example.prompt + ids).endswith(text + "<|im_end|>")
    assert (used, encoder.report()) == (0, report)
