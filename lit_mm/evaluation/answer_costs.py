"""What answering costs, per question and scale, in visual tokens, FLOPs and milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lit_mm.evaluation.calibration import Rows, statistics_of
from lit_mm.evaluation.results import Judged, scores_of

Cost = Literal["tokens", "flops", "ms"]
UNITS: dict[Cost, tuple[str, float]] = {"tokens": ("visual tokens", 1), "flops": ("GFLOPs", 1e9), "ms": ("ms", 1)}
"""How each cost is shown: the unit, and its size."""


def rows_by_cost(questions: Sequence[Judged], scales: Sequence[dict[str, Any]]) -> dict[Cost, Rows]:
    """Judged questions as what calibration takes, once for each cost that is known.

    - tokens: visual tokens of the prompt.
    - flops: forward FLOPs until the answer's first token, on average over the questions; the encoder is paid once.
    - ms: until the answer's last token, from the measured medians of one answer at a time and the question's own
      number of answer tokens; encoding is paid once.

    Text before the image is counted at every scale that is tried, although it need not be computed again. A router pays
    for the coarsest prompt, for itself, and for the answer that it chooses, whose prompt is paid already if it is the
    coarsest.

    Args:
        questions: With the answers of S scales.
        scales: [S] rows of `accuracy_tokens_val.json`.

    Raises:
        ValueError: The scales of the two differ, or no question has visual tokens.
    """
    tokens = np.array([question.visual_tokens for question in questions], float)
    if tokens.shape[1] != len(scales):
        raise ValueError(f"expected {tokens.shape[1]} scales, as in the questions, found {len(scales)}")
    if not tokens.any():
        raise ValueError("no question shows an image: all scales are the same")
    found: dict[Cost, tuple[np.ndarray, float, np.ndarray, float]] = {"tokens": (tokens, 0.0, tokens[:, -1], 0.0)}
    if all("prefill_flops" in row for row in scales):
        prefill = np.array([row["prefill_flops"] for row in scales])
        costs = np.broadcast_to(prefill, tokens.shape)
        found["flops"] = costs, float(scales[0]["encode_flops"]), costs[:, -1], scales[-1].get("router_flops", 0.0)
    if all(row.get("measured") for row in scales):
        found["ms"] = _milliseconds(questions, [row["measured"] for row in scales])
    names, scores, statistics = [row["scale"] for row in scales], scores_of(questions), statistics_of(questions)
    return {
        cost: Rows(names, scores, costs, once, statistics, _routed(costs, read, router))
        for cost, (costs, once, read, router) in found.items()
    }


def _routed(costs: np.ndarray, read: np.ndarray, router: float) -> np.ndarray:
    """[Q, S] costs of an answer that a router chose: of answering [Q, S], of the router itself, and of the coarsest
    prompt [Q], which the router reads; an answer at the coarsest scale has paid for that prompt already."""
    further = np.repeat(read[:, None], costs.shape[1], 1)
    further[:, -1] = 0
    return costs + further + router


def _milliseconds(
    questions: Sequence[Judged], measured: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, float, np.ndarray, float]:
    first, encode, further = (
        np.array([(times[f"{name}_ms"] or {"median": 0.0})["median"] for times in measured])
        for name in ("first_token", "encode", "further_token")
    )
    once = float(np.median(encode))
    lengths = np.array([question.tokens for question in questions], float)
    first = np.maximum(first - once, 0)
    router = measured[-1].get("router_ms", {"median": 0.0})["median"]
    read = np.full(len(lengths), first[-1])
    return first + (np.maximum(lengths, 1) - 1) * further, once, read, router
