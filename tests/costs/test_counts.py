"""Counts of a batch against an obvious count: every sample spelled out token by token, at every scale."""

import random

import pytest
import torch

from lit_mm.costs.counts import counts_of
from lit_mm.data.collate import Sample, Visual, collate
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Question
from tests.helpers.batches import SCALES, batch_of, packed, picture, random_samples
from tests.helpers.counting import slow_counts
from tests.helpers.videos import TIMES, encoded, random_videos, video_batch_of


def compare(batch, samples, times, packing):
    counts = counts_of(batch, SCALES)
    expected, shown = slow_counts(samples, [n for n, w in enumerate(batch.scale_weights) if w], times, packing)
    names = ("text", "visual", "labels", "padding", "pairs", "shown_pixels")
    assert {name: getattr(counts, name) for name in names} == {name: expected.get(name, 0) for name in names}
    assert counts.shown == shown


@pytest.mark.parametrize("packing", ["packed", "sequential", "padded"])
@pytest.mark.parametrize("drawn", [[0, 1, 2], [1], [0, 2]])
def test_still_images(packing, drawn):
    for seed in range(4):
        made = random_samples(seed)
        batch = packed(batch_of(*made), packing, [float(number in drawn) for number in range(3)])
        samples = [
            (ids, labels, [0] * len(ids), [[image[0].numel()] for image in images]) for ids, labels, images in made
        ]
        compare(batch, samples, [], packing)


@pytest.mark.parametrize("packing", ["packed", "sequential", "padded"])
@pytest.mark.parametrize("drawn", [range(9), [4], [2, 5, 8]])
def test_videos_with_time_scales(packing, drawn):
    for seed in range(4):
        made = random_videos(seed)
        batch = video_batch_of(made, packing=packing, weights=[float(number in drawn) for number in range(9)])
        visuals = [[[frame[0].numel() for frame in piece] for piece in p if torch.is_tensor(piece)] for p in made]
        columns = (batch.input_ids, batch.labels, batch.time_scale)
        samples = [(*map(torch.Tensor.tolist, own[:3]), own[3]) for own in zip(*columns, visuals, strict=True)]
        compare(batch, samples, TIMES, packing)


def test_a_batch_of_nothing():
    assert counts_of(packed(batch_of(), "padded"), SCALES).text == 0


def test_questions_at_every_level():
    """Two questions about an image and one about two; each is a prompt of its own."""
    batch = packed(batch_of(([IMAGE, 5, 6], [IGNORE_INDEX, 5, 6], [picture(64, 64)]), ([7, 8], [IGNORE_INDEX, 8], [])))
    other = batch_of(([IMAGE, 9], [IGNORE_INDEX, 9], [picture(32, 128)]))
    batch.images.groups += other.images.groups
    batch.images.order = torch.tensor([0, 1])
    asked = [([IMAGE, 5, 6], [0]), ([1, IMAGE], [1]), ([IMAGE, 1, IMAGE, 2], [0, 1])]
    batch.questions = [Question(n, "", torch.tensor(ids), index) for n, (ids, index) in enumerate(asked)]
    counts = counts_of(batch, SCALES)
    assert sorted(counts.asked) == [(2, 32, 128), (2, 64, 64)]
    for scale, prompts in zip(SCALES, counts.prompts, strict=True):
        lengths = [2 + scale, 1 + scale, 2 + 2 * scale]
        assert (prompts.text, prompts.visual) == (5, 4 * scale)
        assert prompts.pairs == sum(n * (n + 1) // 2 for n in lengths)


def test_questions_about_a_video_lose_frames_with_the_time_scale():
    rng, piece = random.Random(0), torch.stack([picture(64, 64) for _ in range(8)])
    batch = video_batch_of([[piece, [5, 6, 7]]])
    ids, _, kept = encoded([piece, [5, 6, 7]], TIMES, rng)
    batch.questions = [Question("q", "", ids, list(range(8)), time_scale=kept)]
    counts = counts_of(batch, SCALES)
    sets = [4, 2, 1]
    assert [own.visual for own in counts.prompts] == [number * scale for number in sets for scale in SCALES]
    assert [own.text for own in counts.prompts] == [3 + number - 1 for number in sets for _ in SCALES]
    assert counts.asked == [(8, 64, 64)]


def test_frames_are_told_from_still_images():
    still, clip = Visual("a", picture(64, 64)[None]), Visual("b", torch.stack([picture(64, 64)] * 3), video=True)
    one = Visual("c", picture(32, 32)[None], video=True)
    images = collate([Sample([still, clip]), Sample([clip, one])]).images
    assert (len(images.order), images.frames) == (5, 4)
