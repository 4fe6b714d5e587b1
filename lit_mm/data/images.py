"""An encoded image -> pixels of the size that the encoder shall see."""

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
from PIL import Image
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from lit_mm.data.records import RecordError

DRAFT = 2.0
"""How many times larger than wanted a JPEG may be decoded: it can leave out what resizing would blur.
With `pad` the image then sits up to a quarter of a pixel beside its place."""

TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What makes an image upright, by EXIF's orientation."""
SIDEWAYS = (5, 6, 7, 8)
TIFF_SUBFILE, TIFF_REDUCED = 254, 1
"""The tag that says what a page is, and its bit for a reduced version of another page."""


@dataclass(frozen=True)
class ImageOptions:
    """How an image is brought to size.

    Args:
        mode: `pad` fills up with the encoder's mean color to the shape of `size` and resizes (LLaVA,
            ConvLLaVA); `squash` resizes whatever the shape; `keep` keeps the image's shape, and the
            encoder pads its sides up to its stride only. Resizing is bicubic.
        size: Pixels of the result: a number for a square, or `[height, width]`. With `keep` one number,
            and `side` says what it measures; null then means as it is.
        side: With `keep`: whether `size` is the `long` side, the `short` one (ConvLLaVA's any-aspect
            input), or that of the square with as many pixels (`area`).
        max_pixels: A larger image (with `pad`, one larger when filled up) is refused before it is decoded.
        exact_decoding: Whether a JPEG is decoded at its full size before it is resized, as LLaVA and ConvLLaVA
            do. Otherwise one at least four times as high and wide as needed is decoded at a half, a quarter or
            an eighth. At 336 that saves 9 of 16 ms for a scan of 1536 × 701 pixels and 180 of 200 ms for a
            photo of 4032 × 3024; on 176 scans values were 0.7 of 255 off on average, at edges up to 104.
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
            object.__setattr__(self, "size", tuple(self.size))  # YAML has lists only
            if self.mode == "keep":
                raise ValueError(f"image.size: mode keep takes one number, found {list(self.size)}")
        if self.size is not None and min(self._sides) < 1:
            raise ValueError(f"image.size: expected a positive number of pixels, found {self.size}")

    @property
    def _sides(self) -> tuple[int, int]:
        return self.size if isinstance(self.size, tuple) else (self.size or 0, self.size or 0)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of height × width pixels will have."""
        if self.mode != "keep":
            return self._sides
        if self.size is None:
            return height, width
        now = {"long": max(width, height), "short": min(width, height), "area": math.sqrt(width * height)}[self.side]
        return max(1, round(height * self._sides[0] / now)), max(1, round(width * self._sides[0] / now))


def filled(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the smallest area in the target's shape that height × width pixels fit in."""
    scale = max(height / target[0], width / target[1])
    return max(height, round(target[0] * scale)), max(width, round(target[1] * scale))


class ImageFile:
    """One encoded image.

    A JPEG is its first picture: the gain map, the thumbnail or the other eye's view behind it (Ultra HDR, MPO)
    are left alone. A TIFF is its only page that is no thumbnail.

    Args:
        where: File and record, for errors.
        name: How errors call the image.
        source: Its file, or its content.
        options: How it is brought to size.

    Raises:
        RecordError: Not an image, several frames or pages, or too many pixels, found in its headers.
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
        """Pillow's readers raise whatever a damaged file makes them stumble over, and read when they need to."""
        try:
            yield
        except (MemoryError, RecordError):
            raise
        except Image.DecompressionBombError as error:
            raise self._fault("too many pixels", str(error)) from None
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
        mode, limit, (height, width) = self.image.mode, self.options.max_pixels, self._shape()
        if min(height, width) < 1:
            raise self._fault("not an image", f"{height}×{width} pixels (height × width)")
        pixels = math.prod(self._filled())
        if max(pixels, math.prod(self.size())) > limit:
            found = f"{height}×{width} (height × width; {self.options.mode}: {pixels} pixels)"
            raise self._fault("too many pixels", f"{found}, allowed are {limit}")
        if mode in ("I", "F"):
            raise self._fault(
                "unsupported pixels", f"mode {mode}, expected 8 or 16 bits a channel: its range is unknown"
            )

    def _fault(self, reason: str, detail: str) -> RecordError:
        return RecordError(self.where, reason, f"image {self.name}: {detail}")

    def _shape(self) -> tuple[int, int]:
        """Height and width, upright, by the header."""
        width, height = self.image.size
        return (width, height) if self.turn in SIDEWAYS else (height, width)

    def _filled(self) -> tuple[int, int]:
        """Height and width before it is resized, with what `pad` adds."""
        return filled(*self._shape(), self.size()) if self.options.mode == "pad" else self._shape()

    def size(self) -> tuple[int, int]:
        """Height and width that it will have, from its header alone."""
        return self.options.target(*self._shape())

    def pixels(self, color: tuple[int, int, int]) -> Tensor:
        """uint8 [1, 3, H, W], upright and in RGB; `pad` fills with a color in 0..255.

        Raises:
            RecordError: The file is truncated.
        """
        target = self.size()
        with self._guard("truncated image"):
            if not self.options.exact_decoding:
                self._draft()
            turn = TURNS.get(self.turn)  # what stands behind the pixels comes too late to tell a size
            upright = to_rgb(self.image if turn is None else self.image.transpose(turn))
        return to_pixels(upright, target, color if self.options.mode == "pad" else None)[None]

    def _draft(self) -> None:
        """Let a JPEG be decoded at a fraction of its size that is still DRAFT times what is wanted."""
        scale = DRAFT * max(want / have for want, have in zip(self.size(), self._filled(), strict=True))
        width, height = self.image.size
        self.image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))


def opened(source: Path | bytes) -> Image.Image:
    """An image of which the header was read."""
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        is_jpeg = file.read(3) == b"\xff\xd8\xff"
    reader = JpegImageFile if is_jpeg else Image.open  # which takes a JPEG with more behind it for several frames
    return reader(BytesIO(source) if isinstance(source, bytes) else source)


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1, which is upright, where EXIF cannot be read: the pixels are whole all the same."""
    try:
        return int(Image.Image.getexif(image).get(0x0112, 1))  # a subclass's would decode the whole image
    except MemoryError:
        raise
    except Exception:
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit RGB: 16 bits lose the lower half, what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, target: tuple[int, int], color: tuple[int, int, int] | None = None) -> Tensor:
    """An RGB image -> uint8 [3, H, W] of a height and width; a color fills it up to that shape first.

    Bicubic with antialiasing, by torchvision: Pillow's result to one or two levels of 255 in a third
    of the time.
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
