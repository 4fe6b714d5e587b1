"""What all metrics of answers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

UNIT = 2**40
"""Scores are summed as integers, in parts of one: a float would be cast to bfloat16 with the rest of the module by
`--trainer.precision bf16-true`, and its sum would depend on the order of the ranks."""


class AnswerMetric(Metric, ABC):
    """Mean score of the answers to n questions, right over ranks: every rank gives its own questions."""

    points: Tensor
    total: Tensor
    headline = ""
    """The name of the headline figure where this is not the mean score; one that ends in % is a share."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("points", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, answer: str, references: Sequence[str]) -> float:
        """The score of one answer, from 0 (wrong) to 1 (right).

        Args:
            answer: What the model wrote.
            references: What it is compared with, at least one.
        """

    def update(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Count n answers.

        Args:
            answers: The answer to each question.
            references: The references of each question.

        Raises:
            TypeError: The references of a question are one string.
            ValueError: A question has no references, these are not what the metric reads, or there are more
                answers than questions or fewer.
        """
        pairs = list(zip(answers, references, strict=True))
        for answer, own in pairs:
            if isinstance(own, str):
                raise TypeError(f"the references of a question must be a list of strings, not {own!r}")
            if not own:
                raise ValueError(f"no references for the answer {answer!r}: it cannot be scored")
            self._count(self.score(answer, own), answer, own)
        self.total += len(pairs)

    def _count(self, score: float, answer: str, references: Sequence[str]) -> None:
        """Keep what `compute` and `figures` need of one question."""
        self.points += round(score * UNIT)

    def compute(self) -> Tensor:
        """The benchmark's headline figure: the mean score, 0..1; nan before the first update."""
        return self.points / (self.total * UNIT)

    def strata(self, scores: np.ndarray, references: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """The headline figure where it is not the mean score, as a sum of means over questions that count together.

        Args:
            scores: [Q, S] of the answers to Q questions at S scales.
            references: [Q] of the questions.

        Returns:
            For each mean the values [n, S] that it averages. Empty if the headline is the mean score, or if some of the
            questions that count together are missing.
        """
        return []

    def figures(self) -> dict[str, float]:
        """The benchmark's further figures by name. With several ranks, all of them must call this."""
        with self.sync_context():
            return self._figures()

    def _figures(self) -> dict[str, float]:
        """The further figures from states that are summed over the ranks."""
        return {}
