"""Conversations: where the prompt ends and the response begins, under templates as four model families publish them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from allo_mini import UserError
from allo_mini.data import Encoder, read_pairs
from helpers import tiny_model, write_tokenizer
from allo_mini.checkpoint import save_model
from test_data import assistant, bpe, make, user, write  # noqa: F401 (fixtures)

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{% endif %}"
          "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content']|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
QWEN25 = CHATML.replace("SYSTEM", "You are Qwen")
IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
FAMILIES = {  # template, settings, prompt of TALK with and without SYSTEM, what the response looks like
    "smollm2": (CHATML.replace("SYSTEM", "Be kind"), {**IM, "bos_token": "<|im_start|>"},
                "<|im_start|>system\nBe kind<|im_end|>\n", "<|im_start|>system\nBe brief.<|im_end|>\n",
                "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nab<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n"
                "<|im_start|>assistant\n", "{}<|im_end|>"),
    "qwen2.5": (QWEN25, {**IM, "bos_token": None},
                "<|im_start|>system\nYou are Qwen<|im_end|>\n", "<|im_start|>system\nBe brief.<|im_end|>\n",
                "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nab<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n"
                "<|im_start|>assistant\n", "{}<|im_end|>"),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
               "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n<|eot_id|>",
               "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n"
               "Be brief.<|eot_id|>",
               "<|start_header_id|>user<|end_header_id|>\n\na b<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nab<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\nthe cat?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
               "{}<|eot_id|>"),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>", "<s>",
                "[INST] a b[/INST] ab</s>[INST] the cat?[/INST]", " {}</s>")}
TALK = [user("a b"), assistant("ab"), user("the cat?")]
SYSTEM = [{"role": "system", "content": "Be brief."}]


def encoder_of(make, family, length=400):
    template, settings, *_ = FAMILIES[family]
    return Encoder(make(bos=True, chat_template=template, **settings), "chat", length)  # the tokenizer itself adds <s>


def text_of(encoder, ids):
    return encoder.tokenizer.inner.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("response", ["sat on the mat", "sat.\nThe answer is 4"])
def test_the_prompt_ends_with_the_generation_prompt_and_the_response_with_its_end_of_turn(make, family, system, response):
    encoder, (_, _, bare, told, talk, shape) = encoder_of(make, family), FAMILIES[family]
    head = (told if system else bare) + talk
    if family == "mistral" and system:  # its system prompt stands in the last user turn
        head = head.replace("[INST] the cat?", "[INST] Be brief.\n\nthe cat?")
    prompt = SYSTEM * system + TALK
    e = encoder.example(prompt, [[assistant(response)], [assistant("no")]])
    assert text_of(encoder, e.prompt) == head
    assert [text_of(encoder, ids) for ids in e.responses] == [shape.format(response), shape.format("no")]
    joint = encoder.tokenizer.encode(head + shape.format(response), bos=False)
    assert e.prompt + e.responses[0] == joint  # nothing is cut where the whole text is not, BOS stands where the template put it
    assert encoder.prompt_ids(prompt) == encoder.tokenizer.encode(head, bos=False)  # what sampling starts from


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_implicit_and_whole_conversations_are_one_example(make, family, tmp_path):
    prompt, good, bad = SYSTEM + TALK, [assistant("sat on the mat")], [assistant("sat")]
    write(tmp_path / "p.jsonl", {"prompt": prompt, "chosen": good, "rejected": bad},
          {"chosen": prompt + good, "rejected": prompt + bad},
          {"prompt": prompt, "chosen": prompt + good, "rejected": prompt + bad})
    encoder = encoder_of(make, family)
    first, *others = [encoder.example(p.prompt, [p.chosen, p.rejected]) for p in read_pairs(tmp_path / "p.jsonl")]
    assert first is not None and others == [first, first]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_string_and_a_message_are_the_same_response(make, family):
    """Sampled text is trained on as if it had been a message, and what is sampled from is what is trained on."""
    encoder = encoder_of(make, family)
    said, sampled = (encoder.example(SYSTEM + TALK, [r]) for r in ([assistant("sat")], "sat"))
    assert said == sampled and said.prompt == encoder.prompt_ids(SYSTEM + TALK)
    assert encoder.example("the cat?", ["sat"]) == encoder.example([user("the cat?")], [[assistant("sat")]])


@pytest.mark.parametrize("family", FAMILIES)
def test_spaces_around_a_response_follow_the_template(make, family):
    """Llama 3 and Mistral trim what is said; ChatML keeps it. Either way the end of turn comes once, last."""
    encoder = encoder_of(make, family)
    e = encoder.example(TALK, [[assistant("  sat \n")]])
    kept = family in ("smollm2", "qwen2.5")
    assert text_of(encoder, e.responses[0]) == FAMILIES[family][-1].format("  sat \n" if kept else "sat")
    assert e.responses[0].count(encoder.closing) == 1 and e.responses[0][-1] == encoder.closing


def test_a_prompt_that_ends_with_the_assistant_is_refused_in_one_line_by_a_strict_template(make):
    encoder = encoder_of(make, "mistral")
    with pytest.raises(UserError, match="roles must alternate"):
        encoder.example([*TALK, user("again")], [[assistant("sat")]])


def test_a_template_that_thinks_in_its_generation_prompt(make):
    """Qwen3 writes an empty thought into the generation prompt; it belongs to the prompt, not to what is learned."""
    think = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    template = CHATML[:CHATML.index("{% if add_generation")] + think
    encoder = Encoder(make(chat_template=template, **IM), "chat", 400)
    e = encoder.example([user("a b")], [[assistant("sat")]])
    assert text_of(encoder, e.prompt).endswith("<think>\n\n</think>\n\n")
    assert text_of(encoder, e.responses[0]) == "sat<|im_end|>"


# ---- whole runs --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_model(tiny_model(), folder)
    return write_tokenizer(folder, chat_template=(
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + ('</s>' if m['role'] == 'assistant' else '') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"))


ROWS = {
    "UltraFeedback": [{"prompt": f"How do I cook {i}?", "chosen": f"Boil {i}.\n\n* salt", "rejected": "I can't say.",
                       "source_index": i, "metadata": {"score_chosen": 9.0, "score_rejected": 8.0}} for i in range(12)],
    "HH-RLHF": [{"chosen": f"\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Good {i}.",
                 "rejected": f"\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Go away {i}."}
                for i in range(12)],
    "messages": [{"prompt": [*SYSTEM, user(f"Hi {i}")], "chosen": [assistant("Hello.")],
                  "rejected": [assistant(f"Away {i}.")]} for i in range(12)]}


@pytest.mark.parametrize("kind", ROWS)
def test_preference_rows_train_as_they_are(chat_model, tmp_path, kind, capsys):
    write(tmp_path / "pairs.jsonl", *ROWS[kind])
    assert train.main(["--model", str(chat_model), "--pairs", str(tmp_path / "pairs.jsonl"), "--max-steps", "1", "--locate",
                       "gradient", "--token-weights", "edit", "--max-length", "200", "--out", str(tmp_path / "run")]) == 0
    assert "do not agree" not in capsys.readouterr().out
    base, new = load_file(chat_model / "model.safetensors"), load_file(tmp_path / "run/improve/model.safetensors")
    assert any(not torch.equal(base[name], new[name]) for name in base)


def test_talking_with_the_result_remembers_what_was_said(chat_model, monkeypatch, capsys):
    lines, prompts = iter(["Hi\n", "More\n", "/reset\n", "New\n", "\n"]), []
    monkeypatch.setattr("sys.stdin.readline", lambda: next(lines), raising=False)
    monkeypatch.setattr(evaluation, "respond", lambda model, encoder, asked, *_, **__: (
        prompts.append(encoder.frame(asked[0])) or [[("yes", True)]]))
    assert evaluation.main(["--model", str(chat_model), "--chat"]) == 0
    assert prompts == ["[user]Hi[assistant]", "[user]Hi[assistant]yes</s>[user]More[assistant]", "[user]New[assistant]"]


DATA = Path(os.environ.get("ALLO_DATA", "data"))


@pytest.mark.parametrize("name, style, used", [("ultrafeedback_train", "none", 994), ("ultrafeedback_eval", "none", 199),
                                               ("hh_harmless_pairs", "none", 2304)])
@pytest.mark.skipif(not DATA.is_dir(), reason="wants the data sets: set ALLO_DATA")
def test_the_published_preference_data(make, name, style, used):
    encoder = Encoder(make(), style, 10**6)
    examples = [encoder.example(p.prompt, [p.chosen, p.rejected]) for p in read_pairs(DATA / f"{name}.jsonl")]
    kept = [e for e in examples if e]
    assert len(kept) == used, encoder.report()
    assert all(r[-1] == encoder.closing and len(r) > 1 for e in kept for r in e.responses)
