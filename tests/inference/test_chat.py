"""A conversation that keeps keys, values and encoded images answers as one that computes its whole history anew."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from lit_mm.data.images import ImageOptions
from lit_mm.data.video import VideoOptions
from lit_mm.inference.answering import Ask, Chat, Model
from tests.helpers.models import packing_vlm64, tiny_vlm64

COUNTING = (
    "{{ messages | length }} turns {% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
)
"""A template that renders all turns anew with each one."""
TURNS = [
    ("what is this?", [(64, 64)], 16),
    ("and its color?", [], 16),
    ("what do <image> and <image> show?", [(32, 128), (64, 64)], 16),
    ("is it a circle?", [], 4),
    ("is it red?", [], 16),
    ("is it large?", [(64, 64)], 4),
    ("is it?", [], 1),
]


def pictures():
    draw = np.random.default_rng(0)
    return [[draw.integers(0, 255, (*size, 3), np.uint8) for size in sizes] for _, sizes, _ in TURNS]


def model_of(vlm, tokenizer, **options) -> Model:
    vlm.llm.generation_config.eos_token_id = None
    return Model(vlm, tokenizer, ImageOptions("keep", None), max_new_tokens=5, **options)


def lengths_of(vlm) -> tuple[list[int], list[int]]:
    """Every run's positions of the LLM, and images of the encoder."""
    positions, images = [], []
    vlm.llm.base_model.register_forward_pre_hook(
        lambda _, __, named: positions.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    vlm.encoder.register_forward_pre_hook(lambda _, pixels: images.append(len(pixels[0])))
    return positions, images


def ask(chat: Chat, number: int, **options):
    question, _, tokens = TURNS[number]
    return chat.ask(question, pictures()[number], tokens, **options)


def check(chat: Chat, answer, number: int, before: list[str], images, **options) -> None:
    """Against the same question with its whole history, without anything kept."""
    [alone] = chat.model.answers([Ask(chat.turns[-2], images, before)], [TURNS[number][2]], **options)
    expected = alone[str(TURNS[number][2])]
    assert (answer.ids, answer.text, answer.visual_tokens) == (expected.ids, expected.text, expected.visual_tokens)
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-9)


@pytest.mark.parametrize("template", ["own", "counting"])
@pytest.mark.parametrize("kind", [packing_vlm64, tiny_vlm64])
@pytest.mark.parametrize("image_first", [False, True])
def test_every_turn_is_that_of_the_whole_history(tokenizer, kind, template, image_first):
    """Also with images added, scales changed, a sampled answer, and an answer that was broken off."""
    tokenizer = deepcopy(tokenizer)
    if template == "counting":
        tokenizer.chat_template = COUNTING
    chat = model_of(kind(), tokenizer, image_first=image_first).chat()
    for number in range(len(TURNS)):
        before = list(chat.turns)
        options = {"temperature": 2.0, "seed": 3} if number == 1 else {}
        if number == 4:
            dropped = ask(chat, number, emit=lambda _, __, answer, ___: len(answer.ids) < 2)
            assert dropped.finish == ("dropped" if kind is packing_vlm64 else "length")
            continue
        answer = ask(chat, number, **options)
        shown = [picture for own in pictures()[: number + 1] for picture in own]
        check(chat, answer, number, before, shown, **options)


def test_a_further_turn_costs_only_its_own_tokens(tokenizer):
    chat = model_of(packing_vlm64(), tokenizer).chat()
    positions, images = lengths_of(chat.model.vlm)
    asked = [len(tokenizer.encode(text.replace("<image>", ""))) for text, _, _ in TURNS]
    last: dict[int, int] = {}
    for number, (_, _, tokens) in enumerate(TURNS):
        positions.clear()
        ask(chat, number)
        since = range(last.get(tokens, -1) + 1, number + 1)  # turns without keys and values at this scale
        own = [asked[turn] + tokens * len(TURNS[turn][1]) for turn in since]
        assert sum(own) <= positions[0] <= sum(own) + 24 * len(own)  # with the template, and answers of odd bytes
        last[tokens] = number
    assert images == [1, 1, 1, 1]  # each once; two sizes are two runs


def test_a_turn_that_failed_changes_nothing(tokenizer):
    """An error in the middle of the LLM leaves no half of its keys and values."""
    chat = model_of(packing_vlm64(), tokenizer).chat()
    ask(chat, 0)
    before = list(chat.turns)
    layer = chat.model.vlm.llm.base_model.layers[1]

    def fail(*_):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        ask(chat, 1)
    handle.remove()
    assert chat.turns == before
    check(chat, ask(chat, 1), 1, before, pictures()[0])


def test_logits_that_are_no_numbers_are_not_kept(tokenizer):
    chat = model_of(packing_vlm64(), tokenizer).chat()
    ask(chat, 0)
    before = list(chat.turns)
    nested, chat.memory.nested = chat.memory.nested, torch.full_like(chat.memory.nested, float("nan"))
    chat.memory.pasts.clear()
    with pytest.raises(ValueError, match="not finite"):
        ask(chat, 1)
    chat.memory.nested = nested
    check(chat, ask(chat, 1), 1, before, pictures()[0])


def test_time_scales_begin_anew_with_a_further_image(tokenizer):
    vlm = packing_vlm64(time_scales=[2, 1])
    model = model_of(vlm, tokenizer, video=VideoOptions())
    chat, shown = model.chat(), []
    draw = np.random.default_rng(1)
    for number in range(4):
        before = list(chat.turns)
        new = [draw.integers(0, 255, (64, 64, 3), np.uint8)] if number in (0, 2) else []
        shown += new
        answer = chat.ask(f"what is {number}?", new, "2x4")
        [alone] = model.answers([Ask(chat.turns[-2], shown, before)], ["2x4"])
        assert answer.ids == alone["2x4"].ids
        assert answer.logprobs == pytest.approx(alone["2x4"].logprobs, abs=1e-9)
