"""`generate` and `forward` of the exported classes, with the options that transformers has."""

import pytest
import torch
from transformers import GenerationConfig

from lit_mm.data.images import ImageOptions
from lit_mm.hub.export import auto_processor, export
from lit_mm.hub.huggingface.modeling_lit_mm import LitMMForConditionalGeneration
from lit_mm.hub.huggingface.processing_lit_mm import LitMMProcessor
from tests.helpers.exporting import model_of
from tests.helpers.media import noise
from tests.helpers.models import tiny_llm


@pytest.fixture(scope="module")
def ours():
    return model_of("five stages", tiny_llm(), ImageOptions("pad", 64))


@pytest.fixture(scope="module")
def model(ours, tmp_path_factory) -> LitMMForConditionalGeneration:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(ours, folder)
    return LitMMForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(ours) -> LitMMProcessor:
    return auto_processor(ours)


def asked(processor, *counts, **options):
    """A prompt for each number of images."""
    texts = ["<image>" * count + "\nwhat is it?" for count in counts]
    images = [noise(64, 64)] * sum(counts)
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt", **options)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("scale", [16, 4, 1])
def test_options_of_decoding_give_lit_mms_answers(ours, model, processor, options, scale):
    """`<image>` is beyond the vocabulary, where transformers' processors of logits would look for it."""
    inputs = asked(processor, 1)
    assert processor.image_token_id == model.config.text_config.vocab_size
    made = model.generate(**inputs, num_visual_tokens=scale, max_new_tokens=5, **options)
    answer = ours.answer(noise(64, 64), "<image>\nwhat is it?", scale, max_new_tokens=5, **options)
    assert made[0, inputs["input_ids"].shape[1] :].tolist()[: len(answer.ids)] == answer.ids


def test_several_samples_of_a_batch_begin_with_their_prompts(model, processor):
    inputs = asked(processor, 2, 1, 0)
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4, "min_new_tokens": 4}
    made = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    length = inputs["input_ids"].shape[1]
    assert made.sequences.shape == (6, length + 4) and len(made.scores) == 4
    assert torch.equal(made.sequences[:, :length], inputs["input_ids"].repeat_interleave(2, 0))


def test_a_generation_config_and_ids_by_position(model, processor):
    inputs = asked(processor, 1)
    ids = inputs.pop("input_ids")
    made = model.generate(ids, **inputs, generation_config=GenerationConfig(max_new_tokens=2, do_sample=False))
    assert torch.equal(made, model.generate(input_ids=ids, **inputs, max_new_tokens=2))


def test_text_alone_needs_no_images(ours, model, processor):
    inputs = processor(text="what is it?", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=3)
    answer = ours.answer(None, "what is it?", max_new_tokens=3)
    assert made[0, inputs["input_ids"].shape[1] :].tolist()[: len(answer.ids)] == answer.ids


def test_prompts_written_for_few_tokens_are_not_answered_with_more(model, processor):
    with pytest.raises(ValueError, match=r"num_visual_tokens 16: expected one of \[4, 1\], as the processor wrote 4"):
        model.generate(**asked(processor, 1, num_visual_tokens=4), num_visual_tokens=16)
    with pytest.raises(ValueError, match=r"num_visual_tokens 5: expected one of \[16, 4, 1\]"):
        model.generate(**asked(processor, 1), num_visual_tokens=5)
    with pytest.raises(ValueError, match=r"num_visual_tokens 5: expected one of the model's \[16, 4, 1\]"):
        asked(processor, 1, num_visual_tokens=5)


def test_images_and_their_places_must_agree(model, processor):
    inputs = asked(processor, 2)
    with pytest.raises(ValueError, match="input_ids have 32 image tokens, the images have 16 visual tokens"):
        model(
            **{
                name: own if name == "input_ids" else own[:1]
                for name, own in inputs.items()
                if name != "attention_mask"
            }
        )
    with pytest.raises(ValueError, match="input_ids have 32 image tokens, the images have 0 visual tokens"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"7 visual tokens per image: expected one of the model's \[16, 4, 1\]"):
        model(**{**inputs, "visual_tokens": torch.tensor([7, 7])})


def test_the_loss_is_that_of_the_answer(ours, model, processor):
    """The mean over the answer's tokens of what lit_mm scores it by."""
    inputs, end = asked(processor, 1), ours.conversation.end_id
    answer = processor.tokenizer.encode(" red", add_special_tokens=False)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[*answer, end]])], 1)
    labels = ids.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    fields = {name: inputs[name] for name in ("pixel_values", "image_sizes", "visual_tokens")}
    loss = model(input_ids=ids, labels=labels, **fields).loss
    [[score]] = ours.score(noise(64, 64), "<image>\nwhat is it?", ["red"], 16).values()
    assert loss.item() * (len(answer) + 1) == pytest.approx(-score, abs=1e-4)


def test_an_image_that_is_too_large_once_padded_is_refused(ours):
    processor = auto_processor(ours)
    processor.image_processor.image_options["max_pixels"] = 5000
    with pytest.raises(ValueError, match="an image of 4×200 pixels: the limit is 5000 once resized"):
        processor(text="<image>", images=[noise(200, 4)])
