"""Nested sets of frames against a slow, obvious way: each frame encoded alone, sets averaged by hand."""

import random
from functools import partial

import pytest
import torch

from lit_mm.data.collate import group_by_size
from lit_mm.model.batch import IGNORE_INDEX
from lit_mm.model.encoder import TimmEncoder
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.scales import VideoScale
from tests.helpers.batches import SCALES, picture
from tests.helpers.models import gradients, packing_vlm64
from tests.helpers.videos import ALL_SCALES, TIMES, encoded, random_videos, slow_video, video_batch_of


def slow_loss(vlm, samples, frames, tokens):
    rng, losses = random.Random(0), []
    for pieces in samples:
        labels = encoded(pieces, vlm.time_scales, rng)[1].tolist()
        sequence, labels = slow_video(vlm, pieces, labels, frames, tokens)
        logarithms = vlm.llm(inputs_embeds=sequence[None]).logits[0].log_softmax(-1)
        losses += [-logarithms[place - 1, label] for place, label in enumerate(labels) if label != IGNORE_INDEX]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packing", ["packed", "sequential", "padded"])
@pytest.mark.parametrize("times", [TIMES, [2], [4]])
def test_losses_and_gradients_equal_the_slow_way(times, packing):
    vlm, samples = packing_vlm64(time_scales=times), random_videos(len(times), count=5)
    losses = vlm(video_batch_of(samples, times, packing))
    scales = [VideoScale(frames, tokens) for frames in times for tokens in SCALES]
    assert vlm.all_scales == scales
    expected = torch.stack([slow_loss(vlm, samples, *scale) for scale in scales])
    assert torch.allclose(losses.per_scale, expected, rtol=1e-10)
    assert torch.allclose(losses.loss, expected.mean(), rtol=1e-10)
    for fast, slow in zip(gradients(losses.loss, vlm), gradients(expected.mean(), vlm), strict=True):
        assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("packing", ["packed", "sequential", "padded"])
@pytest.mark.parametrize("drawn", [[3], [0, 4], [2, 5, 8]])
def test_drawn_scales_count_by_their_weights(drawn, packing):
    vlm, samples = packing_vlm64(time_scales=TIMES), random_videos(3)
    weights = torch.softmax(torch.arange(len(drawn), dtype=torch.float64), 0)
    of_scales = dict(zip(drawn, weights.tolist(), strict=True))
    spread = [of_scales.get(number, 0.0) for number in range(len(ALL_SCALES))]
    found = vlm(video_batch_of(samples, packing=packing, weights=spread)).loss
    expected = torch.stack([slow_loss(vlm, samples, *ALL_SCALES[number]) for number in drawn])
    assert torch.allclose(found, (weights * expected).sum(), rtol=1e-10)


def test_a_sample_without_video_is_laid_out_once_a_scale():
    still, text = [[5, 6], torch.stack([picture(64, 64)]), [7, 8]], [[9, 10, 11]]
    [row] = video_batch_of([still, text]).packed
    assert len(row.input_ids) == 2 + sum(SCALES) + 3 * 2 + 3


def test_coarser_times_are_means_of_finer_ones():
    vlm = packing_vlm64(time_scales=TIMES)
    images = group_by_size([torch.stack([picture(64, 64) for _ in range(8)])], TIMES)
    nested = vlm.encode(images).split(TIMES)  # [4, T, D], [2, T, D], [1, T, D]
    for number, tokens in enumerate(SCALES):
        four, two, one = (sets.split(SCALES, dim=1)[number] for sets in nested)
        assert torch.allclose(two, four.view(2, 2, tokens, -1).mean(1), rtol=1e-12)
        assert torch.allclose(one, two.mean(0, keepdim=True), rtol=1e-12)


def test_the_blank_image_adds_exactly_nothing():
    """Text alone, on a rank that must run its encoder: the same loss, gradients of zero and not None."""
    vlm, samples = packing_vlm64(time_scales=[1]), [[[5, 6, 7]], [[8, 9, 10, 11]]]
    plain = vlm(video_batch_of(samples, [1])).loss
    assert torch.autograd.grad(plain, list(vlm.encoder.parameters()), allow_unused=True)[0] is None
    total = vlm(video_batch_of(samples, [1]), encodings=2).loss
    assert torch.equal(total, plain)
    total.backward()
    for parameter in [*vlm.encoder.parameters(), *vlm.projector.parameters()]:
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


def test_blank_images_are_one_grid_cell_and_as_many_as_are_missing():
    vlm, grids = packing_vlm64(time_scales=[1]), []
    vlm.encoder.register_forward_hook(lambda module, inputs, grid: grids.append(grid.shape[2:]))
    batch = video_batch_of([[[5, 6], torch.stack([picture(64, 64)]), [7, 8]]], [1])
    for encodings in (1, 3):
        grids.clear()
        vlm(batch, encodings=encodings)
        assert grids == [(4, 4)] + [(1, 1)] * (encodings - 1)


def fixed_size(**options):
    """An encoder of its own, for 32 pixels."""
    vlm = packing_vlm64(time_scales=[1])
    vlm.encoder = TimmEncoder("vit_tiny_patch16_224", -1, overrides={"depth": 1, "img_size": 32, **options}).double()
    vlm.projector = MatryoshkaProjector(192, 32, [4, 1]).double()
    assert vlm.encoder.smallest == ((16, 16) if options else (32, 32))
    return vlm


def infinite():
    vlm = packing_vlm64(time_scales=[1])
    vlm.encoder.trunk.stem[0].bias.data.fill_(float("inf"))
    return vlm


@pytest.mark.parametrize("made", [fixed_size, partial(fixed_size, dynamic_img_size=True), infinite])
def test_the_blank_image_is_one_that_the_encoder_takes_and_passes_no_infinity_on(made):
    vlm = made()
    batch = video_batch_of([[[5, 6, 7]], [[8, 9, 10, 11]]], [1])
    assert torch.equal(vlm(batch, encodings=1).loss, vlm(batch).loss)


def test_images_without_time_scales_have_no_sets():
    assert group_by_size([picture(64, 64)[None]]).frame_sets == []
