"""The configuration of an exported model."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig


class LitMMVisionConfig(PreTrainedConfig):
    """The image encoder.

    Args:
        encoder: ConvNeXtEncoder or TimmEncoder.
        arguments: Its keywords, such as the name of timm's backbone.
        stride: Pixels per cell of its grid, along a side.
        hidden_size: Channels of its grid.
    """

    model_type = "lit_mm_vision"

    encoder: str = "ConvNeXtEncoder"
    arguments: dict[str, Any] | None = None
    stride: int = 64
    hidden_size: int = 3072


class LitMMConfig(PreTrainedConfig):
    """Image encoder, Matryoshka projector and LLM.

    Args:
        text_config: The LLM's own configuration.
        vision_config: The encoder's.
        scales: Visual tokens per image, finest first.
        sampling: How coarser tokens come from finer ones: mean, spatial or sequential.
        pooling: exact, or adaptive for grids that a scale does not divide.
        image_token_id: The id of `<image>`, which may be beyond the LLM's vocabulary: it is never embedded.
        lm_head_bias: Whether the LLM's output head has a bias.
        logit_factor: Factor of the LLM's logits (Cohere, Granite).
        lit_mm: What only lit_mm reads, when it opens the folder itself.
    """

    model_type = "lit_mm"
    sub_configs = {"text_config": AutoConfig, "vision_config": LitMMVisionConfig}  # noqa: RUF012

    text_config: Any = None
    vision_config: Any = None
    scales: list[int] | tuple[int, ...] = (576, 144, 36, 9, 1)
    sampling: Literal["mean", "spatial", "sequential"] = "mean"
    pooling: Literal["exact", "adaptive"] = "exact"
    image_token_id: int = 0
    lm_head_bias: bool = False
    logit_factor: float = 1.0
    tie_word_embeddings: bool = False
    lit_mm: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the nested configurations, of which a file has dictionaries."""
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = LitMMVisionConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)
