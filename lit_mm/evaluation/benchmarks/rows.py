"""Reads the records of a benchmark's files: JSON in any nesting, JSON-lines, tables with and without header, parquet.

All but parquet are read into memory, which these files are made for; larger ones than MOST bytes are refused. Of
parquet files, columns with images stay on the disk.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_mm.data.records import RecordError
from lit_mm.data.sources.base import limited
from lit_mm.data.sources.json_files import parsed, utf8
from lit_mm.data.sources.tables import open_parquet
from lit_mm.evaluation.benchmarks.definition import FileKind, Join, Layout
from lit_mm.evaluation.benchmarks.fields import MissingField, as_list, text

MOST = 1 << 30
"""Bytes of the largest file that is read into memory."""
DELIMITERS: dict[str, str] = {"csv": ",", "tsv": "\t"}

Row = dict[str, Any]


@dataclass
class Rows:
    """The records of one or several files.

    Args:
        places: File and number of every record, for errors.
        rows: Their fields, and as further fields `file` (its name without the ending), `folder` (its folder below the
            benchmark's), `match` (what `*` matches in its name) and `record` (the number in the file, from 0).
        media: The columns of parquet files that have images or videos; None if there are none.
        numbers: [n] the row of `media` of every record.
    """

    places: list[str]
    rows: list[Row]
    media: Any = None
    numbers: Sequence[int] = ()

    def keep(self, kept: list[int]) -> None:
        """Leave out all other records."""
        self.places, self.rows = [self.places[n] for n in kept], [self.rows[n] for n in kept]
        self.numbers = [self.numbers[n] for n in kept] if self.media is not None else ()


def read_rows(files: list[Path], layout: Layout, folder: Path, cache: Path) -> Rows:
    """The records of the questions' files, in order, with the fields of joined files, that the layout keeps."""
    if kind_of(files[0], layout.format) == "parquet":
        found = _parquet(files, cache)
    else:
        found = Rows([], [])
        for file in files:
            for number, row in enumerate(_rows_of(file, layout)):
                found.places.append(f"{file}, record {number}")
                found.rows.append({**_told(file, layout.files, folder), "record": number, **row})
    if not found.rows:
        raise ValueError(f"{files[0]}: contains no records")
    if layout.empty:
        found.rows = [{name: "" if own == layout.empty else own for name, own in row.items()} for row in found.rows]
    for join in layout.join:
        _join(found, join, files, layout)
    found.keep([n for n, row in enumerate(found.rows) if all(_has(row, *each) for each in layout.keep.items())])
    if not found.rows:
        raise ValueError(f"{files[0]}: no record has {layout.keep}")
    return found


def kind_of(file: Path, format: FileKind | None) -> str:
    """The format of a file: as set, or what its name ends with."""
    return format or file.suffix.removeprefix(".")


def joined_files(join: Join, questions: Path, patterns: str | list[str]) -> list[Path]:
    """The existing ones of a join's files."""
    star = _star(questions, patterns)
    return [file for name in as_list(join.files) if (file := questions.parent / name.replace("*", star)).is_file()]


def _told(file: Path, patterns: str | list[str], folder: Path) -> Row:
    below = file.parent.relative_to(folder).as_posix()
    return {"file": file.stem, "folder": "" if below == "." else below, "match": _star(file, patterns)}


def _star(file: Path, patterns: str | list[str]) -> str:
    """What `*` matches in the file's name; "" if no pattern with one fits."""
    for pattern in as_list(patterns):
        before, star, after = Path(pattern).name.partition("*")
        if star and (found := re.fullmatch(f"{re.escape(before)}(.*){re.escape(after)}", file.name)):
            return found[1]
    return ""


def _has(row: Row, field: str, expected: str) -> bool:
    try:
        found = text(f"{{{field}}}", row)
    except MissingField:
        return False
    return bool(found) if expected == "*" else found == expected


def _rows_of(file: Path, layout: Layout | Join) -> Iterator[Row]:
    kind = kind_of(file, layout.format)
    if kind == "json":
        return _json(file, layout.records)
    if kind == "jsonl":
        lines = enumerate(limited(file, MOST).splitlines(), 1)
        return (_as_row(None, parsed(f"{file}, line {number}", line)) for number, line in lines if line.strip())
    if kind in ("csv", "tsv", "words"):
        return _table(file, kind, layout.columns)
    raise ValueError(f"{file}: unknown format {kind!r}: expected json, jsonl, csv, tsv, words or parquet")


def _json(file: Path, records: str) -> Iterator[Row]:
    found = parsed(str(file), limited(file, MOST))
    for number, part in enumerate(parts := records.split(".") if records else []):
        if not isinstance(found, dict) or part not in found:
            inside = sorted(found)[:20] if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{file}: expected the records in {'.'.join(parts[: number + 1])}, found {inside}")
        found = found[part]
    if not isinstance(found, list | dict):
        raise ValueError(f"{file}: expected a list or an object of records, found {found!r:.60}")
    pairs = found.items() if isinstance(found, dict) else ((None, each) for each in found)
    return (_as_row(key, each) for key, each in pairs)


def _as_row(key: str | None, value: Any) -> Row:
    """A record as an object: a list has fields 0, 1, …, anything else a field `value`."""
    if isinstance(value, list):
        value = {str(number): each for number, each in enumerate(value)}
    elif not isinstance(value, dict):
        value = {"value": value}
    return value if key is None else {"key": key, **value}


def _table(file: Path, kind: str, columns: list[str]) -> Iterator[Row]:
    lines = io.StringIO(utf8(str(file), limited(file, MOST)).removeprefix("\ufeff"), newline="")
    if kind == "words" or columns:  # without a header nothing is quoted
        split: Iterator[list[str]] = (line.rstrip("\r\n").split(DELIMITERS.get(kind)) for line in lines if line.strip())
    else:
        split = _quoted(file, lines, DELIMITERS[kind])
    names = columns or next(split, [])
    for number, cells in enumerate(split):
        if len(cells) != len(names):
            detail = f"expected {len(names)} columns ({', '.join(names):.200}), found {len(cells)}"
            raise RecordError(f"{file}, record {number}", "columns disagree", detail)
        yield dict(zip(names, cells, strict=True))


def _quoted(file: Path, lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    limit = csv.field_size_limit(MOST)  # images are long, and the limit is the whole process's
    try:
        yield from (cells for cells in csv.reader(lines, delimiter=delimiter, strict=True) if cells)
    except csv.Error as error:
        raise ValueError(f"{file}: not a table: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(files: list[Path], cache: Path) -> Rows:
    import pyarrow as pa

    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    table = open_parquet(name, [str(file) for file in files], cache, columns=()).rows
    schema = table.features.arrow_schema

    def embedded(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or (pa.types.is_list(kind) and embedded(kind.value_type))

    media = [column.name for column in schema if embedded(column.type)]
    rows = table.remove_columns(media)[:].to_pylist()
    told = {"file": files[0].stem, "folder": "", "match": ""}
    return Rows(
        [f"{name}, record {number}" for number in range(len(rows))],
        [{**told, "record": number, **row} for number, row in enumerate(rows)],
        table.select_columns(media) if media else None,
        range(len(rows)),
    )


def _join(found: Rows, join: Join, files: list[Path], layout: Layout) -> None:
    """Add the fields of a join's rows to the records they belong to."""
    others = joined_files(join, files[0], layout.files)
    if not others:
        if join.optional:
            return
        raise FileNotFoundError(f"{files[0]}: no {' or '.join(as_list(join.files))} in {files[0].parent}")
    theirs = _by_key(others[0], join)
    keys = [_key(place, join.by, row) for place, row in zip(found.places, found.rows, strict=True)]
    if join.unmatched == "error" and (alone := [key for key in keys if key not in theirs]):
        raise ValueError(_of_another_split(others[0], files[0], alone, len(keys)))
    if join.unused == "error" and (unused := theirs.keys() - set(keys)):
        raise ValueError(_of_another_split(files[0], others[0], sorted(unused), len(theirs)))
    found.rows[:] = [{**theirs.get(key, {}), **row} for key, row in zip(keys, found.rows, strict=True)]
    found.keep([number for number, key in enumerate(keys) if key in theirs])


def _by_key(file: Path, join: Join) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for number, row in enumerate(_rows_of(file, join)):
        key = _key(f"{file}, record {number}", join.key, row)
        if key in found:
            raise ValueError(f"{file}, record {number}: {join.key} {key!r:.80}: expected once, found twice")
        found[key] = row
    return found


def _key(place: str, template: str, row: Row) -> str:
    try:
        return text(template, row)
    except ValueError as error:
        raise RecordError(place, "missing field", str(error)) from None


def _of_another_split(lacks: Path, has: Path, keys: list[str], count: int) -> str:
    return (
        f"{lacks}: lacks {len(keys)} of the {count} records of {has}, such as {keys[0]!r:.80}: "
        "expected two files of the same split"
    )


def matching(folder: Path, patterns: str | list[str]) -> list[Path]:
    """The files below a folder that the first fitting pattern means; empty if none fits."""
    found = (sorted(file for file in folder.glob(pattern) if file.is_file()) for pattern in as_list(patterns))
    return next((files for files in found if files), [])


def fits(file: Path, patterns: str | list[str]) -> bool:
    """Whether a file's name is one that a pattern means."""
    return any(fnmatch.fnmatch(file.name, Path(pattern).name) for pattern in as_list(patterns))
