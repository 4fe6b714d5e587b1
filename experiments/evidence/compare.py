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
    named = {name: runs.split(",") for name, _, runs in (side.partition("=") for side in options.sides)}
    if len(named) < len(options.sides) or not all(all(runs) for runs in named.values()):
        parser.error(f"expected NAME=RUN,RUN for each side, each with another name, found {options.sides}")
    if options.picture and len(named) > len(report.COLORS):
        parser.error(f"--picture: expected at most {len(report.COLORS)} sides, found {len(named)}")
    found = compared({name: [Path(run) for run in runs] for name, runs in named.items()}, options)
    print(markdown_rows(report.table(found)))
    if options.picture:
        report.draw(found, options.picture)


def compared(sides: dict[str, list[Path]], options: argparse.Namespace) -> report.Found:
    """The scores of all sides.

    Raises:
        ValueError: The sides have different numbers of runs, a run was asked other questions than the first, or the
            runs of a side have different scales.
    """
    counts = {name: len(runs) for name, runs in sides.items()}
    if len({*counts.values()}) > 1:
        raise ValueError(f"expected equally many runs of every side, found {counts}")
    answered, asked = [], []
    for name, runs in sides.items():
        read = [read_questions(run / "accuracy_tokens.parquet") for run in runs]
        for run, (questions, scales) in zip(runs, read, strict=True):
            own = [(question.id, question.question) for question in questions]
            asked = asked or own
            if own != asked:
                raise ValueError(f"{run}: was asked different questions than the first run")
            if scales != read[0][1]:
                raise ValueError(f"{run}: expected the scales of {runs[0]}, {read[0][1]}, found {scales}")
            answered.append((name, questions, scales))
    groups = report.grouped(answered, options.metric)
    return report.Found(Claim(options.title, "", dict.fromkeys(sides, ())), [*range(max(counts.values()))], groups, [])


if __name__ == "__main__":
    main()
