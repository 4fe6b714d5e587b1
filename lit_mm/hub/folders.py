"""A folder that `export` wrote -> a model that answers; the code in the folder is not run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from lit_mm.data.images import ImageOptions
from lit_mm.data.video import VideoOptions
from lit_mm.hub.huggingface.configuration_lit_mm import LitMMConfig
from lit_mm.hub.huggingface.modeling_lit_mm import build_encoder
from lit_mm.hub.reading import read_json
from lit_mm.hub.template import for_texts
from lit_mm.inference.answering import Model
from lit_mm.model.attention import NAME
from lit_mm.model.llm import packing_of
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.router import Router, RouterOptions
from lit_mm.model.scales import Scale, VideoScale
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.checkpoints import InitFrom, materialize, open_weights, own_config, start_from


def open_folder(
    folder: Path,
    image: ImageOptions | None = None,
    video: VideoOptions | None = None,
    scales: Sequence[int] | None = None,
) -> Model:
    """The model of an exported folder, on the CPU, without its chooser.

    Args:
        folder: The folder.
        image: How images are brought to size; None: as the folder says.
        video: Which frames of a video are shown; None: likewise.
        scales: Visual tokens per image to answer at; None: those of the folder.

    Raises:
        ValueError: A newer version wrote it, a field of its configs is missing, its weights do not fit its
            configuration, or its tokens depend on the scales (adaptive pooling) and there are others.
        FileNotFoundError: A file is missing.
    """
    told = own_config(folder)
    config = LitMMConfig.from_pretrained(folder)
    if scales and config.pooling != "exact" and list(scales) != list(config.scales):
        raise ValueError(f"{folder}: with pooling {config.pooling} expected scales {config.scales}, found {scales}")
    vlm = _vlm(config, scales or config.scales, told)
    start_from(vlm, InitFrom(str(folder)))
    materialize(vlm.llm, vlm.llm, open_weights(str(folder)).of("llm"))
    vlm.llm.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = for_texts(str(tokenizer.chat_template))
    file = folder / "processor_config.json"
    images = read_json(file).get("image_processor")
    if not isinstance(images, dict) or not isinstance(images.get("image_options"), dict):
        raise ValueError(f"{file}: image_processor is {images!r:.80}, expected image_options")
    return Model(
        vlm,
        tokenizer,
        image or ImageOptions(**images["image_options"]),
        video or (VideoOptions(**told["video"]) if told["video"] else None),
        ImageOptions(**told["frame"]) if told["frame"] else None,
        told["image_first"],
        told["max_new_tokens"],
        told["decoding"],
        trained_scales=[_scale(each) for each in told["trained_scales"]],
    )


def _vlm(config: LitMMConfig, scales: Sequence[int], told: dict[str, Any]) -> MatryoshkaVLM:
    """The model of a configuration with random weights, and with none in the LLM, where they would take long."""
    text, vision = cast(Any, config.text_config), cast(Any, config.vision_config)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text, dtype=text.dtype)
    if packing_of(text, "auto") != "padded":
        llm.set_attn_implementation(NAME)
    encoder, width = build_encoder(vision), cast(nn.Embedding, llm.get_input_embeddings()).embedding_dim
    projector = MatryoshkaProjector(encoder.num_features, width, scales, config.sampling, config.pooling)
    dtype, router = vision.dtype or torch.float32, None
    if told.get("router") and list(scales) == list(config.scales):
        router = Router(width, len(scales), RouterOptions(**told["router"])).to(dtype)
    return MatryoshkaVLM(encoder.to(dtype), projector.to(dtype), llm, told["time_scales"], router)


def _scale(told: int | list[int]) -> Scale:
    return VideoScale(*told) if isinstance(told, list) else told
