"""The model without packing against a slow, obvious way: one sample at a time, the LLM's own loss and greedy loop."""

import pytest
import torch
from transformers import GenerationConfig

from lit_mm.data.collate import group_by_size
from lit_mm.inference.generation import generate
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Images, Question
from tests.helpers.batches import SCALES, batch_of, picture, samples, slow_loss, slow_sequence
from tests.helpers.models import tiny_vlm, tiny_vlm64


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("GraniteConfig", {"logits_scaling": 8.0}),
        ("CohereConfig", {"logit_scale": 0.25}),
        ("Gemma2Config", {"final_logit_softcapping": 5.0, "head_dim": 8}),
    ],
)
def test_logits_scaled_or_capped_behind_the_head(source, sizes):
    vlm = tiny_vlm(source=source, **sizes)
    losses = vlm(batch_of(*samples())).per_scale
    expected = torch.stack([slow_loss(vlm, samples(), scale) for scale in SCALES])
    assert torch.allclose(losses, expected, rtol=1e-5)


def test_text_alone():
    vlm = tiny_vlm64()
    losses = vlm(batch_of(samples()[2])).per_scale
    assert torch.allclose(losses, slow_loss(vlm, samples()[2:], 1).expand(3), rtol=1e-12)


def test_logits_only_where_there_is_a_target():
    vlm, shapes = tiny_vlm(), []
    vlm.llm.get_output_embeddings().register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    vlm(batch_of(*samples()))
    assert shapes == [(7, 348)] * 3


def test_encoder_and_projector_run_once():
    vlm, calls = tiny_vlm(), []
    vlm.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    vlm.projector.layers.register_forward_hook(lambda *_: calls.append("projector"))
    one, two = samples()[0], samples()[0]
    vlm(batch_of(one, two))
    assert calls == ["encoder", "projector"]


def questions():
    return [
        Question("a", "", torch.tensor([IMAGE, 5, 6]), [0]),
        Question("b", "", torch.tensor([9, IMAGE, 10, 12, IMAGE, 14, 15]), [1, 0]),
        Question("c", "", torch.tensor([20, 21]), []),
    ]


def greedy(vlm, question, images, scale, steps, ends) -> list[int]:
    """The likeliest token again and again, without a cache."""
    sequence, answer = slow_sequence(vlm, question.input_ids.tolist(), images, scale), []
    for _ in range(steps):
        token = int(vlm.llm(inputs_embeds=sequence[None]).logits[0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
        sequence = torch.cat([sequence, vlm.llm.get_input_embeddings()(torch.tensor([token]))])
    return answer


OWN_SETTINGS = {
    "none": {},
    "penalties": {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_new_tokens": 5},
    "beams": {"num_beams": 3, "length_penalty": 5.0, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_p": 0.9},
    "bans": {"suppress_tokens": list(range(300)), "bad_words_ids": [[n] for n in range(300, 340)]},
    "output": {"return_dict_in_generate": True, "output_scores": True, "max_length": 3, "use_cache": False},
}


@pytest.mark.parametrize("own", OWN_SETTINGS.values(), ids=OWN_SETTINGS)
def test_generation_equals_a_greedy_loop_without_cache(own):
    """Whatever the LLM's own generation_config says; of which the end tokens count alone."""
    vlm = tiny_vlm64()
    kept = vlm.llm.generation_config = GenerationConfig(**own, eos_token_id=[345, 346])
    images = [picture(64, 64), picture(32, 128)]
    groups = group_by_size([image[None] for image in images])
    for scale in SCALES:
        answers = generate(vlm, groups, questions(), scale, max_new_tokens=6, end_ids=[347])
        shown = [[images[i] for i in question.image_index] for question in questions()]
        for question, seen, answer in zip(questions(), shown, answers, strict=True):
            assert answer.tolist() == greedy(vlm, question, seen, scale, 6, [345, 346, 347])
    assert vlm.llm.generation_config is kept


def test_the_llms_own_settings_if_asked_for():
    vlm = tiny_vlm64()
    images = group_by_size([picture(64, 64)[None], picture(32, 128)[None]])
    vlm.llm.generation_config = GenerationConfig(no_repeat_ngram_size=1, num_return_sequences=1, max_length=2)
    answers = generate(vlm, images, questions(), 4, max_new_tokens=9, end_ids=[347], decoding="own")
    assert len(answers) == 3 and all(len(answer.unique()) == len(answer) for answer in answers)
    greedily = generate(vlm, images, questions(), 4, max_new_tokens=9, end_ids=[347])
    assert any(len(answer.unique()) < len(answer) for answer in greedily)


@pytest.mark.parametrize("own", [False, True])
def test_every_end_token_of_a_list_ends_an_answer(own):
    """Of the data's, and of the LLM's own settings."""
    vlm = tiny_vlm64()
    images = group_by_size([picture(64, 64)[None], picture(32, 128)[None]])
    [free, *_] = generate(vlm, images, questions(), 4, max_new_tokens=6, end_ids=[347])
    for end in free.unique().tolist():
        vlm.llm.generation_config.eos_token_id = [346, end] if own else 346
        [answer, *_] = generate(vlm, images, questions(), 4, max_new_tokens=6, end_ids=[347] if own else [347, end])
        assert answer.tolist() == free.tolist()[: free.tolist().index(end)]


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale 9 is not one of the model's 16, 4, 1"):
        generate(tiny_vlm(), Images([], torch.tensor([])), questions(), 9)


def test_image_of_an_illegal_grid_is_refused():
    with pytest.raises(ValueError, match=r"\[16, 4\] do not divide a 3×5 grid, which allows \[15, 1\]"):
        tiny_vlm()(batch_of(([IMAGE, 5, 0], [IGNORE_INDEX, 5, 0], [picture(48, 80)])))


def test_images_come_back_in_order_from_groups():
    vlm = tiny_vlm64()
    images = [picture(64, 64), picture(32, 128), picture(64, 64), picture(60, 60)]
    together = vlm.encode(group_by_size([image[None] for image in images]))
    for number, image in enumerate(images):
        alone = vlm.encode(Images([image[None]], torch.tensor([0])))
        assert torch.allclose(together[number], alone[0], rtol=1e-12)
