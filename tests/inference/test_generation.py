"""Answers at all scales in one batch, compared with one prompt at a time, without a cache."""

import math

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig

from lit_mm.data.collate import group_by_size
from lit_mm.inference.decoding import HONORED, NEUTRAL, NO_CHOICE, processors, settings
from lit_mm.inference.generation import Asked, generate, generate_each
from lit_mm.inference.prompts import pack_prompts, prompt_codes, prompt_length
from lit_mm.model.batch import IMAGE, Images, Question
from tests.helpers.batches import SCALES, picture, slow_sequence
from tests.helpers.models import packing_vlm64, tiny_vlm64
from tests.helpers.questions import KINDS, pictures, questions
from tests.helpers.videos import ALL_SCALES, TIMES, random_videos, slow_video, video_batch_of

LLMS = ["LlamaConfig", "Qwen2Config", "Qwen3Config"]


@torch.no_grad()
def greedy(vlm, sequence, steps, ends) -> tuple[list[int], list[float], float]:
    """The likeliest token again and again, without a cache; the log-probabilities, and the first token's margin."""
    answer, logprobs, margin = [], [], None
    for _ in range(steps):
        logarithms = vlm.llm(inputs_embeds=sequence[None]).logits[0, -1].log_softmax(-1)
        token = int(logarithms.argmax())
        margin = float(logarithms.sort().values[-2:].diff()) if margin is None else margin
        logprobs.append(float(logarithms[token]))
        if token in ends:
            break
        answer.append(token)
        sequence = torch.cat([sequence, vlm.llm.get_input_embeddings()(torch.tensor([token]))])
    return answer, logprobs, margin


def answered(vlm, asked=None, scales=SCALES, images=None, ends=(347,), decoding="greedy", **chosen):
    groups = group_by_size([image[None] for image in images or pictures()])
    config = settings(vlm.llm, decoding, **{"max_new_tokens": 6, **chosen})
    return generate(vlm, groups, asked or questions(), scales, config, ends)


OWN_SETTINGS = {
    "none": {},
    "penalties": {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_new_tokens": 5},
    "beams": {"num_beams": 3, "length_penalty": 5.0, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_p": 0.9},
    "bans": {"suppress_tokens": list(range(300)), "bad_words_ids": [[n] for n in range(300, 340)]},
    "output": {"return_dict_in_generate": True, "output_scores": True, "max_length": 3, "use_cache": False},
}


@pytest.mark.parametrize("own", OWN_SETTINGS.values(), ids=OWN_SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_scales_at_once_equal_a_greedy_loop_without_cache(kind, own):
    """Whatever the LLM's own generation_config says, of which only the end tokens are taken."""
    vlm, images = KINDS[kind](), pictures()
    kept = vlm.llm.generation_config = GenerationConfig(**own, eos_token_id=[345, 346])
    answers = answered(vlm, images=images)
    for question, at_scales in zip(questions(), answers, strict=True):
        for scale, answer in zip(SCALES, at_scales, strict=True):
            shown = [images[i] for i in question.image_index]
            sequence = slow_sequence(vlm, question.input_ids.tolist(), shown, scale)
            ids, logprobs, margin = greedy(vlm, sequence, 6, [345, 346, 347])
            assert answer.ids == ids
            exact = 1e-9 if kind == "packed" else 1e-5
            assert answer.logprobs == pytest.approx(logprobs, abs=exact)
            assert answer.margin == pytest.approx(margin, abs=exact)
            assert answer.finish == ("length" if len(ids) == 6 else "stop")
            assert answer.visual_tokens == scale * len(shown)
    assert vlm.llm.generation_config is kept


@pytest.mark.parametrize("source", LLMS)
def test_other_llms_answer_alike_together_and_alone(source):
    vlm, images = packing_vlm64(source=source), pictures()
    together = answered(vlm, images=images, ends=[347, 12])
    for number, question in enumerate(questions()):
        for place, scale in enumerate(SCALES):
            [[alone]] = answered(vlm, [question], [scale], images, [347, 12])
            assert alone.ids == together[number][place].ids


@pytest.mark.parametrize("scale", [ALL_SCALES[0], ALL_SCALES[4], ALL_SCALES[8]], ids=str)
def test_videos_with_time_scales(scale):
    vlm, samples = packing_vlm64(time_scales=TIMES), random_videos(5, count=3)
    vlm.llm.generation_config.eos_token_id = None
    batch, asked, done = video_batch_of(samples), [], 0
    for number, ids in enumerate(batch.input_ids):
        count = int((ids == IMAGE).sum())
        asked.append(Question(number, "", ids, list(range(done, done + count)), time_scale=batch.time_scale[number]))
        done += count
    config = settings(vlm.llm, max_new_tokens=4)
    together = generate(vlm, batch.images, asked, ALL_SCALES, config, [347])
    for pieces, question, answers in zip(samples, asked, together, strict=True):
        sequence, _ = slow_video(vlm, pieces, question.input_ids.tolist(), *scale)
        assert prompt_length(vlm, question, scale) == (len(sequence), answers[ALL_SCALES.index(scale)].visual_tokens)
        assert answers[ALL_SCALES.index(scale)].ids == greedy(vlm, sequence, 4, [347])[0]


@pytest.mark.parametrize(
    "chosen",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5},
        {"suppress_tokens": list(range(100, 300))},
        {"bad_words_ids": [[n] for n in range(200, 300)]},
        {"num_beams": 3},
        {"num_beams": 2, "length_penalty": 2.0, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_settings_do_what_transformers_does_with_them(chosen):
    vlm, images = packing_vlm64(), pictures()
    vlm.llm.generation_config.eos_token_id = None
    free = answered(vlm, images=images)[0][0].ids
    ends = [347, free[2]]
    answers = answered(vlm, images=images, ends=ends, **chosen)
    config = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=ends, pad_token_id=0, **chosen)
    for question, at_scales in zip(questions(), answers, strict=True):
        for scale, answer in zip(SCALES, at_scales, strict=True):
            shown = [images[i] for i in question.image_index]
            sequence = slow_sequence(vlm, question.input_ids.tolist(), shown, scale)[None]
            expected = vlm.llm.generate(inputs_embeds=sequence, generation_config=config)[0].tolist()
            cut = next((n for n, token in enumerate(expected) if token in ends), len(expected))
            assert answer.ids == expected[:cut]


def test_the_llms_own_settings_if_asked_for():
    vlm = packing_vlm64()
    vlm.llm.generation_config = GenerationConfig(no_repeat_ngram_size=1, num_return_sequences=1, max_length=2)
    answers = [answer for own in answered(vlm, decoding="own", max_new_tokens=9) for answer in own]
    assert all(len(set(answer.ids)) == len(answer.ids) for answer in answers)
    greedily = [answer for own in answered(vlm, max_new_tokens=9) for answer in own]
    assert any(len(set(answer.ids)) < len(answer.ids) for answer in greedily)


def test_sampling_is_by_the_tempered_distribution_and_repeatable():
    vlm, images, [question] = packing_vlm64(), pictures(), questions()[:1]
    groups = group_by_size([image[None] for image in images])
    config = settings(vlm.llm, temperature=0.7, top_k=3, max_new_tokens=1)
    assert config.do_sample
    drawn = [generate(vlm, groups, [question], [4], config, [], seed=seed)[0][0].ids for seed in range(300)]
    sequence = slow_sequence(vlm, question.input_ids.tolist(), images[:1], 4)[None]
    logits = vlm.llm(inputs_embeds=sequence).logits[0, -1]
    best = logits.topk(3)
    shares = (best.values / 0.7).softmax(-1).tolist()
    for token, share in zip(best.indices.tolist(), shares, strict=True):
        found = sum(ids == [token] for ids in drawn) / 300
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 300) + 1e-9
    assert all(ids[0] in best.indices.tolist() for ids in drawn)
    # the same in another batch, as the seed says, not as the batch is
    long = settings(vlm.llm, temperature=2.0, max_new_tokens=6)
    alone = generate(vlm, groups, [question], [4], long, [], seed=5)[0][0].ids
    assert generate(vlm, groups, questions(), SCALES, long, [], seed=5)[0][1].ids == alone
    assert generate(vlm, groups, [question], [4], long, [], seed=6)[0][0].ids != alone


@pytest.mark.parametrize("chosen", [{}, {"temperature": 2.0}], ids=["greedy", "sampling"])
def test_questions_at_scales_and_with_seeds_of_their_own(chosen):
    """Equal questions with different seeds and texts at several scales included."""
    vlm, groups = packing_vlm64(), group_by_size([image[None] for image in pictures()])
    text = Question("t", "", torch.tensor([5, 9, 2]), [])
    asked = [Asked(question, SCALES[n % 3], n % 2) for n, question in enumerate(questions())]
    asked += [Asked(questions()[0], 4, seed) for seed in (7, 8)] + [Asked(text, scale, 3) for scale in SCALES]
    config = settings(vlm.llm, max_new_tokens=6, **chosen)
    together = generate_each(vlm, groups, asked, config, [347])
    alone = [generate_each(vlm, groups, [own], config, [347])[0] for own in asked]
    assert [own.ids for own in together] == [own.ids for own in alone]
    assert (together[-5].ids != together[-4].ids) == bool(chosen)
    assert together[-1].ids == together[-2].ids == together[-3].ids


@pytest.mark.parametrize("own", [False, True])
def test_every_end_token_of_a_list_ends_an_answer(own):
    """Of the data's, and of the LLM's own settings."""
    vlm = packing_vlm64()
    free = answered(vlm)[0][1].ids
    for end in set(free):
        vlm.llm.generation_config.eos_token_id = [346, end] if own else 346
        answer = answered(vlm, ends=[347] if own else [347, end])[0][1]
        assert answer.ids == free[: free.index(end)]
        assert answer.finish == "stop" and len(answer.logprobs) == len(answer.ids) + 1


def test_an_answer_that_ended_leaves_the_batch():
    """The LLM sees fewer sequences from then on, and the others' answers are as before."""
    vlm, sizes = packing_vlm64(), []
    free = answered(vlm, max_new_tokens=9)
    end = free[1][0].ids[0]
    vlm.llm.base_model.register_forward_pre_hook(
        lambda _, __, named: sizes.append(len(named["inputs_embeds"])), with_kwargs=True
    )
    answers = answered(vlm, max_new_tokens=9, ends=[end])
    assert sizes[0] == 1 and sizes[1] < len(questions()) * len(SCALES) - 2  # the text is decoded once
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    for before, after in zip(free, answers, strict=True):
        for old, new in zip(before, after, strict=True):
            cut = old.ids.index(end) if end in old.ids else len(old.ids)
            assert new.ids == old.ids[:cut]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_an_answer_before_it(kind, tokenizer):
    vlm = KINDS[kind]()
    groups = group_by_size([image[None] for image in pictures()])
    config = settings(vlm.llm, max_new_tokens=8)
    [[free]] = generate(vlm, groups, questions()[:1], [4], config, [347], tokenizer)
    texts = [tokenizer.decode(free.ids[:count], skip_special_tokens=True) for count in range(9)]
    stop = texts[5][len(texts[4]) :]
    first = next(count for count, text in enumerate(texts) if stop in text)
    config = settings(vlm.llm, max_new_tokens=8, stop_strings=[stop, "never said"])
    [[answer]] = generate(vlm, groups, questions()[:1], [4], config, [347], tokenizer)
    assert (answer.finish, answer.text) == ("stop", texts[8][: texts[8].index(stop)].strip())
    assert answer.ids == free.ids[:first]
    assert answer.logprobs == pytest.approx(free.logprobs[:first], abs=1e-5)
    assert settings(vlm.llm, stop_strings=stop).stop_strings == [stop]
    with pytest.raises(ValueError, match="without a tokenizer"):
        generate(vlm, groups, questions()[:1], [4], config, [347])


def test_a_prompt_is_dropped_when_its_asker_gives_up():
    vlm = packing_vlm64()
    free, told = answered(vlm, max_new_tokens=8), []

    def emit(number, answer, is_all):
        told.append((number, len(answer.ids), is_all))
        return not (number == 3 and len(answer.ids) >= 2)

    groups = group_by_size([image[None] for image in pictures()])
    config = settings(vlm.llm, max_new_tokens=8)
    answers = generate(vlm, groups, questions(), SCALES, config, [347], emit=emit)
    assert answers[1][0].finish == "dropped" and answers[1][0].ids == free[1][0].ids[:2]
    assert answers[4][2].ids == free[4][2].ids
    assert {number for number, _, is_all in told if is_all} == set(range(len(questions()) * len(SCALES)))


def test_logits_that_are_no_numbers_end_their_answer_alone():
    vlm, images = packing_vlm64(), pictures()
    free = answered(vlm, images=images)
    groups = group_by_size([image[None] for image in images])
    nested = vlm.encode(groups)
    nested[1] = float("nan")
    config = settings(vlm.llm, max_new_tokens=6)
    answers = generate(vlm, groups, questions(), SCALES, config, [347], nested=nested)
    assert [answers[n][0].finish for n in (1, 3, 4)] == ["error"] * 3
    assert [own.ids for n in (0, 2, 5) for own in answers[n]] == [own.ids for n in (0, 2, 5) for own in free[n]]


def test_logits_that_are_no_numbers_at_the_very_beginning_end_their_answer_alone():
    """Though the shorter prompts are padded with something."""
    vlm, groups = packing_vlm64(), group_by_size([image[None] for image in pictures()])
    asked = [Question(n, "", torch.tensor([IMAGE, *range(n, 4 * n)]), [int(n > 1)]) for n in (1, 2, 3)]
    nested = vlm.encode(groups)
    config = settings(vlm.llm, max_new_tokens=6)
    free = generate(vlm, groups, asked, SCALES, config, [], nested=nested)
    nested[0] = float("nan")
    answers = generate(vlm, groups, asked, SCALES, config, [], nested=nested)
    assert {own.finish for own in answers[0]} == {"error"}
    assert [own.ids for own in answers[1] + answers[2]] == [own.ids for own in free[1] + free[2]]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale: not a setting"),
        ({"temperatur": 1.0}, "temperatur: not a setting"),
        ({"max_new_tokens": 0}, "max_new_tokens.* must be greater than 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens 1.5: expected a whole number"),
        ({"max_new_tokens": "5"}, "max_new_tokens '5': expected a whole number"),
        ({"num_beams": True}, "num_beams True: expected a whole number"),
        ({"temperature": "hot"}, "temperature 'hot': expected a number"),
        ({"top_p": 1.5}, "top_p 1.5: expected 0 to 1"),
        ({"stop_strings": [""]}, "stop_strings .*: expected texts"),
        ({"stop_strings": ""}, "stop_strings '': expected texts"),
        ({"stop_strings": [3]}, "stop_strings .*: expected texts"),
        ({"max_length": 3}, "max_length: not a setting"),
        ({"num_return_sequences": 2}, "num_return_sequences: not a setting"),
        ({"eos_token_id": 3}, "eos_token_id: not a setting"),
        ({"output_scores": True}, "output_scores: not a setting"),
    ],
)
def test_settings_that_are_not_honored_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        settings(tiny_vlm64().llm, **chosen)


def test_an_own_setting_that_is_not_honored_is_refused_by_name():
    vlm = tiny_vlm64()
    vlm.llm.generation_config = GenerationConfig(penalty_alpha=0.6, top_k=4)
    settings(vlm.llm)
    with pytest.raises(ValueError, match=r"penalty_alpha 0\.6 is not supported; set model\.decoding to greedy"):
        settings(vlm.llm, "own")


REFUSED = {
    "min_length": 3,
    "max_time": 1.0,
    "top_h": 0.4,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "encoder_repetition_penalty": 1.5,
    "encoder_no_repeat_ngram_size": 2,
    "renormalize_logits": True,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "remove_invalid_values": True,
    "guidance_scale": 1.5,
    "token_healing": True,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "assistant_ensemble_weight": 0.5,
    "watermarking_config": WatermarkingConfig(),
}
"""Settings of transformers that are not supported, each with a value that would change answers."""


@pytest.mark.parametrize("name", sorted(name for name in vars(GenerationConfig()) if name[0] != "_"))
def test_every_setting_of_an_own_config_is_honored_neutral_or_refused(name):
    """Also one that a further transformers has, which is refused whatever its value."""
    vlm = tiny_vlm64()
    own = vlm.llm.generation_config = GenerationConfig()
    if name in NEUTRAL:
        setattr(own, name, NEUTRAL[name])
        settings(vlm.llm, "own")
    if name not in HONORED | NO_CHOICE:
        setattr(own, name, REFUSED.get(name, "unknown"))
        with pytest.raises(ValueError, match=f"generation_config: {name} .* is not supported"):
            settings(vlm.llm, "own")
        settings(vlm.llm)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_choose_no_token_change_no_answer(kind):
    vlm = KINDS[kind]()
    expected = answered(vlm, decoding="own", max_new_tokens=4)
    vlm.llm.generation_config.update(
        num_beam_groups=1,
        guidance_scale=1.0,
        output_scores=True,
        output_attentions=True,
        max_cache_len=4,
        use_cache=True,
    )
    found = answered(vlm, decoding="own", max_new_tokens=4)
    assert [[a.ids for a in own] for own in found] == [[a.ids for a in own] for own in expected]


def test_sampling_settings_go_through_transformers_processors():
    vlm = tiny_vlm64()
    config = settings(vlm.llm, temperature=0.5, top_p=0.8, top_k=20, min_p=0.01, repetition_penalty=1.2)
    logits = torch.randn(3, 348, generator=torch.Generator().manual_seed(0))
    made = torch.randint(348, (3, 5), generator=torch.Generator().manual_seed(1))
    theirs = vlm.llm._get_logits_processor(config, input_ids_seq_length=0, device="cpu")
    ours = processors(config, [347], torch.device("cpu"))
    assert torch.equal(ours(made, logits.clone()), theirs(made, logits.clone()))


def test_unknown_scale_is_refused():
    vlm = tiny_vlm64()
    with pytest.raises(ValueError, match=r"scale 9 is not one of the model's 16, 4, 1"):
        generate(vlm, Images([], torch.tensor([])), questions(), [16, 9], settings(vlm.llm))


def test_what_prompts_share_is_laid_out_once():
    """Ten questions about one image share the image; one question at every scale shares the text before it."""
    vlm, images = packing_vlm64(), group_by_size([picture(64, 64)[None]])
    asked = [Question(n, "", torch.tensor([9, 3, IMAGE, n, n + 1]), [0]) for n in range(10)]
    packed = pack_prompts([prompt_codes(vlm, images, question, 16) for question in asked])
    assert len(packed.codes) == 2 + 16 + 10 * 2
    packed = pack_prompts([prompt_codes(vlm, images, asked[0], scale) for scale in SCALES])
    assert len(packed.codes) == 2 + sum(SCALES) + 3 * 2
    every = [prompt_codes(vlm, images, question, scale) for question in asked for scale in SCALES]
    packed = pack_prompts(every)
    assert len(packed.codes) == sum(2 + scale for scale in SCALES) + 3 * 10 * 2
    for codes, index in zip(every, packed.index, strict=True):
        assert np.array_equal(packed.codes[index].numpy(), codes)
        assert packed.position_ids[index].tolist() == list(range(len(codes)))
