"""How an image becomes pixels of the right size. Imports nothing of this package: `export` copies this file into its
folders, where images are prepared without lit_mm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from PIL.Image import Transpose
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

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


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) if EXIF cannot be read, as the pixels may still be fine."""
    try:
        return int(Image.Image.getexif(image).get(0x0112, 1))  # some subclasses' getexif decodes the whole image
    except MemoryError:
        raise
    except Exception:
        return 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as its file is read: turned as EXIF says, and in RGB.

    Raises:
        ValueError: The range of its values is unknown.
    """
    if image.mode in UNKNOWN_RANGE:
        raise ValueError(f"mode {image.mode}, expected 8 or 16 bits per channel: its range is unknown")
    turn = TURNS.get(orientation(image))
    return to_rgb(image if turn is None else image.transpose(turn))


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
