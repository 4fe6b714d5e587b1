"""Decodes an image and resizes it for the encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from lit_mm.data.pixels import (
    SIDEWAYS,
    TURNS,
    UNKNOWN_RANGE,
    ImageOptions,
    filled,
    orientation,
    to_pixels,
    to_rgb,
)
from lit_mm.data.records import RecordError

DRAFT = 2.0
"""A JPEG is decoded at a reduced size that is still at least this many times the target, which is faster.
With `pad`, the image may then be off by up to a quarter of a pixel."""

TIFF_SUBFILE, TIFF_REDUCED = 254, 1
"""The tag with a page's type, and its bit for a reduced version of another page."""


class ImageFile:
    """One encoded image.

    Of a JPEG the first picture is read; a gain map, thumbnail or second view after it (Ultra HDR, MPO) is
    ignored. A TIFF must have exactly one page that is not a thumbnail.

    Args:
        where: File and record, for errors.
        name: The image's name, for errors.
        source: Its file, or its content.
        options: How it is resized.

    Raises:
        RecordError: By its headers it is not an image, has several frames or pages, or too many pixels.
    """

    def __init__(self, where: str, name: str, source: Path | bytes, options: ImageOptions) -> None:
        self.where, self.name, self.options = where, name, options
        with self._guard("not an image"):
            self.image = opened(source)
        with self._guard("truncated image"):
            self._take_the_only_page()
            self.turn = orientation(self.image)
        self._check()

    @contextmanager
    def _guard(self, reason: str) -> Iterator[None]:
        """Turn errors into RecordErrors: Pillow reads lazily and raises all kinds of errors for damaged files."""
        try:
            yield
        except (MemoryError, RecordError):
            raise
        except Image.DecompressionBombError as error:
            raise self._fault("too many pixels", str(error)) from None
        except UnidentifiedImageError:  # whose text has the address of a buffer
            raise self._fault(reason, "none of Pillow's formats") from None
        except Exception as error:
            raise self._fault(reason, f"{type(error).__name__}: {error}") from None

    def _take_the_only_page(self) -> None:
        pages = list(range(getattr(self.image, "n_frames", 1)))
        if len(pages) > 1 and self.image.format == "TIFF":
            pages = [page for page in pages if not self._is_thumbnail(page)]
        if len(pages) != 1:
            raise self._fault("several frames", f"{self.image.n_frames} frames or pages, expected one")  # type: ignore[attr-defined]
        self.image.seek(pages[0])

    def _is_thumbnail(self, page: int) -> bool:
        self.image.seek(page)
        return bool(self.image.tag_v2.get(TIFF_SUBFILE, 0) & TIFF_REDUCED)  # type: ignore[attr-defined]

    def _check(self) -> None:
        mode, limit, (height, width) = self.image.mode, self.options.max_pixels, self.shape()
        if min(height, width) < 1:
            raise self._fault("not an image", f"{height}×{width} pixels (height × width)")
        pixels = math.prod(self._filled())
        if max(pixels, math.prod(self.size())) > limit:
            found = f"{height}×{width} (height × width; {self.options.mode}: {pixels} pixels)"
            raise self._fault("too many pixels", f"{found}, the limit is {limit}")
        if mode in UNKNOWN_RANGE:
            raise self._fault(
                "unsupported pixels", f"mode {mode}, expected 8 or 16 bits per channel: its range is unknown"
            )

    def _fault(self, reason: str, detail: str) -> RecordError:
        return RecordError(self.where, reason, f"image {self.name}: {detail}")

    def shape(self) -> tuple[int, int]:
        """Height and width when upright, from the header."""
        width, height = self.image.size
        return (width, height) if self.turn in SIDEWAYS else (height, width)

    def _filled(self) -> tuple[int, int]:
        """Height and width before resizing, including what `pad` adds."""
        return filled(*self.shape(), self.size()) if self.options.mode == "pad" else self.shape()

    def size(self) -> tuple[int, int]:
        """The resized height and width, from the header only."""
        return self.options.target(*self.shape())

    def pixels(self, color: tuple[int, int, int]) -> Tensor:
        """uint8 [1, 3, H, W], upright and in RGB; `pad` fills with the color (0..255).

        Raises:
            RecordError: The file is truncated.
        """
        target = self.size()
        with self._guard("truncated image"):
            if not self.options.exact_decoding:
                self._draft()
            turn = TURNS.get(self.turn)  # metadata after the pixels is ignored: the size is already fixed
            upright = to_rgb(self.image if turn is None else self.image.transpose(turn))
        return to_pixels(upright, target, color if self.options.mode == "pad" else None)[None]

    def _draft(self) -> None:
        """Have a JPEG decoded at a fraction of its size that is still DRAFT times the target."""
        scale = DRAFT * max(want / have for want, have in zip(self.size(), self._filled(), strict=True))
        width, height = self.image.size
        self.image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))


def opened(source: Path | bytes) -> Image.Image:
    """An image with only its header read."""
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        is_jpeg = file.read(3) == b"\xff\xd8\xff"
    # Image.open would take a JPEG with appended pictures for several frames
    reader = JpegImageFile if is_jpeg else Image.open
    return reader(BytesIO(source) if isinstance(source, bytes) else source)
