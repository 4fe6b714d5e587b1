"""What every visual token buys: each scale's accuracy against its cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from typing import Any

from lit_mm.costs.flops import Costs, Size
from lit_mm.model.batch import Counts, Prompts
from lit_mm.model.scales import Scale, VideoScale

ONE_POINT = 0.01


class Asked:
    """Counts the tokens of an evaluation's prompts at every scale.

    Args:
        scales: All scales of the model.
    """

    def __init__(self, scales: Sequence[Scale]) -> None:
        self.all_scales, self.questions = list(scales), 0
        self.prompts = [Prompts() for _ in scales]
        self.images = Counter[Size]()

    def add(self, counts: Counts, questions: int) -> None:
        """Add a batch."""
        self.questions += questions
        self.images.update({(height, width): number for number, height, width in counts.asked})
        for total, own in zip(self.prompts, counts.prompts, strict=False):
            total.text += own.text
            total.visual += own.visual
            total.pairs += own.pairs

    def numbers(self, costs: Costs | None) -> dict[str, float]:
        """This rank's sums, under the same names on every rank: tokens and, with costs, forward FLOPs."""
        found = {"questions": float(self.questions)}
        for scale, own in zip(self.all_scales, self.prompts, strict=True):
            found |= {f"{scale} text": own.text, f"{scale} visual": own.visual}
            if costs:
                read = costs.text(own.text + own.visual, own.pairs, self.questions)
                found[f"{scale} prefill"] = float(read.total.forward)
        if costs:
            images = costs.images((number, size) for size, number in self.images.items())
            found["encode"] = float(images.total.forward)
        return found


def scale_costs(numbers: dict[str, float], scales: Sequence[Scale], cached: int | None) -> list[dict[str, Any]]:
    """Means per question at every scale, from the sums over all ranks.

    Args:
        numbers: The sums.
        scales: All scales of the model.
        cached: Bytes per token in the KV cache; None if unknown.

    Returns:
        A dict per scale: `scale`, `visual_tokens` (the scale's maximum), `mean_visual_tokens` and
        `prompt_tokens`; if the model's costs are known, also `encode_flops` and `prefill_flops` until the
        first token of the answer, and `kv_bytes` of the prompt.
    """
    questions, rows = max(1.0, numbers["questions"]), []
    for scale in scales:
        visual = numbers[f"{scale} visual"] / questions
        prompt = visual + numbers[f"{scale} text"] / questions
        row = {"scale": str(scale), **_named(scale), "mean_visual_tokens": visual, "prompt_tokens": prompt}
        if cached is not None:
            row["encode_flops"] = numbers["encode"] / questions
            row["prefill_flops"] = numbers[f"{scale} prefill"] / questions
            row["kv_bytes"] = prompt * cached
        rows.append(row)
    return rows


def _named(scale: Scale) -> dict[str, int]:
    """The scale's visual tokens: of an image, or for a video scale of all `frames` together."""
    if isinstance(scale, VideoScale):
        return {"frames": scale.frames, "visual_tokens": scale.frames * scale.tokens}
    return {"visual_tokens": scale}


def untrained(row: Mapping[str, Any]) -> str:
    """` (untrained)` after the name of a scale that the model was not trained at, otherwise nothing."""
    return "" if row.get("trained", True) else " (untrained)"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures over all scales.

    Args:
        rows: `scale`, `visual_tokens` and `accuracy` (0..1) of every scale.

    Returns:
        `area`: area under accuracy over log2(visual tokens) divided by the range of that axis, i.e. the mean
        accuracy of a token budget drawn uniformly on it. Of several scales with equally many tokens the best
        counts. None if all scales have equally many tokens or no question shows an image.
        `smallest_within_a_point`: the scale with the fewest tokens whose accuracy is at most one point below
        the best.
    """
    best: dict[int, float] = {}
    for row in rows:
        best[row["visual_tokens"]] = max(row["accuracy"], best.get(row["visual_tokens"], 0.0))
    enough = [row for row in rows if row["accuracy"] >= max(best.values()) - ONE_POINT - 1e-9]
    smallest = min(enough, key=lambda row: (row["visual_tokens"], -row["accuracy"]))
    curve = sorted(best.items()) if any(row.get("mean_visual_tokens", 1) for row in rows) else []
    return {"area": area(curve), "smallest_within_a_point": smallest["scale"]}


def area(curve: Sequence[tuple[int, float]]) -> float | None:
    """Area under (tokens, accuracy) points, sorted by tokens, over log2(tokens), divided by the range."""
    if len(curve) < 2:
        return None
    steps = pairwise(curve)
    total = sum((low + high) / 2 * (log2(more) - log2(fewer)) for (fewer, low), (more, high) in steps)
    return total / (log2(curve[-1][0]) - log2(curve[0][0]))


def accuracy_per_tflop(row: dict[str, Any]) -> float | None:
    """Accuracy (0..1) per 10¹² FLOPs of a question up to its first token; None if FLOPs are unknown."""
    if "prefill_flops" not in row:
        return None
    return row["accuracy"] / (row["encode_flops"] + row["prefill_flops"]) * 1e12
