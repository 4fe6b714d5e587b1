"""Grid -> nested tokens: the Matryoshka projector of M3.

The encoder's grid is projected to the LLM's width once, then pooled to every scale. Pooling comes
after the projection (M3, section 3), and each coarser set is the mean of the finer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

Sampling = Literal["mean", "spatial", "sequential"]
Window = tuple[int, int]


class MatryoshkaProjector(nn.Module):
    """Linear -> GELU -> Linear on every cell, then the nested scales (M3, section 3 and table 7)."""

    def __init__(self, in_width: int, out_width: int, scales: Sequence[int], sampling: Sampling = "mean") -> None:
        """Build the two linear layers.

        Args:
            in_width: Channels of the encoder's grid.
            out_width: Width of the LLM's embeddings.
            scales: Visual tokens per image, finest first.
            sampling: `mean` pools windows of cells; `spatial` takes the first cell of every window;
                `sequential` takes the first cells in reading order. M3 compares the three.

        Raises:
            ValueError: The scales are not distinct positive numbers, finest first.
        """
        super().__init__()
        self.scales = checked_scales(scales)
        self.sampling: Sampling = sampling
        self.layers = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, grid: Tensor) -> list[Tensor]:
        """Grid [B, in_width, h, w] -> one [B, scale, out_width] per scale, finest first.

        Raises:
            ValueError: A scale does not divide the grid; the message names the scales that do.
        """
        return nest(self.layers(grid.permute(0, 2, 3, 1)), self.scales, self.sampling)


def checked_scales(scales: Sequence[int]) -> list[int]:
    """The scales as they are.

    Raises:
        ValueError: They are not distinct positive numbers, finest first.
    """
    if not scales or min(scales) < 1 or list(scales) != sorted(set(scales), reverse=True):
        raise ValueError(f"scales must be distinct, positive and finest first, found {list(scales)}")
    return list(scales)


def nest(cells: Tensor, scales: Sequence[int], sampling: Sampling = "mean") -> list[Tensor]:
    """Projected cells [B, h, w, D] -> nested tokens, one [B, scale, D] per scale, finest first."""
    windows = nested_windows(cells.shape[1], cells.shape[2], scales, sampling)
    if sampling == "sequential":
        return [cells.flatten(1, 2)[:, :scale] for scale in scales]
    if sampling == "spatial":
        return [cells[:, ::rows, ::columns].flatten(1, 2) for rows, columns in windows]
    sets, done = [], (1, 1)
    for rows, columns in windows:
        cells = mean_pool(cells, rows // done[0], columns // done[1])
        done = rows, columns
        sets.append(cells.flatten(1, 2))
    return sets


def mean_pool(cells: Tensor, rows: int, columns: int) -> Tensor:
    """Mean over windows of rows × columns cells: [B, h, w, D] -> [B, h / rows, w / columns, D]."""
    if rows == columns == 1:
        return cells
    batch, height, width, depth = cells.shape
    return cells.view(batch, height // rows, rows, width // columns, columns, depth).mean((2, 4))


def legal_scales(height: int, width: int) -> dict[int, Window]:
    """Every scale of a height × width grid with its pooling window in cells, finest first.

    Windows are squares that tile the grid (M3 pools 24×24 by 1, 2, 4, 8, 24), and the whole grid.
    """
    squares = {
        height * width // k**2: (k, k) for k in range(1, min(height, width) + 1) if not (height % k or width % k)
    }
    return squares | {1: (height, width)}


def nested_windows(height: int, width: int, scales: Sequence[int], sampling: Sampling = "mean") -> list[Window]:
    """The pooling window of each scale on a height × width grid.

    Raises:
        ValueError: A scale does not divide the grid, or is not the mean of the next finer one.
    """
    if sampling == "sequential":
        return _sequential_windows(height, width, scales)
    legal = legal_scales(height, width)
    refused = [scale for scale in scales if scale not in legal]
    if refused:
        raise ValueError(f"scales {refused} do not divide a {height}×{width} grid, which allows {list(legal)}")
    windows = [legal[scale] for scale in scales]
    for (fine, coarse), (first, second) in zip(pairwise(scales), pairwise(windows), strict=True):
        if second[0] % first[0] or second[1] % first[1]:
            raise ValueError(
                f"scale {coarse} is not nested in scale {fine}: on a {height}×{width} grid their windows are "
                f"{second[0]}×{second[1]} and {first[0]}×{first[1]} cells"
            )
    return windows


def _sequential_windows(height: int, width: int, scales: Sequence[int]) -> list[Window]:
    refused = [scale for scale in scales if scale > height * width]
    if refused:
        raise ValueError(f"scales {refused} exceed the {height * width} tokens of a {height}×{width} grid")
    return [(1, 1)] * len(scales)
