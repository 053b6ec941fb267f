"""Which tokens of a wrong response are to be forgotten: scores from a rewriting model, and token weights.

The rewriting model (RLMEC, arXiv 2401.06081) is trained to turn a wrong prediction into a right one with minimal
edits. Teacher-forced over the wrong prediction itself, it gives each of its tokens a probability: high where the
rewrite would leave the token alone, low where it would write something else. That probability is the token's score.
"""

from collections.abc import Iterable

import torch

from allo_mini.data import Encoder, Example, Negative, plain
from allo_mini.logprobs import pack, score, token_logps
from allo_mini.model import CausalLM

REWRITE_PROMPT = ("Problem:\n{}\n\nReference solution:\n{}\n\nWrong prediction:\n{}\n\n"
                  "Correct the prediction with as few changes as possible.\n\nCorrected prediction:")


@torch.no_grad()
def with_reference(model: CausalLM, micros: Iterable[list[Example]]) -> list[Example]:
    """The examples of micro-batches, now carrying log pi_ref(y_t) of all their response tokens, flat fp32 on the CPU.

    Made by the same code on the same micro-batches as training, so that at theta = theta_ref every ratio is
    exactly 0, in any precision.
    """
    out = []
    for micro in micros:
        logps = token_logps(model, pack(micro, model.head_weight.device)).cpu()
        sizes = [sum(map(len, e.responses)) for e in micro]
        out += [e._replace(ref=values) for e, values in zip(micro, logps.split(sizes))]
    return out


def rewrite_prompt(encoder: Encoder, negative: Negative, response: list[int]) -> list[int]:
    """Ids of the rewriting prompt; trimmed on the left, so that with `response` it keeps to max_length tokens."""
    text = REWRITE_PROMPT.format(*map(plain, (negative.prompt, negative.reference, negative.response)))
    framed = encoder.tokenizer.render([{"role": "user", "content": text}], True) if encoder.style == "chat" else text
    ids = encoder.tokenizer.encode(framed, bos=encoder.bos)
    # at least BOS and one token
    return encoder.trim(ids, max(1 + len(encoder.tokenizer.prefix), encoder.max_length - len(response)))


def rewrite_examples(encoder: Encoder, negatives: list[Negative]) -> list[Example]:
    """Training rows of the rewriting model: (problem, reference, wrong prediction) -> rewrite."""
    examples = []
    for negative in negatives:
        ids = encoder.response_ids(negative.prompt, negative.rewrite)
        if len(ids) < encoder.max_length:
            examples.append(Example(rewrite_prompt(encoder, negative, ids), [ids]))
    return examples


def token_scores(model: CausalLM, encoder: Encoder, negatives: list[Negative], examples: list[Example],
                 tokens: int, on_batch=lambda n: None) -> list[list[float]]:
    """Probability of every token of each wrong response (EOS included) under the rewriting model.

    `examples` hold the responses' ids as the policy is trained on them; the same ids are spliced in here.
    """
    framed = [Example(rewrite_prompt(encoder, n, e.responses[0]), e.responses) for n, e in zip(negatives, examples)]
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
