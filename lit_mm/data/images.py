"""Image files -> pixels of the size that the encoder shall see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lit_mm.data.records import Record, RecordError


@dataclass(frozen=True)
class ImageOptions:
    """How an image is brought to size.

    Args:
        mode: `pad` makes it square with the encoder's mean colour and resizes it to size × size
            (LLaVA, ConvLLaVA); `squash` resizes it to size × size whatever its shape; `keep` keeps
            its shape and resizes its longer side to size. Resizing is bicubic.
        size: Side of the result in pixels. With `keep` null means as it is.
        max_pixels: A larger image (with `pad`, a larger square) is refused before it is decoded.
    """

    mode: Literal["pad", "squash", "keep"] = "pad"
    size: int | None = 336
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
        longer = max(width, height)
        return max(1, round(width * self.size / longer)), max(1, round(height * self.size / longer))


class ImageFolder:
    """Opens the images of records below one root.

    Args:
        root: The folder that the records' paths are relative to; nothing outside it is opened.
        options: How they are brought to size.
        colour: What `pad` fills with: red, green and blue in 0..255.
    """

    def __init__(self, root: Path, options: ImageOptions, colour: tuple[int, int, int]) -> None:
        self.root, self.options, self.colour = root.resolve(), options, colour

    def sizes(self, record: Record) -> list[tuple[int, int]]:
        """Width and height that each image will have, from the file's header alone.

        Raises:
            RecordError: Missing, outside the root, not an image, or too many pixels.
        """
        return [self.options.target(*_upright_size(self._open(record, path))) for path in record.images]

    def load(self, record: Record) -> list[Tensor]:
        """The record's images, uint8 [3, H, W] each, upright and in RGB.

        Raises:
            RecordError: As `sizes`, or the file is truncated.
        """
        return [self._decode(record, path) for path in record.images]

    def _open(self, record: Record, path: str) -> Image.Image:
        file = self._inside_root(record, path)
        try:
            image = Image.open(file)
        except (Image.DecompressionBombError, UnidentifiedImageError, OSError) as error:
            bomb = isinstance(error, Image.DecompressionBombError)
            raise RecordError(
                record.where, "too many pixels" if bomb else "not an image", f"image {path}: {error}"
            ) from None
        pixels = max(image.size) ** 2 if self.options.mode == "pad" else image.width * image.height
        if pixels > self.options.max_pixels:
            detail = f"image {path}: {image.width}×{image.height} ({self.options.mode}: {pixels} pixels)"
            raise RecordError(record.where, "too many pixels", f"{detail}, allowed are {self.options.max_pixels}")
        if image.mode in ("I", "F"):
            detail = f"image {path}: mode {image.mode}, expected 8 or 16 bits a channel: its range is unknown"
            raise RecordError(record.where, "unsupported pixels", detail)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise RecordError(record.where, "several frames", f"image {path}: {frames} frames, expected one")
        return image

    def _inside_root(self, record: Record, path: str) -> Path:
        try:
            file = (self.root / path).resolve()
            exists = file.is_file()
        except (OSError, ValueError) as error:
            raise RecordError(record.where, "malformed image path", f"image {path:.80}: {error}") from None
        if Path(path).is_absolute() or "://" in path or not file.is_relative_to(self.root):
            raise RecordError(
                record.where, "path leaves the image root", f"image {path}: expected a path below {self.root}"
            )
        if not exists:
            raise RecordError(record.where, "missing image", f"image {path}: no such file in {self.root}")
        return file

    def _decode(self, record: Record, path: str) -> Tensor:
        image = self._open(record, path)
        try:
            image = to_rgb(ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise RecordError(record.where, "truncated image", f"image {path}: {error}") from None
        return to_pixels(image, self.options, self.colour)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit RGB: 16 bits lose the lower half, what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, options: ImageOptions, colour: tuple[int, int, int]) -> Tensor:
    """An RGB image -> uint8 [3, H, W] by the options' mode and size."""
    target = options.target(*image.size)
    if options.mode == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if image.size != target:
        image = image.resize(target, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _upright_size(image: Image.Image) -> tuple[int, int]:
    exif = Image.Image.getexif(image)  # the subclass's for PNG would decode the whole image
    turned = exif.get(0x0112, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size
