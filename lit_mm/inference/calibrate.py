"""python -m lit_mm calibrate: the chooser of a run, from its last validation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.table import Table

from lit_mm.evaluation.answer_costs import UNITS, Cost, rows_by_cost
from lit_mm.evaluation.calibration import (
    CHOOSER,
    STATISTICS,
    Rows,
    Rule,
    Statistic,
    Target,
    calibrate,
    calibrate_all,
    held_out,
    outcome,
)
from lit_mm.evaluation.oracle import fixed_mixture, oracle
from lit_mm.evaluation.pictures import print_whole
from lit_mm.evaluation.results import read_questions
from lit_mm.training.saving import find_checkpoint

PROGRAM = "python -m lit_mm calibrate"
USAGE = f"""{PROGRAM} runs/quickstart                     at most one point below the finest scale, fewest tokens
       {PROGRAM} last --mean_tokens 40              most accuracy with 40 visual tokens a question on average"""
VALIDATION = "accuracy_tokens_val"
BUDGETS = 24
"""Mean costs for which the file keeps a chooser."""


def main(arguments: Sequence[str]) -> None:
    """Write a run's chooser.json and print what it reaches.

    Raises:
        FileNotFoundError: No such run, or it has no validation.
        ValueError: A wrong option, a target that nothing reaches, or a validation of an older version.
    """
    options = _parser().parse_args(arguments)
    checkpoint = find_checkpoint(options.run, Path("runs"), "calibrate")
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    result, rows = read_validation(folder)
    cost, target = _target(options)
    if cost not in rows:
        raise ValueError(
            f"{folder / VALIDATION}.json: the validation has no {UNITS[cost][0]}: run `validate` with them"
        )
    known = [statistic for statistic in STATISTICS if statistic in rows[cost].statistics]
    if options.statistic not in (None, *known):
        raise ValueError("calibrate: --statistic router: the validation was of a model without one")
    statistics: list[Statistic] = [options.statistic] if options.statistic else known
    best = calibrate(rows[cost], target, statistics)
    told = described(rows, cost, target, best) | {
        "calibrated_on": {"file": f"{VALIDATION}.parquet", "questions": len(rows[cost].scores), "step": result["step"]}
    }
    (folder / CHOOSER).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print_whole(table(rows[cost], cost, target, statistics, best))
    print_whole(f'Chooser: {folder / CHOOSER}, used by tokens="auto", ask and serve --ckpt_path {folder}, and test')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, USAGE, allow_abbrev=False)
    add = parser.add_argument
    add("run", help="a run's folder, last for the newest in runs, or a checkpoint")
    add("--mean_tokens", type=float, help="limit: visual tokens of a question on average, all tried scales included")
    add("--mean_gflops", type=float, help="limit: GFLOPs until the first token on average, all tried scales included")
    add("--mean_ms", type=float, help="limit: milliseconds of an answer on average, all tried scales included")
    add("--max_loss", type=float, help="how far accuracy may be below the finest scale's (default: 0.01, one point)")
    add("--cost", choices=get_args(Cost), help="the cost that --max_loss makes as low as possible (default: tokens)")
    add(
        "--statistic",
        choices=STATISTICS,
        help="how the certainty of an answer is measured, or router (default: the best of all)",
    )
    return parser


def _target(options: argparse.Namespace) -> tuple[Cost, Target]:
    """What is limited or saved, and how."""
    means: dict[Cost, float | None]
    means = {"tokens": options.mean_tokens, "flops": options.mean_gflops, "ms": options.mean_ms}
    given = {cost: value * UNITS[cost][1] for cost, value in means.items() if value is not None}
    if len(given) + (options.max_loss is not None) > 1:
        raise ValueError("calibrate: expected one of --mean_tokens, --mean_gflops, --mean_ms and --max_loss")
    if given:
        [(cost, value)] = given.items()
        if options.cost not in (None, cost):
            raise ValueError(f"calibrate: --cost {options.cost} goes with --max_loss")
        return cost, Target(mean_cost=value)
    return options.cost or "tokens", Target(max_loss=0.01 if options.max_loss is None else options.max_loss)


def read_validation(folder: Path) -> tuple[dict[str, Any], dict[Cost, Rows]]:
    """A run's last validation: its figures, and its questions by cost.

    Raises:
        FileNotFoundError: It has none.
        ValueError: An older version wrote it, or it was made at one scale.
    """
    file = folder / VALIDATION
    for end in (".parquet", ".json"):
        if not file.with_suffix(end).is_file():
            raise FileNotFoundError(f"calibrate: no {file.with_suffix(end)}: run `validate` first")
    result = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    questions, scales = read_questions(file.with_suffix(".parquet"))
    if len(scales) < 2:
        raise ValueError(f"{file}.parquet: one scale, {scales[0]}: validate without --scales")
    return result, rows_by_cost(questions, result["scales"])


def described(rows: dict[Cost, Rows], cost: Cost, target: Target, best: Rule) -> dict[str, Any]:
    """The chooser as it is written, with the choosers of other budgets by the same statistic as `front`."""
    own = rows[cost]
    least, most = own.costs.mean(0).min(), own.costs.sum(1).mean()
    budgets = np.geomspace(max(least, 1e-3), most, BUDGETS) + own.once
    budgets[0] = least + own.once
    front = calibrate_all(own, [Target(float(budget)) for budget in budgets], [best.statistic])
    distinct = list({(rule.path, rule.thresholds): rule for rule in front}.values())
    limit = {"mean": target.mean_cost} if target.max_loss is None else {"max_loss": target.max_loss}
    accuracy, paid = held_out(own, target, [best.statistic])
    return {
        "statistic": best.statistic,
        **rule_as_json(rows, best),
        "target": {"cost": cost, **limit},
        "held_out": {"accuracy": accuracy, f"mean_{cost}": paid},
        "front": [rule_as_json(rows, rule) for rule in distinct],
    }


def rule_as_json(rows: dict[Cost, Rows], rule: Rule) -> dict[str, Any]:
    """A rule with its scales' names, and its means on the questions that it was calibrated on."""
    names = next(iter(rows.values())).scales
    means = {f"mean_{cost}": float(outcome(own, rule)[1].mean()) for cost, own in rows.items()}
    path = [names[scale] for scale in rule.path]
    return {"path": path, "thresholds": list(rule.thresholds), "accuracy": rule.accuracy, **means}


def table(rows: Rows, cost: Cost, target: Target, statistics: Sequence[Statistic], best: Rule) -> Table:
    """What each statistic reaches, on the questions that it was calibrated on and on the other half, beside the fixed
    scales, their best mixture and the oracle."""
    unit, size = UNITS[cost]
    wanted = f"at most {target.mean_cost / size:g} {unit} a question" if target.mean_cost is not None else ""
    wanted = wanted or f"accuracy at most {100 * float(target.max_loss or 0):g} points below the finest scale's"
    title = f"{len(rows.scores):,} questions, target: {wanted}"
    told = "Costs are those of all tried scales. Held out: each half of the questions is judged by the path and the "
    told += "thresholds that the other half gave. An answer is accepted if its statistic is at least its threshold."
    if "router" in statistics:
        told += " The router takes the first scale whose score is within the slack of the best. Its cost is included."
    found = Table(title=title, title_justify="left", caption=told, caption_justify="left")
    found.add_column("")
    found.add_column("path and thresholds", overflow="fold")
    for name in ("accuracy %", unit, "held out: accuracy %", unit):
        found.add_column(name, justify="right")

    def line(name: str, path: str, *figures: float, style: str | None = None) -> None:
        scaled = [
            f"{100 * value:.2f}" if place % 2 == 0 else f"{value / size:.4g}" for place, value in enumerate(figures)
        ]
        found.add_row(name, path, *scaled, *[""] * (4 - len(scaled)), style=style)

    for statistic in statistics:
        rule = calibrate(rows, target, [statistic])
        name, style = (f"{statistic}, taken", "bold") if statistic == best.statistic else (statistic, None)
        line(name, _path(rows, rule), rule.accuracy, rule.cost, *held_out(rows, target, [statistic]), style=style)
    for place, scale in enumerate(rows.scales):
        line(f"fixed {scale}", "", float(rows.scores[:, place].mean()), float(rows.costs[:, place].mean()) + rows.once)
    mixture = fixed_mixture(rows.scores, rows.costs + rows.once)
    line("best two fixed scales", "", float(mixture.at(max(best.cost, mixture.tokens[0]))), best.cost)
    upper = oracle(rows.scores, rows.costs + rows.once)
    line("oracle", "", upper.accuracy, upper.mean_tokens)
    return found


def _path(rows: Rows, rule: Rule) -> str:
    """`1 (< -0.5) 4 (< -0.25) 16`: how a question goes on; `1, 4, 16 (within 0.2)`: what a router chooses from."""
    names = [rows.scales[scale] for scale in rule.path]
    if rule.statistic == "router" and rule.thresholds:
        return f"{', '.join(names)} (within {rule.thresholds[0]:.3g})"
    steps = [f"{name} (< {threshold:.3g})" for name, threshold in zip(names, rule.thresholds, strict=False)]
    return " ".join([*steps, names[-1]])
