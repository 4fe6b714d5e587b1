"""Instruction sets on disk."""

import json
from pathlib import Path

from lit_mm.data.records import RecordError
from tests.helpers.media import draw


def conversation(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]


def write_instruction_set(folder: Path) -> Path:
    """A folder with images, train.json and val.json in LLaVA's format: images of two shapes, several
    images in a record, a record without."""
    items = []
    for number, color in enumerate(["red", "green", "blue", "teal"] * 3):
        size = (64, 64) if number % 2 else (128, 32)
        draw(folder / f"images/{number}.png", size, color)
        turns = conversation(("<image>\nwhat color is the shape?", color), ("is there a circle?", "yes"))
        items.append({"id": str(number), "image": f"images/{number}.png", "conversations": turns})
    both = conversation(("<image> <image>\nis there a red shape?", "yes"))
    items.append({"id": "two", "image": ["images/0.png", "images/1.png"], "conversations": both})
    items.append({"id": "text", "conversations": conversation(("is a red shape red?", "yes"))})
    (folder / "train.json").write_text(json.dumps(items))
    (folder / "val.json").write_text("\n".join(json.dumps(item) for item in items[:4]))
    return folder


def kept_of(bad, items, check) -> list:
    """`check(item)` of every item that raises no RecordError; `bad` gets the others."""
    kept = []
    for item in items:
        try:
            kept.append(check(item))
        except RecordError as error:
            bad.add(error)
    return kept


def items(root, name):
    """The records of a written set."""
    return json.loads((root / f"{name}.json").read_text())


def exchanges(item):
    """Questions and answers of a LLaVA record."""
    texts = [turn["value"].removeprefix("<image>\n") for turn in item["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))
