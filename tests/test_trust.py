"""Nothing is run that was not given: no pickle, no remote code, bounded templates, named downloads, no paths told."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from helpers import tiny_model, write_tokenizer
from test_bad_input import GOOD, TEMPLATE, write

import train
from allo_mini import UserError, config, inputs, report, template
from allo_mini.checkpoint import find_folder, load_model, save_model
from allo_mini.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "allo_mini").rglob("*.py")]
CODE_FROM_DATA = [r"torch\.load\b", "pickle", r"\bdill\b", r"\bjoblib", r"\bmarshal\b", r"\bshelve\b", "trust_remote",
                  r"\bexec\(", r"(?<![\w.])eval\(", r"(?<![\w.])compile\(", r"__import__",
                  r"importlib\b", r"yaml\.", r"\bnp\.load\b", r"torch\.hub", r"shell=True"]


@pytest.mark.parametrize("pattern", CODE_FROM_DATA)
def test_no_source_turns_data_into_code(pattern):
    assert len(SOURCES) > 20
    assert [f"{path.name}: {line.strip()}" for path in SOURCES for line in path.read_text().splitlines()
            if re.search(pattern, line)] == []


def test_weights_in_another_format_are_not_opened(tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(UserError, match="model.safetensors: file not found"):
        load_model(str(tmp_path / "model"))


# ---- chat templates ----------------------------------------------------------------------------------------

def tokenizer(tmp_path, text):
    return Tokenizer(write_tokenizer(tmp_path / "model", chat_template=text))


TALK = [{"role": "user", "content": "hello"}]
FORBIDDEN = ["{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}", "{{ messages.__class__.__mro__[1] }}",
             "{{ ''.__class__.__base__.__subclasses__() }}", "{{ cycler.__init__.__globals__.os }}",
             "{{ lipsum.__globals__['os'].popen('id') }}", "{{ raise_exception.__globals__.os }}",
             "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}", "{% extends 'base.html' %}",
             "{{ range(10**7) | list }}", "{{ self.__init__.__globals__ }}", "{{ x.y }}",
             "\ud800{{ messages[0].content }}"]


@pytest.mark.parametrize("text", FORBIDDEN)
def test_a_template_reaches_and_changes_nothing(tmp_path, text):
    with pytest.raises(UserError, match="the chat template fails: ."):
        tokenizer(tmp_path, text).render(TALK, True)


BOMBS = {"endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "a huge power": "{{ 10 ** (10 ** 9) }}", "a long string": "{{ 'ab' * 10 ** 10 }}",
         "doubling": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
         "a wide field": "{{ '%9999999999d' % 5 }}", "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
         "much output": "{% for a in range(9999) %}{{ 'abcdefgh' * 999 }}{% endfor %}"}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_end_is_stopped(tmp_path, monkeypatch, name):
    monkeypatch.setattr(template, "SECONDS", 0.5)
    shell = tokenizer(tmp_path, BOMBS[name])
    began = time.monotonic()
    with pytest.raises(UserError, match="the chat template fails: ."):
        shell.render(TALK, True)
    assert time.monotonic() - began < 5
    shell.template = TEMPLATE  # the next one gets a process again
    assert shell.render(TALK, True) == "hello|"


def test_templates_may_say_what_any_text_may(tmp_path):
    text = "a\u2028b \u00e9 \U0001f600 \ud7ff \x00 \n\r\t \" \\ end"
    shell = tokenizer(tmp_path, "{{ messages[0]['content'] }}{{ messages | tojson }}")
    assert shell.render([{"role": "user", "content": text}], True) == text + json.dumps(
        [{"role": "user", "content": text}], ensure_ascii=False)


# ---- the hub -----------------------------------------------------------------------------------------------

def test_downloads_are_the_named_files_of_the_pinned_revision(tmp_path, monkeypatch, capsys):
    from fnmatch import fnmatch

    import huggingface_hub
    asked, commit = [], tmp_path / ("a" * 40)
    commit.mkdir()

    def download(name, revision, allow_patterns, local_files_only):
        asked.append((name, revision))
        wanted = {f for f in offered if any(fnmatch(f, p) for p in allow_patterns)}
        assert wanted == {"config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors"}
        return str(commit)
    offered = ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors",
               "modeling_evil.py",
               "pytorch_model.bin", "model.py", "model.pt", "model.safetensors.py", "requirements.txt",
               "training_args.bin"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("some/model") == commit
    assert f"some/model@{'a' * 40} pins it" in capsys.readouterr().out
    assert find_folder("some/model", "v1") == find_folder("some/model@v1") == commit
    assert find_folder("some/model@" + "a" * 40) == commit and "v1" not in capsys.readouterr().out.split("pins it")[-1]
    assert set(asked) == {("some/model", r) for r in (None, "v1", "a" * 40)}

    def fail(*_, **__):
        raise OSError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="the hub did not give it: no network$"):
        find_folder("some/model")


def test_without_a_network_the_cache_gives_the_files(tmp_path, monkeypatch):
    """As the hub's library lays them out; the tests run offline."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    save_model(tiny_model(), cached := tmp_path / "models--some--model/snapshots" / ("a" * 40))
    write(tmp_path, {"models--some--model/refs/main": "a" * 40})
    assert find_folder("some/model") == cached == find_folder("some/model@" + "a" * 40)


def test_an_index_leads_nowhere(tmp_path):
    """Weights are the files of the folder that have our names, whatever an index says."""
    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "a.safetensors")
    table = dict.fromkeys(tiny_model().state_dict(), "../a.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(UserError, match="model.safetensors: file not found"):
        load_model(str(tmp_path / "model"))


# ---- what is told to others --------------------------------------------------------------------------------

def test_no_home_path_token_or_code_is_passed_on(tmp_path, monkeypatch):
    home = tmp_path / "home/someone"
    write(home, GOOD)
    save_model(tiny_model(), home / "base")
    write_tokenizer(home / "base")
    raw = json.loads((home / "base/config.json").read_text())
    (home / "base/config.json").write_text(json.dumps({**raw, "_name_or_path": "/home/other/secret",
                                                       "auto_map": {"AutoModel": "evil.Model"}}))
    for module in (config, inputs, report):
        monkeypatch.setattr(module, "HOME", json.dumps(f"{home}/")[:-1])
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    command = ["--model", str(home / "base"), "--train", str(home / "t.jsonl"), "--test", str(home / "test.jsonl"),
               "--only-sft",
               "--max-steps", "1", "--max-new-tokens", "2", "--out", str(home / "runs/x")]
    assert train.main(command) == 0
    for path in (home / "runs/x").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for secret in (str(home), "/home/other", "hf_verysecret", "evil.Model"):
                assert secret.encode() not in data, (path, secret)
    written = json.loads((home / "runs/x/config.json").read_text())["config"]
    assert written["model"] == "~/base" and written["train"] == ["~/t.jsonl"]
    assert train.main(command) == 0  # and it knows itself again
    assert train.main(["--config", str(home / "runs/x/config.json"), "--out", str(home / "runs/y")]) == 0


def test_symbolic_links_are_read_through_and_never_written_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD)
    save_model(tiny_model(), tmp_path / "real")
    write_tokenizer(tmp_path / "real")
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "real").iterdir():  # as the hub's cache does
        (tmp_path / "model" / path.name).symlink_to(path)
    (tmp_path / "data.jsonl").symlink_to(tmp_path / "t.jsonl")
    command = "--model model --train data.jsonl --only-sft --max-steps 1 --out run".split()
    assert train.main(command) == 0
    precious = tmp_path / "precious.json"
    shutil.move(tmp_path / "run/results.json", precious)
    before = precious.read_bytes()
    (tmp_path / "run/.results.json.tmp").symlink_to(precious)
    assert train.main(command) == 0
    assert precious.read_bytes() == before and not (tmp_path / "run/results.json").is_symlink()
