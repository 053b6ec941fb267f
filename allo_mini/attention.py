"""Attention over [prompt, chosen, rejected] without padding. Notation: model.py."""

from itertools import islice

import torch
import torch.nn.functional as F


def sdpa(q, k, v, **sight):
    """Scaled dot-product attention of [..., T, heads, d]; `sight`: who sees whom, for torch."""
    groups = q.shape[-2] // k.shape[-2]  # query heads that share a key head
    if q.is_cuda and q.dtype == torch.float32:  # no kernel takes groups, [T, T] would be made
        k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
        groups = 1
    heads = [x.transpose(-3, -2) for x in (q, k, v)]  # [..., heads, T, d]
    return F.scaled_dot_product_attention(*heads, enable_gqa=groups > 1, **sight).transpose(-3, -2)


def causal_attention(q, k, v, layer):
    """q [B,T,h,d], k and v [B,T,g,d] -> [B,T,h,d]: every token sees itself and those before it."""
    return sdpa(q, k, v, is_causal=True)


class TreeAttention:
    """Attention over a flat stream of trees, each one prompt P followed by its responses:

        stream   P P P P  C C C  R R           P P  C C C C  R R R   ...      (no padding anywhere)
        P sees   P        causally: one ordinary causal call
        C sees   [P | C]  causally: queries C, keys and values [P | C]
        R sees   [P | R]  causally, never C

    So the prompt is computed once per pair, and the result equals that of two separate sequences.
    `trees` is a list of (prompt length, (response length, ...)).
    """

    def __init__(self, trees):
        self.trees = trees
        self.sizes = [size for prompt, responses in trees for size in (prompt, *responses)]
        self.sights = {}  # (queries, keys) -> who sees whom

    def __call__(self, q, k, v, layer):
        """q [N,h,d], k and v [N,g,d] -> [N,h,d]"""
        kind = q.dtype
        if kind == torch.bfloat16 and not q.is_cuda:  # backward would take 2-3 times as long
            q, k, v = q.float(), k.float(), v.float()
        # split, not indexed: its backward makes no streams of zeros
        pieces = zip(*(x.split(self.sizes) for x in (q, k, v)))
        out = []
        for _, responses in self.trees:
            prompt_q, prompt_k, prompt_v = next(pieces)
            out.append(self.attend(prompt_q, prompt_k, prompt_v))
            for q, k, v in islice(pieces, len(responses)):
                out.append(self.attend(q, torch.cat((prompt_k, k)), torch.cat((prompt_v, v))))
        return torch.cat(out).to(kind)

    def attend(self, q, k, v):
        """Each query sees what stands before it, the last one all keys: q [n,h,d] -> [n,h,d]."""
        size = len(q), len(k)
        if size not in self.sights:
            self.sights[size] = sight(q, *size)
        return sdpa(q[None], k[None], v[None], **self.sights[size])[0]


def sight(like, queries, keys):
    """Causal, aligned at the lower right: by name for a GPU's kernels, as a mask for a CPU's."""
    if queries == keys:
        return {"is_causal": True}
    if like.is_cuda:
        from torch.nn.attention.bias import causal_lower_right
        return {"attn_mask": causal_lower_right(queries, keys)}
    return {"attn_mask": like.new_full((queries, keys), -torch.inf).triu_(keys - queries + 1)}
