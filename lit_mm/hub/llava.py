"""A model with a CLIP ViT and one scale as transformers' own LLaVA, which opens without `trust_remote_code`.

Its classes pool nothing, so the scale must be the whole grid; and they know only CLIP's towers, so others are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers import Attention, QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from lit_mm.hub.card import Origin
from lit_mm.hub.export import describe, generation_of, is_tied, new_folder, text_config, tokenizer_of, widest
from lit_mm.inference.answering import Model
from lit_mm.model.encoder import TimmEncoder
from lit_mm.model.loss import logit_factor
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.training.parts import merge_adapters

TOWER = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm_pre.": "pre_layrnorm.",
    "blocks.": "encoder.layers.",
}
BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
"""timm's names -> those of transformers' CLIPVisionModel; queries, keys and values are one matrix in timm."""


def export_llava(model: Model, folder: Path, origin: Origin) -> None:
    """Write a model as a folder of `LlavaForConditionalGeneration`.

    Raises:
        FileExistsError: The folder is not empty, or is not a folder.
        ValueError: LLaVA cannot compute what this model computes; the message says why.
    """
    merge_adapters(model.vlm.llm)
    if reasons := list(obstacles(model)):
        raise ValueError(f"export: --as llava: {'; '.join(reasons)}: leave --as llava out")
    processor = llava_processor(model)
    config = llava_config(model, processor.image_token_id)
    with torch.device("meta"):
        made = LlavaForConditionalGeneration(config)
    made.load_state_dict(llava_state(model, config), assign=True)
    made.generation_config = llava_generation(model, config)
    with new_folder(folder) as path:
        made.save_pretrained(path)
        made.config.dtype = widest(model.vlm)  # save_pretrained wrote the type of the first weight
        made.config.save_pretrained(path)
        processor.save_pretrained(path)
        describe(path, model, origin, llava=True)


def obstacles(model: Model) -> Iterator[str]:
    """Why transformers' LLaVA cannot compute what a model computes."""
    vlm, image = model.vlm, model.media.image
    trunk: Any = getattr(vlm.encoder, "trunk", None)
    if not isinstance(vlm.encoder, TimmEncoder) or not _is_clip(trunk):
        yield f"it knows CLIP's ViT, the encoder is {vlm.encoder.arguments['backbone']}"
        return
    size = trunk.patch_embed.img_size
    if type(vlm.projector) is not MatryoshkaProjector:
        yield f"its projector has two linear layers, the model a {type(vlm.projector).__name__}"
    if len(vlm.projector.scales) > 1 or vlm.time_scales:
        yield f"it has one scale, the model {', '.join(map(str, vlm.all_scales))}"
    elif vlm.projector.scales[0] != trunk.patch_embed.num_patches:
        yield f"it pools nothing, the scale is {vlm.projector.scales[0]} of {trunk.patch_embed.num_patches} cells"
    if image.mode == "keep" or image.target(1, 1) != size or size[0] != size[1]:
        yield f"it takes squares of the encoder's {size[0]} pixels, images are {image.mode}, {image.size}"
    head: Any = vlm.llm.get_output_embeddings()
    if head.bias is not None or logit_factor(vlm.llm.config) != 1:
        yield f"its output head is a plain matrix, that of {type(vlm.llm).__name__} is not"


def _is_clip(trunk: Any) -> bool:
    """Whether a timm model is a vision transformer as CLIP's are, up to its sizes."""
    if type(trunk) is not VisionTransformer:
        return False
    block: Any = trunk.blocks[0]
    plain = all(isinstance(getattr(block, name), nn.Identity) for name in ("ls1", "ls2"))
    own = isinstance(trunk.norm_pre, nn.LayerNorm) and trunk.patch_embed.proj.bias is None and plain
    attention = type(block.attn) is Attention and isinstance(block.attn.q_norm, nn.Identity)
    tokens = trunk.num_prefix_tokens == 1 and not trunk.no_embed_class
    return own and attention and tokens and isinstance(block.mlp.act, nn.GELU | QuickGELU)


def llava_processor(model: Model) -> LlavaProcessor:
    """The tokenizer and LLaVA's own image processor, with the model's way of resizing."""
    encoder, image = model.vlm.encoder, model.media.image
    side = image.target(1, 1)[0]
    images = LlavaImageProcessor(
        size={"height": side, "width": side},
        do_pad=image.mode == "pad",
        do_center_crop=False,
        crop_size={"height": side, "width": side},
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
    )
    tokenizer = tokenizer_of(model)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=encoder.stride,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def llava_config(model: Model, image_token_id: int) -> LlavaConfig:
    """The configuration; the vocabulary has a row for `<image>`."""
    vlm: Any = model.vlm
    trunk, text = vlm.encoder.trunk, text_config(vlm.llm)
    text.vocab_size = max(image_token_id + 1, vlm.llm.get_input_embeddings().num_embeddings)
    block = trunk.blocks[0]
    vision = CLIPVisionConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=trunk.patch_embed.img_size[0],
        patch_size=vlm.encoder.stride,
        hidden_act="gelu" if isinstance(block.mlp.act, nn.GELU) else "quick_gelu",
        layer_norm_eps=block.norm1.eps,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=vlm.projector.scales[0],
        vision_feature_layer=-1,  # later blocks are gone
        vision_feature_select_strategy="default",
        tie_word_embeddings=is_tied(vlm.llm),
        dtype=widest(model.vlm),
    )


def llava_generation(model: Model, config: LlavaConfig) -> GenerationConfig:
    """How the model answers by default. `<image>` and the rows added up to it, whose logits are 0, are never chosen."""
    generation, text = generation_of(model), cast(Any, config.text_config)
    added = range(cast(Any, model.vlm.llm.get_input_embeddings()).num_embeddings, text.vocab_size)
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), config.image_token_index, *added})
    return generation


def llava_state(model: Model, config: LlavaConfig) -> dict[str, Tensor]:
    """The model's weights by LLaVA's names, each in its own type."""
    vlm: Any = model.vlm
    vision, text = (cast(Any, own) for own in (config.vision_config, config.text_config))
    with torch.device("meta"):
        names = LlavaForConditionalGeneration(config).state_dict()
    [inside] = {name.partition("embeddings.class_embedding")[0] for name in names if "class_embedding" in name}
    state = {inside + name: tensor for name, tensor in tower_of(vlm.encoder.trunk)}
    state |= {
        f"{inside}post_layernorm.{name}": vlm.encoder.trunk.cls_token.new_full((vision.hidden_size,), value)
        for name, value in POST.items()
    }
    for place, layer in (("linear_1", 0), ("linear_2", 2)):
        own = vlm.projector.layers[layer].state_dict()
        state |= {f"model.multi_modal_projector.{place}.{name}": tensor for name, tensor in own.items()}
    for name, tensor in vlm.llm.base_model.state_dict().items():
        state[f"model.language_model.{name}"] = tensor
    table = vlm.llm.get_input_embeddings().weight
    [place] = [name for name, tensor in vlm.llm.base_model.named_parameters() if tensor is table]
    rows = text.vocab_size - len(table)
    state[f"model.language_model.{place}"] = nn.functional.pad(table, (0, 0, 0, rows))
    head = vlm.llm.get_output_embeddings().weight
    state["lm_head.weight"] = nn.functional.pad(head, (0, 0, 0, rows))
    return {name: tensor.contiguous() for name, tensor in state.items()}


POST = {"weight": 1.0, "bias": 0.0}
"""The norm after the last block, which LLaVA's features do not pass through."""


def tower_of(trunk: Any) -> Iterator[tuple[str, Tensor]]:
    """A timm ViT's weights by the names of transformers' CLIPVisionModel."""
    for name, tensor in trunk.state_dict().items():
        [theirs] = [name.replace(own, other, 1) for own, other in TOWER.items() if name.startswith(own)]
        for own, other in BLOCK.items():
            theirs = theirs.replace(own, other)
        if "attn.qkv" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                yield theirs.replace("attn.qkv", f"self_attn.{part}_proj"), piece
        elif name in ("cls_token", "pos_embed"):
            yield theirs, tensor.flatten(0, -2).squeeze(0) if name == "cls_token" else tensor[0]
        else:
            yield theirs, tensor
