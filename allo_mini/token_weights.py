"""Which tokens of a wrong response are forgotten: a rewriting model's scores, or an edit alignment.

The rewriting model (RLMEC, arXiv 2401.06081) is trained to turn a wrong prediction into a right one
with minimal edits. Teacher-forced over the wrong prediction itself, it gives each of its tokens a
probability: high where the rewrite would leave the token alone, low where it would write something
else. That probability is the token's score.
"""

from collections import defaultdict
from difflib import SequenceMatcher

from allo_mini import UserError
from allo_mini.data.encoder import Example
from allo_mini.data.rows import plain
from allo_mini.logprobs import score
from allo_mini.run.files import read_jsonl, reading

REWRITE_PROMPT = ("Problem:\n{}\n\nReference solution:\n{}\n\nWrong prediction:\n{}\n\nCorrect "
    "the prediction with as few changes as possible.\n\nCorrected prediction:")


def rewrite_prompt(encoder, negative, response):
    """Ids of the rewriting prompt, never cut; None (counted) if it is too long with `response`."""
    texts = negative.prompt, negative.reference, negative.response
    text = REWRITE_PROMPT.format(*map(plain, texts))
    if encoder.style == "chat":
        text = encoder.frame(text)
    ids = encoder.tokenizer.encode(text, bos=encoder.bos)
    if len(ids) + len(response) > encoder.rewrite_length:
        return encoder.drop("rewriting prompt above three times --max-length or the model's limit")
    return ids


def rewrite_examples(encoder, negatives):
    """Training rows of the rewriting model: (problem, reference, wrong prediction) -> rewrite."""
    examples = []
    for negative in negatives:
        ids = encoder.response_ids(negative.prompt, negative.rewrite)
        prompt = rewrite_prompt(encoder, negative, ids)
        if prompt:
            examples.append(Example(prompt, [ids]))
    return examples


def token_scores(model, encoder, negatives, examples, tokens, on_batch):
    """Probability of every token of each wrong response (EOS included) under the rewriting model.

    `examples` hold the responses' ids as the policy is trained on them; the same are scored here.
    Of one whose rewriting prompt is too long there are none: [].
    """
    prompts = [rewrite_prompt(encoder, n, e.responses[0]) for n, e in zip(negatives, examples)]
    framed = [Example(p, e.responses) for p, e in zip(prompts, examples) if p]
    rows = iter(score(model, framed, tokens, on_batch))
    return [next(rows)[0].exp().tolist() if prompt else [] for prompt in prompts]


def read_scores(path, negatives, examples):
    """These responses' scores in a file of ours, or the official release's. Raises UserError."""
    known = defaultdict(list)  # in the run's order, where pairs differ in what was chosen alone
    for where, row in read_jsonl(path):
        with reading(where):
            known[str(row["input"]), str(row["output"])].append(list(map(float, row["reward"])))
    scores = []
    for negative, example in zip(negatives, examples):
        rows = known[str(negative.prompt), str(negative.response)] or [None]
        row = rows.pop(0) if rows[1:] else rows[0]
        fits = row is not None and len(row) in (0, len(example.responses[0]))
        if not fits or not all(0 <= s <= 1.001 for s in row):
            raise UserError(f"{path}: not one probability for each token, with EOS, of every wrong "
                            "response of this run; delete it to score again")
        scores.append(row)
    return scores


def weights_from_scores(scores, mode, threshold):
    """Scores -> token weights w_t.

    threshold: 1 where score < threshold, else 0 (the paper's picture)
    soft:      1 - score
    released:  the score itself (what the official release computes; its threshold is commented out)
    """
    if mode == "threshold":
        return [float(s < threshold) for s in scores]
    return [1 - s for s in scores] if mode == "soft" else scores


def edit_weights(response, rewrite):
    """1 for the tokens of `response` outside its alignment with `rewrite` (FIGA, arXiv 2311.04072).

    difflib's alignment, the longest common run first: nearly always a minimal one, not always.
    """
    weights = [1.0] * len(response)
    matcher = SequenceMatcher(None, response, rewrite, autojunk=False)
    for start, _, size in matcher.get_matching_blocks():
        weights[start:start + size] = [0.0] * size
    return weights


def nearest(response, candidates):
    """Index of the candidate that the fewest insertions and deletions of tokens turn into it.

    The longest common subsequence, row by row of its table; a row is one integer, whose zero bits
    stand where the subsequence grows (Hyyrö 2004).
    """
    places = defaultdict(int)  # token -> bits of where the response has it
    for i, token in enumerate(response):
        places[token] |= 1 << i
    full = (1 << len(response)) - 1
    edits = []
    for candidate in candidates:
        row = full
        for token in candidate:
            matches = row & places[token]
            row = (row + matches | row - matches) & full
        edits.append(len(candidate) + 2 * row.bit_count())  # and len(response) less, for all
    return edits.index(min(edits))
