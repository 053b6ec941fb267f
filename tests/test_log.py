"""What a command says: exit codes, one line for a mistake, nothing when nobody reads on, not every step of very many."""

import os
import sys

import pytest
import torch

from allo_mini import UserError
from allo_mini.log import Log, exit_code


def fails(error):
    def work():
        raise error
    return work


@pytest.mark.parametrize("error, code, says", [
    (UserError("rows.jsonl:3: bad\nrow"), 2, "error: rows.jsonl:3: bad row\n"),
    (PermissionError(13, "Permission denied", "x"), 2, "error: [Errno 13] Permission denied: 'x'\n"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried ..."), 2,
     "error: out of memory: lower --sample-batch, --micro-tokens or --max-length\n"),
    (KeyboardInterrupt(), 130, "\nstopped; go on\n")])
def test_what_ends_a_command_is_one_line_and_a_code(error, code, says, capsys):
    assert exit_code(fails(error), stopped="stopped; go on") == code
    assert capsys.readouterr() == ("", says)


def test_other_errors_are_ours_and_not_hidden(capsys):
    with pytest.raises(ZeroDivisionError):
        exit_code(fails(ZeroDivisionError()))
    assert exit_code(lambda: 5) == 0 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("lines", [1, 10_000])  # few are only written when the command ends
def test_a_reader_who_has_seen_enough_ends_a_command_quietly(lines, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    with os.fdopen(writer, "w") as out:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            assert exit_code(lambda: [print("a line of output") for _ in range(lines)]) == 141
        out.flush()  # as Python does at the end: without an error now
    assert capsys.readouterr() == ("", "")


def test_of_very_many_steps_some_are_printed_and_all_recorded(tmp_path, capsys):
    log = Log(tmp_path)
    for step in range(1, 251):
        log.step("dpo", step, 250, {"loss": 1.0} | ({"eval/score": 0.5} if step == 100 else {}), ("loss",))
    printed = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed == sorted({1, *range(3, 250, 3), 100, 250})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 250
