"""Judged questions: what each scale answered and scored, confidence intervals, and a file with a row per question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 1000
CELLS = 2**24
"""Scores that are drawn at a time, so that memory stays small."""


@dataclass
class Judged:
    """A question with the answers of S scales, finest first.

    Args:
        id: Of the question.
        type: The kind of question, as the benchmark names it; empty if it names none.
        question: Its text.
        references: What answers were compared with.
        answers: [S].
        scores: [S], each in 0..1.
        logprobs: [S] log-probability of each answer, its end token included.
        visual_tokens: [S] in the prompt.
        tokens: [S] of each answer, its end token included.
        least_logprobs: [S] of each answer's least likely token; -inf where logits were not finite.
        margins: [S] of each answer's first token, see `Generated.margin`; -inf where logits were not finite.
        router: [S] the router's score of each scale; empty without a router or without images.
    """

    id: str
    type: str
    question: str
    references: list[str]
    answers: list[str]
    scores: list[float]
    logprobs: list[float]
    visual_tokens: list[int]
    tokens: list[int]
    least_logprobs: list[float]
    margins: list[float]
    router: list[float] = field(default_factory=list)


COLUMNS = {"answer": "answers", "score": "scores", "logprob": "logprobs", "visual_tokens": "visual_tokens"}
COLUMNS |= {"tokens": "tokens", "least_logprob": "least_logprobs", "margin": "margins"}
"""The columns that a file of questions has for every scale -> the fields of `Judged`."""


def scores_of(questions: Sequence[Judged]) -> np.ndarray:
    """[Q, S] scores."""
    return np.array([question.scores for question in questions], np.float64)


def intervals(scores: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """95 % confidence intervals of mean scores, by the percentile bootstrap over questions.

    Args:
        scores: [Q, S]; the same questions are drawn for all S.
        seed: Of the draws.
        draws: Their number.

    Returns:
        [S, 2] lower and upper ends.
    """
    return _ends(_means(scores, np.random.default_rng(seed), draws))


def headline_of(strata: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A headline figure that is not the mean score, and its 95 % confidence interval: a sum of means. The
    bootstrap draws what each mean is over separately, such as the images of each of MME's subtasks.

    Args:
        strata: Of each mean [n, S], as `AnswerMetric.strata` has them.

    Returns:
        [S] figures and [S, 2] lower and upper ends.
    """
    rng = np.random.default_rng(0)
    drawn = [_means(values, rng, DRAWS) for values in strata]
    return np.sum([values.mean(0) for values in strata], axis=0), _ends(np.sum(drawn, axis=0))


def _means(values: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """[draws, S] means of values [n, S], of which n are drawn each time."""
    count, scales = values.shape
    each = max(1, CELLS // (count * scales))
    sizes = [min(each, draws - first) for first in range(0, draws, each)]
    return np.concatenate([values[rng.integers(0, count, (size, count))].mean(1) for size in sizes])


def _ends(means: np.ndarray) -> np.ndarray:
    """[S, 2] ends of the middle 95 % of the draws [draws, S]."""
    return np.quantile(means, [0.025, 0.975], axis=0).T


def types_of(kind: str) -> list[str]:
    """The types of a question, of which DocVQA's may have several: `figure/diagram, table/list`."""
    return kind.split(", ")


def by_type(questions: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """For every type of question, in alphabetical order: `questions`, `accuracy` [S] and `interval` [S, 2]. A question
    of several types counts for each."""
    found = {}
    for name in sorted({name for question in questions for name in types_of(question.type)} - {""}):
        scores = scores_of([question for question in questions if name in types_of(question.type)])
        told = {"accuracy": scores.mean(0).tolist(), "interval": intervals(scores).tolist()}
        found[name] = {"questions": len(scores), **told}
    return found


def write_questions(file: Path, questions: Sequence[Judged], scales: Sequence[str]) -> None:
    """Write a parquet file with a row per question: `question_id`, `type`, `question`, `references`, and for every
    scale `answer@16`, `score@16`, and so on: see `COLUMNS`; `router@16` only if there is a router."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {
        "question_id": [question.id for question in questions],
        "type": [question.type for question in questions],
        "question": [question.question for question in questions],
        "references": [question.references for question in questions],
    }
    for place, scale in enumerate(scales):
        for name, of in COLUMNS.items():
            columns[f"{name}@{scale}"] = [getattr(question, of)[place] for question in questions]
        if any(question.router for question in questions):
            columns[f"router@{scale}"] = [question.router[place] if question.router else None for question in questions]
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def read_questions(file: Path) -> tuple[list[Judged], list[str]]:
    """What `write_questions` wrote: the questions, and the names of the scales.

    Raises:
        ValueError: The file has no questions, or lacks a column.
    """
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(file).to_pylist()
    if not rows:
        raise ValueError(f"{file}: no questions")
    scales = [name.removeprefix("answer@") for name in rows[0] if name.startswith("answer@")]
    if missing := [f"{kind}@{scale}" for scale in scales for kind in COLUMNS if f"{kind}@{scale}" not in rows[0]]:
        raise ValueError(f"{file}: no column {missing[0]}, an older version may have written it: evaluate again")
    return [Judged(*_fields(row, scales)) for row in rows], scales


def _fields(row: dict[str, Any], scales: Sequence[str]) -> Iterator[Any]:
    yield from (row[name] for name in ("question_id", "type", "question", "references"))
    yield from ([row[f"{kind}@{scale}"] for scale in scales] for kind in COLUMNS)
    yield [row[f"router@{scale}"] for scale in scales if row.get(f"router@{scale}") is not None]
