"""Videos of every kind against decoding the whole file, and every kind of bad file."""

import io
import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lit_mm.data import video
from lit_mm.data.records import RecordError
from lit_mm.data.video import Video, VideoOptions, promised_size
from tests.helpers.environment import ROOT
from tests.helpers.media import FRAME_TIMES, render

REAL = ROOT.parent / "shared/data/videos"
CHOICES = [
    VideoOptions(),
    VideoOptions(max_frames=3),
    VideoOptions(max_frames=100),
    VideoOptions("fps", 50, fps=3),
    VideoOptions("keyframes", 50),
]


def opened(source, options: VideoOptions = CHOICES[0]) -> Video:
    return Video("set.json, record 0 (id a)", "a.mp4", source, options)


def whole(path: Path) -> list[tuple[float, np.ndarray]]:
    """Time and pixels of every frame: the slow and obvious way."""
    with path.open("rb") as file, av.open(file) as container:
        return [(frame.time, np.asarray(frame.to_image())) for frame in container.decode(video=0)]


def on_display(times: list[float], wanted: list[float]) -> list[int]:
    """The distinct frames shown at the wanted times, in seconds after the first frame."""
    numbers = [sum(time - times[0] <= at + 1e-9 for time in times) - 1 for at in wanted]
    return sorted(set(numbers))


def expected(path: Path, options: VideoOptions) -> list[int]:
    """The frames that the options mean, from a full reading of the file."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size and not packet.is_discard]
    # AVI knows no other times, and those of decoding are in the same order as the frames
    by_decoding = path.suffix == ".avi"
    times = sorted(float((p.dts if by_decoding else p.pts) * p.time_base) for p in packets)
    last = max(packets, key=lambda packet: packet.dts if by_decoding else packet.pts)
    mean = (times[-1] - times[0]) / max(1, len(times) - 1)
    length = times[-1] - times[0] + (float(last.duration * last.time_base) or mean)
    if options.choose == "keyframes":
        return sorted(
            times.index(float((p.dts if by_decoding else p.pts) * p.time_base)) for p in packets if p.is_keyframe
        )
    if options.choose == "fps":
        wanted = [(k + 0.5) / options.fps for k in range(int(length * options.fps + 0.5))]
        numbers = on_display(times, wanted or [length / 2])
        if len(numbers) <= options.max_frames:
            return numbers
    if len(times) <= options.max_frames:
        return list(range(len(times)))
    return on_display(times, [(k + 0.5) * length / options.max_frames for k in range(options.max_frames)])


def check(path: Path, options: VideoOptions) -> None:
    frames, (size, times), images = whole(path), opened(path, options).header(), opened(path, options).read()[1]
    numbers = expected(path, options)
    assert len(images) == len(times) == len(numbers)
    for number, image in zip(numbers, images, strict=True):
        assert image.size == size[::-1]
        assert np.array_equal(np.asarray(image), frames[number][1])
    assert all(before < after for before, after in pairwise(times))
    if path.suffix != ".avi":
        assert times == pytest.approx([frames[number][0] - frames[0][0] for number in numbers], abs=2e-3)


@pytest.mark.parametrize("times", FRAME_TIMES)
@pytest.mark.parametrize("kind", ["mp4", "mp4-refresh", "mov", "mkv", "avi", "avi-b", "flv", "ts"])
def test_frames_are_those_of_the_whole_file(tmp_path, kind, times):
    if (kind, times) == ("ts", "three"):
        pytest.skip("FFmpeg finds no stream in so short a file")
    path = render(tmp_path / f"a.{kind.split('-')[0]}", kind, FRAME_TIMES[times])
    for options in CHOICES:
        check(path, options)


@pytest.mark.parametrize("kind", ["hevc", "webm9"])
def test_other_codecs(tmp_path, kind):
    for options in CHOICES:
        check(render(tmp_path / "a.video", kind), options)


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    render(tmp_path / "shown.webm", "webm")
    path = tmp_path / "a.webm"
    with av.open(str(tmp_path / "shown.webm")) as shown, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(shown.streams.video[0])
        for number, packet in enumerate(shown.demux(video=0)):
            if packet.size:
                content = bytearray(bytes(packet))
                content[0] &= 0xFF if number % 12 != 5 else 0xEF  # the bit show_frame
                hidden = av.Packet(bytes(content))
                hidden.pts, hidden.dts, hidden.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
                hidden.stream, hidden.time_base = stream, packet.time_base
                container.mux(hidden)
    frames = [pixels for _, pixels in whole(path)]
    assert len(frames) == 55
    images = opened(path, VideoOptions(max_frames=100)).read()[1]
    assert all(np.array_equal(a, b) for a, b in zip(images, frames, strict=True))


@pytest.mark.parametrize("muxer", [{"movflags": "frag_keyframe+empty_moov"}, {"movflags": "faststart"}])
def test_fragments_and_index_in_front(tmp_path, muxer):
    path = render(tmp_path / "a.mp4", muxer=muxer)
    for options in CHOICES:
        check(path, options)


def test_without_a_duration(tmp_path):
    path = render(tmp_path / "a.mkv", "mkv", muxer={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    for options in CHOICES:
        check(path, options)


def test_odd_sides(tmp_path):
    path = tmp_path / "a.webm"
    render(path, "webm9", width=63, height=47)
    assert len(opened(path, VideoOptions(max_pixels=63 * 47)).read()[1]) == 8
    assert opened(path).header()[0] == (47, 63)
    assert {image.size for image in opened(path).read()[1]} == {(63, 47)}


def test_bytes_are_as_good_as_a_file(tmp_path):
    path = render(tmp_path / "a.mp4")
    assert opened(path.read_bytes()).header() == opened(path).header()
    assert opened(path.read_bytes()).read()[1] == opened(path).read()[1]


def test_fps_with_too_many_frames_is_uniform(tmp_path):
    path = render(tmp_path / "a.mp4")
    assert opened(path, VideoOptions("fps", 7, fps=10)).header() == opened(path, VideoOptions("uniform", 7)).header()
    assert len(opened(path, VideoOptions("fps", 24, fps=10)).header()[1]) == 24


def test_keyframes_are_thinned_evenly(tmp_path):
    path = render(tmp_path / "a.mp4")
    times = opened(path, VideoOptions("keyframes", 100)).header()[1]
    assert times == pytest.approx([0, 0.48, 0.96, 1.44, 1.92], abs=0.09)  # an open group's first frames lead
    assert opened(path, VideoOptions("keyframes", 1)).header()[1] == (times[2],)
    assert len(opened(path, VideoOptions("keyframes", 3)).read()[1]) == 3


def test_few_frames_of_a_long_video_decode_few(tmp_path, monkeypatch):
    path, decoded = render(tmp_path / "a.mp4", times=[40 * number for number in range(1200)]), []
    original = video._decoded

    def counted(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decoded", counted)
    assert len(opened(path, VideoOptions(max_frames=4)).read()[1]) == 4
    assert len(decoded) <= 4 * 24
    decoded.clear()
    opened(path).header()
    assert len(decoded) == 1


def test_an_even_index_saves_reading_the_packets(tmp_path, monkeypatch):
    path = render(tmp_path / "a.mp4")
    monkeypatch.setattr(Video, "_demuxed", None)
    opened(path).read()[1]
    with pytest.raises(TypeError):
        opened(render(tmp_path / "b.mp4", times=FRAME_TIMES["variable"])).read()[1]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_display_matrix(tmp_path, degrees, flip, kind):
    path = render(tmp_path / "a", kind, prepare=lambda stream: stream.set_display_rotation(degrees, hflip=flip))
    plain = np.rot90(whole(path)[0][1], degrees // 90)
    image = opened(path, VideoOptions(max_frames=100)).read()[1][0]
    assert np.array_equal(np.asarray(image), plain[:, ::-1] if flip else plain)
    (height, width), _ = opened(path).header()
    assert (width, height) == image.size == ((48, 64) if degrees % 180 else (64, 48))


@pytest.mark.parametrize(("aspect", "degrees", "size"), [((4, 3), 0, (85, 48)), ((8, 9), 90, (48, 57))])
def test_pixels_become_square(tmp_path, aspect, degrees, size):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        stream.set_display_rotation(degrees)

    path = render(tmp_path / "a.mp4", prepare=prepare)
    (height, width), _ = opened(path).header()
    assert (width, height) == size
    assert {image.size for image in opened(path).read()[1]} == {size}
    upright = Image.fromarray(np.rot90(whole(path)[0][1], degrees // 90)).resize(size, Image.Resampling.BICUBIC)
    found = opened(path, VideoOptions(max_frames=100)).read()[1][0]
    assert np.abs(np.asarray(found, float) - np.asarray(upright, float)).mean() < 2


def fault(source, options: VideoOptions = CHOICES[0]) -> RecordError:
    """The same from header and from read."""
    with pytest.raises(RecordError) as first:
        opened(source, options).header()
    with pytest.raises(RecordError) as second:
        opened(source, options).read()[1]
    assert str(first.value) == str(second.value)
    assert first.value.where == "set.json, record 0 (id a)"
    assert first.value.detail.startswith("video a.mp4: ")
    return first.value


def as_image(image_format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, image_format)
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"0" * 5000, b"<html>" * 999, as_image("PNG"), as_image("JPEG"), as_image("WEBP")]
)
def test_not_a_video(content):
    assert fault(content).reason == "not a video"


def test_missing_file(tmp_path):
    assert "No such file" in fault(tmp_path / "none.mp4").detail
    assert "directory" in fault(tmp_path).detail


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_audio_alone(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48_000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert fault(path).reason == "no video stream"
    assert "audio; expected video" in fault(path).detail


def test_no_frames(tmp_path):
    assert fault(render(tmp_path / "a.mkv", "mkv", times=[])).reason == "no frames"


@pytest.mark.parametrize("limit", [64 * 48 - 1, 64 * 48 * 4 // 3])
def test_too_many_pixels(tmp_path, limit):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)

    error = fault(render(tmp_path / "a.mp4", prepare=prepare), VideoOptions(max_pixels=limit))
    assert error.reason == "too many pixels"
    assert str(limit) in error.detail


def test_frames_larger_than_the_header_says(tmp_path):
    """A stream may change its size on the way."""
    small = render(tmp_path / "a.ts", "ts", width=64, height=64).read_bytes()
    large = render(tmp_path / "b.ts", "ts", FRAME_TIMES["late"], width=512, height=512).read_bytes()
    assert {image.size for image in opened(small + large).read()[1]} == {(64, 64)}
    with pytest.raises(RecordError, match="cannot be decoded"):
        opened(small + large, VideoOptions(max_pixels=64 * 64)).read()[1]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm9", "avi"])
@pytest.mark.parametrize("times", ["constant", "variable"])
def test_truncated(tmp_path, kind, times):
    path = render(tmp_path / "a", kind, FRAME_TIMES[times], {"movflags": "faststart"} if kind == "mp4" else {})
    content = path.read_bytes()
    assert promised_size(io.BytesIO(content)) == len(content)
    for part in (0.05, 0.3, 0.5, 0.9, 0.99):
        assert fault(content[: int(len(content) * part)]).reason == "truncated video"
    assert fault(content[:-1]).reason == "truncated video"


@pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
def test_truncated_by_the_duration_in_the_header(tmp_path, part):
    content = render(tmp_path / "a.flv", "flv").read_bytes()
    assert fault(content[: int(len(content) * part)]).reason == "truncated video"


@pytest.mark.parametrize("times", ["constant", "variable"])
def test_truncated_where_the_size_is_not_told(tmp_path, times):
    """The index promises frames; those that cannot be read are not replaced by others."""
    content = bytearray(render(tmp_path / "a.mp4", "mp4", FRAME_TIMES[times], {"movflags": "faststart"}).read_bytes())
    box = content.index(b"mdat") - 4
    content[box : box + 4] = bytes(4)  # up to the end of the file
    with pytest.raises(RecordError, match="truncated video"):
        opened(bytes(content[: len(content) * 3 // 4])).read()[1]


def test_damage_is_not_hidden(tmp_path):
    content = bytearray(render(tmp_path / "a.mp4", muxer={"movflags": "faststart"}).read_bytes())
    content[content.index(b"mdat") + 4 + 2000 :] = bytes(len(content) - content.index(b"mdat") - 4 - 2000)
    with pytest.raises(RecordError, match="truncated video"):
        opened(bytes(content)).read()[1]


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_no_other_file_is_opened(tmp_path, monkeypatch, scheme, guarded):
    """Not even were playlists read."""
    other, segment = render(tmp_path / "other.mp4"), render(tmp_path / "other.ts", "ts")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{scheme}{segment}\n#EXT-X-ENDLIST\n"
    script = f"ffconcat version 1.0\nfile '{scheme}{other}'\n"
    if not guarded:
        monkeypatch.setattr(video, "CONTAINERS", f"{video.CONTAINERS},hls,concat")
    for name, content in (("a.m3u8", playlist), ("a.ffconcat", script)):
        (tmp_path / name).write_text(content)
        assert fault(tmp_path / name).reason in ("not a video", "no video stream", "no frames", "truncated video")


def test_a_pyav_that_would_crash_is_refused(tmp_path, monkeypatch):
    path = render(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "__version__", "15.1.0")
    with pytest.raises(ImportError, match=r"videos need PyAV 17\.1 or newer, found 15\.1\.0: "):
        Video("here", "a.mp4", path, VideoOptions())


@pytest.mark.parametrize(("field", "value"), [("max_frames", 0), ("fps", 0.0), ("fps", float("nan"))])
def test_options_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        VideoOptions(**{field: value})


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real clips in {REAL}")
@pytest.mark.parametrize("options", CHOICES, ids=lambda options: f"{options.choose}-{options.max_frames}")
def test_real_clips(options):
    for item in json.loads((REAL / "videos.json").read_text()):
        check(REAL / item["video"], options)
