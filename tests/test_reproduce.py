"""The comparison: paired differences, tuned rates, tables; no finished cell is made again."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import reproduce  # noqa: E402
from allo_mini.run.folder import load_mask  # noqa: E402


def study_of(*flags):
    return reproduce.Study(reproduce.make_parser().parse_args(["out", "--tune", "11", *flags]))


def row_of(cell, seed, bits):
    return {"part": "methods", "cell": cell, "seed": seed, "setting": ["--dpo-lr", "4e-05"],
            "correct": f"{int('1' + bits, 2):x}", "accuracy": bits.count("1") / len(bits)}


def test_paired_differences_by_hand():
    """Two seeds with their own questions: differences 1, 0, 0, 1 -> 0.5, error sqrt(1/3)/2."""
    assert reproduce.answers(row_of("DPO", 1, "0" * 70 + "1")) == [0] * 70 + [1]
    mine = [row_of("ALLO", 1, "11"), row_of("ALLO", 2, "01")]
    theirs = [row_of("DPO", 1, "01"), row_of("DPO", 2, "00")]
    difference, p = reproduce.paired(mine, theirs, shared=False)
    assert difference == 0.5 and p == pytest.approx(0.0833, abs=1e-3)  # z = 1.732
    assert reproduce.paired(mine, theirs, shared=True)[0] == 0.5  # the same two questions
    assert reproduce.paired(mine, mine, shared=False) == (0.0, 1.0)


@pytest.mark.parametrize("cell, flags, best, chosen", [
    ("DPO", "--factors 0.5 1 2", {"DPO": [1.6e-4]}, [1.6e-4]),  # beyond the row's end
    ("ALLO, no forgetting", "--ratios 0.1 1 4 --allo-factors 1 0.5", {"ALLO": [1.4e-5, 1e-5]},
     [1e-5, 1e-5]),  # as ALLO: first the ratio, then the rate
    ("ALLO, all weights, own rates", "--ratios 0.1 4 --factors 0.5 1 2",
     {"ALLO": [8e-5, 2e-5], "ALLO, all weights, own rates": [4e-5, 1e-5]}, [4e-5, 1e-5])])
def test_the_best_rates_are_found(cell, flags, best, chosen, monkeypatch):
    tried, study = set(), study_of(*flags.split())

    def made(part, name, seed, flags):
        tried.add(name)
        rates = map(float, flags[1::2])
        return {"accuracy": 1 - sum(abs(rate - right) for rate, right in zip(rates, best[name]))}

    monkeypatch.setattr(study, "cell", made)
    assert list(map(float, study.tuned(cell)[1::2])) == chosen
    assert tried == {*best} and study.tuned("start") == []


def test_finished_cells_are_read_back_and_missing_ones_made(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row_of("DPO", 1, "10")) + "\n")
    study = study_of("--rows", str(tmp_path / "rows.jsonl"))
    monkeypatch.setattr(study, "shared", lambda *_: pytest.fail("made again"))
    assert study.cell("methods", "DPO", 1, ["--lr-dpo", "4e-05"])["accuracy"] == 0.5
    with pytest.raises(pytest.fail.Exception):
        study.cell("methods", "DPO", 1, ["--lr-dpo", "8e-05"])


@pytest.mark.parametrize("flags", ["--name demo", "--name ecqa --model x"])
def test_the_shipped_tables_are_those_of_the_shipped_rows(flags):
    study = study_of(*flags.split())
    assert reproduce.tables(study) == study.file.with_suffix(".md").read_text()


def test_one_small_study_from_samples_to_table(tmp_path):
    cells = ["start", "DPO", "DPO, top 10 %", "DPO, last 10 %", "ALLO"]
    reproduce.main([str(tmp_path / "out"), "--rows", str(tmp_path / "rows.jsonl"), "--seeds", "1",
                    "--tune", "--cells", *cells, "--test-limit", "8", "--more", "--limit", "40",
                    "--n", "6", "--max-steps", "1", "--token-weights", "edit", "--locate", "snr"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["cell"] for row in rows} == {*cells} and {row["n"] for row in rows} == {8}
    base = tmp_path / "out/demo-1-base"
    top, last = load_mask(base / "top-10.safetensors"), load_mask(base / "last-10.safetensors")
    assert not any((top[name].dense() & last[name].dense()).any() for name in top)
    assert {path.parent for path in (tmp_path / "out").rglob("*.safetensors")} == {base}
