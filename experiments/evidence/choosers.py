"""What every chooser reaches at mean numbers of visual tokens, over runs of several seeds.

    python -m experiments.evidence.choosers runs/routed_1/version_0 runs/routed_2/version_0 --mean_tokens 3 5 8

Thresholds come from a run's validation, accuracy and tokens from its test: both must be in the run's folder. Prints a
table with the mean and the standard deviation of the runs' accuracies in %, and the mean tokens that they took.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.evidence.report import mixture_of
from lit_mm.evaluation.answer_costs import rows_by_cost
from lit_mm.evaluation.calibration import STATISTICS, Rows, Target, calibrate, outcome
from lit_mm.evaluation.pictures import markdown_rows
from lit_mm.evaluation.results import read_questions
from lit_mm.inference.calibrate import read_validation

MIXTURE = "best mixture of two fixed scales"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        "python -m experiments.evidence.choosers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, one for each seed")
    parser.add_argument("--mean_tokens", nargs="+", type=float, default=[3, 5, 8], help="budgets")
    options = parser.parse_args(words)
    print(table([read(folder) for folder in options.runs], options.mean_tokens))


def read(folder: Path) -> tuple[Rows, Rows]:
    """The questions of a run's validation and of its test, with their costs in visual tokens."""
    questions, _ = read_questions(folder / "accuracy_tokens.parquet")
    scales = json.loads((folder / "accuracy_tokens.json").read_text(encoding="utf-8"))["scales"]
    return read_validation(folder)[1]["tokens"], rows_by_cost(questions, scales)["tokens"]


def table(runs: Sequence[tuple[Rows, Rows]], budgets: Sequence[float]) -> str:
    """Markdown. The mixture takes as many tokens as the chooser of the first line."""
    lines = [["chooser", *(f"mean tokens ≤ {budget:g}" for budget in budgets)]]
    known = [statistic for statistic in STATISTICS if all(statistic in val.statistics for val, _ in runs)]
    mixed: list[str] = []
    for statistic in known:
        cells = []
        for budget in budgets:
            scored = [outcome(test, calibrate(val, Target(budget), [statistic])) for val, test in runs]
            tokens = [float(paid.mean()) for _, paid in scored]
            cells.append(f"{_cell([scores.mean() for scores, _ in scored])} at {np.mean(tokens):.1f}")
            if statistic == known[0]:
                paired = zip(runs, tokens, strict=True)
                mixed.append(_cell([(test.scores @ mixture_of(test, each)).mean() for (_, test), each in paired]))
        lines.append([statistic, *cells])
    return markdown_rows([*lines, [MIXTURE, *mixed]])


def _cell(accuracies: Sequence[float]) -> str:
    own = 100 * np.array(accuracies)
    return f"{own.mean():.1f}" + (f" ± {own.std(ddof=1):.1f}" if len(own) > 1 else "")


if __name__ == "__main__":
    main()
