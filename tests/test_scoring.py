"""scoring.py: edit alignments against brute force, token weights, scores that fit the policy's own tokens."""

import itertools
import math
import random

import pytest
import torch

from allo_mini.data import Encoder, Example, Negative
from allo_mini.edits import edit_table, edit_weights, nearest
from allo_mini.logprobs import pack, token_logps
from allo_mini.losses import dpo_loss, npo_loss
from allo_mini.scoring import (rewrite_examples, rewrite_prompt, token_scores, with_reference,
                               weights_from_scores)
from allo_mini.tokenizer import Tokenizer
from helpers import EOS, random_ids, separate_logps, tiny_model, write_tokenizer


def distance(a, b, must=None):
    """Levenshtein, written plainly. With `must` (a bool per token of a): exactly those must be matched."""
    table = {(0, j): j for j in range(len(b) + 1)}
    for i, x in enumerate(a, 1):
        free = must is None or not must[i - 1]  # may be deleted or replaced
        table[i, 0] = table[i - 1, 0] + 1 if free else math.inf
        for j, y in enumerate(b, 1):
            ways = [table[i, j - 1] + 1]
            if free:
                ways += [table[i - 1, j] + 1, table[i - 1, j - 1] + 1]
            if x == y and (must is None or must[i - 1]):
                ways.append(table[i - 1, j - 1])
            table[i, j] = min(ways)
    return table[len(a), len(b)]


def sequences():
    """All short sequences over two tokens, and longer random ones over few and many tokens."""
    short = [list(s) for n in range(4) for s in itertools.product((7, 8), repeat=n)]
    yield from itertools.product(short, short)
    rng = random.Random(0)
    for tokens in (2, 3, 30):
        for _ in range(25):
            yield tuple([rng.randrange(tokens) for _ in range(rng.randrange(14))] for _ in "ab")


def test_edit_table_holds_the_distance_of_every_pair_of_prefixes():
    for a, b in sequences():
        table = edit_table(a, b)
        assert table.shape == (len(a) + 1, len(b) + 1)
        if len(a) + len(b) < 9:
            for i, j in itertools.product(range(len(a) + 1), range(len(b) + 1)):
                assert table[i, j] == distance(a[:i], b[:j])
        assert table[-1, -1] == distance(a, b)


def test_edit_weights_are_0_exactly_on_a_minimal_alignment():
    """Keeping the tokens of weight 0 and changing all others still costs the minimal distance."""
    for a, b in sequences():
        weights = edit_weights(a, b)
        assert len(weights) == len(a) and set(weights) <= {0.0, 1.0}
        assert distance(a, b, [w == 0 for w in weights]) == distance(a, b)


def test_edit_weights_hand_worked():
    assert edit_weights([1, 2, 3, EOS], [1, 2, 3, EOS]) == [0, 0, 0, 0]
    assert edit_weights([1, 2, 3, EOS], [1, 9, 3, EOS]) == [0, 1, 0, 0]  # replaced
    assert edit_weights([1, 2, 3, EOS], [1, 3, EOS]) == [0, 1, 0, 0]  # deleted
    assert edit_weights([1, 3, EOS], [1, 2, 3, EOS]) == [0, 0, 0]  # inserted: no token is wrong
    assert edit_weights([5, 6], [7, 8, 9]) == [1, 1]
    assert edit_weights([5, 6], []) == [1, 1] and edit_weights([], [5]) == []


def test_nearest_is_the_first_with_the_smallest_distance():
    rng = random.Random(1)
    for _ in range(30):
        response, *candidates = ([rng.randrange(4) for _ in range(rng.randrange(1, 9))] for _ in range(6))
        distances = [distance(response, c) for c in candidates]
        assert nearest(response, candidates) == distances.index(min(distances))
    assert nearest([1, 2], [[1, 3], [1, 2, 3], [3, 2]]) == 0


def test_weights_from_scores_in_each_mode():
    """The threshold is strict: a score of exactly 0.5 is aligned."""
    scores = [0.0, 0.49, 0.5, 0.75, 1.0]
    assert weights_from_scores(scores, "threshold", 0.5) == [1, 1, 0, 0, 0]
    assert weights_from_scores(scores, "threshold", 0.8) == [1, 1, 1, 1, 0]
    assert weights_from_scores(scores, "soft", 0.5) == pytest.approx([1, 0.51, 0.5, 0.25, 0])
    assert weights_from_scores(scores, "released", 0.5) == scores
    assert weights_from_scores([], "soft", 0.5) == []


# ---- reference log-probs -----------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["plain", "chunked head", "checkpointed", "bf16"])
def test_reference_equals_training_logps_exactly(variant):
    """Bit for bit on the same micro-batches, graph or no graph: the first ratios are exactly 0."""
    model = tiny_model(seed=3)
    if variant == "chunked head":
        model.head_bytes = 4 * 120 * 5
    model.checkpoint_blocks = 2 if variant == "checkpointed" else 0
    if variant == "bf16":
        model = model.bfloat16()
    examples = [(random_ids(5 + i, i), [random_ids(4 + i, 50 + i), random_ids(9 - i, 90 + i)])
                for i in range(5)]
    micros, seen = [examples[:2], examples[2:3], [examples[4], examples[0]]], 0
    known = iter(with_reference(model, [[Example(*e) for e in micro] for micro in micros]))
    for micro in micros:
        batch = pack(micro)
        logps, ref = token_logps(model, batch), torch.cat([next(known).ref for _ in micro])
        assert logps.requires_grad and not ref.requires_grad
        assert logps.dtype == ref.dtype == torch.float32
        assert torch.equal(logps, ref)
        zero = torch.zeros(len(batch.lengths) // 2)
        ratios = torch.stack([r.sum() for r in (logps - ref).split(batch.lengths)]).view(-1, 2)
        assert torch.equal(dpo_loss(*ratios.T, zero, zero, 0.1), torch.full_like(zero, math.log(2)))
        weights = torch.rand(len(logps))
        torch.testing.assert_close(npo_loss(logps, ref, weights, 0.1), weights * math.log(2))
        seen += 1
    assert seen == 3 and next(known, None) is None


# ---- with a tokenizer --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), pad_token="</s>"))


NEGATIVES = [Negative("2 + 2?", "It is 5.", "It is 4.", "It is 4."),
             Negative("Capital of France?", "Rome, I think", "Paris", "Paris, I think")]


@pytest.mark.parametrize("style", ["alpaca", "none"])
def test_eos_closes_every_response_once_and_is_scored(tokenizer, style):
    """Although pad == eos here: it is the last target of each response, predicted by the last character."""
    encoder = Encoder(tokenizer, style, 400)
    example = encoder.example("2 + 2?", ["It is 4.", "It is 5, or so."])
    batch = pack([example])
    assert [r.count(EOS) for r in example.responses] == [1, 1]
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    assert batch.targets[ends].tolist() == [EOS, EOS]
    assert tokenizer.decode(batch.input_ids[batch.predictors[ends]].tolist()) == ".."
    model = tiny_model(seed=1)
    logps = token_logps(model, batch)
    assert len(logps) == sum(map(len, example.responses))
    scored = torch.cat([separate_logps(model, example.prompt, r) for r in example.responses])
    torch.testing.assert_close(logps, scored, atol=2e-5, rtol=1e-5)
    grad, = torch.autograd.grad(logps[ends].sum(), model.lm_head.weight)
    assert grad[EOS].abs().max() > 1e-3  # forgetting or preferring to stop is something that can be learned


def test_token_scores_are_the_probabilities_of_the_policys_own_tokens(tokenizer):
    """One score per response token, EOS included, of the same ids after the rewriting prompt."""
    encoder, model = Encoder(tokenizer, "alpaca", 600), tiny_model(seed=2, trainable=False)
    examples = [encoder.example(n.prompt, [n.response]) for n in NEGATIVES]
    scores = token_scores(model, encoder, NEGATIVES, examples, 8192)
    for negative, example, row in zip(NEGATIVES, examples, scores, strict=True):
        assert len(row) == len(example.responses[0]) and example.responses[0][-1] == EOS
        expected = separate_logps(model, rewrite_prompt(encoder, negative, example.responses[0]), example.responses[0]).exp()
        torch.testing.assert_close(torch.tensor(row), expected, atol=1e-6, rtol=1e-4)
    assert len({round(s, 6) for row in scores for s in row}) > 10


def test_the_rewriting_prompt_shows_problem_reference_and_prediction(tokenizer):
    encoder = Encoder(tokenizer, "alpaca", 600)
    text = tokenizer.decode(rewrite_prompt(encoder, NEGATIVES[1], []))
    assert text.index("Capital of France?") < text.index("\nParis\n") < text.index("Rome, I think")
    first, second = rewrite_examples(encoder, NEGATIVES)
    assert first.prompt == rewrite_prompt(encoder, NEGATIVES[0], first.responses[0])
    assert tokenizer.decode(second.responses[0]) == " Paris, I think" and second.responses[0][-1] == EOS


def test_long_rewriting_prompts_leave_room_within_max_length(tokenizer):
    """The prompt loses its left side; the whole row stays within max_length, EOS kept."""
    encoder = Encoder(tokenizer, "alpaca", 100)
    negative = Negative("x" * 300, "wrong " * 4, "right", "right " * 7)
    prompt = rewrite_prompt(encoder, negative, [5] * 50)
    assert len(prompt) == 50 and tokenizer.decode(prompt).endswith("Corrected prediction:")
    example, = rewrite_examples(encoder, [negative])
    assert len(example.prompt) + len(example.responses[0]) <= 100 and example.responses[0][-1] == EOS
