"""The front of a test: figures by hand, intervals against the normal approximation, and no test row in a threshold."""

import json
import math

import numpy as np
import pytest

from lit_mm.evaluation.calibration import Rows, Rule, Target, calibrate, outcome
from lit_mm.evaluation.front import draw, front_of, markdown, rules_of, table
from lit_mm.evaluation.oracle import fixed_mixture
from tests.evaluation.test_calibration import TOKENS
from tests.evaluation.test_calibration import rows as made

PATH = (3, 1, 0)


def result(rows: Rows, chosen: Rule):
    front = [calibrate(rows, Target(budget), ["mean"]) for budget in (4, 16, 40)]
    return front_of(
        {"tokens": rows, "ms": Rows(rows.scales, rows.scores, rows.costs, 5.0, rows.statistics)}, chosen, front
    )


def test_figures_by_hand():
    rows = made(500)
    chosen = Rule("mean", PATH, (0.7, 0.6), 0, 0)
    found = result(rows, chosen)
    stops = [
        next(p for p, scale in enumerate(PATH) if p == 2 or own[scale] >= (0.7, 0.6)[p])
        for own in rows.statistics["mean"]
    ]
    assert found["stops"] == [stops.count(place) for place in range(3)]
    costs, scores = np.cumsum(TOKENS[list(PATH)])[stops], rows.scores[range(500), np.array(PATH)[stops]]
    for cost, once in (("tokens", 0), ("ms", 5)):
        own = found["costs"][cost]
        assert own["auto"]["accuracy"] == pytest.approx(scores.mean())
        assert own["auto"]["cost"] == pytest.approx(costs.mean() + once)
        fixed = fixed_mixture(rows.scores, TOKENS + once).at(costs.mean() + once)
        assert own["auto"]["fixed_at_cost"] == pytest.approx(fixed)
        assert own["auto"]["gain"] == pytest.approx(scores.mean() - fixed)
        share = np.bincount(np.array(PATH)[stops], minlength=4) / 500
        assert own["shuffled"] == pytest.approx(
            {"accuracy": rows.scores.mean(0) @ share, "cost": TOKENS @ share + once}
        )
        assert [row["cost"] for row in own["fixed"]] == (TOKENS + once).tolist()


def test_intervals_are_those_of_the_normal_approximation():
    rows, chosen = made(2000), Rule("mean", PATH, (0.7, 0.6), 0, 0)
    own = result(rows, chosen)["costs"]["tokens"]["auto"]
    for name, values in zip(("interval", "cost_interval"), outcome(rows, chosen), strict=True):
        half = 1.96 * values.std() / math.sqrt(2000)
        assert own[name] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)


def test_the_gain_of_a_statistic_that_says_nothing_is_not_above_zero():
    gains = []
    for seed in range(10):
        rows = made(2000, seed, informative=0.0)
        gains.append(result(rows, Rule("mean", (3, 0), (0.0,), 0, 0))["costs"]["tokens"]["auto"]["gain_interval"])
    assert sum(low > 0 for low, _ in gains) <= 1
    rows = made(2000, informative=3.0)
    assert result(rows, Rule("mean", (3, 0), (1.5,), 0, 0))["costs"]["tokens"]["auto"]["gain_interval"][0] > 0


def test_a_fixed_scale_gains_nothing():
    own = result(made(100), Rule("mean", (3,), (), 0, 0))["costs"]["tokens"]
    assert own["auto"]["gain"] == 0 and own["auto"]["cost"] == 1 == own["shuffled"]["cost"]


def test_tables_and_picture():
    found = json.loads(json.dumps(result(made(100), Rule("mean", PATH, (0.7, 0.6), 0, 0))))
    assert "| auto | " in markdown(found) and "best two fixed scales at auto's cost" in markdown(found)
    assert len(table(found).rows) == 4 + 4
    assert len(draw(found).axes) == 2


def test_rules_are_those_of_the_file():
    """Whatever the test's questions are: they are not an argument."""
    told = {"statistic": "least", "path": ["1", "16"], "thresholds": [-0.5], "accuracy": 0.5, "front": []}
    told["front"] = [{"path": ["4"], "thresholds": [], "accuracy": 0.4}]
    chosen, front = rules_of(told, ["64", "16", "4", "1"])
    assert (chosen.path, chosen.thresholds, chosen.statistic) == ((3, 1), (-0.5,), "least")
    assert [rule.path for rule in front] == [(2,)]
    with pytest.raises(ValueError, match="tries scale 16, asked are 4, 1"):
        rules_of(told, ["4", "1"])
