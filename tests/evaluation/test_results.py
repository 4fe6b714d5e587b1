"""Confidence intervals against the normal approximation; questions survive their file."""

import math

import numpy as np
import pyarrow.parquet
import pytest

from lit_mm.evaluation.metrics import METRICS
from lit_mm.evaluation.results import (
    Judged,
    by_type,
    headline_of,
    intervals,
    read_questions,
    scores_of,
    write_questions,
)


def judged(number: int, type: str, scores: list[float]) -> Judged:
    answers = [f"é {number} {place}" for place in range(len(scores))]
    count = len(scores)
    figures = [-0.5] * count, [16, 1][:count], [2] * count, [-0.4] * count, [0.3] * count
    return Judged(f"q{number}", type, "what?", ["a", "b"], answers, scores, *figures)


def test_intervals_are_those_of_the_normal_approximation():
    rng = np.random.default_rng(3)
    scores = (rng.random((2000, 2)) < [0.8, 0.3]).astype(float)
    for (low, high), mean in zip(intervals(scores), scores.mean(0), strict=True):
        half = 1.96 * math.sqrt(mean * (1 - mean) / 2000)
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)


def test_intervals_repeat_and_know_certainty():
    scores = np.array([[1.0, 0.0, 0.5], [1.0, 0.0, 1.0]])
    assert intervals(scores)[0].tolist() == [1, 1] and intervals(scores)[1].tolist() == [0, 0]
    assert (intervals(scores, seed=4) == intervals(scores, seed=4)).all()


def test_memory_does_not_change_intervals(monkeypatch):
    scores = np.random.default_rng(1).random((50, 3))
    whole = intervals(scores, draws=100)
    monkeypatch.setattr("lit_mm.evaluation.results.CELLS", 400)
    assert intervals(scores, draws=100) == pytest.approx(whole, abs=1e-12)


def test_questions_that_count_together_are_drawn_together():
    """300 questions of MMBench in four rounds each, all right or all wrong: as sure as 300 answers, not as 1200."""
    right = (np.random.default_rng(2).random((300, 2)) < [0.7, 0.4]).astype(float)
    references = [["A", "x", "x", "y", "z", "w", str(n)] for n in range(300)]
    strata = METRICS["circular"]().strata(np.tile(right, (4, 1)), references * 4)
    values, found = headline_of(strata)
    assert values == pytest.approx(right.mean(0)) and (found == intervals(right)).all()


def test_points_of_mme_have_the_interval_of_their_sum():
    rng, metric = np.random.default_rng(5), METRICS["mme"]()
    references = [["Yes", subtask, f"{n // 2}"] for subtask in ("OCR", "count", "code_reasoning") for n in range(800)]
    right = (rng.random(2400) < 0.8).astype(float)
    metric.update(["yes" if good else "no" for good in right], references)
    [value], [(low, high)] = headline_of(metric.strata(right[:, None], references))
    assert value == pytest.approx(float(metric.compute()))
    points = [100 * (own.mean(1) + own.all(1)) for own in right.reshape(3, 400, 2)[:2]]
    half = 1.96 * math.sqrt(sum(own.var() / 400 for own in points))
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.15 * half)
    assert metric.strata(right[1:, None], references[1:]) == []  # an image with one question


def test_types_are_judged_apart():
    questions = [judged(n, "count" if n < 3 else "color", [1.0, float(n == 0)]) for n in range(4)]
    found = by_type([*questions, judged(9, "", [0.0, 0.0])])
    assert {name: own["questions"] for name, own in found.items()} == {"color": 1, "count": 3}
    assert found["count"]["accuracy"] == pytest.approx([1, 1 / 3])
    assert found["color"]["interval"] == [[1, 1], [0, 0]]


def test_a_question_of_several_types_counts_for_each():
    found = by_type([judged(0, "a, b", [1.0]), judged(1, "b", [0.0])])
    assert {name: (own["questions"], own["accuracy"]) for name, own in found.items()} == {
        "a": (1, [1]),
        "b": (2, [0.5]),
    }


def test_questions_survive_their_file(tmp_path):
    questions = [judged(n, "", [0.25 * n, 1.0]) for n in range(3)]
    write_questions(tmp_path / "q.parquet", questions, ["16", "8x1"])
    assert read_questions(tmp_path / "q.parquet") == (questions, ["16", "8x1"])
    assert scores_of(questions).shape == (3, 2)
    questions[1].router = [-0.5, -1.5]  # one question with an image, asked of a model with a router
    write_questions(tmp_path / "q.parquet", questions, ["16", "8x1"])
    assert read_questions(tmp_path / "q.parquet")[0] == questions


def test_a_file_without_a_column_is_named(tmp_path):
    write_questions(tmp_path / "q.parquet", [judged(0, "", [1.0, 0.0])], ["16", "8x1"])
    table = pyarrow.parquet.read_table(tmp_path / "q.parquet").drop(["margin@8x1"])
    pyarrow.parquet.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"q\.parquet: no column margin@8x1"):
        read_questions(tmp_path / "q.parquet")
