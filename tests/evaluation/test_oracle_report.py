"""The oracle's figures as JSON, tables and picture."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from lit_mm.evaluation.oracle import envelope
from lit_mm.evaluation.oracle_report import draw, markdown, results_of, tables

SCALES = ["16", "4", "1"]
SCORES = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]]
TYPES = ["color", "color", "text|[b]", "text|[b]", "text|[b]", "text|[b]"]


@pytest.fixture
def result():
    return results_of(SCORES, [16, 4, 1], SCALES, TYPES)


def test_figures_by_hand(result):
    assert json.loads(json.dumps(result)) == result
    assert [row["needed_by"] for row in result["scales"]] == [1, 2, 2]
    assert [row["accuracy"] for row in result["scales"]] == pytest.approx([4 / 6, 3 / 6, 2 / 6])
    assert [row["envelope"] for row in result["scales"]] == pytest.approx([5 / 6, (4 + 12 / 15) / 6, 2 / 6])
    assert result["no_scale_right"] == 1
    assert result["oracle"] == pytest.approx({"accuracy": 5 / 6, "right": 5 / 6, "mean_tokens": 4.5})
    dealt = (1 * 4 + 2 * 3 + 3 * 2) / 36, (1 * 16 + 2 * 4 + 3 * 1) / 6
    assert result["shuffled"] == pytest.approx({"accuracy": dealt[0], "mean_tokens": dealt[1]})
    assert result["fixed_at_oracle_tokens"] == pytest.approx((3 + 0.5 / 12) / 6)
    text = result["types"]["text|[b]"]
    assert list(result["types"]) == ["text|[b]", "color"]
    assert (text["questions"], text["needed_by"], text["no_scale_right"]) == (4, [1, 1, 1], 1)
    assert text["oracle"] == pytest.approx({"accuracy": 3 / 4, "mean_tokens": 22 / 4})


def test_a_question_of_several_types_counts_for_each():
    found = results_of(SCORES, [16, 4, 1], SCALES, ["a, b", "b", "a, c", "a", "a", "b"])["types"]
    assert {name: own["questions"] for name, own in found.items()} == {"a": 4, "b": 3, "c": 1}
    assert found["c"]["accuracy"] == SCORES[2]


def test_tables_have_the_figures(result):
    shown = io.StringIO()
    Console(file=shown, width=120).print(*tables(result))
    for told in ("needed by %", "33.3", "oracle", "4.5", "text|[b]", "16.7 % of the questions"):
        assert told in shown.getvalue()
    text = markdown(result)
    assert "| 16 | 16.0 | 66.7 | 16.7 | 83.3 |" in text
    assert "| oracle | 4.5 | 83.3 |  |  |" in text
    assert r"| text\|[b] | 4 | 50.0 | 25.0 | 25.0 | 75.0 | 5.5 | 25.0 |" in text
    assert "| 4 | 50.0 | 100.0 | 50.0 |" in text


def test_one_type_is_not_broken_down():
    for types in (None, ["a"] * 6):
        plain = results_of(SCORES, [16, 4, 1], SCALES, types)
        assert plain["types"] == {}
        assert "By question type" not in markdown(plain)
        assert len(draw(plain).axes) == 2


def test_picture_has_the_points(result):
    above, needed, types = draw(result).axes
    lines = {line.get_label(): line.get_xydata() for line in above.lines}
    assert lines["oracle"][0] == pytest.approx([4.5, 500 / 6])
    assert lines["fixed scale"] == pytest.approx(np.array([[16, 400 / 6], [4, 50], [1, 200 / 6]]))
    assert (lines["best possible choice per question"][:, 1] >= lines["best mixture of two fixed scales"][:, 1]).all()
    assert [bar.get_height() for bar in needed.patches] == pytest.approx([200 / 6, 200 / 6, 100 / 6, 100 / 6])
    assert sum(bar.get_width() for bar in types.patches) == pytest.approx(200)  # two types, 100 % each
    assert draw(result).savefig(io.BytesIO()) is None


def test_many_corners_are_thinned_on_the_curve():
    rng = np.random.default_rng(0)
    scores, tokens = rng.random((400, 3)), rng.integers(1, 500, (400, 3))
    kept, curve = results_of(scores, tokens, SCALES)["envelope"], envelope(scores, tokens)
    assert len(curve.tokens) > len(kept["tokens"]) == 200
    assert curve.at(kept["tokens"]) == pytest.approx(kept["accuracy"])
    assert (kept["tokens"][0], kept["tokens"][-1]) == (curve.tokens[0], curve.tokens[-1])
    assert draw(results_of(scores, tokens, SCALES, [f"type {n % 30}" for n in range(400)])).axes


@pytest.mark.parametrize(
    ("tokens", "scales", "types", "told"),
    [
        ([16, 4, 1], ["16"], None, r"scales: expected 3 names, as scores has columns, found \['16'\]"),
        ([16, 4, 1], SCALES, ["a"], "types: expected 6, one for each question, found 1"),
        ([0, 0, 0], SCALES, None, "no question shows an image"),
    ],
)
def test_bad_input(tokens, scales, types, told):
    with pytest.raises(ValueError, match=told):
        results_of(SCORES, tokens, scales, types)
