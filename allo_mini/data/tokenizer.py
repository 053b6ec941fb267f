"""Text <-> token ids: a checkpoint's own tokenizer.json, its special tokens, its chat template.

Rules kept here, each of which a popular trainer gets wrong somewhere: BOS is added exactly when the
tokenizer itself adds one, and never before text that a chat template wrote; prompt and response are
encoded jointly and split at the common prefix, because a token may reach over the boundary.
"""

import functools
import json
import re
from datetime import date

import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from allo_mini import UserError
from allo_mini.run.files import read_json, reading


def in_common(*sequences):
    """How many items at their beginning all sequences agree in."""
    for i, items in enumerate(zip(*sequences)):
        if items.count(items[0]) < len(items):
            return i
    return min(map(len, sequences))


# ---- chat templates --------------------------------------------------------------------------

def refuse(message):
    """Templates call this to refuse a conversation."""
    raise ValueError(message)


@functools.cache
def compiled(template):
    """A chat template as transformers runs it, in a sandbox: a template is a program."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    # {% generation %} marks what an assistant says, for who asks; {% with %} does nothing
    plain = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})", r"\1with", template)
    return environment.from_string(plain)


# ---- tokenizers ------------------------------------------------------------------------------

class Tokenizer:
    """tokenizers.Tokenizer, and what its folder (a Path) says of BOS, EOS and the chat template."""

    def __init__(self, folder):
        self.folder = folder
        path = folder / "tokenizer.json"
        with reading(path):  # a slow tokenizer's folder lacks it, and is not supported
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        self.decode = self.inner.decode  # token ids -> text, special tokens left out
        self.inner.no_padding()
        self.inner.no_truncation()
        self.vocab = self.inner.get_vocab()  # added tokens included; it may have gaps
        self.added = self.inner.get_added_tokens_decoder()  # id -> token, mostly special ones
        self.settings = read_json(folder / "tokenizer_config.json")
        with reading(folder):
            self.bos_token, self.eos_token = map(self._special, ("bos_token", "eos_token"))
            self.eos_id = self.vocab.get(self.eos_token)
            self.prefix = self._prefix()
            self.template = self._template()

    def _special(self, key):
        """The text of BOS or EOS, "" where there is none."""
        value = self.settings.get(key) or ""
        if isinstance(value, dict):
            value = value["content"]
        if value and value not in self.vocab:
            raise UserError(f"{self.folder}: {key} {value!r} is not in the vocabulary")
        return value

    def _prefix(self):
        """What the tokenizer itself puts before a text: [bos] or nothing."""
        wanted = self.settings.get("add_bos_token")
        text = self.inner.encode("a")
        added = text.ids[:[*text.special_tokens_mask, 0].index(0)]
        if wanted and self.bos_token:
            return added or [self.vocab[self.bos_token]]
        return [] if wanted is False else added

    def _template(self):
        """The chat template's text; None where there is none."""
        path = self.folder / "chat_template.jinja"
        if path.exists():
            with reading(path):
                return path.read_text(encoding="utf-8")
        template = self.settings.get("chat_template")
        if isinstance(template, list):  # [{"name": "default", "template": ...}, ...]
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def encode(self, text, bos=False):
        """A list of a text's token ids; with `bos` after the tokenizer's own BOS, if it has one.

        A text that begins with it, as apply_chat_template makes them, gets no second one.
        """
        ids = self.inner.encode(text, add_special_tokens=False).ids
        return ids if not bos or ids[:1] == self.prefix else self.prefix + ids

    def split(self, prompt, texts, bos):
        """Encode prompt + text for each text; cut where they stop agreeing with the prompt.

        Returns (ids of the shared prompt, what follows them for each text, how many of the prompt's
        last ids are others where a text follows): nothing is lost.
        """
        alone, *joint = [self.encode(prompt + text, bos) for text in ["", *texts]]
        cut = in_common(alone, *joint)
        return alone[:cut], [ids[cut:] for ids in joint], len(alone) - cut

    def render(self, messages, add_generation_prompt=False):
        """The chat template over {"role", "content"} messages. Raises UserError, also if none."""
        if not self.template:
            raise UserError(f"{self.folder}: no chat template; use --prompt alpaca or none")
        try:
            return compiled(self.template).render(
                messages=messages, add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token, eos_token=self.eos_token, raise_exception=refuse,
                strftime_now=date(2024, 7, 26).strftime)  # a run must not depend on its day
        except Exception as e:  # as a checkpoint's data it can fail in any way
            raise UserError(f"{self.folder}: the chat template fails: {e!r}") from None


def load_tokenizer(folder, vocab_size):
    """A model folder's Tokenizer. Raises UserError when it has more ids than the model rows."""
    tokenizer = Tokenizer(folder)
    last = max(tokenizer.vocab.values(), default=0)
    if last >= vocab_size:
        raise UserError(f"{folder}: tokenizer.json has ids to {last}, vocab_size is {vocab_size}")
    return tokenizer
