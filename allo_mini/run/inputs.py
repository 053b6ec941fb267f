"""The rows of a run, as its flags say: to train on, to validate on, to test on."""

import random

from allo_mini import UserError
from allo_mini.data import demo
from allo_mini.data.encoder import Encoder
from allo_mini.data.rows import is_pairs, plain, read_pairs, read_tasks, turns_of
from allo_mini.data.tokenizer import load_tokenizer
from allo_mini.evaluation.graders import gold_answer
from allo_mini.run.log import say


def read_rows(cfg):
    """(tasks, pairs, val, test); rows that are held out are dropped from the others and counted.

    Raises UserError naming the line of a bad row, or when nothing is left to train on.
    """
    files = cfg.pairs or cfg.train
    if not files:
        return demo.splits(cfg)
    tasks, pairs = read_tasks(cfg.train), read_pairs(cfg.pairs)
    test, val = held_rows(cfg, "test"), held_rows(cfg, "val")
    drop_held(test + val, tasks, pairs)
    if cfg.prompt == "auto" and len({task.verbatim for task in tasks}) > 1:
        raise UserError(f"{cfg.train[0]}: strings beside questions or messages; say how with "
                        "--prompt, or part them")
    rows = pairs if cfg.pairs else tasks
    random.Random(f"{cfg.seed} rows").shuffle(rows)
    if cfg.pairs and not test:
        cut = max(1, min(500, len(pairs) // 10))
        say(f"{cut} of {len(pairs)} pairs held out as test rows (--test FILE brings your own)")
        test, pairs[:] = pairs[:cut], pairs[cut:]
        drop_held(test, tasks, pairs)
    if cfg.limit:
        del tasks[cfg.limit:], pairs[cfg.limit:]
    if not rows:
        raise UserError(f"{files[0]}: no rows are left to train on")
    if not cfg.pairs and not cfg.sft_alone:
        unused = len(tasks) - len({task.question for task in tasks if gold_answer(task)})
        if unused == len(tasks):
            raise UserError(f"{files[0]}: no row has 'answer', or ends in 'The answer is X'")
        if unused:
            say(f"{unused} training rows make no pairs: they have no answer to grade by, or ask "
                "what another row asks, too")
    return tasks, pairs, val, test[:cfg.test_limit or None]


def held_rows(cfg, flag):
    """The rows of --test or --val: questions with answers, or in a --pairs run preferences.

    Raises UserError for both kinds in one flag, or for questions without an answer.
    """
    files = getattr(cfg, flag)
    kinds = set(map(is_pairs, files))
    if True in kinds:
        if False in kinds or not cfg.pairs:
            raise UserError(f"--{flag} {' '.join(files)}: preference rows need a --pairs run")
        return read_pairs(files)
    return read_questions(files, flag=flag)


def read_questions(files, task=None, flag="test"):
    """Tasks with an answer each; graded as their files' names say, or as `task` is.

    Raises UserError naming a row without an answer.
    """
    rows = read_tasks(files, need_output=False)
    for row in rows:
        where = row.source
        row.source = task or where
        if not (gold_answer(row) or "").strip():
            raise UserError(f"{where}: a --{flag} row needs 'answer', or 'output' ending in "
                            '"The answer is X"')
    return rows


def asked(row):
    """What a row asks: whole, and without a system prompt."""
    rest = [turn for turn in turns_of(row.prompt) if turn["role"] != "system"]
    return plain(row.prompt).strip(), plain(rest).strip()


def drop_held(held, *groups):
    """Take the questions of `held` out of other lists of rows, and say how many.

    A system prompt on one side makes no other question; on both sides it does, where they differ:
    it may hold the text that the question is about.
    """
    whole = {asked(row)[0] for row in held}
    bare = {asked(row)[1] for row in held}
    for rows in groups:
        before = len(rows)
        rows[:] = [row for row in rows
                   if whole.isdisjoint(asked(row)) and asked(row)[0] not in bare]
        if len(rows) < before:
            say(f"{before - len(rows)} training rows dropped: they are test or validation rows")


def style_of(prompt, rows):
    """What --prompt says; for auto, what the rows are.

    chat where any is a conversation, for roles mean nothing in another style; else by the first
    row: alpaca for questions and pairs made from them, none for strings.
    """
    if prompt != "auto":
        return prompt
    if any(isinstance(row.prompt, list) for row in rows):
        return "chat"
    return "none" if rows[0].verbatim else "alpaca"


def encoder_for(model, settings, rows):
    """The Encoder of a model for these rows; without any, prompts are as in a chat."""
    tokenizer = load_tokenizer(model.folder, model.config.vocab_size)
    length = model.config.length(settings.max_length, f"{model.folder}/config.json")
    style = settings.prompt
    if style == "auto" and not rows:
        style = "chat" if tokenizer.template else "alpaca"
    return Encoder(tokenizer, style_of(style, rows), length)


def unused_template(encoder, prompt):
    """A hint for who has not said --prompt, where the model has a chat template."""
    if prompt == "auto" and encoder.style != "chat" and encoder.tokenizer.template:
        return " (the model has a chat template: --prompt chat uses it)"
    return ""
