"""Compare tested runs that differ in anything: a table, and a picture.

    python -m experiments.evidence.compare "without=runs/off_1,runs/off_2" "with=runs/on_1,runs/on_2" --picture gain.png

All runs were asked the same questions, and the runs of each side have the same seeds in the same order. Differences are
to the first side, paired, with 95 % intervals of a bootstrap over questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.evidence import report
from experiments.evidence.claims import Claim
from lit_mm.evaluation.pictures import markdown_rows
from lit_mm.evaluation.results import read_questions


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser(
        "python -m experiments.evidence.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sides", nargs="+", metavar="NAME=RUN,RUN", help="folders with accuracy_tokens.parquet")
    parser.add_argument("--metric", choices=[*report.RULES], default="exact")
    parser.add_argument("--title", default="Accuracy at every scale")
    parser.add_argument("--picture", type=Path, help="draw it to this file")
    options = parser.parse_args(words)
    named = dict(side.split("=", 1) for side in options.sides)
    found = compared({name: [Path(run) for run in runs.split(",")] for name, runs in named.items()}, options)
    print(markdown_rows(report.table(found)))
    if options.picture:
        report.draw(found, options.picture)


def compared(sides: dict[str, list[Path]], options: argparse.Namespace) -> report.Found:
    """The scores of all sides.

    Raises:
        ValueError: The sides have different numbers of runs, or their runs were asked different questions.
    """
    counts = {name: len(runs) for name, runs in sides.items()}
    if len({*counts.values()}) > 1:
        raise ValueError(f"expected equally many runs of every side, found {counts}")
    answered = [
        (name, *read_questions(run / "accuracy_tokens.parquet")) for name, runs in sides.items() for run in runs
    ]
    if len({tuple((own.id, own.question) for own in questions) for _, questions, _ in answered}) > 1:
        raise ValueError("the runs were asked different questions")
    groups = report.grouped(answered, options.metric)
    return report.Found(Claim(options.title, "", dict.fromkeys(sides, ())), [*range(max(counts.values()))], groups, [])


if __name__ == "__main__":
    main()
