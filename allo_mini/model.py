"""The transformer: Llama 2 / 3.x, Mistral, Qwen2 / 2.5 and Qwen3 with Hugging Face parameter names.

Notation, used in every shape comment of this project:

    B batch rows   T tokens of a row      N tokens of a whole flat stream    V vocabulary size
    H hidden size  h attention heads      g key/value heads (h % g == 0)     d head size

The model itself knows nothing about batches, padding or caches. What a token may look at is decided by one
function `attend(q, k, v, layer)`, handed to `forward`; there are three of them:

    causal_attention     [B, T] rows of equal length                                   (attention.py)
    TreeAttention        a flat stream of prompts with their responses, no padding     (attention.py)
    Cache                one new token for each of many running samples                (generate.py)
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allo_mini import pointwise
from allo_mini.architecture import ModelConfig, rope_angles
from allo_mini.attention import causal_attention
from allo_mini.linear import embedding, linear


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return pointwise.RMSNormFunction.apply(x, self.weight, self.eps)


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: weights are read from a file."""

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
        q, k = (pointwise.RotateFunction.apply(x, *rope) for x in (q, k))
        out = attend(q, k, v, self.layer)
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


class CausalLM(nn.Module):
    """The whole model. With tied embeddings there is no lm_head: one tensor, one name, one mask entry.

    `head_bytes` is the size of fp32 logits made at a time. `checkpoint_blocks` is how many of the first blocks
    recompute their activations in backward (0 = none). `folder` is where the model was read from; its tokenizer
    files travel along when it is saved.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_blocks, self.head_bytes, self.folder = config, 0, 1 << 28, None
        self.model = nn.ModuleDict({  # for its name in checkpoints
            "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
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


BUILDERS: dict[str, type[CausalLM]] = {}  # family -> its class, where that is not CausalLM itself


def build(config: ModelConfig) -> CausalLM:
    """A model of the config's family, its weights not set."""
    return BUILDERS.get(config.family, CausalLM)(config)
