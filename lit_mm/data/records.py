"""Instruction sets: a raw item as `sources` hands it over -> a validated record.

Three formats are read, told apart by their content:
  conversations  LLaVA's {"id", "image", "video", "conversations": [{"from": "human" | "gpt", "value": "…"}]}
  question       {"question_id", "image", "video", "text"}, LLaVA's evaluation files, without answers
  messages       chat as OpenAI and Hugging Face write it: {"messages": [{"role": "system" | "user" |
                 "assistant", "content": "…" or a list of parts}]}; a part is {"type": "text", "text": "…"},
                 {"type": "image"} or {"type": "video"}, with its file in "image", "video", "path", "url" or
                 {"image_url": {"url": "…"}}, or without one
The fields image, images, video and videos hold one file or a list: a path below the media root, a
data URI, bytes, or {"bytes", "path"} as the library datasets stores an image. The k-th <image> of
the text, or the k-th part of type image without a file of its own, takes the k-th image; videos
likewise. A field that is null or "" counts as absent: that is how Arrow and some sets write it. The first
turn of a conversation may be from "system". Where a conversation has a video and no image, <image> marks it.
Every error names the file, the record, the field, what was found and what was expected. No file is
opened here.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["image", "video"]
ItemFormat = str
"""`conversations`, `question`, `messages`, or the name that `add_format` was given."""

MARKERS: dict[Kind, str] = {"image": "<image>", "video": "<video>"}
"""Where an image or a video stands in a turn's text."""
SHOWN_BY: dict[ItemFormat, str] = {"conversations": "conversations", "messages": "messages", "question": "text"}
"""The field that shows an item's format; the first that holds something decides."""
TRANSLATED: dict[ItemFormat, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def add_format(name: str, shown_by: str, translate: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read another format of items, everywhere where the others are read.

    Args:
        name: What a set's `items` may call it.
        shown_by: A field that items of this format have, and no others.
        translate: An item -> the same as LLaVA writes it (`conversations`, `image`, `id`), which is then
            checked like any other. What it raises makes the record a bad one.

    Raises:
        ValueError: Another format has the name or the field.
    """
    if name in SHOWN_BY or shown_by in SHOWN_BY.values():
        raise ValueError(f"add_format {name}, shown by {shown_by}: taken by one of {SHOWN_BY}")
    SHOWN_BY[name], TRANSLATED[name] = shown_by, translate


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
class Media:
    """An image or a video of a record.

    Args:
        kind: `image` or `video`.
        name: Path below the media root; a label for errors where `data` is given.
        data: Content of the encoded file, where it stands in the record itself.
    """

    kind: Kind
    name: str
    data: bytes | None = None


@dataclass(frozen=True)
class Turn:
    """One message; `text`, without white space around it, holds a marker where an image or a video stands."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One item of an instruction set, parsed and validated.

    Args:
        id: The record's own id, or its place in the file.
        media: Images and videos, in the order of their markers.
        turns: user and assistant in turn, user first; a last one of user is a question to be answered.
        where: File and record, for errors.
        system: The system message that goes ahead of the turns.
    """

    id: str | int
    media: tuple[Media, ...]
    turns: tuple[Turn, ...]
    where: str
    system: str | None = None

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

    def report(self, name: str, total: int) -> str | None:
        """What was skipped out of `total` records and why; None if nothing."""
        if not self.counts:
            return None
        lines = [f"  {count} × {reason}, first: {self.examples[reason]}" for reason, count in self.counts.most_common()]
        return "\n".join([f"{name}: skipped {self.counts.total()} of {total} records", *lines])


def parse(where: str, item: Any, format: ItemFormat | None = None) -> Record:
    """One raw item -> Record, by whichever format its fields show, or the one that is named.

    The parts of a message become one text, each part stripped and on lines of its own, joined with
    "\\n": an image before its question reads "<image>\\nWhat?", as LLaVA writes it. Texts that were
    never in parts stay as they are.

    Raises:
        RecordError: Anything in it that is not as it should be.
    """
    readers = {"conversations": _conversation, "question": _question, "messages": _messages}
    name = _format(where, item, format)
    return readers[name](where, item) if name in readers else parse(where, _translated(where, name, item))


def _translated(where: str, name: ItemFormat, item: dict[str, Any]) -> dict[str, Any]:
    try:
        return TRANSLATED[name](item)
    except Exception as error:  # whatever the reader of a format trips over
        raise RecordError(where, "malformed item", f"items {name}: {type(error).__name__}: {error}") from error


def id_of(item: Any) -> Any:
    """What an item calls itself; None if it does not."""
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
    text = _text(where, "text", item["text"])
    in_front = [f"{MARKERS[kind]}\n" * len(column) for kind, column in columns.items() if MARKERS[kind] not in text]
    turns = (Turn("user", "".join(in_front) + text),)
    return _record(where, item, turns, columns)


def _conversation(where: str, item: dict[str, Any]) -> Record:
    raw = item["conversations"]
    if not isinstance(raw, list) or not raw:
        raise RecordError(where, "empty conversation", f"conversations: expected a list of turns, found {raw!r:.60}")
    system, columns = None, _columns(where, item)
    if isinstance(raw[0], dict) and raw[0].get("from") == "system":
        system = _text(where, "conversations[0].value", raw[0].get("value"))
        _refuse_markers(where, "conversations[0].value", system, "in a system message", "in a system turn")
    first = int(system is not None)
    turns = tuple(_turn(where, number, first, raw[number]) for number in range(first, len(raw)))
    if len(turns) % 2 or not turns:
        found = "human's" if turns else "the system's"
        raise RecordError(
            where, "no answer", f"conversations: the last turn ({len(raw) - 1}) is {found}, expected gpt's"
        )
    if columns["video"] and not columns["image"] and not any(MARKERS["video"] in turn.text for turn in turns):
        # LLaVA-NeXT's video sets mark a video as <image>
        turns = tuple(Turn(turn.role, turn.text.replace(MARKERS["image"], MARKERS["video"])) for turn in turns)
    return _record(where, item, turns, columns, system=system)


def image_first(record: Record) -> Record:
    """A record of one image with its marker on a line of its own before the turn's text, as LLaVA,
    ConvLLaVA and M3 rewrite every turn (`preprocess_multimodal`); other records as they are."""
    if [medium.kind for medium in record.media] != ["image"]:
        return record
    marker = MARKERS["image"]
    turns = tuple(
        replace(turn, text=f"{marker}\n{turn.text.replace(marker, '').strip()}".strip())
        if marker in turn.text
        else turn
        for turn in record.turns
    )
    return replace(record, turns=turns)


def _turn(where: str, number: int, first: int, turn: Any) -> Turn:
    field = f"conversations[{number}]"
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise RecordError(where, "malformed turn", f"{field}: expected {{'from', 'value'}}, found {turn!r:.80}")
    role = _role(where, f"{field}.from", turn["from"], number - first, ("human", "gpt"))
    text = _text(where, f"{field}.value", turn["value"])
    if role == "assistant":
        _refuse_markers(where, f"{field}.value", text, "in an answer", "in a gpt turn")
    return Turn(role, text)


def _messages(where: str, item: dict[str, Any]) -> Record:
    raw = _message_list(where, item["messages"])
    in_parts = any(isinstance(message["content"], list) for message in raw)
    contents = [_content(where, number, message["content"], in_parts) for number, message in enumerate(raw)]
    texts = ["\n".join(map(str, content)) for content in contents]
    system = texts[0] if raw[0]["role"] == "system" else None
    first = int(system is not None)
    _refuse_markers(where, "messages[0].content", system or "", "in a system message", "in a system message")
    if len(raw) == first:
        raise RecordError(where, "empty conversation", "messages: expected a user message, found one of system alone")
    turns = tuple(
        _message(where, number, first, raw[number]["role"], texts[number]) for number in range(first, len(raw))
    )
    slots = [part for content in contents for part in content if isinstance(part, _Slot)]
    return _record(where, item, turns, _columns(where, item), _carried(where, slots), system)


def _message_list(where: str, raw: Any) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not raw:
        raise RecordError(where, "empty conversation", f"messages: expected a list of messages, found {raw!r:.60}")
    for number, message in enumerate(raw):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            detail = f"messages[{number}]: expected {{'role', 'content'}}, found {message!r:.80}"
            raise RecordError(where, "malformed turn", detail)
    return raw


def _message(where: str, number: int, first: int, role: Any, text: str) -> Turn:
    field = f"messages[{number}]"
    role = _role(where, f"{field}.role", role, number - first, ("user", "assistant"))
    if role == "assistant":
        _refuse_markers(where, f"{field}.content", text, "in an answer", "in an assistant message")
    return Turn(role, text)


@dataclass(frozen=True)
class _Slot:
    """A part of type image or video: with a file of its own, or waiting for the `index`-th of the columns."""

    kind: Kind
    media: Media | None
    index: int | None

    def __str__(self) -> str:
        return MARKERS[self.kind]


def _content(where: str, number: int, content: Any, in_parts: bool) -> list[str | _Slot]:
    field = f"messages[{number}].content"
    if isinstance(content, list) and content:
        return [_part(where, f"{field}[{place}]", part) for place, part in enumerate(content)]
    return [_part_text(where, field, content) if in_parts else _text(where, field, content)]


def _part(where: str, field: str, part: Any) -> str | _Slot:
    kinds: dict[Any, Kind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
    found = part.get("type") if isinstance(part, dict) else None
    if found == "text":
        return _part_text(where, f"{field}.text", part.get("text"))
    if isinstance(found, str) and found in kinds:
        return _Slot(kinds[found], _own_file(where, field, kinds[found], part), part.get("index"))
    expected = "an object of type text, image, image_url, video or video_url"
    raise RecordError(where, "unknown part", f"{field}: expected {expected}, found {part!r:.80}")


def _part_text(where: str, field: str, value: Any) -> str:
    text = _text(where, field, value)
    _refuse_markers(where, field, text, "marker in a text part", "in a text, expected a part of that type")
    return text


def _own_file(where: str, field: str, kind: Kind, part: dict[str, Any]) -> Media | None:
    """The file that a part names, or None if it leaves that to the columns."""
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


def _carried(where: str, slots: Sequence[_Slot]) -> dict[int, Media]:
    """Number among all markers -> the file of a part's own. An index that is not the part's place is an error."""
    waiting: Counter[str] = Counter()
    for slot in slots:
        if slot.media is None and slot.index not in (None, waiting[slot.kind]):
            detail = f"messages: {slot.kind} number {waiting[slot.kind]} of the text has index {slot.index}"
            raise RecordError(where, f"{slot.kind} order disagrees", detail)
        waiting[slot.kind] += slot.media is None
    return {number: slot.media for number, slot in enumerate(slots) if slot.media}


def _role(where: str, field: str, found: Any, number: int, names: tuple[str, str]) -> str:
    if found not in names:
        raise RecordError(where, "unknown role", f"{field}: expected {names[0]} or {names[1]}, found {found!r}")
    expected = names[number % 2]
    if found != expected:
        reason = f"first turn is not {names[0]}'s" if number == 0 else f"two {found} turns in a row"
        raise RecordError(where, reason, f"{field}: expected {expected}, found {found}")
    return ("user", "assistant")[number % 2]


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str) and value is not None:
        raise RecordError(where, "not text", f"{field}: expected text, found {type(value).__name__} {value!r:.60}")
    if not value or not value.strip():
        raise RecordError(where, "empty text", f"{field}: expected text, found {value!r:.60}")
    if not _is_unicode(value):
        raise RecordError(where, "not Unicode", f"{field}: expected Unicode text, found half of a character")
    return value.strip()


def _is_unicode(text: str) -> bool:
    """JSON can write halves of surrogate pairs, which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_markers(where: str, field: str, text: str, reason: str, place: str) -> None:
    for kind, marker in MARKERS.items():
        if marker in text:
            raise RecordError(where, f"{kind} {reason}", f"{field}: {marker} {place}")


def _columns(where: str, item: dict[str, Any]) -> dict[Kind, list[Media]]:
    return {kind: _column(where, item, kind) for kind in MARKERS}


def _column(where: str, item: dict[str, Any], kind: Kind) -> list[Media]:
    fields = [field for field in (kind, f"{kind}s") if item.get(field) not in (None, [], "")]
    if not fields:
        return []
    if len(fields) > 1:
        raise RecordError(where, f"two {kind} fields", f"expected either {fields[0]} or {fields[1]}, found both")
    field, found = fields[0], item[fields[0]]
    values = (
        {f"{field}[{number}]": value for number, value in enumerate(found)}
        if isinstance(found, list)
        else {field: found}
    )
    media = [_media(where, label, kind, value) for label, value in values.items()]
    if None in media:
        detail = f"{field}: expected a relative path or a list, found {found!r:.80}"
        raise RecordError(where, f"malformed {kind} path", detail)
    return [medium for medium in media if medium]


def _media(where: str, field: str, kind: Kind, value: Any) -> Media | None:
    """A path, a data URI, bytes or {"bytes", "path"}; None if it is nothing of that."""
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
    turns: tuple[Turn, ...],
    columns: Mapping[Kind, list[Media]],
    carried: Mapping[int, Media] = MappingProxyType({}),
    system: str | None = None,
) -> Record:
    name = id_of(item)
    if name is not None and not isinstance(name, str | int):
        name = _written(where, name)
    media = _in_marker_order(where, turns, columns, carried)
    return Record(where if name is None else name, media, turns, where, system)


def _written(where: str, name: Any) -> str:
    """An id that JSON has no type for, as text: dates as ISO writes them, numbers and UUIDs as they print."""
    if isinstance(name, bytes | list | dict):
        kind = type(name).__name__
        raise RecordError(where, "malformed id", f"id: expected text or a number, found {kind} {name!r:.60}")
    return name.isoformat() if hasattr(name, "isoformat") else str(name)


def _in_marker_order(
    where: str, turns: Sequence[Turn], columns: Mapping[Kind, list[Media]], carried: Mapping[int, Media]
) -> tuple[Media, ...]:
    """The media of a record: each marker's own where its part carries one, the next of the columns elsewhere."""
    kinds = {marker: kind for kind, marker in MARKERS.items()}
    marked = [kinds[marker] for turn in turns for marker in re.findall("|".join(kinds), turn.text)]
    waiting = Counter(kind for number, kind in enumerate(marked) if number not in carried)
    for kind, column in columns.items():
        if waiting[kind] != len(column):
            detail = f"{waiting[kind]} {MARKERS[kind]} in the text, {len(column)} in the field {kind}"
            raise RecordError(where, f"{kind} count disagrees", detail)
    rest = {kind: iter(column) for kind, column in columns.items()}
    return tuple(carried.get(number) or next(rest[kind]) for number, kind in enumerate(marked))
