"""Metrics of generated answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def normalize(answer: str) -> str:
    """How short answers compare: lower case, white space folded, without quotes around and without
    punctuation at the end ("-5" and "5", "$5" and "5%" stay different)."""
    folded = " ".join(answer.lower().split())
    return folded.lstrip("\"'").rstrip(".,!?;:\"'") or folded


class ExactMatch(Metric):
    """Share of answers that equal the expected one after `normalize`; correct over ranks."""

    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, answers: Sequence[str], expected: Sequence[str]) -> None:
        """Count n answers against n expected ones."""
        pairs = zip(answers, expected, strict=True)
        self.correct += sum(normalize(answer) == normalize(right) for answer, right in pairs)
        self.total += len(answers)

    def compute(self) -> Tensor:
        """Accuracy in 0..1; nan before the first update."""
        return self.correct / self.total


def majority_share(expected: Sequence[str]) -> float:
    """Share of the most common answer: the accuracy of a model that sees neither image nor question."""
    counts = Counter(map(normalize, expected))
    return counts.most_common(1)[0][1] / counts.total()
