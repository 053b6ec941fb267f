"""What several test files share: the fixtures' places, tiny models, a tiny tokenizer."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from allo_mini.checkpoint import load_model, save_model
from allo_mini.linear import dense_rows
from allo_mini.logprobs import pack, token_logps
from allo_mini.mask import Selected
from allo_mini.masked_adamw import MaskedAdamW
from allo_mini.model import CausalLM, parse_config

FIXTURES = Path(__file__).resolve().parent / "fixtures"
HF = ("llama_mha", "llama_gqa_tied", "mistral", "qwen2", "qwen3", "llama3_rope")
EOS = 2
RAW = {"architectures": ["LlamaForCausalLM"], "vocab_size": 120, "hidden_size": 16,
       "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
       "max_position_embeddings": 4096, "tie_word_embeddings": False, "eos_token_id": EOS}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def fixture_model(name: str, trainable: bool = False) -> CausalLM:
    return load_model(str(FIXTURES / "hf" / name)).requires_grad_(trainable)


@torch.no_grad()
def initialize(model: CausalLM, seed: int, std: float = 0.02) -> CausalLM:
    """Fresh normal(0, std) weights for every matrix, zeros for biases, ones for norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def tiny_model(seed: int = 0, std: float = 0.3, trainable: bool = True, **changes) -> CausalLM:
    """A random model of RAW's shape; weights so large that predictions differ by token."""
    model = CausalLM(parse_config({**RAW, **changes}))
    return initialize(model, seed, std).requires_grad_(trainable)


def random_ids(count: int, seed: int, vocab: int = 120) -> list[int]:
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def separate_logps(model: CausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The plain way: one sequence, all logits, log softmax, gather."""
    ids = torch.tensor([prompt + response])
    logps = model.logits(ids).log_softmax(-1)[0, len(prompt) - 1:-1]
    return logps.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def gradients(model: CausalLM) -> dict[str, torch.Tensor]:
    """Gradients of all parameters as they stand; clears them."""
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out


def whole(p, dtype=torch.float32) -> torch.Tensor:
    """A weight, dequantised where it is int8."""
    return torch.cat([rows.clone() for _, rows in dense_rows(p, dtype)])


def random_mask(model, share: float = 0.3) -> dict[str, torch.Tensor]:
    """A bool tensor for every parameter."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(p.shape, generator=generator) < share
            for name, p in model.named_parameters()}


def last_step(folder: Path, device: str, dtype="fp32", int8=False, recompute=False, steps=1,
              resume=False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of steps on ragged pairs over 30 % of a saved model's weights: the last one's log-probs and
    gradient, the change by all, on the CPU in fp32. resume: each with model and optimizer anew."""
    mask = {n: Selected.from_dense(m) for n, m in random_mask(load_model(folder)).items()}
    trees = [(random_ids(n, n), [random_ids(n + 9, 1), random_ids(n, 2)]) for n in (5, 40, 17)]
    state = None
    for _ in range(steps):
        if state is None or resume:
            model = load_model(folder, dtype, device, int8, mask)
            model.recompute = recompute
            optimizer = MaskedAdamW(model.named_parameters(), mask, 1e-4)
        if state and resume:
            optimizer.load_state_dict(state)
        logps = token_logps(model, pack(trees, device))
        logps.sin().sum().backward()
        gradient = optimizer.grad.to("cpu", copy=True)  # which a step empties
        optimizer.step()
        state = {name: x.clone() for name, x in optimizer.state_dict().items()}
    return logps.detach().float().cpu(), gradient, optimizer.master.cpu() - optimizer.start


def low(x: float) -> float:
    """-log sigma(x)"""
    return math.log(1 + math.exp(-x))


def error_of(capsys) -> str:
    """What a command that was refused has printed: one line."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.find("\n") == len(error) - 1, error
    return error


def assert_close(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m: f"{name}: {m}")


def save_tokenizer(tokenizer, folder: Path, **settings) -> Path:
    """The folder of a tokenizer; `settings`: tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_tokenizer(folder: Path, **settings) -> Path:
    """A character tokenizer with <unk>, <s> = 1 and </s> = 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    characters = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return save_tokenizer(tokenizer, folder, **settings)


def write_folder(folder: Path, **settings) -> Path:
    """A tiny model with the character tokenizer; `settings` go to tokenizer_config.json."""
    save_model(tiny_model(), folder)
    return write_tokenizer(folder, **settings)
