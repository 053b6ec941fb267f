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

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from allo_mini import UserError
from allo_mini.linear import embedding, linear

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
            "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class ModelConfig:
    """What we read from a Hugging Face config.json; field names are Hugging Face's."""
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    sliding_window: int | None
    eos_token_ids: tuple[int, ...] = ()
    raw: dict = field(default_factory=dict, compare=False, repr=False)

    def check_length(self, tokens: int, where: str = "config.json") -> None:
        """Raise UserError when `tokens` is longer than what the model was made for."""
        if tokens > self.max_position_embeddings:
            raise UserError(f"{where}: max_position_embeddings is {self.max_position_embeddings}, but "
                            f"sequences of {tokens} tokens are asked for; lower --max-length")
        if self.sliding_window and tokens > self.sliding_window:
            raise UserError(f"{where}: sliding_window is {self.sliding_window}, and windows are not supported: "
                            f"lower --max-length from {tokens} to {self.sliding_window} or less")


def parse_config(raw: dict, where: str = "config.json") -> ModelConfig:
    """Hugging Face config dict -> ModelConfig.

    Both spellings of the rope settings are read: `rope_theta` + `rope_scaling`, and `rope_parameters`.
    Raises UserError naming the key when something is missing, of the wrong type or not supported.
    """
    names = raw.get("architectures") or [""]
    one = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    family = FAMILIES.get(names[0]) if one else None
    if family is None:
        raise UserError(f"{where}: architectures is {names}, supported are {', '.join(FAMILIES)}")

    def get(key, kind, *default):
        value = raw.get(key)
        value = default[0] if value is None and default else value
        good = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if not good or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"{where}: {key} is {value!r}, expected {kind.__name__}")
        if kind in (int, float) and not 0 < value < 1e9:
            raise UserError(f"{where}: {key} is {value!r}, expected a positive number below 1e9")
        return value

    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    kv_heads, head_dim = get("num_key_value_heads", int, heads), get("head_dim", int, hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise UserError(f"{where}: num_attention_heads {heads}, num_key_value_heads {kv_heads} and head_dim "
                        f"{head_dim} do not fit together")
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantization_config is set; only unquantized checkpoints are supported")
    if get("hidden_act", str, "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}, only silu is supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_scaling (or rope_parameters) is {rope!r}, expected an object")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    if not isinstance(theta, (int, float)) or not 1 < theta < math.inf:
        raise UserError(f"{where}: rope_theta is {theta!r}, expected a number above 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    needed = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if not isinstance(kind, str) or kind not in needed:
        raise UserError(f"{where}: rope_type is {kind!r}, supported are {', '.join(needed)}")
    for key in needed[kind]:
        if not isinstance(rope.get(key), (int, float)) or not 0 < rope[key] < math.inf:
            raise UserError(f"{where}: {key} is {rope.get(key)!r}, rope_type {kind} needs a positive number")
    bias = get("attention_bias", bool, False)
    window = raw.get("sliding_window") if family == "mistral" or raw.get("use_sliding_window") else None
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(f"{where}: sliding_window is {window!r}, expected a positive int or null")
    eos = raw.get("eos_token_id")
    return ModelConfig(
        family=family, vocab_size=get("vocab_size", int), hidden_size=hidden,
        intermediate_size=get("intermediate_size", int), num_hidden_layers=get("num_hidden_layers", int),
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=get("rms_norm_eps", float, 1e-6), rope_theta=float(theta), rope_scaling={**rope, "rope_type": kind},
        tie_word_embeddings=get("tie_word_embeddings", bool, False),
        qkv_bias=bias or family == "qwen2", output_bias=bias and family != "qwen2",
        mlp_bias=get("mlp_bias", bool, False), max_position_embeddings=get("max_position_embeddings", int, 2048),
        sliding_window=window, eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        raw=raw)


# ---- attention ---------------------------------------------------------------------------------------------

def sdpa(q: Tensor, k: Tensor, v: Tensor, **kind) -> Tensor:
    """Scaled dot-product attention of [..., T, heads, d] tensors (heads next to d, as the projections make them)."""
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    if q.dim() == 3:
        return sdpa_4d(q[None], k[None], v[None], **kind)[0].transpose(-2, -3)
    return sdpa_4d(q, k, v, **kind).transpose(-2, -3)


def sdpa_4d(q, k, v, **kind):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kind)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """q [B,T,h,d], k and v [B,T,g,d] -> [B,T,h,d]: every token sees itself and what stands before it."""
    return sdpa(q, k, v, is_causal=True)


class TreeAttention:
    """Attention over a flat stream of trees, each one prompt P followed by its responses:

        stream   P P P P  C C C  R R   P P  C C C C  R R R   ...      (no padding anywhere)
        C sees   [P | C]  causally: one ordinary causal call
        R sees   [P | R]  causally, never C: queries R, keys and values [P | R], aligned at the lower right

    So the prompt is computed once per pair, and the result equals that of two separate sequences.
    `trees` is a list of (prompt length, (response length, ...)).
    """

    def __init__(self, trees: list[tuple[int, tuple[int, ...]]]):
        self.trees = trees

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [N,h,d], k and v [N,g,d] -> [N,h,d]"""
        out, at = [], 0
        for prompt, (first, *others) in self.trees:
            p, c = at + prompt, at + prompt + first
            out.append(sdpa(q[at:c], k[at:c], v[at:c], is_causal=True))
            for length in others:
                r = c + length
                keys, values = torch.cat((k[at:p], k[c:r])), torch.cat((v[at:p], v[c:r]))
                out.append(sdpa(q[c:r], keys, values, attn_mask=causal_lower_right(length, prompt + length)))
                c = r
            at = c
        return torch.cat(out)


def rope_angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """positions [...] -> cos and sin of the rotary angles, each [..., 1, d], fp32 (RoFormer, arXiv 2104.09864).

    llama3 scaling stretches wavelengths longer than original/low_freq_factor by `factor`, leaves those shorter
    than original/high_freq_factor alone and blends in between (Llama 3.1 model card).
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    freq = 1.0 / (config.rope_theta ** (half / config.head_dim))  # [d/2]
    rope = config.rope_scaling
    if rope["rope_type"] == "linear":
        freq = freq / rope["factor"]
    elif rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)  # rotations in the old context
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        freq = (1 - blend) * freq / rope["factor"] + blend * freq
    angles = positions[..., None].float() * freq  # [..., d/2]
    angles = torch.cat((angles, angles), -1).unsqueeze(-2)  # [..., 1, d]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i + d/2}) of every head by its angle; x [..., heads, d]."""
    left, right = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), -1) * sin.to(x.dtype)


# ---- layers ------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()  # the mean square in fp32, as every reference implementation does
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_size, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.o_proj = Linear(q_size, c.hidden_size, bias=c.output_bias)
        if c.family == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, rope, attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))  # [..., heads, d]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(rotate(q, *rope), rotate(k, *rope), v, self.layer)
        return self.o_proj(out.flatten(-2))  # [..., H]


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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

    `checkpoint_blocks` is how many of the first blocks recompute their activations in backward (0 = none).
    `folder` is where the model was read from; its tokenizer files travel along when it is saved.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_blocks, self.folder = config, 0, None
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
        rope = rope_angles(positions, self.config)
        for i, block in enumerate(self.model.layers):
            if i < self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, attend, use_reentrant=False)
            else:
                x = block(x, rope, attend)
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
