"""Imported models compute what the original classes compute, to 1e-5."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from timm.models._hub import save_for_hf
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextForImageClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from lit_mm import load
from lit_mm.hub.describe import encoder_config, image_size
from lit_mm.hub.importers import build, main
from lit_mm.hub.layouts import open_source
from lit_mm.hub.lora import merged
from lit_mm.inference.answering import Model
from lit_mm.model.encoder import Encoder
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.checkpoints import InitFrom, start_from
from tests.helpers.command_line import lit_mm
from tests.helpers.foreign import (
    CLIP,
    LLAMA,
    WIDTH,
    Llava,
    OpenClipViT,
    clip_tower,
    convnext_tower,
    llava,
    scrambled,
    write_folder,
)

OPENAI = "openai/clip-vit-base-patch16"
IDS = torch.arange(7, 16)[None]


def pixels(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(9))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, relative to the largest number."""
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    return float((ours - theirs).abs().max() / theirs.abs().max())


def imported(source: Path, *options: str) -> Model:
    out = source.parent / "out"
    main([str(source), str(out), *options])
    return load(out, "cpu")


@torch.no_grad()
def assert_same(model: Model, theirs: Llava, side: int) -> None:
    vlm, images, ids = model.vlm.eval(), pixels(side), IDS.expand(2, -1)
    grid = vlm.encoder(images)
    tokens = vlm.projector(grid, [grid.shape[2] * grid.shape[3]])
    embeddings = torch.cat([tokens, vlm.llm.get_input_embeddings()(ids)], 1)
    assert difference(grid, theirs.grid(images)) < 1e-5
    assert difference(tokens, theirs.tokens(images)) < 1e-5
    assert difference(vlm.llm(inputs_embeds=embeddings).logits, theirs.logits(images, ids)) < 1e-5


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
@pytest.mark.parametrize("tower", ["model.vision_tower.vision_tower.", "model.vision_tower.vision_tower.vision_model."])
def test_m3_with_its_tower_inside(tmp_path, tower, kind):
    """The second is what transformers 4 calls the tower's weights."""
    theirs = llava(clip_tower(heads=1))
    config = theirs.config(mm_vision_tower=OPENAI, matryoshka_vis_token_scale=[1, 4, 16])
    model = imported(write_folder(tmp_path / "m3", theirs.state(tower), config, kind))
    assert_same(model, theirs, 32)
    assert [str(scale) for scale in model.scales] == ["16", "4", "1"]


def test_llava_takes_its_tower_from_the_folder_that_is_named(tmp_path):
    theirs = llava(clip_tower(heads=4), tie_word_embeddings=True)
    theirs.tower.save_pretrained(tmp_path / "clip")
    config = theirs.config(mm_vision_tower=str(tmp_path / "clip"))
    assert_same(imported(write_folder(tmp_path / "llava", theirs.state(), config)), theirs, 32)


@pytest.mark.parametrize("inside", [True, False])
def test_convllava_in_both_layouts(tmp_path, inside):
    theirs = llava(convnext_tower())
    state = theirs.state("model.vision_tower.vision_tower." if inside else None)
    resolution = 128 if inside else 320  # above 256 it replaces the processor's crop
    config = theirs.config(mm_vision_resolution=resolution, mm_vision_tower="ConvLLaVA/ConvLLaVA-ConvNeXt-768")
    folder = write_folder(tmp_path / "convllava", state, config)
    if not inside:
        own = theirs.tower.state_dict()
        (folder / "vision_tower").mkdir()
        torch.save(
            {k: v for k, v in own.items() if not k.startswith("layernorm")}, folder / "vision_tower/pytorch_model.bin"
        )
        theirs.tower.config.save_pretrained(folder / "vision_tower")
        processor = {"crop_size": {"height": 192, "width": 192}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
        (folder / "vision_tower/preprocessor_config.json").write_text(json.dumps(processor))
    model = imported(folder)
    assert_same(model, theirs, 128)
    assert model.media.image.size == resolution
    assert [str(scale) for scale in model.scales] == ["4" if inside else "25"]
    assert model.vlm.encoder.mean[0] == pytest.approx(0.48145466 if inside else 0.1)


class HfLlava:
    """transformers' own class, with an image as three tokens' place in a text."""

    def __init__(self, **fields):
        vision = {**CLIP, "num_attention_heads": 4, "model_type": "clip_vision_model"}
        text = {**LLAMA, "model_type": "llama"}
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=639, **fields)
        self.model = scrambled(LlavaForConditionalGeneration(config), 5)

    def save(self, folder: Path) -> Path:
        self.model.save_pretrained(folder, max_shard_size="20KB")
        config = json.loads((folder / "config.json").read_text())
        del config["vision_config"]["hidden_act"], config["text_config"]["hidden_act"]  # as in published files
        return write_folder(folder, {}, config)

    def logits(self, images: Tensor, ids: Tensor) -> Tensor:
        """Of the image and then the text."""
        marked = torch.cat([torch.full((len(ids), 16), 639), ids], 1)
        return self.model(input_ids=marked, pixel_values=images, attention_mask=torch.ones_like(marked)).logits


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_transformers_llava(tmp_path, layer):
    theirs = HfLlava(vision_feature_layer=layer)
    vlm, images, ids = imported(theirs.save(tmp_path / "hf")).vlm.eval(), pixels(32), IDS.expand(2, -1)
    tokens = vlm.projector(vlm.encoder(images), [16])
    embeddings = torch.cat([tokens, vlm.llm.get_input_embeddings()(ids)], 1)
    assert difference(vlm.llm(inputs_embeds=embeddings).logits, theirs.logits(images, ids)) < 1e-5


def adapted(model: torch.nn.Module, seed: int, targets: list[str], **fields) -> PeftModel:
    """With adapters that are not zero."""
    names = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(target_modules=targets, **names, **fields))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
    return peft


@pytest.mark.parametrize("whole", [True, False], ids=["on a LLaVA", "on an LLM"])
@pytest.mark.parametrize("rslora", [True, False])
def test_llavas_adapters(tmp_path, whole, rslora):
    """As llava/train/train.py ends: peft's own save, and what trained beside in non_lora_trainables.bin."""
    theirs = llava(clip_tower(heads=1))
    tower = "model.vision_tower.vision_tower.vision_model."
    base = theirs.state(tower) if whole else dict(theirs.llm.state_dict())
    config = theirs.config(mm_vision_tower=OPENAI) if whole else theirs.llm.config.to_dict()
    write_folder(tmp_path / "base", base, config)
    theirs.projector = scrambled(theirs.projector, 8)  # trained further, like the tower
    theirs.tower = scrambled(theirs.tower, 9)
    peft = adapted(theirs.llm, 6, ["q_proj", "down_proj"], use_rslora=rslora)
    peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    folder = tmp_path / "lora"
    peft.save_pretrained(folder)
    beside = {name: own for name, own in theirs.state(tower).items() if "vision" in name or "mm_" in name}
    torch.save({f"base_model.model.{name}": own for name, own in beside.items()}, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(theirs.config(mm_vision_tower=OPENAI)))
    assert_same(imported(folder), theirs, 32)


def test_a_projector_alone_and_with_the_rest(tmp_path):
    """What LLaVA's first stage saves."""
    theirs = llava(clip_tower())
    folder = tmp_path / "stage_1"
    folder.mkdir()
    own = {name: own for name, own in theirs.state().items() if "mm_projector" in name}
    torch.save(own, folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps(theirs.config(mm_vision_tower="./nowhere")))
    write_folder(tmp_path / "llm", dict(theirs.llm.state_dict()), theirs.llm.config.to_dict())
    theirs.tower.save_pretrained(tmp_path / "clip")
    main([str(folder), str(tmp_path / "projector")])
    found = MatryoshkaProjector(64, WIDTH, [16])
    vlm = MatryoshkaVLM(torch.nn.Identity(), found, torch.nn.Identity())
    for source in (tmp_path / "projector", folder, folder / "mm_projector.bin"):
        scrambled(found, 1)
        start_from(vlm, InitFrom(projector=str(source)))
        assert torch.equal(found.layers[2].weight, theirs.projector[2].weight)
    model = imported(folder, "--base", str(tmp_path / "llm"), "--encoder", str(tmp_path / "clip"))
    assert_same(model, theirs, 32)


def towers(folder: Path) -> dict[str, tuple[Path, Callable[[Tensor], Tensor], int]]:
    """Towers as their own libraries save them: where, their grid, and pixels of a side."""
    clip, five, four = clip_tower(), convnext_tower(), convnext_tower(4)
    both = CLIPConfig(vision_config=clip.config.to_dict(), text_config={**CLIP, "num_attention_heads": 4})
    whole = scrambled(CLIPModel(both), 6)
    judge = scrambled(ConvNextForImageClassification(four.config), 7)
    for name, model in {"clip": clip, "clip_model": whole, "five": five, "four": four, "judge": judge}.items():
        model.save_pretrained(folder / name)

    def cells(tower) -> Callable[[Tensor], Tensor]:
        return Llava(None, None, tower).grid  # type: ignore[arg-type]

    return {
        "CLIPVisionModel": (folder / "clip", cells(clip), 32),
        "CLIPModel": (folder / "clip_model", cells(whole.vision_model), 32),
        "ConvNextModel, 5 stages": (folder / "five", cells(five), 128),
        "ConvNextModel, 4 stages": (folder / "four", cells(four), 64),
        "ConvNextForImageClassification": (folder / "judge", cells(judge.convnext), 64),
        **timm_towers(folder),
    }


def timm_towers(folder: Path) -> dict[str, tuple[Path, Callable[[Tensor], Tensor], int]]:
    """timm's, saved by timm and by open_clip, and open_clip's own ViT."""
    sizes = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
    convnext, second = (scrambled(timm.create_model(name, **sizes), 8) for name in ("convnext_atto", "convnextv2_atto"))
    vit_sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    vit = scrambled(timm.create_model("vit_base_patch16_clip_quickgelu_224.openai", **vit_sizes), 9)
    save_for_hf(vit, folder / "timm_vit", model_args=vit_sizes, safe_serialization=True)
    save_for_hf(convnext, folder / "timm_convnext")
    torch.save({"epoch": 1, "state_dict": second.state_dict()}, folder / "convnextv2.pth")
    beside = {
        "logit_scale": torch.zeros(()),
        "visual.head.proj.weight": torch.zeros(2, 2),
        "text.a.weight": torch.ones(3),
    }
    wrapped = {f"visual.trunk.{name}": tensor for name, tensor in convnext.state_dict().items()} | beside
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in wrapped.items()}}, folder / "epoch_1.pt")
    own = scrambled(OpenClipViT(), 10)
    state = {f"visual.{name}": tensor for name, tensor in own.state_dict().items()}
    state |= {"transformer.resblocks.0.ln_1.weight": torch.ones(3), "positional_embedding": torch.ones(3, 3)}
    (folder / "open_clip_vit").mkdir()
    torch.save(state, folder / "open_clip_vit/open_clip_pytorch_model.bin")
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
    (folder / "open_clip_vit/open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))

    def stages(model) -> Callable[[Tensor], Tensor]:
        return lambda images: model.stages(model.stem(images))

    def blocks(images: Tensor) -> Tensor:
        return vit.forward_intermediates(images, indices=[1], intermediates_only=True)[0]

    return {
        "timm ConvNeXt": (folder / "timm_convnext", stages(convnext), 64),
        "timm ConvNeXt-V2, a training checkpoint": (folder / "convnextv2.pth", stages(second), 64),
        "timm ViT": (folder / "timm_vit", blocks, 32),
        "open_clip ConvNeXt, a training checkpoint": (folder / "epoch_1.pt", stages(convnext), 64),
        "open_clip ViT": (folder / "open_clip_vit", own.grid, 32),
    }


@torch.no_grad()
def test_towers(tmp_path):
    for name, (source, grid, side) in towers(tmp_path).items():
        out = tmp_path / f"out {name}"
        main([str(source), str(out)])
        encoder = encoder_of(out)
        for given in (source, out):
            start_from(MatryoshkaVLM(encoder, torch.nn.Identity(), torch.nn.Identity()), InitFrom(encoder=str(given)))
            assert difference(encoder(pixels(side)), grid(pixels(side))) < 1e-5, name
            scrambled(encoder)
            assert difference(encoder(pixels(side)), grid(pixels(side))) > 1e-2, name


def encoder_of(out: Path) -> Encoder:
    """As its config.yaml describes it, with random weights."""
    config = yaml.safe_load((out / "config.yaml").read_text())["model"]["encoder"]
    return scrambled(build(config).to_empty(device="cpu"))


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """An imported M3 model."""
    folder = tmp_path_factory.mktemp("m3")
    theirs = llava(clip_tower(heads=1))
    config = theirs.config(mm_vision_tower=OPENAI, matryoshka_vis_token_scale=[16, 4])
    source = write_folder(folder / "m3", theirs.state("model.vision_tower.vision_tower."), config)
    said = lit_mm("import", str(source), str(folder / "out"), "--chat_template", "bare", "--as", "llava")
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in said.splitlines() if "│" in line]
    assert rows == [["encoder", "29", "0", "14"], ["projector", "4", "0", "0"], ["llm", "21", "0", "0"]]
    assert "trunk.blocks.2.attn.proj.bias" in said and f"ask --ckpt_path {folder / 'out'}" in said
    with pytest.raises(ValueError, match="is llava, expected hf_llava"):
        main([str(source), str(folder / "another"), "--as", "hf_llava"])
    with pytest.raises(FileExistsError, match=r"import: .*/out is not empty"):
        main([str(source), str(folder / "out")])
    return folder / "out"


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder, "cpu").vlm.state_dict())


def test_an_imported_model_answers_is_judged_and_trains_further(out, instruction_set):
    image = next((instruction_set / "images").glob("*.png"))
    assert lit_mm("ask", "--ckpt_path", str(out), str(image), "what is it?", "--tokens", "4")
    data = [f"--data.{split}={instruction_set / split}.json" for split in ("train", "val")]
    run = ["--config", str(out / "config.yaml"), *data, "--data.image_root", str(instruction_set)]
    run += ["--trainer.default_root_dir", str(instruction_set / "runs"), "--trainer.accelerator", "cpu"]
    assert "val/loss@4" in lit_mm("validate", *run, "--ckpt_path", str(out / "checkpoints/last.ckpt"))
    frozen = ["--model.parts.encoder.frozen", "true", "--model.parts.llm.frozen", "true"]
    lit_mm("fit", *run, *frozen, "--model.init_from", str(out), "--trainer.max_steps", "2", "--data.batch_size", "2")
    before, after = weights(out), weights(instruction_set / "runs")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("projector.")}


def imported_llava(folder):
    """A LLaVA in the folder `llava`, and what `import` makes of it in `in`."""
    theirs = llava(clip_tower(heads=1))
    config = theirs.config(mm_vision_tower=OPENAI)
    source = write_folder(folder / "llava", theirs.state("model.vision_tower.vision_tower."), config)
    main([str(source), str(folder / "in"), "--chat_template", "bare"])


@pytest.mark.parametrize("layout", ["transformers", "llava"])
def test_the_way_out_and_back_changes_no_bit(tmp_path, layout):
    """In this package's own folders, and in those of transformers' LLaVA."""
    imported_llava(tmp_path)
    lit_mm("export", str(tmp_path / "in"), str(tmp_path / "exported"), "--as", layout)
    back = tmp_path / "exported"
    if layout == "llava":
        main([str(back), str(tmp_path / "back"), "--as", "hf_llava"])
        back = tmp_path / "back"
    before, after = weights(tmp_path / "in"), weights(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_needs_no_import_is_told(out, tmp_path):
    llama = llava(clip_tower()).llm
    with pytest.raises(ValueError, match=r"model.llm.name_or_path takes an LLM"):
        main(
            [str(write_folder(tmp_path / "llm", dict(llama.state_dict()), llama.config.to_dict())), str(tmp_path / "o")]
        )
    with pytest.raises(ValueError, match="is a run: load"):
        main([str(out), str(tmp_path / "o")])
    clip_tower().save_pretrained(tmp_path / "clip")
    main([str(tmp_path / "clip"), str(tmp_path / "part")])
    with pytest.raises(ValueError, match=r"weights of this package, which model\.init_from takes"):
        main([str(tmp_path / "part"), str(tmp_path / "o")])


def test_fields_that_are_null_say_nothing(tmp_path):
    theirs = llava(clip_tower(heads=1))
    state = theirs.state("model.vision_tower.vision_tower.")
    source = write_folder(tmp_path / "llava", state, theirs.config(mm_vision_tower=OPENAI))
    (source / "generation_config.json").write_text('{"max_new_tokens": null}')
    (source / "processor_config.json").write_text('{"image_processor": null}')
    assert imported(source).max_new_tokens == 128


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
IMAGES = {"image_mean": MEAN, "image_std": STD}
STATED = {
    "open_clip_config.json": {"preprocess_cfg": {"mean": MEAN, "std": STD}},
    "processor_config.json": {"image_processor": IMAGES},  # transformers 5
    "preprocessor_config.json": IMAGES,
}


@pytest.mark.parametrize("file", STATED)
def test_pixels_are_normalized_as_the_files_say(tmp_path, capsys, file):
    clip_tower().save_pretrained(tmp_path / "clip")
    main([str(tmp_path / "clip"), str(tmp_path / "guessed")])
    assert "from OpenAI's CLIP, as no file says them" in capsys.readouterr().out
    (tmp_path / "clip" / file).write_text(json.dumps(STATED[file]))
    main([str(tmp_path / "clip"), str(tmp_path / "out")])
    encoder = encoder_of(tmp_path / "out")
    assert [list(encoder.mean), list(encoder.std)] == [MEAN, STD]
    assert f"mean {MEAN}, std {STD}, from {tmp_path / 'clip' / file}" in capsys.readouterr().out
    named = encoder_config(open_source(tmp_path / "clip", "test"), backbone="vit_base_patch16_clip_224")
    assert named["init_args"]["overrides"] == {"pretrained_cfg_overlay": {"mean": MEAN, "std": STD}}


def test_sizes_up_to_256_are_the_processors(tmp_path):
    """transformers 5's file of it; ConvLLaVA's code replaces the crop only above 256."""
    convnext_tower().save_pretrained(tmp_path / "five")
    said = {"image_processor": {"crop_size": {"height": 192, "width": 192}}}
    (tmp_path / "five/processor_config.json").write_text(json.dumps(said))
    source = open_source(tmp_path / "five", "test")
    assert [image_size(source, {"mm_vision_resolution": each}, {}) for each in (256, 320)] == [192, 320]


@pytest.mark.parametrize("mode", ["pad", "squash"])
def test_our_own_llava_comes_back_in_every_file(tmp_path, mode):
    imported_llava(tmp_path)
    lit_mm("export", str(tmp_path / "in"), str(tmp_path / "first"), "--as", "llava")
    file = tmp_path / "first/processor_config.json"
    assert '"do_pad": true' in file.read_text()
    if mode == "squash":
        file.write_text(file.read_text().replace('"do_pad": true', '"do_pad": false'))
    main([str(tmp_path / "first"), str(tmp_path / "back")])
    assert load(tmp_path / "back", "cpu").media.image.mode == mode
    lit_mm("export", str(tmp_path / "back"), str(tmp_path / "again"), "--as", "llava")
    names = sorted(each.name for each in (tmp_path / "first").iterdir())
    assert names == sorted(each.name for each in (tmp_path / "again").iterdir())
    for name in set(names) - {"README.md"}:  # which names the run
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


SMALL = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}


@torch.no_grad()
def test_a_convnexts_epsilon_is_that_of_its_name_or_arguments(tmp_path):
    for name, told in (("convnext_xxlarge", {}), ("convnext_atto", {"norm_eps": 0.1})):
        model = scrambled(timm.create_model(name, **SMALL, **told))
        save_for_hf(model, tmp_path / name, model_args={**SMALL, **told}, safe_serialization=True)
        main([str(tmp_path / name), str(tmp_path / f"out {name}")])
        encoder = encoder_of(tmp_path / f"out {name}")
        vlm = MatryoshkaVLM(encoder, torch.nn.Identity(), torch.nn.Identity())
        start_from(vlm, InitFrom(encoder=str(tmp_path / name)))
        assert encoder.trunk.stages[0].blocks[0].norm.eps == told.get("norm_eps", 1e-5)
        assert difference(encoder(pixels(64)), model.stages(model.stem(pixels(64)))) < 1e-5


def test_open_clips_names_of_timms_models_are_used(tmp_path):
    model = timm.create_model("convnext_xxlarge", **SMALL)
    state = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    vision = {"timm_model_name": "convnext_xxlarge", "timm_pool": "", "image_size": 256}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    main([str(tmp_path), str(tmp_path / "out")])
    assert encoder_of(tmp_path / "out").trunk.stages[0].blocks[0].norm.eps == 1e-5


@pytest.mark.parametrize("field", ["norm_kwargs", "act_kwargs"])
def test_open_clips_fields_that_are_not_read_are_refused(tmp_path, field):
    state = {f"visual.{name}": tensor for name, tensor in scrambled(OpenClipViT()).state_dict().items()}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    vision = {"width": 64, "head_width": 16, field: {"eps": 1e-3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    with pytest.raises(ValueError, match=f"its files say .*{field}"):
        main([str(tmp_path), str(tmp_path / "out")])


def test_settings_that_the_authors_code_obeys_are_refused(tmp_path):
    theirs, tower = llava(convnext_tower()), "model.vision_tower.vision_tower."
    for fields, said in (
        ({"mm_vision_select_layer": -2}, r"the vision feature layer is -2, expected -1"),
        ({"image_aspect_ratio": "anyres"}, r"config\.json: image_aspect_ratio is 'anyres', expected 'pad'"),
    ):
        config = theirs.config(mm_vision_resolution=128, mm_vision_tower="ConvLLaVA/ConvLLaVA-ConvNeXt-768", **fields)
        source = write_folder(tmp_path / "llava", theirs.state(tower), config)
        with pytest.raises(ValueError, match=said):
            main([str(source), str(tmp_path / "out")])


def lora_folder(folder: Path, base: Path, **fields) -> Path:
    """Adapters on a LLaVA, with other fields in their config."""
    peft = adapted(llava(clip_tower()).llm, 6, ["q_proj"])
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_adapters_without_a_config_have_that_of_their_base(tmp_path):
    theirs = llava(clip_tower(heads=1))
    config = theirs.config(mm_vision_tower=OPENAI, mm_vision_select_layer=-1)
    base = write_folder(tmp_path / "base", theirs.state("model.vision_tower.vision_tower."), config)
    assert imported(lora_folder(tmp_path / "lora", base)).vlm.encoder.layer == 2


def test_adapters_without_their_base(tmp_path):
    folder = lora_folder(tmp_path / "lora", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"lora/adapter_config\.json: .*nowhere.*`import --base`"):
        main([str(folder), str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match=r"import: --base: .*elsewhere"):
        main([str(folder), str(tmp_path / "out"), "--base", str(tmp_path / "elsewhere")])


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_adapters_that_changed_their_base_are_refused(tmp_path, value):
    folder = lora_folder(tmp_path / "lora", tmp_path / "base", init_lora_weights=value)
    with pytest.raises(ValueError, match=f"init_lora_weights '{value}'"):
        main([str(folder), str(tmp_path / "out")])


@pytest.mark.parametrize("base", [(6, 5), (1, 4), (6, 1)])
def test_adapters_of_another_base_are_refused(base):
    """Two of these shapes would broadcast."""
    shapes = {"a.base_layer.weight": base, "a.lora_A.default.weight": (2, 4), "a.lora_B.default.weight": (6, 2)}
    read = merged({name: partial(torch.zeros, *shape) for name, shape in shapes.items()}, 1.0)["a.weight"]
    with pytest.raises(ValueError, match=r"the adapter of a is B \[6, 2\] and A \[2, 4\], .*another base"):
        read()


def test_an_llms_type_holds_all_its_weights(tmp_path):
    theirs = llava(clip_tower(heads=1))
    norm = theirs.llm.model.norm.weight.detach().clone()
    theirs.llm.bfloat16().model.norm.weight = torch.nn.Parameter(norm)
    state = theirs.state("model.vision_tower.vision_tower.")
    model = imported(write_folder(tmp_path / "llava", state, theirs.config(mm_vision_tower=OPENAI)))
    told = yaml.safe_load((tmp_path / "out/config.yaml").read_text())["model"]["llm"]["dtype"]
    assert told == "float32" and torch.equal(model.vlm.llm.model.norm.weight, norm)


def test_options_without_effect_are_refused(tmp_path):
    theirs = llava(clip_tower(heads=1))
    state = theirs.state("model.vision_tower.vision_tower.")
    write_folder(tmp_path / "whole", state, theirs.config(mm_vision_tower=OPENAI))
    theirs.tower.save_pretrained(tmp_path / "tower")
    (tmp_path / "alone").mkdir()
    own = {name: tensor for name, tensor in state.items() if "mm_projector" in name}
    torch.save(own, tmp_path / "alone/mm_projector.bin")
    for source, options in {
        "whole": [("--base", "x"), ("--encoder", "x"), ("--revision", "main")],
        "tower": [("--scales", "4"), ("--size", "32"), ("--chat_template", "bare"), ("--encoder", "x")],
        "alone": [("--backbone", "x"), ("--scales", "4"), ("--encoder", "x")],
    }.items():
        for option, value in options:
            with pytest.raises(ValueError, match=f"import: {option} has no effect"):
                main([str(tmp_path / source), str(tmp_path / "out"), option, value])
    with pytest.raises(ValueError, match="--size is 64, but the vision tower takes only images of 32 pixels"):
        main([str(tmp_path / "whole"), str(tmp_path / "out"), "--size", "64"])
    with pytest.raises(ValueError, match="--revision has no effect on owner/name@main"):
        main(["owner/name@main", str(tmp_path / "out"), "--revision", "other"])


def test_weights_that_no_layout_explains_are_named(tmp_path):
    torch.save({"some.weight": torch.zeros(2), "other.bias": torch.zeros(2)}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"no known layout \(other\.bias, some\.weight\); expected a file"):
        main([str(tmp_path / "a.bin"), str(tmp_path / "out")])


def test_a_tower_and_an_llm_are_no_model(tmp_path):
    theirs = llava(clip_tower())
    theirs.tower.save_pretrained(tmp_path / "tower")
    write_folder(tmp_path / "llm", dict(theirs.llm.state_dict()), theirs.llm.config.to_dict())
    with pytest.raises(ValueError, match="tower has no projector, so --base"):
        main([str(tmp_path / "tower"), str(tmp_path / "out"), "--base", str(tmp_path / "llm")])


@pytest.mark.parametrize("layout", ["llm", "own"])
def test_layouts_that_are_never_imported_cannot_be_asked_for(tmp_path, capsys, layout):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "out"), "--as", layout])
    assert f"invalid choice: '{layout}'" in capsys.readouterr().err
