"""What every visual token buys: accuracy at each level against what the level costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import log2
from typing import Any

from lit_mm.costs.flops import Costs, Size
from lit_mm.model.projector import ClipScale, Scale
from lit_mm.model.rows import Counts, Prompts

ONE_POINT = 0.01


class Asked:
    """The questions of an evaluation: what their prompts hold at every level.

    Args:
        levels: The model's.
    """

    def __init__(self, levels: Sequence[Scale]) -> None:
        self.levels, self.questions = list(levels), 0
        self.prompts = [Prompts() for _ in levels]
        self.images = Counter[Size]()

    def add(self, counts: Counts, questions: int) -> None:
        """Add a batch's."""
        self.questions += questions
        self.images.update({(height, width): number for number, height, width in counts.asked})
        for total, own in zip(self.prompts, counts.prompts, strict=False):
            total.text, total.visual, total.pairs = (
                total.text + own.text,
                total.visual + own.visual,
                total.pairs + own.pairs,
            )

    def numbers(self, costs: Costs | None) -> dict[str, float]:
        """Sums of one rank, the same names on every rank: tokens, and with costs forward FLOPs."""
        found = {"questions": float(self.questions)}
        for level, own in zip(self.levels, self.prompts, strict=True):
            found |= {f"{level} text": own.text, f"{level} visual": own.visual}
            if costs:
                read = costs.text(own.text + own.visual, own.pairs, self.questions)
                found[f"{level} prefill"] = float(read.total.forward)
        if costs:
            images = costs.images((number, size) for size, number in self.images.items())
            found["encode"] = float(images.total.forward)
        return found


def level_costs(numbers: dict[str, float], levels: Sequence[Scale], cached: int | None) -> list[dict[str, Any]]:
    """Means per question of every level, from the sums of all ranks.

    Args:
        numbers: Sums.
        levels: The model's.
        cached: Bytes that a token leaves in the KV cache; None: unknown.

    Returns:
        A dict per level: `scale`, `visual_tokens` (the level's, at most), `mean_visual_tokens` and
        `prompt_tokens` of what was asked, and where the model's costs are known `encode_flops` and
        `prefill_flops` until the first token of the answer, and `kv_bytes` of the prompt.
    """
    questions = max(1.0, numbers["questions"])
    return [_level(numbers, level, questions, cached) for level in levels]


def _level(numbers: dict[str, float], level: Scale, questions: float, cached: int | None) -> dict[str, Any]:
    visual = numbers[f"{level} visual"] / questions
    prompt = visual + numbers[f"{level} text"] / questions
    found = {"scale": str(level), **_named(level), "mean_visual_tokens": visual, "prompt_tokens": prompt}
    if cached is not None:
        found["encode_flops"] = numbers["encode"] / questions
        found["prefill_flops"] = numbers[f"{level} prefill"] / questions
        found["kv_bytes"] = prompt * cached
    return found


def _named(level: Scale) -> dict[str, int]:
    """`frames` and the tokens of all of them together, for a level of video; tokens of an image otherwise."""
    if isinstance(level, ClipScale):
        return {"frames": level.frames, "visual_tokens": level.frames * level.tokens}
    return {"visual_tokens": level}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the levels say together.

    Args:
        rows: `scale`, `visual_tokens` and `accuracy` (0..1) of every level.

    Returns:
        `area`: the area under accuracy over log2 of visual tokens as a share of the range, which is
        the mean accuracy of a budget drawn evenly on that axis (None with one number of tokens; where
        several levels have as many tokens, the best one's accuracy counts; nor where no question shows an
        image). `smallest_within_a_point`:
        the level with the fewest tokens whose accuracy is at most one point below the best.
    """
    best: dict[int, float] = {}
    for row in rows:
        best[row["visual_tokens"]] = max(row["accuracy"], best.get(row["visual_tokens"], 0.0))
    enough = [row for row in rows if row["accuracy"] >= max(best.values()) - ONE_POINT - 1e-9]
    smallest = min(enough, key=lambda row: (row["visual_tokens"], -row["accuracy"]))
    curve = sorted(best.items()) if any(row.get("mean_visual_tokens", 1) for row in rows) else []
    return {"area": area(curve), "smallest_within_a_point": smallest["scale"]}


def area(curve: Sequence[tuple[int, float]]) -> float | None:
    """Area under (tokens, accuracy) points, fewest tokens first, over log2 of the tokens, divided by its range."""
    if len(curve) < 2:
        return None
    steps = pairwise(curve)
    total = sum((low + high) / 2 * (log2(more) - log2(fewer)) for (fewer, low), (more, high) in steps)
    return total / (log2(curve[-1][0]) - log2(curve[0][0]))


def accuracy_per_tflop(row: dict[str, Any]) -> float | None:
    """Accuracy (0..1) per 10¹² FLOPs of a question until its first token; None where FLOPs are unknown."""
    if "prefill_flops" not in row:
        return None
    return row["accuracy"] / (row["encode_flops"] + row["prefill_flops"]) * 1e12
