"""Images and videos in files."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from PIL.TiffImagePlugin import ImageFileDirectory_v2

FRAME_TIMES = {
    "constant": [40 * number for number in range(60)],
    "variable": np.cumsum(np.random.default_rng(0).integers(10, 200, 60)).tolist(),
    "late": [5000 + 40 * number for number in range(60)],
    "early": [40 * number - 200 for number in range(60)],
    "three": [0, 40, 80],
    "single": [0],
}
OPEN_GOP = {"bf": "2", "x264-params": "open-gop=1:keyint=12:scenecut=0"}
KINDS = {
    "mp4": ("mp4", "libx264", OPEN_GOP),
    "mp4-refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "hevc": ("mp4", "libx265", {"x265-params": "keyint=12:open-gop=1:bframes=3:log-scale=none"}),
    "mov": ("mov", "mpeg4", {"bf": "2"}),
    "mkv": ("matroska", "libx264", OPEN_GOP),
    "webm": ("webm", "libvpx", {}),
    "webm9": ("webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
    "avi": ("avi", "mpeg4", {}),
    "avi-b": ("avi", "libx264", {"bf": "2"}),
    "flv": ("flv", "libx264", {"bf": "2"}),
    "ts": ("mpegts", "libx264", {"bf": "2"}),
}


def draw(path: Path, size: tuple[int, int], color: str, shape: str = "ellipse") -> None:
    image = Image.new("RGB", size, "white")
    getattr(ImageDraw.Draw(image), shape)((8, 8, size[0] - 8, size[1] - 8), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def truncate(path):
    """Leave the beginning of a file."""
    path.write_bytes(path.read_bytes()[:150])


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def saved(kind: str, image: Image.Image, *others: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options, **({"save_all": True, "append_images": others} if others else {}))
    return file.getvalue()


def sideways() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def page(width: int, height: int, thumbnail: bool) -> Image.Image:
    """A page as a TIFF's writer sees it; of the first one it takes the tags as an option instead."""
    tags = ImageFileDirectory_v2()
    tags[254] = int(thumbnail)
    image = noise(width, height)
    image.encoderinfo = {"tiffinfo": tags}
    return image


def tiff(*pages: Image.Image) -> bytes:
    return saved("TIFF", *pages, tiffinfo=pages[0].encoderinfo["tiffinfo"])


def moving(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    colors = np.random.default_rng(number).integers(0, 255, (2, 3))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:16, :16] = colors[0]
    left = number * 3 % (width - 16)
    pixels[20:36, left : left + 16] = colors[1]
    return pixels


def render(
    path: Path, kind: str = "mp4", times=FRAME_TIMES["constant"], muxer=None, prepare=lambda stream: None, **size
):
    """A video with one picture at each time, in milliseconds."""
    container_format, codec, options = KINDS[kind]
    with av.open(str(path), "w", format=container_format, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = size.get("width", 64), size.get("height", 48)
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = 12
        prepare(stream)
        container.start_encoding()
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(moving(number, **size))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
