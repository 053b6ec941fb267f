"""Prompts and responses -> token ids, in one of three prompt styles."""

from array import array
from collections import Counter, namedtuple

from allo_mini import UserError
from allo_mini.data.rows import HH_TURN, plain, turns_of
from allo_mini.data.tokenizer import in_common

# The form ALLO's official scripts use (github.com/RUCAIBox/ALLO), WizardMath's (arXiv 2308.09583).
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n### Response: Let's think step by step.")


# A prompt with its responses as token ids: one response to score, or [chosen, rejected].
# weights, when given, has one token weight for each token of the (single) response, scores what
# they came from; ref: the reference's log-probs of all response tokens, a tensor [s].
Example = namedtuple("Example", "prompt responses weights ref scores", defaults=[None] * 3)


class Encoder:
    """Turns prompts and responses into ids, counting what it drops (and why) or trims.

    tokenizer: a Tokenizer. style: "alpaca" sets the question into ALPACA and a space before the
    response; "none" takes strings as they are; "chat" applies the checkpoint's template. A response
    ends with the closing token, which is scored: the template's end of turn for chat, else EOS.
    """

    def __init__(self, tokenizer, style, max_length):
        self.tokenizer = tokenizer
        self.style = style
        self.max_length = max_length
        self.rewrite_length = 3 * max_length  # of the rewriting model's prompts (token_weights.py)
        self.bos = style != "chat"  # a template writes its own
        self.closing = self._closing(tokenizer)
        self.ending = tokenizer.inner.id_to_token(self.closing)  # as text
        self.short = self.frame("x")
        self.notes = Counter()

    def _closing(self, tokenizer):
        """The id that ends a response."""
        if self.style == "chat":  # the first added token the template writes after an answer
            talk = tokenizer.render(turns_of("a") + turns_of("marker", "assistant"))
            if "marker" not in talk:
                raise UserError(f"{tokenizer.folder}: the chat template leaves out the answers")
            for id in tokenizer.encode(talk.rpartition("marker")[2]):
                if id in tokenizer.added:
                    return id
        if tokenizer.eos_id is None:
            raise UserError(f"{tokenizer.folder / 'tokenizer_config.json'}: eos_token is missing")
        return tokenizer.eos_id

    def frame(self, prompt):
        """The prompt as text, in this style. Raises UserError for HH's dialogues in chat style."""
        if self.style != "chat":
            return (ALPACA if self.style == "alpaca" else "{}").format(plain(prompt))
        if HH_TURN in prompt and prompt.lstrip().startswith("Human:"):
            raise UserError(f"{prompt[:40]!r}... is a dialogue in one string; use --prompt none")
        return self.tokenizer.render(turns_of(prompt), True)

    def answer(self, prompt, framed, response):
        """The text that follows the framed prompt; for chat all the template writes after it.

        Some templates write a prompt's last turn in another way than a turn before an answer
        (Mistral's set the system prompt into it); then it is what follows a short prompt. Others
        open a thought there, or leave out or rewrite the thought of an answer; then it is the
        response itself, as a model samples it. Raises UserError for a message without the end of
        the thought that such a template opens.
        """
        text = plain(response)
        if self.style != "chat":
            return f" {text}" if self.style == "alpaca" else text
        for asked, before in ((prompt, framed), ("x", self.short)):
            whole = self.tokenizer.render(turns_of(asked) + turns_of(response, "assistant"))
            rest = whole.removeprefix(before)
            if rest != whole and ("think>" not in text or text.strip() in rest):
                return rest
        if framed.rstrip().endswith("<think>"):
            text = text.lstrip().removeprefix("<think>").lstrip("\n")  # it is open already
            if isinstance(response, list) and "</think>" not in text:
                raise UserError(f"{self.tokenizer.folder}: the chat template opens a thought with "
                                f"<think>, which {text[:40]!r}... does not close; use rows with "
                                "thoughts, or a template without")
        return text

    def split(self, prompt, responses):
        """(the prompt's ids, each response's, how many of the prompt's changed), encoded together.

        Nothing is trimmed. A response ends with its first closing token, which is added where it
        has none.
        """
        framed = self.frame(prompt)
        texts = [self.answer(prompt, framed, response) for response in responses]
        prompt_ids, answers, changed = self.tokenizer.split(framed, texts, self.bos)
        for ids in answers:
            ids.append(self.closing)
            del ids[ids.index(self.closing) + 1:]
        return prompt_ids, answers, changed

    def response_ids(self, prompt, response):
        """Ids of a response as they follow the prompt, closing token included."""
        return self.split(prompt, [response])[1][0]

    def prompt_ids(self, prompt):
        """Ids to generate from; where they leave no room, the last half of max_length."""
        ids, *_ = self.split(prompt, [])
        return ids if len(ids) < self.max_length else self.trim(ids, self.max_length // 2)

    def trim(self, ids, room):
        """The last `room` ids at most (counted), BOS kept in front; there is place beside it."""
        if len(ids) <= room:
            return ids
        self.notes["with a trimmed prompt"] += 1
        bos = in_common(self.tokenizer.prefix, ids)
        return ids[:bos] + ids[bos - room:]

    def example(self, prompt, responses):
        """The Example of a prompt and its responses (Texts); None when dropped (and counted).

        Too long: the shared prompt loses its left side to the longest response.
        """
        if turns_of(prompt)[-1]["role"] == "assistant":
            return self.drop("prompt that ends in an answer")
        asked = plain(prompt)
        for response in responses:
            text, *after = plain(response).split(self.ending)
            if any(map(str.strip, after)):  # at the end it may stand
                return self.drop(f"response with {self.ending} inside, which ends responses")
            if not text.strip():
                return self.drop("empty response")
            if HH_TURN in asked and HH_TURN in text:
                return self.drop("response of several turns")
            if [turn["role"] for turn in turns_of(response, "assistant")] != ["assistant"]:
                return self.drop("response not one message of the assistant")
        prompt_ids, answers, changed = self.split(prompt, responses)
        if not prompt_ids and prompt == "" and not answers[1:]:  # a text: its first token is given
            prompt_ids, answers = answers[0][:1], [answers[0][1:]]
        if not prompt_ids:
            return self.drop("empty prompt")
        if answers[0] in answers[1:]:  # as text they may differ
            return self.drop("identical pair")
        room = self.max_length - max(map(len, answers))
        if room <= len(self.tokenizer.prefix):
            return self.drop("response longer than max_length")
        if changed:
            self.notes["with a token that is half prompt, half response"] += 1
        texts = list(map(plain, responses))
        if asked and any(text.startswith(asked) for text in texts):
            self.notes["with a response that repeats the prompt"] += 1
        opened = self.short.rstrip().endswith("<think>")  # a thought, by the template
        if opened and not all("</think>" in text for text in texts):
            self.notes["with a response that ends inside its thought"] += 1
        # 4 bytes a token, where a list has up to 36
        prompt_ids, *answers = (array("i", ids) for ids in (self.trim(prompt_ids, room), *answers))
        return Example(prompt_ids, answers)

    def drop(self, why):
        """Count a row that cannot be used."""
        self.notes[f"dropped ({why})"] += 1

    def report(self):
        """'2 dropped (empty response), 3 with a trimmed prompt' since the last report, or ''."""
        text = ", ".join(f"{count} {note}" for note, count in self.notes.items())
        self.notes.clear()
        return text
