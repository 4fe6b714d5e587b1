"""Exported folders against lit_mm: what transformers computes in a process that has no lit_mm."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from lit_mm.data.images import ImageOptions
from lit_mm.hub.card import Origin
from lit_mm.hub.export import auto_processor, export
from lit_mm.hub.export import main as export_main
from lit_mm.hub.huggingface.modeling_lit_mm import LitMMForConditionalGeneration
from lit_mm.hub.importers import main as import_main
from lit_mm.hub.llava import export_llava
from lit_mm.hub.loading import load, run_of
from lit_mm.inference.answering import Ask, Model
from lit_mm.model.batch import IMAGE
from lit_mm.model.encoder import TimmEncoder
from lit_mm.model.llm import LLM
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.router import Router, RouterOptions
from tests.helpers.environment import ROOT, TOKENIZER
from tests.helpers.exporting import model_of, our_logits, vicuna
from tests.helpers.media import noise
from tests.helpers.models import CLASSES, EXTRA, SIZES, tiny_llm

PICTURES = {"wide.png": (80, 50), "square.png": (64, 64), "large.png": (97, 130)}
SQUARE = ImageOptions("pad", 64)
PLAIN = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
OTHERS = {"GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "GPTNeoXConfig": PLAIN, "PhiConfig": SIZES}
"""LLMs with names of their own, learned positions, and a bias of the output head."""
CASES = {
    "five stages, llama": lambda path: model_of("five stages", tiny_llm(), SQUARE),
    "tied, squashed": lambda path: model_of(
        "five stages", tiny_llm(tie_word_embeddings=True), ImageOptions("squash", 64)
    ),
    "sizes as they are": lambda path: model_of(
        "five stages", tiny_llm("Qwen2Config"), ImageOptions("keep", None), (12, 4, 1), pooling="adaptive"
    ),
    "ConvNeXt-V2, spatial": lambda path: model_of("ConvNeXt-V2", tiny_llm("Qwen3Config"), SQUARE, sampling="spatial"),
    "ViT, vicuna": lambda path: model_of("ViT", vicuna(path / "vicuna", True), ImageOptions("pad", 32)),
    "EVA, vicuna": lambda path: model_of("EVA", vicuna(path / "vicuna", True), ImageOptions("pad", 32)),
}
for kind in ("cohere", "gemma", "granite", "starcoder2"):
    llm = tiny_llm(CLASSES[kind], **EXTRA.get(kind, {}))
    CASES[kind] = lambda path, llm=llm: model_of("five stages", llm, SQUARE, (4, 1))
for kind, sizes in OTHERS.items():
    llm = LLM(kind, sizes, TOKENIZER, "bare")
    CASES[kind] = lambda path, llm=llm: model_of("five stages", llm, SQUARE, (4, 1))
LLAVA = {  # one scale, the whole grid
    "padded": lambda path: model_of("ViT", vicuna(path / "vicuna", True), ImageOptions("pad", 32), (16,)),
    "tied, squashed": lambda path: model_of(
        "CLIP with GELU", tiny_llm("Qwen2Config", tie_word_embeddings=True), ImageOptions("squash", 32), (16,)
    ),
}


def conversations():
    def user(text, *images):
        return {
            "role": "user",
            "content": [*({"type": "image", "image": name} for name in images), {"type": "text", "text": text}],
        }

    return [
        [user("what is it?", "wide.png")],
        [user("how many are there in these?", "square.png", "large.png")],
        [{"role": "user", "content": "no image"}],
        [user("what is it?", "large.png"), {"role": "assistant", "content": "a cat"}, user("and now?", "wide.png")],
    ]


def our_prompts(model: Model, root):
    """The same conversations as questions of lit_mm."""
    for messages in conversations():
        turns, images = [], []
        for message in messages:
            parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            images += [root / part["image"] for part in parts if "image" in part]
            turns.append("".join("<image>\n" if "image" in part else part["text"] for part in parts))
        yield model.prompt(Ask(turns[-1], images, turns[:-1]))


def answered(roots, tmp_path) -> None:
    """Has the folders answered by transformers alone."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_MODULES_CACHE": str(tmp_path / "code"),
    }
    environment.pop("PYTHONPATH", None)
    script = ROOT / "tests/helpers/without_lit_mm.py"
    command = [sys.executable, "-P", str(script), *(str(root / "model") for root in roots)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Models by case, each with the folder above its export."""
    top = tmp_path_factory.mktemp("exported")
    made = {}
    for number, (case, build) in enumerate(
        [*CASES.items(), *((f"LLaVA, {case}", build) for case, build in LLAVA.items())]
    ):
        root = top / str(number)
        root.mkdir()
        made[case] = build(root), root
        write(*made[case], trust_remote_code=case in CASES)
    answered([root for _, root in made.values()], top)
    return made


def write(model, root, trust_remote_code=True):
    for name, size in PICTURES.items():
        noise(*size).save(root / name)
    if trust_remote_code:
        export(model, root / "model")
    else:
        export_llava(model, root / "model", Origin())
    scales = [None, *model.scales] if trust_remote_code else [None]
    asked = {"conversations": conversations(), "scales": scales, "trust_remote_code": trust_remote_code}
    (root / "asked.json").write_text(json.dumps(asked))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_without_lit_mm(exported, case):
    model, root = exported[case]
    told, found = json.loads((root / "answered.json").read_text()), load_file(root / "answered.safetensors")
    assert told["class"] == "LitMMForConditionalGeneration"
    for number, prompt in enumerate(our_prompts(model, root)):
        for scale in model.scales:
            ids, logits = our_logits(model, prompt, scale)
            assert [IMAGE if token == image_id(root) else token for token in told["ids"][f"{number}@{scale}"]] == ids
            torch.testing.assert_close(found[f"{number}@{scale}"], logits, rtol=1e-5, atol=1e-5)
        assert told["ids"][f"{number}@None"] == told["ids"][f"{number}@{model.scales[0]}"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_generate_gives_the_same_answers_alone_and_in_a_batch(exported, case):
    model, root = exported[case]
    told, ends = json.loads((root / "answered.json").read_text()), [model.conversation.end_id]
    prompts = [replace(prompt, scales=model.scales) for prompt in our_prompts(model, root)]
    for number, answers in enumerate(model.answers_to(prompts, max_new_tokens=4)):
        for scale, answer in answers.items():
            ours = answer.ids + ends * (answer.finish == "stop")
            assert told["answers"][f"{number}@{scale}"] == ours
            assert told["batched"][scale][number][: len(ours)] == ours


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_the_same(exported, case):
    model, root = exported[case]
    found = load_file(root / "answered.safetensors")
    for number, prompt in enumerate(our_prompts(model, root)):
        for place, visual in enumerate(prompt.sample.visuals):
            ours = model.vlm.encoder.normalize(visual.pixels)[0]
            theirs = found[f"pixels {number}"][place, :, : ours.shape[-2], : ours.shape[-1]]
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", LLAVA)
def test_llava_computes_the_same_without_remote_code(exported, case):
    model, root = exported[f"LLaVA, {case}"]
    told, found = json.loads((root / "answered.json").read_text()), load_file(root / "answered.safetensors")
    assert told["class"] == "LlavaForConditionalGeneration"
    assert not list((root / "model").glob("*.py"))
    for number, prompt in enumerate(our_prompts(model, root)):
        ids, logits = our_logits(model, prompt, 16)
        assert [IMAGE if token == image_id(root) else token for token in told["ids"][f"{number}@None"]] == ids
        their_logits = found[f"{number}@None"][:, : logits.shape[1]]  # the others are for `<image>`
        torch.testing.assert_close(their_logits, logits, rtol=1e-5, atol=1e-5)
        [answer] = model.answers_to([prompt], max_new_tokens=4)[0].values()
        assert told["answers"][f"{number}@None"][: len(answer.ids)] == answer.ids
        assert told["batched"]["None"][number][: len(answer.ids)] == answer.ids


class OwnProjector(MatryoshkaProjector):
    """Computes the same."""


def with_own_projector(model: Model) -> Model:
    model.vlm.projector.__class__ = OwnProjector
    return model


def test_ones_own_projector_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the projector is a OwnProjector, expected MatryoshkaProjector"):
        export(with_own_projector(model_of("five stages", tiny_llm(), SQUARE)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            lambda path: with_own_projector(model_of("ViT", tiny_llm(), ImageOptions("pad", 32), (16,))),
            "two linear layers, the model a OwnProjector",
        ),
        (
            lambda path: model_of("five stages", tiny_llm(), SQUARE, (16,)),
            "it knows CLIP's ViT, the encoder is convnext_atto",
        ),
        (lambda path: model_of("EVA", tiny_llm(), ImageOptions("pad", 32), (16,)), "the encoder is eva02"),
        (lambda path: model_of("ViT", tiny_llm(), ImageOptions("pad", 32)), "it has one scale, the model 16, 4, 1"),
        (lambda path: model_of("ViT", tiny_llm(), ImageOptions("pad", 32), (4,)), "the scale is 4 of 16 cells"),
        (lambda path: model_of("ViT", tiny_llm(), ImageOptions("keep", 32), (16,)), "images are keep, 32"),
        (lambda path: model_of("ViT", tiny_llm("CohereConfig"), ImageOptions("pad", 32), (16,)), "its output head is"),
    ],
)
def test_llava_is_refused_with_the_reason(tmp_path, build, said):
    with pytest.raises(ValueError, match=f"--as llava: .*{said}"):
        export_llava(build(tmp_path), tmp_path / "model", Origin())
    assert not (tmp_path / "model").exists()


def test_llava_never_answers_with_the_image_token(tmp_path):
    """Its row of the head is 0, and all logits of this LLM are below that."""
    model = model_of("ViT", tiny_llm(), ImageOptions("pad", 32), (16,))
    with torch.no_grad():
        for name, weight in model.vlm.llm.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # the layers add nothing to the embeddings
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):
                weight.copy_(weight.abs() * (-1 if name == "lm_head.weight" else 1))
    prompt = torch.arange(10, 19)[None]
    logits = model.vlm.llm(prompt).logits[0, -1]
    export_llava(model, tmp_path / "model", Origin())
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert logits.max() < 0 and theirs(prompt).logits[0, -1, image_id(tmp_path)] == 0
    assert theirs.generate(prompt, max_new_tokens=1)[0, -1] == logits.argmax()
    model.vlm.llm.resize_token_embeddings(image_id(tmp_path) + 1)  # as an imported LLaVA has them
    export_llava(model, tmp_path / "again", Origin())
    told = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert told["suppress_tokens"] == [image_id(tmp_path)]


@pytest.mark.parametrize(
    ("exporter", "opener", "name"),
    [
        (export, LitMMForConditionalGeneration, "patch_embed.proj.weight"),
        (export_llava, LlavaForConditionalGeneration, "patch_embedding.weight"),
    ],
)
def test_transformers_rounds_no_weight_of_a_model_with_two_types(tmp_path, exporter, opener, name):
    model = model_of("ViT", tiny_llm(dtype="bfloat16"), ImageOptions("pad", 32), (16,))
    exporter(model, tmp_path / "model", Origin())
    opened = opener.from_pretrained(tmp_path / "model").state_dict()
    [patches] = [tensor for own, tensor in opened.items() if own.endswith(name)]
    torch.testing.assert_close(patches, model.vlm.encoder.trunk.patch_embed.proj.weight.detach(), rtol=0, atol=0)
    head = model.vlm.llm.get_output_embeddings().weight.detach()
    torch.testing.assert_close(opened["lm_head.weight"][: len(head)], head.float(), rtol=0, atol=0)
    card = (tmp_path / "model/README.md").read_text()
    assert "The encoder's weights are float32, those of the LLM bfloat16." in card


def test_lit_mm_opens_each_part_in_its_own_type(tmp_path):
    export(model_of("five stages", tiny_llm(dtype="bfloat16"), SQUARE), tmp_path / "model")
    vlm = load(tmp_path / "model", "cpu").vlm
    types = [next(part.parameters()).dtype for part in (vlm.encoder, vlm.projector, vlm.llm)]
    assert types == [torch.float32, torch.float32, torch.bfloat16]


def test_arrays_are_images_only_in_uint8():
    """Others would become black: 0.5 as uint8 is 0."""
    processor = auto_processor(model_of("five stages", tiny_llm(), SQUARE)).image_processor
    array = np.array(noise(64, 64))
    expected = processor.preprocess(noise(64, 64))["pixel_values"]
    for given in (array, torch.from_numpy(array)):
        torch.testing.assert_close(processor.preprocess(given)["pixel_values"], expected, rtol=0, atol=0)
    for wrong, found in (
        (array / 255, "float64"),
        (torch.from_numpy(array) / 255, "float32"),
        (array.astype("int64"), "int64"),
    ):
        with pytest.raises(ValueError, match=f"an image is an array of {found}: expected uint8"):
            processor.preprocess(wrong)


def image_id(root) -> int:
    config = json.loads((root / "model/config.json").read_text())
    return config.get("image_token_id", config.get("image_token_index"))


def test_a_folder_opens_in_lit_mm_and_is_exported_again_bit_for_bit(tmp_path):
    model = CASES["ViT, vicuna"](tmp_path)
    export(model, tmp_path / "first", Origin(step=7))
    again = load(tmp_path / "first", "cpu")
    for name, tensor in model.vlm.state_dict().items():
        torch.testing.assert_close(again.vlm.state_dict()[name], tensor, rtol=0, atol=0)
    picture = noise(80, 50)
    for scale, answer in model.answer(picture, "what is it?", "all").items():
        assert again.answer(picture, "what is it?", scale).logprobs == pytest.approx(answer.logprobs, abs=1e-5)
    export(again, tmp_path / "second", Origin(*run_of(tmp_path / "first")))
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


def test_a_router_goes_with_its_model(tmp_path):
    """And not with other scales."""
    model = CASES["five stages, llama"](tmp_path)
    model.vlm.router = Router(32, 3, RouterOptions("sufficient", hidden=8))
    export(model, tmp_path / "folder", Origin(step=7))
    found = load(tmp_path / "folder", "cpu").answer(noise(80, 50), "what is it?", 1).router
    assert found == pytest.approx(model.answer(noise(80, 50), "what is it?", 1).router, abs=1e-5) and len(found) == 3
    assert load(tmp_path / "folder", "cpu", scales=[16, 1]).vlm.router is None


@pytest.mark.slow
@pytest.mark.parametrize("case", LLAVA)
def test_llava_is_imported_and_exported_again_bit_for_bit(exported, case, tmp_path):
    _, root = exported[f"LLaVA, {case}"]
    import_main([str(root / "model"), str(tmp_path / "imported")])
    export_main([str(tmp_path / "imported"), str(tmp_path / "again"), "--as", "llava"])
    names = sorted(file.name for file in (root / "model").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    for name in set(names) - {"README.md"}:  # which names the run
        assert (tmp_path / "again" / name).read_bytes() == (root / "model" / name).read_bytes(), name


def test_a_head_of_another_kind_is_refused(tmp_path):
    model = model_of("five stages", tiny_llm("Gemma2Config", head_dim=8, final_logit_softcapping=0.5), SQUARE)
    with pytest.raises(ValueError, match="the logits of Gemma2ForCausalLM are not those of a linear output head"):
        export(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backbone": "hf-hub:owner/name"}, "encoder.backbone hf-hub:owner/name: expected a name of timm's own"),
        ({"overrides": {"checkpoint_path": "a.pth"}}, "encoder.overrides: checkpoint_path names files"),
    ],
)
def test_what_no_folder_may_say_of_its_encoder_is_not_exported(tmp_path, changed, said):
    model = model_of("five stages", tiny_llm(), SQUARE)
    model.vlm.encoder.arguments |= changed
    with pytest.raises(ValueError, match=said):
        export(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_encoder_of_your_own_is_refused(tmp_path):
    class Mine(TimmEncoder):
        pass

    model = CASES["five stages, llama"](tmp_path)
    model.vlm.encoder = Mine("resnet18")
    with pytest.raises(ValueError, match="the encoder is a Mine, expected ConvNeXtEncoder or TimmEncoder"):
        export(model, tmp_path / "model")


def test_ids_that_differ_from_training_are_named(tmp_path):
    """SentencePiece without `legacy` puts no space after an end token, which one run of the tokenizer cannot do."""
    model = model_of("ViT", vicuna(tmp_path / "vicuna", False), ImageOptions("pad", 32))
    with pytest.warns(UserWarning, match=r"otherwise than lit_mm: .*</s>USER: Where is it"):
        export(model, tmp_path / "model")
