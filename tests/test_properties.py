"""Random cases of what holds for every input: the tokenizer's split, the packer."""

import random

import pytest

from allo_mini.data import demo
from allo_mini.data.tokenizer import Tokenizer
from allo_mini.logprobs import micro_batches, pack, size_of
from helpers import write_tokenizer

ALPHABET = [*"aab  \n\t.,19=+é😀ß\u0301\u200d中\x00\u2028", "The answer", "</s>", "<s>"]


def any_text(rng):
    return "".join(rng.choices(ALPHABET, k=rng.randrange(13)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Merging byte pairs (the demo's), and single characters with a BOS that the tokenizer adds."""
    folder = write_tokenizer(tmp_path_factory.mktemp("characters"), add_bos_token=True)
    return [Tokenizer(demo.FOLDER), Tokenizer(folder)]


@pytest.mark.parametrize("which", (0, 1))
def test_a_split_loses_nothing_and_cuts_as_late_as_it_can(tokenizers, which):
    tokenizer, rng = tokenizers[which], random.Random(which)
    for case in range(400):
        bos, prompt = case % 2 == 0, any_text(rng)
        texts = [any_text(rng) for _ in range(rng.randrange(1, 4))]
        shared, rests = tokenizer.split(prompt, texts, bos)
        alone = tokenizer.encode(prompt, bos)
        for text, rest in zip(texts, rests, strict=True):
            assert shared + rest == tokenizer.encode(prompt + text, bos)
        assert alone[:len(shared)] == shared
        firsts = {tuple(rest[:1]) for rest in [*rests, alone[len(shared):]]}
        assert len(firsts) > 1 or () in firsts, (prompt, texts)  # no further token is shared by all


def test_packs_and_micro_batches_lose_nothing():
    """A packed token is predicted by the one before it in its own sequence; prompts stand once."""
    rng = random.Random(0)
    for _ in range(200):
        examples = []
        for _ in range(rng.randrange(1, 12)):
            lists = [rng.choices(range(99), k=rng.randrange(1, 7)) for _ in range(4)]
            examples.append((lists[0], lists[rng.randrange(1, 4):]))
        batch, at = pack(examples), 0
        assert len(batch.input_ids) == sum(map(size_of, examples))  # no padding
        for prompt, response in [(p, r) for p, responses in examples for r in responses]:
            here = batch.predictors[at:at + len(response)]
            assert batch.targets[at:at + len(response)].tolist() == response
            assert batch.input_ids[here].tolist() == (prompt[-1:] + response)[:-1]
            first = len(prompt) - 1
            assert batch.positions[here].tolist() == [*range(first, first + len(response))]
            at += len(response)
        assert at == len(batch.targets) == sum(batch.lengths)
        tokens = rng.randrange(1, 60)
        groups = micro_batches(examples, tokens)
        assert sum(groups, []) == sorted(examples, key=size_of, reverse=True)  # longest first
        assert all(len(group) == 1 or sum(map(size_of, group)) <= tokens for group in groups)
