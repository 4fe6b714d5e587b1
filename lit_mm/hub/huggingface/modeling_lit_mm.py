"""A multimodal model with elastic visual tokens, as transformers' classes.

    pixels -> encoder -> grid -> projector -> nested tokens -> those of one scale in place of `<image>` -> LLM

`model.generate(**inputs, num_visual_tokens=36)` answers with 36 visual tokens per image, whatever number of `<image>`
tokens the processor wrote.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from lit_mm.hub.huggingface.configuration_lit_mm import LitMMConfig, LitMMVisionConfig
from lit_mm.model.encoder import ConvNeXtEncoder, Encoder, ExtraStage, TimmEncoder, check_described
from lit_mm.model.projector import MatryoshkaProjector


def build_encoder(config: LitMMVisionConfig) -> Encoder:
    """The encoder that a configuration describes, without weights.

    Raises:
        ValueError: It is of an unknown kind, it asks for weights from elsewhere, or the installed timm does not know
            its backbone.
    """
    arguments = dict(config.arguments or {})
    if arguments.pop("pretrained", False):
        raise ValueError("vision_config.arguments: pretrained would read weights from elsewhere, expected none")
    check_described(arguments.get("backbone", ""), arguments.get("overrides") or {})
    if config.encoder == "TimmEncoder":
        return TimmEncoder(**arguments)
    if config.encoder != "ConvNeXtEncoder":
        raise ValueError(f"vision_config.encoder {config.encoder}: expected ConvNeXtEncoder or TimmEncoder")
    stages = [ExtraStage(**stage) for stage in arguments.pop("extra_stages")]
    return ConvNeXtEncoder(extra_stages=stages, **arguments)


class LitMMPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config: LitMMConfig
    config_class = LitMMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):  # of timm's rotary embeddings, which files do not hold
            cast(Any, module).init_non_persistent_buffers()


class LitMMModel(LitMMPreTrainedModel):
    """Encoder, projector and the LLM without its output head."""

    def __init__(self, config: LitMMConfig) -> None:
        super().__init__(config)
        self.vision_tower = build_encoder(config.vision_config)
        self.language_model = AutoModel.from_config(config.text_config)
        width = self.language_model.get_input_embeddings().embedding_dim
        self.multi_modal_projector = MatryoshkaProjector(
            self.vision_tower.num_features, width, config.scales, config.sampling, config.pooling
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens of n images; `pooler_output` is a list of one tensor [scale, D] per image.

        Args:
            pixel_values: [n, 3, H, W], normalized; smaller images are padded on the right and at the bottom.
            image_sizes: [n, 2] height and width of each without this padding; None: all are H × W.
            visual_tokens: [n] the scale of each; None: the finest.
            kwargs: Not used.

        Raises:
            ValueError: The model has no such scale, or the scales do not divide an image's grid.
        """
        scales, count = list(self.config.scales), len(pixel_values)
        sizes = (
            [pixel_values.shape[-2:]] * count if image_sizes is None else [tuple(own) for own in image_sizes.tolist()]
        )
        asked = scales[:1] * count if visual_tokens is None else visual_tokens.tolist()
        if unknown := set(asked) - set(scales):
            raise ValueError(f"{unknown.pop()} visual tokens per image: expected one of the model's {scales}")
        pixel_values = pixel_values.to(next(self.vision_tower.parameters()).dtype)
        found: dict[int, Tensor] = {}
        for height, width in dict.fromkeys(sizes):
            same = [number for number in range(count) if tuple(sizes[number]) == (height, width)]
            nested = self.multi_modal_projector(self.vision_tower(pixel_values[same, :, :height, :width]))
            for number, tokens in zip(same, nested, strict=True):  # [sum of scales, D]
                found[number] = tokens.split(scales)[scales.index(asked[number])]
        return BaseModelOutputWithPooling(pooler_output=cast(Any, [found[number] for number in range(count)]))

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        visual_tokens: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, T, D] of token ids [B, T], with visual tokens in place of `<image>`.

        Raises:
            ValueError: The images have more or fewer visual tokens than there are `<image>`.
        """
        is_image = input_ids == self.config.image_token_id
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if pixel_values is None:
            features = embeddings.new_zeros(0, embeddings.shape[-1])
        else:
            found: Any = self.get_image_features(pixel_values, image_sizes, visual_tokens)
            features = torch.cat(found.pooler_output)
        if len(features) != (places := int(is_image.sum())):
            raise ValueError(
                f"input_ids have {places} image tokens, the images have {len(features)} visual tokens: "
                "give what the processor returned, visual_tokens included"
            )
        return embeddings.masked_scatter(is_image[..., None], features.to(embeddings))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The LLM's output for token ids [B, T] with images, or for embeddings [B, T, D] in which they are already.

        Args:
            input_ids: [B, T], with one `<image>` for each visual token.
            pixel_values: As for `get_image_features`, of all images in order.
            image_sizes: As for `get_image_features`.
            visual_tokens: As for `get_image_features`.
            inputs_embeds: [B, T, D], in place of these.
            kwargs: The LLM's: attention_mask, position_ids, past_key_values, use_cache, …; what it does not know
                reaches its attention layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(cast(Tensor, input_ids), pixel_values, image_sizes, visual_tokens)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class LitMMForConditionalGeneration(LitMMPreTrainedModel, GenerationMixin):
    """The model with its output head."""

    def __init__(self, config: LitMMConfig) -> None:
        super().__init__(config)
        self.model = LitMMModel(config)
        table = self.model.get_input_embeddings()
        self.lm_head = nn.Linear(table.embedding_dim, table.num_embeddings, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            [name] = [name for name, module in self.named_modules() if module is table]
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `LitMMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary], and the loss if there are labels [B, T]; otherwise like `LitMMModel.forward`."""
        output = self.model(
            input_ids,
            pixel_values,
            image_sizes,
            visual_tokens,
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output[0][:, kept]) * self.config.logit_factor
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        num_visual_tokens: int | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers' `generate` does; returns the prompts as given, followed by the answers.

        Args:
            inputs: Token ids [B, T], also as `input_ids`; batches are padded on the left.
            num_visual_tokens: One of the model's scales, in place of the one that the processor wrote.
            pixel_values: As for `LitMMModel.get_image_features`, of all images in order.
            image_sizes: Likewise.
            visual_tokens: Likewise.
            attention_mask: [B, T], 0 at padding.
            kwargs: transformers' own.

        Raises:
            ValueError: The model has no such scale, or it is finer than what the processor wrote.
        """
        given = kwargs.pop("input_ids", inputs)
        if given is None:
            return cast(Any, super()).generate(attention_mask=attention_mask, **kwargs)
        ids, mask = given, torch.ones_like(given) if attention_mask is None else attention_mask
        if num_visual_tokens is not None and pixel_values is not None:
            ids, mask = self._fewer(ids, mask, num_visual_tokens, len(pixel_values), visual_tokens)
            visual_tokens = torch.full((len(pixel_values),), num_visual_tokens)
        # Without ids, no processor of the logits looks for `<image>` in the vocabulary.
        embeddings = self.model.embed(ids, pixel_values, image_sizes, visual_tokens)
        made = cast(Any, super()).generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)
        answers: Any = made if isinstance(made, Tensor) else made.sequences
        prompts = given.repeat_interleave(len(answers) // len(given), dim=0).to(answers.device)
        sequences = torch.cat([prompts, answers], dim=1)
        if isinstance(made, Tensor):
            return sequences
        made.sequences = sequences
        return made

    def _fewer(
        self, ids: Tensor, mask: Tensor, most: int, images: int, visual_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T'] of prompts in which every image keeps its first `most` places."""
        is_image = ids == self.config.image_token_id
        counts = [self.config.scales[0]] * images if visual_tokens is None else visual_tokens.tolist()
        if most not in self.config.scales or most > min(counts):
            fits = [scale for scale in self.config.scales if scale <= min(counts)]
            raise ValueError(f"num_visual_tokens {most}: expected one of {fits}, as the processor wrote {min(counts)}")
        place = torch.cat([torch.arange(count) for count in counts]).to(ids.device)  # of each `<image>` in its image
        keep = torch.ones_like(is_image).masked_scatter(is_image, place < most)
        rows = [(own[kept], shown[kept]) for own, shown, kept in zip(ids, mask, keep, strict=True)]
        return (
            pad_sequence([own for own, _ in rows], batch_first=True, padding_side="left"),
            pad_sequence([shown for _, shown in rows], batch_first=True, padding_side="left"),
        )
