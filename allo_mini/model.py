"""The transformer: Llama 2 / 3.x, Mistral, Qwen2 / 2.5 and Qwen3 with Hugging Face parameter names.

Notation, used in every shape comment of this project:

    B batch rows   T tokens of a row      N tokens of a whole flat stream    V vocabulary size
    H hidden size  h attention heads      g key/value heads (h % g == 0)     d head size

The model knows nothing about batches, padding or caches. What a token may look at is decided by one
function `attend(q, k, v, layer)`, handed to `forward`; there are three of them:

    causal_attention   [B, T] rows of equal length                                 (attention.py)
    TreeAttention      a flat stream of prompts with their responses, no padding   (attention.py)
    Cache              one new token for each of many running samples              (generate.py)
"""

import math
import warnings
from dataclasses import MISSING, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from allo_mini import UserError
from allo_mini.attention import causal_attention
from allo_mini.linear import linear

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
            "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
ROPE = {"default": (), "linear": ("factor",),  # rope_type -> the numbers it needs
        "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                   "original_max_position_embeddings")}
USABLE = {"architectures": FAMILIES, "hidden_act": (None, "silu"), "quantization_config": (None,),
          "rope_type": ROPE, "is_causal": (None, True)}
KINDS = {int: "a positive integer", float: "a positive number", bool: "true or false"}
BUILDERS = {}  # family -> its class, where that is not CausalLM itself
KERNELS = {}  # function -> what a GPU runs in its place


# ---- config.json ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    """What we read from a Hugging Face config.json; field names are Hugging Face's."""
    raw: dict  # the whole of config.json
    family: str
    rope_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    sliding_window: int = 10**9  # none
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    factor: float = 0.0  # this and the next three: see rope_angles; 0: not given
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: float = 0.0

    def length(self, tokens, where="config.json"):
        """--max-length as it is; for 0 the official scripts' 1200, or the model's limit if less.

        Raises UserError when it is longer than the model was made for: attention is never cut.
        """
        limit = min(self.max_position_embeddings, self.sliding_window)
        if tokens > limit:
            raise UserError(f"{where}: --max-length is {tokens}, but the model reads at most "
                            f"{limit} tokens (max_position_embeddings, sliding_window)")
        return tokens or min(1200, limit)


def parse_config(raw, where="config.json"):
    """Hugging Face config dict -> ModelConfig; what is missing or null has its field's default (but
    for the numbers of a rope_type, ROPE).

    Both spellings of the rope settings are read: `rope_theta` + `rope_scaling`, `rope_parameters`;
    of both the first counts, as in transformers.
    Raises UserError naming the key when something is missing, of the wrong type or not supported.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    [name] = raw.get("architectures") or [None]
    given = raw | rope | {"architectures": name, "rope_type": rope_type}
    for key, usable in USABLE.items():
        value = given.get(key)
        if value not in usable:
            raise UserError(f"{where}: {key} is {value!r}, expected one of {list(usable)}")
    values = {}
    for f in fields(ModelConfig):
        value = given.get(f.name)
        optional = f.default is not MISSING and f.name not in ROPE[rope_type]
        if f.type not in KINDS or (value is None and optional):
            continue
        most = 1000 if f.name == "num_hidden_layers" else 1e12  # layers are built one by one
        if type(value) not in (f.type, int) or not (f.type is bool or 0 < value <= most):
            raise UserError(f"{where}: {f.name} is {value!r}, expected {KINDS[f.type]}")
        values[f.name] = value
    family = FAMILIES[name]
    heads = values["num_attention_heads"]
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", values["hidden_size"] // heads)
    if not values["head_dim"]:
        raise UserError(f"{where}: num_attention_heads is {heads}, more than hidden_size")
    if family != "mistral" and not raw.get("use_sliding_window"):
        values.pop("sliding_window", None)
    return ModelConfig(raw, family, rope_type, **values)


# ---- the pieces ----------------------------------------------------------------------------------

def rope_angles(positions, c):
    """positions [...] -> cos, sin of the rotary angles, each [..., 1, d], fp32 (arXiv 2104.09864).

    llama3 scaling stretches wavelengths longer than original/low_freq_factor by `factor`, leaves
    those shorter than original/high_freq_factor alone, blends in between (Llama 3.1 model card).
    """
    half = torch.arange(0, c.head_dim, 2, device=positions.device)
    freq = 1.0 / c.rope_theta ** (half / c.head_dim)  # [d/2]
    if c.rope_type == "linear":
        freq = freq / c.factor
    if c.rope_type == "llama3":
        turns = c.original_max_position_embeddings * freq / (2 * math.pi)  # in the old context
        blend = ((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)).clamp(0, 1)
        freq = (1 - blend) * freq / c.factor + blend * freq
    angles = positions[..., None, None].float() * torch.cat((freq, freq))  # [..., 1, d]
    return angles.cos(), angles.sin()


def fused(plain):
    """`plain`, compiled by its first call on a GPU; as it is on a CPU, and where Triton fails.

    One by one, pointwise operations go through memory again and again. What is compiled is what
    autograd does not see, its Functions' forward and backward: so with and without a gradient the
    same kernel runs, and log-probs are the same to the bit. Kernels get bare data: for tensors
    that do or do not require a gradient they would be compiled anew, up to a limit of torch's.
    """
    def call(*values):
        if not values[0].is_cuda:
            return plain(*values)
        values = [getattr(value, "data", value) for value in values]
        if plain not in KERNELS:
            KERNELS[plain] = torch.compile(plain, dynamic=True)
        try:
            return KERNELS[plain](*values)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # there is no Triton, or no compiler and headers that it needs
            KERNELS[plain] = plain
            warnings.warn(f"slower, for torch.compile fails ({type(e).__name__}); it wants Triton, "
                          "a C compiler and Python's headers")
            return plain(*values)
    return call


def rotated(x, cos, sin):
    """Turn the pair (x_i, x_{i + d/2}) of every head by its angle. x [..., heads, d]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


@fused
def swiglu_backward(dy, gate, up):
    return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


class SwiGLU(Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), keeping its two inputs alone for backward.

    Autograd's own graph keeps silu(gate) too: a tenth of a step's memory without `recompute`.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        return swiglu_backward(dy, *ctx.saved_tensors)


def normalized(x, eps):
    """x / rms(x) and 1 / rms(x), in fp32."""
    x = x.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


@fused
def rms_norm(x, weight, eps):
    return weight * normalized(x, eps)[0].to(x.dtype)


@fused
def rms_norm_backward(dy, x, weight, eps):
    """With y = x / rms(x) over a row's n entries:  dx = (w dy - y sum(w dy y) / n) / rms(x)."""
    y, scale = normalized(x, eps)
    dw = dy * y  # [..., n], fp32
    mean = (dw @ weight.float())[..., None] / len(weight)
    dx = (dy * weight.float()).addcmul_(y, mean, value=-1).mul_(scale)
    return dx.to(x.dtype), dw.flatten(0, -2).sum(0).to(x.dtype)


class KeepInput(Function):
    """RMSNorm that keeps x alone for backward: autograd's own graph keeps x / rms(x) as well."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, dy):
        return *rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


class RMSNorm(nn.RMSNorm):
    """weight * x / sqrt(mean(x^2) + eps)"""

    def forward(self, x):
        return KeepInput.apply(x, self.weight, self.eps)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        H, d = c.hidden_size, c.head_dim
        self.layer = layer
        self.heads = (-1, d)
        qwen2 = c.family == "qwen2"  # always has biases here, but not in o_proj
        bias = qwen2 or c.attention_bias
        self.q_proj = Linear(H, c.num_attention_heads * d, bias)
        self.k_proj = Linear(H, c.num_key_value_heads * d, bias)
        self.v_proj = Linear(H, c.num_key_value_heads * d, bias)
        self.o_proj = Linear(c.num_attention_heads * d, H, bias and not qwen2)
        norm = RMSNorm if c.family == "qwen3" else nn.Identity
        self.q_norm = norm(d, c.rms_norm_eps)
        self.k_norm = norm(d, c.rms_norm_eps)

    def forward(self, x, rope, attend):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).unflatten(-1, self.heads) for project in projections)
        q = rotated(self.q_norm(q), *rope)  # [..., h, d]
        k = rotated(self.k_norm(k), *rope)  # [..., g, d]
        return self.o_proj(attend(q, k, v, self.layer).flatten(-2))  # [..., H]


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.self_attn = Attention(c, layer)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    """The whole model. With tied embeddings there is no lm_head: one tensor, name and mask entry.

    `recompute`: blocks keep only their inputs and make their activations again in backward.
    checkpoint.py sets `folder` and `files`, where it was read from, `changes`, patches put on top.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False
        self.folder = None
        self.model = nn.ModuleDict({  # from_pretrained: random numbers would load the compiler
            "embed_tokens": nn.Embedding.from_pretrained(
                torch.empty(config.vocab_size, config.hidden_size), freeze=False),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False)

    @property
    def head_weight(self):
        """[V, H], the matrix that turns hidden states into logits."""
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    def forward(self, input_ids, positions=None, attend=causal_attention):
        """input_ids [B,T], or a stream [N] with its positions and `attend` -> hidden [..., H]."""
        if positions is None:
            positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
        x = self.model.embed_tokens(input_ids)  # [..., H]
        rope = [angles.to(x.dtype) for angles in rope_angles(positions, self.config)]
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, attend, use_reentrant=False,
                               preserve_rng_state=False)  # nothing here is random
            else:
                x = block(x, rope, attend)
        return self.model.norm(x)

    def logits(self, input_ids):
        """[B,T] -> [B,T,V]; to look at: training never builds the whole of it (logprobs.py)."""
        return linear(self(input_ids), self.head_weight)


def build(config):
    """A model of the config's family, its weights not set."""
    return BUILDERS.get(config.family, CausalLM)(config)
