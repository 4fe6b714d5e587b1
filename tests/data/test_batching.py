"""Batches: nothing lost, nothing twice, the same number on every rank, little padding."""

import random

import pytest
import torch

from lit_mm.data.batching import LengthGroupedBatches, Sample, collate, group_by_size
from lit_mm.data.records import RecordError
from lit_mm.model.rows import IMAGE, Question

LENGTHS = random.Random(0).choices([8, 15, 40, 100, 300], k=1003)


def batches(epoch=0, rank=0, ranks=1, shuffle=True, seed=0):
    sampler = LengthGroupedBatches(LENGTHS, 16, shuffle, seed, rank, ranks)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


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


def test_unreadable_records_are_named_not_lost():
    skipped = Sample([], torch.tensor([1]), torch.tensor([1]), skipped=[RecordError("w", "truncated image", "d")])
    assert collate([skipped, Sample([])]).skipped == [("truncated image", "w: truncated image: d")]
    assert collate([skipped, Sample([])]).records == 2


def test_no_images():
    images = group_by_size([])
    assert images.groups == []
    assert len(images.order) == 0
