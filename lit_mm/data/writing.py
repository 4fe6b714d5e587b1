"""Writes records in LLaVA's format, for the demo sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_mm.data.records import MARKERS, Kind
from lit_mm.data.sources.base import new_file


def conversation(name: str, kind: Kind, path: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One record: all questions about an image or a video, which comes before the first one, with their answers."""
    turns = [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = f"{MARKERS[kind]}\n{turns[0]['value']}"
    return {"id": name, kind: path, "conversations": turns}


def write_records(file: Path, items: Sequence[dict[str, Any]]) -> None:
    """Write a JSON list unless the file already has this content, as another run may be reading it."""
    text = json.dumps(items, indent=1)
    if not file.is_file() or file.read_text() != text:
        with new_file(file) as opened:
            opened.write(text.encode())
