"""Attention over [prompt, chosen, rejected] without padding, and what does it on each device. Notation: model.py."""

import inspect
import itertools
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, **kind) -> Tensor:
    """Scaled dot-product attention of [..., T, heads, d] tensors (heads next to d, as the projections make them)."""
    if q.dim() == 3:
        return sdpa(q[None], k[None], v[None], **kind)[0]
    if q.is_cuda and q.dtype == torch.float32 and q.shape[2] != k.shape[2]:
        # there no fused kernel shares heads, and the plain one would keep [T,T]
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)),  # [B,heads,T,d]
                                         enable_gqa=q.shape[2] != k.shape[2], **kind)
    return out.transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """q [B,T,h,d], k and v [B,T,g,d] -> [B,T,h,d]: every token sees itself and what stands before it."""
    return sdpa(q, k, v, is_causal=True)


class TreeAttention:
    """Attention over a flat stream of trees, each one prompt P followed by its responses:

        stream   P P P P  C C C  R R           P P  C C C C  R R R   ...      (no padding anywhere)
        keys     P P P P  C C C  P P P P  R R  P P  C C C C  P P  R R R
        C sees   [P | C]  causally: one ordinary causal call
        R sees   [P | R]  causally, never C: queries R, keys and values [P | R], aligned at the lower right

    So the prompt is computed once per pair, and the result equals that of two separate sequences.
    `trees` is a list of (prompt length, (response length, ...)). On a GPU one call of a variable-length kernel does
    all of it, where there is one for its kind.
    """

    def __init__(self, trees: list[tuple[int, tuple[int, ...]]]):
        self.trees, self.cuts, self.masks = trees, None, {}
        # lengths of the parts: of [P C] or [R], and of the [P C] or [P R] that it sees
        self.queries = [length for prompt, (first, *others) in trees for length in (prompt + first, *others)]
        self.keys = [prompt + length for prompt, responses in trees for length in responses]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [N,h,d], k and v [N,g,d] -> [N,h,d]"""
        kind = q.dtype
        if q.is_cuda and kind != torch.float32 and q.shape[-1] % 8 == 0 and varlen_kernel(q.device):
            return self.in_one_call(q, k, v, varlen_kernel(q.device))
        if q.device.type == "cpu" and kind == torch.bfloat16:  # whose backward takes 2-3 times as long as fp32's
            q, k, v = q.float(), k.float(), v.float()
        parts = zip(q.split(self.queries), *(self.as_keys(x).split(self.keys) for x in (k, v)))
        return torch.cat([sdpa(*part, **self.sight(*part[:2])) for part in parts]).to(kind)

    def as_keys(self, x: Tensor) -> Tensor:
        """The stream, laid out as keys. Split, not indexed: in backward that fills no whole stream with zeros."""
        pieces = iter(x.split([length for prompt, responses in self.trees for length in (prompt, *responses)]))
        keys = []
        for _, responses in self.trees:
            prompt = next(pieces)
            for response in itertools.islice(pieces, len(responses)):
                keys += [prompt, response]
        return torch.cat(keys)

    def sight(self, q: Tensor, k: Tensor) -> dict:
        """How a part's queries see its keys: each what stands before it, the last one all.

        A GPU's kernels know that by name; a CPU's do not, and there the import costs a second and 70 MB.
        """
        size = len(q), len(k)
        if size[0] == size[1]:
            return {"is_causal": True}
        if size not in self.masks:
            if q.is_cuda:
                from torch.nn.attention.bias import causal_lower_right
                self.masks[size] = causal_lower_right(*size)
            else:
                hidden = torch.ones(size, dtype=torch.bool, device=q.device).triu_(size[1] - size[0] + 1)
                self.masks[size] = q.new_zeros(size).masked_fill_(hidden, -torch.inf)
        return {"attn_mask": self.masks[size]}

    def in_one_call(self, q: Tensor, k: Tensor, v: Tensor, kernel) -> Tensor:
        """The same by a kernel that is told where each part's queries and keys begin."""
        if self.cuts is None:
            starts = (torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
                      for sizes in (self.queries, self.keys))
            self.cuts = [x.to(q.device, non_blocking=True) for x in starts]
        return kernel(q, self.as_keys(k), self.as_keys(v), *self.cuts, max(self.queries), max(self.keys))


@lru_cache
def varlen_kernel(device):
    """torch's f(q, k, v, query starts, key starts, longest query, longest key), causal from the lower right; None on
    GPUs older than Ampere. Its arguments changed between torch 2.10 and 2.12.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    from torch.nn.attention.varlen import varlen_attn
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        return partial(varlen_attn, enable_gqa=True, **causal)

    def kernel(q, k, v, *cuts):
        if q.shape[1] != k.shape[1]:  # every query head gets a key and value head of its own
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return varlen_attn(q, k, v, *cuts, **causal)
    return kernel
