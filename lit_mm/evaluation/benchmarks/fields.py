"""Fields of records in texts: `{question}`, `{types.structural}`, `{image|name}`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

FIELD = re.compile(r"\{([^{}]+)\}")
FILTERS: dict[str, Callable[[str], str | int]] = {
    "name": lambda path: PurePosixPath(path).name,
    "top": lambda path: PurePosixPath(path).parts[0],
    "capitalize": str.capitalize,
    "int": int,
    "below_million": lambda number: int(number) % 1_000_000,
}
"""What may follow a field's name: the last or first part of a path, the text with its first letter as the only
capital one, a whole number, or its last six digits (of MMBench's index, which has the round before them)."""


class MissingField(ValueError):
    """A record lacks a field."""


class NullField(MissingField):
    """A field is null or NaN."""


def fill(template: str, record: Mapping[str, Any]) -> Any:
    """The template with every field's value as text; a template of nothing but a field gives the value itself.

    Raises:
        MissingField: The record lacks a field.
        ValueError: A field in a longer text is neither text nor a number nor a list of these.
    """
    if alone := FIELD.fullmatch(template):
        return value_of(alone[1], record)
    return FIELD.sub(lambda found: as_text(found[1], value_of(found[1], record)), template)


def text(template: str, record: Mapping[str, Any]) -> str:
    """As `fill`, always text."""
    return as_text(template, fill(template, record))


def or_empty(template: str, record: Mapping[str, Any]) -> str:
    """As `text`, but "" if a field is missing or empty."""
    try:
        values = [as_text(name, value_of(name, record)) for name in FIELD.findall(template)]
    except MissingField:
        return ""
    return text(template, record) if all(values) else ""


def values(templates: str | list[str], record: Mapping[str, Any]) -> Iterator[str]:
    """Texts of all templates, with lists as their elements."""
    for template in as_list(templates):
        found = fill(template, record)
        yield from (as_text(template, value) for value in (found if isinstance(found, list) else [found]))


def value_of(name: str, record: Mapping[str, Any]) -> Any:
    """A field's value: `a.b` is field b of the object a, `a|filter` is changed by one of FILTERS."""
    path, *filters = name.split("|")
    value = record[path] if path in record else _inner(path, record)
    if path in record and (value is None or (isinstance(value, float) and math.isnan(value))):
        raise NullField(f"{path}: expected a value, found null")
    if value is None:
        raise MissingField(f"{path}: expected a value, found the fields {', '.join(record):.300}")
    for each in filters:
        if each not in FILTERS:
            raise ValueError(f"{{{name}}}: unknown filter {each}, expected one of {', '.join(FILTERS)}")
        value = FILTERS[each](as_text(name, value))
    return value


def _inner(path: str, record: Mapping[str, Any]) -> Any:
    value: Any = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def as_text(name: str, value: Any) -> str:
    """A value as text, a list with commas between."""
    if isinstance(value, list):
        return ", ".join(as_text(name, each) for each in value)
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name}: expected text, a number or a list of them, found {value!r:.60}")
    return str(value)


def as_list(value: str | list[str]) -> list[str]:
    """One text as a list of one; "" as none."""
    return value if isinstance(value, list) else [value] if value else []
