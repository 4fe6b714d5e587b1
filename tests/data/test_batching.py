"""Batches: nothing lost, nothing twice, the same number on every rank, little padding."""

import random

import pytest
import torch

from lit_mm.data.batching import Batches, BatchPlan, LengthGroupedBatches, Sample, ScaleDraw, collate, group_by_size
from lit_mm.data.records import RecordError
from lit_mm.model.rows import IMAGE, Question

LENGTHS = random.Random(0).choices([8, 15, 40, 100, 300], k=1003)


def batches(epoch=0, rank=0, ranks=1, shuffle=True, seed=0):
    sampler = LengthGroupedBatches(LENGTHS, 16, shuffle, seed, rank, ranks)
    sampler.set_epoch(epoch)
    plans = list(sampler)
    assert len(plans) == len(sampler)
    assert [(plan.epoch, plan.step) for plan in plans] == [(epoch, step) for step in range(len(plans))]
    return [plan.records for plan in plans]


def test_every_record_once_an_epoch():
    assert sorted(index for batch in batches() for index in batch) == list(range(1003))
    assert [index for batch in batches(shuffle=False) for index in batch] == list(range(1003))


def test_order_follows_seed_and_epoch():
    assert batches() == batches()
    assert batches() != batches(epoch=1)
    assert batches() != batches(seed=1)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_records_and_get_as_many_batches(ranks):
    shares = [batches(rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    indices = [index for share in shares for batch in share for index in batch]
    assert len(indices) == len(set(indices))
    assert len(indices) > 1003 - 16 * ranks
    whole = [batches(rank=rank, ranks=ranks, shuffle=False) for rank in range(ranks)]
    assert sorted(index for share in whole for batch in share for index in batch) == list(range(1003))


def padding(batched) -> float:
    padded = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batched)
    return 1 - sum(LENGTHS) / padded


def test_grouping_saves_most_of_the_padding():
    order = list(range(1003))
    random.Random(1).shuffle(order)
    assert padding([order[i : i + 16] for i in range(0, 1003, 16)]) > 0.6
    assert padding(batches()) < 0.15


def picture(height, width, value):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def test_collate_places_images_and_questions():
    ids = torch.tensor([IMAGE, 1])
    ask = Question("b", "?", ids, [0])
    first = Sample([picture(4, 4, 1), picture(2, 8, 2)], torch.tensor([IMAGE, IMAGE, 1]), torch.tensor([-100, -100, 1]))
    asked = Sample([picture(4, 4, 3)], questions=[ask, ask])
    third = Sample([picture(2, 8, 4)], ids, torch.tensor([-100, 1]), [ask])
    batch = collate([first, asked, third])
    stacked = torch.cat([group.flatten(1).float().mean(1) for group in batch.images.groups])
    assert stacked[batch.images.order].tolist() == [1, 2, 3, 4]
    assert [tuple(group.shape) for group in batch.images.groups] == [(2, 3, 4, 4), (2, 3, 2, 8)]
    assert batch.image_index.tolist() == [0, 1, 3]
    assert [question.image_index for question in batch.questions] == [[2], [2], [3]]
    assert batch.supervised == 2
    assert ask.image_index == [0]


def test_an_image_shown_twice_is_encoded_once():
    ids = torch.tensor([IMAGE, 1])
    twice, once = Sample([picture(4, 4, 1), picture(4, 4, 1)], torch.cat([ids, ids]), torch.ones(4)), picture(4, 4, 2)
    batch = collate([twice, Sample([once, picture(4, 4, 1)], torch.cat([ids, ids]), torch.ones(4))])
    assert batch.image_index.tolist() == [0, 0, 1, 0]
    assert len(batch.images.groups[0]) == 2


def test_unreadable_records_are_named_not_lost():
    skipped = Sample([], torch.tensor([1]), torch.tensor([1]), skipped=[RecordError("w", "truncated image", "d")])
    assert collate([skipped, Sample([])]).skipped == [("truncated image", "w: truncated image: d")]
    assert collate([skipped, Sample([])]).records == 2


def test_a_batch_is_packed_at_its_drawn_scales():
    sample = Sample([picture(4, 4, 1)], torch.tensor([5, IMAGE, 1]), torch.tensor([-100, -100, 1]))
    draw = ScaleDraw([16, 4, 1], 2, keep_finest=True)
    plan = BatchPlan([0, 0], epoch=3, step=5)
    batch = Batches([sample], draw, "branch")[plan]
    assert batch.drawn == draw(plan)
    [row] = batch.rows
    tokens = sum([16, 4, 1][scale.number] for scale in batch.drawn)
    assert len(row.token_ids) == 2 * (1 + tokens + 2)
    assert Batches([Sample([])], draw, "branch")[plan].rows == []


@pytest.mark.parametrize(
    ("per_step", "keep"), [(1, False), (2, False), (3, False), (2, True), (3, True), ("all", False)]
)
def test_draws_follow_the_seed_and_weigh_every_scale_alike(per_step, keep):
    scales = [64, 16, 4, 1]
    draw, total = ScaleDraw(scales, per_step, keep, seed=1), [0.0] * 4
    for step in range(6000):
        drawn = draw(BatchPlan([], 0, step))
        assert len(drawn) == (4 if per_step == "all" else per_step)
        assert [scale.number for scale in drawn] == sorted({scale.number for scale in drawn})
        assert drawn[0].number == 0 or not keep
        for scale in drawn:
            total[scale.number] += scale.weight / 6000
    assert total == pytest.approx([0.25] * 4, rel=0.06)
    plan = BatchPlan([], 2, 7)
    assert draw(plan) == draw(plan)
    if per_step != "all":
        others = [ScaleDraw(scales, per_step, keep, seed)(BatchPlan([], 2, 7)) for seed in range(30)]
        assert any(other != draw(plan) for other in others)


@pytest.mark.parametrize(
    ("per_step", "keep", "said"), [(0, False, "1 to 2"), (3, False, "1 to 2"), (1, True, "finest")]
)
def test_draws_that_cannot_be_meant_are_refused(per_step, keep, said):
    with pytest.raises(ValueError, match=said):
        ScaleDraw([4, 1], per_step, keep)


def test_no_images():
    images = group_by_size([])
    assert images.groups == []
    assert len(images.order) == 0
