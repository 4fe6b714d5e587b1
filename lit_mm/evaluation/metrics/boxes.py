"""Boxes written as text: RefCOCO."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from lit_mm.evaluation.metrics.base import AnswerMetric


class BoxAccuracy(AnswerMetric):
    """Share of answers with a box that overlaps the right one by at least half (RefCOCO, RefCOCO+, RefCOCOg).

    References: boxes written as the model is to write them, `[x1, y1, x2, y2]` with x1 < x2 and y1 < y2, of the
    padded square's side (0..1; ConvLLaVA). The first box of an answer counts; an answer without one is wrong.
    """

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 if intersection over union with one of the boxes is at least 0.5, else 0.

        Raises:
            ValueError: A reference has no box.
        """
        expected = [_reference(reference) for reference in references]
        if (box := first_box(answer)) is None:
            return 0.0
        return float((box_iou(box[None], torch.stack(expected)) >= 0.5).any())


def _reference(text: str) -> Tensor:
    """[4] the reference's box; raises ValueError if it has no box or one without area."""
    box = first_box(text)
    if box is None or not (box[:2] < box[2:]).all():
        raise ValueError(f"expected a box [x1, y1, x2, y2] with x1 < x2 and y1 < y2, found {text!r}")
    return box


def first_box(text: str) -> Tensor | None:
    """[4] the first four numbers in square brackets, with commas between; None if there are none."""
    number = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
    found = re.search(rf"\[{','.join([number] * 4)}\]", text, re.ASCII)
    return torch.tensor([float(part) for part in found.groups()], dtype=torch.float64) if found else None
