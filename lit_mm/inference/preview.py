"""What a model sees of an image, and how each scale divides it."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from lit_mm.data.images import ImageFile, filled
from lit_mm.inference.answering import Model


def preview(model: Model, encoded: bytes) -> dict[str, Any]:
    """An image as the encoder gets it.

    Args:
        model: Whose way of taking images it is.
        encoded: The image file.

    Returns:
        size: [width, height] of the image, upright.
        seen: Data URL of a PNG of the encoder's pixels, sides padded up to its stride.
        box: [left, top, right, bottom] of the image in `seen`, in pixels.
        grids: For each scale [rows, columns] of its visual tokens on `seen`.

    Raises:
        RecordError: It is not an image, or it is too large.
        ValueError: The scales do not fit it.
    """
    options, encoder = model.media.image, model.vlm.encoder
    file = ImageFile("image", "1", encoded, options)
    grids = model.grids(*file.size())
    pixels = file.pixels(model.media.color)[0]  # [3, H, W]
    height, width = (cells * encoder.stride for cells in encoder.grid(*pixels.shape[1:]))
    seen = torch.tensor(model.media.color, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    seen[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return {
        "size": [*reversed(file.shape())],
        "seen": _data_url(Image.fromarray(seen.permute(1, 2, 0).numpy())),
        "box": _box(file, options.mode == "pad"),
        "grids": {scale: [*shape] for scale, shape in grids.items()},
    }


def _box(file: ImageFile, padded: bool) -> list[int]:
    """Where the resized pixels hold the image: with `pad` it is in the middle."""
    (height, width), (rows, columns) = file.shape(), file.size()
    area = filled(height, width, (rows, columns)) if padded else (height, width)
    top, left = (area[0] - height) // 2, (area[1] - width) // 2
    sides = (
        (left, columns, area[1]),
        (top, rows, area[0]),
        (left + width, columns, area[1]),
        (top + height, rows, area[0]),
    )
    return [round(side * target / whole) for side, target, whole in sides]


def _data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
