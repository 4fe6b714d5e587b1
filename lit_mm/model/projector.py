"""Grid -> nested tokens: the Matryoshka projector of M3.

The encoder's grid is projected to the LLM's width once, then pooled to every scale. Pooling comes
after the projection (M3, section 3), and each coarser set is the mean of the finer one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import log
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Sampling = Literal["mean", "spatial", "sequential"]
Pooling = Literal["exact", "adaptive"]
Shape = tuple[int, int]


class ClipScale(NamedTuple):
    """A scale of video: tokens for each of at most so many sets of neighbouring frames."""

    frames: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.tokens}"


Scale = int | ClipScale
"""Tokens per image (and per frame), or with time scales that and the sets of frames as well."""


class MatryoshkaProjector(nn.Module):
    """Linear -> GELU -> Linear on every cell, then the nested scales (M3, section 3 and table 7)."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        scales: Sequence[int],
        sampling: Sampling = "mean",
        pooling: Pooling = "exact",
    ) -> None:
        """Build the two linear layers.

        Args:
            in_width: Channels of the encoder's grid.
            out_width: Width of the LLM's embeddings.
            scales: Visual tokens per image, finest first.
            sampling: `mean` pools boxes of cells; `spatial` takes the first cell of every box;
                `sequential` takes the first cells in reading order. M3 compares the three.
            pooling: `exact` refuses scales whose square windows do not tile the grid; `adaptive` cuts
                any grid that is large enough into boxes as equal as the finer set's borders allow.

        Raises:
            ValueError: The scales are not distinct positive numbers, finest first.
        """
        super().__init__()
        self.scales = checked_scales(scales)
        self.sampling, self.pooling = sampling, pooling
        self.layers = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, grid: Tensor, scales: Sequence[int] | None = None) -> list[Tensor]:
        """Grid [B, in_width, h, w] -> one [B, scale, out_width] per scale, finest first.

        Args:
            grid: The encoder's.
            scales: Others than the model's own.

        Raises:
            ValueError: A scale does not divide the grid; the message names the scales that do.
        """
        cells = self.layers(grid.permute(0, 2, 3, 1))
        return nest(cells, self.scales if scales is None else scales, self.sampling, self.pooling)


def checked_scales(scales: Sequence[int], name: str = "scales") -> list[int]:
    """The scales as they are.

    Raises:
        ValueError: They are not distinct positive numbers, finest first.
    """
    if not scales or min(scales) < 1 or list(scales) != sorted(set(scales), reverse=True):
        raise ValueError(f"{name} must be distinct, positive and finest first, found {list(scales)}")
    return list(scales)


def checked_time_scales(time_scales: Sequence[int]) -> list[int]:
    """The time scales as they are.

    Raises:
        ValueError: They are not distinct positive numbers, finest first, or one does not divide the
            one before it: its sets of frames would not be unions of the finer ones.
    """
    for fine, coarse in pairwise(checked_scales(time_scales, "time_scales")):
        if fine % coarse:
            raise ValueError(f"time_scales: {coarse} is not nested in {fine}, which it does not divide")
    return list(time_scales)


def all_levels(scales: Sequence[int], time_scales: Sequence[int] = ()) -> list[Scale]:
    """Every scale that a model answers at, finest first: its scales, at each of its time scales."""
    if not time_scales:
        return list(scales)
    return [ClipScale(frames, tokens) for frames in time_scales for tokens in scales]


def nest(cells: Tensor, scales: Sequence[int], sampling: Sampling = "mean", pooling: Pooling = "exact") -> list[Tensor]:
    """Projected cells [B, h, w, D] -> nested tokens, one [B, scale, D] per scale, finest first."""
    height, width = cells.shape[1:3]
    shapes = nested_shapes(height, width, tuple(scales), sampling, pooling)
    if sampling == "sequential":
        return [cells.flatten(1, 2)[:, :scale] for scale in scales]
    if sampling == "spatial":
        return [cells[:, :: height // rows, :: width // columns].flatten(1, 2) for rows, columns in shapes]
    if pooling == "adaptive":
        return [box_means(cells, *cuts).flatten(1, 2) for cuts in nested_cuts(height, width, shapes)]
    sets = []
    for shape in shapes:
        cells = mean_pool(cells, *shape)
        sets.append(cells.flatten(1, 2))
    return sets


def mean_pool(cells: Tensor, rows: int, columns: int) -> Tensor:
    """Mean over equal windows: [B, h, w, D] -> [B, rows, columns, D], which must divide h and w."""
    batch, height, width, depth = cells.shape
    if (rows, columns) == (height, width):
        return cells
    return cells.view(batch, rows, height // rows, columns, width // columns, depth).mean((2, 4))


def box_means(cells: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Mean over the boxes between cuts: [B, h, w, D] -> [B, len(rows) - 1, len(columns) - 1, D]."""
    down, across = (_band_means(cuts, cells) for cuts in (rows, columns))
    return torch.einsum("rh, bhwd, cw -> brcd", down, cells, across)


def _band_means(cuts: Sequence[int], like: Tensor) -> Tensor:
    """Matrix [bands, cells] that takes means between cuts."""
    matrix = torch.zeros(len(cuts) - 1, cuts[-1], dtype=torch.float64)
    for band, (start, end) in enumerate(pairwise(cuts)):
        matrix[band, start:end] = 1 / (end - start)
    return matrix.to(like)


def nested_cuts(height: int, width: int, shapes: Sequence[Shape]) -> Iterator[tuple[list[int], list[int]]]:
    """Where each set's boxes are cut, along the rows and along the columns, ends included.

    A coarser set's cuts are some of the finer one's: its boxes are unions of the finer boxes.
    """
    rows, columns = tuple(range(height + 1)), tuple(range(width + 1))
    for shape in shapes:
        rows, columns = _fewer(rows, shape[0]), _fewer(columns, shape[1])
        yield list(rows), list(columns)


@lru_cache(maxsize=4096)
def _fewer(cuts: tuple[int, ...], bands: int) -> tuple[int, ...]:
    """Of the cuts those between which bands are most equal, by the sum of their squared sizes; of several such
    choices the one that lies nearest to bands of one size."""
    ways: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, (0,))]  # the best up to each cut, with so many bands
    for band in range(1, bands + 1):
        ways = [
            min(
                (unequal + (cut - path[-1]) ** 2, off + (cut * bands - cuts[-1] * band) ** 2, (*path, cut))
                for unequal, off, path in ways
                if path[-1] < cut
            )
            for cut in cuts[band : len(cuts) - bands + band]
        ]
    return ways[-1][2]


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
        return _sequential_shapes(height, width, scales)
    if pooling == "adaptive":
        return _adaptive_shapes(height, width, scales, sampling)
    legal = legal_scales(height, width)
    refused = [scale for scale in scales if scale not in legal]
    if refused:
        raise ValueError(f"scales {refused} do not divide a {height}×{width} grid, which allows {list(legal)}")
    shapes = [legal[scale] for scale in scales]
    for (fine, coarse), (first, second) in zip(pairwise(scales), pairwise(shapes), strict=True):
        if first[0] % second[0] or first[1] % second[1]:
            raise ValueError(
                f"scale {coarse} is not nested in scale {fine}: on a {height}×{width} grid they are "
                f"{second[0]}×{second[1]} and {first[0]}×{first[1]} tokens"
            )
    return shapes


def _sequential_shapes(height: int, width: int, scales: Sequence[int]) -> list[Shape]:
    refused = [scale for scale in scales if scale > height * width]
    if refused:
        raise ValueError(f"scales {refused} exceed the {height * width} tokens of a {height}×{width} grid")
    return [(1, scale) for scale in scales]


def _adaptive_shapes(height: int, width: int, scales: Sequence[int], sampling: Sampling) -> list[Shape]:
    if sampling != "mean":
        raise ValueError(f"pooling adaptive goes with sampling mean, found {sampling}")
    found = _chain((height, width), scales, log(height / width))
    if found is None:
        raise ValueError(f"no nested sets of {list(scales)} tokens fit a {height}×{width} grid")
    return found


def _chain(within: Shape, scales: Sequence[int], aspect: float) -> list[Shape] | None:
    """Shapes whose aspect is nearest to the grid's, each within the one before; None if there are none."""
    if not scales:
        return []
    shapes = [(rows, scales[0] // rows) for rows in range(1, within[0] + 1) if scales[0] % rows == 0]
    fitting = [shape for shape in shapes if shape[1] <= within[1]]
    for shape in sorted(fitting, key=lambda shape: abs(log(shape[0] / shape[1]) - aspect)):
        if (rest := _chain(shape, scales[1:], aspect)) is not None:
            return [shape, *rest]
    return None
