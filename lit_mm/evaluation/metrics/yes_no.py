"""Questions that are answered by yes or no: POPE and MME."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_mm.evaluation.metrics.base import AnswerMetric
from lit_mm.evaluation.metrics.groups import GroupedMetric, scores_by

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
SUBTASKS = PERCEPTION + COGNITION


class YesNo(AnswerMetric):
    """Accuracy on questions whose answer is yes or no (POPE; arXiv 2305.10355).

    References: `yes` or `no`. `figures` has the precision, recall and F1 of yes, and the share of answers that say
    yes. LLaVA-1.5's paper reports the F1 of each of POPE's three splits.
    """

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, 2, dtype=torch.int64), dist_reduce_fx="sum")  # [expected, answer]

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 if the answer says what the reference does, else 0."""
        return float(says_yes(answer) == is_yes(references[0]))

    def _count(self, score: float, answer: str, references: Sequence[str]) -> None:
        super()._count(score, answer, references)
        self.counts[int(is_yes(references[0])), int(says_yes(answer))] += 1

    def _figures(self) -> dict[str, float]:
        """`precision`, `recall`, `f1` and `yes_rate`, 0..1; 0 for 0 / 0."""
        (_, wrong_yes), (wrong_no, right_yes) = self.counts.tolist()
        return {
            "precision": _ratio(right_yes, right_yes + wrong_yes),
            "recall": _ratio(right_yes, right_yes + wrong_no),
            "f1": _ratio(2 * right_yes, 2 * right_yes + wrong_yes + wrong_no),
            "yes_rate": _ratio(right_yes + wrong_yes, int(self.total)),
        }


def says_yes(answer: str) -> bool:
    """What an answer counts as, by POPE's rule: no if its first sentence has the word No, no or not; else yes, even
    if it is empty."""
    words = answer.partition(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def is_yes(reference: str) -> bool:
    """Whether a reference is yes. Raises ValueError if it is neither yes nor no."""
    if (label := reference.strip().lower()) not in ("yes", "no"):
        raise ValueError(f"the reference of a question must be yes or no, not {reference!r}")
    return label == "yes"


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


class MMEScore(GroupedMetric):
    """MME's points (arXiv 2306.13394): per subtask, 100 times the accuracy and 100 times the accuracy on images whose
    two questions are both answered right (accuracy plus).

    References: yes or no, the subtask, and the image, e.g. `("Yes", "OCR", "0001.jpg")`. The headline is the sum over
    the ten subtasks of perception, at most 2000, which the papers' tables show; without such questions it is 0.
    """

    headline = "perception points"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 if the answer says what the reference does, else 0."""
        return float(mme_label(answer) == ("yes" if is_yes(references[0]) else "no"))

    def _count(self, score: float, answer: str, references: Sequence[str]) -> None:
        super()._count(score, answer, references)
        if len(references) != 3 or references[1] not in SUBTASKS:
            expected = f"yes or no, one of {', '.join(SUBTASKS)}, and the image"
            raise ValueError(f"the references of an MME question must be {expected}; found {list(references)!r}")
        self._keep(SUBTASKS.index(references[1]), references[2], score == 1)

    def strata(self, scores: np.ndarray, references: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Of each subtask of perception the points [images, S]; none if a question is alone with its image."""
        images = scores_by([(own[1], own[2]) for own in references], scores)
        if any(len(own) != 2 for own in images.values()):
            return []
        points = {image: 100 * (own.mean(0) + (own == 1).all(0)) for image, own in images.items()}
        asked = [name for name in PERCEPTION if any(name == subtask for subtask, _ in points)]
        return [np.stack([own for (subtask, _), own in points.items() if subtask == name]) for name in asked]

    def compute(self) -> Tensor:
        """The points of perception, 0..2000."""
        return torch.tensor(self._figures()["perception"], device=self.total.device)

    def _figures(self) -> dict[str, float]:
        """`perception` (at most 2000) and `cognition` (at most 800) points, the points of every subtask that was
        asked (at most 200), `accuracy` and `accuracy_plus` (0..1) of all questions, and `unpaired`: how many
        questions are alone with their image, as in a draw of the questions, and left out of accuracy plus."""
        images = {SUBTASKS[kind]: groups for kind, groups in sorted(self._groups().items())}
        for name, groups in images.items():
            if (most := max(map(len, groups))) > 2:
                raise ValueError(f"MME asks two questions about an image; in {name} an image has {most}")
        points = {name: 100 * sum(_accuracies(groups)) for name, groups in images.items()}
        accuracy, plus = _accuracies(together := [image for groups in images.values() for image in groups])
        return {
            "perception": sum(points.get(name, 0.0) for name in PERCEPTION),
            "cognition": sum(points.get(name, 0.0) for name in COGNITION),
            **points,
            "accuracy": accuracy,
            "accuracy_plus": plus,
            "unpaired": float(sum(len(image) == 1 for image in together)),
        }


def _accuracies(images: list[list[bool]]) -> tuple[float, float]:
    """Accuracy and accuracy plus, 0..1, of images with the answers to their questions; 0 where there are none."""
    pairs = [all(image) for image in images if len(image) == 2]
    return _ratio(sum(map(sum, images)), sum(map(len, images))), _ratio(sum(pairs), len(pairs))


def mme_label(answer: str) -> str:
    """What an answer counts as, by MME's `calculation.py`: yes or no if the word is among its first four
    characters, in any case, otherwise `other`, which is always wrong."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
