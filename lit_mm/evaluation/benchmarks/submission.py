"""Writes answers as the servers of benchmarks want them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from lit_mm.evaluation.benchmarks.definition import Submission
from lit_mm.evaluation.benchmarks.fields import MissingField, fill
from lit_mm.evaluation.benchmarks.questions import Questions
from lit_mm.evaluation.metrics.choice import chosen


def write_submission(
    submission: Submission, questions: Questions, predictions: Iterable[Mapping[str, Any]], folder: Path
) -> Path:
    """Write one file with the answers to all questions, in the questions' order.

    Args:
        submission: The file's name and rows.
        questions: The benchmark's questions.
        predictions: {"question_id", "text"} of every question.
        folder: Where the file is written; created if needed.

    Raises:
        ValueError: A question has no answer or several, or an answer no question.
        ModuleNotFoundError: The server wants an Excel file and openpyxl is not installed.
    """
    answers = _by_id(questions, list(predictions))
    rows = [_row(submission.row, questions, number, answers[str(name)]) for number, name in enumerate(questions.ids)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / submission.file
    if file.suffix in (".tsv", ".xlsx"):
        _write_table(file, rows)
    else:
        named = rows if isinstance(submission.row, dict) else dict(zip(map(str, questions.ids), rows, strict=True))
        lines = map(json.dumps, rows) if file.suffix == ".jsonl" else [json.dumps(named)]
        file.write_text("\n".join(lines) + "\n")
    return file


def _by_id(questions: Questions, predictions: list[Mapping[str, Any]]) -> dict[str, str]:
    """The answer to every question."""
    given = Counter(str(prediction["question_id"]) for prediction in predictions)
    asked = dict.fromkeys(map(str, questions.ids))
    faults = {
        "without an answer": [name for name in asked if name not in given],
        "answered twice": [name for name in given if given[name] > 1],
        "that it does not ask": [name for name in given if name not in asked],
    }
    if told := [f"{len(ids)} {fault}, such as {ids[0]!r:.80}" for fault, ids in faults.items() if ids]:
        raise ValueError(
            f"{questions.name}: {len(predictions)} answers to {len(asked)} questions: {'; '.join(told)}; "
            "expected one answer to each"
        )
    return {str(prediction["question_id"]): prediction["text"] for prediction in predictions}


def _row(template: str | dict[str, str], questions: Questions, number: int, answer: str) -> Any:
    row = questions.rows.rows[number]
    letter = chosen(answer, questions.options(row)) or ""
    told = {"question_id": questions.ids[number], "prediction": answer.strip()}
    told |= {"letter": letter, "number": ascii_uppercase.find(letter) if letter else -1}
    if isinstance(template, str):
        return fill(template, {**row, **told})
    return {name: _value(own, {**row, **told}) for name, own in template.items()}


def _value(template: str, row: Mapping[str, Any]) -> Any:
    try:
        return fill(template, row)
    except MissingField:
        return ""


def _write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    if file.suffix == ".tsv":
        with file.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened, delimiter="\t", lineterminator="\n").writerows(table)
    else:
        _write_excel(file, table)


def _write_excel(file: Path, table: list[list[Any]]) -> None:
    try:
        from openpyxl import Workbook
        from openpyxl.utils.escape import escape
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{file.name}: the server wants an Excel file: pip install openpyxl") from error
    book = Workbook()
    for number, row in enumerate(table, 1):
        for column, value in enumerate(row, 1):
            cell = book.active.cell(number, column, escape(value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"  # an answer that begins with = is no formula
    book.save(file)
