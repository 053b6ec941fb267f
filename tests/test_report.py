"""report.html: what it shows, on what it rests, and that nothing in it can run or leak."""

import json
import re
import math
import runpy
import sys
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import train
from allo_mini import config, inputs, report
from allo_mini.checkpoint import load_model, load_tokenizer
from allo_mini.data import Encoder
from allo_mini.files import load_mask, save_mask
from allo_mini.logprobs import score
from allo_mini.mask import kind_of, layer_of, pack_mask
from test_train import arguments, world

EVIL = '</span></div><script>window.evil = 1</script><img src=x onerror="alert(1)"> "a" \'b\' &lt; é 漢 😀'
VOID = {"meta", "br", "img", "input", "link"}
OPTIONAL = {"tr", "td", "th"}  # HTML lets their end tags go


class Page(HTMLParser):
    """A parsed page: tags with attributes, texts of the elements of each class, and whether all tags close."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.texts, self.headings = [], [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert not [tag for tag, *_ in self.open if tag not in OPTIONAL]

    def handle_starttag(self, tag, attrs):
        while self.open and tag in OPTIONAL and self.open[-1][0] in (OPTIONAL if tag == "tr" else OPTIONAL - {"tr"}):
            self.shut()
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append([tag, dict(attrs), []])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open[-1][0] in OPTIONAL and self.open[-1][0] != tag:
            self.shut()
        assert self.open[-1][0] == tag, f"<{self.open[-1][0]}> is closed by </{tag}>"
        self.shut()

    def shut(self):
        tag, attrs, parts = self.open.pop()
        text = "".join(parts)
        self.texts.append((tag, attrs.get("class", ""), text))
        if self.open:
            self.open[-1][2].append(text)

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def sections(self):
        return [text for tag, _, text in self.texts if tag == "h2"]

    def of(self, css):
        return [text for _, classes, text in self.texts if css in classes.split()]


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A whole run whose questions and wrong samples hold markup, quotes and characters of several tokens."""
    folder = tmp_path_factory.mktemp("whole")
    samples = [{**row, "samples": [row["samples"][0], f"{EVIL} is 1", "No idea."]} for row in rows_of(world / "samples.jsonl")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    argv = arguments(world, folder / "run", "--samples", str(folder / "samples.jsonl"), "--p-forget", "2",
                     "--eval-every", "4", "--val-rows", "2", "--improve-lr", "1e-3")
    assert train.main(argv) == 0
    return folder / "run"


def test_a_run_ends_with_a_report_of_every_section(whole, capsys):
    page = Page(whole / "report.html")
    assert [name for name in page.sections() if name != "Before and after"] == [
        "Results", "Training curves", "Selected neurons", "Tokens that count", "Time and memory", "Settings"]
    table = json.loads((whole / "results.json").read_text())["results"]
    text = (whole / "report.html").read_text()
    for name, result in table.items():
        assert f'<th scope="row">{name}<td class="n">{100 * result["accuracy"]:.1f} %' in text
    for stage in ("dpo", "warmup", "reward", "forget", "improve"):
        assert f'aria-label="loss of {stage}"' in text
    assert 'aria-label="rewards of improve"' in text and 'aria-label="accuracy of improve"' in text
    assert "eval/score" in text and 'aria-label="accuracy of reward"' not in text
    measured = {note["stage"]: note for note in rows_of(whole / "metrics.jsonl") if "seconds" in note}
    for stage, note in measured.items():
        [row] = re.findall(rf'<tr><th scope="row">{stage}<td class="n">{note["seconds"]:.1f}.*?(?=<tr>)', text, re.S)
        assert f'<td class="n">{note["mem/peak_gb"]:.2f}' in row
    assert {f"test {name}" for name in table} | {"dpo", "improve"} < {*measured}


@pytest.mark.parametrize("movement", [0.31, None])
@pytest.mark.parametrize("halves", [0.42, None])
def test_overlaps_are_told_where_they_were_measured(whole, tmp_path, movement, halves):
    """A random mask has none, and those of a large model's two halves are not made."""
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    save_mask({"model.norm.weight": torch.ones(8, dtype=torch.bool)}, tmp_path / "mask.safetensors")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({
        "stage": "locate", "movement_gradient_overlap": movement, "halves_overlap": halves}) + "\n")
    text = report.write_report(tmp_path).read_text()
    assert ("31 % of their weights" in text) == bool(movement) and ("share 42 %" in text) == bool(halves)


def test_nothing_from_the_data_becomes_markup(whole):
    page = Page(whole / "report.html")
    assert {tag for tag, _ in page.tags} <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div",
                                             "table", "thead", "tr", "th", "td", "span", "b", "i", "em", "sub", "strong",
                                             "figure", "figcaption", "svg", "line", "text", "polyline", "details", "summary"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "srcdoc", "action")]
    policy = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "url(" not in (whole / "report.html").read_text() and "@import" not in (whole / "report.html").read_text()
    boxes = [text for text in page.of("mono") if "window.evil" in text]
    assert boxes and all(text.replace("·", "").strip() == f"{EVIL} is 1</s>" for text in boxes)


def test_tokens_carry_their_score_weight_and_log_ratio(whole):
    rows, page = rows_of(whole / "token_examples.jsonl"), Page(whole / "report.html")
    assert len(rows) == report.SHOWN
    scores = {(row["output"], tuple(row["reward"])) for row in rows_of(whole / "token_weights.jsonl")}
    expected = []
    for row in rows:
        assert ("".join(row["tokens"]).removesuffix("</s>"), tuple(row["scores"])) in scores
        assert row["weights"] == [float(s < 0.5) for s in row["scores"]]
        expected += [f"score {s:.4f}, weight {w:.3g}" for s, w in zip(row["scores"], row["weights"])]
        expected += [f"log-ratio {x:+.4f}, {'kept' if k else 'filtered'}" for x, k in zip(row["log_ratios"], row["kept"])]
    shown = [a["title"] for tag, a in page.tags if tag == "span" and "title" in a]
    assert shown == expected
    marked = [a["title"] for tag, a in page.tags if tag == "span" and a.get("class") in ("w", "k") and "title" in a]
    assert marked == [title for title in expected if "weight 1" in title or title.endswith("kept")]


def test_the_filter_shown_is_the_filter_of_the_saved_models(whole, world):
    """log pi/pi_ref between the folders forget and improve, and the k = max(1, floor(epsilon n)) lowest of them."""
    before, after = load_model(whole / "forget"), load_model(whole / "improve")
    encoder = Encoder(load_tokenizer(whole / "improve", 10**9), "chat", 300)
    for row in rows_of(whole / "token_examples.jsonl"):
        example = encoder.example(row["prompt"], ["".join(row["tokens"]).removesuffix("</s>")])
        [ref], [now] = score(before, [example])[0], score(after, [example])[0]
        ratios = torch.tensor(row["log_ratios"])
        torch.testing.assert_close(ratios, now - ref, atol=1e-4, rtol=1e-3)
        assert float(ratios.abs().max()) > 1e-3
        k = max(1, len(ratios) // 10)
        assert row["kept"] == [x <= sorted(row["log_ratios"])[k - 1] for x in row["log_ratios"]]


@pytest.mark.parametrize("name", ["mask", "mask-forget"])
def test_the_heat_map_counts_the_mask(whole, name):
    path, shapes = whole / f"{name}.safetensors", {n: p.shape for n, p in load_model(whole / "improve").named_parameters()}
    table, mask = report.read_density(path), load_mask(path, shapes)
    for kind, layer in table["counts"]:
        some = [m for n, m in mask.items() if kind in ("all", kind_of(n)) and layer in ("all", layer_of(n))]
        assert list(table["counts"][kind, layer]) == [sum(int(m.sum()) for m in some), sum(m.numel() for m in some)]
    assert table["layers"] == ["0", "1"] and {"q_proj", "embed_tokens", "norm"} <= set(table["kinds"])
    assert f"{name}.safetensors: " in (whole / "report.html").read_text()


def test_density_of_sizes_that_are_no_whole_bytes(tmp_path):
    g = torch.Generator().manual_seed(0)
    mask = {f"model.layers.{i}.mlp.up_proj.weight": torch.rand(3, 2 * i + 1, generator=g) < 0.5 for i in range(12)}
    save_mask(mask, tmp_path / "mask.safetensors")
    table = report.read_density(tmp_path / "mask.safetensors")
    assert table["layers"] == [str(i) for i in range(12)]
    assert [table["counts"]["up_proj", str(i)][0] for i in range(12)] == [int(m.sum()) for m in mask.values()]
    assert table["shades"]["all", "all"] == 0.5 and all(math.isfinite(x) for x in table["shades"].values())


def test_densities_by_layer_and_by_kind():
    shapes = {"model.embed_tokens.weight": (16, 8), "model.layers.0.mlp.up_proj.weight": (13, 8),
              "model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.1.mlp.up_proj.weight": (13, 8), "model.norm.weight": (8,)}
    mask = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    mask["model.layers.0.mlp.up_proj.weight"][:3] = True
    mask["model.layers.1.mlp.up_proj.weight"][:1] = True
    mask["model.norm.weight"][:2] = True
    shares = report.density(pack_mask(mask.items()))["shares"]
    by_layer = {layer: share for (kind, layer), share in shares.items() if kind == "all"}
    assert by_layer == {"embed_tokens": 0, "0": 24 / 168, "1": 8 / 104, "norm": 2 / 8, "all": 34 / 408}
    by_kind = {kind: share for (kind, layer), share in shares.items() if layer == "all"}
    assert by_kind == {"embed_tokens": 0, "q_proj": 0, "up_proj": 32 / 208, "norm": 2 / 8, "all": 34 / 408}


def test_pieces_put_together_are_the_text(world):
    tokenizer = load_tokenizer(world / "model", 10**9)
    for text in ("é", "a漢b😀", " two  spaces\n\ttab ", EVIL):
        pieces = report.pieces(tokenizer, tokenizer.encode(text, bos=False))
        assert "".join(pieces) == text and len(pieces) == len(tokenizer.encode(text, bos=False))
        assert not any("\ufffd" in piece for piece in pieces)


def by_hand(folder, evals, **files):
    """A run folder with nothing in it but answers, and what `files` hold."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {"model": "m", "seed": 1}}))
    results = {name: report.summary(items) for name, items in evals.items()}
    (folder / "results.json").write_text(json.dumps({"results": results}))
    for name, items in evals.items():
        (folder / f"eval-{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def answers(pattern, mark="x"):
    return [{"input": f"q{i}", "gold": "1", "response": f"{mark}{i}", "finished": True, "correct": c == "1"}
            for i, c in enumerate(pattern)]


def test_before_and_after_shows_rows_won_and_rows_lost(tmp_path):
    evals = {"SFT": answers("0" * 30 + "1" * 3 + "0011", "before"), "ALLO": answers("1" * 30 + "0" * 3 + "0011", "after")}
    page = Page(report.write_report(by_hand(tmp_path / "run", evals)))
    heads = [text for tag, _, text in page.texts if tag == "h3"]
    assert heads.count("Won") == 9 and heads.count("Lost") == 3 and "Row by row" in heads
    said = page.of("text")
    for row in (0, 8, 30, 32):
        assert f"q{row} (expected: 1)" in said and f"before{row}" in said and f"after{row}" in said
    assert "before9" not in said and "before33" not in said


def test_answers_are_escaped_and_half_a_surrogate_stops_nothing(tmp_path):
    evals = {"SFT": answers("0"), "A<b>": answers("1")}
    evals["A<b>"][0]["response"] = EVIL + "\ud800"
    evals["SFT"][0] |= {"input": EVIL, "gold": EVIL}
    page = Page(report.write_report(by_hand(tmp_path / "run", evals)))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert f"{EVIL} (expected: {EVIL})" in page.of("text") and EVIL + "?" in page.of("text")
    assert any(tag == "strong" and text == "A<b>" for tag, _, text in page.texts)


def test_preference_rows_show_their_margins(tmp_path):
    evals = {name: [{"prompt": [{"role": "user", "content": "why?"}], "margin": m, "correct": m > 0}] * 2
             for name, m in (("reference", -1.25), ("ALLO", 2.5))}
    page = Page(report.write_report(by_hand(tmp_path / "run", evals)))
    text = (tmp_path / "run/report.html").read_text()
    assert "why?" in page.of("text") and "wrong, margin -1.25" in text and "right, margin 2.50" in text
    assert '<th class="n">margin' in text


@pytest.mark.parametrize("first, second", [("1110000000", "0000000111"), ("1" * 10 + "00" + "1", "0" * 10 + "11" + "1"),
                                           ("1100", "1100"), ("", ""), ("1", "0")])
def test_mcnemar_is_the_exact_binomial_test(first, second):
    a, b, p = report.mcnemar([c == "1" for c in first], [c == "1" for c in second])
    assert (a, b) == (sum(x > y for x, y in zip(first, second)), sum(x < y for x, y in zip(first, second)))
    tail = sum(Fraction(math.comb(a + b, i), 2**(a + b)) for i in range(min(a, b) + 1))
    assert p == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_mcnemar_of_many_rows():
    assert report.mcnemar([True] * 5000, [False] * 5000)[2] == 0.0
    assert report.mcnemar([True] * 20000 + [False] * 20000, [False] * 20000 + [True] * 20000)[2] == pytest.approx(1)


def test_curves_keep_to_their_axes_however_long_the_stage():
    steps = [{"stage": "improve", "step": i + 1, "loss": 0.7 - i / 10000, "rewards/margins": math.sin(i), "rewards/accuracies":
              1.0, "tokens/s": 5.0} for i in range(3000)] + [{"stage": "forget", "step": 1, "loss": "nan"},
                                                             {"stage": "forget", "step": 2, "loss": 0.5}]
    charts = report.curves(steps)
    assert list(charts) == ["improve", "forget"]
    loss, rewards, accuracy = charts["improve"]
    assert accuracy["ticks"] == ["0", "0.5", "1"] and float(rewards["ticks"][0]) < -0.99 and rewards["steps"] == 3000
    for chart in (*charts["improve"], *charts["forget"]):
        for line in chart["lines"]:
            for points in (line["raw"], line["smooth"]):
                xy = [tuple(map(float, point.split(","))) for point in points.split()]
                assert 1 <= len(xy) <= 240 and xy == sorted(xy, key=lambda p: p[0])
                assert all(0 <= x <= 300 and 0 <= y <= 110 for x, y in xy)
    heights = [float(point.split(",")[1]) for point in loss["lines"][0]["smooth"].split()]
    assert heights == sorted(heights) and heights[0] < 10 and heights[-1] > 100  # it falls: y points down
    ten = report.curves([{"stage": "dpo", "step": i + 1, "loss": float(i)} for i in range(10)])["dpo"][0]["lines"][0]["raw"]
    assert ten.split()[0] == "0.0,110.0" and [float(x) for x in ten.split()[-1].split(",")] == [300, 0]
    assert charts["forget"][0]["lines"][0]["ends"] == (0.5, 0.5)


@pytest.mark.parametrize("more, there, missing", [
    (["--only-sft", "--sft-epochs", "1"], ["Results", "Training curves", "Time and memory"],
     ["Selected neurons", "Tokens that count", "Before and after"]),
    (["--method", "dpo", "--no-eval"], ["Training curves"], ["Results", "Selected neurons", "Tokens that count"]),
    (["--method", "allo", "--no-eval", "--token-weights", "edit", "--mask"], ["Selected neurons", "Tokens that count"],
     ["Results"]),
])
def test_a_run_of_some_stages_has_the_sections_it_can_fill(whole, world, tmp_path, more, there, missing):
    more = [*more, str(whole / "mask.safetensors")] if more[-1] == "--mask" else more
    assert train.main(arguments(world, tmp_path / "run", "--max-steps", "2", *more)) == 0
    sections = Page(tmp_path / "run/report.html").sections()
    assert set(there) <= set(sections) and not set(missing) & set(sections)
    assert "nan" not in (tmp_path / "run/report.html").read_text()


def test_a_pairs_run_reports_its_margins(world, tmp_path):
    argv = ["--model", str(world / "model"), "--pairs", str(world / "pairs.jsonl"), "--prompt", "chat", "--max-length", "300",
            "--token-weights", "uniform", "--method", "allo", "--locate", "gradient", "--max-steps", "1",
            "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    page = Page(tmp_path / "run/report.html")
    assert "margin" in [text.strip() for tag, _, text in page.texts if tag == "th"]
    margins = [result["margin"] for result in json.loads((tmp_path / "run/results.json").read_text())["results"].values()]
    assert {f"{m:.2f}" for m in margins} <= {text.strip() for tag, _, text in page.texts if tag == "td"}
    assert {"Results", "Selected neurons", "Tokens that count"} <= set(page.sections())
    assert 'title="weight 1"' in (tmp_path / "run/report.html").read_text()


def command(monkeypatch, *argv):
    """python -m allo_mini.report, in this process -> exit code."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, argv)])
    try:
        runpy.run_path(report.__file__, run_name="__main__")
    except SystemExit as e:
        return e.code
    return 0


def test_the_command_makes_the_same_report_anew(whole, monkeypatch, capsys):
    written = (whole / "report.html").read_text()
    (whole / "report.html").unlink()
    assert command(monkeypatch, whole) == 0
    assert capsys.readouterr().out.strip() == str(whole / "report.html")
    assert (whole / "report.html").read_text() == written


def test_a_finished_run_without_its_report_gets_it(world, tmp_path, capsys):
    argv = arguments(world, tmp_path / "run", "--method", "dpo", "--no-eval", "--max-steps", "1")
    assert train.main(argv) == 0 and f"report  {tmp_path / 'run/report.html'}" in capsys.readouterr().out
    written = (tmp_path / "run/report.html").read_text()
    (tmp_path / "run/report.html").unlink()
    assert train.main(argv) == 0 and (tmp_path / "run/report.html").read_text() == written


@pytest.mark.parametrize("file, text, message", [
    (None, None, "config.json: cannot be read: No such file"),
    ("config.json", "{}", "no run folder: its config.json holds no settings of a run"),
    ("metrics.jsonl", '{"stage": "forget"}\n{"sta\n', "metrics.jsonl:2: not valid JSON"),
    ("results.json", "[1]", "results.json:1: expected a JSON object, found list"),
    ("token_examples.jsonl", '{"prompt": "a", "tokens": ["b"]}\n', "cannot be shown"),
    ("mask.safetensors", "no", "mask.safetensors: not a complete safetensors file"),
])
def test_a_folder_that_cannot_be_shown_is_one_line(tmp_path, monkeypatch, capsys, file, text, message):
    folder = by_hand(tmp_path / "run", {"SFT": answers("01")}) if file else tmp_path / "nothing"
    if file:
        (folder / file).write_text(text)
    assert command(monkeypatch, folder) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err and not said.out
    assert not (folder / "report.html").exists()


def test_home_and_tokens_stay_out_of_settings_and_report(world, tmp_path, monkeypatch, capsys):
    """Paths into the home folder are written as ~, which --config and a second run understand."""
    home = tmp_path / "home" / "some-body"
    home.mkdir(parents=True)
    (home / "model").symlink_to(world / "model")
    for module in (config, inputs, report):
        monkeypatch.setattr(module, "HOME", json.dumps(f"{home}/")[:-1])
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    argv = arguments(world, tmp_path / "run", "--method", "dpo", "--no-eval", "--max-steps", "1", "--model", f"{home}/model")
    assert train.main(argv) == 0
    for name in ("config.json", "report.html"):
        text = (tmp_path / "run" / name).read_text()
        assert "some-body" not in text and "hf_secret" not in text
    written = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert written["model"] == "~/model" and "~/model" in (tmp_path / "run/report.html").read_text()
    assert config.parse(["--config", str(tmp_path / "run/config.json")]).model == f"{home}/model"
    assert train.main(argv) == 0 and "this run is finished" in capsys.readouterr().out
