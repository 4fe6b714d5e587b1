"""Images and videos cut and changed at random: each is shown or is a bad record with a name, nothing else is raised."""

import random

import numpy as np
import pytest
from PIL import Image

from lit_mm.data.images import ImageFile, ImageOptions
from lit_mm.data.records import RecordError
from lit_mm.data.video import Video, VideoOptions
from tests.helpers.media import noise, page, render, saved, sideways, tiff

PHOTO = noise(6, 4).resize((120, 80), Image.Resampling.BICUBIC)
OTHER = noise(15, 10)
IMAGES = {
    "jpeg": saved("JPEG", PHOTO, exif=sideways()),
    "jpeg, progressive": saved("JPEG", noise(60, 40), progressive=True),
    "png": saved("PNG", noise(60, 40), exif=sideways()),
    "png, palette": saved("PNG", noise(60, 40, "P"), transparency=3),
    "webp": saved("WEBP", noise(60, 40), exif=sideways()),
    "webp, two frames": saved("WEBP", noise(60, 40), OTHER.resize((60, 40))),
    "gif": saved("GIF", noise(60, 40, "P")),
    "gif, two frames": saved("GIF", noise(60, 40, "P"), OTHER.resize((60, 40)).convert("P")),
    "tiff": saved("TIFF", noise(60, 40), exif=sideways()),
    "tiff, lzw": saved("TIFF", noise(60, 40), compression="tiff_lzw"),
    "tiff, two pages": saved("TIFF", noise(60, 40), OTHER),
    "tiff, thumbnail": tiff(page(15, 10, thumbnail=True), page(60, 40, thumbnail=False)),
    "bmp": saved("BMP", noise(60, 40)),
    "bmp, palette": saved("BMP", noise(60, 40, "P")),
    "mpo": saved("MPO", PHOTO, OTHER, exif=sideways()),
}
VIDEOS = ["mp4", "mkv", "avi"]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, or with some bits or a run of bytes changed, mostly near the beginning, where the header is."""
    changed, until = bytearray(content), rng.choice([len(content), min(len(content), 400)])
    at, how = rng.randrange(until), rng.choice(["cut", "run", "bits", "bits"])
    if how == "cut":
        return content[:at]
    if how == "run":
        changed[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8)])
        return bytes(changed)
    for place in rng.sample(range(until), rng.choice([1, 2, 8])):
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def show_image(content: bytes, rng: random.Random) -> None:
    size = rng.choice(
        [{"mode": "keep", "size": None}, {"mode": "keep", "size": 20, "side": "short"}, {"size": (16, 32)}]
    )
    image = ImageFile("set.json, record 7", "a", content, ImageOptions(**size, max_pixels=10**6))
    assert tuple(image.pixels((1, 2, 3)).shape) == (1, 3, *image.size())


def show_video(content: bytes, rng: random.Random) -> None:
    options = VideoOptions(rng.choice(["uniform", "fps", "keyframes"]), 4, max_pixels=10**6)
    video = Video("set.json, record 7", "a", content, options)
    (size, expected), (times, frames) = video.header(), video.read()
    assert expected == times and {(frame.height, frame.width) for frame in frames} == {size}
    assert all(np.asarray(frame).shape == (*size, 3) for frame in frames)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it passes over
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*IMAGES, *VIDEOS])
def test_a_damaged_file_is_shown_or_named(tmp_path, kind, count):
    whole = (
        IMAGES[kind] if kind in IMAGES else render(tmp_path / f"a.{kind}", kind, times=range(0, 800, 40)).read_bytes()
    )
    named = 0
    for number in range(count):
        rng = random.Random(f"{kind} {number}")
        try:
            (show_image if kind in IMAGES else show_video)(damaged(whole, rng), rng)
        except RecordError as error:
            assert str(error).startswith("set.json, record 7: ") and " a: " in str(error)
            named += 1
    assert named > count / 10  # or nothing was damaged
