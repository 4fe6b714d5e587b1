"""What the data side hands to the model: samples, and the packed rows made of them.

A sample is token ids in which IMAGE stands once for each image. At a scale of s tokens every IMAGE
becomes s positions, which the model fills with that image's tokens. A row holds samples one after
another, each as

    [prefix][branch][branch] …      one branch a scale: the sample from its first image on

so that the LLM runs once for all scales and what stands before the first image is computed once.
Positions in each branch go on from the prefix's end, as if the other branches were not there.
`pack` lays rows out on the CPU, from token ids and scales alone; the model only fills them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_mm.model.attention import Layout, layout_of

IMAGE = -200
"""The id that stands for one image in token ids (LLaVA's IMAGE_TOKEN_INDEX)."""
IGNORED = -100
"""The target of positions without a loss."""

Packing = Literal["branch", "flex", "varlen", "sequential", "loop"]
"""How a batch is laid out: one row, for one of three attention mechanisms; a row a scale; or no rows
at all but samples, which are padded and go through the LLM once per scale."""


@dataclass
class Images:
    """Distinct images, grouped by size so that each group is one tensor.

    Args:
        groups: uint8 pixels [n, 3, H, W], one tensor a size; empty without images.
        order: [N] where image i stands in the concatenation of the groups.
    """

    groups: list[Tensor]
    order: Tensor


@dataclass
class Question:
    """One prompt to be answered by generation.

    Args:
        record: The record's id.
        text: The question as asked, for reports.
        token_ids: [T] the prompt, IMAGE once for each image.
        image_index: Which images of the batch stand there, in order.
        answer: The expected answer; None where there is none (predict).
    """

    record: str | int
    text: str
    token_ids: Tensor
    image_index: list[int]
    answer: str | None = None


@dataclass
class Drawn:
    """A scale that takes part in a step.

    Args:
        number: Which of the model's scales, counted from the finest.
        weight: Of its loss in the step's loss. Over all steps it must be 1 / (number of scales) in
            the mean, as in M3: 1 / (number of scales × chance to be drawn).
    """

    number: int
    weight: float


@dataclass
class Rows:
    """One packed row: L positions, V of them visual, S with a target.

    Args:
        token_ids: [L], 0 at visual positions.
        position_ids: [L], going on from the prefix's end in each branch.
        visual_index: [V] the visual positions.
        visual_source: [V] which nested token each takes, of all images' tokens at all scales: image
            after image, and in an image scale after scale.
        target_index: [S] the positions whose hidden state predicts a target.
        targets: [S] token ids.
        target_scale: [S] the number of the target's scale; the number of scales for what all scales
            share, a text alone or a prefix.
        target_sample: [S] the target's sample.
        weights: What a target's loss counts in the step's loss, by its target_scale.
        layout: Who sees whom, for the LLM's attention.
    """

    token_ids: Tensor
    position_ids: Tensor
    visual_index: Tensor
    visual_source: Tensor
    target_index: Tensor
    targets: Tensor
    target_scale: Tensor
    target_sample: Tensor
    weights: list[float]
    layout: Layout


@dataclass
class Batch:
    """Samples with their images.

    Args:
        images: The distinct images of all samples and questions.
        token_ids: [T_i] a sample: ids with IMAGE once for each image.
        targets: [T_i] a sample: the ids where supervised, else IGNORED.
        image_index: [K] which image each of the K IMAGE ids means, over all samples in order.
        drawn: The scales to train on, finest first.
        rows: The same samples packed: one row, or one a scale; none for a model that cannot be packed.
        questions: What validation, test and predict ask.
        records: How many records were asked for.
        skipped: What was left out of this batch: (reason, message) of every bad record.
    """

    images: Images
    token_ids: list[Tensor]
    targets: list[Tensor]
    image_index: Tensor
    drawn: list[Drawn] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    records: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    supervised: int = field(init=False)
    """Number of targets, each counted once however many scales there are."""

    def __post_init__(self) -> None:
        self.supervised = sum(int((targets[1:] != IGNORED).sum()) for targets in self.targets)


def all_scales(count: int) -> list[Drawn]:
    """M3's own choice: every scale in every step, their mean."""
    return [Drawn(number, 1 / count) for number in range(count)]


def pack(
    token_ids: Sequence[Tensor],
    targets: Sequence[Tensor],
    image_index: Tensor,
    scales: Sequence[int],
    drawn: Sequence[Drawn],
    packing: Packing = "branch",
) -> list[Rows]:
    """Lay samples out as packed rows.

    Args:
        token_ids: [T_i] a sample: ids with IMAGE once for each image.
        targets: [T_i] a sample: the ids where supervised, else IGNORED.
        image_index: [K] which image each IMAGE means.
        scales: All scales of the model, finest first.
        drawn: Those to lay out.
        packing: One row with all branches, or (`sequential`) one row for each drawn scale, or
            (`loop`) none.
    """
    if packing == "loop":
        return []
    samples = _samples(token_ids, targets, image_index)
    if packing != "sequential":
        return [_row(samples, scales, drawn, packing)]
    with_images = [sample for sample in samples if sample.images]
    first, *others = drawn
    rows = [_row(samples, scales, [first], "branch")]
    return rows + [_row(with_images, scales, [scale], "branch", once=False) for scale in others if with_images]


@dataclass
class _Sample:
    """One sample as arrays: ids [T], targets [T], the images that its IMAGE ids mean."""

    number: int
    ids: np.ndarray
    targets: np.ndarray
    images: list[int]


def _samples(token_ids: Sequence[Tensor], targets: Sequence[Tensor], image_index: Tensor) -> list[_Sample]:
    images = iter(image_index.tolist())
    made = []
    for number, (ids, own) in enumerate(zip(token_ids, targets, strict=True)):
        array = ids.numpy()
        made.append(_Sample(number, array, own.numpy(), [next(images) for _ in range(int((array == IMAGE).sum()))]))
    return made


class _Builder:
    """Collects the pieces of one row."""

    def __init__(self, scales: Sequence[int]) -> None:
        self.scales, self.length = scales, 0
        self.offsets = np.concatenate([[0], np.cumsum(scales)])
        self.pieces: dict[str, list[np.ndarray]] = {
            name: [np.zeros(0, np.int64)]
            for name in ("ids", "positions", "visual", "source", "index", "targets", "scale", "sample")
        }
        self.segments: list[tuple[int, int, int, int]] = []

    def add(self, sample: _Sample, part: slice, prefix: int, scale: int, ask: bool = True) -> None:
        """Append `sample[part]`, whose positions go on from `prefix`, with IMAGE ids at a scale.

        Its targets are left out if not asked for.
        """
        ids, targets = sample.ids[part], sample.targets[part]
        if IMAGE in ids:
            repeats = np.where(ids == IMAGE, self.scales[scale], 1)
            ids, targets = ids.repeat(repeats), targets.repeat(repeats)
            visual = np.flatnonzero(ids == IMAGE)
            first = np.asarray(sample.images) * self.offsets[-1] + self.offsets[scale]
            self._put(
                visual=visual + self.length, source=(first[:, None] + np.arange(self.scales[scale])[None]).reshape(-1)
            )
        supervised = np.flatnonzero(targets[1:] != IGNORED) if ask else np.zeros(0, np.int64)
        count = len(supervised)
        self._put(
            ids=np.where(ids == IMAGE, 0, ids),
            positions=prefix + np.arange(len(ids)),
            index=supervised + self.length,
            targets=targets[1:][supervised],
            scale=np.full(count, scale),
            sample=np.full(count, sample.number),
        )
        self.length += len(ids)

    def _put(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.pieces[name].append(array)

    def rows(self, packing: Packing, weights: list[float]) -> Rows:
        joined = {name: torch.from_numpy(np.concatenate(pieces)) for name, pieces in self.pieces.items()}
        return Rows(
            joined["ids"],
            joined["positions"],
            joined["visual"],
            joined["source"],
            joined["index"],
            joined["targets"],
            joined["scale"],
            joined["sample"],
            weights,
            layout_of(self.segments, packing),
        )


def _row(
    samples: Sequence[_Sample], scales: Sequence[int], drawn: Sequence[Drawn], packing: Packing, once: bool = True
) -> Rows:
    """One row of the samples at the drawn scales. Without `once` the targets before the first image
    are left out: another row has them, and no scale changes them."""
    builder, every = _Builder(scales), len(scales)
    for sample in samples:
        start = builder.length
        if not sample.images:
            builder.segments.append((start, 0, start, len(sample.ids)))
            builder.add(sample, slice(None), 0, every)
            continue
        first = int(np.flatnonzero(sample.ids == IMAGE)[0])
        if first:
            builder.segments.append((start, 0, start, first))
            builder.add(sample, slice(first), 0, every, once)
        for scale in drawn:
            begin = builder.length
            builder.add(sample, slice(first, None), first, scale.number)
            builder.segments.append((start, first, begin, builder.length - begin))
    weight = {scale.number: scale.weight for scale in drawn}
    return builder.rows(packing, [weight.get(number, 0.0) for number in range(every)] + [1.0])


def behind_an_image(batch: Batch) -> Tensor:
    """[S] whether each of the batch's targets stands behind an image, so that the scale changes it."""
    marked = zip(batch.token_ids, batch.targets, strict=True)
    return torch.cat([((ids == IMAGE).cumsum(0) > 0)[1:][own[1:] != IGNORED] for ids, own in marked])


def expand(values: Tensor, token_ids: Tensor, scale: int) -> Tensor:
    """Repeat what stands at an IMAGE `scale` times: values [T] -> [T + images × (scale - 1)]."""
    return values.repeat_interleave(torch.where(token_ids == IMAGE, scale, 1))


def stack(sequences: list[Tensor], padding: int, left: bool = False) -> Tensor:
    """Sequences [T_i] -> [B, max T_i], padded on the right, or on the left for generation."""
    return torch.nn.utils.rnn.pad_sequence(
        sequences, batch_first=True, padding_value=padding, padding_side="left" if left else "right"
    )
