"""Knobs: what --help shows of each, one check for flags and settings files, settings that survive being written."""

import json
import re

import pytest

from allo_mini import UserError
from allo_mini.config import GROUPS, KNOBS, STAGES, Config, check, flat, parse


def flag(name):
    return "--" + name.replace("_", "-")


@pytest.fixture
def shown(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_unit_default_and_source_of_every_knob(shown):
    for name, f in KNOBS.items():
        [line] = re.findall(rf"^  {flag(name)}[, ].*(?:\n {{10,}}.*)*", shown, re.M)
        assert re.search(r"\[[\w. -]+; (paper|official|ours)\]$", line), line
        assert f.type is bool or re.match(rf"  {flag(name)} ([A-Z]+|{{[\w,]+}})", line), line
    assert re.search(r"--max-length TOKENS\s[^[]*\[0; official\]", shown)
    assert re.search(r"--forget-warmup SHARE\s[^[]*\[0.03; official\]", shown)
    assert re.search(r"--dpo-lr RATE\s[^[]*\[0.0; ours\]", shown)


def test_help_is_grouped_in_the_order_of_the_stages(shown):
    places = [shown.index(f"\n{name}:\n") for name in GROUPS]
    assert places == sorted(places) and [g for g in GROUPS if g in STAGES] == list(STAGES)
    for stage in STAGES:
        assert shown.index(f"\n{stage}:\n") < shown.index(f"\n  --{stage}-lr ")


def numbers():
    """(knob, value, whether it is within the knob's bounds) at and just outside every bound."""
    for name, f in KNOBS.items():
        step = 1 if f.type is int else 0.25
        for limit, bound in f.metadata["limits"].items() if f.type in (int, float) else ():
            inside, outside = {"above": (bound + step, bound), "at_least": (bound, bound - step),
                               "at_most": (bound, bound + step)}[limit]
            yield name, f.type(inside), True
            yield name, f.type(outside), False


@pytest.mark.parametrize("name, value, good", list(numbers()))
def test_flags_and_files_are_held_to_the_same_bounds(name, value, good, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({name: value}))
    rows = ["--model", "m", "--train", "t", "--samples", "s"]  # with samples, a temperature of 0 makes sense
    for argv, place in (([flag(name), str(value)], f"{flag(name)} is {value}, expected "),
                        (["--config", str(path)], f"{path}: {name} is {value}, expected ")):
        if good:
            assert flat(parse([*rows, *argv]))[name] == value
        else:
            with pytest.raises(UserError, match=re.escape(place)):
                parse([*rows, *argv])


def test_defaults_are_within_their_own_bounds():
    check(flat(Config()))


@pytest.mark.parametrize("nested", (True, False))
def test_settings_survive_being_written_and_read(nested, tmp_path, capsys):
    """As --print-config shows them, and under "config" as a run folder's config.json holds them."""
    argv = ["--model", "m", "--train", "a", "b", "--improve-lr", "1e-3", "--no-eval", "--p", "7", "--stop", "Q:"]
    with pytest.raises(SystemExit):
        parse([*argv, "--print-config"])
    written = json.loads(capsys.readouterr().out)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(written if nested else {"config": flat(parse(argv)), "files": {}}))
    assert parse(["--config", str(path)]) == parse(argv)
    again = parse(["--config", str(path), "--p", "9", "--eval"])  # flags override it
    assert (again.p, again.eval, again.stages["improve"].lr, again.train) == (9, True, 1e-3, ["a", "b"])
