"""Turns raw items from `sources` into validated records.

Three formats are supported, recognized by their fields:
  conversations  LLaVA's {"id", "image", "video", "conversations": [{"from": "human" | "gpt", "value": "…"}]}
  question       {"question_id", "image", "video", "text"}, LLaVA's evaluation files
  messages       chat in the format of OpenAI and Hugging Face: {"messages": [{"role": "system" | "user" |
                 "assistant", "content": "…" or a list of parts}]}; a part is {"type": "text", "text": "…"},
                 {"type": "image"} or {"type": "video"}, optionally with its file in "image", "video", "path",
                 "url" or {"image_url": {"url": "…"}}

The fields image, images, video and videos hold one file or a list: a path below the media root, a data URI,
bytes, or {"bytes", "path"} as the library datasets stores images. The k-th <image> in the text, or the k-th
part of type image without its own file, refers to the k-th image; the same goes for videos. Fields that are
null or "" count as absent, as Arrow and some data sets write them that way. The first turn of a conversation
may be from "system". In a conversation with a video and no image, <image> refers to the video.

Items may have three fields for evaluation: `references`, a list of accepted answers (without it, the assistant's
turn is the only one), `type`, the type of the question, and `group`, which questions are scored together.

Every error names the file, the record, the field, what was found and what was expected. No media file is
opened here.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["image", "video"]
ItemFormat = str
"""`conversations`, `question`, `messages`, or the name that `add_format` was given."""

MARKERS: dict[Kind, str] = {"image": "<image>", "video": "<video>"}
"""The place of an image or a video in a turn's text."""
SHOWN_BY: dict[ItemFormat, str] = {"conversations": "conversations", "messages": "messages", "question": "text"}
"""The field that identifies each format; the first one that is not null decides."""
TRANSLATED: dict[ItemFormat, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def add_format(name: str, shown_by: str, translate: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Add a format of items that is then supported everywhere.

    Args:
        name: The format's name, for a set's `items`.
        shown_by: A field that only items of this format have.
        translate: Turns an item into LLaVA's format (`conversations`, `image`, `id`), which is then validated
            as usual. If it raises, the record is bad.

    Raises:
        ValueError: Another format has the same name or field.
    """
    if name in SHOWN_BY or shown_by in SHOWN_BY.values():
        raise ValueError(f"add_format {name}, shown by {shown_by}: taken by one of {SHOWN_BY}")
    SHOWN_BY[name], TRANSLATED[name] = shown_by, translate


class RecordError(ValueError):
    """A bad record.

    Args:
        where: File and record, such as `train.json, record 17 (id receipt_004)`.
        reason: The kind of fault, which records are counted by.
        detail: What was found and what was expected.
    """

    def __init__(self, where: str, reason: str = "", detail: str = "") -> None:
        # a loader's worker passes an error on as a single text, which includes the traceback
        super().__init__(f"{where}: {reason}: {detail}" if reason else where)
        self.where, self.reason, self.detail = where, reason, detail

    def __reduce__(self) -> tuple:  # worker processes pickle errors
        return type(self), (self.where, self.reason, self.detail)


@dataclass(frozen=True)
class Media:
    """An image or a video of a record.

    Args:
        kind: `image` or `video`.
        name: Path below the media root; if `data` is given, only a name for errors.
        data: The encoded file, if the record itself contains it.
    """

    kind: Kind
    name: str
    data: bytes | None = None


@dataclass(frozen=True)
class Record:
    """One item of an instruction set, parsed and validated.

    Args:
        id: The record's own id, or its place in the file.
        media: Images and videos, in the order of their markers.
        turns: Stripped texts of user and assistant, alternating, user first, with a marker for each image and
            video. If the last one is the user's, it is a question to answer.
        where: File and record, for errors.
        system: The system message before the turns, if any.
        references: Accepted answers of a record with one question, if the item lists them.
        type: The question's type, or "".
        group: What the question is scored together with, or "".
    """

    id: str | int
    media: tuple[Media, ...]
    turns: tuple[str, ...]
    where: str
    system: str | None = None
    references: tuple[str, ...] = ()
    type: str = ""
    group: str = ""

    @property
    def exchanges(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each question with its accepted answers: the listed ones, or else the assistant's turn, if any."""
        for text, answer in zip_longest(self.turns[::2], self.turns[1::2]):
            yield text, self.references or (() if answer is None else (answer,))


class BadRecords:
    """Raises, or counts, bad records.

    Args:
        policy: `error` raises at the first one; `skip` counts them for `report`.
    """

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, error: RecordError) -> None:
        """Raise or count an error."""
        if self.policy == "error":
            raise error
        self.count(error.reason, str(error))

    def count(self, reason: str, example: str) -> None:
        """Count one skipped record by its reason, and keep each reason's first message as an example."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def report(self, name: str, total: int) -> str | None:
        """How many of `total` records were skipped and why; None if none."""
        if not self.counts:
            return None
        lines = [f"  {count} × {reason}, first: {self.examples[reason]}" for reason, count in self.counts.most_common()]
        return "\n".join([f"{name}: skipped {self.counts.total()} of {total} records", *lines])


def parse(where: str, item: Any, format: ItemFormat | None = None) -> Record:
    """One raw item -> Record, in the given format or the one that its fields show.

    The parts of a message are stripped and joined with "\\n", so that an image before its question reads
    "<image>\\nWhat?", as LLaVA writes it. Texts without parts are not changed.

    Raises:
        RecordError: Anything in the item is invalid.
    """
    readers = {"conversations": _conversation, "question": _question, "messages": _messages}
    name = _format(where, item, format)
    if name in readers:
        return readers[name](where, item)
    try:
        translated = TRANSLATED[name](item)
    except Exception as error:  # a format's reader may raise anything
        raise RecordError(where, "malformed item", f"items {name}: {type(error).__name__}: {error}") from error
    return parse(where, translated)


def image_first(record: Record) -> Record:
    """Move the marker of a record's only image to a line of its own before its turn's text, as LLaVA, ConvLLaVA
    and M3 do (`preprocess_multimodal`); other records are not changed."""
    if [medium.kind for medium in record.media] != ["image"]:
        return record
    marker = MARKERS["image"]
    turns = (
        f"{marker}\n{text.replace(marker, '').strip()}".strip() if marker in text else text for text in record.turns
    )
    return replace(record, turns=tuple(turns))


def id_of(item: Any) -> Any:
    """The item's own id, or None."""
    names = [item.get(field) for field in ("id", "question_id")] if isinstance(item, dict) else []
    return next((name for name in names if name is not None), None)


def _format(where: str, item: Any, format: ItemFormat | None) -> ItemFormat:
    if format and format not in SHOWN_BY:
        raise ValueError(f"items {format}: expected one of {', '.join(SHOWN_BY)}")
    possible = [format] if format else list(SHOWN_BY)
    present = [name for name in possible if isinstance(item, dict) and SHOWN_BY[name] in item]
    if present:
        return max(present, key=lambda name: item[SHOWN_BY[name]] is not None)
    found = f"an object with {sorted(item)}" if isinstance(item, dict) else f"{type(item).__name__} {str(item)[:60]!r}"
    expected = " or ".join(repr(SHOWN_BY[name]) for name in possible)
    raise RecordError(where, "unknown format", f"expected an object with {expected}, found {found}")


def _question(where: str, item: dict[str, Any]) -> Record:
    columns = _columns(where, item)
    text = checked_text(where, "text", item["text"])
    in_front = [f"{MARKERS[kind]}\n" * len(column) for kind, column in columns.items() if MARKERS[kind] not in text]
    return _record(where, item, ("".join(in_front) + text,), columns)


def _conversation(where: str, item: dict[str, Any]) -> Record:
    raw = _turn_list(where, item, "conversations", ("from", "value"), "turn")
    texts = [checked_text(where, f"conversations[{number}].value", turn["value"]) for number, turn in enumerate(raw)]
    roles = [turn["from"] for turn in raw]
    system, turns = _dialog(where, "conversations", ("from", "value"), roles, texts, ("human", "gpt"), "a gpt turn")
    if len(turns) % 2 or not turns:
        found = "human's" if turns else "the system's"
        detail = f"conversations: the last turn ({len(raw) - 1}) is {found}, expected gpt's"
        raise RecordError(where, "no answer", detail)
    columns = _columns(where, item)
    if columns["video"] and not columns["image"] and not any(MARKERS["video"] in text for text in turns):
        # LLaVA-NeXT's video sets mark videos with <image>
        turns = tuple(text.replace(MARKERS["image"], MARKERS["video"]) for text in turns)
    return _record(where, item, turns, columns, system=system)


def _messages(where: str, item: dict[str, Any]) -> Record:
    raw = _turn_list(where, item, "messages", ("role", "content"), "message")
    in_parts = any(isinstance(message["content"], list) for message in raw)
    shown: list[tuple[Kind, Media | None]] = []  # for every part that is an image or a video
    texts = []
    for number, message in enumerate(raw):
        field, content = f"messages[{number}].content", message["content"]
        if isinstance(content, list) and content:
            parts = [_part(where, f"{field}[{place}]", part, shown) for place, part in enumerate(content)]
            texts.append("\n".join(parts))
        else:
            texts.append(_part_text(where, field, content) if in_parts else checked_text(where, field, content))
    roles, names = [message["role"] for message in raw], ("user", "assistant")
    system, turns = _dialog(where, "messages", ("role", "content"), roles, texts, names, "an assistant message")
    if not turns:
        raise RecordError(where, "empty conversation", "messages: expected a user message, found only a system message")
    carried = {number: own for number, (_, own) in enumerate(shown) if own}
    return _record(where, item, turns, _columns(where, item), carried, system)


def _turn_list(where: str, item: dict[str, Any], field: str, keys: tuple[str, str], noun: str) -> list[dict[str, Any]]:
    raw = item[field]
    if not isinstance(raw, list) or not raw:
        raise RecordError(where, "empty conversation", f"{field}: expected a list of {noun}s, found {raw!r:.60}")
    for number, turn in enumerate(raw):
        if not isinstance(turn, dict) or not set(keys) <= set(turn):
            expected = f"{{{keys[0]!r}, {keys[1]!r}}}"
            raise RecordError(where, "malformed turn", f"{field}[{number}]: expected {expected}, found {turn!r:.80}")
    return raw


def _dialog(
    where: str,
    field: str,
    keys: tuple[str, str],
    roles: list[Any],
    texts: list[str],
    names: tuple[str, str],
    answer: str,
) -> tuple[str | None, tuple[str, ...]]:
    """The system message, if any, and the texts of the turns after it, whose roles must alternate."""
    system = texts[0] if roles[0] == "system" else None
    first = int(system is not None)
    refuse_markers(where, f"{field}[0].{keys[1]}", system or "", "in a system message", "in a system message")
    for number, (role, text) in enumerate(zip(roles[first:], texts[first:], strict=True)):
        place, expected = f"{field}[{number + first}]", names[number % 2]
        if role not in names:
            detail = f"{place}.{keys[0]}: expected {names[0]} or {names[1]}, found {role!r}"
            raise RecordError(where, "unknown role", detail)
        if role != expected:
            reason = f"two {role} turns in a row" if number else f"first turn is not {names[0]}'s"
            raise RecordError(where, reason, f"{place}.{keys[0]}: expected {expected}, found {role}")
        if role == names[1]:
            refuse_markers(where, f"{place}.{keys[1]}", text, "in an answer", f"in {answer}")
    return system, tuple(texts[first:])


def _part(where: str, field: str, part: Any, shown: list[tuple[Kind, Media | None]]) -> str:
    """A part's text. An image or a video is appended to `shown`, with its file if the part names one."""
    kinds: dict[Any, Kind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
    found = part.get("type") if isinstance(part, dict) else None
    if found == "text":
        return _part_text(where, f"{field}.text", part.get("text"))
    if not isinstance(found, str) or found not in kinds:
        expected = "an object of type text, image, image_url, video or video_url"
        raise RecordError(where, "unknown part", f"{field}: expected {expected}, found {part!r:.80}")
    kind = kinds[found]
    own, place = _own_file(where, field, kind, part), shown.count((kind, None))
    if own is None and part.get("index") not in (None, place):
        detail = f"messages: {kind} number {place} of the text has index {part['index']}"
        raise RecordError(where, f"{kind} order disagrees", detail)
    shown.append((kind, own))
    return MARKERS[kind]


def _part_text(where: str, field: str, value: Any) -> str:
    text = checked_text(where, field, value)
    refuse_markers(where, field, text, "marker in a text part", "in a text, expected a part of that type")
    return text


def _own_file(where: str, field: str, kind: Kind, part: dict[str, Any]) -> Media | None:
    """The file that a part names, or None if it refers to the columns."""
    named = [name for name in (kind, f"{kind}_url", "path", "url") if part.get(name) is not None]
    if not named:
        return None
    value, field = part[named[0]], f"{field}.{named[0]}"
    if isinstance(value, dict) and "url" in value:
        value, field = value["url"], f"{field}.url"
    if isinstance(value, str) and value.lower().startswith(("http://", "https://")):
        raise RecordError(where, "a URL", f"{field}: expected a relative path or data, found {value:.80}")
    media = _media(where, field, kind, value)
    if media is None or len(named) > 1:
        detail = f"{field}: expected one relative path or data, found {part!r:.80}"
        raise RecordError(where, f"malformed {kind} path", detail)
    return media


def checked_text(where: str, field: str, value: Any) -> str:
    """A text without spaces at its ends.

    Raises:
        RecordError: It is not text, empty, or not Unicode.
    """
    if not isinstance(value, str) and value is not None:
        raise RecordError(where, "not text", f"{field}: expected text, found {type(value).__name__} {value!r:.60}")
    if not value or not value.strip():
        raise RecordError(where, "empty text", f"{field}: expected text, found {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can encode lone surrogates, which are not characters
        raise RecordError(where, "not Unicode", f"{field}: expected Unicode text, found a lone surrogate") from None
    return value.strip()


def refuse_markers(where: str, field: str, text: str, reason: str, place: str) -> None:
    """Refuse a marker of an image or a video in a text that may not have any.

    Raises:
        RecordError: There is one.
    """
    for kind, marker in MARKERS.items():
        if marker in text:
            raise RecordError(where, f"{kind} {reason}", f"{field}: {marker} {place}")


def marked_kinds(text: str) -> list[Kind]:
    """The kinds of the markers in a text, in order."""
    kinds = {marker: kind for kind, marker in MARKERS.items()}
    return [kinds[marker] for marker in re.findall("|".join(kinds), text)]


def _columns(where: str, item: dict[str, Any]) -> dict[Kind, list[Media]]:
    """The contents of the fields image, images, video and videos."""
    columns: dict[Kind, list[Media]] = {kind: [] for kind in MARKERS}
    for kind, column in columns.items():
        fields = [field for field in (kind, f"{kind}s") if item.get(field) not in (None, [], "")]
        if len(fields) > 1:
            raise RecordError(where, f"two {kind} fields", f"expected either {fields[0]} or {fields[1]}, found both")
        for field in fields:
            found = item[field]
            several = isinstance(found, list)
            for number, value in enumerate(found if several else [found]):
                medium = _media(where, f"{field}[{number}]" if several else field, kind, value)
                if medium is None:
                    detail = f"{field}: expected a relative path or a list, found {found!r:.80}"
                    raise RecordError(where, f"malformed {kind} path", detail)
                column.append(medium)
    return columns


def _media(where: str, field: str, kind: Kind, value: Any) -> Media | None:
    """Parse a path, a data URI, bytes or {"bytes", "path"}; None if it is none of these."""
    path, data = value, None
    if isinstance(value, dict):
        path, data = value.get("path"), value.get("bytes")
    elif isinstance(value, bytes):
        path, data = field, value
    if data is not None:
        name = path if isinstance(path, str) and path else field
        return Media(kind, name, data) if isinstance(data, bytes) and data else None
    if not isinstance(path, str) or not path:
        return None
    return Media(kind, field, _decoded(where, field, kind, path)) if path.startswith("data:") else Media(kind, path)


def _decoded(where: str, field: str, kind: Kind, uri: str) -> bytes:
    header, _, content = uri.partition(",")
    try:
        data = base64.b64decode(content, validate=True) if re.fullmatch(rf"data:{kind}/.*;base64", header) else b""
    except ValueError:
        data = b""
    if not data:
        detail = f"{field}: expected data:{kind}/…;base64,…, found {uri[:60]!r} of {len(uri)} characters"
        raise RecordError(where, "malformed data URI", detail)
    return data


def _record(
    where: str,
    item: dict[str, Any],
    turns: tuple[str, ...],
    columns: Mapping[Kind, list[Media]],
    carried: Mapping[int, Media] = MappingProxyType({}),
    system: str | None = None,
) -> Record:
    """Give each marker the file that its part carries, or else the next file of the columns."""
    marked = marked_kinds("\n".join(turns))
    waiting = Counter(kind for number, kind in enumerate(marked) if number not in carried)
    for kind, column in columns.items():
        if waiting[kind] != len(column):
            detail = f"{waiting[kind]} {MARKERS[kind]} in the text, {len(column)} in the field {kind}"
            raise RecordError(where, f"{kind} count disagrees", detail)
    rest = {kind: iter(column) for kind, column in columns.items()}
    media = tuple(carried.get(number) or next(rest[kind]) for number, kind in enumerate(marked))
    name = id_of(item)
    if isinstance(name, bytes | list | dict):
        detail = f"id: expected text or a number, found {type(name).__name__} {name!r:.60}"
        raise RecordError(where, "malformed id", detail)
    if name is not None and not isinstance(name, str | int):  # parquet has dates, numbers and UUIDs
        name = name.isoformat() if hasattr(name, "isoformat") else str(name)
    told = {field: _label(where, item, field) for field in ("type", "group")}
    references = _references(where, item, questions=(len(turns) + 1) // 2)
    return Record(where if name is None else name, media, turns, where, system, references, **told)


def _references(where: str, item: dict[str, Any], questions: int) -> tuple[str, ...]:
    """The accepted answers of an item with one question."""
    found = item.get("references")
    if found is None:
        return ()
    if not isinstance(found, list) or not found or not all(isinstance(answer, str) for answer in found):
        detail = f"references: expected a list of accepted answers as text, found {found!r:.80}"
        raise RecordError(where, "malformed references", detail)
    if questions > 1:
        detail = f"references: expected one question, found {questions}"
        raise RecordError(where, "references of several questions", detail)
    return tuple(found)


def _label(where: str, item: dict[str, Any], field: str) -> str:
    found = item.get(field)
    if found is not None and not isinstance(found, str | int):
        raise RecordError(where, f"malformed {field}", f"{field}: expected text or a number, found {found!r:.80}")
    return "" if found is None else str(found)
