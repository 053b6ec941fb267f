"""Sampling with a key/value cache: many prompts at once, n samples a prompt, rows come and go.

    slots     | a1 a2 a3 b1 b2 b3 c1 c2 .. |      one running sample each; the first `len(running)` are in use

A prompt is read once and its keys and values are copied to its samples' slots. A finished sample leaves at once: the
last running one moves into its slot, and when enough slots are free the next samples start. Every sample draws from its
own random stream, seeded by (seed, row, k), so company in the batch does not change what it says.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from allo_mini.architecture import cache_bytes
from allo_mini.attention import TreeAttention
from allo_mini.linear import linear
from allo_mini.device import free_memory
from allo_mini.model import CausalLM

PREFILL = 4096  # tokens of prompts that are read at a time, so that reading takes a bounded part of the memory


class Cache:
    """Keys and values of all running samples: per layer two of [slots, g, room, d]. Attends for one new token each."""

    def __init__(self, model: CausalLM, slots: int, room: int, most: int):
        c, like = model.config, model.model.embed_tokens.weight  # never int8
        self.most = most  # tokens of the longest sample that there can be
        shape = (slots, c.num_key_value_heads, room, c.head_dim)
        self.stores = [like.new_zeros(shape) for _ in range(2 * c.num_hidden_layers)]  # k, v, k, v, ...

    def move(self, source: int, target: int) -> None:
        """Let the sample in the slot `source` continue in the slot `target`."""
        for store in self.stores:
            store[target] = store[source]

    def prepare(self, lengths: list[int]) -> None:
        """Be ready to attend, for one decoding step, to samples of `lengths` tokens, and make room for one more."""
        device, room = self.stores[0].device, self.stores[0].shape[2]
        self.lengths, self.used = torch.tensor(lengths, device=device), max(lengths) + 1
        if self.used > room:
            larger = max(self.used, min(room * 3 // 2, self.most))  # growing by half at a time keeps copying rare
            for i in range(len(self.stores)):
                self.stores[i] = F.pad(self.stores[i], (0, 0, 0, larger - room))
        self.visible = (torch.arange(self.used, device=device) <= self.lengths[:, None])[:, None, None]  # [A,1,1,used]
        self.rows = torch.arange(len(lengths), device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [A,h,d], k and v [A,g,d] of the A running samples' newest token -> [A,h,d].

        The h/g query heads that share a key head are laid out as that head's queries: no key is ever repeated.
        """
        keys, values = self.stores[2 * layer:2 * layer + 2]
        keys[self.rows, :, self.lengths], values[self.rows, :, self.lengths] = k, v
        out = F.scaled_dot_product_attention(
            q.unflatten(1, (k.shape[1], -1)), keys[:len(q), :, :self.used], values[:len(q), :, :self.used],
            attn_mask=self.visible)  # [A,g,h/g,d]
        return out.flatten(1, 2)


class Prefill(TreeAttention):
    """Attention over a flat stream of prompts whose keys and values go into the cache: copies[j] times the j-th
    prompt's, into neighbouring slots from `slot` on."""

    def __init__(self, cache: Cache, lengths: list[int], copies: list[int], slot: int):
        super().__init__([(n, (0,)) for n in lengths])
        self.cache, self.lengths, self.copies, self.slot = cache, lengths, copies, slot

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        for store, stream in zip(self.cache.stores[2 * layer:2 * layer + 2], (k, v)):
            at = self.slot
            for part, n in zip(stream.split(self.lengths), self.copies):  # [P,g,d]
                store[at:at + n, :, :len(part)] = part.transpose(0, 1)
                at += n
        return super().__call__(q, k, v, layer)


def pick(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """One token per row. logits [A,V], u [A] uniform in [0,1) -> ids [A].

    temperature 0 takes the largest logit. Otherwise the nucleus is the smallest set of most probable tokens whose
    mass reaches top_p (arXiv 1904.09751), and u picks from it by inverting its cumulative distribution.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, whole = (logits.float() / temperature).softmax(-1), logits.shape[-1]
    size = min(64, whole) if top_p < 1 else whole  # nearly always enough; sorting all costs more than the model
    top, ids = probs.topk(size, -1)  # [A,size], descending
    while size < whole and bool((top.sum(-1) < top_p).any()):
        size = min(8 * size, whole)
        top, ids = probs.topk(size, -1)
    if torch.are_deterministic_algorithms_enabled():  # where torch refuses cumsum on CUDA
        top, u = top.cpu(), u.cpu()
    total = top.cumsum(-1)
    top = top * (total - top < top_p)  # tokens up to and including the one that reaches top_p
    total = top.cumsum(-1)
    choice = (total <= u[:, None] * total[:, -1:]).sum(-1, keepdim=True)  # [A,1]
    return ids.gather(-1, choice.clamp(max=size - 1).to(ids.device)).squeeze(-1)


def uniforms(seed: int, row: int, k: int, count: int) -> Tensor:
    """The random stream of sample k of row `row`: [count] uniforms, the same in any batch and on any device."""
    digest = hashlib.blake2b(f"{seed}/{row}/{k}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator)


@dataclass
class Sample:
    """One sample: its prompt's number and ids, its random stream (as long as the sample may get), its tokens so far."""
    number: int
    prompt: list[int]
    u: Tensor
    tokens: list[int] = field(default_factory=list)


def readable(samples: list[Sample]) -> int:
    """How many of the samples, at least one, can begin at once: their different prompts have PREFILL tokens at most."""
    tokens, last = 0, None
    for count, s in enumerate(samples):
        if s.number != last:
            tokens, last = tokens + len(s.prompt), s.number
            if count and tokens > PREFILL:
                return count
    return len(samples)


def read_prompts(model: CausalLM, cache: Cache, fresh: list[Sample], slot: int) -> Tensor:
    """Fill the slots from `slot` on with the prompts of new samples -> hidden [len(fresh), H] at each prompt's end.

    A prompt that neighbours share is read once; all are read in one flat stream.
    """
    copies = Counter(s.number for s in fresh)
    prompts = list({s.number: s.prompt for s in fresh}.values())
    lengths, n, device = [len(p) for p in prompts], list(copies.values()), model.head_weight.device
    ids = torch.tensor([t for p in prompts for t in p], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    hidden = model(ids, positions, Prefill(cache, lengths, n, slot))  # [N,H]
    ends = torch.tensor(lengths).cumsum(0) - 1
    return hidden[ends.repeat_interleave(torch.tensor(n)).to(device)]


def read_tokens(model: CausalLM, cache: Cache, running: list[Sample]) -> Tensor:
    """Put the newest token of every running sample into the cache -> hidden [len(running), H]."""
    cache.prepare([len(s.prompt) + len(s.tokens) - 1 for s in running])
    ids = torch.tensor([s.tokens[-1] for s in running], device=model.head_weight.device)
    return model(ids, cache.lengths, cache)


@torch.inference_mode()
def sample(model: CausalLM, prompts: list[list[int]], n: int, max_new_tokens: int, temperature: float = 0.7,
           top_p: float = 0.95, eos_ids=(), seed: int = 0, rows: list[int] | None = None, slots: int = 64,
           max_length: int | None = None, stopped=lambda tokens: False,
           on_done=lambda prompt, tokens: None) -> list[list[list[int]]]:
    """n responses for each prompt -> [prompt][k] -> token ids, prompt not included, the closing EOS included.

    prompts: token id lists of any lengths; rows: the numbers that seed each prompt (default 0, 1, ...);
    slots: samples running at once; stopped(tokens) ends a sample on a stop string; on_done(prompt, tokens) is called
    as each sample ends, with its prompt's number. A response stops at any of eos_ids, at max_new_tokens, or where
    prompt and response together have max_length tokens. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    head, rows, eos, samples = model.head_weight, rows or range(len(prompts)), set(eos_ids), []
    for i, prompt in enumerate(prompts):
        most = min(max_new_tokens, max_length - len(prompt)) if max_length else max_new_tokens
        samples += [Sample(i, prompt, uniforms(seed, rows[i], k, max(1, most))) for k in range(n)]
    longest = max(map(len, prompts), default=0)
    most = max((len(s.prompt) + len(s.u) for s in samples), default=1)
    if head.is_cuda:  # the cache may take 60 % of the memory that is free now
        each = most * cache_bytes(model.config, model.model.embed_tokens.weight.itemsize)
        slots = max(1, min(slots, int(0.6 * free_memory(head.device) / each)))
    slots = min(slots, len(samples))
    cache, running, waiting = Cache(model, slots, min(longest + 64, most), most), [], samples
    while waiting or running:
        free = slots - len(running)
        if waiting and free * 8 >= slots:  # an eighth of the slots: reading is cheap in bulk
            count = readable(waiting[:free])
            fresh, waiting = waiting[:count], waiting[count:]
            hidden = read_prompts(model, cache, fresh, len(running))
            running += fresh
        else:
            fresh, hidden = running, read_tokens(model, cache, running)
        u = torch.stack([s.u[len(s.tokens)] for s in fresh]).to(head.device)
        for s, token in zip(fresh, pick(linear(hidden, head), temperature, top_p, u).tolist()):
            s.tokens.append(token)
        for i in reversed(range(len(running))):
            s = running[i]
            if len(s.tokens) == len(s.u) or s.tokens[-1] in eos or stopped(s.tokens):
                on_done(s.number, s.tokens)
                last = running.pop()
                if last is not s:  # it moves into the gap
                    cache.move(len(running), i)
                    running[i] = last
    return [[s.tokens for s in samples[i * n:(i + 1) * n]] for i in range(len(prompts))]


def generate(model: CausalLM, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, eos_ids=(), seed: int = 0, **kwargs) -> list[list[int]]:
    """One response per prompt (greedy unless a temperature is given) -> list of token lists, prompt not included."""
    return [one for (one,) in sample(model, prompts, 1, max_new_tokens, temperature, top_p, eos_ids, seed, **kwargs)]
