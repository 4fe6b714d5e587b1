"""A table, a picture and a section of text for each claim, from the questions that its runs were asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.evidence.claims import Claim
from experiments.evidence.runs import Run, Runs
from lit_mm.evaluation.answer_costs import UNITS, rows_by_cost
from lit_mm.evaluation.calibration import CHOOSER, Rows, follow, outcome
from lit_mm.evaluation.front import draw_cost, rules_of
from lit_mm.evaluation.metrics import METRICS
from lit_mm.evaluation.oracle import fixed_mixture, oracle
from lit_mm.evaluation.pictures import markdown_rows
from lit_mm.evaluation.results import Judged, intervals, read_questions, scores_of

Floats = NDArray[np.float64]
COLORS = ["#8c8c8c", "#1f5fa8", "#c8641e"]
RULES = {
    "exact": "an answer is right or wrong",
    "anls": "ANLS",
    "words": "of an answer, the share of the words that are right at their places",
}
FIELDS = ("company", "date", "total", "address")
"""What questions about real receipts ask for."""


@dataclass(frozen=True)
class Scored:
    """What one side answered at one scale, or by a chooser.

    Args:
        scores: [seeds, Q] in 0..1.
        tokens: Mean visual tokens of a question.
    """

    scores: Floats
    tokens: float

    @property
    def cell(self) -> str:
        """Mean in %, and the lowest and highest seed."""
        own = 100 * self.scores.mean(1)
        spread = f" ({own.min():.1f} to {own.max():.1f})" if len(own) > 1 else ""
        return f"{own.mean():.1f}{spread}"


@dataclass(frozen=True)
class Found:
    """The results of a claim.

    Args:
        claim: The claim.
        seeds: That all sides have.
        groups: `all` and types of questions -> side -> name of the scale or chooser -> scores.
        runs: The runs behind it.
    """

    claim: Claim
    seeds: list[int]
    groups: dict[str, dict[str, dict[str, Scored]]]
    runs: list[Run]


def difference(scores: Floats, baseline: Floats) -> tuple[float, float, float]:
    """Mean paired difference of scores [seeds, Q], in points, and the 95 % interval of a bootstrap over questions, each
    with the mean of its seeds."""
    own = 100 * (scores - baseline).mean(0)
    low, high = intervals(own[:, None])[0]
    return float(own.mean()), float(low), float(high)


def told(scores: Floats, baseline: Floats) -> str:
    """`+0.50 (-0.20 to +1.20)`."""
    mean, low, high = difference(scores, baseline)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def collect(claim: Claim, runs: Runs, seeds: Sequence[int], metric: str) -> Found | None:
    """The results of the seeds that all sides have; None if there is none.

    Raises:
        ValueError: Two runs were asked other questions.
    """
    done = [seed for seed in seeds if not any(runs.find(arm, seed).missing for arm in claim.arms)]
    if not done:
        return None
    made = [runs.find(arm, seed) for arm in claim.arms for seed in done]
    read = {run.results: read_questions(run.results / "accuracy_tokens.parquet") for run in made}
    asked = {tuple((own.id, own.question) for own in questions) for questions, _ in read.values()}
    if len(asked) > 1:
        raise ValueError(f"{claim.title}: the runs in {runs.folder} were asked different questions")
    if claim.auto:
        return Found(claim, done, {"all": {"": _chosen(made)}}, made)
    answered = [
        (side, *read[runs.find(arm, seed).results])
        for side, arms in claim.sides.items()
        for arm in arms
        for seed in done
    ]
    return Found(claim, done, grouped(answered, metric), made)


def grouped(
    answered: Iterable[tuple[str, Sequence[Judged], Sequence[str]]], metric: str
) -> dict[str, dict[str, dict[str, Scored]]]:
    """Side, questions and scales of every run -> group -> side -> scale -> scores, a row for each of a side's runs."""
    columns: dict[tuple[str, str, str], list[Floats]] = {}
    for side, questions, scales in answered:
        for group, scores in scored(questions, metric).items():
            for scale, own in zip(scales, scores.T, strict=True):
                columns.setdefault((group, side, scale), []).append(own)
    groups: dict[str, dict[str, dict[str, Scored]]] = {}
    for (group, side, scale), rows in columns.items():
        tokens = prod(map(int, scale.split("x")))  # of a video: sets of frames times tokens
        groups.setdefault(group, {}).setdefault(side, {})[scale] = Scored(np.array(rows), tokens)
    return groups


def scored(questions: Sequence[Judged], metric: str) -> dict[str, Floats]:
    """`all` and, if there are several, every type of question -> [Q, S] scores by a metric; exact is what `test` judges
    by. By words, the types are those of the words: numbers and others."""
    if metric == "words":
        kinds = {"all": lambda word: True, "numbers": str.isdigit, "other words": lambda word: not word.isdigit()}
        return {name: np.array([_words(own, wanted) for own in questions]) for name, wanted in kinds.items()}
    scores = scores_of(questions)
    if metric != "exact":
        judge = METRICS[metric]()
        scores = np.array([[judge.score(answer, own.references) for answer in own.answers] for own in questions])
    types = np.array([type_of(question) for question in questions])
    names = sorted({*types} - {""}) if len({*types}) > 1 else []
    return {"all": scores} | {name: scores[types == name] for name in names}


def _words(question: Judged, wanted: Callable[[str], bool]) -> list[float]:
    """[S] of an answer's wanted words, the share that each scale tells at their places."""
    expected = question.references[0].split()
    places = [place for place, word in enumerate(expected) if wanted(word)]
    answers = [dict(enumerate(answer.split())) for answer in question.answers]
    return [sum(own.get(place) == expected[place] for place in places) / len(places) for own in answers]


def type_of(question: Judged) -> str:
    """Its type; of questions about receipts, which have none, what they ask for."""
    return question.type or next((name for name in FIELDS if name in question.question), "")


def _chosen(runs: Sequence[Run]) -> dict[str, Scored]:
    """What fixed scales, the chooser and its bounds reach, over runs with one seed each."""
    each = [choices(run.results) for run in runs]
    means = {name: float(np.mean([own[name][1] for own in each])) for name in each[0]}
    return {name: Scored(np.array([own[name][0] for own in each]), means[name]) for name in each[0]}


def choices(folder: Path) -> dict[str, tuple[Floats, float]]:
    """Name -> score of every question [Q] and mean visual tokens, of a run with a chooser.

    `random` is the mean over dealing out the scales that the chooser ends at, which pays for these alone; the best
    mixture is what a coin between two fixed scales reaches at auto's mean tokens.
    """
    questions, scales = read_questions(folder / "accuracy_tokens.parquet")
    result = json.loads((folder / "accuracy_tokens.json").read_text())
    rows = rows_by_cost(questions, result["scales"])["tokens"]
    rule, _ = rules_of(json.loads((folder / CHOOSER).read_text()), scales)
    scores, paid = outcome(rows, rule)
    shares = np.bincount(np.array(rule.path)[follow(rows, rule)], minlength=len(scales)) / len(scores)
    upper, means = oracle(rows.scores, rows.costs), rows.costs.mean(0)
    found = {f"fixed {scale}": (own, mean) for scale, own, mean in zip(scales, rows.scores.T, means, strict=True)}
    return found | {
        "random": (rows.scores @ shares, means @ shares),
        "best mixture": (rows.scores @ mixture_of(rows, paid.mean()), paid.mean()),
        "auto": (scores, paid.mean()),
        "oracle": (np.take_along_axis(rows.scores, upper.needed[:, None], 1)[:, 0], upper.mean_tokens),
    }


def mixture_of(rows: Rows, cost: float) -> Floats:
    """[S] share of the questions that the best mixture of two fixed scales gives to each, for a mean cost."""
    corners = fixed_mixture(rows.scores, rows.costs).tokens
    places = [int(np.abs(rows.costs.mean(0) - corner).argmin()) for corner in corners]
    shares = np.zeros(len(rows.scales))
    for place, own in zip(places, np.eye(len(corners)), strict=True):
        shares[place] = np.interp(cost, corners, own)
    return shares


def table(found: Found) -> list[list[str]]:
    """A header and lines: accuracies in %, paired differences in points."""
    return _table_of_choices(found) if found.claim.auto else _table_of_sides(found)


def _table_of_sides(found: Found) -> list[list[str]]:
    first, *others = found.claim.sides
    lines = [["questions", "tokens", first, *others, *(f"{name} - {first}, points" for name in others)]]
    for group, sides in found.groups.items():
        for scale in _scales_of(sides):
            own, *each = [sides[name].get(scale) for name in (first, *others)]
            gaps = [told(side.scores, own.scores) if side and own else "" for side in each]
            cells = [side.cell if side else "" for side in (own, *each)]
            lines.append([f"{group} ({_asked(sides)})", scale, *cells, *gaps])
    return lines


def _scales_of(sides: dict[str, dict[str, Scored]]) -> list[str]:
    """All scales of the sides, finest first."""
    found = {scale: own.tokens for side in sides.values() for scale, own in side.items()}
    return sorted(found, key=found.__getitem__, reverse=True)


def _asked(sides: dict[str, dict[str, Scored]]) -> int:
    """The number of questions."""
    return next(own.scores.shape[1] for side in sides.values() for own in side.values())


def _table_of_choices(found: Found) -> list[list[str]]:
    side = found.groups["all"][""]
    auto = side["auto"].scores
    lines = [["", "mean tokens", "accuracy", "auto - this, points"]]
    for name, own in side.items():
        gap = "" if name in ("auto", "oracle") else told(auto, own.scores)
        lines.append([name, f"{own.tokens:.2f}", own.cell, gap])
    return lines


def sentence(found: Found) -> str:
    """What was found, over all questions."""
    if found.claim.auto:
        side = found.groups["all"][""]
        told_of = {name: f"{own.cell} % with {own.tokens:.2f} tokens" for name, own in side.items()}
        gap = told(side["auto"].scores, side["best mixture"].scores)
        return f"auto {told_of['auto']}, oracle {told_of['oracle']}; auto - best mixture at its tokens {gap} points."
    (first, baseline), *others = found.groups["all"].items()
    parts = []
    for name, side in others:
        gaps = [
            f"{told(own.scores, baseline[scale].scores)} at {scale}" for scale, own in side.items() if scale in baseline
        ]
        parts.append(f"{name} - {first} {', '.join(gaps)}")
    return f"{'; '.join(parts)} (points)."


def section(found: Found, letter: str, command: str, metric: str, picture: str) -> str:
    """The claim as a section of Markdown; `command` repeats it."""
    states = [run.state for run in found.runs]
    device = json.loads((found.runs[0].results / "accuracy_tokens.json").read_text())["run"]
    seconds = [state["seconds"]["fit"] for state in states]
    versions = ", ".join(f"{each} {device['versions'][each]}" for each in ("torch", "transformers"))
    seeds = ", ".join(map(str, found.seeds))
    facts = [
        f"`{command}`; {RULES[metric]}; seed {seeds}; {device['device']}; {versions}; "
        f"{_span(state['date'] for state in states)}; commit {_span(state['commit'] for state in states)}; training "
        f"took {min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} minutes an arm, beside whatever else ran.",
        "Accuracy in %"
        + (", lowest and highest seed in brackets" if len(found.seeds) > 1 else "")
        + "; differences are paired, with 95 % intervals of a bootstrap over questions.",
    ]
    text = [f"### {letter}. {found.claim.title}", f"**The paper says:** {found.claim.paper}"]
    text += [f"**We find:** {sentence(found)} {found.claim.note}".rstrip()]
    text += [markdown_rows(table(found)), f"![{found.claim.title}]({picture})", *facts]
    commands = "\n".join(sorted({state["command"] for state in states}))
    text += [f"<details><summary>Commands of the trainings</summary>\n\n```sh\n{commands}\n```\n\n</details>"]
    return "\n\n".join(text) + "\n"


def _span(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def draw(found: Found, file: Path) -> None:
    """The claim's picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2) if found.claim.auto else (3 + 2.2 * len(found.groups), 3.2), dpi=120)
    figure.set_layout_engine("constrained")
    if found.claim.auto:
        axes = figure.subplots()
        told_of = json.loads((found.runs[0].results / "accuracy_tokens.json").read_text())["chooser"]
        draw_cost(axes, told_of["costs"]["tokens"], *UNITS["tokens"])
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        figure.suptitle(f"{found.claim.title} (seed {found.seeds[0]})", fontsize=11)
    else:
        panels = figure.subplots(1, len(found.groups), sharey=True, squeeze=False)[0]
        for axes, (group, sides) in zip(panels, found.groups.items(), strict=True):
            _bars(axes, group, sides)
        figure.axes[0].set_ylabel("accuracy (%)")
        bars, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(bars, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
        figure.suptitle(found.claim.title, fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _bars(axes: Any, group: str, sides: dict[str, dict[str, Scored]]) -> None:
    """Accuracy of each side at each scale, with 95 % intervals over questions."""
    scales, width = _scales_of(sides), 0.8 / len(sides)
    for number, ((name, side), color) in enumerate(zip(sides.items(), COLORS, strict=False)):
        for scale, own in side.items():
            scores = 100 * own.scores.mean(0)
            low, high = intervals(scores[:, None])[0]
            ends = [[max(0.0, scores.mean() - low)], [max(0.0, high - scores.mean())]]
            place, label = scales.index(scale) + number * width, name if own is next(iter(side.values())) else None
            axes.bar(place, scores.mean(), width, color=color, yerr=ends, capsize=2, label=label)
    axes.set_xticks(np.arange(len(scales)) + 0.4 - width / 2, scales)
    axes.set_xlabel("visual tokens")
    axes.set_title(f"{group} ({_asked(sides)})", fontsize=9)
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
