"""An exported folder called as vLLM's Transformers backend calls one (vllm/model_executor/models/transformers, November
2026): what it asks of the processor before and with images, and how it runs the model. vLLM itself is not run."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_mm.data.images import ImageOptions
from lit_mm.hub.export import export
from lit_mm.inference.answering import Ask
from lit_mm.model.batch import IMAGE
from tests.helpers.exporting import keep_code_in, model_of, our_logits
from tests.helpers.media import noise
from tests.helpers.models import tiny_llm

TRUST = {"trust_remote_code": True}
SCALES = [16, 4, 1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        keep_code_in(folder / "code", patch)
        model = model_of("five stages", tiny_llm("Qwen2Config"), ImageOptions("pad", 64))
        export(model, folder / "model")
        yield model, folder / "model"


@pytest.fixture(scope="module")
def processor(exported):
    return AutoProcessor.from_pretrained(exported[1], **TRUST)


@pytest.fixture
def backend(exported, monkeypatch):
    """The model as `Base.__init__` makes it from the config, with attention of vLLM's own, which gets
    `attention_instances` with every call; its weights by their names; the output head; and the calls of attention."""
    config, calls = AutoConfig.from_pretrained(exported[1], **TRUST), []

    def attention(module, query, key, value, attention_mask=None, *, attention_instances, scaling=None, **kwargs):
        calls.append(attention_instances[module.layer_idx])
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attention)
    config.get_text_config()._attn_implementation = "vllm"
    with torch.device("meta"):
        assert all(each.is_meta for each in AutoModel.from_config(config, **TRUST).parameters())
    state = {name.removeprefix("model."): t for name, t in load_file(exported[1] / "model.safetensors").items()}
    head = state.pop("lm_head.weight")
    model = AutoModel.from_config(config, dtype=torch.float32, **TRUST)
    model.load_state_dict(state)
    return model.eval(), head, calls


def test_the_class_says_that_it_fits(exported):
    config = AutoConfig.from_pretrained(exported[1], **TRUST)
    kind = get_class_from_dynamic_module(config.auto_map["AutoModel"], exported[1])
    assert kind.is_backend_compatible() and kind._supports_attention_backend
    assert config.get_text_config() is config.text_config and config.get_text_config() is not config
    assert config.text_config.vocab_size and config.text_config.hidden_size == 32


def test_it_finds_the_parts(backend):
    model, *_ = backend
    assert model.get_encoder(modality="image") is model.vision_tower
    assert model.get_decoder() is model.language_model
    assert model.tp_plan and all(name.startswith("language_model.") for name in model.tp_plan)
    assert model.base_model_prefix == "model"


@pytest.mark.parametrize("asked", [None, *SCALES])
def test_tokens_are_counted_before_there_are_images(processor, asked):
    options = {} if asked is None else {"num_visual_tokens": asked}
    for size in (64, 64), (10_000, 10_000):  # it tries an arbitrary very large size
        told = processor._get_num_multimodal_tokens(image_sizes=([*size],), **options)
        assert told["num_image_tokens"] == [asked or 16] and told["num_image_patches"] == [1]
    assert (getattr(processor.image_processor, "size", None) or {}).get("height") is None
    with pytest.raises(ValueError, match="expected one of the model's"):
        processor._get_num_multimodal_tokens(image_sizes=([64, 64],), num_visual_tokens=5)


@pytest.mark.parametrize("asked", [None, *SCALES])
def test_placeholders_are_replaced_in_ids_of_its_own(exported, processor, asked):
    options = {} if asked is None else {"num_visual_tokens": asked}
    pictures, text = [noise(80, 50), noise(64, 64)], "a <image> b <image>\nwhat?"
    made = processor(text=text, images=pictures, return_text_replacement_offsets=True, return_tensors="pt", **options)
    [offsets] = made.pop("text_replacement_offsets")
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(processor.image_token_id) == 2
    replacements = iter(processor.tokenizer.encode(each["replacement"], add_special_tokens=False) for each in offsets)
    expanded = [token for each in ids for token in (next(replacements) if each == processor.image_token_id else [each])]
    assert expanded == made["input_ids"][0].tolist()
    assert [each["type"] for each in offsets] == ["image", "image"]
    # every field but the text's has one row per image
    assert {name: len(rows) for name, rows in made.items() if name in processor.image_processor.model_input_names} == {
        "pixel_values": 2,
        "image_sizes": 2,
        "visual_tokens": 2,
    }
    types = processor(text=text, images=pictures, return_mm_token_type_ids=True, return_tensors="pt", **options)
    assert types["mm_token_type_ids"].sum() == 2 * (asked or 16)


def test_images_of_requests_at_different_scales_are_encoded_together(exported, processor, backend):
    model, ours = backend[0], exported[0]
    pictures = [noise(80, 50), noise(64, 64), noise(30, 90)]
    made = [
        processor(text="<image>", images=[each], return_tensors="pt", num_visual_tokens=scale)
        for each, scale in zip(pictures, SCALES, strict=True)
    ]
    fields = {
        name: torch.cat([each[name] for each in made]) for name in ("pixel_values", "image_sizes", "visual_tokens")
    }
    features = model.get_image_features(fields.pop("pixel_values"), **fields).pooler_output
    assert [tuple(each.shape) for each in features] == [(16, 32), (4, 32), (1, 32)]
    for number, (picture, scale) in enumerate(zip(pictures, SCALES, strict=True)):
        images, _ = ours.on_device([ours.prompt(Ask("?", [picture])).sample])
        nested = ours.vlm.encode(images)[0].split(SCALES)[SCALES.index(scale)]
        torch.testing.assert_close(features[number], nested, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_the_decoder_runs_on_embeddings_with_attention_of_its_own(exported, processor, backend, scale):
    model, head, calls = backend
    ours, picture = exported[0], noise(80, 50)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    made = processor(text=text, images=[picture], return_tensors="pt", num_visual_tokens=scale)
    ids = made["input_ids"][0]
    is_image = ids == processor.image_token_id
    embeddings = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
    embeddings[is_image] = model.get_image_features(
        made["pixel_values"], image_sizes=made["image_sizes"], visual_tokens=made["visual_tokens"]
    ).pooler_output[0]
    output = model(
        input_ids=None,
        inputs_embeds=embeddings[None],
        use_cache=False,
        position_ids=torch.arange(len(ids))[None],
        attention_instances={0: "first", 1: "second"},
        return_dict=False,
    )
    assert calls == ["first", "second"]
    our_ids, logits = our_logits(ours, ours.prompt(Ask("what is it?", [picture])), scale)
    assert [IMAGE if token == processor.image_token_id else token for token in ids.tolist()] == our_ids
    torch.testing.assert_close(output[0][0] @ head.T, logits, rtol=1e-5, atol=1e-5)
