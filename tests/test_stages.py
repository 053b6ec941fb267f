"""Single stages on a tiny model: importance, metrics, skipped steps, best weights, warnings, prints."""

import json
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from allo_mini import UserError
from allo_mini import linear, locate, loop, optim, run as run_module, scoring
from allo_mini.config import OFFICIAL, STAGES, Stage, parse
from allo_mini.data import Example
from allo_mini.files import EXACT, load_mask
from allo_mini.inputs import open_run
from allo_mini.linear import dense_rows
from allo_mini.locate import gradient_importance
from allo_mini.memory import tensor_groups
from allo_mini.loop import dpo_objective, npo_objective, resolve_stage, run_stage, sft_objective, steps_of
from allo_mini.mask import kind_of, overlap, select_neurons
from allo_mini.scoring import rewrite_examples
from helpers import gradients, random_ids, separate_logps
from test_train import arguments, world


def start(world, tmp_path, *more):
    """A Run on the tiny world, and its pairs as examples."""
    run = open_run(parse(arguments(world, tmp_path / "run", *more)))
    pairs, _ = train.preferences(run, run.base)
    return run, run.encode(((p.prompt, [p.chosen, p.rejected]) for p in pairs), "pairs")


def negatives(count: int, zero: set[int] = frozenset()) -> list[Example]:
    """Random one-response examples; those in `zero` have no weight that is not 0."""
    rows = [(random_ids(4, i), random_ids(5, 100 + i)) for i in range(count)]
    return [Example(prompt, [response], [0.0 if i in zero else 1.0] * 5)
            for i, (prompt, response) in enumerate(rows)]


def logged(run, stage: str) -> list[dict]:
    rows = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == stage and "step" in row]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def importance_of(run, examples):
    return gradient_importance(run, run.base, examples, dpo_objective(run.cfg.beta), compare=True)


# ---- locate ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bytes_a_weight, passes, with_snr", [(0, 1, 1), (24, 1, 1), (6, 2, 4)])  # 0: unknown
def test_locating_takes_at_most_half_of_the_hosts_memory(world, tmp_path, monkeypatch, bytes_a_weight, passes, with_snr):
    """On a CPU 4 bytes a weight for the gradient, and 8 for the two sums."""
    run, _ = start(world, tmp_path)
    monkeypatch.setattr(run_module, "host_memory", lambda: bytes_a_weight * run.parameters)
    assert (run.locate_groups(), run.locate_groups(snr=True)) == (passes, with_snr)
    run.cfg.locate_groups = 3
    assert (run.locate_groups(), run.locate_groups(snr=True)) == (3, 3)


@pytest.mark.parametrize("groups", [1, 3, 1000])
def test_gradient_importance_is_the_plain_autograd_sum(world, tmp_path, groups):
    """In one pass, in three, and a tensor at a time."""
    run, examples = start(world, tmp_path, "--beta", "0.3", "--micro-batch", "2", "--locate-groups", str(groups))
    examples = examples[:5]
    assert len(tensor_groups(run.shapes, run.locate_groups())) == min(groups, len(run.shapes)) if groups != 3 else len(tensor_groups(run.shapes, run.locate_groups())) > 2
    importance, *halves = importance_of(run, examples)

    def expected(some):
        model = run.load(run.base).requires_grad_(True)
        for prompt, (chosen, rejected) in some:
            (-0.3 / 2 * (separate_logps(model, prompt, chosen).sum()
                         - separate_logps(model, prompt, rejected).sum())).backward()
        return gradients(model)
    for got, some in zip([importance, *halves], (examples, examples[0::2], examples[1::2])):
        wanted = expected([e[:2] for e in some])
        assert got.keys() == wanted.keys()
        for name in got:
            assert got[name].dtype == torch.float32
            scale = float(wanted[name].abs().max())
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("which", ["gradient", "snr"])
def test_one_group_s_gradient_is_gone_before_the_next_one_s_is_made(world, tmp_path, monkeypatch, which):
    """Together they would take twice what the groups were cut for."""
    run, examples = start(world, tmp_path, "--locate", which, "--locate-groups", "4")
    made, real = [], optim.flat_zeros

    def zeros(*args):
        assert not [buffer for buffer in made if buffer() is not None]
        made.append(weakref.ref(buffer := real(*args)))
        return buffer
    monkeypatch.setattr(optim, "flat_zeros", zeros)
    gradient_importance(run, run.base, examples[:2], dpo_objective(0.1), snr=which == "snr")
    assert len(made) > 2


@pytest.mark.parametrize("groups", [1, 3])
def test_snr_is_the_sum_of_a_few_pairs_gradients_over_the_root_of_their_squares_sum(world, tmp_path, monkeypatch, groups):
    """0 where no gradient ever comes: the embedding's rows of tokens that are not read."""
    run, examples = start(world, tmp_path, "--beta", "0.3", "--micro-batch", "1", "--locate", "snr", "--locate-groups",
                          str(groups))
    monkeypatch.setattr(locate, "TOGETHER", 2)
    monkeypatch.setattr(locate, "CHUNK", 1000)
    examples = examples[:5]
    [got] = gradient_importance(run, run.base, examples, dpo_objective(0.3), snr=True)
    each = [gradient_importance(run, run.base, examples[at:at + 2], dpo_objective(0.3))[0] for at in (0, 2, 4)]
    for name in got:
        g = torch.stack([one[name] for one in each])
        assert torch.equal(got[name] == 0, (g == 0).all(0) | (g.sum(0) == 0)) and got[name].abs().max() <= 3**0.5 + 1e-5
        real = g.square().sum(0) > 1e-30
        torch.testing.assert_close(got[name][real], (g.sum(0) / g.square().sum(0).sqrt())[real], rtol=1e-4, atol=1e-5)


def test_the_flag_snr_leaves_out_the_warm_up_and_masks_by_the_ratio(world, tmp_path):
    run, examples = start(world, tmp_path, "--locate", "snr")
    mask = train.locate(run, run.base, examples)["improve"]
    [ratio] = gradient_importance(run, run.base, examples, dpo_objective(run.cfg.beta), snr=True)
    assert equal(mask, select_neurons(ratio, run.cfg.p / 100)) and not (run.folder / "movement.safetensors").exists()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_importance_of_an_int8_model_is_that_of_its_dequantised_twin(world, tmp_path, groups):
    run, examples = start(world, tmp_path, "--int8", "--locate", "gradient", "--method", "allo", "--p-sft", "5",
                          "--micro-batch", "2", "--locate-groups", str(groups), "--beta", "0.3")
    examples, ours, twin = examples[:5], run.load(run.base), run.load(run.base, train_all=True)
    for n, p in ours.named_parameters():
        dense = torch.cat([rows for _, rows in dense_rows(p, torch.float32)])
        assert torch.equal(dense, twin.get_parameter(n)) != hasattr(p, "int8")
        twin.get_parameter(n).data.copy_(dense)
    twin.requires_grad_(True)
    for prompt, (chosen, rejected), *_ in examples:
        (-0.3 / 2 * (separate_logps(twin, prompt, chosen).sum() - separate_logps(twin, prompt, rejected).sum())).backward()
    wanted, got = gradients(twin), importance_of(run, examples)[0]
    assert got.keys() == wanted.keys() and (len(tensor_groups(run.shapes, run.locate_groups())) > 2) == (groups > 1)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("more", [[], ["--int8", "--state-bits", "8", "--offload", "gradient", "--locate-groups", "3"]])
def test_sft_and_the_rewriting_model_train_p_sft_percent_of_the_weights(world, tmp_path, more):
    """Those with the largest gradient of the stage's own loss; the others stay as they are in the files."""
    run, _ = start(world, tmp_path, "--sft", "--p-sft", "3", "--locate", "gradient", "--method", "allo", "--max-steps",
                   "2", "--locate-pairs", "8", "--sft-lr", "1e-3", "--reward-lr", "1e-3", *more)
    tuned, seen = train.sft(run, run.base), []
    _, rows = train.preferences(run, tuned)
    train.reward_scores(run, tuned, [(n, run.encoder.example(n.prompt, [n.response])) for n in rows])
    examples = run.encode(((t.input, [t.output]) for t in run.tasks), "rows")[:8]
    for stage, before, some in (("sft", run.base, examples), ("reward", tuned, rewrite_examples(run.encoder, rows)[:8])):
        mask = load_mask(run.folder / f"mask-{stage}.safetensors", run.shapes)
        [importance] = gradient_importance(run, before, some, sft_objective())
        expected = select_neurons(importance, 0.03)
        assert all(torch.equal(mask[n], m) for n, m in expected.items())
        assert sum(int(m.sum()) for m in expected.values()) == 3 * run.parameters // 100
        old, new = load_file(before / "model.safetensors"), load_file(run.folder / stage / "model.safetensors")
        assert all(torch.equal(new[n][~m], old[n][~m]) for n, m in expected.items())
        seen.append(sum(int((new[n] != old[n]).sum()) for n in old))
        assert 0.5 * run.parameters * 0.03 < seen[-1] <= run.parameters * 0.03
    assert not list(run.folder.glob("*tmp*"))  # the importance has left nothing


def test_a_mask_from_importance_fits_the_models_names_and_shapes(world, tmp_path):
    run, examples = start(world, tmp_path)
    importance = importance_of(run, examples[:2])[0]
    assert {name: t.shape for name, t in importance.items()} == run.shapes
    mask = select_neurons(importance, 0.03)
    assert {name: m.shape for name, m in mask.items()} == run.shapes
    assert sum(int(m.sum()) for m in mask.values()) == 3 * run.parameters // 100
    model = run.load(run.base)
    before = weights(model)
    run_stage(run, "improve", model, examples[:2], dpo_objective(0.1), mask)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p[~mask[n]], before[n][~mask[n]]) for n, p in model.named_parameters())


@pytest.mark.parametrize("strategy", ["gradient", "movement"])
def test_overlap_and_density_are_printed_and_true(world, tmp_path, capsys, strategy):
    run, examples = start(world, tmp_path, "--locate", strategy, "--locate-pairs", "6", "--p", "4",
                          "--p-forget", "2", "--max-steps", "1")
    masks = train.locate(run, run.base, examples)
    said = capsys.readouterr().out
    gradient, *halves = importance_of(run, examples[:6])
    noise = overlap(*(select_neurons(h, 0.04) for h in halves))
    assert f"overlap of gradient masks from two halves of the pairs: {100 * noise:.1f} % (chance 4 %)" in said
    other = 100 * overlap(masks["improve"], select_neurons(gradient, 0.04))
    assert (f"overlap of movement and gradient masks: {other:.1f} %" in said) == (strategy == "movement")
    if strategy == "gradient":
        assert other == 100 and not (run.folder / "movement.safetensors").exists()
    for stage, p in (("improve", 4), ("forget", 2)):
        count = p * run.parameters // 100
        assert f"mask: {count:,} weights, {100 * count / run.parameters:.3f} % (asked: {p} %)" in said
        assert sum(int(m.sum()) for m in masks[stage].values()) == count
    stored = load_mask(run.folder / "mask.safetensors", run.shapes)
    norms = torch.cat([m.flatten() for n, m in stored.items() if kind_of(n) == "input_layernorm"])
    assert f"input_layernorm {100 * norms.float().mean():.1f}" in said
    assert len(re.findall(r"^  by kind, %   .*q_proj [\d.]+", said, re.M)) == 2
    assert len(re.findall(r"^  by layer, %  .*\b0 [\d.]+  1 [\d.]+", said, re.M)) == 2


# ---- memory runs out ---------------------------------------------------------------------------------------

def fail(monkeypatch, where, calls):
    """Raise as CUDA does: in the loop's forward passes, in a linear layer's backward or in a norm's gradient hook."""
    module, name = {"forward": (loop, "token_logps"), "backward": (linear, "take"), "hook": (optim, "take")}[where]
    real, count = getattr(module, name), iter(range(10 ** 9))

    def raises(*args):
        inside = where == "forward" or torch._C._current_graph_task_id() >= 0
        if inside and next(count) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 0 bytes free.")
        return real(*args)
    monkeypatch.setattr(module, name, raises)


@pytest.mark.parametrize("where, call", [("forward", 1), ("backward", 20), ("hook", 7)])
@pytest.mark.parametrize("size", [["--micro-batch", "4"], ["--micro-tokens", "300"]])
def test_a_step_without_memory_is_redone_in_halves_with_the_same_result(world, tmp_path, monkeypatch, capsys, where,
                                                                        call, size):
    """The second micro-batch of the first step: what the first one left in the gradient must not count twice."""
    run, examples = start(world, tmp_path, *size, "--improve-batch", "8", "--max-steps", "3", "--improve-lr", "1e-4")
    generator, rows, results, pack = torch.Generator().manual_seed(0), [], [], loop.pack
    mask = {n: torch.rand(s, generator=generator) < 0.3 for n, s in run.shapes.items()}
    monkeypatch.setattr(loop, "pack", lambda micro, device: rows.append(len(micro)) or pack(micro, device))
    for calls in ((), (call,)):
        with monkeypatch.context() as patched:
            fail(patched, where, calls)
            model, before = run.load(run.base), len(rows)
            optimizer = run_stage(run, "improve", model, examples, dpo_objective(0.1, 0.5), mask)
        results.append((weights(model), [(r["loss"], r["grad_norm"], r["rewards/margins"]) for r in logged(run, "improve")],
                        rows[before:]))
        assert run.halved == bool(calls) and optimizer.steps == 3
    (one, losses, whole), (two, again, halves) = results
    assert max(whole) >= 3 and max(halves[2:]) == -(-max(whole) // 2) and halves[:1] == whole[:1]
    assert "out of memory: going on with micro-batches of half the size" in capsys.readouterr().out
    assert len(again) == 3 and all(a == pytest.approx(b, rel=1e-4, abs=1e-6) for a, b in zip(losses, again))
    for n in one:
        torch.testing.assert_close(one[n], two[n], rtol=0, atol=1e-6)
    start_of = weights(run.load(run.base))
    assert max(float((one[n] - start_of[n]).abs().max()) for n in one) > 1e-4


@pytest.mark.parametrize("call", [0, 3])
def test_the_reference_pass_is_redone_in_halves(world, tmp_path, monkeypatch, capsys, call):
    """All of it, also the steps that were done: where the reference is of other micro-batches no ratio is exactly 0."""
    run, examples = start(world, tmp_path, "--micro-batch", "4", "--improve-batch", "8", "--max-steps", "3")
    sizes, real = [], scoring.token_logps

    def fails_once(model, batch):
        sizes.append(len(batch.lengths) // 2)
        if len(sizes) == call + 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, batch)
    monkeypatch.setattr(scoring, "token_logps", fails_once)
    run_stage(run, "improve", run.load(run.base), examples, dpo_objective(0.1))
    assert set(sizes[:call + 1]) == {4} and max(sizes[call + 1:]) == 2 and sum(sizes[call + 1:]) == 24
    said = capsys.readouterr().out
    assert said.count("out of memory: going on") == 1 and "WARNING" not in said
    assert logged(run, "improve")[0]["rewards/chosen"] == 0


@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize("groups", ["1", "2"])
def test_locating_without_memory_is_redone_in_halves_with_the_same_result(world, tmp_path, monkeypatch, capsys, groups, call):
    run, examples = start(world, tmp_path, "--micro-batch", "4", "--locate-groups", groups)
    want = importance_of(run, examples[:12])
    want = [{n: v.clone() for n, v in one.items()} for one in want]
    real, count = locate.token_logps, iter(range(10**9))

    def fails_once(*args):
        if next(count) == call:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args)
    monkeypatch.setattr(locate, "token_logps", fails_once)
    got = importance_of(run, examples[:12])
    assert run.halved and capsys.readouterr().out.count("out of memory: going on") == 1
    for a, b in zip(want, got, strict=True):
        for n in a:
            torch.testing.assert_close(a[n], b[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, halves", [("4", True), ("1", False)])
def test_memory_that_runs_out_twice_is_one_line_and_the_run_can_go_on(world, tmp_path, monkeypatch, capsys, size, halves):
    argv = arguments(world, tmp_path / "run", "--method", "dpo", "--max-steps", "2", "--micro-batch", size, "--no-eval",
                     "--save-minutes", "0")
    with monkeypatch.context() as patched:
        fail(patched, "forward", range(2, 99))
        assert train.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: dpo, peak")
    assert "out of memory: use --memory 24gb, or lower --micro-tokens" in said.err
    assert said.out.count("going on with micro-batches of half") == halves
    assert not (tmp_path / "run/dpo").exists()
    assert train.main(argv) == 0 and (tmp_path / "run/dpo/model.safetensors").exists()


# ---- int8 runs ---------------------------------------------------------------------------------------------

def test_int8_leaves_alone_the_stages_that_train_all_weights(world, tmp_path, capsys):
    """The same weights, bit for bit, as without it; the masked stages keep int8 ones."""
    for name, more in (("plain", []), ("int8", ["--int8"])):
        assert train.main(arguments(world, tmp_path / name, "--sft", "--max-steps", "1", "--test-limit", "2",
                                    *more)) == 0
    plain, int8 = ({f: load_file(tmp_path / name / f) for f in ("sft/model.safetensors", "movement.safetensors",
                                                                "dpo/model.safetensors")} for name in ("plain", "int8"))
    assert all(equal(plain[f], int8[f]) for f in plain) and "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("base", [False, True])
def test_the_leanest_settings_go_through_every_stage(world, tmp_path, capsys, base):
    """8 bits wherever there are any, everything on the host; the rewriting model by its own gradient, or a whole one."""
    reward = ["--reward-base", str(world / "model")] if base else ["--sft", "--p-sft", "5"]
    assert train.main(arguments(world, tmp_path / "run", "--int8", "--state-bits", "8", "--offload", "gradient", "--locate",
                                "gradient", "--method", "allo", "--max-steps", "2", "--checkpoint-blocks", "1",
                                "--locate-pairs", "8", "--locate-groups", "2", "--test-limit", "2", *reward)) == 0
    out = tmp_path / "run"
    said = capsys.readouterr().out
    assert "improve: first loss 0.693147, expected 0.693147" in said and "WARNING" not in said and "ALLO" in said
    base = world / "model" if base else out / "sft"
    shapes = {n: t.shape for n, t in load_file(base / "model.safetensors").items()}
    for before, after in ((base, out / "forget"), (out / "forget", out / "improve")):
        old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
        mask = load_mask(out / "mask.safetensors", shapes)
        assert all(torch.equal(old[n][~mask[n]], new[n][~mask[n]]) for n in shapes) and not equal(old, new)


# ---- objectives --------------------------------------------------------------------------------------------

def ragged(rows: int, lengths: list[int], seed: int):
    """Random log-probs [R,T], 0 behind each response's end, and the mask of real tokens."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values = torch.randn(2, rows, max(lengths), generator=torch.Generator().manual_seed(seed)) - 2
    return values[0] * real, values[1] * real, real


@pytest.mark.parametrize("epsilon", [1.0, 0.4])
def test_dpo_metrics_are_per_sequence_over_all_tokens(epsilon):
    lengths, beta = [3, 5, 6, 2, 4, 4], 0.25
    logps, ref, real = ragged(6, lengths, 0)
    loss, metrics = dpo_objective(beta, epsilon).loss(logps, ref, real, [])
    total = 0.0
    for i in range(3):
        up = beta * (logps[2 * i].sum() - ref[2 * i].sum())
        down = beta * (logps[2 * i + 1].sum() - ref[2 * i + 1].sum())
        expected = {"rewards/chosen": up, "rewards/rejected": down, "rewards/margins": up - down,
                    "rewards/accuracies": float(up > down), "logps/chosen": logps[2 * i].sum(),
                    "logps/rejected": logps[2 * i + 1].sum()}
        n = lengths[2 * i + 1]
        k = max(1, int(epsilon * n))
        ratio = (logps - ref)[2 * i + 1, :n]
        kept = ratio.sort().values[:k].sum()
        expected["useful/fraction"] = k / n
        total = total - torch.nn.functional.logsigmoid(up - beta * kept)
        for key, value in expected.items():
            assert float(metrics[key][i]) == pytest.approx(float(value), abs=1e-5), key
        assert expected.keys() == metrics.keys()
    assert float(loss) == pytest.approx(float(total), rel=1e-5)


def test_tokens_of_weight_zero_get_no_gradient():
    logps, ref, real = ragged(2, [4, 2], 1)
    logps.requires_grad_()
    examples = [Example([1], [[3] * 4], [1.0, 0.0, 0.5, 0.0]), Example([1], [[3] * 2], [0.0, 2.0])]
    objective = npo_objective(0.1)
    loss, metrics = objective.loss(logps, ref, real, examples)
    loss.backward()
    assert (logps.grad != 0).tolist() == [[True, False, True, False], [False, True, False, False]]
    assert metrics["token_weight/fraction"].tolist() == [0.5, 0.5]
    torch.testing.assert_close(metrics["rewards/rejected"], 0.1 * (logps - ref).sum(-1))
    assert sum(map(objective.units, examples)) == 3
    assert objective.step0(examples) == pytest.approx(0.6931471805599453 * 3.5 / 3)


# ---- forgetting with weights of zero -----------------------------------------------------------------------

def test_a_tail_of_zero_weights_trains_like_a_shorter_response(world, tmp_path):
    run, _ = start(world, tmp_path, "--forget-lr", "1e-2", "--forget-epochs", "2")
    results = []
    for tail in (0, 3):
        model = run.load(run.base)
        examples = [e._replace(responses=[e.responses[0][:2 + tail]], weights=[1.0, 1.0] + [0.0] * tail)
                    for e in negatives(4)]
        run_stage(run, "forget", model, examples, npo_objective(0.1))
        results.append(weights(model))
    start_of = weights(run.load(run.base))
    for name in start_of:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-3, atol=1e-4)
    assert max(float((results[0][n] - start_of[n]).abs().max()) for n in start_of) > 1e-2


def test_steps_without_any_weight_are_skipped_counted_and_change_nothing(world, tmp_path, capsys):
    run, _ = start(world, tmp_path, "--forget-batch", "1", "--forget-warmup", "0", "--forget-lr", "1e-3")
    first = steps_of(3, 1, 1.0, run.cfg.seed)[0][0]
    examples = negatives(3, {0, 1, 2} - {first})  # one step that trains, then two without any weight
    model = run.load(run.base)
    optimizer = run_stage(run, "forget", model, examples, npo_objective(0.1))
    assert "forget: 1 steps, 2 skipped" in capsys.readouterr().out
    assert optimizer.steps == 1 and [row["step"] for row in logged(run, "forget")] == [1]
    run.cfg.max_steps = 1
    alone = run.load(run.base)
    run_stage(run, "forget", alone, examples, npo_objective(0.1))
    assert equal(weights(model), weights(alone))  # momentum of the first step went no further
    assert not equal(weights(model), weights(run.load(run.base)))


def test_the_first_step_that_trains_is_checked_even_after_skipped_ones(world, tmp_path, capsys):
    run, _ = start(world, tmp_path, "--forget-batch", "1")
    last = steps_of(3, 1, 1.0, run.cfg.seed)[-1][0]
    run_stage(run, "forget", run.load(run.base), negatives(3, {0, 1, 2} - {last}), npo_objective(0.1))
    said = capsys.readouterr().out
    assert "forget: first loss 0.693147, expected 0.693147" in said and "forget: 1 steps, 2 skipped" in said


def test_a_response_without_any_weight_does_not_dilute_the_others(world, tmp_path):
    run, _ = start(world, tmp_path, "--forget-batch", "8", "--forget-lr", "1e-3", "--micro-batch", "1")
    seen = []
    for examples in (negatives(3), [*negatives(3), *negatives(6, set(range(6)))[3:]]):
        model = run.load(run.base)
        run_stage(run, "forget", model, examples, npo_objective(0.1))
        row = logged(run, "forget")[-1]
        seen.append((row["loss"], row["grad_norm"], row.get("token_weight/fraction")))
    assert seen[0][:2] == pytest.approx(seen[1][:2], rel=1e-4)
    assert (seen[0][2], seen[1][2]) == (1.0, 0.5)


def test_a_stage_of_only_zero_weights_is_refused_and_saves_nothing(world, tmp_path):
    run, _ = start(world, tmp_path, "--forget-batch", "2")
    with pytest.raises(UserError, match="forget: no token of 4 rows has a weight"):
        train.forget(run, run.base, negatives(4, {0, 1, 2, 3}), None)
    assert not (run.folder / "forget").exists()


# ---- the best weights --------------------------------------------------------------------------------------

@pytest.mark.parametrize("scores, best", [([0.2, 0.9, 0.5], 1), ([0.7, 0.1, 0.7], 0), ([0.1, 0.2, 0.3], 2)])
def test_eval_every_saves_the_weights_of_the_best_validation(world, tmp_path, monkeypatch, capsys,
                                                             scores, best):
    """Five steps, validated after 2, 4 and the last; of equal scores the earliest stays."""
    seen, script = [], iter(scores)

    def validate(model):
        seen.append(weights(model))
        return next(script)
    monkeypatch.setattr(run_module.Run, "validator", lambda self: validate)
    run, examples = start(world, tmp_path, "--eval-every", "2", "--val-rows", "2", "--max-steps", "5",
                          "--dpo-batch", "4", "--dpo-lr", "1e-3")
    saved = load_file(train.trained(run, "dpo", run.base, lambda: (examples, None), dpo_objective(0.1), run.validator()) / "model.safetensors")
    assert len(seen) == 3 and not equal(seen[0], seen[1]) and not equal(seen[1], seen[2])
    assert [equal({n: saved[n] for n in s}, s) for s in seen] == [i == best for i in range(3)]
    assert f"best validation score, {scores[best]:.4f}" in capsys.readouterr().out
    scored = {row["step"]: row["eval/score"] for row in logged(run, "dpo") if "eval/score" in row}
    assert scored == dict(zip((2, 4, 5), scores))


def test_validation_changes_no_training_step(world, tmp_path, monkeypatch):
    """With the best score at the end, the result is that of a run that never validates."""
    run, examples = start(world, tmp_path, "--eval-every", "1", "--val-rows", "2", "--max-steps", "3",
                          "--dpo-lr", "1e-3")
    score, results = iter([1, 2, 3]), []
    real = run.validator()
    assert real is not None
    for validate in (None, lambda model: (real(model), next(score))[1]):
        model = run.load(run.base)
        run_stage(run, "dpo", model, examples, dpo_objective(0.1), None, validate)
        results.append(weights(model))
    assert next(score, None) is None and equal(*results)


# ---- settings and warnings ---------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_learning_rates_scale_with_the_root_of_the_size_up_to_100_times(stage):
    def lr(parameters):
        return resolve_stage(stage, Stage(), parameters, 1000).lr
    official = OFFICIAL[stage].lr
    assert lr(7_000_000_000) == lr(70_000_000_000) == official
    assert lr(1_750_000_000) == pytest.approx(2 * official, rel=0.05)  # two digits are kept
    assert lr(70_000_000) == pytest.approx(10 * official, rel=0.05)
    assert lr(700_000) == lr(7_000) == lr(1) == pytest.approx(100 * official)
    assert resolve_stage(stage, Stage(lr=3e-4), 1000, 1000).lr == 3e-4


def test_batches_give_50_steps_but_are_not_below_8_nor_above_the_official_size():
    def batch(rows, **given):
        return resolve_stage("improve", Stage(**given), 10**9, rows).batch
    assert [batch(n) for n in (1, 5, 8, 100, 400, 450, 1000, 6400, 10**6)] == [1, 5, 8, 8, 8, 9, 20, 128, 128]
    assert resolve_stage("warmup", Stage(), 10**9, 10**6).batch == 32
    assert batch(10, batch=64) == 64 and batch(10**6, batch=3) == 3
    kept = resolve_stage("improve", Stage(epochs=2.5, warmup=0.4), 10**9, 100)
    assert (kept.epochs, kept.warmup) == (2.5, 0.4)


@pytest.mark.parametrize("int8", [(), ("--int8",)])
def test_improving_goes_on_from_the_weights_that_forgetting_had_in_fp32(world, tmp_path, monkeypatch, int8):
    """In bf16 most of forgetting's steps are smaller than its folder can tell; they are not lost."""
    run, examples = start(world, tmp_path, "--dtype", "bf16", "--forget-lr", "1e-5", "--improve-lr", "1e-12",
                          "--improve-epochs", "1", *int8)
    ended = []
    monkeypatch.setattr(train, "run_stage", lambda *a: ended.append(run_stage(*a)) or ended[-1])
    mask = select_neurons(importance_of(run, examples)[0], 0.2)
    forgotten = train.forget(run, run.base, negatives(4, ()), mask)
    train.improve(run, forgotten, examples, mask, negatives(4, ()))
    forgetting, improving = ended
    assert torch.equal(improving.start, forgetting.master)
    assert (improving.start != improving.start.bfloat16().float()).float().mean() > 0.5
    assert equal(*(load_file(run.folder / name / "model.safetensors") for name in ("forget", "improve")))  # as stored
    shutil.rmtree(run.folder / "improve")
    name, values = next((n, v) for n, v in load_file(run.folder / EXACT).items() if n.endswith("values"))
    save_file({name: values[1:]}, run.folder / EXACT)
    with pytest.raises(UserError, match="forget.exact.safetensors: broken, or of another model"):
        train.improve(run, forgotten, examples, mask, negatives(4, ()))


@pytest.mark.parametrize("dtype, lr, moved", [("bf16", "1e-12", False), ("bf16", "1e-2", True),
                                              ("fp32", "1e-30", False), ("fp32", "1e-6", True)])
def test_it_warns_exactly_when_the_models_weights_did_not_move(world, tmp_path, capsys, dtype, lr, moved):
    """In the model's dtype, that is: a bf16 weight stays where it is while its fp32 master creeps."""
    run, examples = start(world, tmp_path, "--dtype", dtype, "--dpo-lr", lr, "--max-steps", "2")
    model = run.load(run.base)
    run_stage(run, "dpo", model, examples, dpo_objective(0.1))
    assert equal(weights(model), weights(run.load(run.base))) is not moved
    assert ("WARNING: the weights did not move" in capsys.readouterr().out) is not moved
