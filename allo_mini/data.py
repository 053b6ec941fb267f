"""Files -> rows -> token ids. JSONL task rows, preference rows in TRL's forms, official ALLO files.

    task row         {"input", "output"[, "answer"][, "rewrite"]}      output ends "The answer is X"
    preference row   {"prompt", "chosen", "rejected"} as strings or message lists; without "prompt" it is the
                     common beginning of both (also Anthropic HH strings)
    official ALLO    {"question", "prediction"} and {"input", "output", "reward"[, "ref_prob"]}
"""

import re
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from allo_mini import UserError
from allo_mini.config import similar
from allo_mini.disk import read_jsonl
from allo_mini.template import HH_TURN, is_dialogue, messages
from allo_mini.tokenizer import Tokenizer, in_common

# The form ALLO's official scripts use for its tasks (from WizardMath, arXiv 2308.09583; github.com/RUCAIBox/ALLO).
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{}\n\n### Response: Let's think step by step.")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
OTHER_ROLES, TURNS = ("human", "gpt", "bot"), ("conversations", "history")  # ShareGPT's and others'; we read neither
ASKING = ("prompt", "question", "input", "instruction", "query")  # keys that are a prompt, whatever they are called

Text = str | list[dict]  # a string, or messages {"role", "content"}


class Example(NamedTuple):
    """A prompt with its responses as token ids: one response to score, or [chosen, rejected].

    `weights`, when given, has one token weight for each token of the (single) response, `scores` what
    they came from; `ref` the reference's log-probs of all response tokens, one after the other.
    """
    prompt: list[int]
    responses: list[list[int]]
    weights: list[float] | None = None
    ref: Tensor | None = None
    scores: list[float] | None = None


@dataclass
class Task:
    """A question with its reference. `id` counts the rows kept, over all files."""
    id: int
    input: str
    output: str | None
    answer: str | None
    rewrite: str | None = None
    source: str = ""  # FILE:LINE; the name of the file tells the task (tasks.py)


@dataclass
class Pair:
    """A preference. `task` is the id of the question it came from, for pairs made from samples."""
    prompt: Text
    chosen: Text
    rejected: Text
    task: int | None = None
    rewrite: str | None = None


@dataclass
class Negative:
    """A response to forget, the reference solution it should have been, and (if known) its token scores."""
    prompt: Text
    response: Text
    reference: Text
    rewrite: Text | None = None
    scores: list[float] | None = None


def text_of(row: dict, key: str, where: str, optional: bool = False) -> str | None:
    """row[key] as a string that can be encoded. Raises UserError naming the place and what was found."""
    value = row.get(key)
    if value is None and optional:
        return None
    if key not in row:
        raise UserError(f"{where}: missing key {key!r} beside {', '.join(map(repr, list(row)[:6])) or 'no keys'}")
    if key == "answer" and type(value) in (int, float):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {type(value).__name__}, expected a string")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{where}: {key!r} holds half a surrogate pair, which no text file can hold")
    return value


def messages_of(row: dict, key: str, where: str) -> Text:
    """row[key]: a string that can be encoded, or a list of {"role", "content"}. Raises UserError."""
    if not isinstance(row.get(key), list):
        return text_of(row, key, where)
    for m in row[key] or ["nothing"]:  # an empty list is refused, too
        if not isinstance(m, dict):
            raise UserError(f"{where}: {key!r} holds {str(m)[:60]!r}, expected {{\"role\": ..., \"content\": ...}}")
        for part in ("role", "content"):
            text_of(m, part, f"{where}: {key!r}")
        if m["role"] not in ROLES and get_close_matches(m["role"], [*ROLES, *OTHER_ROLES], 1, 0.75):
            raise UserError(f"{where}: {key!r} has the role {m['role']!r}, expected one of {', '.join(ROLES)}"
                            + similar(m["role"], ROLES))
    return row[key]


def is_pairs(path: str | Path) -> bool:
    """Whether the first row of a file is a preference row."""
    _, row = next(read_jsonl(path))
    return "chosen" in row or "rejected" in row


def read_tasks(paths: list[str], limit: int = 0, need_output: bool = True) -> list[Task]:
    """Task rows of several files, at most `limit` in all; `question`/`prediction` and bare `answer` rows too."""
    tasks = []
    for where, row in islice(chain.from_iterable(map(read_jsonl, paths)), limit or None):
        if "input" not in row and "chosen" in row:
            raise UserError(f"{where}: missing key 'input': a preference row, which train.py takes as --pairs")
        question = text_of(row, "question" if "question" in row and "input" not in row else "input", where)
        output = text_of(row, "output", where, optional=not need_output)
        answer, rewrite = (text_of(row, key, where, optional=True) for key in ("answer", "rewrite"))
        if not question.strip():
            raise UserError(f"{where}: 'input' is empty")
        tasks.append(Task(len(tasks), question, output, answer, rewrite, where))
    return tasks


def split_implicit(chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a pair whose prompt is the common beginning of both.

    Of an identical pair something stays as response: the encoder counts and drops it.
    """
    cut = in_common(chosen, rejected)
    if isinstance(chosen, list):
        cut = cut - 1 if chosen == rejected else cut
    else:
        turn = chosen.rfind(HH_TURN, 0, cut)
        cut = turn + len(HH_TURN) if turn >= 0 else max(chosen.rfind(" ", 0, cut), chosen.rfind("\n", 0, cut), 0)
    if not cut and chosen != rejected:
        raise UserError(f"{where}: no 'prompt', and 'chosen' and 'rejected' do not begin with one in common")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def read_pairs(path: str, limit: int = 0) -> list[Pair]:
    """Preference rows in any of TRL's forms, at most `limit`."""
    pairs = []
    for where, row in islice(read_jsonl(path), limit or None):
        if "completion" in row and "chosen" not in row:
            raise UserError(f"{where}: unpaired (KTO's prompt, completion, label); expected 'chosen' and 'rejected'")
        chosen, rejected = (messages_of(row, key, where) for key in ("chosen", "rejected"))
        prompt = messages_of(row, "prompt", where) if "prompt" in row else None
        if prompt is None and (near := [key for key in row if key in TURNS or get_close_matches(key, ASKING, 1)]):
            raise UserError(f"{where}: no 'prompt', but {near[0]!r}; rename it, or leave it out where the prompt is "
                            "the common beginning of 'chosen' and 'rejected'")
        if isinstance(prompt, str) and isinstance(chosen, list):  # as UltraFeedback has it: the first turn once more
            prompt = [{"role": "user", "content": prompt}] if len(chosen) == 1 else None
        if len({type(text) for text in (prompt, chosen, rejected) if text is not None}) > 1:
            raise UserError(f"{where}: 'prompt', 'chosen' and 'rejected' must all be strings or all message lists")
        if prompt is None:
            prompt, chosen, rejected = split_implicit(chosen, rejected, where)
        elif isinstance(prompt, list):  # take it off where a whole conversation was given
            chosen, rejected = (r[len(prompt):] if r[:len(prompt)] == prompt else r for r in (chosen, rejected))
        if row.get("system") and not (isinstance(prompt, list) and prompt and prompt[0]["role"] == "system"):
            raise UserError(f"{where}: 'system' is not read; make it the first message of a 'prompt' of messages")
        task = row["task"] if isinstance(row.get("task"), int) and "rewrite" in row else None  # as train.py writes them
        pairs.append(Pair(prompt, chosen, rejected, task, text_of(row, "rewrite", where, optional=True)))
    return pairs


def plain(text: Text) -> str:
    """A response or prompt as one string (message lists: the contents, one after the other)."""
    return text if isinstance(text, str) else "\n\n".join(m["content"] for m in text)


# ---- text -> token ids -------------------------------------------------------------------------------------

class Encoder:
    """Turns prompts and responses into ids in one prompt style, counting what it has to drop (and why) or trim.

    style: "alpaca" wraps the question in ALPACA and sets a space before the response; "none" takes strings as they
    are; "chat" applies the checkpoint's template. The closing token is the template's end of turn for chat, else
    EOS; it is added once and always scored.
    """

    def __init__(self, tokenizer: Tokenizer, style: str, max_length: int):
        self.tokenizer, self.style, self.max_length = tokenizer, style, max_length
        self.bos, self.closing = style != "chat", self._closing()  # a template writes its own BOS
        self.dropped, self.trimmed = Counter(), 0

    def _closing(self) -> int:
        t = self.tokenizer
        if self.style == "chat":  # what the template writes after a response
            full = t.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "marker"}], False)
            _, found, after = full.rpartition("marker")
            if not found:
                raise UserError(f"{t.folder}: the chat template leaves out what the assistant says")
            if special := [i for i in t.encode(after, bos=False) if i in t.special_ids]:
                return special[0]
        if t.eos_id is None:
            raise UserError(f"{t.folder / 'tokenizer_config.json'}: eos_token is missing; responses need an end")
        return t.eos_id

    def frame(self, prompt: Text) -> str:
        """The prompt as text, in this style."""
        if self.style == "chat":
            return self.tokenizer.render(messages(prompt), True)
        return ALPACA.format(plain(prompt)) if self.style == "alpaca" else plain(prompt)

    def answer(self, prompt: Text, response: Text) -> str:
        """The text that follows the framed prompt; in chat style all that the template writes after it.

        Some templates write the last turn of a prompt in another way than a turn before an answer (Mistral's set the
        system prompt into it); then it is what they write after a short prompt. Others open or write a thought there
        and none before an answer that is given: then it is the response itself, as a model samples it. Raises
        UserError for a message that leaves such a thought open.
        """
        if self.style != "chat":
            return (" " if self.style == "alpaca" else "") + plain(response)
        text = plain(response).strip() if is_dialogue(prompt) else plain(response)  # whose turns begin with a space
        turn = response if isinstance(response, list) else [{"role": "assistant", "content": text}]
        for talk in (messages(prompt), messages("x")):
            framed = self.frame(talk)
            full = self.tokenizer.render([*talk, *turn], False)
            if full.startswith(framed):
                return full[len(framed):]
        said = framed + text  # after what the template opens before any answer
        if isinstance(response, list) and said.count("<think>") != said.count("</think>"):
            raise UserError(f"{self.tokenizer.folder}: the chat template opens a thought with <think>, and this answer "
                            "does not close it")
        return text

    def prompt_ids(self, prompt: Text) -> list[int]:
        """Ids to generate from; of a prompt that leaves no room for a response, the last half of max_length."""
        ids = self.tokenizer.encode(self.frame(prompt), bos=self.bos)
        self.trimmed += len(ids) >= self.max_length
        return self.trim(ids, self.max_length // 2) if len(ids) >= self.max_length else ids

    def trim(self, ids: list[int], room: int) -> list[int]:
        """The last `room` ids, BOS kept in front."""
        head = self.tokenizer.prefix if ids[:1] == self.tokenizer.prefix[:1] else []
        return head + ids[len(ids) - room + len(head):] if len(ids) > room else ids

    def example(self, prompt: Text, responses: list[Text]) -> Example | None:
        """(prompt ids, [response ids with closing token, ...]), or None when the row must be dropped (and counted).

        Too long: the shared prompt loses its left side to the longest response.
        """
        if not all(plain(r).strip() for r in responses):
            return self.drop("empty response")
        if self.style == "chat" and is_dialogue(prompt) and any("\n\nHuman:" in plain(r) for r in responses):
            return self.drop("response not one message of the assistant")
        turns = messages(prompt) if self.style == "chat" else []
        if turns and turns[-1]["role"] == "assistant":
            return self.drop("prompt that ends in an answer")
        if is_dialogue(prompt) and any(a["role"] == b["role"] for a, b in pairwise(turns)):
            return self.drop("dialogue with two turns of one side")
        if any(isinstance(r, list) and [m["role"] for m in r] != ["assistant"] for r in responses):
            return self.drop("response not one message of the assistant")
        ids, answers = self.split(prompt, responses)
        if not ids:
            return self.drop("empty prompt")
        if len({*map(tuple, answers)}) < len(answers):  # as text they may differ
            return self.drop("identical pair")
        room = self.max_length - max(map(len, answers))
        if room < 1 + len(self.tokenizer.prefix):
            return self.drop("response longer than max_length")
        if len(ids) > room:
            self.trimmed += 1
        return Example(self.trim(ids, room), answers)

    def split(self, prompt: Text, responses: list[Text]) -> tuple[list[int], list[list[int]]]:
        """(ids of the prompt, ids of each response), encoded together and never trimmed.

        A response ends with its closing token, which is added where the text did not bring it.
        """
        texts = [self.answer(prompt, r) for r in responses]
        ids, answers = self.tokenizer.split(self.frame(prompt), texts, self.bos)
        return ids, [a[:a.index(self.closing) + 1] if self.closing in a else [*a, self.closing] for a in answers]

    def response_ids(self, prompt: Text, response: Text) -> list[int]:
        """Ids of a response as they follow the prompt, closing token included."""
        return self.split(prompt, [response])[1][0]

    def drop(self, why: str) -> None:
        self.dropped[why] += 1

    def report(self) -> str:
        """'dropped: 2 empty response, 4 identical pair; kept with a trimmed prompt: 3'; '' when all rows are whole.

        Of the rows since the last report.
        """
        dropped = ", ".join(f"{n} {why}" for why, n in sorted(self.dropped.items()))
        notes = {"dropped": dropped, "kept with a trimmed prompt": self.trimmed}
        self.dropped, self.trimmed = Counter(), 0
        return "; ".join(f"{what}: {count}" for what, count in notes.items() if count)
