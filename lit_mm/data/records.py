"""Instruction sets in: files of LLaVA's format -> validated records.

Two shapes are read, in a JSON list or as JSON-lines, told apart by their content:
  conversations  {"id", "image": "rel/path.jpg" or a list or absent,
                  "conversations": [{"from": "human" | "gpt", "value": "…"}]}
  questions      {"question_id", "image", "text"}, LLaVA's evaluation files, without answers
Every error names the file, the record, the field, what was found and what was expected.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MARKER = "<image>"
"""Where an image stands in a turn's text."""
ROLES = {"human": "user", "gpt": "assistant"}


class RecordError(ValueError):
    """A bad record.

    Args:
        where: File and record, such as `train.json, record 17 (id receipt_004)`.
        reason: What kind of fault it is, the same for all records that share it.
        detail: What was found and what was expected.
    """

    def __init__(self, where: str, reason: str = "", detail: str = "") -> None:
        # a loader's worker hands an error over as one text, the traceback within
        super().__init__(f"{where}: {reason}: {detail}" if reason else where)
        self.where, self.reason, self.detail = where, reason, detail

    def __reduce__(self) -> tuple:  # worker processes hand errors over by pickle
        return type(self), (self.where, self.reason, self.detail)


@dataclass(frozen=True)
class Turn:
    """One message; `text`, without white space around it, holds MARKER where an image stands."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One item of an instruction set, parsed and validated.

    Args:
        id: The record's own id, or its number.
        images: Paths below the image root, in the order of their markers.
        turns: user and assistant in turn, user first; a question to be answered is one user turn.
        where: File and record, for errors.
    """

    id: str | int
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    where: str

    @property
    def exchanges(self) -> Iterator[tuple[str, str | None]]:
        """Each question with its answer, None where there is none."""
        texts = [turn.text for turn in self.turns] + [None]
        return ((str(texts[i]), texts[i + 1]) for i in range(0, len(self.turns), 2))


class BadRecords:
    """What to do with bad records: raise, or skip and count.

    Args:
        policy: `error` raises at the first one; `skip` counts, and `report` tells.
    """

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, error: RecordError) -> None:
        """Raise or count one error."""
        if self.policy == "error":
            raise error
        self.count(error.reason, str(error))

    def count(self, reason: str, example: str) -> None:
        """Count one skipped record under its reason; the first message is kept as the example."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def keep(self, items: Iterable[Any], check: Callable[[Any], Any]) -> list[Any]:
        """`check(item)` of every item that raises no RecordError."""
        kept = []
        for item in items:
            try:
                kept.append(check(item))
            except RecordError as error:
                self.add(error)
        return kept

    def report(self, name: str, total: int) -> str | None:
        """What was skipped out of `total` records and why; None if nothing."""
        if not self.counts:
            return None
        lines = [f"  {count} × {reason}, first: {self.examples[reason]}" for reason, count in self.counts.most_common()]
        return "\n".join([f"{name}: skipped {self.counts.total()} of {total} records", *lines])


def read_items(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The raw items of a JSON list or a JSON-lines file, each with its place for errors.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not UTF-8, not JSON, neither a list nor lines, or no items at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no instruction file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    items = _list_of(path, text) if text.lstrip().startswith("[") else _lines_of(path, text)
    if not items:
        raise ValueError(f"{path}: holds no records")
    return [(f"{path}, record {number}{_id_of(item)}", item) for number, item in items]


def _list_of(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        return list(enumerate(json.loads(text)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def _lines_of(path: Path, text: str) -> list[tuple[int, Any]]:
    items = []
    for line, content in enumerate(text.split("\n")):
        try:
            if content.strip():
                items.append((line, json.loads(content)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {line + 1}: expected a JSON list, or one JSON object a line, "
                f"found {content[:60]!r} ({error})"
            ) from None
    return items


def _id_of(item: Any) -> str:
    name = item.get("id", item.get("question_id")) if isinstance(item, dict) else None
    return f" (id {name})" if name is not None else ""


def parse(where: str, item: Any) -> Record:
    """One raw item -> Record, by whichever format its fields show.

    Raises:
        RecordError: Anything in it that is not as it should be.
    """
    if isinstance(item, dict) and "conversations" in item:
        return _conversation(where, item)
    if isinstance(item, dict) and "text" in item:
        return _question(where, item)
    found = f"an object with {sorted(item)}" if isinstance(item, dict) else f"{type(item).__name__} {str(item)[:60]!r}"
    raise RecordError(where, "unknown format", f"expected an object with 'conversations' or 'text', found {found}")


def _question(where: str, item: dict[str, Any]) -> Record:
    images = _images(where, item)
    text = _text(where, "text", item["text"])
    if MARKER not in text:
        text = f"{MARKER}\n" * len(images) + text
    return _checked(Record(item.get("question_id", where), images, (Turn("user", text),), where))


def _conversation(where: str, item: dict[str, Any]) -> Record:
    raw = item["conversations"]
    if not isinstance(raw, list) or not raw:
        raise RecordError(where, "empty conversation", f"conversations: expected a list of turns, found {raw!r:.60}")
    turns = tuple(_turn(where, number, turn) for number, turn in enumerate(raw))
    if len(turns) % 2:
        raise RecordError(
            where, "no answer", f"conversations: the last turn ({len(turns) - 1}) is human's, expected gpt's"
        )
    return _checked(Record(item.get("id", where), _images(where, item), turns, where))


def _turn(where: str, number: int, turn: Any) -> Turn:
    field = f"conversations[{number}]"
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise RecordError(where, "malformed turn", f"{field}: expected {{'from', 'value'}}, found {turn!r:.80}")
    if turn["from"] not in ROLES:
        raise RecordError(where, "unknown role", f"{field}.from: expected human or gpt, found {turn['from']!r}")
    expected = list(ROLES)[number % 2]
    if turn["from"] != expected:
        reason = "first turn is not human's" if number == 0 else f"two {turn['from']} turns in a row"
        raise RecordError(where, reason, f"{field}.from: expected {expected}, found {turn['from']}")
    return Turn(ROLES[expected], _text(where, f"{field}.value", turn["value"]))


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecordError(where, "empty text", f"{field}: expected text, found {value!r:.60}")
    return value.strip()


def _images(where: str, item: dict[str, Any]) -> tuple[str, ...]:
    found = item.get("image")
    paths = [] if found is None else found if isinstance(found, list) else [found]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise RecordError(
                where, "malformed image path", f"image: expected a relative path or a list, found {found!r:.80}"
            )
    return tuple(paths)


def _checked(record: Record) -> Record:
    for number, turn in enumerate(record.turns):
        if turn.role == "assistant" and MARKER in turn.text:
            raise RecordError(
                record.where, "image in an answer", f"conversations[{number}].value: {MARKER} in a gpt turn"
            )
    markers = sum(turn.text.count(MARKER) for turn in record.turns)
    if markers != len(record.images):
        detail = f"{markers} {MARKER} in the text, {len(record.images)} in the field image"
        raise RecordError(record.where, "image count disagrees", detail)
    return record
