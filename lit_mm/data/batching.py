"""Samples -> batches: which records stand together, and how they become one Batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lit_mm.data.records import RecordError
from lit_mm.model.rows import Batch, Images, Question


@dataclass
class Sample:
    """One record, encoded.

    Args:
        images: uint8 [3, H, W] each.
        token_ids: [T], IMAGE once for each image; None where there is nothing to train on.
        targets: [T], IGNORED where nothing is supervised.
        questions: What is to be asked about it; their image_index counts this sample's images.
        skipped: Records that could not be read on the way to this one.
    """

    images: list[Tensor]
    token_ids: Tensor | None = None
    targets: Tensor | None = None
    questions: list[Question] = field(default_factory=list)
    skipped: list[RecordError] = field(default_factory=list)


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of records of similar length, in an order that (seed, epoch) decide.

    Records are shuffled, windows of `window` batches sorted by length and cut into batches, and the
    batches shuffled: little padding, and every epoch another mixture. Each rank takes its share;
    in training all ranks get the same number of batches (the last few records of an epoch may wait
    for the next one then).

    Args:
        lengths: Tokens of every record.
        batch_size: Records per batch and rank.
        shuffle: For training; otherwise batches follow the file and none is left out.
        seed: Decides the order, together with the epoch.
        rank: This process.
        ranks: Number of processes.
        window: How many batches are sorted together.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        window: int = 16,
    ) -> None:
        self.lengths, self.batch_size, self.shuffle, self.seed = lengths, batch_size, shuffle, seed
        self.rank, self.ranks, self.window = rank, ranks, window
        self.epoch = 0
        self.sampler = self  # Lightning looks for set_epoch on a batch sampler's `sampler`

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self._total(), self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        if not self.shuffle:
            return iter(self._cut(order)[self.rank :: self.ranks])
        generator = random.Random(f"{self.seed} {self.epoch}")
        generator.shuffle(order)
        step = self.batch_size * self.window
        windows = [order[first : first + step] for first in range(0, len(order), step)]
        batches = [batch for window in windows for batch in self._cut(sorted(window, key=self.lengths.__getitem__))]
        generator.shuffle(batches)
        return iter(batches[self.rank : self._total() : self.ranks])

    def _cut(self, order: list[int]) -> list[list[int]]:
        return [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]

    def _total(self) -> int:
        batches = -(-len(self.lengths) // self.batch_size)
        return batches - batches % self.ranks if self.shuffle else batches


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples -> Batch; records that could not be read are named in `Batch.skipped`."""
    images: list[Tensor] = []
    index: list[int] = []
    questions: list[Question] = []
    for sample in samples:
        first = len(images)
        images += sample.images
        index += range(first, len(images)) if sample.token_ids is not None else []
        questions += [replace(q, image_index=[first + i for i in q.image_index]) for q in sample.questions]
    return Batch(
        images=group_by_size(images),
        token_ids=[sample.token_ids for sample in samples if sample.token_ids is not None],
        targets=[sample.targets for sample in samples if sample.targets is not None],
        image_index=torch.tensor(index, dtype=torch.long),
        questions=questions,
        records=len(samples),
        skipped=[(error.reason, str(error)) for sample in samples for error in sample.skipped],
    )


def group_by_size(images: Sequence[Tensor]) -> Images:
    """Images uint8 [3, H, W] of any sizes -> one tensor a size, and where each image went."""
    sizes = dict.fromkeys(image.shape for image in images)
    groups = {size: [i for i, image in enumerate(images) if image.shape == size] for size in sizes}
    places = torch.tensor([i for members in groups.values() for i in members], dtype=torch.long)
    return Images([torch.stack([images[i] for i in members]) for members in groups.values()], places.argsort())
