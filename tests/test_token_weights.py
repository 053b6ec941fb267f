"""token_weights.py: edit alignments, token weights, scores that fit the policy's own tokens."""

import random

import pytest
import torch
from helpers import EOS, separate_logps, tiny_model, write_tokenizer

from allo_mini.data.encoder import Encoder
from allo_mini.data.rows import Negative
from allo_mini.data.tokenizer import Tokenizer
from allo_mini.run.files import write_jsonl
from allo_mini.token_weights import (edit_weights, nearest, read_scores, rewrite_examples,
                                     rewrite_prompt, token_scores, weights_from_scores)

NEGATIVES = [Negative("2 + 2?", "It is 5.", "It is 4.", "It is 4."),
             Negative("Capital of France?", "Rome, I think", "Paris", "Paris, I think")]


def test_weights_by_edit_alignment_and_from_scores():
    """Tokens of weight 0 stand in the rewrite, in that order; hand-worked cases."""
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(14))] for _ in "ab")
        rest = iter(b)
        assert all(token in rest for token, w in zip(a, edit_weights(a, b), strict=True) if w == 0)
    assert edit_weights([1, 2, 3, EOS], [1, 9, 3, EOS]) == [0, 1, 0, 0]  # replaced
    assert edit_weights([1, 2, 3, EOS], [1, 3, EOS]) == [0, 1, 0, 0]  # deleted
    assert edit_weights([1, 3, EOS], [1, 2, 3, EOS]) == [0, 0, 0]  # inserted: no token is wrong
    assert edit_weights([5, 6], []) == edit_weights([5, 6], [7, 8, 9]) == [1, 1]
    assert nearest([1, 2, 3, 4], [[9], [1, 4], [1, 2, 3, 4, 5], [1, 2, 4]]) == 2
    scores = [0.0, 0.49, 0.5, 0.75, 1.0]
    assert weights_from_scores(scores, "threshold", 0.5) == [1, 1, 0, 0, 0]  # 0.5 is aligned
    assert weights_from_scores(scores, "soft", 0.5) == pytest.approx([1, 0.51, 0.5, 0.25, 0])
    assert weights_from_scores(scores, "released", 0.5) == scores


def test_scores_are_the_probabilities_of_the_policys_own_tokens(tmp_path):
    """Each token's, EOS included although pad == eos; files of them; what the prompt shows."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, pad_token="</s>"))
    encoder, model = Encoder(tokenizer, "alpaca", 600), tiny_model(seed=2, trainable=False)
    examples = [encoder.example(n.prompt, [n.response]) for n in NEGATIVES]
    scores = token_scores(model, encoder, NEGATIVES, examples, 8192, [].append)
    for negative, example, row in zip(NEGATIVES, examples, scores, strict=True):
        [ids] = example.responses
        assert len(row) == len(ids) and ids.count(EOS) == 1 and ids[-1] == EOS
        wanted = separate_logps(model, rewrite_prompt(encoder, negative, ids), [*ids]).exp()
        torch.testing.assert_close(torch.tensor(row), wanted, atol=1e-6, rtol=1e-4)
    path = tmp_path / "token_weights.jsonl"
    rows = [{"input": n.prompt, "output": n.response, "reward": row}
            for n, row in zip(NEGATIVES, scores)]
    write_jsonl(path, rows)
    assert read_scores(path, NEGATIVES, examples) == scores
    text = tokenizer.decode(rewrite_prompt(encoder, NEGATIVES[1], []))
    assert text.index("Capital of France?") < text.index("\nParis\n") < text.index("Rome, I think")
    prompt, [rewrite], *_ = rewrite_examples(encoder, NEGATIVES)[1]
    assert tokenizer.decode(rewrite) == " Paris, I think"
    assert prompt == rewrite_prompt(encoder, NEGATIVES[1], rewrite)
    tight = Encoder(tokenizer, "alpaca", 50)  # never cut: dropped and counted
    assert rewrite_examples(tight, NEGATIVES) == [] and "2 dropped (rewriting prompt" in tight.report()
    assert token_scores(model, tight, NEGATIVES, examples, 8192, [].append) == [[], []]
