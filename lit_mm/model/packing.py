"""Samples -> packed sequences, on the CPU, from input_ids and scales alone.

All scales of a sample share its prefix, the text before its first image. A packed sequence holds samples one
after another, each as

    [prefix][branch][branch] …      one branch per scale: the sample from its first image on

so the LLM runs once for all scales and computes every prefix once. With scales 4 and 1, the prefix `5 6`, an
image and the text `7 8`:

    input_ids      5  6 | .  .  .  .  7  8 | .  7  8        . becomes a visual token
    position_ids   0  1 | 2  3  4  5  6  7 | 2  3  4        as if there were no other branch

A sample without images is a prefix without branches. Time scales add branches only to samples with a video.
The LLM's attention keeps branches apart: see `attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from lit_mm.model.attention import Attention, Segment, layout_of
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Answers, Batch, Counts, Images, PackedSequence

Packing = Literal["packed", "sequential", "padded"]
"""How a batch is laid out: all scales in one packed sequence, one sequence a scale, or padded samples."""


def pack(
    batch: Batch,
    scales: Sequence[int],
    packing: Packing = "packed",
    attention: Attention = "branch",
    answers: bool = False,
) -> list[PackedSequence]:
    """Lay the samples of a batch out at the scales whose weight is not 0.

    Args:
        batch: Samples on the CPU; of its images only the sizes are read.
        scales: The model's image scales, finest first.
        packing: `packed`: one sequence with all branches. `sequential`: one sequence per scale; labels in
            prefixes are in the first sequence only. `padded`: none.
        attention: The mechanism that the sequences are laid out for.
        answers: Whether to list the answers, for a router. Packing `packed` with the coarsest scale only.

    Raises:
        ValueError: No such packing.
    """
    if packing not in get_args(Packing):
        raise ValueError(f"packing {packing}: expected one of {', '.join(get_args(Packing))}")
    drawn = [scale for scale, weight in enumerate(batch.scale_weights) if weight]
    samples = list(_samples(batch, drawn, len(scales)))
    if packing == "padded" or not samples:
        return []
    if packing == "packed":
        return [_sequence(batch, samples, drawn, scales, attention, answers=answers)]
    asking = [[sample for sample in samples if scale in sample.branches] for scale in drawn[1:]]
    others = [
        _sequence(batch, members, [scale], scales, attention, prefix_labels=False)
        for scale, members in zip(drawn[1:], asking, strict=True)
        if members
    ]
    return [_sequence(batch, samples, drawn[:1], scales, attention), *others]


@dataclass
class _Sample:
    """One sample as arrays: ids, labels, places in the batch's samples laid end to end and time scales [T], the images
    that its IMAGE ids mean, the length of its prefix, and the scales that get a branch."""

    number: int
    ids: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    time_scale: np.ndarray | None
    images: np.ndarray
    prefix: int
    branches: list[int]


def _samples(batch: Batch, drawn: Sequence[int], image_scales: int) -> Iterator[_Sample]:
    images, done, start = batch.image_index.numpy(), 0, 0
    for number, (input_ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        ids, stays = input_ids.numpy(), batch.time_scale[number].numpy() if batch.time_scale else None
        shown = np.flatnonzero(ids == IMAGE)
        own, done = images[done : done + len(shown)], done + len(shown)
        is_video = stays is not None and (stays < stays.max()).any()
        # without video, scales that differ in time alone are equal: one branch per number of tokens is enough
        first = {scale % image_scales: scale for scale in reversed(drawn)}
        branches = (list(drawn) if is_video else sorted(first.values())) if len(shown) else []
        prefix, places = int(shown[0]) if len(shown) else len(ids), np.arange(start, start + len(ids))
        start += len(ids)
        yield _Sample(number, ids, labels.numpy(), places, stays if is_video else None, own, prefix, branches)


class _Piece(NamedTuple):
    """A prefix or a branch of n positions.

    Args:
        segment: Its place in the packed sequence.
        ids: [n], IMAGE at every visual position.
        labels: [n].
        places: [n] places in the batch's samples laid end to end.
        sample: Its sample's number.
        label_scales: [scales] bool: the scales whose loss its labels count in.
        rows: Its images, as rows of `MatryoshkaVLM.encode`'s output.
        scale: Their image scale, by index.
    """

    segment: Segment
    ids: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    sample: int
    label_scales: np.ndarray
    rows: np.ndarray
    scale: int


def _pieces(
    batch: Batch, samples: Sequence[_Sample], drawn: Sequence[int], scales: Sequence[int], prefix_labels: bool
) -> Iterator[_Piece]:
    """The samples' prefixes, each followed by its branches at some of the drawn scales."""
    tables, number = [rows.numpy() for rows in batch.images.nested_rows()], np.arange(len(batch.scale_weights))
    end, none = 0, np.zeros(0, np.int64)
    for sample in samples:
        start, prefix = end, sample.prefix
        if prefix:
            labels = sample.labels[:prefix] if prefix_labels else np.full(prefix, IGNORE_INDEX)
            segment, ids, places = Segment(end, 0, end, prefix), sample.ids[:prefix], sample.places[:prefix]
            yield _Piece(segment, ids, labels, places, sample.number, number >= 0, none, 0)
            end += prefix
        for scale in (own for own in sample.branches if own in drawn):
            time, image_scale = divmod(scale, len(scales))
            stays = np.full(len(sample.ids), True) if sample.time_scale is None else sample.time_scale >= time
            rows = tables[time][sample.images[stays[sample.ids == IMAGE]]]
            ids, labels, places = (x[prefix:][stays[prefix:]] for x in (sample.ids, sample.labels, sample.places))
            tokens = np.where(ids == IMAGE, scales[image_scale], 1)
            same = number % len(scales) == image_scale if sample.time_scale is None else number == scale
            segment = Segment(start, prefix, end, int(tokens.sum()))
            ids, labels, places = (x.repeat(tokens) for x in (ids, labels, places))
            yield _Piece(segment, ids, labels, places, sample.number, same, rows, image_scale)
            end += segment.length


def _sequence(
    batch: Batch,
    samples: Sequence[_Sample],
    drawn: Sequence[int],
    scales: Sequence[int],
    attention: Attention,
    prefix_labels: bool = True,
    answers: bool = False,
) -> PackedSequence:
    """One packed sequence of the samples at some of the drawn scales."""
    offsets, pixels, counts = np.cumsum([0, *scales]), pixels_of(batch.images), Counts(shown=[0] * len(scales))
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.int64)] for name in COLUMNS}
    belongs, segments = [np.zeros((0, len(batch.scale_weights)), bool)], []
    pieces = list(_pieces(batch, samples, drawn, scales, prefix_labels))
    for piece in pieces:
        start, labels = piece.segment.start, piece.labels[1:]
        labeled = np.flatnonzero(labels != IGNORE_INDEX)  # the state at t predicts the label at t + 1
        visual = np.arange(offsets[piece.scale], offsets[piece.scale + 1])
        columns["input_ids"].append(np.where(piece.ids == IMAGE, 0, piece.ids))
        columns["position_ids"].append(piece.segment.prefix_length + np.arange(len(piece.ids)))
        columns["visual_index"].append(start + np.flatnonzero(piece.ids == IMAGE))
        columns["visual_source"].append((piece.rows[:, None] * offsets[-1] + visual).ravel())
        columns["label_index"].append(start + labeled)
        columns["labels"].append(labels[labeled])
        columns["label_sample"].append(np.full(len(labeled), piece.sample))
        columns["label_place"].append(piece.places[1:][labeled])
        belongs.append(np.tile(piece.label_scales, (len(labeled), 1)))
        segments.append(piece.segment)
        counts.shown[piece.scale] += len(piece.rows)
        counts.shown_pixels += int(pixels[piece.rows].sum())
    tensors: dict[str, Any] = {name: torch.from_numpy(np.concatenate(own)) for name, own in columns.items()}
    counts.visual, counts.labels = len(tensors["visual_index"]), len(tensors["labels"])
    counts.text, counts.pairs = len(tensors["input_ids"]) - counts.visual, sum(s.pairs for s in segments)
    label_scales = torch.from_numpy(np.concatenate(belongs))
    layout = layout_of(segments, attention)
    sequence = PackedSequence(**tensors, label_scales=label_scales, layout=layout, counts=counts)
    sequence.answers = _answers(pieces, sequence.visual_source.numpy()) if answers else None
    return sequence


def _answers(pieces: Sequence[_Piece], visual_source: np.ndarray) -> Answers:
    """The answers in a packed sequence: runs of labels in branches, the same in every branch of a sample."""
    columns: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in range(4)]
    of_label, first, seen, of_seen = columns
    firsts: dict[int, int] = {}  # the first answer of each sample
    total = labels = tokens = 0
    for piece in pieces:
        labeled, shown = np.flatnonzero(piece.labels[1:] != IGNORE_INDEX), np.flatnonzero(piece.ids == IMAGE)
        begins = np.flatnonzero(np.diff(labeled, prepend=-2) > 1)
        if len(shown):
            own = firsts.setdefault(piece.sample, total)
            numbers, total = own + np.arange(len(begins)), own + len(begins)
            of_label.append(np.repeat(numbers, np.diff(begins, append=len(labeled))))
        else:
            of_label.append(np.full(len(labeled), -1))
        if len(shown) and piece.label_scales[-1]:
            first.append(labels + begins)
            for number, begin in zip(numbers, labeled[begins], strict=True):
                before = visual_source[tokens : tokens + int((shown <= begin).sum())]
                seen.append(before)
                of_seen.append(np.full(len(before), number))
        labels, tokens = labels + len(labeled), tokens + len(shown)
    made = [torch.from_numpy(np.concatenate(own)) for own in columns]
    made[0][made[0] < 0] = total
    return Answers(*made)


COLUMNS = (
    *("input_ids", "position_ids", "visual_index", "visual_source"),
    *("label_index", "labels", "label_sample", "label_place"),
)


def pixels_of(images: Images) -> np.ndarray:
    """[M] pixels of every image; with time scales of every set of frames, at each of them."""
    sizes = [np.full(len(group), group.shape[-2] * group.shape[-1]) for group in images.groups]
    own = np.concatenate(sizes)[images.order.numpy()] if sizes else np.zeros(len(images.order), np.int64)
    over_time = [np.bincount(sets.index.numpy(), own, len(sets.sizes)) for sets in images.frame_sets]
    return np.concatenate(over_time).astype(np.int64) if over_time else own
