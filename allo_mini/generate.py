"""Sampling with a key/value cache: many prompts at once, n samples a prompt, rows come and go.

    slots     | a1 a2 a3 b1 b2 b3 c1 c2 .. |      one running sample each; the first `len(running)` are in use

A prompt is read once and its keys and values are copied to its n slots. A finished sample leaves at once: the last
running one moves into its slot, and when enough slots are free the next prompts are admitted. Every sample draws
from its own random stream, seeded by (seed, row, k), so company in the batch does not change what it says.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

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
        c, like = model.config, model.head_weight
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


class Sample:
    """One running sample: which prompt, its cache length, its tokens so far, its random stream."""

    def __init__(self, prompt: int, k: int, length: int, u: Tensor):
        self.prompt, self.k, self.length, self.tokens, self.u = prompt, k, length, [], u


@torch.inference_mode()
def sample(model: CausalLM, prompts: list[list[int]], n: int, max_new_tokens: int, temperature: float = 0.7,
           top_p: float = 0.95, eos_ids=(), seed: int = 0, rows: list[int] | None = None, slots: int = 64,
           stopped=None, on_done=lambda prompt, tokens: None) -> list[list[list[int]]]:
    """n responses for each prompt -> [prompt][k] -> token ids, prompt not included, the closing EOS included.

    prompts: token id lists of any lengths; rows: the numbers that seed each prompt (default 0, 1, ...);
    slots: samples running at once; stopped(tokens) -> bool ends a sample on a stop string;
    on_done(prompt, tokens) is called as each sample ends. A response stops at any of eos_ids, or at max_new_tokens.
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    rows, slots, eos = rows or list(range(len(prompts))), max(slots, n), set(eos_ids)
    done: list = [[None] * n for _ in prompts]
    waiting, running = list(range(len(prompts)))[::-1], []
    cache = Cache(model, min(slots, n * len(prompts)), max(map(len, prompts), default=0) + 64)
    device = model.head_weight.device

    def advance(samples: list[Sample], hidden: Tensor) -> None:
        """Give each sample its next token; `hidden` [len(samples), H]."""
        u = torch.stack([s.u[len(s.tokens)] for s in samples]).to(device)
        tokens = pick(F.linear(hidden, model.head_weight), temperature, top_p, u).tolist()
        for s, token in zip(samples, tokens):
            s.tokens.append(token)

    def over(s: Sample) -> bool:
        return s.tokens[-1] in eos or len(s.tokens) >= max_new_tokens or bool(stopped and stopped(s.tokens))

    def leave() -> None:
        """Hand over finished samples and close the gaps they leave."""
        finished = [s for s in running if over(s)]
        if not finished:
            return
        for s in finished:
            done[s.prompt][s.k] = s.tokens
            on_done(s.prompt, s.tokens)
        stay = len(running) - len(finished)
        targets = [i for i in range(stay) if over(running[i])]
        sources = [i for i in range(stay, len(running)) if not over(running[i])]
        if sources:
            cache.move(sources, targets)
        for source, target in zip(sources, targets):
            running[target] = running[source]
        del running[stay:]

    def admit(count: int) -> None:
        """Read the next `count` prompts; each starts n samples."""
        new = [waiting.pop() for _ in range(count)]
        lengths = [len(prompts[i]) for i in new]
        cache.grow(max(lengths) + 1)
        ids = torch.tensor([t for i in new for t in prompts[i]], device=device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        prefill = Prefill(lengths)
        hidden = model(ids, positions, prefill)  # [N,H]
        cache.admit(prefill.kept, lengths, len(running), n)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        fresh = [Sample(i, k, len(prompts[i]), uniforms(seed, rows[i], k, max_new_tokens))
                 for i in new for k in range(n)]
        advance(fresh, hidden[last].repeat_interleave(n, 0))
        running.extend(fresh)
        leave()

    while waiting or running:
        free = (cache.shape[0] - len(running)) // n  # prompts that could start now
        if waiting and free and (not running or free * n * 8 >= cache.shape[0]):
            admit(min(free, len(waiting)))
            continue
        cache.grow(max(s.length for s in running) + 1)
        lengths = [s.length for s in running]
        ids = torch.tensor([s.tokens[-1] for s in running], device=device)
        hidden = model(ids, torch.tensor(lengths, device=device), cache.at(lengths))  # [A,H]
        for s in running:
            s.length += 1
        advance(running, hidden)
        leave()
    return done


def generate(model: CausalLM, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, eos_ids=(), seed: int = 0, **kwargs) -> list[list[int]]:
    """One response per prompt (greedy unless a temperature is given) -> list of token lists, prompt not included."""
    return [one for (one,) in sample(model, prompts, 1, max_new_tokens, temperature, top_p, eos_ids, seed, **kwargs)]
