"""What may be shown with a question: files, bytes, images and arrays -> encoded images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lit_mm.data.pixels import upright_rgb
from lit_mm.data.records import Kind, Media

Picture = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""An image or a video: a path, an encoded file's bytes, a PIL image, or an RGB array: uint8 [H, W, 3] of numpy or
uint8 [3, H, W] of torch."""
VIDEOS = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v"}


def listed(images: Any) -> list[Picture]:
    """One picture or several as a list; None as none."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def media_of(pictures: Sequence[Picture]) -> list[Media]:
    """Images and videos as encoded files.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a picture, a PIL image that cannot be read, or an array or tensor that is not RGB in uint8.
    """
    return [_medium(picture, number) for number, picture in enumerate(pictures, 1)]


def _medium(picture: Picture, number: int) -> Media:
    if isinstance(picture, str | Path):
        if (file := file_of(picture)) is None:
            raise FileNotFoundError(f"image {number}: no file {str(picture)!r:.200}")
        kind: Kind = "video" if file.suffix.lower() in VIDEOS else "image"
        return Media(kind, str(file), file.read_bytes())
    if isinstance(picture, bytes):
        return Media(kind_of(picture), str(number), picture)
    encoded = BytesIO()
    try:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(_array(picture))
        upright_rgb(image).save(encoded, "PPM")  # PNG takes seconds for a photo
    except (ValueError, OSError, SyntaxError) as error:  # Pillow's, for a file that is read only now
        raise ValueError(f"image {number}: {error}") from None
    return Media("image", str(number), encoded.getvalue())


def _array(picture: np.ndarray | Tensor) -> np.ndarray:
    """An array or a tensor as uint8 [H, W, 3].

    Raises:
        ValueError: It is neither, or of another type or shape.
    """
    if not isinstance(picture, np.ndarray | Tensor):
        expected = "a path, bytes, a PIL image, an array or a tensor"
        raise ValueError(f"expected {expected}, found {type(picture).__name__}")
    is_tensor, dtype, shape = isinstance(picture, Tensor), str(picture.dtype).split(".")[-1], list(picture.shape)
    if dtype != "uint8" or len(shape) != 3 or shape[0 if is_tensor else 2] != 3 or 0 in shape:
        expected = "[3, height, width]" if is_tensor else "[height, width, 3]"
        raise ValueError(f"expected uint8 {expected}, found {dtype} {shape}")
    return picture.cpu().movedim(0, -1).numpy() if isinstance(picture, Tensor) else picture


def file_of(name: str | Path) -> Path | None:
    """The file of a name; None if there is none."""
    try:
        file = Path(name).expanduser()
        return file if file.is_file() else None
    except (OSError, RuntimeError):  # a name that is too long, or a user who does not exist
        return None


def kind_of(encoded: bytes) -> Kind:
    """Whether a file is a video, in MP4's or Matroska's family of formats, or an image."""
    mp4 = encoded[4:8] == b"ftyp" and encoded[8:12] not in (b"avif", b"avis", b"heic", b"mif1")  # images in such boxes
    return "video" if mp4 or encoded[:4] == b"\x1aE\xdf\xa3" else "image"
