"""Conversations: where the prompt ends and the response begins, under templates as four model families publish them."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from allo_mini import UserError, tasks
from allo_mini.checkpoint import save_model
from allo_mini.data import Encoder, read_pairs
from allo_mini.inputs import style_of
from allo_mini.report import watch_tokens
from allo_mini.tokenizer import Tokenizer
from helpers import tiny_model, write_tokenizer
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
MISTRAL_02 = MISTRAL.replace("loop.last and", "loop.first and").replace("|trim", "").replace("'[/INST]'", "' [/INST]'")
MISTRAL_01 = ("{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
              "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
              "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}")
IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
S_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def chatml(system):
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


ASKS = "<|im_end|>\n<|im_start|>assistant\n"
TOLD = "<|im_end|>\n<|im_start|>user\n"
LLAMA_HEAD = "<|begin_of_text|>" + header("system") + "Cutting Knowledge Date: December 2023\n\n"
LLAMA_TALK = (f"{header('user')}a b<|eot_id|>{header('assistant')}ab<|eot_id|>{header('user')}the cat?<|eot_id|>"
              + header("assistant"))
FAMILIES = {  # template, settings, what is written of ONE, of TALK and of SYSTEM + TALK, the shape of a response
    "smollm2": (CHATML.replace("SYSTEM", "Be kind"), {**IM, "bos_token": "<|im_start|>"},
                chatml("Be kind") + "the cat?" + ASKS, chatml("Be kind") + f"a b{ASKS}ab{TOLD}the cat?{ASKS}",
                chatml("Be brief.") + f"a b{ASKS}ab{TOLD}the cat?{ASKS}", "{}<|im_end|>"),
    "qwen2.5": (CHATML.replace("SYSTEM", "You are Qwen"), {**IM, "bos_token": None},
                chatml("You are Qwen") + "the cat?" + ASKS, chatml("You are Qwen") + f"a b{ASKS}ab{TOLD}the cat?{ASKS}",
                chatml("Be brief.") + f"a b{ASKS}ab{TOLD}the cat?{ASKS}", "{}<|im_end|>"),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
               f"{LLAMA_HEAD}<|eot_id|>{header('user')}the cat?<|eot_id|>{header('assistant')}",
               f"{LLAMA_HEAD}<|eot_id|>{LLAMA_TALK}", f"{LLAMA_HEAD}Be brief.<|eot_id|>{LLAMA_TALK}", "{}<|eot_id|>"),
    "mistral 0.3": (MISTRAL, S_TOKENS, "<s>[INST] the cat?[/INST]", "<s>[INST] a b[/INST] ab</s>[INST] the cat?[/INST]",
                    "<s>[INST] a b[/INST] ab</s>[INST] Be brief.\n\nthe cat?[/INST]", " {}</s>"),
    "mistral 0.2": (MISTRAL_02, S_TOKENS, "<s>[INST] the cat? [/INST]",
                    "<s>[INST] a b [/INST] ab</s>[INST] the cat? [/INST]",
                    "<s>[INST] Be brief.\n\na b [/INST] ab</s>[INST] the cat? [/INST]", " {}</s>"),
    "mistral 0.1": (MISTRAL_01, S_TOKENS, "<s>[INST] the cat? [/INST]",
                    "<s>[INST] a b [/INST]ab</s>[INST] the cat? [/INST]",
                    None, "{}</s>")}
TALK = [user("a b"), assistant("ab"), user("the cat?")]
SYSTEM = [{"role": "system", "content": "Be brief."}]
PROMPTS = {"one turn": TALK[2:], "several turns": TALK, "system prompt": SYSTEM + TALK}
CASES = [(family, kind) for family in FAMILIES for kind in PROMPTS if (family, kind) != ("mistral 0.1", "system prompt")]


def encoder_of(make, family, length=400):
    template, settings, *_ = FAMILIES[family]
    return Encoder(make(bos=True, chat_template=template, **settings), "chat", length)  # the tokenizer itself adds <s>


def text_of(encoder, ids):
    return encoder.tokenizer.inner.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family, kind", CASES)
@pytest.mark.parametrize("response", ["sat on the mat", "sat.\nThe answer is 4"])
def test_the_prompt_ends_with_the_generation_prompt_and_the_response_with_its_end_of_turn(make, family, kind, response):
    encoder, shape = encoder_of(make, family), FAMILIES[family][-1]
    text = dict(zip(PROMPTS, FAMILIES[family][2:5]))[kind]
    e = encoder.example(PROMPTS[kind], [[assistant(response)], [assistant("no")]])
    assert text_of(encoder, e.prompt) == text == encoder.tokenizer.render(PROMPTS[kind], True)
    assert [text_of(encoder, ids) for ids in e.responses] == [shape.format(response), shape.format("no")]
    joint = encoder.tokenizer.encode(text + shape.format(response), bos=False)
    assert e.prompt + e.responses[0] == joint  # cut nowhere but in the text as a whole, BOS where the template put it
    assert encoder.prompt_ids(PROMPTS[kind]) == encoder.tokenizer.encode(text, bos=False)  # what sampling starts from
    whole = encoder.tokenizer.render([*PROMPTS[kind], assistant(response)], False)
    if (family, kind) != ("mistral 0.3", "system prompt"):  # which leaves the system prompt out of a finished conversation
        assert encoder.tokenizer.encode(whole.rstrip("\n"), bos=False) == joint


@pytest.mark.parametrize("family, kind", CASES)
def test_explicit_implicit_and_whole_conversations_are_one_example(make, family, kind, tmp_path):
    prompt, good, bad = PROMPTS[kind], [assistant("sat on the mat")], [assistant("sat")]
    rows = [{"prompt": prompt, "chosen": good, "rejected": bad}, {"chosen": prompt + good, "rejected": prompt + bad},
            {"prompt": prompt, "chosen": prompt + good, "rejected": prompt + bad},
            {"prompt": prompt, "chosen": good, "rejected": prompt + bad},
            {"prompt": "the cat?", "chosen": prompt + good, "rejected": prompt + bad}]  # UltraFeedback's
    write(tmp_path / "p.jsonl", *rows, *[{"prompt": "the cat?", "chosen": good, "rejected": bad}] * (kind == "one turn"))
    encoder = encoder_of(make, family)
    first, *others = [encoder.example(p.prompt, [p.chosen, p.rejected]) for p in read_pairs(tmp_path / "p.jsonl")]
    assert first is not None and len(others) in (4, 5) and all(other == first for other in others)


@pytest.mark.parametrize("family, kind", CASES)
def test_a_string_and_a_message_are_the_same_response(make, family, kind):
    """Sampled text is trained on as if it had been a message, and what is sampled from is what is trained on."""
    encoder = encoder_of(make, family)
    said, sampled = (encoder.example(PROMPTS[kind], [r]) for r in ([assistant("sat")], "sat"))
    assert said == sampled and said.prompt == encoder.prompt_ids(PROMPTS[kind])
    assert encoder.response_ids(PROMPTS[kind], "sat") == said.responses[0]
    assert encoder.example("the cat?", ["sat"]) == encoder.example([user("the cat?")], [[assistant("sat")]])


@pytest.mark.parametrize("family, kind", CASES)
def test_spaces_around_a_response_follow_the_template(make, family, kind):
    """Llama 3 and Mistral 0.3 trim what is said; the others keep it. Either way the end of turn comes once, last."""
    encoder = encoder_of(make, family)
    e = encoder.example(PROMPTS[kind], [[assistant("  sat \n")]])
    kept = family not in ("llama3", "mistral 0.3")
    assert text_of(encoder, e.responses[0]) == FAMILIES[family][-1].format("  sat \n" if kept else "sat")
    assert e.responses[0].count(encoder.closing) == 1 and e.responses[0][-1] == encoder.closing


@pytest.mark.parametrize("prompt, family, says", [
    ([*TALK, user("again")], "mistral 0.3", "roles must alternate"), ([*TALK[:2], *TALK[:2], *TALK[1:]], "mistral 0.2",
     "roles must alternate"),
    (SYSTEM + TALK, "mistral 0.1", "roles must alternate")])
def test_a_conversation_that_a_strict_template_has_no_form_for_is_refused_in_one_line(make, prompt, family, says):
    with pytest.raises(UserError, match=f"^[^\n]*the chat template fails: [^\n]*{says}[^\n]*$"):
        encoder_of(make, family).example(prompt, [[assistant("sat")]])


def test_a_pair_that_parts_before_the_last_turn_is_dropped(make, tmp_path):
    write(tmp_path / "p.jsonl", {"chosen": [*TALK[:2], user("x")], "rejected": [*TALK[:2], user("y")]},
          {"chosen": [*TALK, assistant("x")], "rejected": [TALK[0], assistant("ba"), TALK[2], assistant("x")]})
    encoder = encoder_of(make, "smollm2")
    assert [encoder.example(p.prompt, [p.chosen, p.rejected]) for p in read_pairs(tmp_path / "p.jsonl")] == [None, None]
    assert encoder.report() == "dropped: 1 prompt that ends in an answer, 1 response not one message of the assistant"


@pytest.mark.parametrize("family, chosen, rejected", [("smollm2", "use <|im_end|> to end, good", "use <|im_end|> to end, bad"),
                                                      ("llama3", "yes", " yes\n")])
def test_responses_that_are_one_as_tokens_make_no_pair(make, family, chosen, rejected):
    encoder = encoder_of(make, family)
    assert encoder.example([user("q")], [[assistant(chosen)], [assistant(rejected)]]) is None
    assert encoder.report() == "dropped: 1 identical pair"


def test_a_dialogue_in_one_string_becomes_turns_in_chat_style_alone(make):
    hh = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    turns = [user("Hi!"), assistant("Hello."), user("Why?")]
    encoder = encoder_of(make, "smollm2")
    assert encoder.example(hh, [" So.", " No."]) == encoder.example(turns, [[assistant("So.")], [assistant("No.")]])
    assert encoder.prompt_ids(hh) == encoder.prompt_ids(turns)
    for plain in ("Say\n\nAssistant: x", "Human: a"):  # a string that only looks a bit like it
        assert encoder.prompt_ids(plain) == encoder.prompt_ids([user(plain)])
    said = "Human: x\n\nAssistant: y"  # as a response it is one
    assert encoder.example("q", [said, "b"]) == encoder.example([user("q")], [[assistant(said)], [assistant("b")]])
    encoder.response_ids(hh, [assistant(" a list")])
    encoder.style, encoder.bos = "none", True
    assert encoder.frame(hh) == hh and encoder.answer(hh, " So.") == " So."


@pytest.mark.parametrize("family", ["smollm2", "mistral 0.2", "llama3"])
@pytest.mark.parametrize("prompt, chosen, reason", [
    ("Human: a\n\nAssistant: b\n\nAssistant:", "c", "prompt that ends in an answer"),
    ("Human: a\n\nAssistant: Sure", "c", "prompt that ends in an answer"),
    ("Human: a\n\nHuman: b\n\nAssistant:", "c", "dialogue with two turns of one side"),
    ("Human: a\n\nAssistant:", "b\n\nHuman: c\n\nAssistant: d", "response not one message of the assistant")])
def test_odd_dialogues_are_dropped_and_counted(make, family, prompt, chosen, reason):
    encoder = encoder_of(make, family)
    assert encoder.example(prompt, [chosen, "x"]) is None and encoder.report() == f"dropped: 1 {reason}"
    encoder.style, encoder.bos = "none", True
    assert encoder.example(prompt, [chosen, "x"])


def test_rows_that_only_look_like_other_forms_are_read(tmp_path):
    turns = [{"role": "system", "content": "s"}, user("q"), {"role": "tool_results", "content": "t"}]
    write(tmp_path / "p.jsonl", {"system": "s", "prompt": turns, "chosen": [assistant("a")], "rejected": [assistant("b")]},
          {"conversation_id": 5, "story": "x", "chosen": "Say a", "rejected": "Say b"})
    first, second = read_pairs(tmp_path / "p.jsonl")
    assert first.prompt == turns and second.prompt == "Say"


def test_prompts_that_are_trimmed_for_sampling_are_counted(make):
    encoder = encoder_of(make, "smollm2")
    whole = encoder.prompt_ids("a b c d e f g h")
    assert encoder.report() == ""
    encoder.max_length = len(whole)
    assert encoder.prompt_ids("a b c d e f g h") == whole[-(len(whole) // 2):]
    assert encoder.report() == "kept with a trimmed prompt: 1"


def test_a_response_that_begins_with_a_line_break_is_whole(make):
    """The generation prompt's last character and it may be one token; then the prompt ends before it."""
    encoder = encoder_of(make, "smollm2")
    e = encoder.example(TALK, ["\n\nsat"])
    assert e.prompt + e.responses[0] == encoder.tokenizer.encode(FAMILIES["smollm2"][3] + "\n\nsat<|im_end|>", bos=False)


THINKS = CHATML[:CHATML.index("{% if add_generation")] + (
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' + NOTHING }}{% endif %}")


def test_a_template_that_writes_an_empty_thought_into_its_generation_prompt(make):
    """As Qwen3 does when it is not to think: the thought belongs to the prompt, not to what is learned."""
    encoder = Encoder(make(chat_template=THINKS.replace("NOTHING", "'\\n</think>\\n\\n'"), **IM), "chat", 400)
    e = encoder.example([user("a b")], [[assistant("sat")]])
    assert text_of(encoder, e.prompt).endswith("<think>\n\n</think>\n\n")
    assert text_of(encoder, e.responses[0]) == "sat<|im_end|>"


def test_a_thought_that_the_generation_prompt_opens_must_be_closed(make):
    """As DeepSeek-R1's: an answer without a thought would be learned as one. Sampled text may break off in a thought."""
    encoder = Encoder(make(chat_template=THINKS.replace("NOTHING", "''"), **IM), "chat", 400)
    for response in ("the sum</think>sat", [assistant("the sum</think>sat")]):
        assert text_of(encoder, encoder.example([user("a b")], [response]).responses[0]) == "the sum</think>sat<|im_end|>"
    assert encoder.example("a b", ["the sum"])
    for response in ("sat", "<think>the sum</think>sat"):
        with pytest.raises(UserError, match="template opens a thought with <think>, and this answer does not close it"):
            encoder.example([user("a b")], [[assistant(response)]])


@pytest.mark.parametrize("said, learned", [("sat", "<think>\n\n</think>\n\nsat"), ("<think>\nsum\n</think>\n\nsat", None)])
def test_a_template_that_keeps_the_last_thought_only(make, said, learned):
    """As Qwen3's: thoughts of earlier turns are left out, an answer without one gets an empty one."""
    turns = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
             "{% if not loop.last %}{{ m['content'].split('</think>')[-1].lstrip('\\n') }}{% else %}"
             "{{ m['content'] if '</think>' in m['content'] else '<think>\\n\\n</think>\\n\\n' + m['content'] }}{% endif %}"
             "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}")
    encoder = Encoder(make(chat_template=turns + CHATML[CHATML.index("{% if add_generation"):], **IM), "chat", 400)
    e = encoder.example([user("a b"), assistant("<think>\nab\n</think>\n\nab"), user("the cat?")], [[assistant(said)]])
    assert text_of(encoder, e.prompt) == (f"<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nab{TOLD}the cat?{ASKS}")
    assert text_of(encoder, e.responses[0]) == (learned or said) + "<|im_end|>"


def test_what_published_templates_ask_for(make):
    """Llama 3.2's date, the tags around what an assistant says, and tojson's arguments, as transformers has them."""
    template = ("{{ strftime_now('%d %b %Y') }}|{%- for m in messages %}{%- if m['role'] == 'assistant' -%}\n"
                "{%- generation -%} {{ m['content'] }}\n{% endgeneration %}\n{%- else %}{{ m['content'] | tojson }}"
                "{% endif %}{% endfor %}|{{ {'b': 1, 'é': 2} | tojson(ensure_ascii=True, indent=1) }}")
    assert make(chat_template=template).render([user("é"), assistant("generation")], False) == (
        '26 Jul 2024|"é"generation\n|{\n "b": 1,\n "\\u00e9": 2\n}')


def test_a_response_is_encoded_as_it_follows_the_prompt(tmp_path):
    """A tokenizer that puts a space before every text (Llama 2's) would begin a response of its own with another token."""
    from tokenizers import Tokenizer as HFTokenizer, models, normalizers
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "a", "b", ":", "▁▁"]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "▁")]
    inner = HFTokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.add_special_tokens(pieces[:3])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(S_TOKENS))
    encoder = Encoder(Tokenizer(tmp_path), "none", 100)
    for prompt, response in (("a:", "b a"), ("a:", " b a")):
        assert encoder.response_ids(prompt, response) == encoder.example(prompt, [response]).responses[0]
    assert [pieces[i] for i in encoder.response_ids("a:", "b a")] == ["b", "▁a", "</s>"]


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
    "UltraFeedback, messages": [{"prompt": f"How do I cook {i}?", "prompt_id": "0a", "score_chosen": 9.0,
                                 "score_rejected": 1.0, "messages": [user(f"How do I cook {i}?"), assistant(f"Boil {i}.")],
                                 "chosen": [user(f"How do I cook {i}?"), assistant(f"Boil {i}.")],
                                 "rejected": [user(f"How do I cook {i}?"), assistant("I can't say.")]} for i in range(12)],
    "HH-RLHF": [{"chosen": f"\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Good {i}.",
                 "rejected": f"\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Go away {i}."}
                for i in range(12)],
    "messages": [{"prompt": [*SYSTEM, user(f"Hi {i}")], "chosen": [assistant("Hello.")],
                  "rejected": [assistant(f"Away {i}.")]} for i in range(12)]}


def one_step(model, pairs, out, *more):
    """The exit code of one step of training in every stage."""
    return train.main(["--model", str(model), "--pairs", str(pairs), "--max-steps", "1", "--locate", "gradient",
                       "--token-weights", "edit", "--out", str(out), *more])


@pytest.mark.parametrize("kind", ROWS)
def test_preference_rows_train_as_they_are(chat_model, tmp_path, kind, capsys):
    write(tmp_path / "pairs.jsonl", *ROWS[kind])
    assert one_step(chat_model, tmp_path / "pairs.jsonl", tmp_path / "run", "--max-length", "200") == 0
    said = capsys.readouterr().out
    assert "do not agree" not in said and "dropped" not in said and "trimmed" not in said
    base, new = load_file(chat_model / "model.safetensors"), load_file(tmp_path / "run/improve/model.safetensors")
    assert any(not torch.equal(base[name], new[name]) for name in base)
    assert style_of("auto", read_pairs(tmp_path / "pairs.jsonl")) == ("chat" if "messages" in kind else "none")
    assert ("--prompt chat uses it" in said) == ("messages" not in kind)
    style = json.loads((tmp_path / "run/config.json").read_text())["config"]["prompt"]  # by which eval.py will ask
    assert style == ("chat" if "messages" in kind else "none")


def test_one_conversation_makes_a_run_of_conversations(chat_model, tmp_path, capsys):
    """Beside strings, and beside task rows to fine-tune on."""
    strings = [{**row, "prompt": row["prompt"] + "!"} for row in ROWS["UltraFeedback"]]
    write(tmp_path / "pairs.jsonl", *strings, *ROWS["messages"])
    write(tmp_path / "tasks.jsonl", *({"input": f"Add {i}.", "output": f"The answer is {i}"} for i in range(12)))
    assert one_step(chat_model, tmp_path / "pairs.jsonl", tmp_path / "run", "--max-length", "400", "--sft", "--train",
                    str(tmp_path / "tasks.jsonl"), "--dry-run") == 0
    assert "prompts: chat\n" in capsys.readouterr().out


def test_answers_that_a_template_cannot_set_behind_a_prompt_are_refused_before_the_run(tmp_path, capsys):
    save_model(tiny_model(), tmp_path / "model")
    write_tokenizer(tmp_path / "model", chat_template=THINKS.replace("NOTHING", "''"))
    write(tmp_path / "pairs.jsonl", *ROWS["UltraFeedback, messages"])
    assert one_step(tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pairs.jsonl: in the conversation that begins 'How do I cook" in said
    assert "opens a thought" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("family, asked", [
    ("smollm2", [chatml("Be kind") + "Hi" + ASKS, chatml("Be kind") + f"Hi{ASKS}yes{TOLD}More{ASKS}"]),
    ("mistral 0.3", ["<s>[INST] Hi[/INST]", "<s>[INST] Hi[/INST] yes</s>[INST] More[/INST]"]),
    ("llama3", [f"{LLAMA_HEAD}<|eot_id|>{header('user')}Hi<|eot_id|>{header('assistant')}",
                f"{LLAMA_HEAD}<|eot_id|>{header('user')}Hi<|eot_id|>{header('assistant')}yes<|eot_id|>{header('user')}"
                f"More<|eot_id|>{header('assistant')}"])])
def test_talking_with_a_model_remembers_what_was_said(make, tmp_path, monkeypatch, family, asked):
    lines, prompts = iter(["Hi\n", "More\n", "/reset\n", "Hi\n", "\n"]), []
    template, settings, *_ = FAMILIES[family]
    tokenizer = make(bos=True, chat_template=template, **settings)
    save_model(tiny_model(vocab_size=tokenizer.size), tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).rename(tmp_path / "model" / file)
    yes = tokenizer.encode("yes", bos=False)

    def sampled(model, ids, n, *_):
        prompts.append(tokenizer.inner.decode(ids[0], skip_special_tokens=False))
        return [[[*yes, Encoder(tokenizer, "chat", 100).closing]]]
    monkeypatch.setattr("sys.stdin.readline", lambda: next(lines), raising=False)
    monkeypatch.setattr(tasks, "sample", sampled)
    assert evaluation.main(["--model", str(tmp_path / "model"), "--chat"]) == 0
    assert prompts == [*asked, asked[0]]


def test_the_report_shows_questions_without_the_templates_frame(make, tmp_path):
    """Also where the frame holds special tokens, which a decoded prompt does not show."""
    encoder = Encoder(make(chat_template=CHATML, **IM), "chat", 200)
    e = encoder.example("What is it?", ["So."])._replace(weights=[1.0] * 9)
    run = SimpleNamespace(encoder=encoder, cfg=SimpleNamespace(micro_tokens=512, epsilon=0.5), folder=tmp_path)
    with watch_tokens(run, tiny_model(vocab_size=encoder.tokenizer.size), [e]):
        pass
    assert json.loads((tmp_path / "token_examples.jsonl").read_text())["prompt"] == "What is it?"


# ---- published data ----------------------------------------------------------------------------------------

DATA = Path(os.environ.get("ALLO_DATA", "data"))
PUBLISHED = {"ultrafeedback_train": (1000, {"empty response": 2, "identical pair": 4}),  # rows, what is dropped of them
             "ultrafeedback_eval": (200, {"identical pair": 1}), "hh_harmless_pairs": (2308, {"empty response": 4})}
there = pytest.mark.skipif(not DATA.is_dir(), reason="wants the data sets: set ALLO_DATA")


@there
@pytest.mark.parametrize("style", ["none", "chat"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_files_of_preference_data(make, name, style):
    """Every row is used, or dropped for a reason; both responses follow one prompt and end with the closing token."""
    tokenizer, (rows, dropped) = make(chat_template=CHATML, **IM), PUBLISHED[name]
    dialogues = style == "chat" and name == "hh_harmless_pairs"
    dropped = dropped | ({"dialogue with two turns of one side": 4} if dialogues else {})
    pairs = read_pairs(DATA / f"{name}.jsonl")
    whole, short = Encoder(tokenizer, style, 10**6), Encoder(tokenizer, style, 700)
    kept = [(p, e) for p in pairs if (e := whole.example(p.prompt, [p.chosen, p.rejected]))]
    assert len(pairs) == rows and len(kept) == rows - sum(dropped.values())
    assert dict(whole.dropped) == dropped and whole.trimmed == 0
    for p, e in kept:
        for text, ids in zip((p.chosen, p.rejected), e.responses):
            assert ids[-1] == whole.closing and len(ids) > 1
            assert text_of(whole, e.prompt + ids).endswith((text.strip() if dialogues else text) + "<|im_end|>")
            assert not dialogues or "\n\nHuman:" not in text_of(whole, e.prompt)
    few = [e for p in pairs[:300] if (e := short.example(p.prompt, [p.chosen, p.rejected]))]
    assert len(few) + sum(short.dropped.values()) == min(300, rows) and short.trimmed
    assert all(len(e.prompt) + max(map(len, e.responses)) <= 700 for e in few)


@there
@pytest.mark.parametrize("more", [(), ("--prompt", "chat")])
@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_of_preference_data_train(chat_model, tmp_path, name, more):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(sorted(lines, key=len)[:8]), encoding="utf-8")
    assert one_step(chat_model, tmp_path / "pairs.jsonl", tmp_path / "run", "--max-length", "2000", *more) == 0
    assert (tmp_path / "run/improve/model.safetensors").exists()
