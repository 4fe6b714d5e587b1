"""Keep what the notebooks show of a run: the figures of its test, a draw of the test's questions, and its chooser.

Run it with `python notebooks/record.py runs/quickstart/version_0`, after `calibrate` and `test`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from lit_mm.evaluation.calibration import CHOOSER
from lit_mm.evaluation.results import read_questions, write_questions

FOLDER = Path(__file__).parent
QUESTIONS = 1000


def record(run: Path, to: Path = FOLDER, most: int = QUESTIONS) -> None:
    """Write accuracy_tokens.json, questions.parquet and chooser.json.

    Args:
        run: The run's folder, with the files of `test` and `calibrate`.
        to: The folder to write to.
        most: The number of questions drawn at random, the same at every call.
    """
    result = json.loads((run / "accuracy_tokens.json").read_text(encoding="utf-8"))
    result["checkpoint"] = Path(result["checkpoint"]).name  # without the machine's path
    (to / "accuracy_tokens.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (to / CHOOSER).write_bytes((run / CHOOSER).read_bytes())
    questions, scales = read_questions(run / "accuracy_tokens.parquet")
    drawn = np.random.default_rng(0).permutation(len(questions))[:most]
    write_questions(to / "questions.parquet", [questions[number] for number in sorted(drawn)], scales)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
