"""What a command tells the shell: exit codes, one line for a mistake, nothing when nobody reads on."""

import os
import sys

import pytest
import torch

from allo_mini import UserError
from allo_mini.log import exit_code


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
