"""The transformer: Llama 2 / 3.x, Mistral, Qwen2 / 2.5 and Qwen3 with Hugging Face parameter names.

Notation, used in every shape comment of this project:

    B batch rows   T tokens of a row      N tokens of a whole flat stream    V vocabulary size
    H hidden size  h attention heads      g key/value heads (h % g == 0)     d head size

The model itself knows nothing about batches, padding or caches. What a token may look at is decided by one
function `attend(q, k, v, layer)`, handed to `forward`; there are three of them:

    causal_attention     [B, T] rows of equal length                                   (here)
    TreeAttention        a flat stream of prompts with their responses, no padding     (here)
    Cache                one new token for each of many running samples                (generate.py)
"""

import inspect
import itertools
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allo_mini import pointwise
from allo_mini.architecture import ModelConfig, parse_config, rope_angles  # noqa: F401, for who imports them from here
from allo_mini.linear import embedding, linear


# ---- attention ---------------------------------------------------------------------------------------------

def sdpa(q: Tensor, k: Tensor, v: Tensor, **kind) -> Tensor:
    """Scaled dot-product attention of [..., T, heads, d] tensors (heads next to d, as the projections make them)."""
    if q.dim() == 3:
        return sdpa(q[None], k[None], v[None], **kind)[0]
    if q.is_cuda and q.dtype == torch.float32:  # where no fused kernel shares heads, and the plain one keeps [T,T]
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
    all of it, where this torch has one.
    """

    def __init__(self, trees: list[tuple[int, tuple[int, ...]]]):
        self.trees, self.packed, self.masks = trees, None, {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [N,h,d], k and v [N,g,d] -> [N,h,d]"""
        if q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0 and varlen_kernel(q.device):
            return self.in_one_call(q, k, v, varlen_kernel(q.device))
        kind, out, sizes = q.dtype, [], [prompt + sum(responses) for prompt, responses in self.trees]
        if q.device.type == "cpu" and kind == torch.bfloat16:  # its bf16 backward takes 2-3 times as long
            q, k, v = q.float(), k.float(), v.float()
        # split, not sliced: in backward every slice would fill a gradient of the whole stream with zeros
        for (prompt, (first, *others)), *tree in zip(self.trees, *(x.split(sizes) for x in (q, k, v))):
            (q, *queries), (k, *keys), (v, *values) = (x.split([prompt + first, *others]) for x in tree)  # [P | C], R, ...
            out.append(sdpa(q, k, v, is_causal=True))
            k, v = (x.split([prompt, first])[0] for x in (k, v))  # [P]
            for q, *own in zip(queries, keys, values):
                k_r, v_r = (torch.cat(pair) for pair in zip((k, v), own))  # [P | R]
                out.append(sdpa(q, k_r, v_r, attn_mask=self.lower_right(len(q), prompt, q)))
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
        """The same: queries are the stream as it stands, cut into [P C], [R], ...; every [R] gets its keys [P R] copied."""
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
    """torch's f(q, k, v, query starts, key starts, longest query, longest key), causal from the lower right; None without,
    and on GPUs older than Ampere. Its arguments changed between torch 2.10 and 2.12.
    """
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return None
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        return partial(varlen_attn, enable_gqa=True, **causal)

    def kernel(q, k, v, *cuts):  # every query head gets a key and value head of its own
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return varlen_attn(q, k, v, *cuts, **causal)
    return kernel


# ---- layers ------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return pointwise.RMSNormFunction.apply(x, self.weight, self.eps)


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: weights are read from a file or made by CausalLM.initialize."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing, as in Linear."""

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        qwen2 = c.family == "qwen2"  # always has biases here, but not in o_proj
        self.q_proj = Linear(c.hidden_size, q_size, bias=qwen2 or c.attention_bias)
        self.k_proj = Linear(c.hidden_size, kv_size, bias=qwen2 or c.attention_bias)
        self.v_proj = Linear(c.hidden_size, kv_size, bias=qwen2 or c.attention_bias)
        self.o_proj = Linear(q_size, c.hidden_size, bias=c.attention_bias and not qwen2)
        if c.family == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, rope, attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))  # [..., heads, d]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(pointwise.rotate(q, *rope), pointwise.rotate(k, *rope), v, self.layer)
        return self.o_proj(out.flatten(-2))  # [..., H]


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(pointwise.SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope, attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class CausalLM(nn.Module):
    """The whole model. With tied embeddings there is no lm_head: one tensor, one name, one mask entry.

    `head_bytes` is the size of fp32 logits made at a time. `checkpoint_blocks` is how many of the first blocks
    recompute their activations in backward (0 = none). `folder` is where the model was read from; its tokenizer
    files travel along when it is saved.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_blocks, self.head_bytes, self.folder = config, 0, 1 << 28, None
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H], the matrix that turns hidden states into logits."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, attend=causal_attention) -> Tensor:
        """input_ids [B,T] (or a flat stream [N] with `positions` [N] and a matching `attend`) -> hidden [..., H]."""
        if positions is None:
            positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
        x = self.model.embed_tokens(input_ids)  # [..., H]
        rope = [angles.to(x.dtype) for angles in rope_angles(positions, self.config)]  # cos and sin, [..., 1, d]
        for i, block in enumerate(self.model.layers):
            again = i < self.checkpoint_blocks and torch.is_grad_enabled()
            x = checkpoint(block, x, rope, attend, use_reentrant=False) if again else block(x, rope, attend)
        return self.model.norm(x)

    def logits(self, input_ids: Tensor) -> Tensor:
        """[B,T] -> [B,T,V]; for inspection and tests: training never builds the whole of it (logprobs.py)."""
        return linear(self(input_ids), self.head_weight)

    @torch.no_grad()
    def initialize(self, seed: int, std: float = 0.02) -> "CausalLM":
        """Fresh normal(0, std) weights for every matrix, zeros for biases, ones for norms."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


BUILDERS: dict[str, type[CausalLM]] = {}  # family -> its class, where that is not CausalLM itself


def build(config: ModelConfig) -> CausalLM:
    """A model of the config's family, its weights not set."""
    return BUILDERS.get(config.family, CausalLM)(config)
