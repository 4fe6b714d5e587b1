"""What lmms-eval's tasks ask -> what `Model` answers. Knows lmms-eval's formats and does not import it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from lit_mm.data.records import MARKERS, Kind
from lit_mm.inference.answering import Ask, Picture

STOPS = ("until", "stop_sequences")
LLAVA = "image_aspect_ratio"
"""How LLaVA brings images to size, which tasks written for it say."""


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Model.answers`, which refuses by name what it does not know.

    Args:
        given: A task's `generation_kwargs`. At temperature 0 answers are greedy even if do_sample is true, as in
            lmms-eval's own models.
    """
    chosen = {name: value for name, value in given.items() if name not in (*STOPS, LLAVA, "seed")}
    lists = [given.get(name) or [] for name in STOPS]
    stops = [stop for own in lists for stop in ([own] if isinstance(own, str) else own) if stop]
    if chosen.get("temperature") == 0:
        chosen.pop("do_sample", None)
    if LLAVA in given:
        rank_zero_warn(f"lmms-eval: {LLAVA} {given[LLAVA]} has no effect, images are brought to size as in training")
    return chosen | ({"stop_strings": stops} if stops else {})


def ask_of(messages: Sequence[Mapping[str, Any]], where: str) -> Ask:
    """The question of lmms-eval's chat messages, with its history and images.

    Images and videos stand where their parts are, unless the texts themselves have markers such as `<image>`.

    Args:
        messages: Each has a role and a content, which is a text or a list of parts of type text, image or video.
        where: What errors call the question.

    Raises:
        ValueError: Roles that do not alternate, or a part that is not supported.
    """
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    rest = messages[1:] if first else messages
    roles = [message["role"] for message in rest]
    if len(roles) % 2 == 0 or roles != [("user", "assistant")[number % 2] for number in range(len(roles))]:
        found = ", ".join(roles) or "nobody"
        raise ValueError(f"{where}: messages from {found}, expected user and assistant in turn, and user at the end")
    texts = [part["text"] for message in messages for part in _parts(message) if part["type"] == "text"]
    marked = any(marker in text for text in texts for marker in MARKERS.values())
    shown: list[Picture] = []
    system, *turns = (_joined(message, shown, marked, where) for message in (first or {"content": []}, *rest))
    return Ask(turns[-1], shown, turns[:-1], system or None)


def pictures(visuals: Iterable[Any] | None, where: str) -> list[Picture]:
    """What a task's `doc_to_visual` returns: images of PIL, and paths of images and videos.

    Raises:
        ValueError: Something else, such as sound or a clip of a video.
    """
    return [_picture(visual, f"{where}: visual {number}") for number, visual in enumerate(visuals or (), 1)]


def _joined(message: Mapping[str, Any], shown: list[Picture], marked: bool, where: str) -> str:
    """A message as a text, with a marker where each image or video is unless the texts have them; these are added to
    `shown`."""
    lines = []
    for part in _parts(message):
        if part["type"] == "text":
            lines.append(part["text"].strip())
            continue
        if message.get("role") != "user":
            raise ValueError(f"{where}: {part['type']} in a message from {message.get('role', 'system')}")
        shown.append(_medium(part, where))
        kind: Kind = part["type"]
        lines += [] if marked else [MARKERS[kind]]
    return "\n".join(lines)


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _medium(part: Mapping[str, Any], where: str) -> Picture:
    """An image or a video of a message."""
    if part["type"] not in MARKERS:
        raise ValueError(f"{where}: a part of type {part['type']}, expected text, image or video")
    if clip := [name for name in ("start_time", "end_time") if part.get(name) is not None]:
        raise ValueError(f"{where}: {clip[0]} of a video is not supported, only whole videos")
    return _picture(part["url"], f"{where}: {part['type']}")


def _picture(value: Any, where: str) -> Picture:
    if not isinstance(value, Image.Image | str | Path):
        found = f"a dict with {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"{where} is {found}, expected an image of PIL or the path of an image or a video")
    return value
