"""Sampling with a key/value cache: many prompts at once, n samples a prompt, rows come and go.

    slots     | a1 a2 a3 b1 b2 b3 c1 c2 .. |      one running sample each; the first `len(running)` are in use

A prompt is read once and its keys and values are copied to its n slots. A finished sample leaves at once: the last
running one moves into its slot, and when enough slots are free the next prompts are admitted. Every sample draws
from its own random stream, seeded by (seed, row, k), so company in the batch does not change what it says.
"""

import hashlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from allo_mini.linear import linear
from allo_mini.model import CausalLM, TreeAttention


class Prefill(TreeAttention):
    """Attention over a flat stream of prompts that also keeps the keys and values of every layer."""

    def __init__(self, lengths: list[int]):
        super().__init__([(n, (0,)) for n in lengths])
        self.kept = []

    def __call__(self, q, k, v, layer):
        self.kept.append((k, v))
        return super().__call__(q, k, v, layer)


class Cache:
    """Keys and values of all running samples: per layer [slots, g, room, d]. Attention for one new token each."""

    def __init__(self, model: CausalLM, slots: int, room: int):
        c, like = model.config, model.model.embed_tokens.weight  # never int8
        self.shape = (slots, c.num_key_value_heads, room, c.head_dim)
        self.layers = [[torch.zeros(self.shape, dtype=like.dtype, device=like.device) for _ in "kv"]
                       for _ in range(c.num_hidden_layers)]

    def grow(self, room: int) -> None:
        """Make room for longer samples; growing by half at a time keeps copying rare."""
        if room > self.shape[2]:
            extra = max(room, self.shape[2] * 3 // 2) - self.shape[2]
            self.shape = (*self.shape[:2], self.shape[2] + extra, self.shape[3])
            for pair in self.layers:
                for i in (0, 1):
                    pair[i] = F.pad(pair[i], (0, 0, 0, extra))

    def admit(self, kept: list[tuple[Tensor, Tensor]], lengths: list[int], first_slot: int, n: int) -> None:
        """Copy each prompt's keys and values ([N,g,d] a layer) into n neighbouring slots."""
        for pair, new in zip(self.layers, kept):
            for store, values in zip(pair, new):
                for j, part in enumerate(values.split(lengths)):  # [P,g,d]
                    at = first_slot + j * n
                    store[at:at + n, :, :len(part)] = part.transpose(0, 1)

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Let the samples in `sources` continue in the slots `targets`."""
        for pair in self.layers:
            for store in pair:
                store[targets] = store[sources]

    def at(self, lengths: list[int]) -> "Cache":
        """Prepare one decoding step for samples holding `lengths` tokens; returns itself as the attend function."""
        device = self.layers[0][0].device
        self.lengths = torch.tensor(lengths, device=device)
        self.used = max(lengths) + 1
        self.visible = (torch.arange(self.used, device=device) <= self.lengths[:, None])[:, None, None]  # [A,1,1,used]
        self.rows = torch.arange(len(lengths), device=device)
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [A,h,d], k and v [A,g,d] of the A running samples' newest token -> [A,h,d].

        The h/g query heads that share a key head are laid out as that head's queries: no key is ever repeated.
        """
        keys, values = self.layers[layer]
        keys[self.rows, :, self.lengths], values[self.rows, :, self.lengths] = k, v
        active = len(self.rows)
        out = F.scaled_dot_product_attention(
            q.unflatten(1, (k.shape[1], -1)), keys[:active, :, :self.used], values[:active, :, :self.used],
            attn_mask=self.visible)  # [A,g,h/g,d]
        return out.flatten(1, 2)


def pick(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """One token per row. logits [A,V], u [A] uniform in [0,1) -> ids [A].

    temperature 0 takes the largest logit. Otherwise the nucleus is the smallest set of most probable tokens whose
    mass reaches top_p (arXiv 1904.09751), and u picks from it by inverting its cumulative distribution.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, size = (logits.float() / temperature).softmax(-1), 64
    while True:  # the nucleus is nearly always small: sorting the whole vocabulary would cost more than the model
        size = min(size if top_p < 1 else probs.shape[-1], probs.shape[-1])
        top, ids = probs.topk(size, -1)  # [A,size], descending
        if size == probs.shape[-1] or bool((top.sum(-1) >= top_p).all()):
            break
        size *= 8
    total = top.cumsum(-1)
    top = top * (total - top < top_p)  # tokens up to and including the one that reaches top_p
    total = top.cumsum(-1)
    choice = (total <= u[:, None] * total[:, -1:]).sum(-1, keepdim=True)  # [A,1]
    return ids.gather(-1, choice.clamp(max=size - 1)).squeeze(-1)


def uniforms(seed: int, row: int, k: int, count: int) -> Tensor:
    """The random stream of sample k of row `row`: [count] uniforms, the same in any batch and on any device."""
    digest = hashlib.blake2b(f"{seed}/{row}/{k}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator)


def bytes_per_token(model: CausalLM) -> int:
    """Cache size of one token of one sample: keys and values of all layers."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.model.embed_tokens.weight.element_size()


@dataclass
class Sample:
    """One sample: the number of its prompt, cache length, random stream, tokens so far."""
    prompt: int
    length: int
    limit: int  # tokens at most
    u: Tensor
    tokens: list[int] = field(default_factory=list)


class Sampler:
    """Runs samples to their end: `admit` starts those of the next prompts, `step` adds a token to all running ones."""

    def __init__(self, model: CausalLM, slots: int, room: int, temperature: float, top_p: float, over, on_done):
        self.model, self.temperature, self.top_p, self.over, self.on_done = model, temperature, top_p, over, on_done
        self.cache, self.slots, self.device = Cache(model, slots, room), slots, model.head_weight.device
        self.running: list[Sample] = []

    def admit(self, prompts: list[list[int]], samples: list[list[Sample]]) -> None:
        """Read prompts once each (one flat stream) and start their samples, n for each prompt."""
        lengths, n = [len(p) for p in prompts], len(samples[0])
        self.cache.grow(max(lengths) + 1)
        ids = torch.tensor([t for p in prompts for t in p], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        prefill = Prefill(lengths)
        hidden = self.model(ids, positions, prefill)  # [N,H]
        self.cache.admit(prefill.kept, lengths, len(self.running), n)
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        fresh = [s for group in samples for s in group]
        self.running += fresh
        self.advance(fresh, hidden[last].repeat_interleave(n, 0))

    def step(self) -> None:
        """One forward pass over the newest token of every running sample."""
        lengths = [s.length for s in self.running]
        self.cache.grow(max(lengths) + 1)
        ids = torch.tensor([s.tokens[-1] for s in self.running], device=self.device)
        hidden = self.model(ids, torch.tensor(lengths, device=self.device), self.cache.at(lengths))  # [A,H]
        for s in self.running:
            s.length += 1
        self.advance(self.running, hidden)

    def advance(self, samples: list[Sample], hidden: Tensor) -> None:
        """Give each sample its next token (`hidden` [len(samples), H]), then let the finished ones leave."""
        u = torch.stack([s.u[len(s.tokens)] for s in samples]).to(self.device)
        tokens = pick(linear(hidden, self.model.head_weight), self.temperature, self.top_p, u).tolist()
        for s, token in zip(samples, tokens):
            s.tokens.append(token)
        over = [len(s.tokens) >= s.limit or self.over(s.tokens) for s in self.running]
        for s, ended in zip(self.running, over):
            if ended:
                self.on_done(s.prompt, s.tokens)
        stay = over.count(False)
        gaps = [i for i in range(stay) if over[i]]
        movers = [i for i in range(stay, len(over)) if not over[i]]  # the last ones move into the gaps
        if movers:
            self.cache.move(movers, gaps)
        for source, target in zip(movers, gaps):
            self.running[target] = self.running[source]
        del self.running[stay:]


@torch.inference_mode()
def sample(model: CausalLM, prompts: list[list[int]], n: int, max_new_tokens: int, temperature: float = 0.7,
           top_p: float = 0.95, eos_ids=(), seed: int = 0, rows: list[int] | None = None, slots: int = 64,
           max_length: int | None = None, stopped=lambda tokens: False,
           on_done=lambda prompt, tokens: None) -> list[list[list[int]]]:
    """n responses for each prompt -> [prompt][k] -> token ids, prompt not included, the closing EOS included.

    prompts: token id lists of any lengths; rows: the numbers that seed each prompt (default 0, 1, ...);
    slots: samples running at once; stopped(tokens) ends a sample on a stop string; on_done(prompt, tokens) is called
    as each sample ends. A response stops at any of eos_ids, at max_new_tokens, or where prompt and response together
    have max_length tokens. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    rows, eos = rows or range(len(prompts)), set(eos_ids)

    def over(tokens):
        return tokens[-1] in eos or stopped(tokens)

    def start(i: int, k: int) -> Sample:
        length = len(prompts[i])
        limit = max(1, min(max_new_tokens, (max_length or length + max_new_tokens) - length))
        return Sample(i, length, limit, uniforms(seed, rows[i], k, limit))

    samples = [[start(i, k) for k in range(n)] for i in range(len(prompts))]
    longest = max(map(len, prompts), default=0)
    if model.head_weight.is_cuda:  # the cache may take 60 % of the memory that is free now
        each = (longest + max_new_tokens) * bytes_per_token(model)
        slots = max(1, min(slots, int(0.6 * torch.cuda.mem_get_info(model.head_weight.device)[0] / each)))
    m = max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, slots))  # of a prompt's n at a time: all if they fit
    jobs = [(prompt, group[k:k + m]) for prompt, group in zip(prompts, samples) for k in range(0, n, m)]
    sampler = Sampler(model, min(slots, m * len(jobs)), longest + 64, temperature, top_p, over, on_done)
    at = 0
    while at < len(jobs) or sampler.running:
        free = (sampler.slots - len(sampler.running)) // m  # jobs that could start now
        if at < len(jobs) and free * m * 8 >= sampler.slots:  # an eighth of the slots: reading is cheap in bulk
            sampler.admit(*zip(*jobs[at:at + free]))
            at += free
        else:
            sampler.step()
    return [[s.tokens for s in group] for group in samples]


def generate(model: CausalLM, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, eos_ids=(), seed: int = 0, **kwargs) -> list[list[int]]:
    """One response per prompt (greedy unless a temperature is given) -> list of token lists, prompt not included."""
    return [one for (one,) in sample(model, prompts, 1, max_new_tokens, temperature, top_p, eos_ids, seed, **kwargs)]
