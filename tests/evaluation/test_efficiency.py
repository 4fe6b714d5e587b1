"""What scales say together, against arithmetic."""

import numpy as np
import pytest

from lit_mm.costs.flops import Costs
from lit_mm.evaluation.efficiency import Asked, accuracy_per_tflop, area, scale_costs, summary
from lit_mm.model.attention import causal_pairs
from lit_mm.model.batch import Counts, Prompts
from lit_mm.model.scales import VideoScale
from tests.helpers.models import tiny_vlm


def row(tokens, accuracy, scale=None):
    return {"scale": str(scale or tokens), "visual_tokens": tokens, "accuracy": accuracy}


def test_area_is_the_mean_over_the_logarithm():
    curve = [(1, 0.2), (9, 0.5), (36, 0.7), (144, 0.8), (576, 0.75)]
    fine = np.linspace(0, np.log2(576), 1_000_001)
    heights = np.interp(fine, np.log2([tokens for tokens, _ in curve]), [accuracy for _, accuracy in curve])
    assert area(curve) == pytest.approx(heights.mean(), rel=1e-5)
    assert area([(1, 0.4), (16, 0.4)]) == pytest.approx(0.4)
    assert area([(7, 0.4)]) is None


@pytest.mark.parametrize(
    ("accuracies", "smallest"),
    [((0.9, 0.89, 0.5), "4"), ((0.9, 0.8899, 0.5), "16"), ((0.5, 0.5, 0.5), "1"), ((0.1, 0.2, 0.9), "1")],
)
def test_smallest_within_a_point(accuracies, smallest):
    rows = [row(tokens, accuracy) for tokens, accuracy in zip((16, 4, 1), accuracies, strict=True)]
    assert summary(rows)["smallest_within_a_point"] == smallest


def test_of_levels_with_as_many_tokens_the_better_one_counts():
    rows = [row(8, 0.9, "8x1"), row(8, 0.6, "2x4"), row(2, 0.5, "2x1")]
    assert summary(rows) == {"area": pytest.approx(0.7), "smallest_within_a_point": "8x1"}


def test_costs_of_what_was_asked_are_those_of_each_question():
    """Three prompts with an image and one without, two scales, counted one by one."""
    costs, scales = Costs(tiny_vlm()), [16, 4]
    lengths = {16: [5 + 16, 7 + 16, 9 + 16, 6], 4: [5 + 4, 7 + 4, 9 + 4, 6]}
    asked = Asked(scales)
    for pieces in ([0, 1], [2, 3]):
        prompts = [
            Prompts(
                text=sum((5, 7, 9, 6)[n] for n in pieces),
                visual=sum(scale * (n < 3) for n in pieces),
                pairs=sum(causal_pairs(lengths[scale][n]) for n in pieces),
            )
            for scale in scales
        ]
        asked.add(Counts(prompts=prompts, asked=[(2 if pieces == [0, 1] else 1, 64, 64)]), len(pieces))
    found = scale_costs(asked.numbers(costs), scales, cached=10)
    for scale, own in zip(scales, found, strict=True):
        prefill = [costs.text(n, causal_pairs(n), 1).total.forward for n in lengths[scale]]
        assert own["prefill_flops"] == sum(prefill) / 4
        assert own["encode_flops"] == 3 * costs.image((64, 64)).total.forward / 4
        assert own["mean_visual_tokens"] == 3 * scale / 4
        assert own["kv_bytes"] == 10 * own["prompt_tokens"] == 10 * sum(lengths[scale]) / 4
        own["accuracy"] = 0.5
        assert accuracy_per_tflop(own) == 0.5e12 / (own["prefill_flops"] + own["encode_flops"])


def test_without_costs_there_are_no_flops():
    asked = Asked([VideoScale(2, 4)])
    asked.add(Counts(prompts=[Prompts(3, 8, 66)]), 1)
    [own] = scale_costs(asked.numbers(None), asked.all_scales, cached=None)
    assert own == {"scale": "2x4", "frames": 2, "visual_tokens": 8, "mean_visual_tokens": 8, "prompt_tokens": 11}
    assert accuracy_per_tflop(own | {"accuracy": 1.0}) is None
