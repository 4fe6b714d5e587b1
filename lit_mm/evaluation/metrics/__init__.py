"""How answers are judged, each benchmark by its own rule.

A metric takes the answers and the references of the questions. For most metrics the references are the accepted
answers; each class says what it expects.
"""

from lit_mm.evaluation.metrics.base import AnswerMetric
from lit_mm.evaluation.metrics.boxes import BoxAccuracy
from lit_mm.evaluation.metrics.choice import CircularChoice, MultipleChoice
from lit_mm.evaluation.metrics.text import ANLS, ExactMatch, RelaxedAccuracy, majority_share, normalize
from lit_mm.evaluation.metrics.vqa import VQAAccuracy
from lit_mm.evaluation.metrics.yes_no import MMEScore, YesNo

METRICS: dict[str, type[AnswerMetric]] = {
    "exact": ExactMatch,
    "vqa": VQAAccuracy,
    "anls": ANLS,
    "relaxed": RelaxedAccuracy,
    "yes_no": YesNo,
    "choice": MultipleChoice,
    "circular": CircularChoice,
    "box": BoxAccuracy,
    "mme": MMEScore,
}
"""The short names by which a benchmark's YAML file names its metric."""

__all__ = [
    "ANLS",
    "METRICS",
    "AnswerMetric",
    "BoxAccuracy",
    "CircularChoice",
    "ExactMatch",
    "MMEScore",
    "MultipleChoice",
    "RelaxedAccuracy",
    "VQAAccuracy",
    "YesNo",
    "majority_share",
    "normalize",
]
