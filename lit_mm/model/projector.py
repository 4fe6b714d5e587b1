"""Grid -> nested tokens: the Matryoshka projector of M3.

    grid [B, C, h, w] -> cells [B, h, w, D] -> tokens [B, 576, D] ⊃ [B, 144, D] ⊃ … ⊃ [B, 1, D]

Every cell is projected to the LLM's width once; pooling comes after the projection (M3, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lit_mm.model.scales import Pooling, Sampling, check_scales, nested_cuts, nested_shapes


class MatryoshkaProjector(nn.Module):
    """Linear -> GELU -> Linear on every cell, then the nested scales (M3, section 3 and table 7).

    A subclass can replace `layers` with another Sequential of in_features to out_features whose last is a Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scales: Sequence[int],
        sampling: Sampling = "mean",
        pooling: Pooling = "exact",
    ) -> None:
        """Build the two linear layers.

        Args:
            in_features: Channels of the encoder's grid.
            out_features: Width of the LLM's embeddings.
            scales: Visual tokens per image, finest first.
            sampling: `mean` pools boxes of cells; `spatial` takes the first cell of every box;
                `sequential` takes the first cells in reading order. M3 compares the three.
            pooling: `exact` refuses scales whose square windows do not tile the grid; `adaptive` cuts
                any grid that is large enough into boxes as equal as the finer scale's borders allow.

        Raises:
            ValueError: The scales are not distinct positive numbers, finest first.
        """
        super().__init__()
        self.scales = check_scales(scales)
        self.sampling, self.pooling = sampling, pooling
        self.layers = nn.Sequential(
            nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features)
        )

    def forward(self, grid: Tensor, scales: Sequence[int] | None = None) -> Tensor:
        """Grid [B, in_features, h, w] -> nested tokens [B, sum of scales, out_features], finest first.

        `.split(projector.scales, dim=1)` separates the scales.

        Args:
            grid: Output of the encoder.
            scales: Scales to use instead of the projector's own.

        Raises:
            ValueError: A scale does not divide the grid; the message names the scales that do.
        """
        cells = self.layers(grid.permute(0, 2, 3, 1))  # [B, h, w, D]
        return torch.cat(nest(cells, scales or self.scales, self.sampling, self.pooling), dim=1)


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
        cells = mean_pool(cells, *shape)  # of the finer set: the same mean as of the whole grid, with less work
        sets.append(cells.flatten(1, 2))
    return sets


def mean_pool(cells: Tensor, rows: int, columns: int) -> Tensor:
    """Mean over equal windows: [B, h, w, D] -> [B, rows, columns, D], where rows and columns divide h and w."""
    batch, height, width, depth = cells.shape
    if (rows, columns) == (height, width):
        return cells
    return cells.view(batch, rows, height // rows, columns, width // columns, depth).mean((2, 4))


def box_means(cells: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Mean over the boxes between cuts: [B, h, w, D] -> [B, len(rows) - 1, len(columns) - 1, D]."""
    down, across = (_band_means(cuts, cells) for cuts in (rows, columns))
    return torch.einsum("rh, bhwd, cw -> brcd", down, cells, across)


def _band_means(cuts: Sequence[int], like: Tensor) -> Tensor:
    """Matrix [bands, cells] that takes the mean of the cells between two cuts."""
    matrix = torch.zeros(len(cuts) - 1, cuts[-1], dtype=torch.float64)
    for band, (start, end) in enumerate(pairwise(cuts)):
        matrix[band, start:end] = 1 / (end - start)
    return matrix.to(like)
