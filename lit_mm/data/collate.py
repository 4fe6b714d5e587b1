"""Collates samples into one packed batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_mm.costs.counts import counts_of
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.records import RecordError
from lit_mm.data.sampler import BatchPlan
from lit_mm.model.batch import Batch, FrameSets, Images, Question
from lit_mm.model.packing import pack
from lit_mm.model.scales import set_starts


@dataclass
class Visual:
    """A still image or the frames of a video.

    Args:
        key: Equal for the same image or video.
        pixels: uint8 [frames, 3, H, W]; one frame for an image. On the `meta` device if only the header was read.
        video: Whether it is a video.
        labels: [frames] text before each frame, usually empty.
    """

    key: Hashable
    pixels: Tensor
    video: bool = False
    labels: Sequence[str] = ("",)


@dataclass
class Sample:
    """One record, encoded.

    Args:
        visuals: Its images and videos.
        input_ids: [T], with IMAGE once for each frame; None if there is nothing to train on.
        labels: [T], IGNORE_INDEX for positions that are not supervised.
        time_scale: [T] index of the coarsest time scale that still includes the position.
        questions: Questions to ask about it; their image_index counts this sample's frames.
        skipped: The error, if its record could not be read; the sample is then empty.
        where: Its file and record.
    """

    visuals: list[Visual] = field(default_factory=list)
    input_ids: Tensor | None = None
    labels: Tensor | None = None
    time_scale: Tensor | None = None
    questions: list[Question] = field(default_factory=list)
    skipped: list[RecordError] = field(default_factory=list)
    where: str = ""


@dataclass
class LoadedBatch(Batch):
    """A batch and the records it was made of.

    Args:
        records: Number of records requested.
        skipped: (reason, message) of every bad record left out of this batch.
        where: File and record of every sample.
    """

    records: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)


class Batches(Dataset):
    """A dataset whose items are whole packed batches.

    Args:
        samples: Dataset of `Sample`s.
        inputs: The model's properties: its scales, and how batches are packed.
        training: Whether scales are drawn, and every batch needs something to train on. If none of its records
            can be read, it gets the next readable record of the set.
        seed: Seed of the drawn scales.
    """

    def __init__(self, samples: Dataset[Sample], inputs: ModelInputs, training: bool, seed: int = 0) -> None:
        self.samples, self.inputs, self.training = samples, inputs, training
        self.draw = inputs.draw(training, seed)

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch:
        inputs, samples = self.inputs, [self.samples[record] for record in plan.records]
        if self.training and all(sample.input_ids is None for sample in samples):
            samples += self._stand_in(plan.records[-1])
        batch = collate(samples, inputs.time_scales)
        batch.scale_weights = self.draw(plan.epoch, plan.step)
        batch.packed = pack(batch, inputs.scales, inputs.packing, inputs.attention, inputs.router)
        batch.counts = counts_of(batch, inputs.scales)
        return batch

    def _stand_in(self, record: int) -> list[Sample]:
        """The samples after a record, up to the first readable one."""
        found: list[Sample] = []
        count = len(cast(Sized, self.samples))
        for further in range(1, count):
            found.append(self.samples[(record + further) % count])
            if found[-1].input_ids is not None:
                return found
        raise RecordError("data.train", "no readable record", f"tried all {count}")


def collate(samples: Sequence[Sample], time_scales: Sequence[int] = ()) -> LoadedBatch:
    """Samples -> a batch that is not packed yet. An image shown several times is encoded once; records that could
    not be read are listed in `skipped`."""
    visuals: dict[Hashable, Visual] = {}
    for sample in samples:
        visuals |= {visual.key: visual for visual in sample.visuals}
    firsts = np.cumsum([0] + [len(visual.pixels) for visual in visuals.values()])
    places = dict(zip(visuals, firsts.tolist(), strict=False))
    index: list[int] = []
    questions: list[Question] = []
    for sample in samples:
        own = [places[v.key] + frame for v in sample.visuals for frame in range(len(v.pixels))]
        index += own if sample.input_ids is not None else []
        questions += [replace(q, image_index=[own[i] for i in q.image_index]) for q in sample.questions]
    images = group_by_size([visual.pixels for visual in visuals.values()], time_scales)
    images.frames = sum(len(visual.pixels) for visual in visuals.values() if visual.video)
    return LoadedBatch(
        images=images,
        input_ids=[sample.input_ids for sample in samples if sample.input_ids is not None],
        labels=[sample.labels for sample in samples if sample.labels is not None],
        image_index=torch.tensor(index, dtype=torch.long),
        questions=questions,
        records=len(samples),
        skipped=[(error.reason, str(error)) for sample in samples for error in sample.skipped],
        time_scale=[sample.time_scale for sample in samples if sample.time_scale is not None],
        where=[sample.where for sample in samples if not sample.skipped],
    )


def group_by_size(visuals: Sequence[Tensor], time_scales: Sequence[int] = ()) -> Images:
    """Frames uint8 [n, 3, H, W] of images and videos -> one tensor per size, the place of each frame, and the
    sets of frames at every time scale."""
    groups: dict[torch.Size, list[int]] = {}
    for number, pixels in enumerate(visuals):
        groups.setdefault(pixels.shape[1:], []).append(number)
    firsts = np.cumsum([0] + [len(pixels) for pixels in visuals])
    went = [np.arange(firsts[n], firsts[n + 1]) for members in groups.values() for n in members]
    places = torch.from_numpy(np.concatenate([*went, np.zeros(0, np.int64)]))
    tensors = [torch.cat([visuals[n] for n in members]) for members in groups.values()]
    return Images(tensors, places.argsort(), [frames_in_sets([len(v) for v in visuals], most) for most in time_scales])


def frames_in_sets(frames: Sequence[int], most: int) -> FrameSets:
    """The sets of frames at one time scale, of images and videos with these numbers of frames."""
    sizes = [np.diff([*set_starts(count, most), count]) for count in frames]
    flat = torch.from_numpy(np.concatenate([*sizes, np.zeros(0, np.int64)]))
    return FrameSets(torch.arange(len(flat)).repeat_interleave(flat), flat)
