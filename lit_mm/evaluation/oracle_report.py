"""The oracle of a test as JSON, tables and a picture: what each scale, the oracle and the envelope reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from rich.table import Table

from lit_mm.evaluation.efficiency import untrained
from lit_mm.evaluation.oracle import Curve, checked, envelope, fixed_mixture, oracle, shuffled
from lit_mm.evaluation.pictures import draw_untrained, markdown_table, table_of
from lit_mm.evaluation.results import types_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]
"""The figures, as `results_of` returns them and JSON keeps them."""

BLUE, ORANGE, GRAY = "#1f5fa8", "#c8641e", "#8c8c8c"
MOST_CORNERS = 200
MOST_TYPES = 12
"""The picture shows the most frequent question types."""


def results_of(
    scores: ArrayLike,
    tokens: ArrayLike,
    scales: Sequence[str],
    types: Sequence[str] | None = None,
    trained: Sequence[bool] | None = None,
) -> Result:
    """All figures about one benchmark, ready for JSON; accuracies and shares in 0..1.

    Args:
        scores: [questions, scales] of the answers, 0..1.
        tokens: [scales] or [questions, scales] visual tokens of a question.
        scales: The scales' names, e.g. `576` or `8x16`.
        types: [questions] each question's type, or several as `a, b`; None or all alike: no figures by
            type.
        trained: [scales] whether the model was trained at each; None: at all.

    Raises:
        ValueError: The arguments do not fit each other, or no question has visual tokens.
    """
    scores, tokens = checked(scores, tokens)
    if len(scales) != scores.shape[1]:
        raise ValueError(f"scales: expected {scores.shape[1]} names, as scores has columns, found {list(scales)}")
    if types is not None and len(types) != len(scores):
        raise ValueError(f"types: expected {len(scores)}, one for each question, found {len(types)}")
    best, mixture = envelope(scores, tokens), fixed_mixture(scores, tokens)
    found = oracle(scores, tokens)
    if not (means := tokens.mean(0)).all():
        raise ValueError("tokens: expected visual tokens at every scale, found none: no question shows an image")
    columns: dict[str, Sequence[Any]] = {
        "scale": scales,
        "trained": [True] * len(scales) if trained is None else trained,
        "mean_tokens": means.tolist(),
        "accuracy": scores.mean(0).tolist(),
        "needed_by": found.histogram.tolist(),
        "envelope": best.at(means).tolist(),
    }
    dealt = shuffled(found.needed, scores, tokens)
    return {
        "questions": len(scores),
        "scales": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        "oracle": {"accuracy": found.accuracy, "right": float(found.right.mean()), "mean_tokens": found.mean_tokens},
        "shuffled": {"accuracy": dealt[0], "mean_tokens": dealt[1]},
        "fixed_at_oracle_tokens": float(mixture.at(found.mean_tokens)),
        "no_scale_right": int((~found.right).sum()),
        "agreement": found.agreement.tolist(),
        "envelope": _corners(best),
        "fixed_mixture": _corners(mixture),
        "types": _by_type(scores, tokens, [""] if types is None else types),
    }


def _corners(curve: Curve) -> dict[str, list[float]]:
    """A curve's corners, or as many points on it, evenly by log(tokens), if it has more than 200."""
    tokens = curve.tokens
    if len(tokens) > MOST_CORNERS:
        first, last = tokens[0], tokens[-1]
        tokens = np.geomspace(max(first, 0.01), last, MOST_CORNERS).clip(first, last)
    return {"tokens": tokens.tolist(), "accuracy": curve.at(tokens).tolist()}


def _by_type(scores: np.ndarray, tokens: np.ndarray, types: Sequence[str]) -> dict[str, Result]:
    """The main figures of each question type, the most frequent first; none if all questions are alike. A question of
    several types counts for each."""
    each = [types_of(kind) for kind in types]
    names = [name for name, _ in Counter(name for kinds in each for name in kinds).most_common()]
    found = {}
    for name in names if len(names) > 1 else []:
        own = np.array([name in kinds for kinds in each])
        chosen = oracle(scores[own], tokens[own])
        found[name or "no type"] = {
            "questions": int(own.sum()),
            "accuracy": scores[own].mean(0).tolist(),
            "needed_by": chosen.histogram.tolist(),
            "no_scale_right": int((~chosen.right).sum()),
            "oracle": {"accuracy": chosen.accuracy, "mean_tokens": chosen.mean_tokens},
        }
    return found


def tables(result: Result) -> list[Table]:
    """The figures as tables for the terminal: by scale, by question type, agreement between scales."""
    return [table_of(*part) for part in _parts(result)]


def markdown(result: Result) -> str:
    """The same tables for TensorBoard."""
    return "\n\n".join(markdown_table(*part) for part in _parts(result))


def _parts(result: Result) -> list[tuple[str, list[list[str]], str]]:
    """Title, cells with their header, and caption of each table."""
    parts = [(f"Oracle on {result['questions']:,} questions", _scale_cells(result), _caption(result))]
    if result["types"]:
        parts.append(("By question type: accuracy % at each scale, and the oracle", _type_cells(result), ""))
    names = [row["scale"] + untrained(row) for row in result["scales"]]
    agreement = [[name, *map(_percent, row)] for name, row in zip(names, result["agreement"], strict=True)]
    told = "% of the questions that both scales answer right, or both wrong"
    return [*parts, ("Agreement between scales", [["scale", *names], *agreement], told)]


def _scale_cells(result: Result) -> list[list[str]]:
    cells = [["scale", "mean tokens", "accuracy %", "needed by %", "best possible %"]]
    for row in result["scales"]:
        needed = _percent(row["needed_by"] / result["questions"])
        percents = [_percent(row["accuracy"]), needed, _percent(row["envelope"])]
        cells.append([row["scale"] + untrained(row), f"{row['mean_tokens']:.1f}", *percents])
    for name, label in (("oracle", "oracle"), ("shuffled", "oracle's scales, shuffled")):
        cells.append([label, f"{result[name]['mean_tokens']:.1f}", _percent(result[name]["accuracy"]), "", ""])
    fixed = _percent(result["fixed_at_oracle_tokens"])
    cells.append(["best two fixed scales", f"{result['oracle']['mean_tokens']:.1f}", fixed, "", ""])
    return cells


def _caption(result: Result) -> str:
    wrong = _percent(result["no_scale_right"] / result["questions"])
    return (
        "Needed by: these are the fewest tokens that answer right (score >= 0.5). No scale "
        f"answers {wrong} % of the questions right; the oracle gives them the fewest tokens. Best possible: the "
        "highest accuracy of any choice per question with as many tokens on average."
    )


def _type_cells(result: Result) -> list[list[str]]:
    names = [row["scale"] + untrained(row) for row in result["scales"]]
    cells = [["type", "questions", *names, "oracle %", "oracle's tokens", "no scale right %"]]
    for name, own in result["types"].items():
        wrong = _percent(own["no_scale_right"] / own["questions"])
        ends = [_percent(own["oracle"]["accuracy"]), f"{own['oracle']['mean_tokens']:.1f}", wrong]
        cells.append([name, f"{own['questions']:,}", *map(_percent, own["accuracy"]), *ends])
    return cells


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def draw(result: Result) -> Figure:
    """Accuracy over tokens with fixed scales, their best mixture, the oracle and the envelope; below, how many
    questions need each scale, and the same by question type if there are several."""
    import matplotlib
    from matplotlib.figure import Figure

    types = min(len(result["types"]), MOST_TYPES)
    heights = [4.6, 2.6, *([0.9 + 0.32 * types] if types else [])]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, sum(heights) + 0.6), dpi=150, layout="constrained")
        axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    draw_envelope(axes[0], result)
    draw_needed(axes[1], result)
    if types:
        draw_types(axes[2], result)
    return figure


def draw_envelope(axes: Axes, result: Result) -> None:
    """Accuracy (%) over mean tokens on a log axis. A mixture is a straight line in tokens, so a curve here."""
    fixed = [(row["mean_tokens"], 100 * row["accuracy"]) for row in result["scales"]]
    budgets = np.geomspace(min(fixed)[0], max(fixed)[0], 400)
    for name, color, style, label in (
        ("envelope", ORANGE, "-", "best possible choice per question"),
        ("fixed_mixture", BLUE, "--", "best mixture of two fixed scales"),
    ):
        curve = Curve(*(np.array(result[name][key]) for key in ("tokens", "accuracy")))
        axes.plot(budgets, 100 * curve.at(budgets), style, color=color, linewidth=2, label=label, zorder=2)
    axes.plot(*zip(*fixed, strict=True), "o", color=BLUE, markersize=7, label="fixed scale", zorder=4)
    points = zip(fixed, result["scales"], strict=True)
    draw_untrained(axes, [point for point, row in points if untrained(row)], BLUE)
    for point in fixed:
        _note(axes, f"{point[1]:.1f}", point, (12, -15), BLUE)
    best, dealt = ((result[name]["mean_tokens"], 100 * result[name]["accuracy"]) for name in ("oracle", "shuffled"))
    axes.plot(*best, "*", color=ORANGE, markersize=15, label="oracle", zorder=5)
    _note(axes, f"{best[1]:.1f} at {best[0]:.1f} tokens", best, (0, 11), ORANGE)
    axes.plot(*dealt, "X", color=GRAY, markersize=8, label="its scales, shuffled", zorder=5)
    _note(axes, f"{dealt[1]:.1f}", dealt, (-14, 8), GRAY)
    axes.set_xscale("log", base=2)
    ticks = {f"{tokens:.3g}" if tokens < 100 else f"{tokens:.0f}": tokens for tokens, _ in fixed}
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_xlabel("mean visual tokens per question")
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(f"Choosing the scale per question ({result['questions']:,} questions)", loc="left", fontsize=12)


def _note(axes: Axes, text: str, point: tuple[float, float], offset: tuple[int, int], color: str) -> None:
    axes.annotate(text, point, offset, textcoords="offset points", ha="center", color=color, fontsize=9)


def draw_needed(axes: Axes, result: Result) -> None:
    """Share of the questions (%) that need each scale, fewest tokens first, and of those that no scale answers."""
    rows = sorted(result["scales"], key=lambda row: row["mean_tokens"])
    shares = [
        100 * count / result["questions"] for count in [*(row["needed_by"] for row in rows), result["no_scale_right"]]
    ]
    bars = axes.bar(range(len(shares)), shares, 0.72, color=[*_shades(len(rows)), "#cfcfcf"], zorder=2)
    axes.bar_label(bars, [f"{share:.1f}" for share in shares], padding=2, fontsize=10)
    axes.set_xticks(
        range(len(shares)),
        [*(row["scale"] + untrained(row).replace(" ", "\n") for row in rows), "none"],
        fontsize=11 if len(rows) < 8 else 9,
    )
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.15)
    axes.grid(axis="y", color="#e5e5e5", zorder=0)
    axes.set_ylabel("questions (%)")
    axes.set_title("Fewest tokens that answer right", loc="left", fontsize=12)


def draw_types(axes: Axes, result: Result) -> None:
    """The same for each question type, as a bar of pieces, with the oracle's mean tokens behind it."""
    order = np.argsort([row["mean_tokens"] for row in result["scales"]], kind="stable")
    colors = [*_shades(len(order)), "#cfcfcf"]
    shown = list(result["types"].items())[:MOST_TYPES]
    for place, (_, own) in enumerate(shown):
        pieces = [own["needed_by"][scale] for scale in order] + [own["no_scale_right"]]
        ends = 100 * np.cumsum(pieces) / own["questions"]
        axes.barh(place, np.diff(ends, prepend=0), 0.72, ends - np.diff(ends, prepend=0), color=colors, zorder=2)
        axes.text(101, place, f"{own['oracle']['mean_tokens']:.1f} tokens", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [f"{name} ({own['questions']:,})" for name, own in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("questions (%)")
    among = (
        "type"
        if len(shown) == len(result["types"])
        else f"type, the {MOST_TYPES} most frequent of {len(result['types'])}"
    )
    axes.set_title(f"… by question {among}; right: the oracle's mean tokens", loc="left", fontsize=12)


def _shades(count: int) -> list[Any]:
    """Blues from light (few tokens) to dark."""
    from matplotlib import colormaps

    return list(colormaps["Blues"](np.linspace(0.3, 0.95, count)))
