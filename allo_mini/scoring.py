"""Which tokens of a wrong response are to be forgotten: scores from a rewriting model, edits, and token weights.

The rewriting model (RLMEC, arXiv 2401.06081) is trained to turn a wrong prediction into a right one with minimal
edits. Teacher-forced over the wrong prediction itself, it gives each of its tokens a probability: high where the
rewrite would leave the token alone, low where it would write something else. That probability is the token's score.
"""

import numpy as np
import torch

from allo_mini.data import Encoder, Example, Negative, plain
from allo_mini.logprobs import pack, score, token_logps
from allo_mini.model import CausalLM

REWRITE_PROMPT = ("Problem:\n{}\n\nReference solution:\n{}\n\nWrong prediction:\n{}\n\n"
                  "Correct the prediction with as few changes as possible.\n\nCorrected prediction:")


@torch.no_grad()
def reference_logps(model: CausalLM, steps: list[list[list[Example]]], on_step=lambda n: None) -> list[list[torch.Tensor]]:
    """log pi_ref(y_t) for every micro-batch of every step: [step][micro-batch] -> [S] fp32 on the CPU.

    Made by the same code on the same micro-batches as training, so that at theta = theta_ref every ratio is
    exactly 0, in any precision.
    """
    device, out = model.head_weight.device, []
    for micros in steps:
        out.append([token_logps(model, pack(micro, device)).cpu() for micro in micros])
        on_step(1)
    return out


def rewrite_prompt(encoder: Encoder, negative: Negative) -> list[int]:
    """Ids of the rewriting prompt; at most half of max_length, trimmed on the left, so that a response fits."""
    text = REWRITE_PROMPT.format(plain(negative.prompt), negative.reference, negative.response)
    framed = encoder.tokenizer.render([{"role": "user", "content": text}], True) if encoder.style == "chat" else text
    return encoder.trim(encoder.tokenizer.encode(framed, bos=encoder.style != "chat"), encoder.max_length)


def rewrite_examples(encoder: Encoder, negatives: list[Negative]) -> list[Example]:
    """Training rows of the rewriting model: (problem, reference, wrong prediction) -> rewrite."""
    examples = []
    for negative in negatives:
        ids = encoder.response_ids(negative.prompt, negative.rewrite)
        examples.append(Example(rewrite_prompt(encoder, negative), [ids[:encoder.max_length]]))
    return examples


def token_scores(model: CausalLM, encoder: Encoder, negatives: list[Negative], examples: list[Example],
                 tokens: int, on_batch=lambda n: None) -> list[list[float]]:
    """Probability of every token of each wrong response (EOS included) under the rewriting model.

    `examples` hold the responses' ids as the policy is trained on them; the same ids are spliced in here.
    """
    framed = [Example(rewrite_prompt(encoder, n), e.responses) for n, e in zip(negatives, examples)]
    return [logps[0].exp().tolist() for logps in score(model, framed, tokens, on_batch)]


def weights_from_scores(scores: list[float], mode: str, threshold: float) -> list[float]:
    """Scores -> token weights w_t.

    threshold: 1 where score < threshold, else 0 (the paper's picture)
    soft:      1 - score
    released:  the score itself (what the official release computes: its threshold line is commented out)
    """
    if mode == "threshold":
        return [float(s < threshold) for s in scores]
    return [1 - s for s in scores] if mode == "soft" else list(scores)


def edit_table(a: list[int], b: list[int]) -> np.ndarray:
    """Levenshtein distances of all prefixes: [len(a)+1, len(b)+1] int32; table[-1, -1] is the distance.

    One row at a time: min(up + 1, diagonal + cost), then insertions spread to the right, which is a running
    minimum once the column number is subtracted.
    """
    columns = np.arange(len(b) + 1, dtype=np.int32)
    other = np.asarray(b, dtype=np.int64)
    table = np.empty((len(a) + 1, len(b) + 1), dtype=np.int32)
    table[0] = columns
    for i, token in enumerate(a, 1):
        row = table[i - 1] + 1
        row[1:] = np.minimum(row[1:], table[i - 1, :-1] + (other != token))
        table[i] = np.minimum.accumulate(row - columns) + columns
    return table


def edit_weights(response: list[int], rewrite: list[int]) -> list[float]:
    """1 for the tokens of `response` outside a minimal edit alignment with `rewrite` (FIGA, arXiv 2311.04072)."""
    table, i, j = edit_table(response, rewrite), len(response), len(rewrite)
    weights = [1.0] * i
    while i and j:
        if response[i - 1] == rewrite[j - 1] and table[i, j] == table[i - 1, j - 1]:
            weights[i - 1] = 0.0
            i, j = i - 1, j - 1
        elif table[i, j] == table[i - 1, j - 1] + 1:
            i, j = i - 1, j - 1
        elif table[i, j] == table[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return weights


def nearest(response: list[int], candidates: list[list[int]]) -> int:
    """Index of the candidate with the smallest edit distance to the response (the first of equals)."""
    return int(np.argmin([edit_table(response, c)[-1, -1] for c in candidates]))


def margins(model: CausalLM, pairs: list[Example], tokens: int, on_batch=lambda n: None) -> torch.Tensor:
    """log pi(y+) - log pi(y-) of each pair, summed over tokens: [B]."""
    scored = score(model, pairs, tokens, on_batch)
    return torch.stack([chosen.sum() - rejected.sum() for chosen, rejected in scored])
