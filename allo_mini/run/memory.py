"""What is printed before training: stages with their rows, steps, rates and the memory they need.

Bytes are estimates of what torch allocates at a stage's peak; what was measured is printed after
each.
"""

from allo_mini.linear import is_quantized
from allo_mini.logprobs import HEAD_BYTES
from allo_mini.mask import CHUNK
from allo_mini.run.config import schedule, training_stages
from allo_mini.run.device import free_memory
from allo_mini.run.log import say, table


def estimate(run, stage, percent):
    """{term: bytes on the device} of a stage that trains so many percent of the weights: T tokens
    at a time, n trained weights."""
    cfg = run.cfg
    c = run.config
    size = run.dtype.itemsize
    share = percent / 100
    n = run.parameters * share
    # a pair is never parted, nor is a rewriting prompt
    T = max(cfg.micro_tokens, (2 + (stage == "rewrite")) * cfg.max_length)
    int8 = cfg.int8 and share < 1  # a byte a weight, and a scale for each block of 256
    weights = sum(shape.numel() * (1 + 1 / 64 if int8 and is_quantized(name, shape) else size)
                  for name, shape in run.shapes.items())
    # q, rotated q and the output; k and v; of the MLP gate, up and their product
    heads = (3 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    block = T * size * (4 * c.hidden_size + heads + 3 * c.intermediate_size)
    # of every block, of the last norm and the head
    inputs = T * size * c.hidden_size * (c.num_hidden_layers + 3)
    return {"weights": weights, "positions": n * (2 + size * int8) if share < 1 else 0,
            "optimizer": 0 if cfg.offload else n * (8 + cfg.state_bits / 4),
            "activations": inputs + block * (1 if cfg.recompute else c.num_hidden_layers),
            "at work": max(3 * HEAD_BYTES, T * size * c.intermediate_size + 3 * CHUNK * size)}


def locate_groups(run):
    """In how many passes the gradient of all weights is made, so that it and its sums fit: with snr
    12 bytes a weight in half of the host's memory, or of the card's if they stand there."""
    room = free_memory("cpu")
    if run.device.startswith("cuda") and not run.cfg.offload:
        room = free_memory(run.device) // 2
    return -(-12 * run.parameters // room)


def show_plan(run):
    """Print what the run is going to do: a line for each training stage."""
    cfg = run.cfg
    lines = []
    if not run.pairs and not cfg.sft_alone and not run.has("samples.jsonl"):
        asked = len(run.questions[:cfg.sample_questions or None])
        say(f"samples {cfg.n} responses to each of {asked} questions first")
    for stage, percent in training_stages(cfg).items():
        rows = len(run.tasks if "sft" in stage and run.tasks else run.pairs)  # 0: to be sampled
        plan = schedule(cfg, stage, run.parameters, rows or 10**9)
        steps = -(-round(rows * plan.epochs) // plan.batch)
        steps = min(steps, cfg.max_steps or steps)
        size = sum(estimate(run, stage, percent).values()) / 1e9
        optimizer = run.parameters * percent / 100 * (12 + cfg.state_bits / 4) / 1e9
        lines.append([stage, f"{rows or 'sampled'}", f"{steps or '?'}",
                      f"{plan.batch if steps else '?'}", f"{plan.lr:g}", f"{percent:g} %",
                      f"{size:.1f} GB" + f" + {optimizer:.1f} on the host" * cfg.offload])
    say(table(
        ["stage", "rows", "steps", "rows a step", "peak rate", "weights", "memory (estimate)"],
        lines) + "\n")
