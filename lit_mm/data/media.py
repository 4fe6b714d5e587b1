"""Opens the images and videos of records below one root: their sizes from headers, and their pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_mm.data.collate import Visual
from lit_mm.data.images import ImageFile, ImageOptions, to_pixels
from lit_mm.data.records import Media, Record, RecordError
from lit_mm.data.video import Video, VideoOptions


class MediaFolder:
    """Opens the images and videos of records.

    Args:
        root: The folder that paths are relative to; nothing outside it is opened.
        image: How images are resized.
        video: Which frames of a video are shown; None: videos are refused.
        frame: How frames are resized.
        source: Identifies the record file, for images stored in records.
        color: Fill color of `pad`: red, green and blue in 0..255.
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

    def visuals(self, record: Record, decode: bool = True) -> list[Visual]:
        """The images and videos of a record.

        Args:
            record: The record.
            decode: Whether to decode. If not, only headers are read, and the pixels are on the `meta` device.

        Raises:
            RecordError: A file is missing, outside the root, of the wrong kind, too large or, if decoded,
                truncated.
        """
        return [self._visual(record, number, medium, decode) for number, medium in enumerate(record.media)]

    def _visual(self, record: Record, number: int, medium: Media, decode: bool) -> Visual:
        if medium.kind == "video" and self.video is None:
            detail = f"video {medium.name}: expected an image, as this takes no videos (VideoDataModule does)"
            raise RecordError(record.where, "unexpected video", detail)
        key: tuple
        source: Path | bytes
        if medium.data is None:
            source = inside(self.root, record.where, medium)
            key = self.root, medium.name, medium.kind, self.image, self.video, self.frame
        else:
            source, key = medium.data, (self.source, record.where, number)
        if self.video is None or medium.kind == "image":
            image = ImageFile(record.where, medium.name, source, self.image)
            return Visual(key, image.pixels(self.color) if decode else _no_pixels(1, image.size()))
        video = Video(record.where, medium.name, source, self.video)
        if decode:
            times, frames = video.read()
            color = self.color if self.frame.mode == "pad" else None
            shown = [to_pixels(frame, self.frame.target(frame.height, frame.width), color) for frame in frames]
            pixels = torch.stack(shown)
        else:
            size, times = video.header()
            pixels = _no_pixels(len(times), self.frame.target(*size))
        labels = [f"{time:.1f}s: " if self.video.timestamps else "" for time in times]
        return Visual(key, pixels, video=True, labels=labels)


def _no_pixels(frames: int, size: tuple[int, int]) -> Tensor:
    return torch.empty(frames, 3, *size, dtype=torch.uint8, device="meta")


def inside(root: Path, where: str, medium: Media) -> Path:
    """The file of an image or a video below a root.

    Raises:
        RecordError: The path is absolute, a URL or outside the root (by `..` or a link), or the file is missing.
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
    """The part of a path that is a link out of the root, and its target; empty if there is none."""
    for path in reversed([root / name, *(root / name).parents]):
        if path.is_relative_to(root) and path.is_symlink() and not path.resolve().is_relative_to(root):
            return f"{path.relative_to(root)} is a link to {path.resolve()}, "
    return ""
