"""Samples -> batches: which records stand together, and how they become one Batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lit_mm.data.records import RecordError
from lit_mm.model.rows import Batch, Drawn, Images, Packing, Question, all_scales, pack


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


@dataclass
class BatchPlan:
    """What one batch is made of.

    Args:
        records: Their numbers in the set.
        epoch: Of the run.
        step: The batch's number in its epoch, the same on every rank.
    """

    records: list[int]
    epoch: int
    step: int


@dataclass
class ScaleDraw:
    """Which scales take part in a training step.

    Args:
        scales: All scales of the model, finest first.
        per_step: How many; `all`: every scale in every step, as in M3.
        keep_finest: Whether the finest always takes part; otherwise it is drawn like the others.
        seed: Decides the draw, together with the epoch and the step.
    """

    scales: list[int]
    per_step: int | Literal["all"] = "all"
    keep_finest: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_step != "all" and not 1 <= self.per_step <= len(self.scales):
            raise ValueError(f"scales_per_step: expected all or 1 to {len(self.scales)}, found {self.per_step}")
        if self.keep_finest and self.per_step == 1 < len(self.scales):
            raise ValueError("scales_per_step 1 with keep_finest would train the finest scale alone")

    def __call__(self, plan: BatchPlan) -> list[Drawn]:
        """The step's scales, finest first, with weights that keep the expected loss equal to M3's."""
        count = len(self.scales)
        if self.per_step in ("all", count):
            return all_scales(count)
        kept = 1 if self.keep_finest else 0
        others = int(self.per_step) - kept
        drawn = random.Random(f"{self.seed} {plan.epoch} {plan.step} scales").sample(range(kept, count), others)
        chance = others / (count - kept)
        return [Drawn(0, 1 / count)] * kept + [Drawn(number, 1 / (count * chance)) for number in sorted(drawn)]


class Batches(Dataset):
    """A set of samples, by batches instead of one by one, packed.

    Args:
        samples: Set of `Sample`s.
        draw: Which scales are laid out.
        packing: How.
    """

    def __init__(self, samples: Dataset[Sample], draw: ScaleDraw, packing: Packing) -> None:
        self.samples, self.draw, self.packing = samples, draw, packing

    def __getitem__(self, plan: BatchPlan) -> Batch:
        batch = collate([self.samples[index] for index in plan.records])
        batch.drawn = self.draw(plan)
        if batch.token_ids:
            parts = batch.token_ids, batch.targets, batch.image_index
            batch.rows = pack(*parts, self.draw.scales, batch.drawn, self.packing)
        return batch


class LengthGroupedBatches(Sampler[BatchPlan]):
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

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self._total(), self.ranks))

    def __iter__(self) -> Iterator[BatchPlan]:
        for step, records in enumerate(self._batches()):
            yield BatchPlan(records, self.epoch, step)

    def _batches(self) -> list[list[int]]:
        order = list(range(len(self.lengths)))
        if not self.shuffle:
            return self._cut(order)[self.rank :: self.ranks]
        generator = random.Random(f"{self.seed} {self.epoch}")
        generator.shuffle(order)
        step = self.batch_size * self.window
        windows = [order[first : first + step] for first in range(0, len(order), step)]
        batches = [batch for window in windows for batch in self._cut(sorted(window, key=self.lengths.__getitem__))]
        generator.shuffle(batches)
        return batches[self.rank : self._total() : self.ranks]

    def _cut(self, order: list[int]) -> list[list[int]]:
        return [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]

    def _total(self) -> int:
        batches = -(-len(self.lengths) // self.batch_size)
        return batches - batches % self.ranks if self.shuffle else batches


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples -> Batch without rows; records that could not be read are named in `Batch.skipped`."""
    images: dict[tuple, Tensor] = {}
    places: dict[tuple, int] = {}
    index: list[int] = []
    questions: list[Question] = []
    for sample in samples:
        keys = [_identity(image) for image in sample.images]
        images |= dict(zip(keys, sample.images, strict=True))
        own = [places.setdefault(key, len(places)) for key in keys]
        index += own if sample.token_ids is not None else []
        questions += [replace(q, image_index=[own[i] for i in q.image_index]) for q in sample.questions]
    return Batch(
        images=group_by_size(list(images.values())),
        token_ids=[sample.token_ids for sample in samples if sample.token_ids is not None],
        targets=[sample.targets for sample in samples if sample.targets is not None],
        image_index=torch.tensor(index, dtype=torch.long),
        questions=questions,
        records=len(samples),
        skipped=[(error.reason, str(error)) for sample in samples for error in sample.skipped],
    )


def _identity(image: Tensor) -> tuple:
    """Equal for equal images: each is encoded once a batch, however often it is shown."""
    return tuple(image.shape), blake2b(image.numpy().tobytes(), digest_size=16).digest()


def group_by_size(images: Sequence[Tensor]) -> Images:
    """Images uint8 [3, H, W] of any sizes -> one tensor a size, and where each image went."""
    sizes = dict.fromkeys(image.shape for image in images)
    groups = {size: [i for i, image in enumerate(images) if image.shape == size] for size in sizes}
    places = torch.tensor([i for members in groups.values() for i in members], dtype=torch.long)
    return Images([torch.stack([images[i] for i in members]) for members in groups.values()], places.argsort())
