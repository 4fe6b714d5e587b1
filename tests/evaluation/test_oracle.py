"""The oracle and the envelope against all choices that there are, on few questions."""

from itertools import permutations, product

import numpy as np
import pytest

from lit_mm.evaluation.oracle import envelope, fixed_mixture, oracle, shuffled

TOKENS = [16, 4, 1]
BY_HAND = [  # scores at 16, 4 and 1 tokens
    [1, 1, 1],
    [1, 1, 0],
    [1, 0, 0],
    [0, 1, 0],  # better with fewer
    [1, 0, 1],
    [0, 0, 0],
]


def all_choices(scores, tokens):
    """[choices, 2] mean tokens and mean score of every way to choose a scale for each question."""
    scores, tokens = np.asarray(scores, float), np.broadcast_to(np.asarray(tokens, float), np.shape(scores))
    questions = np.arange(len(scores))
    choices = [list(choice) for choice in product(range(scores.shape[1]), repeat=len(scores))]
    return np.array([(tokens[questions, own].mean(), scores[questions, own].mean()) for own in choices])


def random_case(seed, partial, per_question):
    rng = np.random.default_rng(seed)
    scores = rng.choice([0, 0.3, 0.6, 0.9, 1], (5, 3)) if partial else rng.integers(0, 2, (5, 3))
    tokens = rng.integers(0, 30, (5, 3) if per_question else 3)
    return scores, tokens


def test_oracle_by_hand():
    found = oracle(BY_HAND, TOKENS)
    assert found.needed.tolist() == [2, 1, 0, 1, 2, 2]
    assert found.right.tolist() == [True] * 5 + [False]
    assert found.accuracy == pytest.approx(5 / 6)
    assert found.mean_tokens == pytest.approx((1 + 4 + 16 + 4 + 1 + 1) / 6)
    assert found.histogram.tolist() == [1, 2, 2]
    agreeing = [[6, 3, 4], [3, 6, 3], [4, 3, 6]]
    assert found.agreement * 6 == pytest.approx(np.array(agreeing))


@pytest.mark.parametrize("seed", range(20))
def test_oracle_is_the_cheapest_of_the_best_choices(seed):
    scores, tokens = random_case(seed, partial=False, per_question=seed % 2)
    points, found = all_choices(scores, tokens), oracle(scores, tokens)
    best = points[points[:, 1] == points[:, 1].max()]
    assert (found.mean_tokens, found.accuracy) == pytest.approx(best[best[:, 0].argmin()])


def test_partial_credit_needs_half_unless_told():
    assert oracle([[1, 0.5, 0.4]], TOKENS).needed.tolist() == [1]
    assert oracle([[1, 0.5, 0.4]], TOKENS).accuracy == 0.5
    assert oracle([[1, 0.5, 0.4]], TOKENS, threshold=0.6).needed.tolist() == [0]
    wrong = oracle([[0.4, 0.2, 0.3]], TOKENS)
    assert (wrong.needed.tolist(), wrong.accuracy, wrong.right.tolist()) == ([2], 0.3, [False])
    assert wrong.histogram.sum() == 0


def test_of_equally_many_tokens_the_last_scale():
    assert oracle([[1, 1, 1], [1, 1, 0], [0, 0, 0]], [8, 4, 4]).needed.tolist() == [2, 1, 2]


@pytest.mark.parametrize("per_question", [False, True])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_no_choice_is_above_the_envelope_and_its_corners_are_choices(seed, partial, per_question):
    scores, tokens = random_case(seed, partial, per_question)
    points, curve = all_choices(scores, tokens), envelope(scores, tokens)
    assert (points[:, 1] <= curve.at(points[:, 0]) + 1e-12).all()
    corners = np.stack([curve.tokens, curve.accuracy], 1)
    assert all(np.isclose(points, corner).all(1).any() for corner in corners)
    assert curve.tokens[0] == pytest.approx(points[:, 0].min())
    assert curve.accuracy[-1] == pytest.approx(points[:, 1].max())
    gains = np.diff(curve.accuracy) / np.diff(curve.tokens)
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all()


def test_envelope_by_hand():
    curve = envelope(BY_HAND, TOKENS)  # two questions gain 1 for 3 tokens, one 1 for 15
    assert curve.tokens * 6 == pytest.approx(np.array([6, 12, 27]))
    assert curve.accuracy * 6 == pytest.approx(np.array([2, 4, 5]))
    assert curve.at([1.5, 2, 4.5, 100]) * 6 == pytest.approx(np.array([3, 4, 5, 5]))
    assert np.isnan(curve.at(0.9))


def test_envelope_skips_a_scale_that_gains_less_per_token():
    curve = envelope([[1, 0.1, 0]], [3, 2, 1])
    assert (curve.tokens.tolist(), curve.accuracy.tolist()) == ([1, 3], [0, 1])


def test_envelope_of_answers_that_gain_nothing():
    curve = envelope([[0, 1], [0, 0]], [4, 1])
    assert (curve.tokens.tolist(), curve.accuracy.tolist()) == ([1], [0.5])


@pytest.mark.parametrize("seed", range(10))
def test_the_best_two_fixed_scales(seed):
    scores, tokens = random_case(seed, partial=True, per_question=False)
    tokens = [16, 4, 1]
    curve, means = fixed_mixture(scores, tokens), scores.mean(0)
    for budget in (1, 2, 4, 7, 16, 20):
        reached = [
            share * means[one] + (1 - share) * means[other]
            for one, other in product(range(3), repeat=2)
            for share in np.linspace(0, 1, 61)
            if share * tokens[one] + (1 - share) * tokens[other] <= budget + 1e-9
        ]
        assert curve.at(budget) == pytest.approx(max(reached), abs=1e-9)  # budgets are multiples of the shares' step


@pytest.mark.parametrize("per_question", [False, True])
def test_shuffled_is_the_mean_over_all_orders(per_question):
    scores, tokens = random_case(3, partial=True, per_question=per_question)
    needed, rows = oracle(scores, tokens).needed, np.arange(5)
    spread = np.broadcast_to(tokens, scores.shape)
    dealt = [(scores[rows, list(own)].mean(), spread[rows, list(own)].mean()) for own in permutations(needed)]
    assert shuffled(needed, scores, tokens) == pytest.approx(tuple(np.mean(dealt, 0)))


@pytest.mark.parametrize(
    ("scores", "tokens", "told"),
    [
        ([1, 0], [2, 1], r"scores: expected \[questions, scales\], at least one of each, found \[2\]"),
        (np.zeros((0, 2)), [2, 1], r"found \[0, 2\]"),
        ([[1, 0]], [1], r"tokens: expected \[2\] or \[1, 2\], as scores are, found \[1\]"),
        ([[1, 0], [0, np.nan]], [2, 1], r"scores\[1, 1\]: expected a number from 0 to 1, found nan"),
        ([[1, 2]], [2, 1], r"scores\[0, 1\].*found 2.0"),
        ([[1, 0]], [2, -1], r"tokens\[1\]: expected a number of at least 0, found -1.0"),
    ],
)
def test_bad_input(scores, tokens, told):
    with pytest.raises(ValueError, match=told):
        envelope(scores, tokens)
