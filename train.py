"""ALLO (arXiv 2406.12606): few weights of a language model, trained on few tokens, in two phases.

    sft      optional supervised fine-tuning              theta_ref of everything below
    sample   n responses a question, labelled by their final answer -> pairs (y+, y-), negatives y-
    warmup   one epoch of DPO; how far each weight moves is its importance
    locate   the top p % of all weights are the "neurons" that may change; theta is put back
    rewrite  a rewriting model (a copy of theta_ref) scores the tokens of y-
    forget   token-weighted NPO on the unaligned tokens (of low score), masked weights only
    improve  DPO whose rejected side counts only the most useful tokens, masked weights only

Departures from the official code, and why:
 a. It first cuts each tensor to its own top 2p %: 5 % became 21 %; our top p % is exact and global.
 b. It keeps epsilon x padded width tokens, a log-ratio of 0 is padding; we count response tokens.
 c. Its forgetting collator shifts the prompt mask in ragged batches and loses tokens; we never pad.
 d. Its optimizer keeps full-size moments and decays unselected weights; ours knows the selected.
 e. It clips by the dense gradient's norm; we clip by the selected entries'.
 f. It averages losses per micro-batch; we normalise over the whole step.
 g. Its rewards/* are per token at equal index; ours per sequence, TRL's names and meanings.
 h. Its AdamW adds eps before bias correction; ours follows torch.optim.AdamW.
 i. It rewrites with GPT-4; we use the data's rewrite, else the policy's nearest correct sample,
    else the reference solution.
 j. Sampled responses that hit the length limit are left out: nobody saw how they end.
"""

import functools
import random
import sys
from collections import defaultdict

import torch

from allo_mini import UserError
from allo_mini.data.rows import Negative, Pair, turns_of
from allo_mini.evaluation.answers import label, read_samples, respond
from allo_mini.evaluation.graders import is_correct
from allo_mini.evaluation.report import TOKENS, describe_mask, finish, record_tokens, reprint
from allo_mini.locate import gradient_importance, random_importance
from allo_mini.logprobs import micro_batches, responses_of, size_of, with_reference
from allo_mini.mask import select_neurons, to_tensors
from allo_mini.masked_adamw import MaskedAdamW, cosine_lr
from allo_mini.objectives import BASELINES, dpo_objective, npo_objective, sft_objective
from allo_mini.patch import begin_at, save_patch
from allo_mini.run import parallel
from allo_mini.run.config import parse, schedule
from allo_mini.run.files import (append_rows, keep_whole, load_tensors, read_jsonl, reading,
                                 write_jsonl)
from allo_mini.run.folder import Policy, load_mask, open_run
from allo_mini.run.log import Progress, exit_code, progress, say
from allo_mini.run.memory import locate_groups, show_plan
from allo_mini.token_weights import (edit_weights, read_scores, rewrite_examples, token_scores,
                                     weights_from_scores)

MOVEMENT, SAMPLES = "movement.safetensors", "samples.jsonl"
GROUP = 64  # questions sampled together: a restart goes on between two groups, and changes nothing


# ---- the training loop -------------------------------------------------------------------------

def optimize(run, name, policy, examples, objective, mask=None):
    """Train a policy; only the weights in `mask` (None: all) move. Returns (model, optimizer)."""
    cfg = run.cfg
    model = run.load(policy, mask, training=True)
    plan = schedule(cfg, name, run.parameters, len(examples))
    planned = steps_of(examples, plan.batch, plan.epochs, cfg.seed)[:cfg.max_steps or None]
    steps = [step for step in planned if sum(map(objective.units, step))]
    if not steps:
        raise UserError(f"{name}: no token of {len(examples)} rows has a weight to train on")
    optimizer = MaskedAdamW(model.named_parameters(), mask, weight_decay=cfg.weight_decay,
                            state_bits=cfg.state_bits, offload=cfg.offload)
    for path in policy.changes:
        begin_at(optimizer, path)
    shares = [step[parallel.RANK::parallel.WORLD] for step in steps]  # without torchrun all
    if objective.first_loss:
        shares = [with_reference(model, share, cfg.micro_tokens)
                  for share in progress(shares, f"{name}: reference", "step")]
    place = Progress(run, name, len(steps), optimizer, objective)
    say(f"{name}: {len(examples)} rows, {len(steps)} steps of {plan.batch}, lr {plan.lr:g}, "
        f"{len(optimizer.master):,} weights in training")

    for at in progress(range(place.step, len(steps)), name, "step"):
        step = steps[at]
        sums = defaultdict(float)
        units = sum(map(objective.units, step))  # of the whole step (departure f)
        for micro in micro_batches(shares[at], cfg.micro_tokens):
            logps, ref, real = responses_of(model, micro)  # [R,T]
            loss, metrics = objective.loss(logps, ref, real, micro)
            (loss / units).backward()  # adds the selected weights' gradients to optimizer.grad
            metrics["loss"] = loss * (len(step) / units)
            for key, values in metrics.items():
                sums[key] += values.detach().float().sum()  # on the device: nothing waits
            del logps, ref, real, loss, metrics, values  # before the next ones need the room
        if parallel.WORLD > 1:
            sums = parallel.sum_up(optimizer.grad, sums, run.device)
        totals = torch.stack(list(sums.values())).tolist()
        metrics = {key: total / len(step) for key, total in zip(sums, totals)}
        metrics["grad_norm"] = optimizer.clip(cfg.clip)
        place.check(metrics, step)
        optimizer.lr = cosine_lr(at, len(steps), plan.lr, plan.warmup)
        optimizer.step()
        objective.after(metrics)
        # of the steps that are taken
        metrics["epoch"] = min(plan.epochs, (at + 1) * plan.batch / len(examples))
        place.after_step(metrics, sum(map(size_of, step)), model)
    run.report_change(name, optimizer, len(planned) - len(steps))
    optimizer.close()  # the parameters are ordinary again; its vectors stay
    return model, optimizer


def steps_of(examples, batch, epochs, seed):
    """The examples of every step: seeded shuffles laid end to end, then cut into batches."""
    order = []
    rng = random.Random(seed)
    total = round(len(examples) * epochs)
    while len(order) < total:
        epoch = list(examples)
        rng.shuffle(epoch)
        order += epoch
    del order[total:]
    return [order[at:at + batch] for at in range(0, total, batch)]


# ---- the stages: each makes one artefact, and is skipped when that is there --------------------
# run: a Run; policy: the Policy, a model on disk, that a stage begins with and many return;
# examples, pairs: functions that return the encoded rows, called where they are needed;
# negatives: Negatives, wrong responses with what they are to be.

def trained(run, name, policy, examples, objective, mask, artefact="", whole=True):
    """What training `policy` ends in. whole: a model folder; else its fp32 weights in `mask`."""
    artefact = artefact or (name if whole else f"{name}.safetensors")

    def make(target):
        model, optimizer = optimize(run, name, policy, examples(), objective, mask)
        run.save(model if whole else to_tensors(*optimizer.selected_weights()), target)

    path = run.stage(name, artefact, make, ranks=True)
    return Policy(path) if whole else Policy(policy.folder, (*policy.changes, path))


def fine_tuned(run, name, policy, examples, artefact=""):
    """`policy` after SFT of all its weights, or of the --p-sft % with the largest gradient."""
    objective = sft_objective()
    mask = top(run, f"mask-{name}", run.cfg.p_sft or 100,
               policy, examples, objective, "gradient")
    return trained(run, name, policy, examples, objective, mask, artefact)


def solutions(run):
    """Examples of questions and their reference solutions; of preferences, of what was chosen."""
    rows = [(task.prompt, [turns_of(task.output, "assistant")]) for task in run.tasks]
    return run.encoded(rows or chosen(run), "training rows")


def chosen(run):
    """Questions and what was chosen, of preferences."""
    return [(pair.prompt, [pair.chosen]) for pair in run.pairs]


def sample(run, policy):
    """n responses a question, in fixed groups of questions so that a restart changes nothing."""
    cfg = run.cfg
    asked = run.questions[:cfg.sample_questions or None]

    def make(target):
        model = run.load(policy)
        growing = run.folder / "samples.part.jsonl"
        done = keep_whole(growing, GROUP, len(asked))
        bar = progress(None, "sample", "response", len(asked) * cfg.n)
        bar.update(done * cfg.n)
        for at in range(done, len(asked), GROUP):
            tasks = asked[at:at + GROUP]
            texts = respond(model, run.encoder, [task.prompt for task in tasks], cfg, cfg.n,
                            cfg.temperature, rows=[task.id for task in tasks],
                            on_done=lambda *_: bar.update())
            append_rows(growing, map(sample_row, tasks, texts))
            run.log.note_time("sample")
        growing.rename(target)
        run.report_dropped("questions", len(asked))

    run.stage("sample", SAMPLES, make)


def sample_row(task, responses):
    """A line of samples.jsonl: the responses that ended by themselves, and how many did not."""
    texts = [text for text, finished in responses if finished]
    return {"input": task.question, "samples": texts, "unfinished": len(responses) - len(texts)}


def preferences(run):
    """Samples labelled by their final answer -> random Pairs (y+, y-), and every y- to forget."""
    if run.pairs:
        return run.pairs, [
            Negative(pair.prompt, pair.rejected, pair.chosen, pair.rewrite or pair.chosen)
            for pair in run.pairs if pair.rejected != pair.chosen]
    wrong = run.folder / "negatives.jsonl"

    def make(target):
        samples = read_samples(run.folder / SAMPLES)
        pairs, negatives = label(run.questions, samples, run.cfg.pairs_per_question, run.cfg.seed,
                                 run.encoder)
        if not pairs:
            raise UserError("no question has a right and a wrong sample: fine-tune first (--sft), "
                            "sample more (--n), or try another --prompt or --stop, in a new --out")
        write_jsonl(wrong, [n._asdict() for n in negatives])
        write_jsonl(target, map(vars, pairs))

    path = run.stage("label", "pairs.jsonl", make)
    with reading(f"{path} or {wrong}"):
        pairs = [Pair(**row) for _, row in read_jsonl(path)]
        return pairs, [Negative(**row) for _, row in read_jsonl(wrong)]


def warmup(run, policy, pairs):
    """An epoch of DPO; keeps |theta' - theta| of every weight in fp32, before any rounding."""
    def make(target):
        _, optimizer = optimize(run, "warmup", policy, pairs(), dpo_objective(run.cfg.beta))
        run.save(optimizer.shaped(optimizer.moved()), target)

    run.stage("warmup", MOVEMENT, make, ranks=True)


def locate(run, policy, pairs):
    """The masks of forgetting and of improving; None where all weights are trained."""
    cfg = run.cfg
    source = policy, pairs, dpo_objective(cfg.beta), cfg.locate
    improving = forgetting = top(run, "mask", cfg.p, *source)
    if cfg.p_forget and cfg.forget:
        forgetting = top(run, "mask-forget", cfg.p_forget, *source)
    return forgetting, improving


def top(run, name, percent, policy, examples, objective, how):
    """The mask `name` of the top `percent` of all weights by their importance; None: of all."""
    if percent == 100:
        return None
    artefact = f"{name}.safetensors"
    if how == "movement" and not run.has(artefact):
        warmup(run, policy, examples)

    def make(target):
        importance = importance_of(run, policy, examples, objective, how)
        run.save_mask(select(importance, percent, run.device), target)

    mask = load_mask(run.stage(name, artefact, make), run.shapes)
    describe_mask(run, name, mask, percent)  # one laid in may be of another size
    return mask


def importance_of(run, policy, examples, objective, how):
    """{tensor's name: how much each of its weights matters}; `how`: a choice of --locate."""
    cfg = run.cfg
    if how == "random":
        return random_importance(run.shapes, cfg.seed)
    if how == "movement":
        moved, _ = load_tensors(run.folder / MOVEMENT)
        if {name: values.shape for name, values in moved.items()} != run.shapes:
            raise UserError(f"{run.folder / MOVEMENT}: of another model")
        return moved
    return gradient_importance(run.load(policy), examples()[:cfg.locate_pairs], objective,
                               run.folder, how == "snr", locate_groups(run), cfg.micro_tokens,
                               cfg.offload)


def select(importance, percent, device):
    """{tensor's name: importance of its weights} -> the mask of exactly the top `percent`."""
    return select_neurons(importance, percent / 100, device)


def token_weights(run, policy, negatives):
    """Every negative as an Example with its token weights (token_weights.py has the modes)."""
    cfg = run.cfg
    encoder = run.encoder
    mode = cfg.token_weights if cfg.forget else "uniform"
    rows = [(n, encoder.example(n.prompt, [n.response])) for n in negatives]
    rows = [(n, example) for n, example in rows if example]
    run.report_dropped("negatives", len(rows))
    scored = score(run, policy, rows) if mode not in ("uniform", "edit") else [None] * len(rows)
    weighted = []
    for (n, example), scores in zip(rows, scored):
        [response] = example.responses
        if mode == "uniform":
            weights = [1.0] * len(response)
        elif mode == "edit":
            weights = edit_weights(response, encoder.response_ids(n.prompt, n.rewrite))
        else:
            weights = weights_from_scores(scores, mode, cfg.threshold)
        if weights:  # of a rewriting prompt that is too long there are none
            weighted.append(example._replace(weights=list(map(float, weights)), scores=scores))
    return weighted


def score(run, policy, rows):
    """The rewriting model's score of every token of every negative; rows: (it, its Example)."""
    negatives, examples = zip(*rows)
    artefact = "token_weights.jsonl"
    rewriter = None if run.has(artefact) else rewrite(run, policy, negatives)

    def make(target):
        bar = progress(None, "score", "response", len(negatives))
        scores = token_scores(run.load(rewriter), run.encoder, negatives, examples,
                              run.cfg.micro_tokens, bar.update)
        run.report_dropped("negatives to score", sum(map(bool, scores)))
        write_jsonl(target, [{"input": n.prompt, "output": n.response, "reward": row}
                             for n, row in zip(negatives, scores)])

    return read_scores(run.stage("score", artefact, make), negatives, examples)


def rewrite(run, policy, negatives):
    """The rewriting model, trained to correct wrong responses with few edits."""
    def examples():
        rows = rewrite_examples(run.encoder, negatives)
        run.report_dropped("rewrites", len(rows))
        return rows

    return fine_tuned(run, "rewrite", policy, functools.cache(examples), "rewriter")


def forget(run, policy, weighted, mask, name="forget"):
    """Phase 1: token-weighted NPO on what is unaligned, masked weights only; they stay fp32."""
    return trained(run, name, policy, lambda: weighted, npo_objective(run.cfg.beta), mask,
                   whole=False)


def improve(run, policy, pairs, mask, name="improve", whole=True):
    """Phase 2: DPO on the useful rejected tokens, masked weights only; theta_ref is `policy`."""
    objective = dpo_objective(run.cfg.beta, run.cfg.epsilon)
    return trained(run, name, policy, pairs, objective, mask, whole=whole)


# ---- the whole method --------------------------------------------------------------------------

def allo(run, policy, pairs, negatives):
    """Which weights, which tokens; then the two phases."""
    forget_mask, improve_mask = locate(run, policy, pairs)
    needing = ["forget.safetensors"] * run.cfg.forget + ["improve", TOKENS]
    weighted = [] if run.has(*needing) else token_weights(run, policy, negatives)
    forgotten = forget(run, policy, weighted, forget_mask) if run.cfg.forget else policy
    improved = improve(run, forgotten, pairs, improve_mask)
    record_tokens(run, forgotten, improved, weighted)
    if improve_mask:
        patch(run, policy, improved, "patch")
    return improved


def patch(run, policy, tuned, name):
    """What of `policy` changed, a tenth of the model at most at p = 5 %, for patch.py."""
    run.stage(name, f"{name}.safetensors",
              lambda target: save_patch(policy.folder, tuned.folder, target))


def baseline(run, method, policy, pairs, negatives):
    """One of the methods that ALLO is compared with, from the same policy and samples."""
    cfg = run.cfg
    mask = locate(run, policy, pairs)[1] if cfg.masks(method) else None
    name = "more-sft" if method == "sft" and cfg.sft else method
    if method == "sft":
        pairs = solutions(run)
        if not cfg.masked:
            return fine_tuned(run, name, policy, pairs)
    if method == "npo":
        pairs = run.encoded([(n.prompt, [n.response]) for n in negatives], "negatives")
    if method == "rft":
        pairs = run.encoded(chosen(run) or right_samples(run), "right samples")
    tuned = trained(run, name, policy, pairs, BASELINES[method][1](cfg), mask)
    if mask:
        patch(run, policy, tuned, f"patch-{name}")
    return tuned


def right_samples(run):
    """Yield (question, [response]) of every right sample, also where none was wrong."""
    samples = read_samples(run.folder / SAMPLES)
    for task in run.questions:
        for text in dict.fromkeys(samples[task.question]):
            if is_correct(text, task):
                yield task.prompt, [text]


def run_all(run):
    """The whole method, the others beside it, then the table."""
    show_plan(run)
    cfg = run.cfg
    policy = fine_tuned(run, "sft", run.base, solutions(run)) if cfg.sft else run.base
    models = {"SFT" if cfg.sft else "start": policy}
    pairs = None
    negatives = []
    if not cfg.sft_alone:
        if not run.pairs:
            sample(run, policy)
        preferred, negatives = preferences(run)
        pairs = run.encoded([pair.sides for pair in preferred], "pairs")
    for method in cfg.method:
        if method == "allo":
            models["ALLO"] = allo(run, policy, pairs, negatives)
        else:
            title = BASELINES[method][0]
            models[title] = baseline(run, method, policy, pairs, negatives)
    finish(run, models)


def main(argv=None):
    """Parse, run, and turn every mistake of the user's into one line and exit code 2."""
    def work():
        run = open_run(parse(argv))
        if run.cfg.dry_run:
            show_plan(run)
        elif not reprint(run):
            run_all(run)

    return exit_code(work, stopped="stopped; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
