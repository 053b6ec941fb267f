"""The comparison's arithmetic: paired differences, tables, and that a finished cell is never made again."""

import json
import random
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import reproduce  # noqa: E402

ARGS = dict(name="demo", model="", seeds=[1, 2], tune=[11], factors=[0.5, 1.0, 2.0], share=False, parts=["methods"], cells=None,
            more=[], val_limit=5, test_limit=0, train="", val="", test="", table=False, ratios=None, allo_factors=None)


def study_of(tmp_path, rows, **changes):
    if rows:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reproduce.Study(Namespace(**{**ARGS, "out": tmp_path / "out", "rows": tmp_path / "rows.jsonl", **changes}))


def row(part, cell, seed, bits, setting=()):
    return {"part": part, "cell": cell, "seed": seed, "setting": list(setting), "n": len(bits), "correct": f"{int('1' + bits, 2):x}",
            "accuracy": bits.count("1") / len(bits), "curve": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]}


@pytest.mark.parametrize("bits", ["0", "1", "0001", "1000", "0" * 70 + "1"])
def test_answers_survive_packing(bits):
    assert reproduce.answers(row("methods", "DPO", 1, bits)) == [int(b) for b in bits]


def test_paired_differences_by_hand():
    """Two seeds with their own questions: differences 1, 0, 0, 1 -> mean 0.5, standard error sqrt(1/3)/2."""
    mine = [row("methods", "ALLO", 1, "11"), row("methods", "ALLO", 2, "01")]
    theirs = [row("methods", "DPO", 1, "01"), row("methods", "DPO", 2, "00")]
    difference, p = reproduce.paired(mine, theirs, shared=False)
    assert difference == 0.5 and p == pytest.approx(0.0833, abs=1e-3)  # z = 1.732
    difference, _ = reproduce.paired(mine, theirs, shared=True)  # the same two questions: averages 0.5 and 0.5
    assert difference == 0.5
    assert reproduce.paired(mine, mine, shared=False) == (0.0, 1.0)


def test_equal_methods_are_rarely_told_apart():
    rng, hits = random.Random(0), 0
    for _ in range(200):
        a, b = (row("methods", name, 1, "".join(rng.choice("01") for _ in range(200))) for name in "ab")
        hits += reproduce.paired([a], [b], shared=False)[1] < 0.05
    assert 2 <= hits <= 20  # 10 expected


def test_the_best_setting_wins_and_an_edge_is_followed(tmp_path, monkeypatch):
    study, tried = study_of(tmp_path, []), []

    def cell(part, name, seed, flags):
        rate = float(flags[1])
        tried.append(rate)
        return {"accuracy": 1 - abs(rate - 1.6e-4)}
    monkeypatch.setattr(study, "cell", cell)
    assert study.tuned("DPO") == ["--dpo-lr", "0.00016"]  # the row ends at 8e-5
    assert tried == [2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4] and study.tuned("start") == []


def test_allo_s_two_rates_are_tuned_one_after_the_other(tmp_path, monkeypatch):
    study, tried = study_of(tmp_path, [], ratios=[0.1, 1.0, 4.0], allo_factors=[1.0, 0.5], factors=[1.0, 2.0, 3.0, 4.0]), []

    def cell(part, name, seed, flags):
        assert name == "ALLO"
        tried.append((float(flags[1]), float(flags[3])))
        return {"accuracy": {(2e-6, 2e-5): 0.3, (2e-5, 2e-5): 0.5, (8e-5, 2e-5): 0.4, (1e-5, 1e-5): 0.6}[tried[-1]]}
    monkeypatch.setattr(study, "cell", cell)
    assert study.tuned("ALLO, no forgetting") == ["--forget-lr", "1e-05", "--improve-lr", "1e-05"]
    assert len(set(tried)) == 4 == len(study.factors)


def test_an_ablation_can_have_its_own_rates(tmp_path, monkeypatch):
    """Tuned as a method of its own, at the ratio of forgetting and improving that ALLO was tuned to."""
    study, tried = study_of(tmp_path, [], ratios=[0.1, 4.0], factors=[0.5, 1.0, 2.0]), []

    def cell(part, name, seed, flags):
        tried.append(name)
        improve = float(flags[3])
        best = {"ALLO": 2e-5, "ALLO, all weights, own rates": 1e-5}[name]
        return {"accuracy": 1 - abs(improve - best) - abs(float(flags[1]) / improve - 4)}
    monkeypatch.setattr(study, "cell", cell)
    assert study.tuned("ALLO, all weights") == ["--forget-lr", "8e-05", "--improve-lr", "2e-05"] and {*tried} == {"ALLO"}
    assert study.tuned("ALLO, all weights, own rates") == ["--forget-lr", "4e-05", "--improve-lr", "1e-05"]


def test_finished_cells_are_read_back_and_missing_ones_made(tmp_path, monkeypatch):
    done = row("methods", "DPO", 1, "10", ["--dpo-lr", "4e-05"])
    study = study_of(tmp_path, [done])
    monkeypatch.setattr(reproduce, "call", lambda argv: pytest.fail("made again"))
    assert study.cell("methods", "DPO", 1, ["--dpo-lr", "4e-05"]) == done
    with pytest.raises(pytest.fail.Exception):
        study.cell("methods", "DPO", 1, ["--dpo-lr", "8e-05"])


def test_tables(tmp_path):
    rows = [row("methods", cell, seed, bits) for cell, answers in (("DPO", ("1100", "1000")), ("ALLO", ("1110", "1110")))
            for seed, bits in enumerate(answers, 1)]
    text = reproduce.tables(study_of(tmp_path, rows))
    assert "| DPO |  | 37.5 +- 17.7 | - | - | 2 |" in text and "| ALLO |  | 75.0 +- 0.0 | +37.5 |" in text
    assert reproduce.loss_at([{"loss": float(i)} for i in range(20)], 0.5) == 8.5


def test_one_small_study_from_samples_to_table(tmp_path, capsys):
    argv = sys.argv
    sys.argv = ["reproduce.py", str(tmp_path / "out"), "--rows", str(tmp_path / "rows.jsonl"), "--seeds", "1", "--tune", "--cells",
                "start", "DPO", "DPO, top 10 %", "DPO, last 10 %", "--test-limit", "8", "--more", "--limit", "40", "--n", "6", "--max-steps", "1", "--token-weights",
                "edit", "--locate", "gradient"]
    try:
        reproduce.main()
    finally:
        sys.argv = argv
    assert (tmp_path / "out/demo-study/report.html").is_file() and "| DPO |" in (tmp_path / "rows.md").read_text()
    assert {json.loads(line)["cell"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()} == {
        "start", "DPO", "DPO, top 10 %", "DPO, last 10 %"}
    top, last = (load_file(tmp_path / f"out/demo-1-{source}-10.safetensors") for source in ("top", "bottom"))
    assert top.keys() == last.keys() and not any((top[n] & last[n]).any() for n in top)
