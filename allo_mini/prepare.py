"""Public files of the ten tasks -> task rows: `python -m allo_mini.tasks prepare NAME SOURCE OUT`."""

import csv
import json
import re
from pathlib import Path

from allo_mini import UserError
from allo_mini.disk import read_jsonl, write_jsonl
from allo_mini.log import say
from allo_mini.tasks import extract_math


def row_of(question: str, options: list[str], answer: str, solution: list[str]) -> dict:
    """A task row in the form that ALLO trains on: the options one a line, the solution before "The answer is"."""
    return {"input": "\n".join([question, *(["Options:", *options] if options else [])]),
            "output": "\n".join([*solution, f"The answer is {answer}"]), "answer": answer}


def ai2_row(r: dict) -> dict:
    """QASC, OpenBookQA; as RLMEC prepared them, the options are in lower case and the answer is not."""
    options = {c["label"]: c["text"] for c in r["question"]["choices"]}
    facts = [r[key] for key in ("fact1", "fact2", "combinedfact")] if "combinedfact" in r else []
    return row_of(r["question"]["stem"], [text.lower() for text in options.values()], options[r["answerKey"]], facts)


def ecqa_row(r: dict) -> dict:
    """The CSV that the ECQA repository's generate_data.py writes, or RLMEC's JSON, which only needs other names."""
    if "problem" in r:
        return {"input": r["problem"], "output": r["solution"], "answer": r["answer"]}
    return row_of(r["q_text"], [r[f"q_op{i}"] for i in range(1, 6)], r["q_ans"], r["taskA_pos"].split("\n"))


def gsm8k_row(r: dict) -> dict:
    solution, answer = re.sub(r"<<.*?>>", "", r["answer"]).split("\n#### ")
    return {**row_of(r["question"], [], answer, [solution]), "answer": answer.replace(",", "")}


def math_row(r: dict) -> dict:
    """MATH-500, or MATH as first published: "type" for the subject, the answer only in the solution's box."""
    return {"input": r["problem"], "output": r["solution"], "answer": r.get("answer") or extract_math(r["solution"]),
            "level": r["level"], "subject": r.get("subject") or r["type"]}


def tabmwp_row(r: dict) -> dict:
    title = f' regarding "{r["table_title"]}"' if r["table_title"] else ""
    unit = f" (unit: {r['unit']})" if r["unit"] else ""
    question = f"Read the following table{title} and then answer a question.\n\n{r['table']}\n\n{r['question']}{unit}"
    return row_of(question, r["choices"], r["answer"], [r["solution"]])


SOURCES = {  # what makes one of our rows of a row of the public file
    "ecqa": ecqa_row, "qasc": ai2_row, "openbookqa": ai2_row, "gsm8k": gsm8k_row, "math": math_row,
    "tabmwp": tabmwp_row,
    "strategyqa": lambda r: row_of(r["question"], [], "yes" if r["answer"] else "no", r["facts"]),
    "mawps": lambda r: {"input": r["sQuestion"], "answer": str(float(r["lSolutions"][0]))} if "sQuestion" in r else
                       {"input": r["input"], "answer": str(float(r["target"]))},  # as evaluation suites have it
    "alpaca_eval": lambda r: {"instruction": r["instruction"], "dataset": r["dataset"], "reference": r["output"]},
    "arena_hard": lambda r: {"uid": r["uid"], "category": r["category"], "prompt": r["prompt"]} if "uid" in r else
                            {"uid": r["question_id"], "category": r["category"], "prompt": r["turns"][0]["content"]}}


def read_source(path: Path) -> list[dict]:
    """The rows of JSON lines, a CSV file with a header, a JSON list or a JSON object of rows."""
    if path.suffix == ".jsonl":
        return [row for _, row in read_jsonl(path)]
    with path.open(encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f)) if path.suffix == ".csv" else json.load(f)
    return list(rows.values()) if isinstance(rows, dict) else rows


def prepare(name: str, source: Path, out: Path) -> None:
    """Write the task rows of a public file. Raises UserError for rows of another form, and when `out` is there."""
    if name not in SOURCES:
        raise UserError(f"{name}: no task of ours, expected one of {', '.join(SOURCES)}")
    if out.exists():
        raise UserError(f"{out}: exists already; nothing was overwritten")
    rows: list[dict] = []
    try:
        rows.extend(map(SOURCES[name], read_source(source)))
        write_jsonl(out, rows)
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}") from None
    except (LookupError, TypeError, AttributeError, ValueError, csv.Error) as e:
        raise UserError(f"{source}: row {len(rows) + 1} has not the form of {name}: {type(e).__name__} {e}") from None
    say(f"{out}: {len(rows)} rows")
