"""Log-probabilities of responses: examples -> one flat stream, no padding -> log pi(y_t | x, y_<t).

This is the only way the project scores text: reference and policy, training and evaluation, all
through the same code, so that the ratio of a model to itself is exactly 1.
"""

from collections import namedtuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from allo_mini.attention import TreeAttention
from allo_mini.linear import linear
from allo_mini.mask import chunk_of

HEAD_BYTES = 1 << 28  # of fp32 logits that exist at a time


# A packed micro-batch: a stream of N tokens, S of them scored (those of R responses)
#   input_ids, positions [N]
#   predictors  [S] where in the stream stands what predicts each scored token
#   targets     [S]
#   lengths     [R] tokens of each response; they sum to S
#   trees       of each example: tokens of the prompt, (tokens of each response)
Batch = namedtuple("Batch", "input_ids positions predictors targets lengths trees")


def pack(examples, device="cpu"):
    """[(prompt ids, [response ids, ...]), ...] -> Batch.

    One example ([5, 6], [[7, 8], [9]]) becomes

        input_ids   5 6 7 8 9        (a response's last token is read too: nothing looks at it)
        positions   0 1 2 3 2        (the second response restarts right after the prompt)
        predictors  1 2 1            targets  7 8 9        lengths  2 1        trees  (2, (2, 1))

    An empty response has a predictor too, of the token it may begin with (generate.py).
    Raises ValueError for an empty prompt: nothing would predict the first token.
    """
    ids, positions, predictors, targets = [], [], [], []
    lengths, trees = [], []
    for prompt, responses, *_ in examples:
        if not prompt:
            raise ValueError("every prompt needs at least one token")
        size = len(prompt)
        ids += prompt
        last = len(ids) - 1
        positions += range(size)
        for response in responses:
            predictors += [last, *range(len(ids), len(ids) + len(response) - 1)]
            positions += range(size, size + len(response))
            ids += response
            targets += response
        sizes = tuple(map(len, responses))
        lengths += sizes
        trees.append((size, sizes))
    flat = [torch.tensor(values).to(device, non_blocking=True)
            for values in (ids, positions, predictors, targets)]
    return Batch(*flat, lengths, trees)


class TargetLogps(torch.autograd.Function):
    """log softmax(logits)[target], fp32: logits [S,V], targets [S,1] -> [S,1], as -F.cross_entropy.

    Backward is dy (1[v = target] - p_v). Both ways make a few rows at a time fp32, as many as a
    chunk holds: autograd's own graph keeps another [S,V], a quarter to a half of a step's memory.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.rows = max(1, chunk_of(logits.device) // logits.shape[1])
        rows_of = logits.split(ctx.rows)
        norms = torch.cat([rows.float().logsumexp(-1, keepdim=True) for rows in rows_of])  # [S,1]
        ctx.save_for_backward(logits, norms, targets)
        return logits.gather(1, targets).float() - norms

    @staticmethod
    def backward(ctx, dy):
        logits, norms, targets = ctx.saved_tensors
        split = [x.split(ctx.rows) for x in (logits, norms, targets, dy)]
        for logit, norm, target, d in zip(*split):  # into their place: nobody reads them again
            logit.copy_((logit - norm).exp_().mul_(-d).scatter_add_(1, target, d))
        return logits, None


def head_logps(hidden, weight, targets, limit=HEAD_BYTES):
    """log softmax(weight @ hidden)[target], fp32.  hidden [S,H], weight [V,H], targets [S] -> [S].

    The product runs in the model's dtype, the softmax in fp32. Chunks of at most `limit` bytes of
    fp32 logits keep [S,V] from ever existing; with more than one, backward makes each's again.
    """
    rows = max(1, limit // 4 // len(weight))
    if len(targets) <= rows:
        return TargetLogps.apply(linear(hidden, weight), targets[:, None])[:, 0]
    logps = [checkpoint(head_logps, h, weight, t, limit, use_reentrant=False,
                        preserve_rng_state=False)
             for h, t in zip(hidden.split(rows), targets.split(rows))]
    return torch.cat(logps)


def token_logps(model, batch):
    """log pi(y_t | x, y_<t) of every response token of the batch: [S], fp32, as targets stand."""
    hidden = model(batch.input_ids, batch.positions, TreeAttention(batch.trees))  # [N,H]
    return head_logps(hidden[batch.predictors], model.head_weight, batch.targets)


def responses_of(model, micro):
    """A micro-batch's log pi_theta(y_t) and log pi_ref(y_t), rows [R,T], and which are tokens.

    Examples without a reference get pi_theta's own, so that every ratio is 0.
    """
    batch = pack(micro, model.head_weight.device)
    logps = token_logps(model, batch)  # [S]
    ref = logps.detach()
    real = torch.ones_like(batch.targets).bool()
    if micro[0].ref is not None:
        ref = torch.cat([example.ref for example in micro]).to(ref.device, non_blocking=True)
    return [pad_sequence(x.split(batch.lengths), batch_first=True)  # zeros on the right
            for x in (logps, ref, real)]


def size_of(example):
    """Tokens the model reads for an example: the prompt once, and every response."""
    return len(example[0]) + sum(map(len, example[1]))


def grouped(items, size, most):
    """Lists of items in their order, never empty; size(item) of a list sums to `most` at most."""
    groups = []
    room = 0
    for item in items:
        if size(item) > room:
            groups.append([])
            room = most
        groups[-1].append(item)
        room -= size(item)
    return groups


def micro_batches(examples, tokens):
    """Lists of at most `tokens` tokens; longest first, so memory runs out at once."""
    return grouped(sorted(examples, key=size_of, reverse=True), size_of, tokens)


@torch.no_grad()
def score(model, examples, tokens=8192, on_batch=lambda count: None):
    """Per-token log-probs of every response: [[Tensor [n] on the CPU, ...] of an example, ...]."""
    scores = {}
    for micro in micro_batches(examples, tokens):
        batch = pack(micro, model.head_weight.device)
        rows = iter(token_logps(model, batch).cpu().split(batch.lengths))
        for example in micro:
            scores[id(example)] = [next(rows) for _ in example[1]]
        on_batch(len(micro))
    return [scores[id(example)] for example in examples]


def with_reference(model, examples, tokens):
    """The examples, now carrying log pi_ref(y_t) of all their response tokens [s], fp32, CPU.

    Made by the same code on the same micro-batches as training, so that at theta = theta_ref every
    ratio is exactly 0, in any precision.
    """
    scores = score(model, examples, tokens)
    return [example._replace(ref=torch.cat(rows)) for example, rows in zip(examples, scores)]


def margins(model, pairs, tokens, on_batch):
    """log pi(y+) - log pi(y-), summed over tokens, of every example (prompt, [y+, y-])."""
    return [float(up.sum() - down.sum()) for up, down in score(model, pairs, tokens, on_batch)]
