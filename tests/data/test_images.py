"""Images of every kind, against Pillow's own operations, and every kind of bad file."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image, ImageOps

from lit_mm.data.images import ImageOptions, to_pixels
from lit_mm.data.media import MediaFolder
from lit_mm.data.records import Media, Record, RecordError
from tests.helpers.media import noise, page, saved, sideways, tiff

COLOUR = (122, 116, 104)


class Folder(MediaFolder):
    """With what the tests look at."""

    def sizes(self, record: Record) -> list[tuple[int, int]]:
        return [tuple(visual.pixels.shape[2:]) for visual in self.visuals(record, decode=False)]

    def pixels(self, record: Record) -> list[torch.Tensor]:
        visuals = self.visuals(record)
        assert all(list(visual.labels) == [""] for visual in visuals)
        return [visual.pixels[0] for visual in visuals]


def folder(root, **options) -> Folder:
    return Folder(root, ImageOptions(**{"mode": "keep", "size": None} | options), COLOUR)


def record(*paths: str) -> Record:
    return Record("a", tuple(Media("image", path) for path in paths), (), "set.json, record 0 (id a)")


def as_shown(image: Image.Image, options: ImageOptions) -> torch.Tensor:
    return to_pixels(image, options.target(image.height, image.width), COLOUR if options.mode == "pad" else None)


def test_pad_is_llavas():
    """A square of the mean color with the image in its middle, then bicubic resizing."""
    image = noise(60, 40)
    square = Image.new("RGB", (60, 60), COLOUR)
    square.paste(image, (0, 10))
    expected = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC))
    pixels = as_shown(image, ImageOptions("pad", 32))
    assert abs(pixels.int() - torch.from_numpy(expected.copy()).permute(2, 0, 1).int()).max() <= 2


@pytest.mark.parametrize(("height", "width", "area"), [(40, 60, (40, 80)), (60, 40, (60, 120)), (20, 60, (30, 60))])
def test_pad_to_a_height_and_width(height, width, area):
    """The same with an area of that shape instead of a square."""
    image = noise(width, height)
    filled = Image.new("RGB", area[::-1], COLOUR)
    filled.paste(image, ((area[1] - width) // 2, (area[0] - height) // 2))
    expected = torch.from_numpy(np.array(filled.resize((64, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    pixels = as_shown(image, ImageOptions("pad", (32, 64)))
    assert pixels.shape == expected.shape
    assert abs(pixels.int() - expected.int()).max() <= 2


@pytest.mark.parametrize("given", ["[32, 64]", "48"])
def test_a_size_is_written_height_first(given):
    parser = ArgumentParser()
    parser.add_argument("--image", type=ImageOptions)
    config = parser.parse_args([f"--image.size={given}", "--image.mode=squash"])
    again = parser.parse_string(parser.dump(config))
    shape = (32, 64) if given == "[32, 64]" else (48, 48)
    options = parser.instantiate(again).image
    assert as_shown(noise(60, 40), options).shape == (3, *shape)
    assert hash(options) == hash(ImageOptions("squash", [32, 64] if shape == (32, 64) else 48))


@pytest.mark.parametrize(
    ("mode", "size", "shape"),
    [("squash", (16, 32), (16, 32)), ("squash", 32, (32, 32)), ("keep", 32, (21, 32)), ("keep", None, (40, 60))],
)
def test_other_modes(mode, size, shape):
    assert as_shown(noise(60, 40), ImageOptions(mode, size)).shape == (3, *shape)


@pytest.mark.parametrize(("side", "shape"), [("long", (200, 300)), ("short", (300, 450)), ("area", (245, 367))])
def test_keep_measures_a_side_or_the_area(side, shape):
    options = ImageOptions("keep", 300, side)
    assert as_shown(noise(60, 40), options).shape == (3, *shape)
    if side == "area":
        assert shape[0] * shape[1] == pytest.approx(300**2, rel=0.002)


@pytest.mark.parametrize("mode", ["pad", "keep", "squash"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_decoded_at_a_fraction_is_almost_the_same(tmp_path, mode, orientation):
    """Decoding may leave out what resizing would blur; under a percent of the range on average."""
    image = noise(12, 9).resize((1200, 900), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    options = ImageOptions(mode, 100)
    [pixels] = folder(tmp_path, mode=mode, size=100).pixels(record("a.jpg"))
    whole = Image.open(tmp_path / "a.jpg").convert("RGB")
    upright = whole.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else whole
    expected = as_shown(upright, options)
    assert pixels.shape == expected.shape
    difference = abs(pixels.float() - expected.float())
    assert difference.mean() < 0.01 * 255


def test_exact_decoding_is_pillows_and_the_default_is_not(tmp_path):
    noise(400, 400).save(tmp_path / "a.jpg")
    whole = as_shown(Image.open(tmp_path / "a.jpg").convert("RGB"), ImageOptions("squash", 50))
    [exact] = folder(tmp_path, mode="squash", size=50, exact_decoding=True).pixels(record("a.jpg"))
    [fraction] = folder(tmp_path, mode="squash", size=50).pixels(record("a.jpg"))
    assert torch.equal(exact, whole)
    assert not torch.equal(fraction, whole)


def test_untouched_pixels_are_exact(tmp_path):
    noise(64, 48).save(tmp_path / "a.png")
    [pixels] = folder(tmp_path).pixels(record("a.png"))
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(np.array(noise(64, 48))))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")]
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    noise(20, 10, mode if mode != "LA" else "L").convert(mode).save(tmp_path / f"a.{suffix}")
    assert folder(tmp_path).pixels(record(f"a.{suffix}"))[0].shape == (3, 10, 20)


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "a.png")
    [pixels] = folder(tmp_path).pixels(record("a.png"))
    assert torch.equal(pixels, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 64, 64))


def test_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (folder(tmp_path).pixels(record("a.png"))[0] == 255).all()


def test_a_thin_image_may_not_become_a_huge_square(tmp_path):
    noise(2000, 1).save(tmp_path / "thin.png")
    assert refused(tmp_path, "thin.png", mode="pad", size=64, max_pixels=3_000_000).reason == "too many pixels"
    assert folder(tmp_path, max_pixels=3_000_000).sizes(record("thin.png")) == [(1, 2000)]


@pytest.mark.parametrize("path", ["x" * 5000 + ".png", "a\0.png"])
def test_impossible_paths(tmp_path, path):
    with pytest.raises(RecordError) as caught:
        folder(tmp_path).sizes(record(path))
    assert caught.value.reason == "malformed image path"


def refused(root, path, method="sizes", **options) -> RecordError:
    with pytest.raises(RecordError) as caught:
        getattr(folder(root, **options), method)(record(path))
    assert path in str(caught.value)
    assert str(caught.value).startswith("set.json, record 0 (id a): ")
    return caught.value


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gone.png", "missing image"),
        (".", "missing image"),
        ("text.png", "not an image"),
        ("empty.png", "not an image"),
        ("floats.tiff", "unsupported pixels"),
    ],
)
def test_files_that_are_no_image(tmp_path, path, reason):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "floats.tiff")
    assert refused(tmp_path, path).reason == reason


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated(tmp_path, suffix):
    noise(200, 200).save(tmp_path / f"whole.{suffix}")
    (tmp_path / f"half.{suffix}").write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:5000])
    assert refused(tmp_path, f"half.{suffix}", "pixels").reason == "truncated image"


def test_too_many_pixels_is_found_in_the_header(tmp_path):
    """A file of a few bytes that claims 60,000 × 60,000 pixels is refused without decoding."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(png + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    assert refused(tmp_path, "bomb.png").reason == "too many pixels"
    noise(30, 20).save(tmp_path / "small.png")
    error = refused(tmp_path, "small.png", max_pixels=599)
    assert error.reason == "too many pixels"
    assert "20×30 (height × width; keep: 600 pixels), the limit is 599" in error.detail


def test_paths_do_not_leave_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    noise(8, 8).save(tmp_path / "outside.png")
    for path in ("../outside.png", str(tmp_path / "outside.png"), "http://host/a.png", "file:///a.png"):
        error = refused(root, path)
        assert error.reason == "path leaves the image root"
        assert "link" not in error.detail


@pytest.mark.parametrize("path", ["link.png", "folder/outside.png", "twice.png", "folder/../outside.png"])
def test_a_link_out_of_the_root_is_named_with_its_target(tmp_path, path):
    root, outside = tmp_path / "root", (tmp_path / "outside.png").resolve()
    root.mkdir()
    noise(8, 8).save(outside)
    (root / "link.png").symlink_to(outside)
    (root / "twice.png").symlink_to("link.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "inside.png").symlink_to("real.png")
    noise(8, 8).save(root / "real.png")
    error = refused(root, path)
    assert error.reason == "path leaves the image root"
    link, target = (path, outside) if path.endswith("k.png") or path == "twice.png" else ("folder", tmp_path.resolve())
    assert f"{link} is a link to {target}, expected a path below {root}" in error.detail
    assert folder(root).sizes(record("inside.png")) == [(8, 8)]


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert refused(tmp_path, "a.png").reason in ("malformed image path", "missing image")  # since Python 3.13


@pytest.mark.parametrize(
    "options", [{"mode": "pad", "size": None}, {"size": 0}, {"size": (32, 0)}, {"mode": "keep", "size": (32, 64)}]
)
def test_impossible_options(options):
    with pytest.raises(ValueError, match=r"image\.size"):
        ImageOptions(**options)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_that_unpacks_to_256_megabytes_is_not_unpacked(tmp_path, kind):
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
    noise(8, 8).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    (tmp_path / "bomb.png").write_bytes(whole[:33] + chunk(kind, head + bomb) + whole[33:])
    tracemalloc.start()
    try:
        folder(tmp_path).pixels(record("bomb.png"))
    except RecordError as error:
        assert error.reason in ("not an image", "truncated image")
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_an_orientation_behind_the_pixels_comes_too_late(tmp_path):
    """The header tells the size; the image is shown as the header says."""
    noise(64, 32).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "late.png").write_bytes(whole[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:])
    opened = folder(tmp_path)
    assert opened.sizes(record("late.png")) == [(32, 64)]
    assert torch.equal(opened.pixels(record("late.png"))[0], opened.pixels(record("a.png"))[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(40, 20).save(tmp_path / "a.png", exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert folder(tmp_path).sizes(record("a.png")) == [upright.shape[:2]]  # from the header
    [pixels] = folder(tmp_path).pixels(record("a.png"))
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(upright))


def test_whatever_a_damaged_header_raises_is_a_bad_image(tmp_path, monkeypatch):
    noise(8, 8).save(tmp_path / "a.png")
    for error in (RuntimeError, TypeError, NotImplementedError):
        monkeypatch.setattr(Image, "open", Mock(side_effect=error("Missing dimensions")))
        assert refused(tmp_path, "a.png").reason == "not an image"


def shown(content: bytes) -> np.ndarray:
    """What is shown of an image in a record, at its own size."""
    medium = Media("image", "a.jpg", content)
    opened = Folder(Path(), ImageOptions("keep", None), COLOUR)
    [pixels] = opened.pixels(Record("a", (medium,), (), "set.json, record 0 (id a)"))
    return pixels.permute(1, 2, 0).numpy()


GAIN_MAP = {
    "attribute": b'<rdf:Description hdrgm:Version="1.0"/>',
    "element": b"<rdf:Description><hdrgm:Version>1.0</hdrgm:Version></rdf:Description>",
    "none": b"",
}


@pytest.mark.parametrize("hdr", GAIN_MAP)
def test_of_an_mpo_the_first_picture_is_shown(hdr):
    """As phones write a photo with its depth or, as Ultra HDR, its gain map, and name it .jpg."""
    photo = noise(6, 4).resize((60, 40), Image.Resampling.BICUBIC)
    content = saved("MPO", photo, noise(15, 10), xmp=GAIN_MAP[hdr], exif=sideways())
    first = content[: content.rindex(b"\xff\xd8\xff")]
    assert np.array_equal(shown(content), np.array(Image.open(io.BytesIO(first)).transpose(Image.Transpose.ROTATE_270)))


def test_of_a_tiff_the_only_page_that_is_no_thumbnail_is_shown():
    whole, thumbnail = page(60, 40, thumbnail=False), page(15, 10, thumbnail=True)
    for pages in ((whole, thumbnail), (thumbnail, whole), (thumbnail, whole, thumbnail), (thumbnail,)):
        expected = whole if whole in pages else thumbnail
        assert np.array_equal(shown(tiff(*pages)), np.array(expected))
    for pages in ((whole, whole), (whole, whole, thumbnail), (thumbnail, thumbnail)):
        with pytest.raises(
            RecordError, match=f"several frames: image a.jpg: {len(pages)} frames or pages, expected one"
        ):
            shown(tiff(*pages))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_animations_stay_refused(kind):
    with pytest.raises(RecordError, match="several frames"):
        shown(saved(kind, noise(60, 40), noise(60, 40).rotate(90)))


@pytest.mark.parametrize("exif", [b"", b"no exif", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\xff"])
@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {}), ("MPO", {"xmp": b"<x/>"})]
)
def test_whole_pixels_with_bad_exif_load_unrotated(kind, options, exif):
    image = noise(60, 40)
    expected = Image.open(io.BytesIO(saved(kind, image, **options))).convert("RGB")
    assert np.array_equal(shown(saved(kind, image, exif=b"Exif\0\0" + exif, **options)), np.array(expected))


def test_a_tiff_whose_next_directory_is_garbage():
    content = bytearray(saved("TIFF", noise(60, 40)))
    start = struct.unpack_from("<L", content, 4)[0]
    entries = struct.unpack_from("<H", content, start)[0]
    for target in (10, len(content) - 3, len(content) + 9, 2**32 - 1):
        struct.pack_into("<L", content, start + 2 + 12 * entries, target)
        with pytest.raises(RecordError, match=r"record 0 \(id a\): (truncated image|several frames): image a.jpg: "):
            shown(bytes(content))


def test_a_page_without_pixels(tmp_path):
    content = bytearray(tiff(page(15, 10, thumbnail=True), page(60, 40, thumbnail=False)))
    image = Image.open(io.BytesIO(content))
    image.seek(1)
    content[content.index(struct.pack("<HHLL", 256, 4, 1, 60), image.tag_v2._offset) + 8] = 0
    (tmp_path / "a.tif").write_bytes(content)
    assert refused(tmp_path, "a.tif", size=20).reason == "not an image"
