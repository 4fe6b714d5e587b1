"""Nested tokens against torch's average pooling and the definition of nesting."""

import pytest
import torch
import torch.nn.functional as F

from lit_mm.model.projector import MatryoshkaProjector, legal_scales, nest, nested_windows

M3 = [576, 144, 36, 9, 1]


def test_scales_equal_average_pooling_of_the_finest():
    """M3's pooling by torch, of the projected grid; one direct pooling per scale is the same."""
    torch.manual_seed(0)
    projector = MatryoshkaProjector(5, 7, M3).double()
    grid = torch.randn(2, 5, 24, 24, dtype=torch.float64)
    projected = projector.layers(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    for tokens, kernel in zip(projector(grid), (1, 2, 4, 8, 24), strict=True):
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
    assert legal_scales(12, 16) == {192: (1, 1), 48: (2, 2), 12: (4, 4), 1: (12, 16)}
    assert legal_scales(1, 1) == {1: (1, 1)}
    for height in range(1, 13):
        for width in range(1, 13):
            for scale, (rows, columns) in legal_scales(height, width).items():
                assert height % rows == width % columns == 0
                assert scale == (height // rows) * (width // columns)


@pytest.mark.parametrize("scale", [2, 100, 577])  # the authors' code rounds 2 to 1 and 100 to 144
def test_a_scale_that_does_not_divide_is_refused_with_the_legal_ones(scale):
    with pytest.raises(ValueError, match=rf"\[{scale}\] do not divide a 24×24 grid, which allows \[576, 144, 64"):
        nested_windows(24, 24, [scale])


def test_scales_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match="scale 64 is not nested in scale 144"):
        nested_windows(24, 24, [576, 144, 64])


@pytest.mark.parametrize("scales", [[], [1, 4], [4, 4], [4, 0]])
def test_scales_are_finest_first_and_distinct(scales):
    with pytest.raises(ValueError, match="finest first"):
        MatryoshkaProjector(1, 1, scales)
