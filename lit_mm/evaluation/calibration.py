"""Thresholds of choosers: from what each scale answered on validation questions, for a target.

A path is some of the scales, the cheapest first. A question is answered at one scale of it after another until an
answer's statistic reaches the threshold of its scale; it pays for every scale that it tried. With the statistic
`router` a question is answered once: at the first scale of the path whose score is within a slack of the best score. It
pays for that scale, and for the prompt at the coarsest scale, from which the router computes the scores. Works on plain
arrays; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, prod
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from lit_mm.evaluation.results import Judged

Floats = NDArray[np.float64]
CHOOSER = "chooser.json"
"""The file in a run's folder with its calibrated chooser."""
Statistic = Literal["mean", "least", "margin", "agreement", "router"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
CERTAINTIES = STATISTICS[:-1]
"""Those that tell how certain an answer is."""
THRESHOLDS = {1: 0, 2: 100, 3: 100, 4: 40, 5: 20}
"""Number of scales in a path -> thresholds that are tried at each: at most 160,000 combinations."""
MOST_SCALES = 5
"""With more scales than these, only paths of three are searched."""


@dataclass(frozen=True)
class Rows:
    """What is known of Q questions at S scales.

    Args:
        scales: [S] names, finest first.
        scores: [Q, S] in 0..1.
        costs: [Q, S] what each answer costs, without what is paid once.
        once: What every question costs whatever its scale, such as the encoder.
        statistics: [Q, S] for each statistic. agreement: numbers that are equal where the answers' texts are equal;
            router: each scale's score, only if the model has a router.
        routed: [Q, S] what each answer costs if a router chose it, the router's own cost included.
    """

    scales: list[str]
    scores: Floats
    costs: Floats
    once: float
    statistics: dict[Statistic, Floats]
    routed: Floats | None = None

    def of(self, questions: NDArray) -> Rows:
        """Some of the questions, by index or mask."""
        some = {name: values[questions] for name, values in self.statistics.items()}
        routed = None if self.routed is None else self.routed[questions]
        return Rows(self.scales, self.scores[questions], self.costs[questions], self.once, some, routed)


@dataclass(frozen=True)
class Rule:
    """What a chooser does, and what it reached where it was calibrated.

    Args:
        statistic: What tells how certain an answer is, or router.
        path: Indices of the scales, in the order in which they are tried.
        thresholds: For all of them but the last: an answer is accepted if its statistic is at least this. For router
            a single one, the slack: how far a scale's score may be below the best.
        accuracy: Mean score.
        cost: Mean cost of all tried scales.
    """

    statistic: Statistic
    path: tuple[int, ...]
    thresholds: tuple[float, ...]
    accuracy: float
    cost: float


@dataclass(frozen=True)
class Target:
    """What is wanted: the best accuracy for a mean cost, or the lowest mean cost for a loss of accuracy.

    Args:
        mean_cost: The highest mean cost of a question.
        max_loss: How far accuracy may be below the finest scale's. Exactly one of the two is given.

    Raises:
        ValueError: Both are given, or none.
    """

    mean_cost: float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if (self.mean_cost is None) == (self.max_loss is None):
            raise ValueError("expected one target: a mean cost or a largest loss")

    def met(self, accuracy: Floats, cost: Floats, finest: float) -> NDArray[np.bool_]:
        """Which of the rules reach it."""
        slack = 1e-12
        if self.mean_cost is not None:
            return cost <= self.mean_cost * (1 + slack)
        return accuracy >= finest - float(self.max_loss or 0) - slack

    def order(self, accuracy: float, cost: float) -> tuple[float, float]:
        """What rules are compared by: a better rule has a larger pair."""
        return (-cost, accuracy) if self.mean_cost is None else (accuracy, -cost)


def statistics_of(questions: Sequence[Judged]) -> dict[Statistic, Floats]:
    """[Q, S] for each statistic, see `choosers.certainty`. A question without visual tokens is the same prompt at every
    scale and answered once: as certain as can be, and nan for agreement."""
    tokens = np.array([question.tokens for question in questions], float)
    least = np.array([question.least_logprobs for question in questions])
    sums = np.array([question.logprobs for question in questions])
    mean = np.where(np.isneginf(least), -inf, sums / np.maximum(tokens, 1))
    texts = [[question.answers.index(answer) for answer in question.answers] for question in questions]
    margin = np.array([question.margins for question in questions])
    seen = np.array([question.visual_tokens for question in questions]) > 0
    plain = {name: np.where(seen, own, inf) for name, own in (("mean", mean), ("least", least), ("margin", margin))}
    if any(question.router for question in questions):
        scores = [question.router or [0.0] * seen.shape[1] for question in questions]
        plain["router"] = np.where(seen, np.array(scores), 0.0)
    return cast(dict[Statistic, Floats], plain | {"agreement": np.where(seen, np.array(texts, float), np.nan)})


def certainties(rows: Rows, statistic: Statistic, path: Sequence[int]) -> Floats:
    """[Q, len(path) - 1] how certain the answers along a path are, but for its last."""
    own = rows.statistics[statistic][:, list(path)]
    if statistic != "agreement":
        return own[:, :-1]
    agree = np.concatenate([np.zeros((len(own), 1), bool), own[:, 1:] == own[:, :-1]], 1)
    return (agree | np.isnan(own)).astype(float)[:, :-1]


def thresholds_of(values: Floats, most: int) -> Floats:
    """At most so many thresholds, each between two neighboring values, spread evenly over the questions [Q]."""
    values = np.sort(values[np.isfinite(values)])
    ends = np.flatnonzero(np.diff(values) > 0)  # the last place of each value
    if len(ends) > most:
        wanted = np.linspace(0, len(values), most + 2)[1:-1] - 1
        ends = np.unique(ends[np.abs(ends[:, None] - wanted).argmin(0)])
    return (values[ends] + values[ends + 1]) / 2


def rules(rows: Rows, statistic: Statistic) -> Iterator[tuple[tuple[int, ...], list[Floats], Floats, Floats]]:
    """Every path with all combinations of its thresholds: the path, the thresholds of each of its scales but the last,
    and accuracy and mean cost [T1, T2, …] of every combination.

    Paths have up to five scales, with more than five scales up to three.
    """
    if statistic == "router":
        yield from _routed(rows)
        return
    order = np.argsort(rows.costs.mean(0), kind="stable").tolist()
    longest = len(order) if len(order) <= MOST_SCALES else 3
    for length in range(1, longest + 1):
        for path in combinations(order, length):
            certain = certainties(rows, statistic, path)
            most = THRESHOLDS[length]
            tried = [thresholds_of(own, most) if statistic != "agreement" else np.array([0.5]) for own in certain.T]
            if all(map(len, tried)):
                yield path, tried, *_reached(rows, path, certain, tried)


def _routed(rows: Rows) -> Iterator[tuple[tuple[int, ...], list[Floats], Floats, Floats]]:
    """As `rules`, for a router: single scales, and every path that begins with the coarsest scale, where the scores are
    read."""
    *finer, coarsest = range(rows.scores.shape[1])
    for scale in (coarsest, *reversed(finer)):
        yield (scale,), [], np.array(rows.scores[:, scale].mean()), np.array(rows.costs[:, scale].mean() + rows.once)
    for length in range(1, len(finer) + 1):
        for others in combinations(reversed(finer), length):
            path = (coarsest, *others)
            near = np.fmin.accumulate(_below_best(rows, path), 1)  # the slack that is enough for this or a coarser one
            tried = np.append(0.0, thresholds_of(near[:, :-1].ravel(), THRESHOLDS[2]))
            yield path, [tried], *_by_slack(rows, path, near, tried)


def _by_slack(rows: Rows, path: tuple[int, ...], near: Floats, tried: Floats) -> tuple[Floats, Floats]:
    """Accuracy and mean cost for every slack that is tried.

    With more slack, a question is answered at a coarser scale. `near` [Q, len(path)] has the slack from which on this
    scale or a coarser one is taken, so each scale serves a question between two of these values."""
    begins, count = np.searchsorted(tried, near[:, :-1]), len(tried)
    ends = np.concatenate([np.full((len(near), 1), count), begins], 1)
    begins = np.concatenate([begins, np.zeros((len(near), 1), int)], 1)
    totals = []
    for values in (rows.scores[:, path], cast(Floats, rows.routed)[:, path]):
        changes = [np.bincount(at.ravel(), values.ravel(), count + 1) for at in (begins, ends)]
        totals.append((changes[0] - changes[1]).cumsum()[:count] / len(values))
    return totals[0].round(12), totals[1] + rows.once


def _below_best(rows: Rows, path: Sequence[int]) -> Floats:
    """[Q, len(path)] how far each scale's score is below the best of the path; nan where scores are not finite."""
    own = rows.statistics["router"][:, list(path)]
    return own.max(1, keepdims=True) - own


def _reached(rows: Rows, path: tuple[int, ...], certain: Floats, tried: list[Floats]) -> tuple[Floats, Floats]:
    """Accuracy and mean cost of all combinations of thresholds.

    The questions are counted once, in a histogram over how many thresholds of each scale their answer reaches; sums
    over its cells give every combination, whatever the number of questions.
    """
    shape = [len(own) + 1 for own in tried]
    bins = [np.searchsorted(own, values, "right") for own, values in zip(tried, certain.T, strict=True)]
    scores, costs = rows.scores[:, list(path)], rows.costs[:, list(path)].cumsum(1)
    totals = []
    for values in (scores, costs):
        total = np.zeros([len(own) for own in tried])
        for place in range(len(path)):
            size, own = shape[: place + 1], bins[: place + 1]
            cells = np.ravel_multi_index(tuple(own), tuple(size)) if own else np.zeros(len(values), int)
            sums = np.bincount(cells, values[:, place], prod(size)).reshape(size)
            for axis in range(sums.ndim):  # thresholds that are reached, or at earlier scales not reached
                stays = place < len(tried) and axis == place
                below = np.moveaxis(sums.cumsum(axis), axis, 0)
                kept = below[-1] - below[:-1] if stays else below[:-1]
                sums = np.moveaxis(kept, 0, axis)
            total += sums.reshape(sums.shape + (1,) * (len(tried) - sums.ndim))
        totals.append(total / len(values))
    return totals[0].round(12), totals[1] + rows.once


def calibrate(rows: Rows, target: Target, statistics: Sequence[Statistic]) -> Rule:
    """The best rule for a target, of all that `rules` gives.

    Raises:
        ValueError: None reaches the target.
    """
    return calibrate_all(rows, [target], statistics)[0]


def calibrate_all(rows: Rows, targets: Sequence[Target], statistics: Sequence[Statistic]) -> list[Rule]:
    """As `calibrate`, for several targets in one search."""
    best: list[Rule | None] = [None] * len(targets)
    finest = float(rows.scores[:, 0].mean())
    for statistic in statistics:
        for path, tried, accuracy, cost in rules(rows, statistic):
            for number, target in enumerate(targets):
                if (place := _best(target, accuracy, cost, finest)) is None:
                    continue
                chosen = tuple(float(own[at]) for own, at in zip(tried, place, strict=True))
                rule = Rule(statistic, path, chosen, float(accuracy[place]), float(cost[place]))
                known = best[number]
                if known is None or target.order(rule.accuracy, rule.cost) > target.order(known.accuracy, known.cost):
                    best[number] = rule
    if None in best:
        cheapest = rows.costs.mean(0).min() + rows.once
        raise ValueError(
            f"no chooser has a mean cost of {targets[best.index(None)].mean_cost:g}: expected {cheapest:g}"
        )
    return [rule for rule in best if rule]


def _best(target: Target, accuracy: Floats, cost: Floats, finest: float) -> tuple[int, ...] | None:
    """The place of the best combination of thresholds that reaches the target."""
    met = target.met(accuracy, cost, finest)
    if not met.any():
        return None
    first, second = (-cost, accuracy) if target.mean_cost is None else (accuracy, -cost)
    first = np.where(met, first, -inf)
    place = np.where(first == first.max(), second, -inf).argmax()
    return tuple(int(each) for each in np.unravel_index(place, accuracy.shape))


def follow(rows: Rows, rule: Rule) -> NDArray[np.int64]:
    """[Q] the place in the rule's path of each question's accepted answer."""
    if rule.statistic == "router":
        accepted = _below_best(rows, rule.path)[:, :-1] <= np.array(rule.thresholds)
    else:
        accepted = certainties(rows, rule.statistic, rule.path) >= np.array(rule.thresholds)
    return np.concatenate([accepted, np.ones((len(accepted), 1), bool)], 1).argmax(1)


def outcome(rows: Rows, rule: Rule) -> tuple[Floats, Floats]:
    """[Q] each question's score and the cost of all that it tried."""
    stops = follow(rows, rule)[:, None]
    path = list(rule.path)
    scores = np.take_along_axis(rows.scores[:, path], stops, 1)[:, 0]
    is_routed = rule.statistic == "router" and len(path) > 1
    paid = cast(Floats, rows.routed)[:, path] if is_routed else rows.costs[:, path].cumsum(1)
    return scores, np.take_along_axis(paid, stops, 1)[:, 0] + rows.once


def held_out(rows: Rows, target: Target, statistics: Sequence[Statistic]) -> tuple[float, float]:
    """Accuracy and mean cost when each half of the questions is judged by the rule that the other half gave.

    Raises:
        ValueError: There are fewer than two questions, or a half reaches no target.
    """
    if len(rows.scores) < 2:
        raise ValueError(f"expected at least two questions to calibrate on, found {len(rows.scores)}")
    order = np.random.default_rng(0).permutation(len(rows.scores))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    scores, costs = np.zeros(len(order)), np.zeros(len(order))
    for own, other in (halves, halves[::-1]):
        rule = calibrate(rows.of(other), target, statistics)
        scores[own], costs[own] = outcome(rows.of(own), rule)
    return float(scores.mean()), float(costs.mean())
