"""Log-probabilities of responses: examples -> one flat stream without padding -> log pi(y_t | x, y_<t).

This is the only way the project ever scores text: reference and policy, training and evaluation, all through
the same code, so that the ratio of a model to itself is exactly 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from allo_mini.attention import TreeAttention
from allo_mini.linear import linear
from allo_mini.model import CausalLM
from allo_mini.selection import chunk_of


@dataclass
class Batch:
    """A packed micro-batch. N tokens in the stream, S scored tokens (all response tokens), R responses."""
    input_ids: Tensor   # [N]
    positions: Tensor   # [N]
    predictors: Tensor  # [S] where in the stream the hidden state stands that predicts each scored token
    targets: Tensor     # [S]
    lengths: list[int]  # [R] tokens of each response; they sum to S
    trees: list[tuple[int, tuple[int, ...]]]


def pack(examples: list[tuple[list[int], list[list[int]]]], device="cpu") -> Batch:
    """[(prompt ids, [response ids, ...]), ...] -> Batch.

    One example ([5, 6], [[7, 8], [9]]) becomes

        input_ids   5 6 7 8 9        (a response's last token is read too: nothing depends on its output)
        positions   0 1 2 3 2        (the second response restarts right after the prompt)
        predictors  1 2 1            targets  7 8 9        lengths  2 1        trees  (2, (2, 1))

    Raises ValueError for an empty prompt or response: nothing would predict its first token.
    """
    ids, positions, predictors, targets, trees = [], [], [], [], []
    for prompt, responses, *_ in examples:
        if not prompt or not all(responses):
            raise ValueError("an example needs a prompt and responses of at least one token")
        last = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        for response in responses:
            predictors += [last, *range(len(ids), len(ids) + len(response) - 1)]
            positions += range(len(prompt), len(prompt) + len(response))
            ids += response
            targets += response
        trees.append((len(prompt), tuple(map(len, responses))))
    flat = (torch.tensor(values, dtype=torch.long) for values in (ids, positions, predictors, targets))
    lengths = [length for _, sizes in trees for length in sizes]
    return Batch(*(values.to(device, non_blocking=True) for values in flat), lengths, trees)


class TargetLogps(torch.autograd.Function):
    """log softmax(logits)[target], fp32: logits [S,V], targets [S] -> [S]. Held against -F.cross_entropy in the tests.

    Backward is dy (1[v = target] - p_v). Forward and backward make a few rows at a time fp32, as many as a chunk holds.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.rows = max(1, chunk_of(logits.device) // logits.shape[1])
        norms = torch.cat([part.float().logsumexp(-1, keepdim=True) for part in logits.split(ctx.rows)])  # [S,1]
        ctx.save_for_backward(logits, norms, targets[:, None])
        return (logits.gather(1, targets[:, None]).float() - norms)[:, 0]

    @staticmethod
    def backward(ctx, dy):
        logits, norms, targets = ctx.saved_tensors
        gradient, dy = torch.empty_like(logits), dy[:, None]
        for out, part, norm, target, d in zip(*(x.split(ctx.rows) for x in (gradient, logits, norms, targets, dy))):
            out.copy_((part - norm).exp_().mul_(-d).scatter_add_(1, target, d))
        return gradient, None


def head_logps(hidden: Tensor, weight: Tensor, targets: Tensor, limit: int = 1 << 28) -> Tensor:
    """log softmax(weight @ hidden)[target], fp32.  hidden [S,H], weight [V,H], targets [S] -> [S].

    The matrix product runs in the model's dtype, the softmax in fp32. Chunks of at most `limit` bytes of fp32 logits
    keep [S,V] from ever existing; with more than one, backward recomputes each chunk's logits instead of keeping them.
    """
    def one(hidden, targets):
        return TargetLogps.apply(linear(hidden, weight), targets)

    parts = list(zip(*(x.split(max(1, limit // (4 * weight.shape[0]))) for x in (hidden, targets))))
    again = len(parts) > 1 and torch.is_grad_enabled()
    return torch.cat([checkpoint(one, h, t, use_reentrant=False) if again else one(h, t) for h, t in parts])


def token_logps(model: CausalLM, batch: Batch) -> Tensor:
    """log pi(y_t | x, y_<t) of every response token of the batch: [S], fp32, in the order of batch.targets."""
    hidden = model(batch.input_ids, batch.positions, TreeAttention(batch.trees))  # [N,H]
    return head_logps(hidden[batch.predictors], model.head_weight, batch.targets, model.head_bytes)


def by_response(values: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Flat values [S] -> rows [R,T] padded with zeros on the right, and the bool mask [R,T] of real tokens."""
    rows = pad_sequence(list(values.split(lengths)), batch_first=True)
    ends = torch.tensor(lengths).to(values.device, non_blocking=True)[:, None]
    mask = torch.arange(rows.shape[1], device=values.device) < ends
    return rows, mask


def micro_batches(examples: list, rows: int = 0, tokens: int = 8192) -> list[list]:
    """Split examples into lists of `rows`, or (rows = 0) of at most `tokens` tokens but never empty.

    Sorted by length, longest first: lists of alike lengths, and memory runs out at once or not at all.
    """
    groups, held = [], 0
    for example in sorted(examples, key=size_of, reverse=True):
        size = 1 if rows else size_of(example)
        if not groups or held + size > (rows or tokens):
            groups.append([])
            held = 0
        groups[-1].append(example)
        held += size
    return groups


def size_of(example) -> int:
    """Tokens the model reads for an example: the prompt once, and every response."""
    return len(example[0]) + sum(map(len, example[1]))


@torch.no_grad()
def score(model: CausalLM, examples: list, tokens: int = 8192, on_batch=lambda n: None) -> list[list[Tensor]]:
    """Per-token log-probs on the CPU of every response of every example: [[Tensor [n], ...], ...], in order given."""
    device, out = model.head_weight.device, [None] * len(examples)
    for group in micro_batches([(*e[:2], i) for i, e in enumerate(examples)], tokens=tokens):
        batch = pack(group, device)
        rows = iter(token_logps(model, batch).cpu().split(batch.lengths))
        for _, responses, i in group:
            out[i] = [next(rows) for _ in responses]
        on_batch(len(group))
    return out


def margins(model: CausalLM, pairs: list, tokens: int, on_batch=lambda n: None) -> list[float]:
    """log pi(y+) - log pi(y-), summed over tokens, of every example (prompt, [y+, y-])."""
    return [float(chosen.sum() - rejected.sum()) for chosen, rejected in score(model, pairs, tokens, on_batch)]
