"""Reads the chosen frames of a video file, upright and in RGB.

Frames are chosen by timestamp without decoding: from the file's index if it is sufficient, otherwise from
its packets. Decoding then only moves forward, seeking to key frames. FFmpeg (through PyAV) reads from a
Python file object and cannot open any other file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import SEEK_END, BytesIO
from itertools import dropwhile
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, cast

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image
from PIL.Image import Transpose

from lit_mm.data.records import RecordError
from lit_mm.data.timeline import Entry, Timeline, VideoOptions, evenly_indexed, timeline_of

OLDEST = (17, 1)
"""The first version of PyAV that reads every video; older ones have no index of MP4, or crash."""
CONTAINERS = "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg"
"""FFmpeg's names of the supported formats; none of them is a playlist."""
SKIPPING = ("h264", "hevc", "mpeg4")
"""Decoders that can be told for each packet whether to skip it."""
SLACK = 0.1
"""Seconds by which a file may end before its header's duration, which is rounded."""
MP4_BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"mfra", b"sidx", b"free", b"skip", b"wide", b"uuid")
MATROSKA_ELEMENTS = (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67")
TURNS = {
    (False, False, False): None,
    (False, True, False): Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Transpose.ROTATE_180,
    (True, False, False): Transpose.TRANSPOSE,
    (True, True, False): Transpose.ROTATE_270,
    (True, False, True): Transpose.ROTATE_90,
    (True, True, True): Transpose.TRANSVERSE,
}
"""(sides swapped, then flipped left to right, then top to bottom) -> Pillow's transpose operation."""
SIDEWAYS = {turn for (swapped, _, _), turn in TURNS.items() if swapped}


class Video:
    """One video of a record.

    Args:
        where: File and record, for errors.
        name: The video's name, for errors.
        source: Its file, or the file's bytes.
        options: Which frames are shown.

    Raises:
        ImportError: PyAV is too old for videos.
    """

    def __init__(self, where: str, name: str, source: Path | bytes, options: VideoOptions) -> None:
        if tuple(map(int, av.__version__.split(".")[:2])) < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise ImportError(f"videos need PyAV {needed} or newer, found {av.__version__}: pip install --upgrade av")
        self.where, self.name, self.source, self.options = where, name, source, options

    def header(self) -> tuple[tuple[int, int], tuple[float, ...]]:
        """Height and width of every frame, upright and with square pixels, and the time of each chosen one in seconds
        after the video's first frame, ascending. Only the first frame is decoded.

        Raises:
            RecordError: The file is not a video, has no video stream or no frames, is truncated or has too many
                pixels.
        """
        with self._open() as stream:
            timeline = self._timeline(stream)
            width, height = _square(stream)
            if self._turn(stream) in SIDEWAYS:
                width, height = height, width
        return (height, width), timeline.seconds(timeline.shown(self.options))

    def read(self) -> tuple[tuple[float, ...], list[Image.Image]]:
        """The times of the chosen frames, and the frames as RGB images of the header's size.

        Raises:
            RecordError: As `header`, or a frame cannot be decoded.
        """
        with self._open() as stream:
            timeline = self._timeline(stream)
            numbers = timeline.shown(self.options)
            wanted = [timeline.starts[number] for number in numbers]
            images = self._sought(stream, timeline, wanted) if timeline.exact else None
        images = images or self._counted(set(numbers), len(timeline.starts))
        return timeline.seconds(numbers), images

    def _fail(self, reason: str, detail: str) -> NoReturn:
        raise RecordError(self.where, reason, f"video {self.name}: {detail}") from None

    @contextmanager
    def _open(self) -> Iterator[VideoStream]:
        with ExitStack() as stack:
            try:
                opened = self.source.open("rb") if isinstance(self.source, Path) else BytesIO(self.source)
                file = stack.enter_context(opened)
                self._check_size(file)
                container = stack.enter_context(self._container(file))
            except RecordError:
                raise
            except av.error.EOFError:
                self._fail("no frames", "it ends before the first one")
            except (av.FFmpegError, OSError, ValueError) as error:
                found = getattr(error, "strerror", None) or error
                self._fail("not a video", f"expected one of {CONTAINERS}, found: {found}")
            yield self._stream(container)

    def _check_size(self, file: Any) -> None:
        expected, size = promised_size(file), file.seek(0, SEEK_END)
        file.seek(0)
        if size < expected:
            self._fail("truncated video", f"has {size} bytes, expected {expected}")

    def _container(self, file: Any) -> InputContainer:
        return av.open(
            file,
            "r",
            options=self._decoder_options,
            container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": ""},
            metadata_errors="replace",
            io_open=_refuse,
        )

    def _stream(self, container: InputContainer) -> VideoStream:
        moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not moving:
            found = ", ".join(stream.type for stream in container.streams) or "none"
            self._fail("no video stream", f"found streams: {found}; expected video")
        if moving[0].codec_context is None:
            self._fail("not a video", "its video stream has a codec that FFmpeg cannot decode")
        self._limit(moving[0])
        moving[0].codec_context.thread_count = 1  # the loader's workers already run in parallel
        return moving[0]

    def _limit(self, stream: VideoStream) -> None:
        limit, (width, height) = self.options.max_pixels, _square(stream)
        if not stream.width or not stream.height:
            self._fail("no frames", f"expected frames of up to {limit} pixels, found none or far larger ones")
        if max(width * height, stream.width * stream.height) > limit:
            self._fail("too many pixels", f"{height}×{width} (height × width) per frame, the limit is {limit} pixels")
        stream.codec_context.options = self._decoder_options

    @property
    def _decoder_options(self) -> dict[str, str]:
        # frames may be larger than the header says, and the decoder also counts its padding
        return {"max_pixels": str(2 * self.options.max_pixels + 2**16)}

    def _timeline(self, stream: VideoStream) -> Timeline:
        timeline = None if self.options.choose == "keyframes" else evenly_indexed(stream)
        if timeline is None:
            with self._open() as other:
                timeline = self._demuxed(other)
        if not timeline.starts:
            self._fail("no frames", "its video stream is empty")
        return timeline

    def _demuxed(self, stream: VideoStream) -> Timeline:
        packets, end = [], 0.0
        try:
            for packet in _container_of(stream).demux():
                entry = Entry.of(packet)
                if entry is None:
                    continue
                end = max(end, float((entry.start + entry.duration) * packet.time_base))
                if packet.stream_index == stream.index:
                    packets.append(entry)
        except (av.FFmpegError, OSError) as error:
            self._fail("truncated video", f"after {len(packets)} frames: {error}")
        self._check_end(stream, end)
        return timeline_of(packets, stream)

    def _check_end(self, stream: VideoStream, end: float) -> None:
        expected = (_container_of(stream).duration or 0) / av.time_base
        if end < expected - SLACK:
            self._fail("truncated video", f"ends after {end:.2f} s, expected {expected:.2f} s by its header")

    def _turn(self, stream: VideoStream) -> Transpose | None:
        # the header has it, but PyAV only gives it with decoded frames
        try:
            first = next(_decoded(stream), None)
        except (av.FFmpegError, OSError) as error:
            self._fail("truncated video", f"its first frame cannot be decoded: {error}")
        if first is None:
            self._fail("truncated video", "none of its frames can be decoded")
        return _turn_of(first)

    def _sought(self, stream: VideoStream, timeline: Timeline, wanted: list[int]) -> list[Image.Image] | None:
        """The frames at the wanted times, found by seeking; None if one is not where its packet says."""
        reader, size, images = _Reader(stream, timeline.keys, wanted), _square(stream), []
        try:
            for start in wanted:
                frame = reader.frame(start)
                if frame is None:
                    return None
                images.append(_image(frame, size))
        except (av.FFmpegError, OSError):
            return None
        return images

    def _counted(self, numbers: set[int], total: int) -> list[Image.Image]:
        """The frames by number, decoding all: slow, for files whose timestamps or key frames are wrong."""
        images, count = [], 0
        with self._open() as stream:
            size = _square(stream)
            try:
                for frame in _decoded(stream):
                    if count in numbers:
                        images.append(_image(frame, size))
                    count += 1
            except (av.FFmpegError, OSError) as error:
                self._fail("truncated video", f"frame {count} of {total} cannot be decoded: {error}")
        if count != total:
            self._fail("truncated video", f"{count} frames can be decoded, expected {total}")
        return images


def promised_size(file: BinaryIO) -> int:
    """Size of an MP4, Matroska or AVI file according to its outermost elements; 0 if unknown."""
    end = file.seek(0)
    while size := _element_size(file.read(16)):
        end = file.seek(end + size)
    return end


def _element_size(head: bytes) -> int:
    """Size of the element with this head; 0 if unknown or open-ended."""
    if head[4:8] in MP4_BOXES:
        size = int.from_bytes(head[:4])
        return int.from_bytes(head[8:16]) if size == 1 else size
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        size = int.from_bytes(head[4:8], "little")
        return size + 8 if size else 0
    if head[:4] in MATROSKA_ELEMENTS and head[4:5] > b"\0":
        width = 9 - head[4].bit_length()  # bytes of the size field; one bit of each encodes the width
        size = int.from_bytes(head[4 : 4 + width]) - (1 << 7 * width)
        return 4 + width + size if size + 1 < 1 << 7 * width else 0
    return 0


class _Reader:
    """Decodes forward to the wanted frames, and seeks if there is a key frame in between.

    Args:
        stream: The stream, at its beginning.
        keys: Start of each key frame.
        wanted: Start of each wanted frame.
    """

    def __init__(self, stream: VideoStream, keys: Sequence[int], wanted: list[int]) -> None:
        self.stream, self.keys, self.wanted = stream, keys, set(wanted)
        self.position: float = keys[0]
        self.decoded = _decoded(stream, self.wanted)

    def frame(self, start: int) -> VideoFrame | None:
        """The frame that starts at `start`; calls must be in ascending order."""
        nearest = bisect_right(self.keys, start)
        # in an open group of pictures, the first frames need the previous key frame
        for key in reversed(self.keys[max(0, nearest - 2) : nearest]):
            if key > self.position or self.position > start:
                _container_of(self.stream).seek(key, stream=self.stream)
                self.decoded = _decoded(self.stream, self.wanted)
            frame = self._forward(start)
            if frame is not None:
                return frame
        return None

    def _forward(self, start: int) -> VideoFrame | None:
        for frame in self.decoded:
            self.position = float("inf") if frame.pts is None else frame.pts
            if self.position >= start:
                return frame if self.position == start else None
        self.position = float("inf")
        return None


def _decoded(stream: VideoStream, wanted: set[int] | None = None) -> Iterator[VideoFrame]:
    """The frames from the next key frame on, skipping frames that are neither wanted nor referenced."""
    skip: Literal["NONREF", "DEFAULT"] = "NONREF" if stream.codec_context.name in SKIPPING else "DEFAULT"
    for packet in dropwhile(lambda packet: not packet.is_keyframe, _container_of(stream).demux(stream)):
        stream.codec_context.skip_frame = "DEFAULT" if wanted is None or packet.pts in wanted else skip
        yield from packet.decode()


def _container_of(stream: VideoStream) -> InputContainer:
    return cast(InputContainer, stream.container)


def _square(stream: VideoStream) -> tuple[int, int]:
    """Width and height with square pixels, before rotation; decoding may change them."""
    return max(1, round(stream.width * (stream.sample_aspect_ratio or 1))), stream.height


def _image(frame: VideoFrame, size: tuple[int, int]) -> Image.Image:
    plane = frame.reformat(*size, format="rgb24", interpolation="BICUBIC", threads=1).planes[0]
    pixels = memoryview(plane)
    image = Image.frombuffer("RGB", size, pixels, "raw", "RGB", plane.line_size, 1)  # type: ignore[arg-type]
    turn = _turn_of(frame)
    return image if turn is None else image.transpose(turn)


def _turn_of(frame: VideoFrame) -> Transpose | None:
    """What makes a decoded frame upright: its display matrix, rounded to a quarter turn."""
    matrix = cast(Any, frame.side_data).get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    return TURNS[swapped, (c if swapped else a) < 0, (b if swapped else d) < 0]


def _refuse(url: str, *_: Any) -> NoReturn:
    raise PermissionError(f"it wants to open {url!r}, expected one file")
