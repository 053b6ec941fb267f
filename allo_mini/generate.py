"""Sampling with a key/value cache: many prompts at once, n samples a prompt, samples come and go.

    slots     | a1 a2 a3 b1 b2 b3 c1 c2 .. |      one running sample each; the first A are in use

A prompt is read once and its keys and values are copied to its samples' slots. A finished sample
leaves at once: the last running one moves into its slot, and when enough slots are free the next
samples begin. Every sample draws from its own random stream, seeded by (seed, row, k), so company
does not change what it says.
"""

import hashlib
from collections import namedtuple

import torch
import torch.nn.functional as F

from allo_mini.attention import TreeAttention
from allo_mini.linear import linear
from allo_mini.logprobs import pack, size_of
from allo_mini.run.device import free_memory

PREFILL = 4096  # tokens of prompts that are read at a time, so that reading takes bounded memory

# Its prompt's number and ids, its random stream (as long as it may get), its tokens so far
Sample = namedtuple("Sample", "number prompt u tokens")


class Cache:
    """Keys and values of all running samples: of each layer [2, slots, g, room, d].

    At most `slots`, and no more than 60 % of the free memory holds, at full length.
    """

    def __init__(self, model, samples, slots):
        self.longest = max(len(s.prompt) + len(s.u) for s in samples)
        c = model.config
        weight = model.model.embed_tokens.weight  # never int8
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * weight.itemsize
        fit = int(0.6 * free_memory(weight.device) / (self.longest * token))
        self.slots = max(1, min(slots, len(samples), fit))
        room = min(max(len(s.prompt) for s in samples) + 64, self.longest)
        shape = 2, self.slots, c.num_key_value_heads, room, c.head_dim
        self.stores = [weight.new_zeros(shape) for _ in model.model.layers]

    def read_prompts(self, model, waiting, slot):
        """The first of `waiting` get the slots from `slot` on -> they, hidden [n,H] to go on from.

        As many as have PREFILL prompt tokens at most, one at least. A prompt they share is read
        once, and its keys and values are copied to the slots of all.
        """
        examples = {}  # a prompt's number -> its ids, the tokens (none yet) of each of its samples
        for s in waiting:
            examples.setdefault(s.number, (s.prompt, []))[1].append(s.tokens)
        while len(examples) > 1 and sum(map(size_of, examples.values())) > PREFILL:
            examples.popitem()
        batch = pack(examples.values(), model.head_weight.device)
        sizes = [size for size, _ in batch.trees]
        alone = TreeAttention([(size, (0,)) for size in sizes])

        def attend(q, k, v, layer):
            at = slot
            both = torch.stack((k, v)).split(sizes, 1)  # of each prompt [2,P,g,d]
            for prompt, (size, copies) in zip(both, batch.trees):
                end = at + len(copies)
                self.stores[layer][:, at:end, :, :size] = prompt.transpose(1, 2)[:, None]
                at = end
            return alone(q, k, v, layer)

        hidden = model(batch.input_ids, batch.positions, attend)  # [N,H]
        return waiting[:len(batch.lengths)], hidden[batch.predictors]

    def read_tokens(self, model, running):
        """Put the newest token of every running sample into the cache -> hidden [A,H]."""
        device = model.head_weight.device
        lengths = [len(s.prompt) + len(s.tokens) - 1 for s in running]
        newest = [s.tokens[-1] for s in running]
        newest, self.lengths = torch.tensor([newest, lengths], device=device)
        self.rows = torch.arange(len(running), device=device)
        self.used = max(lengths) + 1
        room = self.stores[0].shape[3]
        if self.used > room:
            more = min(room // 2, self.longest - room)  # by half: copying stays rare
            for i, store in enumerate(self.stores):
                self.stores[i] = F.pad(store, (0, 0, 0, more))
        hidden = torch.arange(self.used, device=device) > self.lengths[:, None, None, None]
        zeros = self.stores[0].new_zeros(hidden.shape)
        self.bias = zeros.masked_fill_(hidden, -torch.inf)  # [A,1,1,used], for all layers
        return model(newest, self.lengths, self)

    def __call__(self, q, k, v, layer):
        """q [A,h,d], k and v [A,g,d] of the A running samples' newest token -> [A,h,d].

        The h/g query heads that share a key head are laid out as its queries: no key is repeated.
        """
        store = self.stores[layer]
        store[:, self.rows, :, self.lengths] = torch.stack((k, v), 1)
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
    top, ids = probs.topk(min(size, vocabulary))  # descending
    while size < vocabulary and (top.sum(-1) < top_p).any():
        size *= 8
        top, ids = probs.topk(min(size, vocabulary))
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
    waiting, running = [], []
    responses = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        most = max(1, min(max_new_tokens, max_length - len(prompt)))
        for k in range(n):
            u = uniforms(seed, rows[i] if rows else i, k, most)
            waiting.append(Sample(i, prompt, u, []))
            responses[i].append(waiting[-1].tokens)
    cache = Cache(model, waiting, slots)
    while waiting or running:
        free = cache.slots - len(running)
        if waiting and free * 8 >= cache.slots:  # reading is cheap in bulk
            fresh, hidden = cache.read_prompts(model, waiting[:free], len(running))
            running += fresh
            del waiting[:len(fresh)]
        else:
            fresh, hidden = running, cache.read_tokens(model, running)
        u = torch.stack([s.u[len(s.tokens)] for s in fresh]).to(hidden.device)
        tokens = pick(linear(hidden, model.head_weight), temperature, top_p, u).tolist()
        for s, token in zip(fresh, tokens):
            s.tokens.append(token)
        for i in reversed(range(len(running))):
            s = running[i]
            if len(s.tokens) == len(s.u) or s.tokens[-1] in eos_ids or stopped(s.tokens):
                on_done(s.number, s.tokens)
                running[i] = running[-1]  # the last one moves into the gap
                running.pop()
                for store in cache.stores:
                    store[:, i] = store[:, len(running)]
    return responses


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, eos_ids=(), **more):
    """One response a prompt, greedy unless a temperature is given -> ids, prompt not included."""
    responses = sample(model, prompts, 1, max_new_tokens, temperature, top_p, eos_ids, **more)
    return [tokens for [tokens] in responses]
