"""What each stage needs of a GPU's memory, term by term, and of the host's; the settings that fit a card.

    python train.py --memory 12gb ...       prints its estimate for the model at hand, and trains with what it chose

All numbers here are estimates, in bytes, of what torch allocates at a stage's peak; what was measured is printed after
each stage. T tokens of a micro-batch, H hidden size, I intermediate size, n trained weights; see model.py for the rest.
"""

from dataclasses import replace
from itertools import pairwise

from allo_mini import UserError, parallel
from allo_mini.architecture import ModelConfig, cache_bytes
from allo_mini.config import SETTINGS, STAGES, Config
from allo_mini.device import free_memory, host_memory
from allo_mini.generate import PREFILL
from allo_mini.linear import is_quantized
from allo_mini.log import say, table
from allo_mini.selection import CHUNK, row_edges

CARDS = {"24gb": 23.0, "16gb": 15.0, "12gb": 11.0, "8gb": 7.0}  # GiB for us: the card less context, desktop, driver
SPARE = 0.96  # of that is planned with; the rest is for fragments and what the formulas leave out
LADDER = ({}, {"state_bits": 8}, {"offload": "state"}, {"offload": "gradient"},  # from fastest to leanest
          {"int8": True, "state_bits": 8}, {"int8": True, "offload": "state"}, {"int8": True, "offload": "gradient"},
          {"int8": True, "offload": "gradient", "head_mb": 64},
          {"int8": True, "offload": "gradient", "head_mb": 64, "p_sft": 5.0},
          {"int8": True, "offload": "gradient", "head_mb": 64, "p_sft": 5.0, "stream": True, "locate_groups": 12})
TRAINING = (*STAGES, *SETTINGS)  # the stages that train
LOCATING = ("locate", "sft-locate", "reward-locate")  # the stages that make the gradient of all weights


def percent_of(cfg: Config, stage: str) -> float:
    """How many percent of the weights a stage trains."""
    if stage in ("sft", "reward"):
        return 100 if stage == "reward" and cfg.reward_base else cfg.p_sft or 100
    masked = stage in ("forget", "improve") or cfg.mask_source != "auto"
    if cfg.mask_source == "none" or stage == "warmup" or not masked:
        return 100
    return (cfg.p_forget if stage == "forget" else cfg.p_improve) or cfg.p


def block_bytes(c: ModelConfig, size: int) -> int:
    """What one block keeps of a token for its backward pass."""
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norms = 2 * 2 * size * c.hidden_size  # each keeps its input and its output
    attention = size * (3 * q + 2 * kv)  # rotated q, k, and v, the output in both orders of its axes
    mlp = size * 3 * c.intermediate_size  # gate, up, silu(gate) * up
    return norms + attention + mlp


def at_work(cfg: Config, c: ModelConfig, size: int, share: float, checkpointed: bool) -> int:
    """The larger of two moments of a backward pass: in an MLP, and in the LM head; share of the weights is trained."""
    tokens, inner, logits = cfg.micro_tokens, size * c.intermediate_size, cfg.head_mb * 2**20
    # bytes an entry: rows of dW, of dequantised W, of codes that came from the host; positions int64
    part = size * (3 if cfg.int8 else 1) + cfg.stream + 24 * share
    block = tokens * inner + max(min(c.intermediate_size * c.hidden_size, CHUNK) * part, tokens * inner)
    head = max(3 * logits, logits + min(c.vocab_size * c.hidden_size, CHUNK) * part) + 2 * tokens * size * c.hidden_size
    return int(max(block + tokens * block_bytes(c, size) * checkpointed, head))


def weight_bytes(shapes: dict, size: int, cfg: Config) -> int:
    """The model at rest; of an int8 matrix a byte for each entry (streamed: none), and a scale for each 256 of them."""
    entry = (0 if cfg.stream else 1) + 1 / 64
    return sum(int(shape.numel() * (entry if cfg.int8 and is_quantized(name, shape) else size))
               for name, shape in shapes.items())


def estimate(stage: str, cfg: Config, c: ModelConfig, shapes: dict, size: int = 2, groups: int = 1) -> dict[str, int]:
    """{term: bytes} of one stage; size: bytes of an unquantized weight."""
    every, tokens = sum(s.numel() for s in shapes.values()), cfg.micro_tokens
    if stage in TRAINING and percent_of(cfg, stage) == 100:
        # no int8, as Run.load has it; and no counting on the host, which would have to hold 20 bytes a weight
        cfg = replace(cfg, int8=False, stream=False, offload="none")
    terms = {"weights": weight_bytes(shapes, size, cfg)}
    if stage in TRAINING:
        n = int(every * percent_of(cfg, stage) / 100)
        if n < every:
            terms |= {"positions": n + every / 128, "exact entries": n * size if cfg.int8 else 0}
        state, gradient = trained_bytes(cfg)
        terms |= {"optimizer": n * state, "gradient": n * gradient}
    if stage in LOCATING and cfg.offload != "gradient":
        terms["gradient"] = 4 * largest_group(shapes, groups)
    if stage in TRAINING or stage in LOCATING:
        blocks = min(cfg.checkpoint_blocks, c.num_hidden_layers) if cfg.checkpoint_blocks >= 0 else c.num_hidden_layers
        terms["activations"] = tokens * (size * c.hidden_size * (blocks + 3)
                                         + block_bytes(c, size) * (c.num_hidden_layers - blocks))
        terms["at work"] = at_work(cfg, c, size, percent_of(cfg, stage) / 100 if stage in TRAINING else 0, blocks > 0)
    if stage == "sample":
        terms["KV cache"] = cfg.sample_batch * cfg.max_length * cache_bytes(c, size)
        terms["logits"] = cfg.sample_batch * c.vocab_size * 10
        a_token = 3 * c.intermediate_size + 4 * c.hidden_size + 3 * c.num_attention_heads * c.head_dim
        reading = max(PREFILL, cfg.max_length) * size * a_token  # the prompts of new samples; one is read whole
        terms["at work"] = reading + (2 * size + cfg.stream) * CHUNK * cfg.int8
    if stage == "score":
        terms["at work"] = at_work(cfg, c, size, 0, False) + 8 * tokens * size * c.hidden_size
    return {name: int(value) for name, value in terms.items() if value}


def tensor_groups(shapes: dict, groups: int) -> list[list[str]]:
    """Names of the model's tensors in about so many consecutive groups of alike size; a tensor is never cut."""
    most, out = -(-sum(s.numel() for s in shapes.values()) // groups), [[]]
    for name in shapes:
        if out[-1] and sum(shapes[n].numel() for n in [*out[-1], name]) > most:
            out.append([])
        out[-1].append(name)
    return out


def largest_group(shapes: dict, groups: int) -> int:
    """How many weights are located at a time, at most."""
    return max(sum(shapes[name].numel() for name in names) for names in tensor_groups(shapes, groups))


def stages_of(cfg: Config) -> list[str]:
    """The stages of a run that hold a model on the device, in order."""
    sft, allo = cfg.sft or cfg.only_sft, "allo" in cfg.method
    located = 0 < cfg.p_sft < 100  # what sft and the rewriting model train
    measured = not cfg.mask and (cfg.mask_source in ("top", "bottom") or (cfg.mask_source == "auto" and allo))
    scored = allo and cfg.forget and cfg.token_weights not in ("edit", "uniform") and not cfg.token_weights_file
    rewriter = scored and not cfg.reward_model
    wanted = {"sft-locate": sft and located, "sft": sft}
    if not cfg.only_sft:
        wanted |= {"sample": not (cfg.pairs or cfg.samples)}
        wanted |= {"more-sft" if method == "sft" else method: method != "allo" for method in cfg.method}
        wanted |= {"warmup": measured and cfg.locate in ("auto", "movement"), "locate": measured,
                   "reward-locate": rewriter and located and not cfg.reward_base, "reward": rewriter,
                   "score": scored, "forget": allo and cfg.forget, "improve": allo}
    return [stage for stage, runs in wanted.items() if runs]


def plan(cfg: Config, c: ModelConfig, shapes: dict, size: int = 2,
         rewriter: tuple[ModelConfig, dict] | None = None) -> tuple[Config, dict[str, dict[str, int]]]:
    """--memory: the settings of the first rung of LADDER with which every stage fits, and {stage: {term: bytes}}.

    c, shapes, size: the policy's config, its parameters' shapes by name, bytes of a weight; rewriter: as in needs_of.
    Raises UserError naming the stage, what it needs and the flag to change when none does.
    """
    room = SPARE * CARDS[cfg.memory] * 2**30
    cfg = replace(cfg, locate="snr" if cfg.locate == "auto" else cfg.locate, int8=cfg.int8 or cfg.stream)
    every = sum(s.numel() for s in shapes.values())
    p_sft = cfg.p_sft or (100.0 if room > 18 * every else 10.0)  # bytes: bf16 weight, fp32 master, gradient and moments

    def needs(tried):
        return needs_of(tried, c, shapes, size, rewriter)

    def fits(tried):
        return all(sum(terms.values()) <= room for terms in needs(tried).values())

    for rung in LADDER:
        tried = replace(cfg, **{"p_sft": p_sft, **rung}, checkpoint_blocks=-1, micro_tokens=2 * cfg.max_length)
        tried = replace(tried, p_sft=cfg.p_sft or tried.p_sft)  # what was asked for stays
        one = estimate("sample", replace(tried, sample_batch=1), c, shapes, size)
        slots = int((room - one["weights"] - one["at work"]) / (one["KV cache"] + one["logits"]))
        tried = replace(tried, sample_batch=max(1, min(cfg.sample_batch, slots)))
        beside = sum(v for term, v in estimate("locate", tried, c, shapes, size).items() if term != "gradient")
        groups = -(-4 * every // max(1, int(room - beside)))
        tried = replace(tried, locate_groups=cfg.locate_groups or min(len(shapes), tried.locate_groups or groups))
        if fits(tried):
            layers = max(model.num_hidden_layers for model in (c, *(rewriter or ())[:1]))
            chosen = spend(tried, fits, layers)
            return chosen, needs(chosen)
    sums = {stage: sum(terms.values()) for stage, terms in needs(tried).items()}
    worst = max(sums, key=sums.get)
    smaller = "take a smaller --reward-base" if cfg.reward_base else "lower --p-sft"
    hints = dict.fromkeys(cfg.method, "use --method allo, or --mask-source top (all weights are trained there)") | {
        "warmup": "use --locate snr", "sft": "lower --p-sft or --max-length", "sample": "lower --max-length",
        "reward": f"{smaller}, or use --token-weights edit"}
    raise UserError(f"--memory is {cfg.memory}, which leaves {room / 1e9:.1f} GB; {worst} needs "
                    f"{sums[worst] / 1e9:.1f} GB of it at best: "
                    + hints.get(worst, "lower --p or --max-length, or take a larger --memory"))


def needs_of(cfg: Config, c: ModelConfig, shapes: dict, size: int,
             rewriter: tuple[ModelConfig, dict] | None = None) -> dict[str, dict[str, int]]:
    """{stage: {term: bytes}} of all stages of a run with these settings.

    rewriter: config and shapes of the rewriting model where that is another than the policy.
    """
    others = {"reward": rewriter, "score": rewriter} if rewriter else {}
    return {stage: estimate(stage, cfg, *others.get(stage, (c, shapes)), size, cfg.locate_groups or 1)
            for stage in stages_of(cfg)}


def spend(cfg: Config, fits, layers: int) -> Config:
    """Use what is left: larger micro-batches first, then fewer blocks that recompute their activations.

    fits: whether every stage does with the settings it is given; with `cfg`, in which all blocks recompute, it is so.
    """
    larger = (replace(cfg, micro_tokens=tokens) for tokens in (16384, 8192, 4096) if tokens > cfg.micro_tokens)
    cfg = next(filter(fits, larger), cfg)
    return next(filter(fits, (replace(cfg, checkpoint_blocks=blocks) for blocks in range(layers + 1))))


def blocks_to_checkpoint(cfg: Config, c: ModelConfig, trained: int, device: str, size: int) -> int:
    """How many blocks must recompute their activations, given what is free now, with the model in place; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    free = free_memory(device) * SPARE - at_work(cfg, c, size, 0.1, True) - trained * sum(trained_bytes(cfg))
    free -= size * c.hidden_size * c.num_hidden_layers * cfg.micro_tokens  # every block's input
    return max(0, c.num_hidden_layers - max(0, int(free / (block_bytes(c, size) * cfg.micro_tokens))))


def trained_bytes(cfg: Config) -> tuple[float, int]:
    """Bytes on the card for a weight in training: of master and moments (8-bit ones have two scales for every 256), of
    its gradient."""
    state = 4 + (8 if cfg.state_bits == 32 else 2 + 8 / 256)
    return state if cfg.offload == "none" else 0, 0 if cfg.offload == "gradient" else 4


def host_bytes(stage: str, cfg: Config, shapes: dict, pinned: bool = False) -> int:
    """What a stage (a rank of it) keeps in host memory: the values that its weights began with, and the best ones of
    --eval-every; what --offload and --stream move there; the sums of snr. pinned: for a GPU, whose access to master,
    gradient and streamed weights takes memory that torch rounds up to a power of two."""
    size, shared = 0, []  # shared: bytes of each vector and matrix that the GPU has access to
    if stage in TRAINING:
        n = int(sum(s.numel() for s in shapes.values()) * percent_of(cfg, stage) / 100)
        moved = sum(trained_bytes(replace(cfg, offload="none"))) - sum(trained_bytes(cfg))
        size = int(n * (moved + (8 if cfg.eval_every else 4)))
        shared = {"none": 0, "state": 1, "gradient": 2}[cfg.offload] * [4 * n]
    elif stage in LOCATING:
        n = largest_group(shapes, cfg.locate_groups or 1)
        shared = [4 * n] if cfg.offload == "gradient" else []
        size = 8 * n * (cfg.locate == "snr" and stage == "locate") + sum(shared)
    if cfg.stream and not (stage in TRAINING and percent_of(cfg, stage) == 100):
        codes = [(end - begin) * shape[1] for name, shape in shapes.items() if is_quantized(name, shape)
                 for begin, end in pairwise(row_edges(shape, "cuda"))]
        size, shared = size + sum(codes), shared + codes
    return size + pinned * sum((1 << (bytes - 1).bit_length()) - bytes for bytes in shared)


def advice(cfg: Config) -> str:
    """What to change after memory ran out."""
    leaner = [card for card in CARDS if not cfg.memory or CARDS[card] < CARDS[cfg.memory]]
    card = f"use --memory {leaner[0]}, or " if leaner else ""
    return f"out of memory: {card}lower --micro-tokens, --sample-batch, --p or --max-length"


def show(cfg: Config, needs: dict[str, dict[str, int]], shapes: dict,
         rewriter: tuple[ModelConfig, dict] | None = None) -> None:
    """Print the chosen settings, the estimate, term by term, what the host has to hold, how often locating reads."""
    chosen = ("int8", "stream", "state_bits", "offload", "locate", "p_sft", "micro_tokens", "checkpoint_blocks",
              "sample_batch", "head_mb")
    say(f"--memory {cfg.memory}: " + ", ".join(f"{key} {getattr(cfg, key)}" for key in chosen))
    show_needs(needs)
    others = dict.fromkeys(("reward", "score"), rewriter[1]) if rewriter else {}
    host = {stage: host_bytes(stage, cfg, others.get(stage, shapes), pinned=True) for stage in needs}
    host |= {stage: parallel.HERE * host[stage] for stage in host if stage in TRAINING}
    worst, there = max(host, key=host.get), host_memory()
    say(f"host memory: {worst} keeps {host[worst] / 1e9:.1f} GB there, beside what Python and torch take" + (
        f"   <-- WARNING: this machine has {there / 1e9:.1f} GB; lower --p or --p-sft, or raise --locate-groups"
        if host[worst] > SPARE * there > 0 else ""))
    if "locate" in needs:
        say(f"locate: {len(tensor_groups(shapes, cfg.locate_groups))} passes over at most {cfg.locate_pairs} pairs\n")


def show_needs(needs: dict[str, dict[str, int]]) -> None:
    """Print {stage: {term: bytes}} as a table in GB."""
    names = list(dict.fromkeys(term for terms in needs.values() for term in terms))
    rows = ([*(terms.get(name) for name in names), sum(terms.values())] for terms in needs.values())
    say(table(["estimate in GB", *names, "sum"],
              [[stage, *(f"{value / 1e9:.2f}" if value else "-" for value in row)] for stage, row in zip(needs, rows)]))
