"""Counts a batch's tokens, labels, padding and pixels on the CPU, where the batch is made.

`Counts` travels with its `Batch` as Python ints, because counting on the GPU would mean waiting for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from lit_mm.model.attention import causal_pairs
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch, Counts, Prompts
from lit_mm.model.packing import pixels_of


def counts_of(batch: Batch, scales: Sequence[int]) -> Counts:
    """Count a batch on the CPU.

    Args:
        batch: The batch, already packed unless it is to be padded.
        scales: The model's image scales, finest first.
    """
    total = Counts(shown=[0] * len(scales))
    for counts in [own.counts for own in batch.packed] or _padded(batch, scales):
        for name in ("text", "visual", "labels", "padding", "pairs", "shown_pixels"):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
        total.shown = [before + more for before, more in zip(total.shown, counts.shown, strict=True)]
    _add_questions(total, batch, scales)
    return total


def _padded(batch: Batch, scales: Sequence[int]) -> list[Counts]:
    """Counts for each scale of the step, with samples padded to the longest."""
    drawn = [scale for scale, weight in enumerate(batch.scale_weights) if weight and batch.input_ids]
    return [_padded_at(batch, scales, *divmod(scale, len(scales))) for scale in drawn]


def _padded_at(batch: Batch, scales: Sequence[int], time: int, scale: int) -> Counts:
    counts, lengths, shown = Counts(shown=[0] * len(scales)), [], []
    for number, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        stays = batch.time_scale[number] >= time if batch.time_scale else torch.ones_like(ids, dtype=torch.bool)
        shown.append(stays[ids == IMAGE])
        visual = int(shown[-1].sum())
        lengths.append(int(stays.sum()) + visual * (scales[scale] - 1))
        counts.visual += visual * scales[scale]
        counts.labels += int((labels[stays][1:] != IGNORE_INDEX).sum())
        counts.pairs += causal_pairs(lengths[-1])
        counts.shown[scale] += visual
    counts.text, counts.padding = sum(lengths) - counts.visual, max(lengths) * len(lengths) - sum(lengths)
    rows = batch.images.nested_rows()[time][batch.image_index[torch.cat(shown)]]
    counts.shown_pixels = int(pixels_of(batch.images)[rows.numpy()].sum())
    return counts


def _add_questions(counts: Counts, batch: Batch, scales: Sequence[int]) -> None:
    if not batch.questions:
        return
    times = max(1, len(batch.images.frame_sets))
    counts.prompts = [Prompts() for _ in range(times * len(scales))]
    for question in batch.questions:
        ids, kept = question.input_ids, question.time_scale
        for time in range(times):
            stays = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept >= time
            visual = int((ids[stays] == IMAGE).sum())
            text = int(stays.sum()) - visual
            for scale, prompts in zip(scales, counts.prompts[time * len(scales) :], strict=False):
                prompts.text += text
                prompts.visual += visual * scale
                prompts.pairs += causal_pairs(text + visual * scale)
    groups = batch.images.groups
    sizes = [(int(g.shape[-2]), int(g.shape[-1])) for g in groups for _ in range(len(g))]
    shown = Counter(sizes[batch.images.order[i]] for question in batch.questions for i in question.image_index)
    counts.asked = [(number, *size) for size, number in shown.items()]
