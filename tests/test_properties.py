"""Random cases of what must hold for every input: the tokenizer's split, the packer, the radix select."""

import random

import pytest
import torch
from helpers import write_tokenizer

from allo_mini import demo
from allo_mini.logprobs import micro_batches, pack
from allo_mini.mask import select_neurons
from allo_mini.tokenizer import Tokenizer

ALPHABET = [*"aab  \n\t.,19=+é😀ß\u0301\u200d中\x00\u2028", "The answer is",
            "</s>", "<s>", "doubles", "\r\n", "  "]


def some_text(rng, longest=12):
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(longest + 1)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Merging byte pairs (the demo's), and single characters with a BOS that the tokenizer adds."""
    folder = write_tokenizer(tmp_path_factory.mktemp("characters"), add_bos_token=True)
    return [Tokenizer(demo.FOLDER), Tokenizer(folder)]


@pytest.mark.parametrize("which", (0, 1))
def test_a_split_loses_nothing_and_cuts_as_late_as_it_can(tokenizers, which):
    tokenizer, rng = tokenizers[which], random.Random(which)
    for case in range(400):
        prompt, texts = some_text(rng), [some_text(rng) for _ in range(rng.randrange(1, 4))]
        shared, rests = tokenizer.split(prompt, texts, bos=case % 2 == 0)
        whole = [tokenizer.encode(prompt + text, case % 2 == 0) for text in texts]
        alone = tokenizer.encode(prompt, case % 2 == 0)
        assert [shared + rest for rest in rests] == whole
        assert alone[:len(shared)] == shared
        firsts = {tuple(rest[:1]) for rest in [*rests, alone[len(shared):]]}
        assert len(firsts) > 1 or () in firsts, (prompt, texts)  # one token more would not be shared by all


def test_packed_tokens_are_predicted_by_the_one_before_them_in_their_own_sequence():
    rng = random.Random(0)
    for _ in range(200):
        examples = [([rng.randrange(99) for _ in range(rng.randrange(1, 6))],
                     [[rng.randrange(99) for _ in range(rng.randrange(1, 5))] for _ in range(rng.randrange(1, 4))])
                    for _ in range(rng.randrange(1, 5))]
        batch = pack(examples)
        sequences = [(prompt, response) for prompt, responses in examples for response in responses]
        assert batch.lengths == [len(response) for _, response in sequences]
        assert len(batch.input_ids) == sum(len(p) + sum(map(len, r)) for p,
                                           r in examples)  # each prompt once, no padding
        at = 0
        for prompt, response in sequences:
            for i, token in enumerate(response):
                place = int(batch.predictors[at])
                assert int(batch.targets[at]) == token
                assert int(batch.input_ids[place]) == (prompt + response)[len(prompt) + i - 1]
                assert int(batch.positions[place]) == len(prompt) + i - 1
                at += 1
        assert at == len(batch.targets)


def test_micro_batches_lose_nothing_and_keep_their_bounds():
    rng = random.Random(1)
    for _ in range(300):
        examples = [([0] * rng.randrange(1, 9), [[0] * rng.randrange(1, 9)], i) for i in range(rng.randrange(1, 12))]
        rows, tokens = rng.randrange(4), rng.randrange(1, 40)
        groups = list(micro_batches(examples, rows, tokens))
        assert sorted((e for group in groups for e in group), key=lambda e: e[2]) == examples and all(groups)
        for group in groups:
            size = sum(len(p) + len(r) for p, [r], _ in group)
            assert len(group) <= rows if rows else size <= tokens or len(group) == 1


def test_radix_select_is_a_stable_sort():
    rng = random.Random(2)
    special = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0000001, 3e38, 2e-38, 65504.0]
    for case in range(150):
        generator = torch.Generator().manual_seed(case)
        shapes = [rng.choice([(0,), (1,), (7,), (3, 5), (40,)]) for _ in range(rng.randrange(1, 5))] + [(2,)]
        tensors = {}
        for i, shape in enumerate(shapes):
            values = torch.randn(shape, generator=generator)
            values[torch.rand(shape, generator=generator) < rng.random()] = rng.choice(special)  # ties
            tensors[str(i)] = values.to(rng.choice([torch.float32, torch.bfloat16]))
        flat = torch.cat([t.float().abs().flatten() for t in tensors.values()])
        percent = rng.choice([1, 5, 10, 33, 50, 99, 100])
        count = percent * len(flat) // 100
        order = torch.sort(flat, descending=True, stable=True).indices[:count]
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order] = True
        chosen = select_neurons(tensors, percent / 100)
        assert torch.equal(torch.cat([chosen[name].flatten() for name in tensors]), expected)
