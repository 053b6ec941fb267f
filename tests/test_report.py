"""report.html and the table: they show what the run folder holds, and nothing in it can run."""

import html
import json
import math
import re
import runpy
import sys
from types import SimpleNamespace as Stub

import pytest
import torch

from allo_mini.data.encoder import Encoder, Example
from allo_mini.data.tokenizer import load_tokenizer
from allo_mini.evaluation import report
from allo_mini.evaluation.answers import summary
from allo_mini.logprobs import score
from allo_mini.mask import Selected, to_tensors
from allo_mini.evaluation import report as results
from allo_mini.run.files import read_jsonl, save_tensors, write_json, write_jsonl
from helpers import error_of, random_ids, tiny_model, write_tokenizer

EVIL = '</span></div><script>e = 1</script><img src=x onerror="alert(1)"> "a" \'b\' &lt; é 漢 😀'
UP, NORM = "model.layers.{}.mlp.up_proj.weight", "model.norm.weight"
SHAPES = {UP.format(layer): (6, 2 * layer + 1) for layer in range(11)} | {NORM: (8,)}


def answers(pattern: str, mark: str = "x") -> list[dict]:
    return [{"input": f"q{i}", "gold": "1", "response": f"{mark}{i}.", "correct": digit == "1"}
            for i, digit in enumerate(pattern)]


EVALS = {"SFT": answers("0" * 30 + "1" * 8, "old"), "A<b>": answers("1" * 30 + "0" * 8, "new")}


def random_mask() -> dict[str, Selected]:
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}
    return {name: Selected.from_dense(values) for name, values in dense.items()}


@pytest.fixture
def folder(tmp_path):
    """A run folder made by hand, with everything the page shows."""
    evals = {name: [dict(row) for row in rows] for name, rows in EVALS.items()}
    evals["SFT"][0] |= {"response": EVIL + "\ud800", "input": EVIL}
    steps = [{"stage": "improve", "step": i + 1, "loss": 0.7 - i / 10000, "tokens/s": 5.0,
              "rewards/margins": math.sin(i), "rewards/accuracies": 1.0} for i in range(1000)]
    steps.append({"stage": "improve", "seconds": 7.25, "mem/peak_gb": 3.5})
    write_json(tmp_path / "config.json", {"config": {"model": EVIL}, "machine": {"dtype": "fp32"}})
    table = {name: summary(rows) for name, rows in evals.items()}
    write_json(tmp_path / "results.json", {"results": table})
    for name, rows in evals.items():
        write_jsonl(tmp_path / f"eval-{name}.jsonl", rows)
    write_jsonl(tmp_path / "metrics.jsonl", steps)
    write_jsonl(tmp_path / "token_examples.jsonl", [{
        "prompt": EVIL, "tokens": [EVIL, "b"], "weights": [1.0, 0.0], "scores": [0.25, 0.75],
        "log_ratios": [-0.5, 0.125], "kept": [False, True]}])
    shapes = {name: " ".join(map(str, shape)) for name, shape in SHAPES.items()}
    save_tensors(to_tensors(random_mask()), tmp_path / "mask.safetensors", shapes)
    return tmp_path


def test_the_page_shows_the_folder_and_escapes_it(folder):
    page = report.write_report(folder).read_text(encoding="utf-8")
    titles = ["Results", "Training curves", "Trained weights", "Tokens that count",
              "Before and after", "Time and memory", "Settings"]
    assert re.findall("<h2 .*?>(.*?)</h2>", page) == titles
    assert re.findall('<a href="#(.*?)"', page) == re.findall('<h2 id="(.*?)"', page)
    assert f'class="verdict">{html.escape(report.verdict(EVALS))}<' in page
    assert page.count("<details") == page.count("</details>") == 6
    assert not re.search('<script|<img|<link|onerror="|src="|://', page)
    boxes = [html.unescape(box) for box in re.findall('<div class="text">(.*?)</div>', page)]
    assert boxes.count(EVIL) == 2 and EVIL + "?" in boxes  # half a surrogate stops nothing
    for shown in ("21.1 %", "[11.1, 36.3]", "78.9 %", "+57.9", ">7.2\n", "3.50", "A&lt;b&gt;",
                  'class="w" style="--a:1.0"', "<sup>0.25</sup>", "<sup>0.12</sup>"):
        assert shown in page, shown
    assert page.count("<h3>Won") == page.count("<h3>Lost") == 6
    assert {"old5.", "new30."} < {*boxes} and "new6." not in boxes
    lines = [line.split() for line in re.findall('points="(.*?)"', page, re.S)]
    for line in [line for line in lines if len(line) > 2]:  # the others are the legend's
        corners = [tuple(map(float, point.split(","))) for point in line]
        assert len(corners) == 143 <= report.POINTS and corners[-1][0] == 300
        assert all(0 <= x <= 300 and 0 <= y <= 120 for x, y in corners)


def test_stages_that_share_a_metric_share_a_chart_by_their_share_of_steps(folder):
    """Ten steps of DPO and a thousand of improving both end at 100 %; IPO's loss stands apart."""
    rows = [{"stage": stage, "step": i + 1, "loss": loss, "rewards/margins": i / 10,
             "rewards/accuracies": 0.5} for stage, loss in (("dpo", 0.7), ("ipo", 25.0))
            for i in range(10)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    page = report.write_report(folder).read_text(encoding="utf-8")
    assert re.findall('aria-label="(.*?)"', page)[1:] == [
        "loss: ALLO (improve), DPO", "rewards/margins: ALLO (improve), DPO, ipo",
        "rewards/accuracies: ALLO (improve), DPO, ipo", "improve: rewards: rewards/margins",
        "dpo: rewards: rewards/margins", "ipo: loss: ipo", "ipo: rewards: rewards/margins"]
    logged = report.Log.read(folder)
    assert [x for x, _ in report.curve(logged, "dpo", "loss")] == [*range(10, 101, 10)]


def test_of_preferences_rewards_come_first_and_raw_numbers_are_named(folder):
    start = {"n": 3, "accuracy": 0.5, "low": 0.4, "high": 0.6, "margin": -7.5}
    tuned = start | {"margin": 1.25, "reward": 0.125, "reward_accuracy": 0.75}
    about = {"results": {"start": start, "DPO": tuned}, "command": "train.py --x <y>",
             "date": "2026-01-02", "versions": {"torch": "9.9"}}
    write_json(folder / "results.json", about)
    cfg = {"config": {"model": "m", "pairs": ["a/b.jsonl", "c"]}, "machine": {}}
    write_json(folder / "config.json", cfg)
    for name, margins in {"start": [-9, 0, 3], "DPO": [-8, 2, 2]}.items():
        write_jsonl(folder / f"eval-{name}.jsonl", [
            {"input": "q", "margin": margin, "correct": margin > 0} for margin in margins])
    page = report.write_report(folder).read_text(encoding="utf-8")
    head = re.search("<thead><tr>(.*?)</thead>", page)[1]
    assert re.findall(">([^<>]+)", head) == [
        "model", "reward accuracy", "reward margin", "raw accuracy, 95 % interval", "raw margin",
        "rows"]
    for shown in ("<h1>m, trained on b.jsonl, c</h1>", "train.py --x &lt;y&gt;", "2026-01-02",
                  "torch 9.9", ">75.0 %", ">0.125", ">-7.50", "pi_start(y-)] &gt; 0"):
        assert shown in page, shown


@pytest.mark.parametrize("first, last, sentence", [
    ("0001" * 50, "1" * 200, "B is 75.0 points above A on 200 rows (p = 0.0002)."),
    ("1" * 200, "0001" * 50, "B is 75.0 points below A on 200 rows (p = 0.0002)."),
    ("01" * 1000, "10" * 1000, "B and A: no difference that 2,000 rows can show (p = ")])
def test_the_verdict_is_on_the_last_two_models(first, last, sentence):
    """Of preferences on how often each one's margin is above the start's."""
    evals, margins = {"start": answers(last)}, {"start": [{"margin": 5.0, "correct": True}] * 2000}
    for name, pattern in (("A", first), ("B", last)):
        evals[name] = answers(pattern)
        margins[name] = [{"margin": 4.0 + 2 * int(x), "correct": True} for x in pattern]
    assert all(report.verdict(rows).startswith(sentence) for rows in (evals, margins))
    assert report.verdict({"A": []}) == report.verdict({}) == ""


def test_what_is_not_there_is_left_out(folder):
    for name in ("results.json", "mask.safetensors", "token_examples.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    page = report.write_report(folder).read_text()
    assert re.findall("<h2 .*?>(.*?)</h2>", page) == ["Settings"]


def test_density_counts_the_mask_in_all_and_by_kind_and_layer(capsys):
    mask, noted = random_mask(), {}
    cells = report.density(mask)
    assert cells["all", "all"] == [sum(map(len, mask.values())), 6 * 121 + 8]
    assert cells["norm", "norm"] == cells["all", "norm"] == [len(mask[NORM]), 8]
    assert cells["up_proj", "10"] == [int(mask[UP.format(10)].dense().sum()), 6 * 21]
    log = Stub(write=lambda _, **values: noted.update(values))
    results.describe_mask(Stub(log=log), mask, 50.0)
    assert f"{cells['all', 'all'][0]:,} weights" in capsys.readouterr().out
    assert cells["up_proj", "all"] == [sum(map(len, mask.values())) - len(mask[NORM]), 6 * 121]
    assert noted == {"percent": 50.0, "mask/density": cells["all", "all"][0] / (6 * 121 + 8)}


def test_watched_tokens_are_those_of_the_two_models(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"), 120)
    cfg = Stub(epsilon=0.25, micro_tokens=4096)
    run = Stub(folder=tmp_path, encoder=Encoder(tokenizer, "none", 100), cfg=cfg, load=lambda x: x,
               stage=lambda name, artefact, make: make(tmp_path / artefact))
    examples = [Example(random_ids(5, i, 97), [random_ids(9, i + 50, 97)]) for i in range(30)]
    model, other = tiny_model(0, trainable=False), tiny_model(1, trainable=False)
    before, after = score(model, examples), score(other, examples)
    results.record_tokens(run, model, other, examples)
    rows = [row for _, row in read_jsonl(tmp_path / "token_examples.jsonl")]
    assert len(rows) == 10 <= report.SHOWN
    for row, example, [ref], [now] in zip(rows, examples[::3], before[::3], after[::3]):
        torch.testing.assert_close(torch.tensor(row["log_ratios"]), now - ref)
        assert sum(row["kept"]) == 2 and row["kept"][int((now - ref).argmin())]
        assert "".join(row["tokens"]) == tokenizer.decode(example.responses[0])


@pytest.mark.parametrize("file, text, message", [
    ("config.json", "{}", "cannot be read"), ("metrics.jsonl", '{"stage": "a"}\n{', "jsonl:2"),
    ("results.json", "[1]", "results.json: expected a JSON object, found list"),
    ("token_examples.jsonl", '{"prompt": "a", "tokens": ["b"]}\n', "cannot be read"),
    ("mask.safetensors", "no", "mask.safetensors: cannot be read")])
def test_a_broken_folder_is_one_line(folder, monkeypatch, capsys, file, text, message):
    (folder / file).write_text(text)
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(report.__file__, run_name="__main__")
    assert message in error_of(capsys)
    assert not (folder / "report.html").exists()
