"""Batches: nothing lost, nothing twice, as many on every rank, full, and laid out as planned."""

import multiprocessing
import random
import tempfile
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lit_mm.data.chat import Encoded
from lit_mm.data.collate import Batches, Sample, Visual, collate, frames_in_sets, group_by_size
from lit_mm.data.dataset import positions
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.loader import ResumableLoader
from lit_mm.data.records import RecordError
from lit_mm.data.sampler import BatchPlan, BatchPlans, Budget, RecordSizes, ScaleDraw, epoch_order
from lit_mm.model.batch import IMAGE, Question
from lit_mm.model.scales import coarsest_time_scale, set_starts

LENGTHS = np.array(random.Random(0).choices([8, 15, 40, 100, 300], k=1003))
PIXELS = np.array(random.Random(1).choices([0, 64, 256], k=1003))
BUDGETS = [Budget(16), Budget(None, 400), Budget(16, 1000, 1024), Budget(None, None, 512)]


def plans(budget, rank=0, ranks=1, training=True, seed=0, choice="largest") -> BatchPlans:
    sizes = lambda epoch, step, records: np.stack([np.ones_like(records), LENGTHS[records], PIXELS[records]], axis=1)  # noqa: E731
    order = lambda epoch: epoch_order([1003], [1.0], seed, epoch) if training else np.arange(1003)  # noqa: E731
    choice = choice if training and not budget.fixed else "next"
    return BatchPlans(order, sizes, budget, training, choice, rank, ranks, window=64)


def batches(budget=BUDGETS[0], epoch=0, **options):
    made = plans(budget, **options)
    made.set_epoch(epoch)
    found = list(made)
    assert len(found) == len(made)
    assert [(plan.epoch, plan.step) for plan in found] == [(epoch, step) for step in range(len(found))]
    return [plan.records for plan in found]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("choice", ["largest", "alike"])
def test_every_record_once_an_epoch_and_no_batch_over_its_budget(budget, choice):
    found = batches(budget, choice=choice)
    assert sorted(index for batch in found for index in batch) == list(range(1003))
    for batch in found:
        used = np.array([len(batch), LENGTHS[batch].sum(), PIXELS[batch].sum()])
        assert (used <= budget.room()).all()


def test_evaluation_keeps_the_order():
    assert [index for batch in batches(training=False) for index in batch] == list(range(1003))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_order_follows_seed_and_epoch(budget):
    assert batches(budget) == batches(budget)
    assert batches(budget) != batches(budget, epoch=1)
    assert batches(budget) != batches(budget, seed=1)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_ranks_share_the_records_and_get_as_many_batches(ranks, budget):
    for epoch in range(3):
        shares = [batches(budget, epoch, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        assert all(batch for share in shares for batch in share)
        indices = [index for share in shares for batch in share for index in batch]
        assert len(indices) == len(set(indices))
        assert len(indices) > 1003 - ranks
    whole = [batches(rank=rank, ranks=ranks, training=False) for rank in range(ranks)]
    assert len({len(share) for share in whole}) == 1
    assert sorted(index for share in whole for batch in share for index in batch) == list(range(1003))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_an_epoch_goes_on_at_any_step(budget):
    whole = list(plans(budget))
    for start in (0, 1, len(whole) - 1, len(whole)):
        again = plans(budget)
        again.start = start
        assert list(again) == whole[start:]
        assert len(again) == len(whole)
        again.set_epoch(0)
        assert list(again) == whole[start:]
        again.set_epoch(1)
        assert list(again) == list(plans_of_epoch(budget, 1))


def plans_of_epoch(budget, epoch):
    made = plans(budget)
    made.set_epoch(epoch)
    return made


def test_batches_of_a_token_budget_are_full():
    found = batches(Budget(None, 2000))
    assert len(found) <= -(-LENGTHS.sum() // 2000) + 1


def padding(batched) -> float:
    padded = sum(LENGTHS[batch].max() * len(batch) for batch in batched)
    return 1 - LENGTHS.sum() / padded


def test_batches_of_alike_lengths_need_little_padding():
    assert padding(batches(Budget(16))) > 0.6
    found = list(
        BatchPlans(
            lambda epoch: epoch_order([1003], [1.0], 0, epoch),
            lambda epoch, step, records: np.stack([np.ones_like(records), LENGTHS[records], 0 * records], axis=1),
            Budget(16),
            True,
            "alike",
            window=256,
        )
    )
    assert padding([plan.records for plan in found]) < 0.15


def test_an_epoch_has_every_record_of_a_whole_share_and_all_of_a_fraction_over_epochs():
    counts, shares = [10, 7, 5], [1.0, 2.0, 0.4]
    seen = np.zeros(22, int)
    for epoch in range(5):
        order = epoch_order(counts, shares, 3, epoch)
        assert sorted(order[order < 10]) == list(range(10))
        assert sorted(order[(order >= 10) & (order < 17)]) == sorted([*range(10, 17)] * 2)
        seen += np.bincount(order, minlength=22)
    assert seen.tolist() == [5] * 10 + [10] * 7 + [2] * 5
    assert not np.array_equal(epoch_order(counts, shares, 3, 0), epoch_order(counts, shares, 4, 0))


def test_sets_of_frames_by_hand():
    assert set_starts(6, 4) == [0, 1, 3, 4]
    assert set_starts(2, 4) == [0, 1]
    sets = frames_in_sets([1, 6, 2], 4)
    assert sets.index.tolist() == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert sets.sizes.tolist() == [1, 1, 2, 1, 2, 1, 1]
    assert coarsest_time_scale(6, [4, 2]) == [1, 0, -1, 1, 0, -1]
    assert coarsest_time_scale(3, []) == [-1, -1, -1]


@pytest.mark.parametrize("frames", range(1, 20))
def test_coarser_sets_of_frames_are_unions_of_finer_ones(frames):
    starts = [set(set_starts(frames, most)) for most in (12, 6, 3, 1)]
    assert all(coarse <= fine for fine, coarse in pairwise(starts))
    for most in (12, 6, 3, 1):
        sizes = frames_in_sets([frames], most).sizes
        assert sizes.sum() == frames
        assert sizes.max() - sizes.min() <= 1


def picture(height, width, value, frames=1):
    return torch.full((frames, 3, height, width), value, dtype=torch.uint8)


def shown(*pixels) -> list[Visual]:
    return [Visual((tuple(each.shape), int(each[0, 0, 0, 0])), each) for each in pixels]


def test_collate_places_images_and_questions():
    ids = torch.tensor([IMAGE, 1])
    ask = Question("b", "?", ids, [0])
    first = Sample(
        shown(picture(4, 4, 1), picture(2, 8, 2)), torch.tensor([IMAGE, IMAGE, 1]), torch.tensor([-100, -100, 1])
    )
    asked = Sample(shown(picture(4, 4, 3)), questions=[ask, ask])
    third = Sample(shown(picture(2, 8, 4)), ids, torch.tensor([-100, 1]), questions=[ask])
    batch = collate([first, asked, third])
    stacked = torch.cat([group.flatten(1).float().mean(1) for group in batch.images.groups])
    assert stacked[batch.images.order].tolist() == [1, 2, 3, 4]
    assert [tuple(group.shape) for group in batch.images.groups] == [(2, 3, 4, 4), (2, 3, 2, 8)]
    assert batch.image_index.tolist() == [0, 1, 3]
    assert [question.image_index for question in batch.questions] == [[2], [2], [3]]
    assert batch.num_labels == 2
    assert ask.image_index == [0]


def test_frames_of_a_video_stand_in_order_and_in_sets():
    ids = torch.tensor([IMAGE, IMAGE, IMAGE, 1])
    video = torch.cat([picture(4, 4, value) for value in (1, 2, 3)])
    samples = [Sample(shown(picture(2, 8, 9)), ids[2:], ids[2:]), Sample(shown(video), ids, ids)]
    batch = collate(samples, [2, 1])
    stacked = torch.cat([group.flatten(1).float().mean(1) for group in batch.images.groups])
    assert stacked[batch.images.order].tolist() == [9, 1, 2, 3]
    assert batch.image_index.tolist() == [0, 1, 2, 3]
    assert [sets.index.tolist() for sets in batch.images.frame_sets] == [[0, 1, 2, 2], [0, 1, 1, 1]]


def test_an_image_shown_twice_is_encoded_once():
    ids = torch.tensor([IMAGE, 1])
    again = shown(picture(4, 4, 1))[0]
    twice = Sample([again, again], torch.cat([ids, ids]), torch.ones(4))
    batch = collate([twice, Sample([*shown(picture(4, 4, 2)), again], torch.cat([ids, ids]), torch.ones(4))])
    assert batch.image_index.tolist() == [0, 0, 1, 0]
    assert len(batch.images.groups[0]) == 2


def test_unreadable_records_are_named_not_lost():
    skipped = Sample(skipped=[RecordError("w", "truncated image", "d")])
    assert collate([skipped, Sample()]).skipped == [("truncated image", "w: truncated image: d")]
    assert collate([skipped, Sample()]).records == 2


def inputs_of(**options) -> ModelInputs:
    """Of a model with three scales; its tokenizer is of no use here."""
    return ModelInputs(cast(PreTrainedTokenizerBase, None), 16, [16, 4, 1], (0, 0, 0), **options)


def readable(value=1) -> Sample:
    return Sample(shown(picture(4, 4, 1)), torch.tensor([5, IMAGE, value]), torch.tensor([-100, -100, value]))


def test_where_nothing_of_a_batch_can_be_read_the_next_readable_record_stands_in():
    bad = [Sample(skipped=[RecordError("w", "gone", str(number))]) for number in range(2)]
    samples = [readable(7), *bad, readable(8)]
    make = Batches(samples, inputs_of(), training=True)
    batch = make[BatchPlan([1], 0, 0)]
    assert [ids[-1] for ids in batch.input_ids] == [8]
    assert [message for _, message in batch.skipped] == ["w: gone: 0", "w: gone: 1"]
    assert len(make[BatchPlan([0, 1], 0, 0)].input_ids) == 1
    only_asked = Batches(samples, inputs_of(), training=False)
    assert only_asked[BatchPlan([1], 0, 0)].packed == []
    with pytest.raises(RecordError, match="no readable record: tried all 2"):
        Batches(bad, inputs_of(), training=True)[BatchPlan([1], 0, 0)]


def test_a_batch_is_packed_at_its_drawn_scales():
    draw = ScaleDraw(3, 2, keep_finest=True)
    make = Batches([readable()], inputs_of(scales_per_step=2, keep_finest=True), training=True)
    batch = make[BatchPlan([0, 0], epoch=3, step=5)]
    assert batch.scale_weights == draw(3, 5)
    [row] = batch.packed
    tokens = sum(scale for scale, weight in zip([16, 4, 1], batch.scale_weights, strict=True) if weight)
    assert len(row.input_ids) == 2 * (1 + tokens + 2)


def random_encoded(generator: random.Random, times: list[int]) -> tuple[Encoded, list[Visual]]:
    """Text with images and videos of some frames, times written before them now and then."""
    made, visuals = Encoded(), []
    for _ in range(generator.randint(0, 3)):
        for _ in range(generator.randint(0, 9)):
            made.add(Encoded([7], [len(times) - 1]), [7])
        frames = generator.choice([1, 1, 3, 6, 9])
        visuals += shown(picture(4, 4, len(visuals), frames))
        for kept in coarsest_time_scale(frames, times):
            count = generator.choice([1, 3])
            made.add(Encoded([8] * (count - 1) + [IMAGE], [kept] * count), [-100] * count)
    made.add(Encoded([9, 9], [len(times) - 1] * 2), [9, 9])
    return made, visuals


@pytest.mark.parametrize("times", [[], [4], [4, 2, 1]])
@pytest.mark.parametrize("per_step", [1, 2, "all"])
def test_costs_are_the_lengths_of_packed_rows(times, per_step):
    generator = random.Random(0)
    scales, draw = [16, 4, 1], ScaleDraw(3 * max(1, len(times)), per_step)
    inputs = inputs_of(time_scales=times, scales_per_step=per_step)
    for step in range(60):
        encoded, visuals = random_encoded(generator, times)
        before, words, frames = positions(np.array(encoded.ids), np.array(encoded.time_scale), max(1, len(times)))
        ids, labels, kept = encoded.tensors(bool(times))
        make = Batches([Sample(visuals, ids, labels, kept)], inputs, training=True)
        [row] = make[BatchPlan([0], 0, step)].packed
        costs = RecordSizes(np.array([before]), np.array([words]), np.array([frames]), np.array([0]))
        drawn = np.flatnonzero(draw(0, step))
        assert costs.tokens(np.array([0]), drawn, scales) == len(row.input_ids)


@pytest.mark.parametrize(
    ("per_step", "keep"), [(1, False), (2, False), (3, False), (2, True), (3, True), ("all", False)]
)
def test_draws_follow_the_seed_and_weigh_every_level_alike(per_step, keep):
    draw, total = ScaleDraw(4, per_step, keep, seed=1), [0.0] * 4
    for step in range(6000):
        weights = draw(0, step)
        assert sum(weight > 0 for weight in weights) == (4 if per_step == "all" else per_step)
        assert weights[0] or not keep
        total = [before + weight / 6000 for before, weight in zip(total, weights, strict=True)]
    assert total == pytest.approx([0.25] * 4, rel=0.06)
    assert draw(2, 7) == draw(2, 7)
    if per_step != "all":
        assert any(ScaleDraw(4, per_step, keep, seed)(2, 7) != draw(2, 7) for seed in range(30))


@pytest.mark.parametrize(
    ("per_step", "keep", "said"), [(0, False, "1 to 2"), (3, False, "1 to 2"), (1, True, "finest")]
)
def test_draws_that_cannot_be_meant_are_refused(per_step, keep, said):
    with pytest.raises(ValueError, match=said):
        ScaleDraw(2, per_step, keep)


def test_no_images():
    images = group_by_size([])
    assert images.groups == []
    assert len(images.order) == 0


def test_processes_that_are_killed_leave_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    """Tensors come through sockets, which lie in a folder: this process's own, which it removes when it ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"authkey": b"key", "semprefix": "/mp"})
    for _ in range(2):
        loader = ResumableLoader(torch.arange(4), batch_size=None, num_workers=2)
        assert list(loader) == [0, 1, 2, 3]
        loader.close()
    assert [str(folder) for folder in tmp_path.glob("pymp-*")] == [multiprocessing.util.get_temp_dir()]
