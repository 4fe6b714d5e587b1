"""JSON lists and JSON-lines: a scan finds where every record begins and ends, with constant memory."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lit_mm.data.records import RecordError
from lit_mm.data.sources.base import CHUNK, Scanned, placed

TWICE = "same key twice"
"""The reason for refusing JSON objects with a duplicate key, which are ambiguous."""
_WHITE = re.compile(r"[ \t\n\r]*")


class JsonList(Scanned):
    """A JSON list; table [N, 2]: start and end (exclusive) byte of each element."""

    columns = 2

    def _scan(self) -> Iterator[tuple[int, ...]]:
        return _elements(self.paths[0])

    def _read(self, number: int) -> tuple[str, Any]:
        where = f"{self.name}, record {number}"
        return placed(where, parsed(where, self._bytes(0, *self.table[number].tolist())))


class JsonLines(Scanned):
    """One JSON object per line; table [N, 3]: start and end (exclusive) byte of each line, and its number."""

    columns = 3

    def __init__(self, name: str, paths: list[str], cache: Path) -> None:
        super().__init__(name, paths, cache)
        self._check_lines()

    def _scan(self) -> Iterator[tuple[int, ...]]:
        with Path(self.paths[0]).open("rb") as file:
            start = len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)
            file.seek(start)
            for number, line in enumerate(file):
                if line.strip():
                    yield start, start + len(line.rstrip(b"\n")), number
                start += len(line)

    def _read(self, number: int) -> tuple[str, Any]:
        start, end, line = self.table[number].tolist()
        item = parsed(f"{self.name}, line {line + 1}", self._bytes(0, start, end))
        return placed(f"{self.name}, record {number}", item)

    def _check_lines(self) -> None:
        """A single bad line is a bad record, but if the first two are bad, the file is not JSON-lines."""
        errors = []
        for number in range(min(2, len(self))):
            try:
                self._read(number)
            except RecordError as error:
                errors += [error] if error.reason != TWICE else []
        if len(errors) == min(2, len(self)):
            raise ValueError(f"{errors[0]}; expected a JSON list, or one JSON object per line")


def parsed(where: str, content: bytes) -> Any:
    """The JSON value; raises a RecordError if it is none, or has a key twice."""
    text = utf8(where, content)
    try:
        return json.loads(text, object_pairs_hook=partial(_object, where))
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise RecordError(where, "not valid JSON", f"expected an object, found {text[:60]!r} ({error})") from None


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):  # Python would silently keep the last value
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RecordError(where, TWICE, f"{key!r:.80}: expected once in an object, found {times} times")
    return item


def utf8(where: str, content: bytes) -> str:
    """The text; raises a RecordError if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"expected UTF-8, found byte {error.object[error.start]:#x} at {error.start}: {error.reason}"
        raise RecordError(where, "not UTF-8 text", detail) from None


def _elements(path: str) -> Iterator[tuple[int, int]]:
    """Byte ranges of the elements of a JSON list, which are checked for syntax."""
    with Path(path).open("rb") as file:
        text = _JsonText(path, file)
        text.expect("[")
        if (closed := text.peek()) == "]":
            text.expect("]")
        while closed != "]":
            yield text.value()
            closed = text.expect(",", "]")
        text.expect("")


class _JsonText:
    """Parses JSON in a window that slides over a file.

    The window is decoded as latin-1, where every character is one byte; JSON's syntax is ASCII, which is the
    same in UTF-8. Whether the bytes are valid UTF-8 is checked separately.
    """

    SLACK = 16  # longer than any word, number end or escape that the window may cut

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.start = len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)
        self.text, self.at, self.ended, self.elements, self.lines = "", 0, False, 0, 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decoder = json.JSONDecoder(parse_int=str)  # values are not needed, only where they end
        file.seek(self.start)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            self.at = _WHITE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._slide()

    def expect(self, *characters: str) -> str:
        """Skip one of these characters; "" means the end of the file."""
        found = self.peek()
        if found not in characters:
            expected = " or ".join(repr(character) if character else "the end" for character in characters)
            raise self._error(f"expected {expected}, {f'found {found!r}' if found else 'it ends'}", self.at)
        self.at += len(found)
        return found

    def value(self) -> tuple[int, int]:
        """Skip one value; returns its start and end (exclusive) byte in the file."""
        self.peek()
        while True:
            try:
                end = self._decoder.raw_decode(self.text, self.at)[1]
                if self.ended or end + self.SLACK < len(self.text):
                    break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + self.SLACK >= len(self.text)
                if self.ended or not cut:
                    raise self._error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._error(str(error), self.at) from None
            self._slide()
        span = self.start + self.at, self.start + end
        self.at, self.elements = end, self.elements + 1
        return span

    def _slide(self) -> None:
        """Drop what was skipped and read on; an incomplete value doubles the window."""
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        try:
            self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            byte = self.file.tell() - len(error.object) + error.start
            raise ValueError(f"{self.path}: not UTF-8 text: {error.reason}: byte {byte}") from None
        self.lines += self.text.count("\n", 0, self.at)
        self.start, self.at = self.start + self.at, 0
        self.text, self.ended = rest + chunk.decode("latin-1"), not chunk

    def _error(self, message: str, at: int) -> ValueError:
        line = 1 + self.lines + self.text.count("\n", 0, at)
        place = f"line {line}, byte {self.start + at}, after {self.elements} whole records"
        return ValueError(f"{self.path}: not valid JSON: {message}: {place}")
