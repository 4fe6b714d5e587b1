"""Writes records in LLaVA's format, and images that are drawn, for the demo sets."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageFont

from lit_mm.data.records import MARKERS, Kind
from lit_mm.data.sources.base import new_file

Pairs = list[tuple[str, str]]
"""Questions with their answers."""


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


@cache
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib, such as DejaVuSans-Bold."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / f"fonts/ttf/{name}.ttf"), size)


def in_any_order(rng: random.Random, pairs: Pairs) -> Pairs:
    """The questions in random order."""
    rng.shuffle(pairs)
    return pairs


@dataclass(frozen=True)
class DrawnSet:
    """Drawn images with captions and questions. An image depends only on the seed, its split and its number.

    Args:
        name: What one image is called: `board` gives images boards_SEED/train_0.png and ids board_train_0_talk.
        make: Split, number, seed -> what the image shows, with `caption()` and, by type, `questions()`.
        render: That -> the image.
        shuffled: Puts the questions of a conversation in random order.
    """

    name: str
    make: Callable[[str, int, int], Any]
    render: Callable[[Any], Image.Image]
    shuffled: Callable[[random.Random, Pairs], Pairs]

    def write(self, root: Path, train: int, val: int, test: int, seed: int = 0, workers: int = 0) -> None:
        """Write captions.json (of the training images), train.json, val.json and test.json in LLaVA's format, and the
        images that do not exist yet.

        Args:
            root: Folder of the records and of the images' folder.
            train: Number of training images.
            val: Number of images for validation.
            test: Number of images for the final test.
            seed: Seed of all random choices.
            workers: Processes that draw; 0 draws in this one.
        """
        counts = {"train": train, "val": val, "test": test}
        images = [(root, split, number, seed) for split, count in counts.items() for number in range(count)]
        missing = [image for image in images if not (root / self._path(*image[1:])).is_file()]
        if workers and missing:
            with ProcessPoolExecutor(workers) as pool:
                list(pool.map(self._draw, *zip(*missing, strict=True), chunksize=16))
        else:
            for image in missing:
                self._draw(*image)
        write_records(root / "captions.json", [self.caption("train", number, seed) for number in range(train)])
        write_records(root / "train.json", [self.talk("train", number, seed) for number in range(train)])
        for split, count in {"val": val, "test": test}.items():
            asked = [record for number in range(count) for record in self.questions(split, number, seed)]
            write_records(root / f"{split}.json", asked)

    def _draw(self, root: Path, split: str, number: int, seed: int) -> None:
        with new_file(root / self._path(split, number, seed)) as opened:
            self.render(self.make(split, number, seed)).save(opened, "png")

    def caption(self, split: str, number: int, seed: int = 0) -> dict[str, Any]:
        """A record that asks for everything that an image shows."""
        return self._record(split, number, seed, [self.make(split, number, seed).caption()], "caption")

    def talk(self, split: str, number: int, seed: int = 0) -> dict[str, Any]:
        """A record with all questions about an image in random order."""
        pairs = [pair for own in self.make(split, number, seed).questions().values() for pair in own]
        pairs = self.shuffled(random.Random(f"{seed} {split} {number} order"), pairs)
        return self._record(split, number, seed, pairs, "talk")

    def questions(self, split: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
        """A record for each type of questions about an image."""
        by_type = self.make(split, number, seed).questions()
        return [self._record(split, number, seed, own, kind) | {"type": kind} for kind, own in by_type.items()]

    def _record(self, split: str, number: int, seed: int, pairs: Pairs, kind: str) -> dict[str, Any]:
        return conversation(f"{self.name}_{split}_{number}_{kind}", "image", self._path(split, number, seed), pairs)

    def _path(self, split: str, number: int, seed: int) -> str:
        """The image's path below the root."""
        return f"{self.name}s_{seed}/{split}_{number}.png"
