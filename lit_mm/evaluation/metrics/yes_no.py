"""Questions that are answered by yes or no: POPE and MME."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lit_mm.evaluation.metrics.base import AnswerMetric

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
SUBTASKS = PERCEPTION + COGNITION


class YesNo(AnswerMetric):
    """Accuracy on questions whose answer is yes or no (POPE; arXiv 2305.10355).

    References: `yes` or `no`. `figures` has the precision, recall and F1 of yes, and the share of answers that say
    yes. LLaVA's, ConvLLaVA's and M3's tables show F1, the mean of POPE's three splits.
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
        """`precision`, `recall`, `f1` and `yes_rate`, 0..1; 0 where nothing is divided by nothing."""
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


class MMEScore(AnswerMetric):
    """MME's points (arXiv 2306.13394): per subtask, 100 times the accuracy and 100 times the accuracy on images whose
    two questions are both answered right (accuracy plus).

    References: yes or no, the subtask, and the image, e.g. `("Yes", "OCR", "0001.jpg")`. The headline is the sum over
    the ten subtasks of perception, at most 2000, which the papers' tables show; without such questions it is 0.
    """

    judged: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("judged", [], dist_reduce_fx="cat")  # [n, 3] subtask, image, right

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 if the answer says what the reference does, else 0."""
        return float(mme_label(answer) == ("yes" if is_yes(references[0]) else "no"))

    def _count(self, score: float, answer: str, references: Sequence[str]) -> None:
        super()._count(score, answer, references)
        if len(references) != 3 or references[1] not in SUBTASKS:
            expected = f"yes or no, one of {', '.join(SUBTASKS)}, and the image"
            raise ValueError(f"the references of an MME question must be {expected}; found {list(references)!r}")
        image = int.from_bytes(blake2b(references[2].encode(), digest_size=7).digest())  # 56 bits, alike on all ranks
        row = [SUBTASKS.index(references[1]), image, int(score)]
        self.judged.append(torch.tensor([row], device=self.total.device))

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather all ranks' questions. torchmetrics would gather a rank without any as floats."""
        self.judged = self.judged or [torch.zeros(0, 3, dtype=torch.int64, device=self.total.device)]
        super().sync(*args, **options)

    def compute(self) -> Tensor:
        """The points of perception, 0..2000."""
        return torch.tensor(self._figures()["perception"], device=self.total.device)

    def _figures(self) -> dict[str, float]:
        """`perception` (at most 2000) and `cognition` (at most 800) points, the points of every subtask that was
        asked (at most 200), `accuracy` and `accuracy_plus` (0..1) of all questions, and `unpaired`: how many
        questions are alone with their image, as in a draw of the questions, and left out of accuracy plus."""
        asked, right = self._by_image()
        figures = {name: 100 * sum(_accuracies(asked, right, [name])) for name in SUBTASKS if name in asked}
        accuracy, plus = _accuracies(asked, right, SUBTASKS)
        return {
            "perception": sum(figures.get(name, 0.0) for name in PERCEPTION),
            "cognition": sum(figures.get(name, 0.0) for name in COGNITION),
            **figures,
            "accuracy": accuracy,
            "accuracy_plus": plus,
            "unpaired": float(sum(list(own.values()).count(1) for own in asked.values())),
        }

    def _by_image(self) -> tuple[dict[str, Counter[int]], dict[str, Counter[int]]]:
        """How many questions of each subtask and image were asked, and how many were answered right."""
        asked, right = defaultdict[str, Counter[int]](Counter), defaultdict[str, Counter[int]](Counter)
        for rows in [self.judged] if isinstance(self.judged, Tensor) else self.judged:
            for subtask, image, correct in rows.tolist():
                asked[SUBTASKS[subtask]][image] += 1
                right[SUBTASKS[subtask]][image] += correct
        for name, own in asked.items():
            if (most := max(own.values())) > 2:
                raise ValueError(f"MME asks two questions about an image; in {name} an image has {most}")
        return asked, right


def _accuracies(
    asked: dict[str, Counter[int]], right: dict[str, Counter[int]], subtasks: Sequence[str]
) -> tuple[float, float]:
    """Accuracy and accuracy plus over all questions of the subtasks, 0..1; 0 where there are none."""
    images = [(asked[name][image], right[name][image]) for name in subtasks if name in asked for image in asked[name]]
    pairs = [correct == 2 for questions, correct in images if questions == 2]
    return _ratio(sum(c for _, c in images), sum(q for q, _ in images)), _ratio(sum(pairs), len(pairs))


def mme_label(answer: str) -> str:
    """What an answer counts as, by MME's `calculation.py`: yes or no if the word is among its first four
    characters, in any case, otherwise `other`, which is always wrong."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
