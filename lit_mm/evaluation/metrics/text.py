"""Answers compared as text: equal, close in letters, or close in value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torchmetrics.functional.text import edit_distance

from lit_mm.evaluation.metrics.base import AnswerMetric


def normalize(answer: str) -> str:
    """How short answers compare: lower case, white space folded, without quotes around and without
    punctuation at the end ("-5" and "5", "$5" and "5%" stay different)."""
    folded = " ".join(answer.lower().split())
    return folded.lstrip("\"'").rstrip(".,!?;:\"'") or folded


class ExactMatch(AnswerMetric):
    """Share of answers that equal one of the accepted ones after `normalize` (GQA, easy-VQA)."""

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 if the answer equals one of the accepted answers, else 0."""
        return float(normalize(answer) in map(normalize, references))


class ANLS(AnswerMetric):
    """Average normalized Levenshtein similarity (DocVQA, InfographicVQA; arXiv 1907.00490, equation 1).

    1 - edits / length of the longer text, in lower case and with white space folded, for the best of the accepted
    answers; 0 if below one half. As the benchmark's server does it, exactly one half counts (the paper's equation
    has it as 0) and lengths are those of the texts as they were given.
    """

    def score(self, answer: str, references: Sequence[str]) -> float:
        """The similarity to the closest accepted answer, 0 or at least 0.5."""
        return max(similarity(answer, reference) for reference in references)


def similarity(first: str, second: str) -> float:
    """1 - edit distance / length of the longer text, 0 if below one half; 1 for two empty texts."""
    length = max(len(first), len(second))
    one, other = (" ".join(text.lower().split()) for text in (first, second))
    if one == other:
        return 1.0
    if 2 * abs(len(one) - len(other)) > length:  # as many edits at least; counting them for a long answer is slow
        return 0.0
    found = 1 - int(edit_distance(one, other, reduction="sum")) / length
    return found if found >= 0.5 else 0.0


class RelaxedAccuracy(AnswerMetric):
    """Share of answers that are right within 5 % of a number, or equal in letters (ChartQA; arXiv 2203.10244,
    section 5.1).

    The rule is pix2struct's, which Qwen-VL and lmms-eval took over. The whole text must be a number: `12%` is 0.12,
    while `1,234`, `$5` and `5 million` are texts and must be equal to the reference but for the case. An expected 0
    is compared as text, too.
    """

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 if the answer is close to one of the accepted answers, else 0."""
        return float(any(close(answer.strip(), reference.strip()) for reference in references))


def close(answer: str, expected: str) -> bool:
    """Whether two numbers differ by at most 5 % of the expected one, or two texts by nothing but case."""
    found, wanted = number(answer), number(expected)
    if found is None or not wanted:
        return answer.lower() == expected.lower()
    return abs(found - wanted) / abs(wanted) <= 0.05


def number(text: str) -> float | None:
    """The value of a text that is a number or a percentage; None for other texts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def majority_share(expected: Sequence[str]) -> float:
    """Share of the most common answer: the accuracy of a model that sees neither image nor question."""
    counts = Counter(map(normalize, expected))
    return counts.most_common(1)[0][1] / counts.total()
