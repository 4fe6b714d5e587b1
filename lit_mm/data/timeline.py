"""Which frames of a video are shown: chosen by their times, without decoding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, pairwise
from typing import Literal, NamedTuple

import av
import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream

MARKED = ("mp4", "matroska", "avi", "flv")
"""Formats that mark the frames from which decoding can start."""


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of a video are shown.

    Args:
        choose: `uniform` splits the duration into max_frames equal spans and shows the frame at the middle of
            each; `fps` shows one frame every 1/fps seconds, the first after half of that, or as `uniform` if
            that gives more than max_frames; `keyframes` shows the key frames, thinned evenly to max_frames.
            No frame is shown twice.
        max_frames: Maximum frames of one video; `uniform` shows all frames of a video with no more than that.
        fps: Frames per second of the video's time, for `fps` only.
        timestamps: Whether the prompt has each frame's time before it.
        max_pixels: Videos with larger frames are refused before decoding.
    """

    choose: Literal["uniform", "fps", "keyframes"] = "uniform"
    max_frames: int = 8
    fps: float = 1.0
    timestamps: bool = False
    max_pixels: int = 89_478_485

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise ValueError(f"video.max_frames: expected a positive number of frames, found {self.max_frames}")
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"video.fps: expected a positive number of frames per second, found {self.fps}")


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video is shown, in ticks.

    Args:
        starts: Start of each frame, ascending.
        end: End of the last frame.
        keys: Start of each key frame, ascending, including frames that are decoded but not shown.
        tick: Seconds per tick.
        exact: Whether decoded frames have these times and decoding can start at every key frame.
    """

    starts: Sequence[int]
    end: int
    keys: Sequence[int]
    tick: Fraction
    exact: bool

    def shown(self, options: VideoOptions) -> list[int]:
        """Numbers of the chosen frames, ascending, at least one."""
        if options.choose == "keyframes":
            keys = sorted(set(self.keys) & set(self.starts)) or self.starts[:1]
            count = options.max_frames
            if len(keys) > count:
                keys = [keys[(2 * number + 1) * len(keys) // (2 * count)] for number in range(count)]
            return [bisect_left(self.starts, key) for key in keys]
        if options.choose == "fps":
            numbers = self._at_middles(1 / (Fraction(str(options.fps)) * self.tick))
            if 0 < len(numbers) <= options.max_frames:
                return numbers
            count = options.max_frames if numbers else 1
        elif len(self.starts) <= options.max_frames:
            return list(range(len(self.starts)))
        else:
            count = options.max_frames
        return self._at_middles(Fraction(self.end - self.starts[0], count))

    def seconds(self, numbers: Iterable[int]) -> tuple[float, ...]:
        """Start of these frames, in seconds after the video's first frame."""
        return tuple(float((self.starts[number] - self.starts[0]) * self.tick) for number in numbers)

    def _at_middles(self, span: Fraction) -> list[int]:
        """The frames shown at 1/2, 3/2, 5/2, … of the span, each once."""
        length, halves = span.as_integer_ratio()[0], 2 * span.denominator  # exact: middles often meet a start
        numbers = []
        for number, (start, end) in enumerate(pairwise(chain(self.starts, [self.end]))):
            before = -((length - halves * (start - self.starts[0])) // (2 * length))  # middles before the frame
            if (2 * before + 1) * length < halves * (end - self.starts[0]):
                numbers.append(number)
        return numbers


class Entry(NamedTuple):
    """A packet's timing."""

    start: int
    duration: int
    key: bool
    shown: bool

    @classmethod
    def of(cls, packet: Packet) -> Entry | None:
        """The packet's entry; None if it has no time, like the last one."""
        # AVI has decoding times only
        start = packet.dts if packet.stream.container.format.name == "avi" else packet.pts
        if start is None:
            return None
        # VP8 sends reference frames that are never shown in packets of their own, marked by one bit
        hidden = getattr(packet.stream.codec_context, "name", "") == "vp8" and not memoryview(packet)[0] & 0x10
        return cls(start, packet.duration or 0, packet.is_keyframe, not (packet.is_discard or hidden))


def evenly_indexed(stream: VideoStream) -> Timeline | None:
    """The timeline from an MP4's index, if its frames are evenly spaced; otherwise None."""
    entries = list(stream.index_entries) if "mp4" in stream.container.format.name else []
    if len(entries) != stream.frames or len(entries) < 2 or stream.start_time is None:
        return None
    decoded = np.array([entry.timestamp for entry in entries])
    keys = np.array([entry.is_keyframe for entry in entries])
    step = int(decoded[1] - decoded[0])
    if step < 1 or (np.diff(decoded) != step).any() or not keys[0] or any(entry.is_discard for entry in entries):
        return None
    end = stream.start_time + step * len(entries)
    starts = range(stream.start_time, end, step)
    return Timeline(starts, end, (decoded[keys] - decoded[0] + stream.start_time).tolist(), _tick(stream), True)


def timeline_of(packets: list[Entry], stream: VideoStream) -> Timeline:
    """The timeline from packets in decoding order; frames before the first key frame cannot be decoded."""
    packets = list(dropwhile(lambda packet: not packet.key, packets))
    shown = sorted(packet for packet in packets if packet.shown and packet.start >= packets[0].start)
    if not shown:
        return Timeline((), 0, (), _tick(stream), False)
    starts = [packet.start for packet in shown]
    typical = round((starts[-1] - starts[0]) / max(1, len(starts) - 1))
    end = starts[-1] + max(1, shown[-1].duration or typical)
    keys, name = sorted(packet.start for packet in packets if packet.key), stream.container.format.name
    exact = any(marked in name for marked in MARKED) and not (name == "avi" and stream.codec_context.has_b_frames)
    return Timeline(starts, end, keys, _tick(stream), exact)


def _tick(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, av.time_base)
