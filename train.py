"""ALLO (arXiv 2406.12606): align a language model by training few weights, on few tokens, in two phases.

    sft      optional supervised fine-tuning              theta_ref of everything below
    sample   n responses per question, labelled by their final answer -> pairs (y+, y-), negatives y-
    warmup   one epoch of DPO; how far each weight moves is its importance
    locate   the top p % of all weights are the "neurons" that may change; theta returns to theta_ref
    reward   a rewriting model (a copy of theta_ref, unless --reward-base) scores the tokens of y-: low means unaligned
    forget   token-weighted NPO on the unaligned tokens, masked weights only
    improve  DPO whose rejected side counts only the most useful tokens, masked weights only
    patch    what that changed of theta_ref, as a small file; other --methods: baselines.py

Departures from the official code, and why:
 a. It first cuts each tensor to its own top 2p %: 5 % became 21 % in our test; our top p % is exact and global.
 b. It keeps epsilon x padded width tokens and takes a log-ratio of 0 for padding; we count response tokens.
 c. Its forgetting collator shifts the prompt mask in ragged batches and loses tokens; we never pad.
 d. Its optimizer keeps full-size moments and decays unselected weights; ours knows selected weights only.
 e. It clips by the dense gradient's norm; we clip by the selected entries'.
 f. It averages losses per micro-batch; we normalise over the whole step.
 g. Its rewards/* are per token at equal index; ours are per sequence, with TRL's names and meanings.
 h. Its AdamW adds eps before bias correction; ours follows torch.optim.AdamW.
 i. It rewrites with GPT-4; we use the data's rewrite, else the policy's nearest correct sample, else the reference.
 j. Sampled responses that hit the length limit are left out: nobody saw how they end.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from allo_mini import UserError, dry_run, parallel, tasks
from allo_mini.baselines import NAMES, OBJECTIVES
from allo_mini.checkpoint import save_patch
from allo_mini.config import parse
from allo_mini.data import Example, Negative, Pair
from allo_mini.disk import append_rows, keep_whole, write_jsonl
from allo_mini.edits import edit_weights
from allo_mini.files import EXACT, load_mask, load_tensors, read_samples, read_weights, save_mask
from allo_mini.inputs import open_run, own_weights
from allo_mini.locate import COMPARE_BELOW, gradient_importance, importance_mask, located, random_importance
from allo_mini.log import exit_code, progress, say
from allo_mini.loop import Objective, dpo_objective, npo_objective, run_stage, sft_objective
from allo_mini.mask import PackedMask
from allo_mini.report import describe_mask, describe_noise, finish, reprint, watch_tokens
from allo_mini.run import Run
from allo_mini.scoring import rewrite_examples, token_scores, weights_from_scores


# Stages, in the order they run. Each writes one artefact and is skipped when that exists.
def sft(run: Run, theta: Path) -> Path:
    """Supervised fine-tuning on the reference solutions; of all weights, or of --p-sft % of them."""
    def prepare():
        examples = run.encode(solutions(run), "training rows")
        return examples, located(run, theta, "sft", examples)
    return trained(run, "sft", theta, prepare, sft_objective(), run.validator())


def trained(run: Run, name: str, theta: Path, prepare: Callable[[], tuple[list[Example], PackedMask | None]],
            objective: Objective, validate: Callable | None = None) -> Path:
    """The model that training theta ends in. prepare() -> (examples, mask of the weights that move; None: all)."""
    def make(target):
        examples, mask = prepare()
        model = run.load(theta, mask, train_all=mask is None)
        run_stage(run, name, model, examples, objective, mask, validate)
        run.save(model, target)
    return run.stage(name, make, ranks=True)


def sample(run: Run, theta: Path) -> Path:
    """n responses per training question, in fixed groups of questions so that a restart changes nothing."""
    def make(target):
        model, part = run.load(theta), run.folder / "samples.part.jsonl"
        asked = run.questions[:run.cfg.sample_questions or None]
        done = keep_whole(part, tasks.GROUP, len(asked))
        if done:
            say(f"sample: goes on after {done} of {len(asked)} questions")
        with progress(total=len(asked) * run.cfg.n, label="sample", unit="response") as bar:
            bar.update(done * run.cfg.n)
            for at in range(done, len(asked), tasks.GROUP):
                rows = asked[at:at + tasks.GROUP]
                said = tasks.respond(model, run.encoder, [t.input for t in rows], run.cfg, run.eos(model),
                                     n=run.cfg.n, rows=[t.id for t in rows], on_done=lambda *_: bar.update())
                append_rows(part, ({"input": t.input, "samples": [text for text, finished in texts if finished],
                                    "unfinished": sum(not finished for _, finished in texts)}
                                   for t, texts in zip(rows, said)))
        part.rename(target)
        run.report_dropped("questions", len(asked))
    return run.stage("sample", make, "samples.jsonl")


def preferences(run: Run, theta: Path) -> tuple[list[Pair], list[Negative]]:
    """Label samples by their final answer -> up to 5 random (y+, y-) per question, and every wrong one to forget."""
    if run.cfg.pairs:
        negatives = [Negative(p.prompt, p.rejected, p.chosen, p.rewrite or p.chosen) for p in run.pairs]
        return run.pairs, negatives
    samples, unfinished = read_samples(run.cfg.samples or sample(run, theta))
    asked = [t for t in run.questions if t.input in samples and tasks.gold_answer(t) is not None]
    pairs, negatives, report = tasks.label(asked, samples, run.cfg.pairs_per_question, run.cfg.seed, run.encoder)
    say(f"pairs: {report}" + (f" ({unfinished} samples that hit the length limit left out)" if unfinished else ""))
    if not pairs:
        most_cut = unfinished > sum(map(len, samples.values()))
        raise UserError("no question has both a correct and a wrong sample: " + (
            "most hit the length limit; try another --prompt, --stop or --max-new-tokens" if most_cut else
            f"see {run.cfg.samples or run.folder / 'samples.jsonl'}; sample more (--n), or fine-tune first (--sft)"))
    if not parallel.RANK:
        write_jsonl(run.folder / "pairs.jsonl", (vars(p) for p in pairs))
        write_jsonl(run.folder / "negatives.jsonl", (vars(n) for n in negatives))
    return pairs, negatives


def rows_for(run: Run, method: str, pairs: list[Pair], negatives: list[Negative],
             examples: list[Example]) -> list[Example]:
    """What a method trains on: solutions, correct samples, wrong samples, or (the others) the pairs as `examples`."""
    if method == "npo":
        return run.encode(((n.prompt, [n.response]) for n in negatives), "negatives")
    if method == "rft":
        return run.encode(((q, [good]) for q, good in correct_samples(run, pairs)), "correct samples")
    return run.encode(solutions(run), "training rows") if method == "sft" else examples


def solutions(run: Run) -> list[tuple]:
    """(question, [reference solution]); of preference rows, what was chosen."""
    return [(t.input, [t.output]) for t in run.tasks] or [(p.prompt, [p.chosen]) for p in run.pairs]


def correct_samples(run: Run, pairs: list[Pair]) -> list[tuple[str, str]]:
    """(question, response) of every different correct sample, also of questions that were never answered wrongly."""
    if run.cfg.pairs:
        return [(p.prompt, p.chosen) for p in pairs]
    samples, _ = read_samples(run.cfg.samples or run.folder / "samples.jsonl")
    return [(t.input, s) for t in run.questions for s in dict.fromkeys(samples.get(t.input, []))
            if tasks.is_correct(s, t)]


def warmup(run: Run, theta: Path, examples: list[Example]) -> Path:
    """One epoch of full-weight DPO; keeps |theta' - theta| of every weight in fp32, before any rounding."""
    def make(target):
        model = run.load(theta, train_all=True)
        optimizer = run_stage(run, "warmup", model, examples, dpo_objective(run.cfg.beta))
        run.save(optimizer.movement(), target)
    return run.stage("warmup", make, "movement.safetensors", ranks=True)


def locate(run: Run, theta: Path, pairs: list[Example]) -> dict[str, PackedMask]:
    """The masks of forgetting and improving: {"forget": mask, "improve": mask}, None where all weights are trained."""
    cfg = run.cfg
    shares = {stage: getattr(cfg, f"p_{stage}") or cfg.p for stage in ("forget", "improve")}
    if cfg.mask or cfg.mask_source == "none":
        return dict.fromkeys(shares, load_mask(cfg.mask, run.shapes) if cfg.mask else None)
    path_of = {p: run.folder / ("mask.safetensors" if p == shares["improve"] else "mask-forget.safetensors")
               for p in shares.values()}  # one where both phases have the same p
    missing, movement = [path for path in path_of.values() if not path.exists()], None
    by_chance = cfg.mask_source == "random"
    if missing and cfg.locate in ("auto", "movement") and not by_chance:
        movement = load_tensors(warmup(run, theta, pairs))[0]

    def make(_):  # one stage makes every mask; its artefact is the first that is missing
        if by_chance:
            importance = random_importance(run)
        else:
            snr = cfg.locate == "snr"
            gradient, *halves = gradient_importance(run, theta, pairs[:cfg.locate_pairs], dpo_objective(cfg.beta),
                                                    compare=run.parameters < COMPARE_BELOW and not snr, snr=snr)
            importance = movement or gradient
            describe_noise(run, importance_mask, movement, gradient, halves, shares["improve"])
        for percent, path in path_of.items():
            mask = importance_mask(run, importance, percent)
            describe_mask(run, mask, percent)
            save_mask(mask, path)

    if missing:
        run.stage("locate", make, missing[0].name)
    loaded = {p: load_mask(path, run.shapes) for p, path in path_of.items()}
    return {stage: loaded[p] for stage, p in shares.items()}


def reward(run: Run, theta: Path, negatives: list[Negative]) -> list[Example]:
    """Every negative as an example with its token weights (see scoring.py for the modes)."""
    cfg, encoder = run.cfg, run.encoder
    if cfg.token_weights_file:
        negatives, _ = own_weights(run)
    kept = [(n, e) for n in negatives if (e := encoder.example(n.prompt, [n.response]))]
    run.report_dropped("negatives", len(kept))
    if cfg.token_weights == "uniform" or not cfg.forget:  # without forgetting only the report looks at them
        return [e._replace(weights=[float(cfg.forget)] * len(e.responses[0])) for _, e in kept]
    if cfg.token_weights == "edit":
        return [e._replace(weights=edit_weights(e.responses[0], encoder.response_ids(n.prompt, n.rewrite)))
                for n, e in kept]
    scores = [n.scores for n, _ in kept] if cfg.token_weights_file else reward_scores(run, theta, kept)
    weighted = [e._replace(scores=s, weights=weights_from_scores(s, cfg.token_weights, cfg.threshold))
                for (_, e), s in zip(kept, scores) if len(s) == len(e.responses[0])]
    if dropped := len(kept) - len(weighted):
        say(f"token weights: {dropped} rows dropped: as many scores as tokens (with EOS) were expected")
    return weighted


def reward_scores(run: Run, theta: Path, kept: list[tuple[Negative, Example]]) -> list[list[float]]:
    """Train the rewriting model (unless one was given) and let it score every token of every negative."""
    folder, (wrong, examples) = run.cfg.reward_model, zip(*kept)

    def prepare():
        rewrites = rewrite_examples(run.encoder, wrong)
        if len(rewrites) < len(wrong):
            say(f"reward: {len(wrong) - len(rewrites)} rewrites dropped: as long as --max-length")
        return rewrites, None if run.cfg.reward_base else located(run, theta, "reward", rewrites)

    if not folder:
        folder = trained(run, "reward", run.cfg.reward_base or theta, prepare, sft_objective())

    def make(target):
        model = run.load(folder)
        with progress(total=len(kept), label="score", unit="response") as bar:
            scores = token_scores(model, run.encoder, wrong, examples, run.cfg.micro_tokens, bar.update)
        low = sum(s < run.cfg.threshold for row in scores for s in row) / sum(map(len, scores))
        say(f"token scores: {100 * low:.1f} % of the negatives' tokens are below {run.cfg.threshold:g}")
        write_jsonl(target, ({"input": n.prompt, "output": n.response, "reward": s} for n, s in zip(wrong, scores)))
    scored = read_weights(path := run.stage("score", make, "token_weights.jsonl"))
    if [(n.prompt, n.response) for n in scored] != [(n.prompt, n.response) for n in wrong]:
        raise UserError(f"{path}: holds the scores of other responses; delete it to score again")
    return [n.scores for n in scored]


def forget(run: Run, theta: Path, examples: list[Example], mask) -> Path:
    """Phase 1: token-weighted NPO on what is unaligned, over the masked weights only."""
    def make(target):
        model = run.load(theta, mask, train_all=mask is None)
        optimizer = run_stage(run, "forget", model, examples, npo_objective(run.cfg.beta), mask, run.validator())
        run.save(optimizer.exact(), run.folder / EXACT)
        run.save(model, target)
    return run.stage("forget", make, ranks=True)


def improve(run: Run, theta: Path, pairs: list[Example], mask, negatives: list[Example]) -> Path:
    """Phase 2: DPO on the useful rejected tokens, over the masked weights; theta_ref is the model after forgetting."""
    def make(target):
        model, objective = run.load(theta, mask, train_all=mask is None), dpo_objective(run.cfg.beta, run.cfg.epsilon)
        exact = run.folder / EXACT if theta == run.folder / "forget" else None  # a bf16 folder lost the small steps
        with watch_tokens(run, model, negatives):
            run_stage(run, "improve", model, pairs, objective, mask, run.validator(), exact)
        run.save(model, target)
    return run.stage("improve", make, ranks=True)


def run_all(run: Run) -> None:
    """The whole method, then the table."""
    cfg, theta, models = run.cfg, run.base, {}
    if reprint(run):
        return
    if cfg.sft or cfg.only_sft:
        theta = sft(run, theta)
    models["start" if theta == run.base else "SFT"] = theta
    if not cfg.only_sft:
        pairs, negatives = preferences(run, theta)
        examples = run.encode(((p.prompt, [p.chosen, p.rejected]) for p in pairs), "pairs")
        for method in cfg.method:
            mask = locate(run, theta, examples) if method == "allo" or cfg.mask_source != "auto" else {"improve": None}
            if method == "allo":
                weighted = reward(run, theta, negatives)
                forgotten = forget(run, theta, weighted, mask["forget"]) if cfg.forget else theta
                models["ALLO"] = improve(run, forgotten, examples, mask["improve"], weighted)
                if mask["improve"]:  # what ALLO changed of theta_ref, in a file of a few per cent of the model
                    run.stage("patch", lambda target: save_patch(theta, models["ALLO"], target), "patch.safetensors")
            else:  # from the same model on the same samples; all weights, unless --mask-source is given
                models[NAMES.get(method, method)] = trained(
                    run, "more-sft" if method == "sft" else method, theta,
                    lambda: (rows_for(run, method, pairs, negatives, examples), mask["improve"]),
                    OBJECTIVES[method](cfg), run.validator())
    if not parallel.RANK:
        finish(run, models)


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn every mistake of the user's into one line and exit code 2."""
    def work():
        cfg = parse(sys.argv[1:] if argv is None else argv)
        run = open_run(cfg)
        dry_run.show(run) if cfg.dry_run else run_all(run)
    return exit_code(work, stopped="stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
