"""The answer at a chosen scale is that of the scale asked alone; what was tried before is told and counted."""

import json

import numpy as np
import pytest
import torch

from lit_mm.data.images import ImageOptions
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.inference.answering import Ask, Model
from lit_mm.inference.choosers import Chooser, Confidence, Router, read_chooser
from lit_mm.model import router
from lit_mm.model.batch import IMAGE
from tests.helpers.models import tiny_llm
from tests.helpers.questions import KINDS

TEXTS = [
    "what is this?",
    "and the color of the circle in it?",
    "how many?",
    "is it red?",
    "where?",
    "which shape is it?",
]
PATH = [1, 4, 16]


def made(kind: str = "packed", chooser: Chooser | None = None) -> Model:
    vlm = KINDS[kind]()
    return Model(vlm, load_tokenizer(tiny_llm()), ImageOptions("keep", None), max_new_tokens=4, chooser=chooser)


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def asks() -> list[Ask]:
    shown = [picture(0), picture(1, 128, 128)]
    several = [Ask(text, [shown[n % 2]]) for n, text in enumerate(TEXTS)]
    return [*several, Ask("what differs?", shown), Ask("hello?"), Ask("hm?", [shown[1]], system="say little")]


@pytest.fixture(params=KINDS, scope="module")
def alone(request):
    """A model, the answers to every question at every scale, each asked alone, and how exact they are."""
    model = made(request.param)
    answers = [{scale: model.answers([ask], scale)[0][str(scale)] for scale in PATH} for ask in asks()]
    return model, answers, 1e-10 if request.param == "packed" else 1e-5


STATISTICS = {
    "mean": lambda own, before: np.mean(own.logprobs),
    "least": lambda own, before: np.min(own.logprobs),
    "margin": lambda own, before: own.margin,
    "agreement": lambda own, before: float(before is not None and own.text == before.text),
}


def by_hand(answers, thresholds, statistic) -> list[int]:
    """The scales that are tried."""
    tried = []
    for scale, threshold in zip(PATH, [*thresholds, -np.inf], strict=True):
        before = answers[tried[-1]] if tried else None
        tried.append(scale)
        if STATISTICS[statistic](answers[scale], before) >= threshold:
            return tried
    raise AssertionError


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_chosen_answer_is_that_of_its_scale_alone(alone, statistic):
    model, answers, exact = alone
    thresholds, asked = [], [own for own, ask in zip(answers, asks(), strict=True) if ask.images]
    for scale, before in ((1, None), (4, 1)):  # about half of those that come there go on
        at = [STATISTICS[statistic](own[scale], own.get(before)) for own in asked]
        thresholds.append(0.5 if statistic == "agreement" else float(np.median(at)) - 1e-6)
        asked = [own for own, value in zip(asked, at, strict=True) if value < thresholds[-1]]
    chooser, encoded = Confidence(PATH, thresholds, statistic), []
    handle = model.vlm.encoder.register_forward_hook(lambda _, pixels, __: encoded.append(len(pixels[0])))
    found = [answer for own in model.answers(asks(), chooser) for answer in own.values()]
    handle.remove()
    assert encoded == [1, 1]  # two sizes of images, once each
    for ask, own, answer in zip(asks(), answers, found, strict=True):
        tried = by_hand(own, thresholds, statistic) if ask.images else PATH[:1]
        assert (answer.tried, answer.scale) == (tried, tried[-1])
        assert (answer.ids, answer.finish) == (own[answer.scale].ids, own[answer.scale].finish)
        assert answer.logprobs == pytest.approx(own[answer.scale].logprobs, abs=exact)
        assert answer.visual_tokens == len(ask.images or []) * sum(tried)
        assert 0 < answer.first_token_seconds <= answer.seconds
    if statistic != "agreement":
        assert len({len(answer.tried) for answer in found}) == 3


def test_one_question_computes_what_stands_before_its_image_once():
    model, ask, lengths = made(), asks()[-1], []
    handle = model.vlm.llm.base_model.register_forward_pre_hook(
        lambda _, arguments, options: lengths.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = model.answer(ask.images, ask.question, Confidence([1, 16], [1.0]), system=ask.system, max_new_tokens=1)
    handle.remove()
    prompt = model.prompt(ask)
    whole = [model.length(prompt, scale)[0] for scale in (1, 16)]
    before = prompt.sample.questions[0].input_ids.tolist().index(IMAGE)
    assert before >= 5 and lengths == [whole[0], whole[1] - before]
    alone = model.answers([ask], 16, max_new_tokens=1)[0]["16"]
    assert found.ids == alone.ids and found.logprobs == pytest.approx(alone.logprobs, abs=1e-10)
    assert (found.tried, found.visual_tokens) == ([1, 16], 17)


def test_a_conversation_with_a_chooser_is_one_at_the_chosen_scales():
    model = made(chooser=Confidence(PATH, [-1.0, 10.0], "margin"))
    auto, fixed = model.chat(picture(0)), model.chat(picture(0))
    for text in TEXTS[:4]:
        answer = auto.ask(text, tokens="auto")
        expected = fixed.ask(text, tokens=answer.scale)
        assert answer.ids == expected.ids
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-10)


def test_sampled_answers_are_those_of_the_same_seed():
    model = made()
    chosen = model.answers(asks(), Confidence([4], []), seed=3, temperature=5.0)
    fixed = model.answers(asks(), 4, seed=3, temperature=5.0)
    assert [own["4"].ids for own in chosen if "4" in own] == [own["4"].ids for own in fixed]


@pytest.mark.parametrize("threshold", [-np.inf, np.inf])
def test_only_answers_that_stand_are_streamed(threshold):
    """From the last scale of the path token by token."""
    model, told = made(chooser=Confidence([1, 16], [threshold])), {}

    def emit(number, scale, answer, is_all):
        if answer.ids:
            told.setdefault(number, []).append((scale, list(answer.ids), is_all))

    answers = [next(iter(own.values())) for own in model.answers(asks(), "auto", emit=emit)]
    for number, (ask, answer) in enumerate(zip(asks(), answers, strict=True)):
        pieces = told[number]
        assert {scale for scale, _, _ in pieces} == {answer.scale}
        assert pieces[-1] == (answer.scale, answer.ids, True)
        assert [is_all for _, _, is_all in pieces].count(True) == 1
        assert len(pieces) > 1 or (threshold < 0 and ask.images)


@pytest.mark.parametrize("statistic", ["least", "margin"])
def test_an_answer_that_cannot_stand_is_not_finished(statistic):
    """As soon as it has a token that is too unlikely; the answers are the same as if it were."""
    model = made()
    thresholds = {}
    for ask in asks()[:6]:
        [[answer]] = [list(own.values()) for own in model.answers([ask], 1)]
        thresholds[ask.question] = answer.margin + 1e-9 if statistic == "margin" else answer.logprobs[0] + 1e-9
    counted, passes = [], model.vlm.llm.base_model.register_forward_pre_hook(lambda *_: counted.append(1))
    for ask in asks()[:6]:
        counted.clear()
        answer = model.answer(ask.images, ask.question, Confidence([1, 16], [thresholds[ask.question]], statistic))
        alone = model.answers([ask], 16)[0]["16"]
        assert answer.tried == [1, 16] and answer.ids == alone.ids
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-10)
        assert len(counted) == 1 + 2 * min(4, len(alone.logprobs))  # one pass at scale 1
    passes.remove()


def test_whoever_gives_up_is_not_answered_at_a_finer_scale():
    model, scales = made(chooser=Confidence(PATH, [np.inf] * 2)), []
    [[answer]] = [
        list(own.values())
        for own in model.answers(asks()[:1], "auto", emit=lambda number, scale, *_: bool(scales.append(scale)))
    ]
    assert (answer.finish, answer.tried, set(scales)) == ("dropped", [1], {1})


def test_logits_that_are_no_numbers_are_not_certain():
    """The scale whose tokens are broken is left for the next one."""
    model = made(chooser=Confidence([1, 16], [-1e9]))
    encode = model.vlm.encode
    model.vlm.encode = lambda *given: torch.cat([encode(*given)[:, :-1], encode(*given)[:, -1:] * torch.nan], 1)
    answer = model.answer(picture(0), "what?", "auto")
    assert answer.tried == [1, 16]
    assert answer.ids == model.answer(picture(0), "what?", 16).ids


def routed(kind: str = "packed", slack: float = 0.0) -> Model:
    """With a router that chooses different scales."""
    model = made(kind, Router(PATH, slack))
    torch.manual_seed(5)
    model.vlm.router = router.Router(32, 3, router.RouterOptions(hidden=8)).double()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_chooses_the_coarsest_scale_whose_score_is_near_the_best(kind):
    model, chosen = routed(kind), []
    for slack in (0.0, 0.2, 100.0):
        found = [own for each in model.answers(asks(), Router(PATH, slack)) for own in each.values()]
        for ask, answer in zip(asks(), found, strict=True):
            scores = model.answer(ask.images, ask.question, 1, system=ask.system).router
            assert bool(scores) == bool(ask.images)
            near = [scale for scale in PATH if ask.images and scores[scale] >= max(scores.values()) - slack]
            expected = near[0] if near else 1
            assert answer.tried == ([1] if expected == 1 else [1, expected])
            alone = model.answer(ask.images, ask.question, expected, system=ask.system)
            assert answer.ids == alone.ids and answer.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
            assert answer.visual_tokens == len(ask.images or []) * sum(answer.tried)
            chosen.append((slack, answer.scale))
    assert len(set(chosen)) >= 5  # all three scales at slack 0


def test_a_router_reads_the_coarsest_prompt_once():
    """And goes on with it if it chooses that scale; otherwise what stands before the image is not computed again."""
    model, ask, lengths = routed(), asks()[-1], []
    model.vlm.llm.base_model.register_forward_pre_hook(
        lambda _, arguments, options: lengths.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    whole = [model.length(model.prompt(ask), scale)[0] for scale in (1, 16)]
    before = model.prompt(ask).sample.questions[0].input_ids.tolist().index(IMAGE)
    for first in (True, False):
        with torch.no_grad():
            model.vlm.router.layers[2].weight.zero_()
            model.vlm.router.layers[2].bias.copy_(torch.tensor([0.0, 0.0, 1.0 if first else -1.0]))
        lengths.clear()
        answer = model.answer(ask.images, ask.question, Router([1, 16]), system=ask.system)
        assert answer.tried == ([1] if first else [1, 16])
        further = [1] * (min(4, len(answer.logprobs)) - 1)
        assert lengths == ([whole[0], *further] if first else [whole[0], whole[1] - before, *further])


def test_a_conversation_with_a_router_is_one_at_the_chosen_scales():
    """The scores of a later turn, whose images are in the keys and values kept, are those of the whole conversation."""
    model, turns = routed(slack=0.1), []
    auto = model.chat(picture(0))
    for text in TEXTS[:4]:
        answer = auto.ask(text, tokens="auto")
        alone = model.answer(picture(0), text if turns else f"<image>\n{text}", "auto", turns)
        assert (answer.ids, answer.tried) == (alone.ids, alone.tried)
        assert answer.router == pytest.approx(alone.router, abs=1e-10)
        turns = auto.turns[:]


def test_scores_that_are_no_numbers_lead_to_the_finest_scale():
    assert Router(PATH).choice(dict.fromkeys(PATH, float("nan"))) == 16
    model = routed()
    encode = model.vlm.encode
    model.vlm.encode = lambda *given: torch.cat([encode(*given)[:, :-1], encode(*given)[:, -1:] * torch.nan], 1)
    assert model.answer(picture(0), "what?", "auto").tried == [1, 16]


class Circling(Chooser):
    scales = PATH

    def next(self, question, answers):
        return 4


def test_mistakes_are_named():
    model = made()
    with pytest.raises(ValueError, match="no chooser"):
        model.answer(None, "what?", "auto")
    for scale in (5, "4"):
        with pytest.raises(ValueError, match=f"tries scale {scale!r}: expected some of the model's 16, 4, 1"):
            model.answer(picture(0), "what?", Confidence([scale], []))
    with pytest.raises(ValueError, match="scale 4 again"):
        model.answer(picture(0), "what?", Circling())
    with pytest.raises(ValueError, match="expected 1, one for each of the scales 1, 4 but the last, found 0"):
        Confidence([1, 4], [])
    with pytest.raises(ValueError, match="scales: expected at least one, each only once"):
        Confidence([4, 4], [0.0])
    with pytest.raises(ValueError, match="statistic: expected one of mean"):
        Confidence([1], [], "most")
    with pytest.raises(ValueError, match="needs the model's router at scale 1, but got no scores"):
        model.answer(picture(0), "what?", Router([1, 4]))
    with pytest.raises(ValueError, match="a slack of at least 0, found 1, 4 and -1"):
        Router([1, 4], -1)


def test_a_file_describes_a_chooser(tmp_path):
    file = tmp_path / "chooser.json"
    front = [
        {"path": ["1"], "thresholds": [], "mean_tokens": 1.0, "accuracy": 0.4},
        {"path": ["1", "16"], "thresholds": [-0.5], "mean_tokens": 9.0, "accuracy": 0.8},
    ]
    told = {"statistic": "least", "path": ["1", "4", "16"], "thresholds": [-1, -0.25], "front": front}
    told["calibrated_on"] = {"step": 7}
    file.write_text(json.dumps(told))
    assert read_chooser(file, [16, 4, 1]) == (Confidence([1, 4, 16], [-1, -0.25], "least"), 7)
    assert read_chooser(file, [16, 4, 1], mean_tokens=9)[0] == Confidence([1, 16], [-0.5], "least")
    assert read_chooser(file, [16, 4, 1], mean_tokens=8.9)[0] == Confidence([1], [], "least")
    file.write_text(json.dumps(told | {"statistic": "router", "thresholds": [0.25]}))
    assert read_chooser(file, [16, 4, 1])[0] == Router([1, 4, 16], 0.25)
    assert read_chooser(file, [16, 4, 1], mean_tokens=8)[0] == Router([1])
    with pytest.raises(ValueError, match="the fewest that a chooser reaches are 1"):
        read_chooser(file, [16, 4, 1], mean_tokens=0.5)
    with pytest.raises(ValueError, match=r"chooser\.json: no '4'; the model has scales 16, 1"):
        read_chooser(file, [16, 1])
