"""Imported models compute what the original classes compute, to 1e-5."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from lit_mm.hub.importers import build, main
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
    config = theirs.config(mm_vision_resolution=128, mm_vision_tower="ConvLLaVA/ConvLLaVA-ConvNeXt-768")
    folder = write_folder(tmp_path / "convllava", state, config)
    if not inside:
        own = theirs.tower.state_dict()
        (folder / "vision_tower").mkdir()
        torch.save(
            {k: v for k, v in own.items() if not k.startswith("layernorm")}, folder / "vision_tower/pytorch_model.bin"
        )
        theirs.tower.config.save_pretrained(folder / "vision_tower")
        processor = {"crop_size": {"height": 128, "width": 128}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
        (folder / "vision_tower/preprocessor_config.json").write_text(json.dumps(processor))
    model = imported(folder)
    assert_same(model, theirs, 128)
    assert model.media.image.size == 128 and [str(scale) for scale in model.scales] == ["4"]
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


@pytest.mark.parametrize("layout", ["transformers", "llava"])
def test_the_way_out_and_back_changes_no_bit(tmp_path, layout):
    """In this package's own folders, and in those of transformers' LLaVA."""
    theirs = llava(clip_tower(heads=1))
    config = theirs.config(mm_vision_tower=OPENAI)
    source = write_folder(tmp_path / "llava", theirs.state("model.vision_tower.vision_tower."), config)
    main([str(source), str(tmp_path / "in"), "--chat_template", "bare"])
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
