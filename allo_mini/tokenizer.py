"""Text <-> token ids: a checkpoint's own tokenizer.json, its special tokens and its chat template.

Rules kept here, each of which a popular trainer gets wrong somewhere: BOS is added exactly when the tokenizer
itself adds one, and never in front of text that a chat template wrote; prompt and response are encoded jointly
and split at the common prefix, because a boundary may merge two characters into one token.
"""

from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from allo_mini import UserError
from allo_mini.disk import open_bytes, read_json
from allo_mini.template import render


def in_common(*sequences) -> int:
    """How many items at their beginning all sequences agree in."""
    return len(list(takewhile(lambda items: items.count(items[0]) == len(items), zip(*sequences))))


class Tokenizer:
    """A thin shell around tokenizers.Tokenizer that knows BOS, EOS and the chat template of its folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{self.folder}: no tokenizer.json (only fast tokenizers are supported)")
        try:
            self.inner = HFTokenizer.from_file(str(path))
        except Exception as e:  # the Rust side raises a bare Exception
            raise UserError(f"{path}: not a tokenizer file: {' '.join(str(e).split())}") from None
        self.inner.no_padding()
        self.inner.no_truncation()
        settings = self.folder / "tokenizer_config.json"
        self.settings = read_json(settings) if settings.exists() else {}
        self.bos_token, self.eos_token = self._special("bos_token"), self._special("eos_token")
        self.eos_id = self.inner.token_to_id(self.eos_token) if self.eos_token else None
        self.special_ids = {i for i, t in self.inner.get_added_tokens_decoder().items() if t.special}
        self.prefix = self._prefix()
        self.template = self._read_template()

    def _special(self, key: str) -> str | None:
        value = self.settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and (not isinstance(value, str) or value not in self.inner.get_vocab()):
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: {key} {value!r} is not in the vocabulary")
        return value

    def _prefix(self) -> list[int]:
        """What the tokenizer itself puts before a text: [bos] or nothing."""
        wanted, some = self.settings.get("add_bos_token"), self.inner.encode("a")
        added = some.ids[:[*some.special_tokens_mask, 0].index(0)]
        if wanted and self.bos_token:
            return added or [self.inner.token_to_id(self.bos_token)]
        return [] if wanted is False else added

    def _read_template(self) -> str | None:
        path, template = self.folder / "chat_template.jinja", self.settings.get("chat_template")
        if path.exists():
            with open_bytes(path) as f:
                return f.read().decode()
        if isinstance(template, list):  # the named form: [{"name": "default", "template": ...}, ...]
            named = (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default")
            template = next(named, None)
        return template if isinstance(template, str) else None

    @property
    def size(self) -> int:
        """Largest token id + 1, added tokens included: a vocabulary may have gaps."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own BOS in front if it has one and `bos` is true."""
        ids = self.inner.encode(text, add_special_tokens=False).ids
        return self.prefix + ids if bos else ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.inner.decode(ids, skip_special_tokens=True)

    def split(self, prompt: str, texts: list[str], bos: bool = True) -> tuple[list[int], list[list[int]]]:
        """Encode prompt + text for each text and cut all of them where they stop agreeing with the prompt.

        Returns the shared prompt ids and what follows them for each text; nothing is lost or encoded twice.
        """
        alone = self.encode(prompt, bos)
        joint = [self.encode(prompt + text, bos) for text in texts]
        cut = in_common(alone, *joint)
        return alone[:cut], [ids[cut:] for ids in joint]

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """The checkpoint's chat template over a list of {"role", "content"}. Raises UserError if there is none."""
        if self.template is None:
            raise UserError(f"{self.folder}: no chat template; use --prompt alpaca or --prompt none")
        try:
            return render(self.template, messages=messages, add_generation_prompt=add_generation_prompt,
                          bos_token=self.bos_token or "", eos_token=self.eos_token or "")
        except ValueError as e:
            raise UserError(f"{self.folder}: the chat template fails: {e}") from None
