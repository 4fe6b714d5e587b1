"""An encoded image -> pixels of the size that the encoder shall see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from PIL.Image import Transpose
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


@dataclass(frozen=True)
class ImageOptions:
    """How an image is brought to size.

    Args:
        mode: `pad` makes it square with the encoder's mean colour and resizes it to size × size
            (LLaVA, ConvLLaVA); `squash` resizes it to size × size whatever its shape; `keep` keeps
            its shape, and the encoder pads its sides up to its stride only. Resizing is bicubic.
        size: Side of the result in pixels; what it measures with `keep` says `side`. With `keep` null
            means as it is.
        side: With `keep`: whether `size` is the `long` side, the `short` one (ConvLLaVA's any-aspect
            input), or that of the square with as many pixels (`area`).
        max_pixels: A larger image (with `pad`, a larger square) is refused before it is decoded.
    """

    mode: Literal["pad", "squash", "keep"] = "pad"
    size: int | None = 336
    side: Literal["long", "short", "area"] = "long"
    max_pixels: int = 89_478_485

    def __post_init__(self) -> None:
        if self.size is None and self.mode != "keep":
            raise ValueError(f"image.size: mode {self.mode} needs a size in pixels")
        if self.size is not None and self.size < 1:
            raise ValueError(f"image.size: expected a positive number of pixels, found {self.size}")

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image of width × height pixels will have."""
        if self.mode != "keep":
            return self.size or 0, self.size or 0
        if self.size is None:
            return width, height
        now = {"long": max(width, height), "short": min(width, height), "area": math.sqrt(width * height)}[self.side]
        return max(1, round(width * self.size / now)), max(1, round(height * self.size / now))


class ImageFile:
    """One encoded image.

    Args:
        where: File and record, for errors.
        name: How errors call the image.
        source: Its file, or its content.
        options: How it is brought to size.

    Raises:
        RecordError: Not an image, several frames, or too many pixels, found in its header.
    """

    def __init__(self, where: str, name: str, source: Path | bytes, options: ImageOptions) -> None:
        self.where, self.name, self.options = where, name, options
        try:
            self.image = Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        except Image.DecompressionBombError as error:
            raise self._fault("too many pixels", str(error)) from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise whatever a damaged header makes them stumble over
            raise self._fault("not an image", f"{type(error).__name__}: {error}") from None
        self._check()
        self.turn = Image.Image.getexif(self.image).get(0x0112, 1)  # a subclass's would decode the whole image

    def _check(self) -> None:
        image, options = self.image, self.options
        pixels = max(image.size) ** 2 if options.mode == "pad" else math.prod(image.size)
        if max(pixels, math.prod(options.target(*image.size))) > options.max_pixels:
            found = f"{image.width}×{image.height} ({options.mode}: {pixels} pixels)"
            raise self._fault("too many pixels", f"{found}, allowed are {options.max_pixels}")
        if image.mode in ("I", "F"):
            raise self._fault(
                "unsupported pixels", f"mode {image.mode}, expected 8 or 16 bits a channel: its range is unknown"
            )
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise self._fault("several frames", f"{frames} frames, expected one")

    def _fault(self, reason: str, detail: str) -> RecordError:
        return RecordError(self.where, reason, f"image {self.name}: {detail}")

    def size(self) -> tuple[int, int]:
        """Width and height that it will have, from its header alone."""
        width, height = self.image.size
        return self.options.target(*((height, width) if self.turn in SIDEWAYS else (width, height)))

    def pixels(self, colour: tuple[int, int, int]) -> Tensor:
        """uint8 [1, 3, H, W], upright and in RGB; `pad` fills with a colour in 0..255.

        Raises:
            RecordError: The file is truncated.
        """
        target = self.size()
        try:
            self._draft()
            upright = to_rgb(self._upright())
        except MemoryError:
            raise
        except Exception as error:
            raise self._fault("truncated image", f"{type(error).__name__}: {error}") from None
        return to_pixels(upright, target, colour if self.options.mode == "pad" else None)[None]

    def _upright(self) -> Image.Image:
        """Turned as the header says; what stands behind the pixels comes too late to tell a size."""
        turn = TURNS.get(self.turn)
        return self.image if turn is None else self.image.transpose(turn)

    def _draft(self) -> None:
        """Let a JPEG be decoded at a fraction of its size that is still DRAFT times what is wanted."""
        if self.options.size is not None:
            size = self.image.size
            wanted = self.options.target(*size)
            scale = DRAFT * max(want / have for want, have in zip(wanted, size, strict=True))
            scale = min(scale, DRAFT * max(wanted) / max(size)) if self.options.mode == "pad" else scale
            self.image.draft(None, (math.ceil(size[0] * scale), math.ceil(size[1] * scale)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit RGB: 16 bits lose the lower half, what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, target: tuple[int, int], colour: tuple[int, int, int] | None = None) -> Tensor:
    """An RGB image -> uint8 [3, H, W] of a width and height; a colour makes it square first.

    Bicubic with antialiasing, by torchvision: Pillow's result to one or two levels of 255 in a third
    of the time.
    """
    pixels = torch.from_numpy(np.array(image))
    if colour is not None:
        side, height, width = max(image.size), image.height, image.width
        square = torch.tensor(colour, dtype=torch.uint8).repeat(side, side, 1)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        pixels = square
    pixels = pixels.permute(2, 0, 1)
    if tuple(pixels.shape[:0:-1]) != target:
        pixels = resize(pixels, [target[1], target[0]], InterpolationMode.BICUBIC, antialias=True)
    return pixels.contiguous()
