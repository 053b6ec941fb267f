"""What a checkpoint's config.json says: ModelConfig, read and checked, and the rotary angles that follow from it."""

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from allo_mini import UserError

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
            "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

# rope_type -> the numbers it needs
ROPE = {"default": (), "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What we read from a Hugging Face config.json; field names are Hugging Face's.

    Numbers and flags are taken as they are; where there is a default, a missing key or null means that.
    """
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    family: str
    rope_scaling: dict
    sliding_window: int | None
    raw: dict = field(default_factory=dict, compare=False, repr=False)

    def length(self, tokens: int, where: str = "config.json") -> int:
        """--max-length as it is; for 0 the official scripts' 1200, or what the model was made for if that is less.

        Raises UserError when it is longer than that.
        """
        limits = {"max_position_embeddings": self.max_position_embeddings, "sliding_window": self.sliding_window}
        for key, most in limits.items():  # attention is never cut to a window
            if most and tokens > most:
                raise UserError(f"{where}: {key} is {most}, but sequences of {tokens} tokens are asked for; lower "
                                f"--max-length to {most} or less")
        return tokens or min(1200, *filter(None, limits.values()))


def parse_config(raw: dict, where: str = "config.json") -> ModelConfig:
    """Hugging Face config dict -> ModelConfig.

    Both spellings of the rope settings are read: `rope_theta` + `rope_scaling`, and `rope_parameters`.
    Raises UserError naming the key when something is missing, of the wrong type or not supported.
    """
    def need(good, key, value, expected):
        if not good:
            raise UserError(f"{where}: {key} is {value!r}, expected {expected}")

    def get(values, key, kind, default=None):
        value = default if values.get(key) is None else values[key]
        if kind is bool:
            need(isinstance(value, bool), key, value, "true or false")
        else:
            most = 1e10 if kind is float else 1000 if key == "num_hidden_layers" else 1e8  # no model comes near them
            good = type(value) in (int, kind) and 0 < value < most
            need(good, key, value, f"a positive {kind.__name__} below {most:g}")
        return value

    if {"config", "files", "machine"} <= raw.keys():
        raise UserError(f"{where}: belongs to a run, not to a model; name one of the run's models, such as its folder "
                        "improve")
    names, act = raw.get("architectures"), raw.get("hidden_act")
    family = next((family for name, family in FAMILIES.items() if names == [name]), None)
    need(family, "architectures", names, f"one of {', '.join(FAMILIES)}")
    need(act in (None, "silu"), "hidden_act", act, "silu, the only one supported")
    need(not raw.get("quantization_config"), "quantization_config", "set", "an unquantized model")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    need(isinstance(rope, dict), "rope_scaling (or rope_parameters)", rope, "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(isinstance(kind, str) and kind in ROPE, "rope_type", kind, f"one of {', '.join(ROPE)}")
    scaling = {"rope_type": kind, **{key: get(rope, key, float) for key in ROPE[kind]}}
    heads = get(raw, "num_attention_heads", int)
    derived = {"num_key_value_heads": heads, "head_dim": get(raw, "hidden_size", int) // heads}
    usual = vars(ModelConfig) | derived  # what a missing key means; none of the others may be missing
    plain = {f.name: get({**raw, **rope}, f.name, f.type, usual.get(f.name))
             for f in fields(ModelConfig) if f.type in (int, float, bool)}
    kv_heads, head_dim = plain["num_key_value_heads"], plain["head_dim"]
    if heads % kv_heads or head_dim % 2:
        raise UserError(f"{where}: num_attention_heads {heads}, num_key_value_heads {kv_heads} and head_dim "
                        f"{head_dim} do not fit together")
    asked = raw.get("use_sliding_window", family not in ("llama", "qwen2", "qwen3"))  # a Qwen has one if it says so
    windowed = raw.get("sliding_window") is not None and (asked or family == "mistral")
    return ModelConfig(**plain, family=family, rope_scaling=scaling, raw=raw,
                       sliding_window=get(raw, "sliding_window", int) if windowed else None)


def cache_bytes(c: ModelConfig, size: int) -> int:
    """Keys and values of one token in all layers, `size` bytes a number."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size


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
