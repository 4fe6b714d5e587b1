"""Which scales a grid allows, and how frames are grouped in time.

A scale is a number of visual tokens per image. Each coarser scale's tokens must be the means of boxes of
the finer scale's tokens, so its boxes must be unions of the finer boxes. On a 24×24 grid:

    576 = 24×24    144 = 12×12    36 = 6×6    9 = 3×3    1 = 1×1

A video has frames, and a time scale is the largest number of sets that its frames are grouped into. A
scale of a video combines both: `8x16` is up to 8 sets of neighboring frames with 16 tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import log
from typing import Literal, NamedTuple

Sampling = Literal["mean", "spatial", "sequential"]
Pooling = Literal["exact", "adaptive"]
Shape = tuple[int, int]
"""Rows and columns."""


class VideoScale(NamedTuple):
    """Tokens for each of at most so many sets of neighboring frames."""

    frames: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.tokens}"


Scale = int | VideoScale
"""Tokens per image, or for a model with time scales, sets of frames times tokens per set."""


def check_scales(scales: Sequence[int], name: str = "scales") -> list[int]:
    """The scales as a list.

    Raises:
        ValueError: They are not distinct positive numbers, finest first.
    """
    if not scales or min(scales) < 1 or list(scales) != sorted(set(scales), reverse=True):
        raise ValueError(f"{name} must be distinct, positive and finest first, found {list(scales)}")
    return list(scales)


def check_time_scales(time_scales: Sequence[int] | None) -> list[int]:
    """The time scales as a list, empty for none.

    Raises:
        ValueError: They are not distinct positive numbers, finest first, or one does not divide the
            one before it: its sets of frames would not be unions of the finer ones.
    """
    for fine, coarse in pairwise(check_scales(time_scales, "time_scales") if time_scales else []):
        if fine % coarse:
            raise ValueError(f"time_scales: {coarse} is not nested in {fine}, which it does not divide")
    return list(time_scales or [])


def all_scales(scales: Sequence[int], time_scales: Sequence[int] = ()) -> list[Scale]:
    """Every scale of a model, finest first: its image scales, at each of its time scales."""
    if not time_scales:
        return list(scales)
    return [VideoScale(frames, tokens) for frames in time_scales for tokens in scales]


def legal_scales(height: int, width: int) -> dict[int, Shape]:
    """Every scale of a height × width grid with its rows and columns, finest first.

    Windows are squares that tile the grid (M3 pools 24×24 by 1, 2, 4, 8, 24), and the whole grid.
    """
    sides = [k for k in range(1, min(height, width) + 1) if not (height % k or width % k)]
    return {height * width // k**2: (height // k, width // k) for k in sides} | {1: (1, 1)}


@lru_cache(maxsize=4096)
def nested_shapes(
    height: int, width: int, scales: tuple[int, ...], sampling: Sampling = "mean", pooling: Pooling = "exact"
) -> list[Shape]:
    """Rows and columns of each scale's tokens on a height × width grid.

    Raises:
        ValueError: A scale does not divide the grid, or is not the mean of the next finer one.
    """
    if sampling == "sequential":
        if refused := [scale for scale in scales if scale > height * width]:
            raise ValueError(f"scales {refused} exceed the {height * width} tokens of a {height}×{width} grid")
        return [(1, scale) for scale in scales]
    if pooling == "adaptive":
        return _adaptive_shapes(height, width, scales, sampling)
    legal = legal_scales(height, width)
    if refused := [scale for scale in scales if scale not in legal]:
        raise ValueError(f"scales {refused} do not divide a {height}×{width} grid, which allows {list(legal)}")
    shapes = [legal[scale] for scale in scales]
    for (fine, coarse), (first, second) in zip(pairwise(scales), pairwise(shapes), strict=True):
        if first[0] % second[0] or first[1] % second[1]:
            raise ValueError(
                f"scale {coarse} is not nested in scale {fine}: on a {height}×{width} grid they are "
                f"{second[0]}×{second[1]} and {first[0]}×{first[1]} tokens"
            )
    return shapes


def _adaptive_shapes(height: int, width: int, scales: Sequence[int], sampling: Sampling) -> list[Shape]:
    if sampling != "mean":
        raise ValueError(f"pooling adaptive goes with sampling mean, found {sampling}")
    found = _chain((height, width), scales, log(height / width))
    if found is None:
        raise ValueError(f"no nested sets of {list(scales)} tokens fit a {height}×{width} grid")
    return found


def _chain(within: Shape, scales: Sequence[int], aspect: float) -> list[Shape] | None:
    """Shapes whose aspect ratio is nearest to the grid's, each within the one before; None if there are none."""
    if not scales:
        return []
    shapes = [(rows, scales[0] // rows) for rows in range(1, within[0] + 1) if scales[0] % rows == 0]
    fitting = [shape for shape in shapes if shape[1] <= within[1]]
    for shape in sorted(fitting, key=lambda shape: abs(log(shape[0] / shape[1]) - aspect)):
        if (rest := _chain(shape, scales[1:], aspect)) is not None:
            return [shape, *rest]
    return None


def nested_cuts(height: int, width: int, shapes: Sequence[Shape]) -> Iterator[tuple[list[int], list[int]]]:
    """Where each set's boxes are cut, along the rows and along the columns, ends included.

    A coarser set's cuts are some of the finer one's, so its boxes are unions of the finer boxes.
    """
    rows, columns = tuple(range(height + 1)), tuple(range(width + 1))
    for shape in shapes:
        rows, columns = _fewer(rows, shape[0]), _fewer(columns, shape[1])
        yield list(rows), list(columns)


@lru_cache(maxsize=4096)
def _fewer(cuts: tuple[int, ...], bands: int) -> tuple[int, ...]:
    """Those of the cuts that give the most equal bands: the smallest sum of squared sizes, and among equal
    sums the cuts nearest to those of perfectly equal bands. Dynamic programming over the bands."""
    best: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, (0,))]  # for each last cut: squares, distance, path
    for band in range(1, bands + 1):
        best = [
            min(
                (squares + (cut - path[-1]) ** 2, away + (cut * bands - cuts[-1] * band) ** 2, (*path, cut))
                for squares, away, path in best
                if path[-1] < cut
            )
            for cut in cuts[band : len(cuts) - bands + band]
        ]
    return best[-1][2]


def set_starts(frames: int, most: int) -> list[int]:
    """The first frame of each of at most `most` sets of neighboring frames, of nearly equal size.

    Where one number of sets divides another, its sets are unions of the other's.
    """
    sets = min(frames, most)
    return [number * frames // sets for number in range(sets)]


def coarsest_time_scale(frames: int, time_scales: Sequence[int]) -> list[int]:
    """For every frame the index of the coarsest time scale at which it begins a set; -1 if at none."""
    starts = [set_starts(frames, most) for most in time_scales]
    return [sum(frame in begin for begin in starts) - 1 for frame in range(frames)]
