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

        stream   P P P P  C C C  R R   P P  C C C C  R R R   ...      (no padding anywhere)
        C sees   [P | C]  causally: one ordinary causal call
        R sees   [P | R]  causally, never C: queries R, keys and values [P | R], aligned at the lower right

    So the prompt is computed once per pair, and the result equals that of two separate sequences.
    `trees` is a list of (prompt length, (response length, ...)). On a GPU one call of a variable-length kernel does
    all of it, where there is one for its kind.
    """

    def __init__(self, trees: list[tuple[int, tuple[int, ...]]]):
        self.trees, self.packed, self.masks = trees, None, {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [N,h,d], k and v [N,g,d] -> [N,h,d]"""
        if q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0 and varlen_kernel(q.device):
            return self.in_one_call(q, k, v, varlen_kernel(q.device))
        kind, out, sizes = q.dtype, [], [prompt + sum(responses) for prompt, responses in self.trees]
        if q.device.type == "cpu" and kind == torch.bfloat16:  # whose backward takes 2-3 times as long as fp32's
            q, k, v = q.float(), k.float(), v.float()
        # split, not sliced: in backward every slice would fill a gradient of the whole stream with zeros
        for (prompt, (first, *others)), *tree in zip(self.trees, *(x.split(sizes) for x in (q, k, v))):
            lengths = [prompt + first, *others]  # of [P | C], R, ...
            (q, *queries), (k, *keys), (v, *values) = (x.split(lengths) for x in tree)
            out.append(sdpa(q, k, v, is_causal=True))
            k, v = (x.split([prompt, first])[0] for x in (k, v))  # [P]
            for q, *own in zip(queries, keys, values):
                whole = (torch.cat(pair) for pair in zip((k, v), own))  # [P | R]
                out.append(sdpa(q, *whole, attn_mask=self.lower_right(len(q), prompt, q)))
        return torch.cat(out).to(kind)

    def lower_right(self, length: int, prompt: int, q: Tensor):
        """Mask of `length` responses' tokens over [P | R]: each sees the prompt and what stands before it.

        A GPU's kernels know it by name; a CPU's do not, and there the import costs a second and 70 MB.
        """
        if (length, prompt) not in self.masks:
            if q.is_cuda:
                from torch.nn.attention.bias import causal_lower_right
                self.masks[length, prompt] = causal_lower_right(length, prompt + length)
            else:
                hidden = torch.ones(length, prompt + length, dtype=torch.bool, device=q.device).triu_(prompt + 1)
                self.masks[length, prompt] = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return self.masks[length, prompt]

    def in_one_call(self, q: Tensor, k: Tensor, v: Tensor, kernel) -> Tensor:
        """The same: queries are the stream as it stands, cut into [P C], [R], ...; each [R] gets keys [P R], copied."""
        if self.packed is None:
            sizes, keys, at = [], [], 0  # of each part: how many queries, where in the stream its keys stand
            for prompt, (first, *others) in self.trees:
                end = at + prompt + first
                sizes += [prompt + first, *others]
                keys.append(range(at, end))
                for length in others:
                    keys.append([*range(at, at + prompt), *range(end, end + length)])
                    end += length
                at = end
            cuts = ([0, *itertools.accumulate(lengths)] for lengths in (sizes, map(len, keys)))
            rows = torch.tensor([row for part in keys for row in part])
            cuts = [torch.tensor(cut, dtype=torch.int32) for cut in cuts]
            self.packed = (*(x.to(q.device, non_blocking=True) for x in (rows, *cuts)), max(sizes), max(map(len, keys)))
        rows, *cuts = self.packed
        return kernel(q, k[rows], v[rows], *cuts)


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

    def kernel(q, k, v, *cuts):  # every query head gets a key and value head of its own
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return varlen_attn(q, k, v, *cuts, **causal)
    return kernel
