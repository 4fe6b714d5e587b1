"""What the data side hands to the model: samples, and the packed rows made of them.

A sample is token ids in which IMAGE stands once for each image. At a scale of s tokens every IMAGE
becomes s positions, which the model fills with that image's tokens. A row holds samples one after
another, each as

    [prefix][branch][branch] …      one branch a scale: the sample from its first image on

so that the LLM runs once for all scales and what stands before the first image is computed once.
Positions in each branch go on from the prefix's end, as if the other branches were not there.

The frames of a video are images. A model with time scales also answers from means over neighbouring
frames: at a coarser time scale only the first frame of each set keeps its place in the text, with
the set's mean. A level is a number of tokens per frame at one of the time scales.

`pack` lays rows out on the CPU, from token ids and scales alone; the model only fills them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_mm.model.attention import Layout, attended_pairs, layout_of

IMAGE = -200
"""The id that stands for one image in token ids (LLaVA's IMAGE_TOKEN_INDEX)."""
IGNORED = -100
"""The target of positions without a loss."""

Packing = Literal["branch", "flex", "varlen", "sequential", "loop"]
"""How a batch is laid out: one row, for one of three attention mechanisms; a row a scale; or no rows
at all but samples, which are padded and go through the LLM once per scale."""


@dataclass
class FrameSets:
    """Sets of neighbouring frames at one time scale; a still image is a set of its own.

    Args:
        number: [N] the set of every image.
        sizes: [n] how many images each set has.
    """

    number: Tensor
    sizes: Tensor


@dataclass
class Images:
    """Distinct images, grouped by size so that each group is one tensor.

    Args:
        groups: uint8 pixels [n, 3, H, W], one tensor a size; empty without images.
        order: [N] where image i stands in the concatenation of the groups.
        over_time: The frame sets at every time scale, finest first; none without time scales.
        frames: How many of the N are frames of videos.
    """

    groups: list[Tensor]
    order: Tensor
    over_time: list[FrameSets] = field(default_factory=list)
    frames: int = 0


@dataclass
class Question:
    """One prompt to be answered by generation.

    Args:
        record: The record's id.
        text: The question as asked, for reports.
        token_ids: [T] the prompt, IMAGE once for each image.
        image_index: Which images of the batch stand there, in order.
        answer: The expected answer; None where there is none (predict).
        kept: As in a Batch.
    """

    record: str | int
    text: str
    token_ids: Tensor
    image_index: list[int]
    answer: str | None = None
    kept: Tensor | None = None


@dataclass
class Drawn:
    """A level that takes part in a step.

    Args:
        number: Which of the model's levels, counted from the finest.
        weight: Of its loss in the step's loss. Over all steps it must be 1 / (number of levels) in
            the mean, as in M3: 1 / (number of levels × chance to be drawn).
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
        visual_source: [V] which nested token each takes, of all images' tokens at all scales: time
            scale after time scale, in that set after set of frames, in a set scale after scale.
        target_index: [S] the positions whose hidden state predicts a target.
        targets: [S] token ids.
        target_kind: [S] which levels the target's loss belongs to, a row of `levels_of_kinds`.
        target_sample: [S] the target's sample.
        weights: What a target's loss counts in the step's loss, by its kind.
        layout: Who sees whom, for the LLM's attention.
        pairs: How many pairs of a query and a key that it sees there are.
    """

    token_ids: Tensor
    position_ids: Tensor
    visual_index: Tensor
    visual_source: Tensor
    target_index: Tensor
    targets: Tensor
    target_kind: Tensor
    target_sample: Tensor
    weights: list[float]
    layout: Layout
    pairs: int


@dataclass
class Prompts:
    """Questions at one level.

    Args:
        text: Positions of text of all prompts together.
        visual: Positions of visual tokens.
        pairs: Pairs of a query and a key that causal attention sees.
    """

    text: int = 0
    visual: int = 0
    pairs: int = 0


@dataclass
class Counts:
    """What a batch holds, in numbers, all drawn levels together (see `lit_mm.costs.counts`).

    Args:
        text: Positions of text that the LLM computes.
        visual: Positions of visual tokens.
        targets: Positions with a loss.
        padding: Positions that only fill samples up to the longest (`loop`).
        pairs: Pairs of a query and a key that attention sees.
        shown: [scales] how often an image, or a set of frames, stands there with so many tokens.
        shown_pixels: Pixels of what visual tokens stand for, each image as often as it stands there.
        prompts: [levels] the questions at every level; empty without questions.
        asked: (number, height, width) of the images that the questions show, each as often as it is asked about.
    """

    text: int = 0
    visual: int = 0
    targets: int = 0
    padding: int = 0
    pairs: int = 0
    shown: list[int] = field(default_factory=list)
    shown_pixels: int = 0
    prompts: list[Prompts] = field(default_factory=list)
    asked: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class Batch:
    """Samples with their images.

    Args:
        images: The distinct images of all samples and questions.
        token_ids: [T_i] a sample: ids with IMAGE once for each image.
        targets: [T_i] a sample: the ids where supervised, else IGNORED.
        image_index: [K] which image each of the K IMAGE ids means, over all samples in order.
        drawn: The levels to train on, finest first.
        rows: The same samples packed: one row, or one a level; none for a model that cannot be packed.
        questions: What validation, test and predict ask.
        records: How many records were asked for.
        skipped: What was left out of this batch: (reason, message) of every bad record.
        kept: [T_i] a sample: the coarsest time scale, by number, at which a position still stands;
            empty without time scales.
        where: File and record of every sample.
        supervised: Number of targets, each counted once however many scales there are; counted here.
        counts: What is in it, counted before it went to a device; None where nobody did.
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
    kept: list[Tensor] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    supervised: int = -1
    counts: Counts | None = None

    def __post_init__(self) -> None:
        if self.supervised < 0:
            self.supervised = sum(int((targets[1:] != IGNORED).sum()) for targets in self.targets)


def every_level(count: int) -> list[Drawn]:
    """M3's own choice: every level in every step, their mean."""
    return [Drawn(number, 1 / count) for number in range(count)]


def levels_of_kinds(scales: int, time_scales: int) -> np.ndarray:
    """[kinds, levels] of 0 and 1: which levels a target of each kind belongs to.

    The kinds are the levels, one after another; for each scale all levels of that scale, as time
    scales change nothing in a sample without video; and all levels, for a text alone or a prefix.
    """
    levels = scales * max(1, time_scales)
    same_scale = np.tile(np.eye(scales), max(1, time_scales))
    return np.concatenate([np.eye(levels), same_scale, np.ones((1, levels))])


def pack(
    token_ids: Sequence[Tensor],
    targets: Sequence[Tensor],
    image_index: Tensor,
    scales: Sequence[int],
    drawn: Sequence[Drawn],
    packing: Packing = "branch",
    kept: Sequence[Tensor] = (),
    over_time: Sequence[FrameSets] = (),
) -> list[Rows]:
    """Lay samples out as packed rows.

    Args:
        token_ids: [T_i] a sample: ids with IMAGE once for each image.
        targets: [T_i] a sample: the ids where supervised, else IGNORED.
        image_index: [K] which image each IMAGE means.
        scales: All scales of the model, finest first.
        drawn: The levels to lay out.
        packing: One row with all branches, or (`sequential`) one row for each drawn level, or
            (`loop`) none.
        kept: [T_i] a sample: the coarsest time scale at which a position still stands.
        over_time: The frame sets of the images at every time scale.
    """
    if packing == "loop":
        return []
    samples = _samples(token_ids, targets, image_index, kept)
    plan = _Plan(list(scales), list(over_time), list(drawn))
    if packing != "sequential":
        return [_row(samples, plan, drawn, packing)]
    first, *others = drawn
    rows = [_row(samples, plan, [first], "branch")]
    for level in others:
        asking = [sample for sample in samples if level in plan.branches(sample)]
        rows += [_row(asking, plan, [level], "branch", once=False)] if asking else []
    return rows


@dataclass
class _Sample:
    """One sample as arrays: ids, targets and kept [T], the images that its IMAGE ids mean."""

    number: int
    ids: np.ndarray
    targets: np.ndarray
    images: np.ndarray
    kept: np.ndarray | None
    video: bool

    def at(self, time: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, targets and images of a part at a time scale."""
        ids, targets, images = self.ids[part], self.targets[part], self.images
        if self.kept is None or not self.video:
            return ids, targets, images
        stays = self.kept[part] >= time
        return ids[stays], targets[stays], images[stays[ids == IMAGE]]


def _samples(
    token_ids: Sequence[Tensor], targets: Sequence[Tensor], image_index: Tensor, kept: Sequence[Tensor]
) -> list[_Sample]:
    index, made, done = image_index.numpy(), [], 0
    for number, (ids, own) in enumerate(zip(token_ids, targets, strict=True)):
        array, stays = ids.numpy(), kept[number].numpy() if kept else None
        count = int((array == IMAGE).sum())
        video = stays is not None and bool((stays < stays.max()).any())
        made.append(_Sample(number, array, own.numpy(), index[done : done + count], stays, video))
        done += count
    return made


@dataclass
class _Plan:
    """What a row is laid out by: all scales, the frame sets at each time scale, the drawn levels."""

    scales: list[int]
    over_time: list[FrameSets]
    drawn: list[Drawn]

    def __post_init__(self) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(self.scales)])
        sets = [sets.number.numpy() for sets in self.over_time]
        bases = np.cumsum([0] + [len(sets.sizes) for sets in self.over_time])
        self.sets = [base + numbers for base, numbers in zip(bases, sets, strict=False)]
        self.levels = len(self.scales) * max(1, len(self.sets))

    def branches(self, sample: _Sample) -> list[Drawn]:
        """The drawn levels that differ for a sample: without video one a scale, without images none."""
        if not len(sample.images):
            return []
        if sample.video:
            return self.drawn
        first: dict[int, Drawn] = {}
        for level in self.drawn:
            first.setdefault(level.number % len(self.scales), level)
        return list(first.values())

    def kind(self, sample: _Sample, level: int) -> int:
        """Of the targets in the branch of a level."""
        return level if sample.video else self.levels + level % len(self.scales)

    def source(self, images: np.ndarray, level: int) -> np.ndarray:
        """[images, tokens] where the tokens of images come from at a level."""
        time, scale = divmod(level, len(self.scales))
        sets = self.sets[time][images] if self.sets else images
        return sets[:, None] * self.offsets[-1] + self.offsets[scale] + np.arange(self.scales[scale])[None]

    def weights(self) -> list[float]:
        """What a target counts, by its kind."""
        weight = np.zeros(self.levels)
        weight[[level.number for level in self.drawn]] = [level.weight for level in self.drawn]
        return (levels_of_kinds(len(self.scales), len(self.sets)) @ weight).tolist()


class _Builder:
    """Collects the pieces of one row."""

    def __init__(self, plan: _Plan) -> None:
        self.plan, self.length = plan, 0
        self.pieces: dict[str, list[np.ndarray]] = {
            name: [np.zeros(0, np.int64)]
            for name in ("ids", "positions", "visual", "source", "index", "targets", "kind", "sample")
        }
        self.segments: list[tuple[int, int, int, int]] = []

    def add_shared(self, sample: _Sample, part: slice, ask: bool = True) -> None:
        """Append text that no level changes. Its targets are left out if not asked for."""
        shared = self.plan.levels + len(self.plan.scales)
        self._add(sample, sample.ids[part], sample.targets[part], 0, shared, ask)

    def add_branch(self, sample: _Sample, first: int, level: int) -> None:
        """Append what a sample is at a level from position `first` on."""
        time, scale = divmod(level, len(self.plan.scales))
        ids, targets, images = sample.at(time, slice(first, None))
        repeats = np.where(ids == IMAGE, self.plan.scales[scale], 1)
        ids, targets = ids.repeat(repeats), targets.repeat(repeats)
        visual = np.flatnonzero(ids == IMAGE) + self.length
        self._put(visual=visual, source=self.plan.source(images, level).reshape(-1))
        self._add(sample, np.where(ids == IMAGE, 0, ids), targets, first, self.plan.kind(sample, level))

    def _add(
        self, sample: _Sample, ids: np.ndarray, targets: np.ndarray, position: int, kind: int, ask: bool = True
    ) -> None:
        supervised = np.flatnonzero(targets[1:] != IGNORED) if ask else np.zeros(0, np.int64)
        self._put(
            ids=ids,
            positions=position + np.arange(len(ids)),
            index=supervised + self.length,
            targets=targets[1:][supervised],
            kind=np.full(len(supervised), kind),
            sample=np.full(len(supervised), sample.number),
        )
        self.length += len(ids)

    def _put(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.pieces[name].append(array)

    def rows(self, packing: Packing) -> Rows:
        joined = {name: torch.from_numpy(np.concatenate(pieces)) for name, pieces in self.pieces.items()}
        return Rows(
            joined["ids"],
            joined["positions"],
            joined["visual"],
            joined["source"],
            joined["index"],
            joined["targets"],
            joined["kind"],
            joined["sample"],
            self.plan.weights(),
            layout_of(self.segments, packing),
            attended_pairs(self.segments),
        )


def _row(samples: Sequence[_Sample], plan: _Plan, drawn: Sequence[Drawn], packing: Packing, once: bool = True) -> Rows:
    """One row of the samples at those of the plan's levels that are in `drawn`. Without `once` the
    targets before the first image are left out: another row has them, and no level changes them."""
    builder = _Builder(plan)
    for sample in samples:
        start = builder.length
        first = int(np.flatnonzero(sample.ids == IMAGE)[0]) if len(sample.images) else len(sample.ids)
        if first:
            builder.segments.append((start, 0, start, first))
            builder.add_shared(sample, slice(first), once)
        for level in plan.branches(sample):
            if level in drawn:
                begin = builder.length
                builder.add_branch(sample, first, level.number)
                builder.segments.append((start, first, begin, builder.length - begin))
    return builder.rows(packing)


def behind_an_image(batch: Batch) -> Tensor:
    """[S] whether each of the batch's targets stands behind an image, so that the scale changes it."""
    marked = zip(batch.token_ids, batch.targets, strict=True)
    return torch.cat([((ids == IMAGE).cumsum(0) > 0)[1:][own[1:] != IGNORED] for ids, own in marked])


def at_time(ids: Tensor, kept: Tensor | None, time: int) -> tuple[Tensor, Tensor]:
    """Which positions [T] of a sample stand at a time scale, and which [K] of its images."""
    stays = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept >= time
    return stays, stays[ids == IMAGE]


def in_sets(index: Tensor, images: Images, time: int) -> Tensor:
    """Numbers [K] of images -> of their sets of frames at a time scale."""
    return images.over_time[time].number[index] if images.over_time else index


def expand(values: Tensor, token_ids: Tensor, scale: int) -> Tensor:
    """Repeat what stands at an IMAGE `scale` times: values [T] -> [T + images × (scale - 1)]."""
    return values.repeat_interleave(torch.where(token_ids == IMAGE, scale, 1))


def stack(sequences: list[Tensor], padding: int, left: bool = False) -> Tensor:
    """Sequences [T_i] -> [B, max T_i], padded on the right, or on the left for generation."""
    return torch.nn.utils.rnn.pad_sequence(
        sequences, batch_first=True, padding_value=padding, padding_side="left" if left else "right"
    )
