"""What the YAML file of a benchmark may say."""

from __future__ import annotations

from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentParser

from lit_mm.data.sources.base import limited
from lit_mm.evaluation.metrics import METRICS

FileKind = Literal["json", "jsonl", "csv", "tsv", "words", "parquet"]
MOST = 1 << 20
"""Bytes of the largest YAML file that is read."""


@dataclass(frozen=True)
class Join:
    """A second file, whose rows add fields to the questions: answers, a split, names of videos.

    Args:
        files: The file, or several to look for in this order, beside the questions. `*` is replaced by what it
            matched in the name of the questions' file.
        key: What identifies a row of this file, such as `{question_id}`.
        by: What identifies the same row in the questions' file.
        records: Where in a JSON file the rows are, as `Layout.records`.
        format: The file's format, as `Layout.format`.
        columns: As `Layout.columns`.
        unmatched: What to do with questions that this file does not have.
        unused: What to do with rows that no question has.
        optional: Whether the file may be missing.
    """

    files: str | list[str]
    key: str
    by: str
    records: str = ""
    format: FileKind | None = None
    columns: list[str] = field(default_factory=list)
    unmatched: Literal["error", "drop"] = "error"
    unused: Literal["error", "ignore"] = "error"
    optional: bool = False


@dataclass(frozen=True)
class Layout:
    """How the files of a benchmark are laid out. `{x}` in a text stands for field x of a record.

    Args:
        files: The questions' file, or several to look for in this order. A name with `*` may mean several files,
            which are read as one. They are looked for if the benchmark's path is a folder.
        id: The question's id.
        question: The question.
        format: The files' format: words is a table of words with spaces between; null: what the name ends with.
        records: Where in a JSON file the records are, such as `data` or `annotations.questions`; a list, or an
            object with a record for every key, which is then its field `{key}`.
        columns: Names of the columns of a csv, tsv or words file without a header.
        image: The image's path below the root, or several of which the first that exists is taken; or a column
            with the image itself.
        video: The video's path or paths, like `image`.
        references: The accepted answers: one field with an answer or a list, or several.
        options: For multiple choice instead of references: the texts of the options, one field with a list or
            several. Empty ones at the end are left out.
        answer: For multiple choice: the right option.
        answer_is: Whether `answer` is an option's letter, its number from 0, or its text.
        type: The question's type, by which results are broken down.
        type_names: Names of the types, if the file has numbers or codes.
        group: What questions are scored together.
        context: The text before the question, `{context}` in the prompt; "" if one of its fields is empty.
        keep: Fields and the value that a record must have to be asked; `*` is any value but an empty one.
        join: Further files.
        empty: A text that stands for an empty field, such as nan.
        shared: A field that a record may fill with the id of another record, to mean that one's value.
        compute: Fields that are computed: `padded_box` gives `{padded_box}`, the box `[x1, y1, x2, y2]` in parts
            of the side of the square that the image is padded to, from `bbox` (x1, y1, x2, y2 in pixels), `width`
            and `height`.
    """

    files: str | list[str]
    id: str
    question: str
    format: FileKind | None = None
    records: str = ""
    columns: list[str] = field(default_factory=list)
    image: str | list[str] = field(default_factory=list)
    video: str | list[str] = field(default_factory=list)
    references: str | list[str] = field(default_factory=list)
    options: str | list[str] = field(default_factory=list)
    answer: str = ""
    answer_is: Literal["letter", "number", "text"] = "letter"
    type: str = ""
    type_names: dict[str, str] = field(default_factory=dict)
    group: str = ""
    context: str = ""
    keep: dict[str, str] = field(default_factory=dict)
    join: list[Join] = field(default_factory=list)
    empty: str = ""
    shared: str = ""
    compute: Literal["padded_box"] | None = None


@dataclass(frozen=True)
class Submission:
    """The file that a benchmark's server wants.

    Args:
        file: Its name; json, jsonl, tsv or xlsx.
        row: What it has for every question: the fields' names and values, where `{prediction}` is the answer,
            `{letter}` and `{number}` the option that it means (number from 0; "" and -1: none), `{question_id}`
            the question's id, and other names are fields of the record. If it is one value, the file is an
            object of a value for every question's id.
    """

    file: str
    row: str | dict[str, str]


@dataclass(frozen=True)
class Definition:
    """A benchmark, as its YAML file describes it.

    Args:
        about: What it is and where its files come from.
        metric: The metric's name, one of `lit_mm.evaluation.metrics.METRICS`.
        prompt: The text that the model is asked. `{question}` is the question, `{context}` the text before it,
            `{options}` the options one a line, other names are fields of the record.
        layouts: The layouts of files that it comes in.
        max_new_tokens: The most tokens of an answer.
        split: The split that the papers report.
        option: How an option is written.
        remove: A text that is removed from the questions.
        package: A folder of an installed Python package that has the files, as `package/folder`; then no path
            need be given.
        submission: The file for the benchmark's server, if it has one.
    """

    about: str
    metric: str
    prompt: str
    layouts: list[Layout]
    max_new_tokens: int = 16
    split: str = ""
    option: str = "{letter}. {text}"
    remove: str = ""
    package: str = ""
    submission: Submission | None = None


def read_definition(path: Path) -> Definition:
    """Read a benchmark's YAML file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, or has a field that is unknown, missing or of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no benchmark file {path}")
    try:
        found = yaml.safe_load(limited(path, MOST))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Definition, "benchmark")
    try:
        definition = parser.instantiate(parser.parse_object({"benchmark": found})).benchmark
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: not a benchmark: {error}") from None
    _check(path, definition)
    return definition


def _check(path: Path, definition: Definition) -> None:
    if definition.metric not in METRICS:
        raise ValueError(f"{path}: metric: expected one of {', '.join(METRICS)}, found {definition.metric!r}")
    if not definition.layouts:
        raise ValueError(f"{path}: layouts: expected at least one, found none")
    for number, layout in enumerate(definition.layouts):
        if definition.metric == "circular" and not (layout.options and layout.group):
            raise ValueError(f"{path}: layouts[{number}]: metric circular needs options and a group")
        if bool(layout.options) == bool(layout.references) or bool(layout.options) != bool(layout.answer):
            raise ValueError(f"{path}: layouts[{number}]: expected either references, or options and answer")
