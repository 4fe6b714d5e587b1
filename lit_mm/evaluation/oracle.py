"""How many visual tokens each question needs: M3's oracle, and the best accuracy that any chooser of scales can reach.

Works on plain arrays, e.g. of a test's `questions.parquet`; knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Oracle:
    """The chooser that sees the answers: per question the fewest tokens with which it is answered right (M3, arXiv
    2405.17430). A question that no scale answers right gets the fewest tokens.

    Args:
        needed: [questions] the index of each question's scale.
        right: [questions] whether that scale answers it right, i.e. any scale does.
        accuracy: Mean score at these scales.
        mean_tokens: Mean tokens of these scales.
        histogram: [scales] how many questions need the scale, without those that no scale answers right.
        agreement: [scales, scales] share of the questions that both scales answer right or both answer wrong.
    """

    needed: NDArray[np.int64]
    right: NDArray[np.bool_]
    accuracy: float
    mean_tokens: float
    histogram: NDArray[np.int64]
    agreement: Floats


def oracle(scores: ArrayLike, tokens: ArrayLike, threshold: float = 0.5) -> Oracle:
    """What the oracle chooses and reaches.

    Args:
        scores: [questions, scales] of the answers, 0..1.
        tokens: [scales] or [questions, scales] visual tokens of a question.
        threshold: An answer is right if it scores at least this.

    Raises:
        ValueError: The arrays do not fit each other, or a score is not a number from 0 to 1.
    """
    scores, tokens = checked(scores, tokens)
    right = scores >= threshold
    found = np.asarray(right.any(1))
    usable = right | ~found[:, None]
    last = scores.shape[1] - 1
    needed = last - np.where(usable, tokens, np.inf)[:, ::-1].argmin(1)  # of equally many tokens the last scale
    return Oracle(
        needed=needed,
        right=found,
        accuracy=float(_at(scores, needed).mean()),
        mean_tokens=float(_at(tokens, needed).mean()),
        histogram=np.bincount(needed[found], minlength=last + 1),
        agreement=(right[:, :, None] == right[:, None]).mean(0),
    )


def checked(scores: ArrayLike, tokens: ArrayLike) -> tuple[Floats, Floats]:
    """Scores and tokens, both [questions, scales]; raises ValueError if they are not what `oracle` takes."""
    scores, tokens = np.asarray(scores, float), np.asarray(tokens, float)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores: expected [questions, scales], at least one of each, found {list(scores.shape)}")
    if tokens.shape not in (scores.shape, scores.shape[1:]):
        expected = f"{list(scores.shape[1:])} or {list(scores.shape)}, as scores are"
        raise ValueError(f"tokens: expected {expected}, found {list(tokens.shape)}")
    for name, values, bad in (("scores", scores, ~((scores >= 0) & (scores <= 1))), ("tokens", tokens, ~(tokens >= 0))):
        if bad.any():
            place = tuple(int(index) for index in np.argwhere(bad)[0])
            expected = "from 0 to 1" if name == "scores" else "of at least 0"
            raise ValueError(f"{name}{list(place)}: expected a number {expected}, found {values[place]}")
    return scores, np.broadcast_to(tokens, scores.shape)


def _at(values: Floats, chosen: NDArray[np.int64]) -> Floats:
    """[questions] each question's value at its chosen scale."""
    return np.take_along_axis(values, chosen[:, None], 1)[:, 0]


@dataclass(frozen=True)
class Curve:
    """The highest accuracy for every mean budget: straight lines between corners, increasing and concave.

    Args:
        tokens: [n] the corners' mean tokens.
        accuracy: [n] their mean scores.
    """

    tokens: Floats
    accuracy: Floats

    def at(self, budget: ArrayLike) -> Floats:
        """Accuracy at each mean number of tokens; nan where even the cheapest choice costs more."""
        return np.interp(np.asarray(budget, float), self.tokens, self.accuracy, left=np.nan)


def envelope(scores: ArrayLike, tokens: ArrayLike) -> Curve:
    """The best accuracy that choosing a scale per question can reach with a mean budget: no chooser is above it.

    Every question starts with its fewest tokens. Then tokens are spent where they buy most: of all questions, the one
    whose next better scale gains the most score per token goes there, and so on until no question gains. A scale that
    gains less per token than a larger one behind it is skipped, so that each question's gains per token only fall,
    and no other order could have bought more with as many tokens. Between two corners a part of the questions has
    moved on: with equal gains any part, otherwise one question, which goes there with a probability. This is the exact
    optimum of the linear program (a multiple-choice knapsack); each corner is a choice of one scale per question.

    Args:
        scores: [questions, scales] of the answers, 0..1.
        tokens: [scales] or [questions, scales] visual tokens of a question.

    Returns:
        Curve: From the fewest tokens to those beyond which nothing is gained.

    Raises:
        ValueError: As in `oracle`.
    """
    scores, tokens = checked(scores, tokens)
    hulls = [_hull(own_tokens, own_scores) for own_tokens, own_scores in zip(tokens, scores, strict=True)]
    steps = np.array([np.subtract(b, a) for hull in hulls for a, b in pairwise(hull)]).reshape(-1, 2)
    gains = steps[:, 1] / steps[:, 0]
    order = np.argsort(-gains, kind="stable")
    corners = np.vstack([np.sum([hull[0] for hull in hulls], 0), steps[order]]).cumsum(0) / len(hulls)
    bends = np.r_[True, np.diff(gains[order]) != 0, True][: len(corners)]
    return Curve(*corners[bends].T)


def _hull(tokens: Floats, scores: Floats) -> list[tuple[float, float]]:
    """A question's (tokens, score) points that are worth going to, cheapest first, each with a smaller gain per token
    than the one before."""
    hull: list[tuple[float, float]] = []
    for place in np.lexsort((-scores, tokens)):
        cost, score = float(tokens[place]), float(scores[place])
        if hull and score <= hull[-1][1]:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], (cost, score)):
            hull.pop()
        hull.append((cost, score))
    return hull


def _gain(start: tuple[float, float], end: tuple[float, float]) -> float:
    """Score per token between two points."""
    return (end[1] - start[1]) / (end[0] - start[0])


def fixed_mixture(scores: ArrayLike, tokens: ArrayLike) -> Curve:
    """The best accuracy for every mean budget without looking at the questions: a coin decides for each between two
    fixed scales, the best two of all for the budget. Arguments as in `envelope`."""
    scores, tokens = checked(scores, tokens)
    return envelope(scores.mean(0)[None], tokens.mean(0)[None])


def shuffled(needed: NDArray[np.int64], scores: ArrayLike, tokens: ArrayLike) -> tuple[float, float]:
    """Accuracy and mean tokens to expect if the chosen scales are dealt out to the questions at random. A chooser that
    is better than this does not only use each scale often enough, it uses it for the right questions.

    Args:
        needed: [questions] the index of the scale chosen for each question.
        scores: As in `envelope`.
        tokens: As in `envelope`.
    """
    scores, tokens = checked(scores, tokens)
    share = np.bincount(needed, minlength=scores.shape[1]) / len(needed)
    return float(scores.mean(0) @ share), float(tokens.mean(0) @ share)
