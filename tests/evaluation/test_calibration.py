"""Calibration against brute force, a perfect statistic and a constant one, costs by hand, and the other half."""

from itertools import combinations, pairwise, product

import numpy as np
import pytest

from lit_mm.evaluation.calibration import (
    Rows,
    Rule,
    Target,
    calibrate,
    follow,
    held_out,
    outcome,
    rules,
    statistics_of,
    thresholds_of,
)
from lit_mm.evaluation.oracle import oracle
from lit_mm.evaluation.results import Judged

SCALES = ["64", "16", "4", "1"]
TOKENS = np.array([64.0, 16.0, 4.0, 1.0])


def rows(questions: int = 12, seed: int = 0, scales: int = 4, once: float = 0.0, informative: float = 1.0) -> Rows:
    """Finer scales are right more often; the statistic is the score with noise."""
    rng = np.random.default_rng(seed)
    scores = (rng.random((questions, scales)) < np.linspace(0.9, 0.4, scales)).astype(float)
    noisy = informative * scores + rng.normal(0, 1, scores.shape)
    texts = rng.integers(0, 2, scores.shape).astype(float)
    costs = np.tile(TOKENS[:scales], (questions, 1))
    read = np.where(np.arange(scales) == scales - 1, 0, 0.5) + 0.25  # the coarsest prompt's first token, and the router
    statistics = {"mean": noisy, "agreement": texts, "router": noisy}
    return Rows(SCALES[:scales], scores, costs, once, statistics, costs + read)


def routed_by_hand(made: Rows, path, slack: float) -> tuple[float, float, list[int]]:
    """As `by_hand`, for a router that chooses from the scales of a path."""
    scores, costs, stops = [], [], []
    for question, own in enumerate(made.statistics["router"]):
        near = [place for place, scale in enumerate(path) if max(own[list(path)]) - own[scale] <= slack]
        stops.append(near[0])
        scale = path[near[0]]
        scores.append(made.scores[question, scale])
        coarsest = made.scores.shape[1] - 1
        costs.append(made.once + made.costs[question, scale] + 0.25 + (0 if scale == coarsest else 0.5))
    return float(np.mean(scores)), float(np.mean(costs)), stops


@pytest.mark.parametrize("target", [Target(30), Target(12.5), Target(max_loss=0), Target(max_loss=0.2)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_best_rule_of_a_router_is_that_of_brute_force(target, seed):
    made = rows(9, seed, 3, once=2.0)
    rule = calibrate(made, target, ["router"])
    found = [(made.scores[:, n].mean(), made.costs[:, n].mean() + 2) for n in range(3)]
    for path in ((2, 1), (2, 0), (2, 1, 0)):
        own = made.statistics["router"][:, list(path)]
        gaps = sorted({0.0, *(own.max(1, keepdims=True) - own).ravel()})
        found += [
            routed_by_hand(made, path, slack)[:2] for slack in [0.0, *((a + b) / 2 for a, b in pairwise(gaps)), 99]
        ]
    if target.mean_cost is not None:
        best = max((own for own in found if own[1] <= target.mean_cost), key=lambda own: (own[0], -own[1]))
    else:
        least = made.scores[:, 0].mean() - target.max_loss - 1e-12
        best = min((own for own in found if own[0] >= least), key=lambda own: (own[1], -own[0]))
    assert (rule.accuracy, rule.cost) == pytest.approx(best)


def test_every_slack_of_a_router_is_counted_right():
    made = rows(60, 1)
    for path, tried, accuracy, cost in rules(made, "router"):
        for place, slack in enumerate(tried[0] if tried else []):
            *expected, stops = routed_by_hand(made, path, slack)
            assert (accuracy[place], cost[place]) == pytest.approx(expected)
            rule = Rule("router", path, (slack,), 0, 0)
            assert follow(made, rule).tolist() == stops
            scores, costs = outcome(made, rule)
            assert (scores.mean(), costs.mean()) == pytest.approx(expected)
        if not tried:
            assert outcome(made, Rule("router", path, (), 0, 0))[1].mean() == pytest.approx(cost)


def test_a_router_that_knows_the_losses_needs_one_answer_and_the_coarsest_prompt():
    """With a perfect score it reaches the oracle's accuracy at the oracle's cost and what reading the scores costs."""
    made = rows(300)
    made.statistics["router"][:] = made.scores
    best, rule = oracle(made.scores, TOKENS), calibrate(made, Target(sum(TOKENS)), ["router"])
    assert rule.accuracy == pytest.approx(best.accuracy)
    assert rule.cost == pytest.approx(best.mean_tokens + 0.25 + 0.5 * (best.needed != 3).mean())


def by_hand(made: Rows, statistic: str, path, thresholds) -> tuple[float, float, list[int]]:
    """Accuracy, mean cost, and where each question stops, question by question."""
    scores, costs, stops = [], [], []
    for question in range(len(made.scores)):
        cost = made.once
        for place, scale in enumerate(path):
            cost += made.costs[question, scale]
            own = made.statistics[statistic][question]
            certain = own[scale]
            if statistic == "agreement":
                certain = float(place > 0 and own[scale] == own[path[place - 1]])
            if place == len(path) - 1 or certain >= thresholds[place]:
                break
        scores.append(made.scores[question, scale])
        costs.append(cost)
        stops.append(place)
    return float(np.mean(scores)), float(np.mean(costs)), stops


def brute_force(made: Rows, statistic: str, target: Target) -> tuple[float, float]:
    """The best accuracy and mean cost of all paths and all thresholds between neighboring values."""
    found, finest = [], made.scores[:, 0].mean()
    for length in range(1, made.scores.shape[1] + 1):
        for path in combinations(reversed(range(made.scores.shape[1])), length):
            values = [sorted(set(made.statistics[statistic][:, scale])) for scale in path[:-1]]
            tried = [[(a + b) / 2 for a, b in pairwise(own)] for own in values]
            tried = [[0.5]] * (length - 1) if statistic == "agreement" else tried
            found += [by_hand(made, statistic, path, each)[:2] for each in product(*tried)]
    if target.mean_cost is not None:
        accuracy, cost = max((own for own in found if own[1] <= target.mean_cost), key=lambda own: (own[0], -own[1]))
    else:
        loss = target.max_loss
        accuracy, cost = min(
            (own for own in found if own[0] >= finest - loss - 1e-12), key=lambda own: (own[1], -own[0])
        )
    return accuracy, cost


@pytest.mark.parametrize("statistic", ["mean", "agreement"])
@pytest.mark.parametrize("target", [Target(30), Target(12.5), Target(max_loss=0), Target(max_loss=0.2)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_best_rule_is_that_of_brute_force(statistic, target, seed):
    made = rows(9, seed, 3, once=2.0)
    rule = calibrate(made, target, [statistic])
    accuracy, cost = brute_force(made, statistic, target)
    assert (rule.accuracy, rule.cost) == pytest.approx((accuracy, cost))
    assert by_hand(made, statistic, rule.path, rule.thresholds)[:2] == pytest.approx((accuracy, cost))


def test_every_combination_of_thresholds_is_counted_right():
    made = rows(40, 1)
    for statistic in ("mean", "agreement"):
        for path, tried, accuracy, cost in rules(made, statistic):
            places = [tuple(np.random.default_rng(n).integers(0, accuracy.shape)) for n in range(3)] if tried else [()]
            for place in places:
                chosen = [own[at] for own, at in zip(tried, place, strict=True)]
                *expected, stops = by_hand(made, statistic, path, chosen)
                assert (accuracy[place], cost[place]) == pytest.approx(expected)
                rule = Rule(statistic, path, tuple(chosen), 0, 0)
                assert follow(made, rule).tolist() == stops
                scores, costs = outcome(made, rule)
                assert (scores.mean(), costs.mean()) == pytest.approx(expected)


def test_costs_of_all_tried_scales_are_summed():
    made = rows(4, once=100.0)
    made.statistics["mean"][:] = [[9, 0, 0, 1], [9, 0, 1, 0], [9, 1, 0, 0], [9, 0, 0, 0]]
    scores, costs = outcome(made, Rule("mean", (3, 2, 1, 0), (0.5, 0.5, 0.5), 0, 0))
    assert costs.tolist() == [101, 105, 121, 185]
    assert scores.tolist() == made.scores[[0, 1, 2, 3], [3, 2, 1, 0]].tolist()
    assert outcome(made, Rule("mean", (3, 0), (0.5,), 0, 0))[1].tolist() == [101, 165, 165, 165]


def test_a_perfect_statistic_reaches_the_oracle():
    made = rows(300)
    made.statistics["mean"][:] = made.scores
    best = oracle(made.scores, TOKENS)
    rule = calibrate(made, Target(sum(TOKENS)), ["mean"])
    assert rule.accuracy == pytest.approx(best.accuracy) == made.scores.max(1).mean()
    tried = TOKENS[::-1].cumsum()[::-1]  # of the oracle's scale and all coarser ones
    expected = np.where(best.right, tried[best.needed], tried[0]).mean()
    assert outcome(made, Rule("mean", (3, 2, 1, 0), (0.5,) * 3, 0, 0))[1].mean() == pytest.approx(expected)
    assert rule.cost <= expected


def test_a_constant_statistic_is_a_fixed_scale():
    made = rows(300)
    made.statistics["mean"][:] = -0.25
    for budget in (1, 3.9, 4, 20, 64, 1000):
        rule = calibrate(made, Target(budget), ["mean"])
        allowed = [scale for scale in range(4) if TOKENS[scale] <= budget]
        assert rule.thresholds == () and len(rule.path) == 1
        assert rule.accuracy == pytest.approx(max(made.scores[:, scale].mean() for scale in allowed))


def test_the_other_half_is_not_seen():
    """With a statistic that says nothing, the half that was fitted looks better than it is; the other half tells."""
    lucky, honest = [], []
    for seed in range(20):
        made = rows(60, seed, informative=0.0)
        lucky.append(calibrate(made, Target(30), ["mean"]).accuracy)
        honest.append(held_out(made, Target(30), ["mean"])[0])
    assert np.mean(lucky) > np.mean(honest) + 0.02
    order = np.random.default_rng(0).permutation(60)
    first, second = made.of(order[:30]), made.of(order[30:])
    scores = [
        outcome(one, calibrate(other, Target(30), ["mean"]))[0] for one, other in ((first, second), (second, first))
    ]
    assert honest[-1] == pytest.approx(np.concatenate(scores).mean())


def test_thresholds_lie_between_values_evenly_over_the_questions():
    assert thresholds_of(np.array([3.0, 1.0, 1.0, 2.0, -np.inf]), 9).tolist() == [1.5, 2.5]
    assert thresholds_of(np.full(5, -np.inf), 9).tolist() == []
    many = thresholds_of(np.arange(1000.0), most=9)
    assert len(many) == 9 and np.abs(many - np.arange(100, 1000, 100)).max() <= 1
    assert len(thresholds_of(np.r_[np.zeros(900), np.arange(1, 101.0)], most=9)) <= 9


def test_statistics_of_rows():
    infinite = -np.inf
    question = Judged(
        "1",
        "",
        "?",
        ["a"],
        ["x", "y", "x"],
        [0, 1, 0],
        [-3, -1, 0],
        [16, 4, 1],
        [3, 1, 0],
        [-2, -1, infinite],
        [1, 2, infinite],
    )
    found = statistics_of([question])
    assert found["mean"].tolist() == [[-1, -1, infinite]]
    assert found["least"].tolist() == [[-2, -1, infinite]] and found["margin"].tolist() == [[1, 2, infinite]]
    same = found["agreement"][0]
    assert same[0] == same[2] != same[1]


def test_targets_that_cannot_be_reached_are_named():
    with pytest.raises(ValueError, match=r"no chooser has a mean cost of 0.5: .* 1"):
        calibrate(rows(), Target(0.5), ["mean"])
    with pytest.raises(ValueError, match="one target"):
        Target(3, 0.1)


def test_many_scales_are_searched_by_shorter_paths():
    rng = np.random.default_rng(0)
    scores, noise = rng.random((50, 8)).round(), rng.random((50, 8))
    made = Rows([str(n) for n in range(8)], scores, np.tile(np.arange(8.0, 0, -1), (50, 1)), 0, {"mean": noise})
    assert {len(path) for path, *_ in rules(made, "mean")} == {1, 2, 3}


@pytest.mark.parametrize("statistic", ["mean", "least", "margin", "agreement"])
def test_questions_without_images_are_answered_once(statistic):
    figures = [[-9.0, -9.0], [0, 0], [1, 1], [-9.0, -9.0], [0.0, 0.0]]
    shown = Judged("1", "", "?", ["a"], ["x", "y"], [1, 0], figures[0], [16, 1], *figures[2:])
    text = Judged("2", "", "?", ["a"], ["x", "x"], [1, 1], figures[0], [0, 0], *figures[2:])
    found = statistics_of([shown, text])
    rows = Rows(["16", "1"], np.ones((2, 2)), np.ones((2, 2)), 0, found)
    assert follow(rows, Rule(statistic, (1, 0), (0.5,), 0, 0)).tolist() == [1, 0]
