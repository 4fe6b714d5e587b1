"""Nested tokens against torch's average pooling and the definition of nesting."""

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_mm.model.projector import MatryoshkaProjector, nest
from lit_mm.model.scales import VideoScale, all_scales, check_time_scales, legal_scales, nested_cuts, nested_shapes

M3 = [576, 144, 36, 9, 1]


def test_scales_equal_average_pooling_of_the_finest():
    """M3's pooling by torch, of the projected grid; one direct pooling per scale is the same."""
    torch.manual_seed(0)
    projector = MatryoshkaProjector(5, 7, M3).double()
    grid = torch.randn(2, 5, 24, 24, dtype=torch.float64)
    projected = projector.layers(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    for tokens, kernel in zip(projector(grid).split(M3, dim=1), (1, 2, 4, 8, 24), strict=True):
        pooled = F.avg_pool2d(projected, kernel).flatten(2).transpose(1, 2)
        assert torch.allclose(tokens, pooled, rtol=0, atol=1e-15)


def test_coarser_is_exactly_the_mean_of_finer():
    cells = torch.randn(3, 24, 24, 4, dtype=torch.float64)
    sets = dict(zip(M3, nest(cells, M3), strict=True))
    for fine, coarse, side, window in ((576, 144, 12, 2), (144, 36, 6, 2), (36, 9, 3, 2)):
        means = sets[fine].view(3, side, window, side, window, 4).mean((2, 4)).flatten(1, 2)
        assert torch.equal(sets[coarse], means)
    assert torch.equal(sets[1], sets[9].view(3, 1, 3, 1, 3, 4).mean((2, 4)).flatten(1, 2))


def test_non_square_grid():
    cells = torch.arange(12 * 16.0).view(1, 12, 16, 1)
    tokens = nest(cells, [192, 48, 12, 1])
    assert [t.shape[1] for t in tokens] == [192, 48, 12, 1]
    assert tokens[1][0, 0, 0] == (0 + 1 + 16 + 17) / 4
    assert tokens[2][0, -1, 0] == cells[0, 8:, 12:].mean()
    assert tokens[3][0, 0, 0] == cells.mean()


def test_spatial_takes_the_first_cell_of_every_window():
    cells = torch.arange(16.0).view(1, 4, 4, 1)
    assert [t.flatten().tolist() for t in nest(cells, [4, 1], "spatial")] == [[0, 2, 8, 10], [0]]


def test_sequential_takes_the_first_cells():
    cells = torch.arange(16.0).view(1, 4, 4, 1)
    assert [t.flatten().tolist() for t in nest(cells, [5, 2], "sequential")] == [[0, 1, 2, 3, 4], [0, 1]]
    with pytest.raises(ValueError, match=r"\[17\] exceed the 16 tokens of a 4×4 grid"):
        nest(cells, [17, 2], "sequential")


def test_legal_scales_are_those_whose_windows_tile_the_grid():
    assert list(legal_scales(24, 24)) == [576, 144, 64, 36, 16, 9, 4, 1]
    assert legal_scales(12, 16) == {192: (12, 16), 48: (6, 8), 12: (3, 4), 1: (1, 1)}
    assert legal_scales(1, 1) == {1: (1, 1)}
    for height in range(1, 13):
        for width in range(1, 13):
            for scale, (rows, columns) in legal_scales(height, width).items():
                assert height % rows == width % columns == 0
                assert scale == rows * columns


@pytest.mark.parametrize("scale", [2, 100, 577])  # the authors' code rounds 2 to 1 and 100 to 144
def test_a_scale_that_does_not_divide_is_refused_with_the_legal_ones(scale):
    with pytest.raises(ValueError, match=rf"\[{scale}\] do not divide a 24×24 grid, which allows \[576, 144, 64"):
        nested_shapes(24, 24, (scale,))


def test_scales_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match="scale 64 is not nested in scale 144"):
        nested_shapes(24, 24, (576, 144, 64))


@pytest.mark.parametrize("scales", [[], [1, 4], [4, 4], [4, 0]])
def test_scales_are_finest_first_and_distinct(scales):
    with pytest.raises(ValueError, match="finest first"):
        MatryoshkaProjector(1, 1, scales)


GRIDS = [(24, 24), (24, 37), (37, 24), (25, 31), (64, 9), (30, 30)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_adaptive_pooling_is_a_nested_partition_of_any_grid(grid):
    """Every cell is in exactly one box of each set, and a box of a coarser set is a union of finer ones."""
    shapes = nested_shapes(*grid, tuple(M3), pooling="adaptive")
    finer = None
    for scale, (rows, columns) in zip(M3, nested_cuts(*grid, shapes), strict=True):
        owner = torch.full(grid, -1)
        boxes = [(top, left) for top in range(len(rows) - 1) for left in range(len(columns) - 1)]
        assert len(boxes) == scale
        for number, (top, left) in enumerate(boxes):
            box = owner[rows[top] : rows[top + 1], columns[left] : columns[left + 1]]
            assert box.numel() > 0
            assert (box == -1).all()
            box[:] = number
        assert (owner >= 0).all()
        if finer is not None:
            pairs = torch.stack([finer.flatten(), owner.flatten()]).unique(dim=1)
            assert pairs.shape[1] == finer.max() + 1  # each finer box lies in one coarser box
        finer = owner


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_adaptive_tokens_are_the_means_of_their_boxes(grid):
    cells = torch.randn(2, *grid, 3, dtype=torch.float64)
    shapes = nested_shapes(*grid, tuple(M3), pooling="adaptive")
    for tokens, (rows, columns) in zip(nest(cells, M3, pooling="adaptive"), nested_cuts(*grid, shapes), strict=True):
        slow = [
            cells[:, rows[r] : rows[r + 1], columns[c] : columns[c + 1]].mean((1, 2))
            for r in range(len(rows) - 1)
            for c in range(len(columns) - 1)
        ]
        assert torch.allclose(tokens, torch.stack(slow, dim=1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grid", [(12, 21), (9, 14), (7, 7), (16, 11)], ids=str)
def test_adaptive_boxes_are_as_equal_as_the_finer_borders_allow(grid):
    """Against all choices of borders; the finest set has all of the cells' to choose from."""
    finer = tuple(range(grid[0] + 1)), tuple(range(grid[1] + 1))
    for own in nested_cuts(*grid, nested_shapes(*grid, (36, 9, 4, 1), pooling="adaptive")):
        for cuts, allowed in zip(own, finer, strict=True):
            inner = combinations(allowed[1:-1], len(cuts) - 2)
            spreads = [sum(np.diff([0, *chosen, cuts[-1]]) ** 2) for chosen in inner]
            assert sum(np.diff(cuts) ** 2) == min(spreads)
        if len(finer[0]) == grid[0] + 1:
            assert all(max(np.diff(cuts)) - min(np.diff(cuts)) <= 1 for cuts in own)
        finer = own


def test_adaptive_is_exact_where_windows_tile():
    cells = torch.randn(1, 24, 24, 2, dtype=torch.float64)
    for adaptive, exact in zip(nest(cells, M3, pooling="adaptive"), nest(cells, M3), strict=True):
        assert torch.allclose(adaptive, exact, rtol=1e-12, atol=1e-14)


def test_adaptive_boxes_follow_the_grids_aspect():
    assert nested_shapes(18, 32, (576, 144, 36), pooling="adaptive") == [(18, 32), (9, 16), (4, 9)]


@pytest.mark.parametrize(("grid", "scales"), [((4, 4), (17,)), ((5, 5), (7,)), ((23, 24), (576,))])
def test_adaptive_refuses_what_does_not_fit(grid, scales):
    with pytest.raises(ValueError, match="no nested sets of"):
        nested_shapes(*grid, scales, pooling="adaptive")


def test_adaptive_goes_with_means_alone():
    with pytest.raises(ValueError, match="pooling adaptive goes with sampling mean, found spatial"):
        nested_shapes(4, 4, (16,), "spatial", "adaptive")


def test_levels_are_scales_at_time_scales():
    assert all_scales([4, 1]) == [4, 1]
    assert all_scales([4, 1], [8, 2]) == [VideoScale(8, 4), VideoScale(8, 1), VideoScale(2, 4), VideoScale(2, 1)]
    assert f"{VideoScale(8, 4)}" == "8x4"


@pytest.mark.parametrize(("times", "said"), [([8, 3], "3 is not nested in 8"), ([2, 4], "finest first")])
def test_time_scales_nest(times, said):
    with pytest.raises(ValueError, match=said):
        check_time_scales(times)
