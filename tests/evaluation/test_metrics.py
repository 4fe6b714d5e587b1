"""Answers compared by hand-made cases and by counting."""

import pytest

from lit_mm.evaluation.metrics import ExactMatch, majority_share, normalize


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" Yes. ", "yes"),
        ("a  red\ncircle", "a red circle"),
        ("3.5", "3.5"),
        ('"no"!', "no"),
        ("", ""),
        ("-5", "-5"),
        ("C++", "c++"),
        ("5%", "5%"),
        ("!", "!"),
    ],
)
def test_normalise(answer, expected):
    assert normalize(answer) == expected


def test_accuracy_over_updates():
    metric = ExactMatch()
    metric.update(["Yes", "no."], ["yes", "yes"])
    metric.update(["teal"], ["teal"])
    assert metric.compute() == pytest.approx(2 / 3)


def test_majority():
    assert majority_share(["yes", "Yes.", "no", "red"]) == 0.5
