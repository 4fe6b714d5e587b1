"""Images and videos of records, below one root: what they will be, and their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_mm.data.collate import Visual
from lit_mm.data.images import ImageFile, ImageOptions, to_pixels
from lit_mm.data.records import Media, Record, RecordError
from lit_mm.data.video import Video, VideoOptions


@dataclass
class Shown:
    """What an image or a video will be, told by its header.

    Args:
        height: Of the image or of every frame, in pixels.
        width: Likewise.
        frames: What the text says before each frame, mostly nothing.
    """

    height: int
    width: int
    frames: list[str]


class MediaFolder:
    """Opens the images and videos of records.

    Args:
        root: The folder that paths are relative to; nothing outside it is opened.
        image: How images are brought to size.
        video: Which frames of a video are shown; None: videos are refused.
        frame: How frames are brought to size.
        source: Tells apart the files whose records carry images themselves.
        color: What `pad` fills with: red, green and blue in 0..255.
    """

    def __init__(
        self,
        root: Path,
        image: ImageOptions,
        color: tuple[int, int, int],
        video: VideoOptions | None = None,
        frame: ImageOptions | None = None,
        source: str = "",
    ) -> None:
        self.root, self.color, self.source = root.resolve(), color, source
        self.image, self.video, self.frame = image, video, frame or image

    def shown(self, record: Record) -> list[Shown]:
        """What each medium of a record will be, without decoding any.

        Raises:
            RecordError: Missing, outside the root, not what it should be, or too large.
        """
        return [self._shown(record, medium) for medium in record.media]

    def load(self, record: Record) -> tuple[list[Visual], list[list[str]]]:
        """The pixels of each medium of a record, and what the text says before each of its frames.

        Raises:
            RecordError: As `shown`, or a file is truncated.
        """
        loaded = [self._load(record, medium) for medium in record.media]
        keys = [self._key(record, number, medium) for number, medium in enumerate(record.media)]
        visuals = [
            Visual(key, pixels, medium.kind == "video")
            for key, (pixels, _), medium in zip(keys, loaded, record.media, strict=True)
        ]
        return visuals, [labels for _, labels in loaded]

    def _shown(self, record: Record, medium: Media) -> Shown:
        if medium.kind == "image":
            return Shown(*self._image(record, medium).size(), [""])
        clip = self._video(record, medium).clip()
        return Shown(*self.frame.target(clip.height, clip.width), self._labels(clip.times))

    def _load(self, record: Record, medium: Media) -> tuple[Tensor, list[str]]:
        if medium.kind == "image":
            return self._image(record, medium).pixels(self.color), [""]
        times, frames = self._video(record, medium).read()
        color = self.color if self.frame.mode == "pad" else None
        pixels = [to_pixels(frame, self.frame.target(frame.height, frame.width), color) for frame in frames]
        return torch.stack(pixels), self._labels(times)

    def _labels(self, times: Sequence[float]) -> list[str]:
        stamped = self.video is not None and self.video.timestamps
        return [f"{time:.1f}s: " if stamped else "" for time in times]

    def _key(self, record: Record, number: int, medium: Media) -> tuple:
        if medium.data is not None:
            return self.source, record.where, number
        return self.root, medium.name, medium.kind, self.image, self.video, self.frame

    def _image(self, record: Record, medium: Media) -> ImageFile:
        return ImageFile(record.where, medium.name, self._source(record, medium), self.image)

    def _video(self, record: Record, medium: Media) -> Video:
        if self.video is None:
            detail = f"video {medium.name}: expected images, VideoDataModule takes both"
            raise RecordError(record.where, "unexpected video", detail)
        return Video(record.where, medium.name, self._source(record, medium), self.video)

    def _source(self, record: Record, medium: Media) -> Path | bytes:
        return inside(self.root, record.where, medium) if medium.data is None else medium.data


def inside(root: Path, where: str, medium: Media) -> Path:
    """The file of an image or a video below a root.

    Raises:
        RecordError: Absolute, a URL, outside the root by `..` or a link, or missing.
    """
    named = f"{medium.kind} {medium.name:.200}"
    try:
        file = (root / medium.name).resolve()
        exists = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        raise RecordError(where, f"malformed {medium.kind} path", f"{named}: {error}") from None
    if Path(medium.name).is_absolute() or "://" in medium.name or not file.is_relative_to(root):
        detail = f"{named}: {_link_out(root, medium.name)}expected a path below {root}"
        raise RecordError(where, f"path leaves the {medium.kind} root", detail)
    if not exists:
        raise RecordError(where, f"missing {medium.kind}", f"{named}: no such file in {root}")
    return file


def _link_out(root: Path, name: str) -> str:
    """Which part of a path is a link that leaves the root, and where it leads; nothing if none does."""
    for path in reversed([root / name, *(root / name).parents]):
        if path.is_relative_to(root) and path.is_symlink() and not path.resolve().is_relative_to(root):
            return f"{path.relative_to(root)} is a link to {path.resolve()}, "
    return ""
