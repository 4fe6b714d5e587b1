"""Which scale a question is answered at: fixed, by how certain the answers at coarser scales are, or by the model's
router.

A chooser is asked again after every answer: it names the scale to try next, or accepts the answer.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_mm.evaluation.calibration import CERTAINTIES, Statistic
from lit_mm.model.scales import Scale

if TYPE_CHECKING:
    from lit_mm.inference.answering import Answer
    from lit_mm.inference.generation import Generated
    from lit_mm.model.batch import Question


class Chooser(ABC):
    """Chooses the scale of each question.

    Attributes:
        scales: The scales that it tries, in their order.
    """

    scales: list[Scale]

    @abstractmethod
    def next(self, question: Question, answers: Sequence[Answer]) -> Scale | None:
        """The scale to try next; None: the last answer is accepted.

        Args:
            question: What is asked.
            answers: At the scales tried so far, in that order; empty at first.
        """

    def goes_on(self, place: int, begun: Generated) -> bool:
        """Whether an unfinished answer will not be accepted whatever its further tokens are, so that it can be dropped.

        Args:
            place: Number of scales that were tried before.
            begun: The answer so far, at least one token.
        """
        return False


@dataclass
class Confidence(Chooser):
    """Goes from scale to scale while the answers are uncertain.

    Args:
        scales: Its path, usually the coarsest scale first.
        thresholds: For all scales but the last: an answer is accepted if its statistic is at least this.
        statistic: What tells how certain an answer is, see `certainty`.

    Raises:
        ValueError: They do not fit each other.
    """

    scales: list[Scale]
    thresholds: list[float]
    statistic: Statistic = "mean"

    def __post_init__(self) -> None:
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales: expected at least one, each only once, found {_named(self.scales)}")
        if len(self.thresholds) != len(self.scales) - 1:
            expected = f"{len(self.scales) - 1}, one for each of the scales {_named(self.scales)} but the last"
            raise ValueError(f"thresholds: expected {expected}, found {len(self.thresholds)}")
        if self.statistic not in CERTAINTIES:
            raise ValueError(f"statistic: expected one of {', '.join(CERTAINTIES)}, found {self.statistic!r}")

    def next(self, question: Question, answers: Sequence[Answer]) -> Scale | None:
        """See `Chooser`."""
        return self.further(answers) if answers else self.scales[0]

    def further(self, answers: Sequence[Answer] | Sequence[Generated]) -> Scale | None:
        """The scale to try next after at least one answer; None: the last one is accepted."""
        place = len(answers)
        if place == len(self.scales) or certainty(self.statistic, answers) >= self.thresholds[place - 1]:
            return None
        return self.scales[place]

    def goes_on(self, place: int, begun: Generated) -> bool:
        """See `Chooser`: the first token's margin stays as it is, and the least likely token can only become less
        likely."""
        known = {"margin": begun.margin, "least": min(begun.logprobs, default=0.0)}
        return known.get(self.statistic, inf) < self.thresholds[place]


@dataclass
class Router(Chooser):
    """Answers at the coarsest scale that the model's router scores within `slack` of the best one.

    The scores are computed with the first token of an answer at the model's coarsest scale. If that scale is chosen,
    the answer goes on, otherwise it is dropped.

    Args:
        scales: What it chooses from, from the model's coarsest scale to the finest. A single one is always chosen.
        slack: How far below the best score a scale's score may be, in nats; with the loss `sufficient`, a scale is
            taken if it is sufficient with a probability of at least exp(-slack).

    Raises:
        ValueError: No scales, equal ones, or a negative slack.
    """

    scales: list[Scale]
    slack: float = 0.0

    def __post_init__(self) -> None:
        if not self.scales or len(set(self.scales)) < len(self.scales) or not self.slack >= 0:
            found = f"{_named(self.scales)} and {self.slack:g}"
            raise ValueError(f"router: expected different scales and a slack of at least 0, found {found}")

    def next(self, question: Question, answers: Sequence[Answer]) -> Scale | None:
        """See `Chooser`."""
        return self.further(answers) if answers else self.scales[0]

    def further(self, answers: Sequence[Answer] | Sequence[Generated]) -> Scale | None:
        """As for `Confidence`."""
        chosen = self.choice(answers[0].router)
        return None if len(answers) > 1 or chosen == self.scales[0] else chosen

    def goes_on(self, place: int, begun: Generated) -> bool:
        """See `Chooser`."""
        return not place and self.choice(begun.router) != self.scales[0]

    def choice(self, scores: Mapping[Scale, float]) -> Scale:
        """The scale by the router's scores; the finest where they are not finite.

        Raises:
            ValueError: There are none, as the model has no router.
        """
        if len(self.scales) == 1:
            return self.scales[0]
        if not scores:
            raise ValueError(f"the chooser needs the model's router at scale {self.scales[0]}, but got no scores")
        best = max(scores[scale] for scale in self.scales)
        return next((scale for scale in self.scales if best - scores[scale] <= self.slack), self.scales[-1])


Calibrated = Confidence | Router
"""The choosers that `calibrate` makes."""


def certainty(statistic: Statistic, answers: Sequence[Answer] | Sequence[Generated]) -> float:
    """How certain the last of the answers is; -inf where the model's logits were not finite.

    Args:
        statistic: Of the last answer: `mean` or `least` log-probability of its tokens, the end token included;
            `margin`: see `Answer.margin`; `agreement`: 1 if its text is that of the answer before it, otherwise 0.
        answers: At the scales tried so far, in that order.
    """
    last = answers[-1]
    if last.finish == "error":
        return -inf
    if statistic == "agreement":
        return float(len(answers) > 1 and last.text == answers[-2].text)
    if statistic == "margin":
        return last.margin
    return min(last.logprobs) if statistic == "least" else sum(last.logprobs) / len(last.logprobs)


def tried(chooser: Calibrated, answers: Mapping[Scale, Generated]) -> list[Generated]:
    """Of one question's answers at all scales, those that the chooser tries; it accepts the last one."""
    found = [answers[chooser.scales[0]]]
    while found[0].visual_tokens and (scale := chooser.further(found)) is not None:
        found.append(answers[scale])
    return found


def read_chooser(
    file: Path, scales: Sequence[Scale], mean_tokens: float | None = None
) -> tuple[Calibrated, int | None]:
    """The chooser that `calibrate` wrote, and the step of the weights that it was calibrated on.

    Args:
        file: A run's chooser.json.
        scales: Of the model.
        mean_tokens: Take the best of the file's choosers that tries at most so many visual tokens a question, on
            average over the questions that it was calibrated on; None: the one that was calibrated for its target.

    Raises:
        ValueError: The file does not describe a chooser of this model, or none is that cheap.
    """
    told = json.loads(file.read_text(encoding="utf-8"))
    try:
        chosen = told if mean_tokens is None else _within(told["front"], mean_tokens)
        known = {str(scale): scale for scale in scales}
        path = [known[str(name)] for name in chosen["path"]]
        thresholds = [float(each) for each in chosen["thresholds"]]
        is_router = told["statistic"] == "router"
        chooser = Router(path, *thresholds) if is_router else Confidence(path, thresholds, told["statistic"])
        return chooser, told["calibrated_on"]["step"]
    except KeyError as error:
        detail = f"no {error.args[0]!r}; the model has scales {_named(scales)}"
        raise ValueError(f"{file}: {detail}: run `calibrate` again") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _within(front: Sequence[dict[str, Any]], mean_tokens: float) -> dict[str, Any]:
    cheap = [each for each in front if each["mean_tokens"] <= mean_tokens]
    if not cheap:
        least = min(each["mean_tokens"] for each in front)
        raise ValueError(f"mean_tokens {mean_tokens:g}: the fewest that a chooser reaches are {least:g}")
    return max(cheap, key=lambda each: (each["accuracy"], -each["mean_tokens"]))


def _named(scales: Sequence[Scale]) -> str:
    return ", ".join(map(str, scales)) or "none"
