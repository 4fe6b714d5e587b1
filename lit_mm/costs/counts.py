"""What a batch holds, in numbers: counted on the CPU, where it is put together.

On a GPU the same numbers would have to be waited for; `Counts` travels with its `Batch` instead, as
Python ints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lit_mm.model.attention import causal_pairs
from lit_mm.model.rows import IGNORED, Batch, Counts, Prompts, Rows, at_time, in_sets


def counts_of(batch: Batch, scales: Sequence[int]) -> Counts:
    """The numbers of a batch on the CPU, packed already if it is to be.

    Args:
        batch: The batch; its drawn levels count.
        scales: All scales of the model, finest first.
    """
    counts, pixels = Counts(shown=[0] * len(scales)), _pixels_of(batch)
    for rows in batch.rows:
        _add_rows(counts, rows, scales, pixels)
    if not batch.rows:
        _add_samples(counts, batch, scales, pixels)
    _add_questions(counts, batch, scales)
    return counts


def _pixels_of(batch: Batch) -> list[np.ndarray]:
    """Pixels of every image; with time scales those of every set of frames, at each of them."""
    groups = batch.images.groups
    sizes = np.concatenate([np.zeros(0, np.int64), *(np.full(len(g), g.shape[-2] * g.shape[-1]) for g in groups)])
    own = sizes[batch.images.order.numpy()]
    over_time = batch.images.over_time
    return [np.bincount(sets.number.numpy(), own, len(sets.sizes)).astype(np.int64) for sets in over_time] or [own]


def _add_rows(counts: Counts, rows: Rows, scales: Sequence[int], pixels: list[np.ndarray]) -> None:
    """A packed row: `visual_source` tells of every visual token whose it is, and at which scale."""
    counts.visual += len(rows.visual_index)
    counts.text += len(rows.token_ids) - len(rows.visual_index)
    counts.targets += len(rows.targets)
    counts.pairs += rows.pairs
    ends = np.cumsum(scales)
    number, token = np.divmod(rows.visual_source.numpy(), ends[-1])
    first = np.isin(token, ends - scales)  # the first token of an image at a scale
    scale = np.searchsorted(ends, token[first], side="right")
    shown = np.bincount(scale, minlength=len(scales)).tolist()
    counts.shown = [before + more for before, more in zip(counts.shown, shown, strict=True)]
    counts.shown_pixels += int(np.concatenate(pixels)[number[first]].sum())


def _add_samples(counts: Counts, batch: Batch, scales: Sequence[int], pixels: list[np.ndarray]) -> None:
    """Samples as `MatryoshkaVLM.loop` has them, padded at every level."""
    for level in batch.drawn if batch.token_ids else []:
        time, scale = divmod(level.number, len(scales))
        lengths, stays = [], []
        for ids, targets, kept in _samples(batch):
            positions, images = at_time(ids, kept, time)
            stays.append(images)
            tokens, visual = int(positions.sum()), int(images.sum())
            lengths.append(tokens + visual * (scales[scale] - 1))
            counts.text += tokens - visual
            counts.visual += visual * scales[scale]
            counts.targets += int((targets[positions][1:] != IGNORED).sum())
            counts.pairs += causal_pairs(lengths[-1])
            counts.shown[scale] += visual
        counts.padding += max(lengths) * len(lengths) - sum(lengths)
        numbers = in_sets(batch.image_index[torch.cat(stays)], batch.images, time)
        counts.shown_pixels += int(pixels[time][numbers.numpy()].sum())


def _samples(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    kept: list[Tensor | None] = [*batch.kept] or [None] * len(batch.token_ids)
    return zip(batch.token_ids, batch.targets, kept, strict=True)


def _add_questions(counts: Counts, batch: Batch, scales: Sequence[int]) -> None:
    if not batch.questions:
        return
    times = max(1, len(batch.images.over_time))
    counts.prompts = [Prompts() for _ in range(times * len(scales))]
    for question in batch.questions:
        for time in range(times):
            positions, images = at_time(question.token_ids, question.kept, time)
            visual = int(images.sum())
            text = int(positions.sum()) - visual
            for scale, prompts in zip(scales, counts.prompts[time * len(scales) :], strict=False):
                prompts.text += text
                prompts.visual += visual * scale
                prompts.pairs += causal_pairs(text + visual * scale)
    groups = batch.images.groups
    sizes = [(int(g.shape[-2]), int(g.shape[-1])) for g in groups for _ in range(len(g))]
    shown = Counter(sizes[batch.images.order[i]] for question in batch.questions for i in question.image_index)
    counts.asked = [(number, *size) for size, number in shown.items()]
