"""Multiple choice: which of the options an answer means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np
import torch
from torch import Tensor

from lit_mm.evaluation.metrics.base import AnswerMetric
from lit_mm.evaluation.metrics.groups import GroupedMetric, scores_by
from lit_mm.evaluation.metrics.text import normalize

WORD = r"(?i:(?:\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*))"
ALONE = re.compile(rf"(?:(?i:(?:the\s+)?(?:correct\s+)?){WORD})?\(?([A-Za-z])[).:,]*")
"""The whole answer: `B`, `b.`, `(B)`, `Answer: B`, `The correct answer is (B).`"""
MARKED = re.compile(r"(?:^|\n|(?<!\b[A-Z]\s)\b(?:or|and)\b|[).:],)\s*\(?([A-Z])[).:]")
"""In front of an option's text: `B. blue`, `(B) blue`, `A: red or B: blue`; not `A and B.`"""
SAID = re.compile(rf"{WORD}\(?([A-Z])\b(?!['’])(?!\)?\s*(?:or\b|and\b|[,/&])\s*\(?[A-Z]\b)")
"""`The answer is B because …`; not `The answer is A or B`."""
LETTER = re.compile(r"(?<![\w'’])(?!A\s+(?!(?:is|or|and|because)\b)[a-z])([A-Z])(?![\w'’])", re.ASCII)
"""A word of one letter, except the article: `A red square` names no option."""


class MultipleChoice(AnswerMetric):
    """Share of answers that mean the right option (MMBench, ScienceQA, SEED-Bench).

    References: the right option's letter, its text, and the texts of all options in order, e.g.
    `("B", "blue", "red", "blue", "green")`.
    """

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 if the answer means the right option, 0 if it means another, none, or several.

        Raises:
            ValueError: The letter, the text and the options do not fit each other.
        """
        return score_choice(answer, references)


class CircularChoice(GroupedMetric):
    """Share of questions of which every round is answered right: MMBench asks a question with n options n times, each
    time with the options shifted by one (CircularEval, arXiv 2307.06281).

    References: as for `MultipleChoice`, and the question that this is a round of, e.g.
    `("B", "blue", "red", "blue", "green", "241")`. `figures` has the `answer_accuracy`, the share of all rounds that
    are answered right, and `incomplete`: how many questions were asked in fewer rounds than they have options.
    """

    headline = "all rounds right %"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 if the answer to this round means the right option, else 0. Raises ValueError as `MultipleChoice`."""
        return score_choice(answer, references[:-1])

    def _count(self, score: float, answer: str, references: Sequence[str]) -> None:
        super()._count(score, answer, references)
        self._keep(len(references) - 3, references[-1], score == 1)

    def strata(self, scores: np.ndarray, references: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Whether all rounds of a question are right [questions, S]."""
        rounds = scores_by([(len(own), own[-1]) for own in references], scores)
        return [np.stack([(own == 1).all(0) for own in rounds.values()]).astype(float)]

    def compute(self) -> Tensor:
        """The share of questions, 0..1; nan before the first update."""
        questions = [all(rounds) for groups in self._groups().values() for rounds in groups]
        return torch.tensor(questions, device=self.total.device).float().mean()

    def _figures(self) -> dict[str, float]:
        rounds = [(options, len(own)) for options, groups in self._groups().items() for own in groups]
        incomplete = sum(asked < options for options, asked in rounds)
        return {"answer_accuracy": float(super().compute()), "incomplete": float(incomplete)}


def score_choice(answer: str, references: Sequence[str]) -> float:
    """See `MultipleChoice.score`."""
    letter, text, options = references[0], "".join(references[1:2]), references[2:]
    if (letter, text) not in zip(ascii_uppercase, options, strict=False):
        expected = "the right letter, its text, and the texts of all options"
        raise ValueError(f"the references of a question must be {expected}; found {list(references)!r}")
    return float(chosen(answer, options) == letter)


def chosen(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer means; None if it means none or more than one.

    The first of these that the answer has decides: it is a letter; a marked letter in front of a text; a letter
    after `answer`, `option` or `choice`; the text of an option and nothing else; a letter somewhere; the text of an
    option somewhere. These are the rules of MMBench's, LLaVA's (ScienceQA) and SEED-Bench's code; where MMBench then
    asks a GPT, the answer is wrong.

    Args:
        answer: What the model wrote.
        options: The texts of the options, A first.
    """
    answer, texts = answer.strip(), dict(zip(ascii_uppercase, map(normalize, options), strict=False))
    whole, plain = ALONE.fullmatch(answer), normalize(answer)
    ways = (
        {whole[1].upper()} if whole else set(),
        set(MARKED.findall(answer)),
        set(SAID.findall(answer)),
        {letter for letter, text in texts.items() if text == plain},
        set(LETTER.findall(answer)),
        {letter for letter, text in texts.items() if text and _contains(plain, text)},
    )
    found = next((letters & texts.keys() for letters in ways if letters & texts.keys()), set())
    return found.pop() if len(found) == 1 else None


def _contains(answer: str, text: str) -> bool:
    """Whether an option's text is in the answer: as whole words, and not as a part of another number."""
    return re.search(rf"(?<![\w.-]){re.escape(text)}(?![\w%]|[.,]\d)", answer) is not None
