"""Decodes an image and resizes it for the encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from lit_mm.data.records import RecordError

DRAFT = 2.0
"""A JPEG is decoded at a reduced size that is still at least this many times the target, which is faster.
With `pad`, the image may then be off by up to a quarter of a pixel."""

TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF's orientation -> what makes the image upright."""
SIDEWAYS = (5, 6, 7, 8)
UNKNOWN_RANGE = ("I", "F")
"""Modes whose values have no known black and white."""
TIFF_SUBFILE, TIFF_REDUCED = 254, 1
"""The tag with a page's type, and its bit for a reduced version of another page."""


@dataclass(frozen=True)
class ImageOptions:
    """How an image is resized.

    Args:
        mode: `pad` pads with the encoder's mean color to the shape of `size` and resizes (LLaVA, ConvLLaVA);
            `squash` resizes without keeping the aspect ratio; `keep` keeps the aspect ratio, and the encoder
            pads sides to a multiple of its stride. Resizing is bicubic.
        size: Pixels of the result: a number for a square, or `[height, width]`. With `keep`, one number that
            is measured as `side` says, or null to keep the image's size.
        side: With `keep`: whether `size` is the `long` side, the `short` side (ConvLLaVA's any-aspect
            input), or the side of a square with equally many pixels (`area`).
        max_pixels: Images with more pixels (after padding, with `pad`) are refused before decoding.
        exact_decoding: Whether JPEGs are decoded at full size before resizing, as LLaVA and ConvLLaVA do.
            Otherwise a JPEG at least four times as high and wide as needed is decoded at 1/2, 1/4 or 1/8 of
            its size. At 336 this saves 9 of 16 ms for a scan of 1536 × 701 pixels and 180 of 200 ms for a
            photo of 4032 × 3024; on 176 scans, values differed by 0.7 of 255 on average and 104 at most.
    """

    mode: Literal["pad", "squash", "keep"] = "pad"
    size: int | tuple[int, int] | None = 336
    side: Literal["long", "short", "area"] = "long"
    max_pixels: int = 89_478_485
    exact_decoding: bool = False

    def __post_init__(self) -> None:
        if self.size is None and self.mode != "keep":
            raise ValueError(f"image.size: mode {self.mode} needs a size in pixels")
        if isinstance(self.size, (tuple, list)):
            object.__setattr__(self, "size", tuple(self.size))  # YAML has no tuples
            if self.mode == "keep":
                raise ValueError(f"image.size: mode keep takes one number, found {list(self.size)}")
        if self.size is not None and min(self._sides) < 1:
            raise ValueError(f"image.size: expected a positive number of pixels, found {self.size}")

    @property
    def _sides(self) -> tuple[int, int]:
        return self.size if isinstance(self.size, tuple) else (self.size or 0, self.size or 0)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The resized height and width of an image of height × width pixels."""
        if self.mode != "keep":
            return self._sides
        if self.size is None:
            return height, width
        now = {"long": max(width, height), "short": min(width, height), "area": math.sqrt(width * height)}[self.side]
        return max(1, round(height * self._sides[0] / now)), max(1, round(width * self._sides[0] / now))


def filled(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the smallest area with the target's aspect ratio that contains height × width pixels."""
    scale = max(height / target[0], width / target[1])
    return max(height, round(target[0] * scale)), max(width, round(target[1] * scale))


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


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) if EXIF cannot be read, as the pixels may still be fine."""
    try:
        return int(Image.Image.getexif(image).get(0x0112, 1))  # some subclasses' getexif decodes the whole image
    except MemoryError:
        raise
    except Exception:
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit RGB: 16-bit values lose their lower byte, and transparency becomes white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, target: tuple[int, int], color: tuple[int, int, int] | None = None) -> Tensor:
    """An RGB image -> uint8 [3, H, W] of the target size, padded to its aspect ratio first if a color is given.

    Bicubic with antialiasing by torchvision, which is within one or two levels (of 255) of Pillow's result
    and takes a third of the time.
    """
    pixels = torch.from_numpy(np.array(image))
    if color is not None:
        height, width = pixels.shape[:2]
        area = torch.tensor(color, dtype=torch.uint8).repeat(*filled(height, width, target), 1)
        top, left = (area.shape[0] - height) // 2, (area.shape[1] - width) // 2
        area[top : top + height, left : left + width] = pixels
        pixels = area
    pixels = pixels.permute(2, 0, 1)
    if tuple(pixels.shape[1:]) != target:
        pixels = resize(pixels, list(target), InterpolationMode.BICUBIC, antialias=True)
    return pixels.contiguous()
