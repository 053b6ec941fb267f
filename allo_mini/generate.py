"""Sampling with a key/value cache: many prompts at once, n samples a prompt, samples come and go.

    slots     | a1 a2 a3 b1 b2 b3 c1 c2 .. |      one running sample each; the first A are in use

A prompt is read once and its keys and values are copied to its samples' slots. A finished sample
leaves at once: the last running one moves into its slot, and when enough slots are free the next
samples begin. Every sample draws from its own random stream, seeded by (seed, row, k), so company
does not change what it says.

Slots are as long as the samples are now, not as they may get, so memory holds more of them. When
the samples outgrow their slots, all slots get longer; where memory does not hold that, the samples
that are too long wait until the others are done, and are read again in fewer and longer slots.
"""

import hashlib
from collections import namedtuple
from itertools import takewhile

import torch
import torch.nn.functional as F

from allo_mini.attention import TreeAttention
from allo_mini.linear import linear
from allo_mini.logprobs import pack, size_of
from allo_mini.run.device import free_memory

PREFILL = 4096  # tokens of prompts that are read at a time, so that reading takes bounded memory
AHEAD = 64  # tokens that a sample can add to its slot before slots must get longer

# Its prompt's number and ids, its tokens so far; u: a random number for each that it may have
Sample = namedtuple("Sample", "number prompt u tokens")


def length(s):
    """Tokens of a sample so far, its prompt's included."""
    return len(s.prompt) + len(s.tokens)


def wanted(s):
    """Tokens that the slot of a sample should hold for now."""
    return len(s.prompt) + min(len(s.tokens) + AHEAD, len(s.u))


class Cache:
    """The running samples; their keys and values, of each layer [2, slots, g, room, d].

    room: tokens a slot holds. There are at most `slots` slots, and no more than fit in 70 % of the
    free memory.
    """

    def __init__(self, model, samples, slots):
        c = model.config
        weight = model.model.embed_tokens.weight  # never int8
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * weight.itemsize
        self.tokens = int(0.7 * free_memory(weight.device) / token)  # in all slots together
        self.most = min(slots, len(samples))
        self.longest = max(len(s.prompt) + len(s.u) for s in samples)
        self.running = []  # the sample in each slot
        empty = weight.new_zeros(2, 0, c.num_key_value_heads, 0, c.head_dim)
        self.stores = [empty for _ in model.model.layers]
        self.resize(max(map(wanted, samples)))

    def slots_of(self, room):
        """How many slots of so many tokens there can be."""
        return max(1, min(self.most, self.tokens // room))

    def resize(self, room):
        """Make slots longer, and as many as memory holds then."""
        self.room = min(room, self.longest)
        self.slots = self.slots_of(self.room)
        used = len(self.running)
        for i, old in enumerate(self.stores):
            new = old.new_zeros(2, self.slots, old.shape[2], self.room, old.shape[4])
            new[:, :used, :, :old.shape[3]] = old[:, :used]
            self.stores[i] = new

    def leave(self, i):
        """Running sample i leaves; the last one moves into its slot."""
        self.running[i] = self.running[-1]
        self.running.pop()
        for store in self.stores:
            store[:, i] = store[:, len(self.running)]

    def make_room(self, waiting):
        """Longer slots where a sample has outgrown its own; if memory has none, it joins `waiting`.

        With no sample running, slots fit the first that waits.
        """
        more = self.room * 3 // 2  # by half: copying stays rare
        if any(length(s) > self.room for s in self.running):
            if self.slots_of(min(more, self.longest)) >= len(self.running):
                self.resize(more)
            for i, s in reversed(list(enumerate(self.running))):
                if length(s) > self.room:
                    waiting.append(s)
                    self.leave(i)
        if not self.running and wanted(waiting[0]) > self.room:
            self.resize(max(more, wanted(waiting[0])))

    def admit(self, waiting):
        """Those of `waiting`, from the first on, that may begin: reading is cheap in bulk."""
        free = self.slots - len(self.running)
        if free * 8 < self.slots:
            return []
        return list(takewhile(lambda s: wanted(s) <= self.room, waiting[:free]))

    def read_prompts(self, model, fresh):
        """Prompts, and what was sampled before a sample had to wait -> who begins, hidden [n,H].

        As many begin as have PREFILL tokens at most, one at least. A prompt they share is read
        once, and its keys and values are copied to the slots of all.
        """
        examples = {}  # what is read -> its ids, and an empty response for each sample
        for s in fresh:
            key = id(s) if s.tokens else s.number
            examples.setdefault(key, (s.prompt + s.tokens, []))[1].append([])
        while len(examples) > 1 and sum(map(size_of, examples.values())) > PREFILL:
            examples.popitem()
        batch = pack(examples.values(), model.head_weight.device)
        sizes = [size for size, _ in batch.trees]
        alone = TreeAttention([(size, ()) for size in sizes])
        slot = len(self.running)

        def attend(q, k, v, layer):
            at = slot
            both = torch.stack((k, v)).split(sizes, 1)  # of each prompt [2,P,g,d]
            for prompt, (size, copies) in zip(both, batch.trees):
                end = at + len(copies)
                self.stores[layer][:, at:end, :, :size] = prompt.transpose(1, 2)[:, None]
                at = end
            return alone(q, k, v, layer)

        hidden = model(batch.input_ids, batch.positions, attend)  # [N,H]
        fresh = fresh[:len(batch.lengths)]
        self.running += fresh
        return fresh, hidden[batch.predictors]

    def read_tokens(self, model):
        """Put the newest token of every running sample into the cache -> hidden [A,H]."""
        device = model.head_weight.device
        places = [length(s) - 1 for s in self.running]
        newest = [s.tokens[-1] for s in self.running]
        newest, self.places = torch.tensor([newest, places], device=device)
        self.rows = torch.arange(len(places), device=device)
        self.used = max(places) + 1
        hidden = torch.arange(self.used, device=device) > self.places[:, None, None, None]
        # [A,1,1,used], for all layers
        self.bias = self.stores[0].new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return model(newest, self.places, self)

    def __call__(self, q, k, v, layer):
        """q [A,h,d], k and v [A,g,d] of the A running samples' newest token -> [A,h,d].

        The h/g query heads that share a key head are laid out as its queries: no key is repeated.
        """
        store = self.stores[layer]
        store[:, self.rows, :, self.places] = torch.stack((k, v), 1)
        keys, values = store[:, :len(q), :, :self.used]
        q = q.unflatten(1, (k.shape[1], -1))  # [A,g,h/g,d]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.bias).flatten(1, 2)


def pick(logits, temperature, top_p, u):
    """One token a row. logits [A,V], u [A] uniform in [0,1) -> ids [A].

    temperature 0 takes the largest logit. Else the nucleus is the smallest set of most probable
    tokens whose mass reaches top_p (arXiv 1904.09751), and u inverts its cumulative distribution.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    vocabulary = probs.shape[-1]
    size = 64 if top_p < 1 else vocabulary  # nearly always enough; all are slow
    while True:
        top, ids = probs.topk(min(size, vocabulary))  # descending
        if size >= vocabulary or (top.sum(-1) >= top_p).all():
            break
        size *= 8
    before = top.cumsum(-1) - top
    mass = (top * (before < top_p)).cumsum(-1)  # of tokens up to the one that reaches top_p
    choice = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)  # [A,1]
    return ids.gather(-1, choice)[:, 0]


def uniforms(seed, row, k, count):
    """The random stream of sample k of row `row`: [count], the same in any batch, on any device."""
    digest = hashlib.blake2b(f"{seed}/{row}/{k}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator)


@torch.inference_mode()
def sample(model, prompts, n, max_new_tokens, temperature=0.7, top_p=0.95, eos_ids=(), seed=0,
           rows=None, slots=64, max_length=10**9, stopped=lambda tokens: False,
           on_done=lambda prompt, tokens: None):
    """n responses a prompt: [prompt][k] -> ids, EOS included. ValueError for an empty prompt.

    prompts: lists of ids; eos_ids: any of them ends a response; rows: the numbers that seed each
    prompt (None: 0, 1, ...); slots: samples running at once; max_length: tokens of prompt and
    response together; stopped(tokens): whether a sample ends here, on a stop string;
    on_done(prompt, tokens): called as each ends, with its prompt's number.
    """
    if not prompts:
        return []
    waiting = []
    responses = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        most = max(1, min(max_new_tokens, max_length - len(prompt)))
        for k in range(n):
            u = uniforms(seed, rows[i] if rows else i, k, most)
            waiting.append(Sample(i, prompt, u, []))
            responses[i].append(waiting[-1].tokens)
    cache = Cache(model, waiting, slots)
    running = cache.running
    while waiting or running:
        cache.make_room(waiting)
        fresh = cache.admit(waiting)
        if fresh:
            fresh, hidden = cache.read_prompts(model, fresh)
            del waiting[:len(fresh)]
        else:
            fresh, hidden = running, cache.read_tokens(model)
        u = torch.stack([s.u[len(s.tokens)] for s in fresh]).to(hidden.device)
        tokens = pick(linear(hidden, model.head_weight), temperature, top_p, u).tolist()
        for s, token in zip(fresh, tokens):
            s.tokens.append(token)
        for i, s in reversed(list(enumerate(running))):
            if len(s.tokens) == len(s.u) or s.tokens[-1] in eos_ids or stopped(s.tokens):
                on_done(s.number, s.tokens)
                cache.leave(i)
    return responses


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, eos_ids=(), **more):
    """One response a prompt, greedy unless a temperature is given -> ids, prompt not included."""
    responses = sample(model, prompts, 1, max_new_tokens, temperature, top_p, eos_ids, **more)
    return [tokens for [tokens] in responses]
