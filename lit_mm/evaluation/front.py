"""What choosing the scale per question reaches on a test: accuracy against mean cost, beside fixed scales and bounds.

The choosers come from validation, see `calibration.py`; the test's questions only judge them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from lit_mm.evaluation.answer_costs import UNITS, Cost
from lit_mm.evaluation.calibration import Floats, Rows, Rule, follow, outcome
from lit_mm.evaluation.oracle import Curve, envelope, fixed_mixture, oracle, shuffled
from lit_mm.evaluation.pictures import markdown_table, table_of
from lit_mm.evaluation.results import CELLS, DRAWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats32 = NDArray[np.float32]
Result = dict[str, Any]
"""The figures, as `front_of` returns them and JSON keeps them."""
BLUE, ORANGE, GREEN, GRAY = "#1f5fa8", "#c8641e", "#3a8f4d", "#8c8c8c"


def rules_of(told: dict[str, Any], scales: Sequence[str]) -> tuple[Rule, list[Rule]]:
    """The chooser of a chooser.json, and its front.

    Args:
        told: The file's content.
        scales: Names of the scales that were asked.

    Raises:
        ValueError: A path has a scale that was not asked.
    """
    if missing := {name for own in (told, *told["front"]) for name in own["path"]} - set(scales):
        raise ValueError(f"the chooser tries scale {min(missing)}, asked are {', '.join(scales)}")

    def rule(own: dict[str, Any]) -> Rule:
        path = tuple(list(scales).index(name) for name in own["path"])
        return Rule(told["statistic"], path, tuple(own["thresholds"]), own["accuracy"], 0.0)

    return rule(told), [rule(own) for own in told["front"]]


def front_of(rows: dict[Cost, Rows], chosen: Rule, front: Sequence[Rule]) -> Result:
    """All figures, ready for JSON; accuracies in 0..1, costs as in `rows`, those of all tried scales summed.

    Args:
        rows: The test's questions, for every cost that is known.
        chosen: The chooser.
        front: Choosers for other budgets.
    """
    own = next(iter(rows.values()))
    shares = drawn_shares(len(own.scores), seed=0)
    return {
        "questions": len(own.scores),
        "statistic": chosen.statistic,
        "path": [own.scales[scale] for scale in chosen.path],
        "stops": np.bincount(follow(own, chosen), minlength=len(chosen.path)).tolist(),
        "costs": {cost: _against(each, chosen, front, shares) for cost, each in rows.items()},
    }


def _against(rows: Rows, chosen: Rule, front: Sequence[Rule], shares: Floats32) -> Result:
    """Accuracy against one cost."""
    costs = rows.costs + rows.once
    drawn = _Draws(rows, shares)
    mixture, upper = fixed_mixture(rows.scores, costs), oracle(rows.scores, costs)
    scales = np.array(chosen.path)[follow(rows, chosen)]
    dealt = shuffled(scales, rows.scores, costs)
    means = zip(rows.scales, rows.scores.mean(0), costs.mean(0), drawn.intervals(rows.scores), strict=True)
    return {
        "fixed": [{"scale": n, "accuracy": float(a), "cost": float(c), "interval": i} for n, a, c, i in means],
        "auto": drawn.judged(*outcome(rows, chosen)),
        "front": [drawn.judged(*outcome(rows, rule)) for rule in front],
        "mixture": {"cost": mixture.tokens.tolist(), "accuracy": mixture.accuracy.tolist()},
        "shuffled": {"accuracy": dealt[0], "cost": dealt[1]},
        "oracle": {"accuracy": upper.accuracy, "cost": upper.mean_tokens},
    }


def drawn_shares(questions: int, seed: int) -> Floats32:
    """[draws, Q] each question's weight in draws of the bootstrap; fewer draws of very many questions."""
    rng = np.random.default_rng(seed)
    draws = int(np.clip(4 * CELLS // questions, 50, DRAWS))
    drawn = [np.bincount(rng.integers(0, questions, questions), minlength=questions) for _ in range(draws)]
    return np.array(drawn, np.float32) / np.float32(questions)


class _Draws:
    """Bootstrap over questions: the same draws for everything that is compared.

    Args:
        rows: The questions.
        shares: As `drawn_shares` makes them.
    """

    def __init__(self, rows: Rows, shares: Floats32) -> None:
        self.shares = shares
        self.mixture = fixed_mixture(rows.scores, rows.costs + rows.once)
        pairs = zip(self.means(rows.scores).clip(0, 1), self.means(rows.costs + rows.once), strict=True)
        self.mixtures = [envelope(scores[None], costs[None]) for scores, costs in pairs]

    def means(self, values: Floats) -> Floats:
        """[Q, …] -> [draws, …]."""
        return (self.shares @ values.astype(np.float32)).astype(np.float64)

    def intervals(self, values: Floats) -> list[list[float]]:
        """[Q, n] -> 95 % confidence intervals of the means."""
        return np.quantile(self.means(values), [0.025, 0.975], axis=0).T.tolist()

    def judged(self, scores: Floats, costs: Floats) -> Result:
        """A chooser's mean score and cost, and its gain over the best mixture of two fixed scales at its cost."""
        accuracy, cost = self.means(scores), self.means(costs)
        pairs = zip(self.mixtures, accuracy, cost, strict=True)
        gains = [float(own) - _at(mixture, spent) for mixture, own, spent in pairs]
        fixed = _at(self.mixture, costs.mean())
        return {
            "accuracy": float(scores.mean()),
            "interval": np.quantile(accuracy, [0.025, 0.975]).tolist(),
            "cost": float(costs.mean()),
            "cost_interval": np.quantile(cost, [0.025, 0.975]).tolist(),
            "fixed_at_cost": fixed,
            "gain": float(scores.mean()) - fixed,
            "gain_interval": np.quantile(gains, [0.025, 0.975]).tolist(),
        }


def _at(mixture: Curve, cost: float) -> float:
    """The mixture's accuracy at a cost, which rounding may have put just below the lowest one."""
    return float(mixture.at(max(float(cost), mixture.tokens[0])))


def cells(result: Result) -> list[list[str]]:
    """A header and a row for each fixed scale, for auto, and for its bounds; a column of accuracy and one per cost."""
    costs = result["costs"]
    own = next(iter(costs.values()))
    head = [
        "",
        "accuracy %",
        *(UNITS[cost][0] for cost in costs),
        f"gain over fixed at these {UNITS[next(iter(costs))][0]}, points",
    ]
    lines = [head]

    def line(name: str, accuracy: str, figures: Sequence[float | str], further: str = "") -> None:
        shown = [
            f"{each / UNITS[cost][1]:.4g}" if isinstance(each, float) else each
            for cost, each in zip(costs, figures, strict=True)
        ]
        lines.append([name, accuracy, *shown, further])

    for place, row in enumerate(own["fixed"]):
        line(f"fixed {row['scale']}", _percent(row), [each["fixed"][place]["cost"] for each in costs.values()])
    auto, (low, high) = own["auto"], own["auto"]["gain_interval"]
    gain = f"{100 * auto['gain']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    line("auto", _percent(auto), [each["auto"]["cost"] for each in costs.values()], gain)
    fixed = [f"{100 * each['auto']['fixed_at_cost']:.2f} %" for each in costs.values()]
    line("best two fixed scales at auto's cost", "", fixed)
    for name, label in (("shuffled", "auto's scales, shuffled"), ("oracle", "oracle")):
        line(label, f"{100 * own[name]['accuracy']:.2f}", [each[name]["cost"] for each in costs.values()])
    return lines


def _percent(row: Result) -> str:
    return f"{100 * row['accuracy']:.2f} ± {50 * (row['interval'][1] - row['interval'][0]):.2f}"


def _told(result: Result) -> tuple[str, str]:
    """Title and caption of the table."""
    stops = zip(result["path"], result["stops"], strict=True)
    shares = ", ".join(f"{scale} for {100 * count / result['questions']:.1f} %" for scale, count in stops)
    told = f"Auto takes {shares} of the questions, by {result['statistic']}; thresholds are from validation. Costs are "
    told += "those of all scales tried; the oracle and the shuffled scales pay for one. ± and ranges: 95 % confidence, "
    told += "bootstrap over questions."
    return f"The scale chosen per question ({result['questions']:,} questions)", told


def table(result: Result) -> Table:
    """The figures for the terminal."""
    (title, caption), (names, *lines) = _told(result), cells(result)
    found = table_of(title, [names], caption)
    for line in lines:
        found.add_row(*line, style="bold" if line[0] == "auto" else None)
    return found


def markdown(result: Result) -> str:
    """The same table for TensorBoard."""
    title, caption = _told(result)
    return markdown_table(title, cells(result), caption)


def draw(result: Result) -> Figure:
    """Accuracy (%) over the mean cost, one panel for each cost."""
    import matplotlib
    from matplotlib.figure import Figure

    costs = result["costs"]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.5, 4.2 * len(costs)), dpi=150, layout="constrained")
        panels = figure.subplots(len(costs), squeeze=False)[:, 0]
    for axes, (cost, own) in zip(panels, costs.items(), strict=True):
        draw_cost(axes, own, *UNITS[cost])
    panels[0].set_title(f"The scale chosen per question ({result['questions']:,} questions)", loc="left", fontsize=12)
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def draw_cost(axes: Axes, own: Result, unit: str, size: float) -> None:
    """One panel; `size` is what a cost is divided by to be in its unit."""
    axes.plot(*_line(own["mixture"], size), "--", color=BLUE, label="best mixture of two fixed scales", zorder=2)
    fixed = [(row["cost"] / size, 100 * row["accuracy"]) for row in own["fixed"]]
    axes.plot(*zip(*fixed, strict=True), "o", color=BLUE, markersize=7, label="fixed scale", zorder=4)
    for row, point in zip(own["fixed"], fixed, strict=True):
        axes.annotate(row["scale"], point, (8, -12), textcoords="offset points", color=BLUE, fontsize=9)
    points = sorted(own["front"], key=lambda each: each["cost"])
    across = [each["cost"] / size for each in points]
    ends = [[100 * each["interval"][end] for each in points] for end in (0, 1)]
    axes.fill_between(across, ends[0], ends[1], color=ORANGE, alpha=0.2, linewidth=0)
    axes.plot(
        across, [100 * each["accuracy"] for each in points], ".-", color=ORANGE, label="auto, all budgets", zorder=3
    )
    for name, marker, color, label in (
        ("auto", "*", ORANGE, "auto, as calibrated"),
        ("shuffled", "X", GRAY, "its scales, shuffled"),
        ("oracle", "D", GREEN, "oracle"),
    ):
        point = own[name]["cost"] / size, 100 * own[name]["accuracy"]
        axes.plot(*point, marker, color=color, markersize=14 if marker == "*" else 7, label=label, zorder=5)
    axes.grid(color="#e5e5e5")
    axes.set_xlabel(f"mean {unit} per question, all tried scales")
    axes.set_ylabel("accuracy (%)")


def _line(curve: dict[str, list[float]], size: float) -> tuple[list[float], list[float]]:
    return [cost / size for cost in curve["cost"]], [100 * each for each in curve["accuracy"]]
