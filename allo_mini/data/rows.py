"""Files -> rows: questions, fine-tuning data and preferences in the forms people have them.

    task row         {"input", "output"[, "answer"][, "rewrite"]}; output ends "The answer is X"
    raw GSM8K        {"question", "answer"}, the answer a solution that ends "#### X"
    raw MATH         {"problem", "solution"}; the solution's answer is in \\boxed{}
    fine-tuning row  {"prompt", "completion"}, {"instruction", "input", "output"}, {"text"}, which
                     has no prompt, or {"messages"}: the assistant's last turn is trained on
    preference row   {"prompt", "chosen", "rejected"}, strings or message lists; without "prompt" it
                     is the common beginning of both (also Anthropic HH strings)
    ShareGPT         "conversations" with "from" and "value" are read as messages, in either row
"""

import re
from collections import namedtuple
from dataclasses import dataclass

from allo_mini import UserError
from allo_mini.data.tokenizer import in_common
from allo_mini.run.files import read_jsonl

HH_TURN = "\n\nAssistant:"  # begins each answer of Anthropic HH's dialogues
# of a task row's keys, of a message's, of roles
OUR_NAMES = {"question": "input", "problem": "input", "prompt": "input", "solution": "output",
    "completion": "output", "conversations": "messages", "from": "role", "value": "content",
    "human": "user", "gpt": "assistant"}
# of what would be lost beside a prompt or an answer
UNREAD = """system system_prompt chat_template_kwargs tools tool_calls history trajectory
    context passage article body Body choices options A image images thinking
    reasoning_content initial_reason_steps""".split()
OTHER_NAMES = "question instruction query input problem".split()  # of a pair's prompt
ROLES = "system developer user assistant tool function ipython".split()

Text = str | list[dict]  # a string, or messages {"role", "content"}


@dataclass
class Task:
    """A question with its reference. `id` counts the rows, over all files."""
    id: int
    prompt: Text
    output: str | None = None
    answer: str | None = None
    rewrite: str | None = None
    source: str = ""  # FILE:LINE; the file's name tells how answers are graded
    verbatim: bool = False  # {"prompt", "completion"} and {"text"}: no frame around them

    @property
    def question(self):
        """The prompt as one string, by which samples are found."""
        return plain(self.prompt)


@dataclass
class Pair:
    """A preference. `task` is the id of the question it came from, for pairs made from samples."""
    prompt: Text
    chosen: Text
    rejected: Text
    task: int | None = None
    rewrite: str | None = None

    @property
    def verbatim(self):
        """As a Task's."""
        return self.task is None

    @property
    def sides(self):
        """(prompt, its two responses), as the encoder takes them."""
        return self.prompt, [self.chosen, self.rejected]


# A response to forget, the solution it should have been, and itself put right; Texts all
Negative = namedtuple("Negative", "prompt response reference rewrite")


def plain(text):
    """A Text, prompt or response, as one string: of messages the contents, one after the other."""
    return text if isinstance(text, str) else "\n\n".join(turn["content"] for turn in text)


def turns_of(text, role="user"):
    """A prompt or a response as messages: a string is one."""
    return text if isinstance(text, list) else [{"role": role, "content": text}]


def text_of(row, key, where, optional=False):
    """row[key], a string. Raises UserError naming the place and what stands there."""
    value = row.get(key)
    whole = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    if whole or optional and value is None:
        return value
    if key not in row:
        raise UserError(f"{where}: missing key {key!r} beside {list(row)}")
    if key == "answer" and type(value) in (int, float):
        return str(value)
    raise UserError(f"{where}: {key!r} is {type(value).__name__}, expected whole text")


def messages_of(row, key, where):
    """row[key], a string or one or more {"role", "content"} under their usual names.

    Raises UserError.
    """
    value = row.get(key)
    place = f"{where}: {key!r}"
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return text_of(row, key, where)
    if set(map(type, value)) != {dict}:
        raise UserError(f'{place} must be a string or [{{"role", "content"}}, ...]')
    messages = list(map(renamed, value))
    for message in messages:
        text_of(message, "content", place)
        role = text_of(message, "role", place)
        message["role"] = OUR_NAMES.get(role, role)
        if message["role"] not in ROLES:
            raise UserError(f"{place}: {role!r} is none of the roles {', '.join(ROLES)}; rename it")
    return messages


def renamed(row):
    """A row, or a message, under the names that are read here."""
    return {OUR_NAMES.get(key, key): value for key, value in row.items()} | row


def refuse_unread(row, prompt, where):
    """Raises UserError for what a row has beside its prompt, a Text, and would be lost."""
    for key in UNREAD:
        if row.get(key) and key != turns_of(prompt)[0]["role"]:
            raise UserError(f"{where}: {key!r} is not read; make it a part of the text, or drop it")


def is_pairs(path):
    """Whether a file holds preference rows, by its first row."""
    return "chosen" in next(read_jsonl(path))[1]


def read_tasks(paths, need_output=True):
    """Tasks: questions and fine-tuning rows of several files. Raises UserError."""
    rows = [row for path in paths for row in read_jsonl(path)]
    return [task_of(id, *row, need_output) for id, row in enumerate(rows)]


def task_of(id, where, given, need_output):
    """A question, or a fine-tuning row, in any of their forms. Raises UserError."""
    row = renamed(given)
    if len(row.keys() - OUR_NAMES.keys()) < len(given) and "messages" not in row:
        raise UserError(f"{where}: two names for one thing in {list(given)}; drop one")
    solution, mark, answer = f"\n{row.get('answer')}".rpartition("\n#### ")
    if mark:  # GSM8K's, in which <<...>> are marks of its calculator
        row["output"] = re.sub("<<.*?>>", "", f"{solution[1:]}\nThe answer is {answer}")
        row["answer"] = answer.replace(",", "")
    elif "\n" in answer.strip() and "output" not in row:  # it is a solution
        row["output"] = row.pop("answer")
    if "problem" in given and row.get("answer") in ("proof", "notfound"):  # NuminaMath's for none
        del row["answer"]
    if "instruction" in row:
        texts = text_of(row, "instruction", where), text_of(row, "input", where, True)
        row["input"] = "\n\n".join(filter(None, texts))
    if "messages" in row:
        row["input"], row["output"] = last_answer(messages_of(row, "messages", where), where)
    alone = "text" in row and not {"input", "output"} & row.keys()
    prompt = "" if alone else messages_of(row, "input", where)
    if alone:
        row["output"] = text_of(row, "text", where)
    elif not plain(prompt).strip():
        raise UserError(f"{where}: 'input' is empty")
    refuse_unread(row, prompt, where)
    if given.get("label") is False:  # KTO's
        raise UserError(f"{where}: 'label' says that this is no answer to learn; drop such rows")
    if need_output or row.get("output") is not None:  # a completion may be messages
        output = messages_of(row, "output", where)
        refuse_unread(turns_of(output)[-1], prompt, where)
        if turns_of(output)[1:]:
            raise UserError(f"{where}: several messages to learn are not read; make a row of each")
        row["output"] = plain(output)
    texts = [text_of(row, key, where, True) for key in ("output", "answer", "rewrite")]
    return Task(id, prompt, *texts, where,
                alone or "completion" in given and isinstance(prompt, str))


def last_answer(messages, where):
    """(the messages before the assistant's last turn, it). Raises UserError."""
    while isinstance(messages, list) and messages:
        *messages, last = messages
        if last["role"] == "assistant" and messages:
            return messages, [last]
    raise UserError(f"{where}: 'messages' hold no assistant's turn after another")


def read_pairs(paths):
    """Pairs: preference rows of several files. Raises UserError."""
    return [pair_of(*row) for path in paths for row in read_jsonl(path)]


def pair_of(where, row):
    """A preference row in any of its forms. Raises UserError."""
    chosen, rejected = messages_of(row, "chosen", where), messages_of(row, "rejected", where)
    name = "prompt" if "prompt" in row else "conversations"
    prompt = messages_of(row, name, where) if name in row else None
    if prompt is None and any(map(row.get, OTHER_NAMES)):
        raise UserError(f"{where}: no 'prompt' in {list(row)}; rename the column that holds it, or "
                        "drop it")
    if isinstance(prompt, str) and isinstance(chosen, list):
        # UltraFeedback's conversations have their first turn in `prompt` once more
        if len(chosen) == 1:
            prompt = turns_of(prompt)
        elif prompt.strip() in plain(chosen):
            prompt = None
        else:
            raise UserError(f"{where}: 'prompt' is nowhere in the messages of 'chosen'; drop it")
    if not type(prompt or chosen) is type(chosen) is type(rejected):
        raise UserError(f"{where}: prompt and responses must all be strings or all message lists")
    if not isinstance(prompt, str):
        prompt = prompt or common_prompt(chosen, rejected, where)
        if in_common(prompt, chosen, rejected) == len(prompt):
            chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]  # these began with it
    for part in (row, *turns_of(chosen)[-1:], *turns_of(rejected)[-1:]):
        refuse_unread(part, prompt, where)
    task = row.get("task") if "rewrite" in row else None  # a row of pairs.jsonl has both
    return Pair(prompt, chosen, rejected, task, text_of(row, "rewrite", where, True))


def common_prompt(chosen, rejected, where):
    """What both responses of a row without "prompt" begin with. Raises UserError.

    Messages part where they differ, HH dialogues before the last common answer, other strings
    between words. Of an identical pair something stays as response: the encoder drops it.
    """
    common = chosen[:in_common(chosen, rejected)]
    if isinstance(chosen, list):
        cut = len(common) - (chosen == rejected)
    else:
        cut = re.match(rf"(?s).*{HH_TURN}|.*(?=[ \n])|", common).end()
    if cut < 1:
        raise UserError(f"{where}: no 'prompt', and the responses do not begin with one in common")
    return common[:cut]
