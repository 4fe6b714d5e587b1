"""What published weights, and the JSON files beside them, say of a model -> this package's config of it.

Sizes come from the weights themselves. What these do not show (heads, activation, pixel means) comes from the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_mm.hub.layouts import Source
from lit_mm.hub.reading import Readers, read_json
from lit_mm.model.encoder import check_described

EXPECTED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "mm_patch_merge_type": ("flat",),
    "mm_use_im_start_end": (False,),
    "mm_vision_select_feature": ("patch",),
    "vision_feature_select_strategy": ("default",),
    "s2": (False,),
    "quantization_config": (),
}
"""Fields of a LLaVA's config -> what this package computes."""
NOT_OVERRIDES = {
    "architectures",
    "dtype",
    "model_type",
    "transformers_version",
    "_name_or_path",
    "id2label",
    "label2id",
}
OF_CLASSIFIERS = ("num_classes", "global_pool", "in_chans")
"""timm's keywords that an encoder has no use for, or sets itself."""
CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "num_attention_heads": 12}
"""transformers' CLIPVisionConfig, whose defaults published files leave out."""
SIZES = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
SIZES |= {"pad_token_id"}  # otherwise null becomes that of the tokenizer
OPEN_CLIP_FIELDS = {"width", "head_width", "layers", "image_size", "patch_size", "mlp_ratio", "no_ln_pre"}
OPEN_CLIP_FIELDS |= {"ls_init_value", "patch_dropout", "output_tokens", "pool_type", "global_average_pool"}
OPEN_CLIP_FIELDS |= {"final_ln_after_pool", "attentional_pool", "attn_pooler_queries", "attn_pooler_heads"}
"""Fields of open_clip's vision_cfg that are read, that the weights show, or that do not change the grid."""
PROCESSORS = [f"{place}{file}_config.json" for place in ("vision_tower/", "") for file in ("preprocessor", "processor")]
"""Where transformers 4 and 5 write how images are prepared."""
LARGE = 256
"""Above these pixels of a side, ConvLLaVA's resolution replaces the processor's crop (convnext_encoder.py)."""


def check_config(config: dict[str, Any], where: Path) -> None:
    """Check that a LLaVA is one that this package computes.

    Raises:
        ValueError: A field of its config says something else.
    """
    for name, expected in EXPECTED.items():
        if (found := config.get(name)) is not None and found not in expected:
            said = " or ".join(map(repr, expected)) or "weights without quantization"
            raise ValueError(f"{where}: {name} is {found!r:.80}, expected {said}")


def folder_of_files(source: Source) -> Path:
    """Where the files beside the weights are: those of the base, if adapters have no config of their own."""
    folder = source.where if source.where.is_dir() else source.where.parent
    return source.base if source.base and not (folder / "config.json").is_file() else folder


def encoder_config(source: Source, layer: int | None = None, backbone: str | None = None) -> dict[str, Any]:
    """The encoder's class and arguments.

    Args:
        source: Where its weights are.
        layer: The block of a ViT whose output is the grid; None: LLaVA's, the second-to-last.
        backbone: timm's name of the model, for files that do not say what the weights leave open.

    Raises:
        ValueError: It is of a kind that this package lacks, or its files leave something open.
    """
    prefix = "encoder.trunk."
    trunk = {name.removeprefix(prefix): read for name, read in source.tensors.items() if name.startswith(prefix)}
    said = vision_config(folder_of_files(source))
    name = backbone or said.get("architecture")
    args = {} if backbone else said.get("model_args") or {}
    given = {key: value for key, value in args.items() if key not in OF_CLASSIFIERS}
    if name:
        check_described(name, given)
    if found := normalization(source, said, name)[0]:
        given["pretrained_cfg_overlay"] = found
    if "stem.0.weight" in trunk:
        if layer not in (None, -1):  # with -2, ConvLLaVA's code drops the last block when it loads the tower
            raise ValueError(f"{source.where}: the vision feature layer is {layer}, expected -1, a ConvNeXt's last")
        return _convnext(trunk, said, name, given, source.where)
    layer = -2 if layer is None else layer
    return _timm_vit(name, layer, given) if name else _vit(trunk, said, layer, given, source.where)


def vision_config(folder: Path) -> dict[str, Any]:
    """What the files say of the vision tower, in the words of transformers; timm's `architecture` names its model."""
    config = read_json(folder / "vision_tower/config.json") or read_json(folder / "config.json")
    opened = read_json(folder / "open_clip_config.json").get("model_cfg", {})
    if vision := opened.get("vision_cfg"):
        heads = vision.get("width", 0) // vision.get("head_width", 64)
        act = "quick_gelu" if opened.get("quick_gelu") else "gelu"
        known = OPEN_CLIP_FIELDS | {key for key in vision if key.startswith("timm_")}
        others = {key: value for key, value in vision.items() if value and key not in known}
        name = vision.get("timm_model_name")
        return {"num_attention_heads": heads, "hidden_act": act, "architecture": name, "others": others}
    if tower := config.get("mm_vision_tower"):  # inside a LLaVA, without a config of its own
        is_openais = re.search(r"(^|/)clip-vit-(base|large)-patch\d+(-336)?/?$", str(tower))
        return {"head_width": 64, "hidden_act": "quick_gelu"} if is_openais else {}
    vision = config.get("vision_config") or config
    is_clip = "vision_config" in config or vision.get("model_type") == "clip_vision_model"
    return {**(CLIP_DEFAULTS if is_clip else {}), **vision}


def image_processors(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files that say how images are prepared, and what they say; the tower's own come first."""
    for file in map(folder.joinpath, PROCESSORS):
        said = read_json(file)
        yield file, said.get("image_processor") or said


def normalization(source: Source, said: dict[str, Any], name: str | None) -> tuple[dict[str, list[float]], str]:
    """Mean and standard deviation of the pixels that the tower was trained with, and what says so.

    Args:
        source: Where its weights are.
        said: Its `vision_config`.
        name: timm's name of it, whose mean and deviation hold if no file says others: then the first result is empty.
    """
    folder = folder_of_files(source)
    stated = [(file, own.get("image_mean"), own.get("image_std")) for file, own in image_processors(folder)]
    opened = read_json(folder / "open_clip_config.json").get("preprocess_cfg") or {}
    timms = said.get("pretrained_cfg") or {}
    for file, own in ((folder / "open_clip_config.json", opened), (folder / "config.json", timms)):
        stated.append((file, own.get("mean"), own.get("std")))
    for file, mean, std in stated:
        if mean and std:
            return {"mean": list(mean), "std": list(std)}, str(file)
    if name:
        return {}, f"timm's {name}"
    whose = "ImageNet" if source.layout in ("convnext", "timm") else "OpenAI's CLIP"
    mean, std = DEFAULTS[whose]
    return {"mean": list(mean), "std": list(std)}, f"{whose}, as no file says them"


DEFAULTS = {
    "ImageNet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "OpenAI's CLIP": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
"""Mean and standard deviation of the pixels if no file says them."""


def pixels(source: Source, backbone: str | None) -> str:
    """A line that says how pixels are normalized, and where that is from."""
    said = vision_config(folder_of_files(source))
    found, origin = normalization(source, said, backbone or said.get("architecture"))
    values = ", ".join(f"{name} {value}" for name, value in found.items()) or "mean and std"
    return f"pixels: {values}, from {origin}"


def _convnext(
    trunk: Readers, said: dict[str, Any], name: str | None, given: dict[str, Any], where: Path
) -> dict[str, Any]:
    """A ConvNeXt of any depths and widths; its stages after the fourth are extra stages. What the weights do not show,
    such as the epsilon of its norms, is that of timm's model of its name."""
    if (act := said.get("hidden_act", "gelu")) != "gelu":
        raise ValueError(f"{where}: hidden_act of the ConvNeXt is {act!r}, expected gelu")
    depths = _counts(trunk, r"stages\.(\d+)\.blocks\.(\d+)\.")
    firsts = [f"stages.{stage}.blocks.0." for stage in range(len(depths))]
    if len(depths) < 4 or "stem.1.weight" not in trunk or any(f"{each}conv_dw.weight" not in trunk for each in firsts):
        raise ValueError(f"{where}: a ConvNeXt with {len(depths)} stages, expected four or more after a patch stem")
    widths = [trunk[f"{each}conv_dw.weight"]().shape[0] for each in firsts]
    overrides = {
        "depths": depths[:4],
        "dims": widths[:4],
        "patch_size": trunk["stem.0.weight"]().shape[-1],
        "kernel_sizes": trunk[f"{firsts[0]}conv_dw.weight"]().shape[-1],
        "conv_mlp": trunk[f"{firsts[0]}mlp.fc1.weight"]().ndim == 4,
    }
    further = [{"depth": depth, "width": width} for depth, width in zip(depths[4:], widths[4:], strict=True)]
    backbone = name or ("convnextv2_base" if f"{firsts[0]}mlp.grn.weight" in trunk else "convnext_base")
    arguments = {"backbone": backbone, "extra_stages": further, "overrides": {**given, **overrides}}
    return {"class_path": "lit_mm.ConvNeXtEncoder", "init_args": arguments}


def _vit(trunk: Readers, said: dict[str, Any], layer: int, given: dict[str, Any], where: Path) -> dict[str, Any]:
    """A CLIP's ViT."""
    parts = [trunk.get(name) for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")]
    if None in parts:
        raise ValueError(f"{where}: a tower without patches, positions or blocks, expected a ConvNeXt or a ViT")
    patches, positions, inner = (read().shape for read in parts if read)
    width, patch, cells = patches[0], patches[-1], positions[1] - 1
    heads = said.get("num_attention_heads") or width // said.get("head_width", width + 1)
    act, eps = said.get("hidden_act"), said.get("layer_norm_eps", 1e-5)
    others = said.get("others")
    if not heads or act not in ("gelu", "quick_gelu") or eps != 1e-5 or others:
        found = f"{heads or 'no'} heads, activation {act}, layer_norm_eps {eps}" + (f", {others}" if others else "")
        raise ValueError(
            f"{where}: its files say {found}, expected heads, gelu or quick_gelu, 1e-5 and nothing else; --backbone "
            "names a model of timm that has them, such as vit_large_patch14_clip_quickgelu_336.openai"
        )
    depth = len({name.split(".")[1] for name in trunk if name.startswith("blocks.")})
    if not -depth <= layer < depth:
        raise ValueError(f"{where}: the vision feature layer is {layer}, expected a block of its {depth}")
    overrides = {
        "img_size": round(cells**0.5) * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": inner[0] / width,
    }
    name = "vit_base_patch16_clip_quickgelu_224" if act == "quick_gelu" else "vit_base_patch16_clip_224"
    return _timm_vit(name, layer, overrides | given)


def _timm_vit(backbone: str, layer: int, overrides: dict[str, Any]) -> dict[str, Any]:
    arguments = {"backbone": backbone, "layer": layer, "overrides": overrides}
    return {"class_path": "lit_mm.TimmEncoder", "init_args": arguments}


def _counts(trunk: Readers, pattern: str) -> list[int]:
    """How many blocks each stage has, by the two numbers in the names."""
    found = {match.groups() for match in map(re.compile(pattern).match, trunk) if match}
    stages = [int(stage) for stage, _ in found]
    return [stages.count(stage) for stage in sorted(set(stages))]


def layer_of(config: dict[str, Any], where: Path) -> int | None:
    """The block whose output is the grid; None if the config does not say.

    Raises:
        ValueError: There are several, or it is none of the blocks.
    """
    index = config.get("vision_feature_layer", config.get("mm_vision_select_layer"))
    if index is None:
        return None
    if not isinstance(index, int) or index == 0:
        raise ValueError(f"{where}: the vision feature layer is {index!r}, expected one block")
    return index if index < 0 else index - 1  # transformers' hidden state 0 is the first block's input


def llm_config(config: dict[str, Any], where: Path) -> tuple[str, dict[str, Any]]:
    """The name of transformers' config class of the LLM, and its keywords.

    Raises:
        ValueError: transformers has no such model.
    """
    text = config.get("text_config") or config
    kind = str(text.get("model_type", "llama")).removeprefix("llava_")
    kind = "llama" if kind == "llava" else kind
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{where}: model_type {kind!r} is not in transformers; code of others is not run")
    cls = CONFIG_MAPPING[kind]
    default = cls().to_dict()
    own = cls(**{name: value for name, value in text.items() if not name.startswith("mm_")}).to_dict()
    kept = {name: value for name, value in own.items() if name in default and name not in NOT_OVERRIDES}
    return cls.__name__, {name: value for name, value in kept.items() if name in SIZES or value != default[name]}


def image_size(source: Source, config: dict[str, Any], overrides: dict[str, Any]) -> int | None:
    """Pixels of an image's side: of a ViT's positions, or as the files of a ConvNeXt say; None if they do not."""
    if "img_size" in overrides:
        return overrides["img_size"]
    folder = folder_of_files(source)
    resolution = config.get("mm_vision_resolution")
    if resolution and resolution > LARGE:
        return resolution
    for _, said in image_processors(folder):
        crop = said.get("crop_size")
        if side := crop.get("height") if isinstance(crop, dict) else crop:
            return side
    return resolution or vision_config(folder).get("image_size")


def image_mode(config: dict[str, Any], where: Path) -> Literal["pad", "squash"]:
    """How a LLaVA brings images to its size; `squash` is what this package's own `export --as llava` may write.

    Raises:
        ValueError: Its config says neither.
    """
    if (found := config.get("image_aspect_ratio", "pad")) != "pad":
        raise ValueError(f"{where}: image_aspect_ratio is {found!r:.80}, expected 'pad'")
    said = next((own for _, own in image_processors(where.parent) if "do_pad" in own), {})
    return "squash" if said.get("do_pad") is False and said.get("do_center_crop") is False else "pad"
