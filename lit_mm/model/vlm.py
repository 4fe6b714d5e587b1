"""Encoder, projector and LLM together: the multimodal model with elastic visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel

from lit_mm.model.attention import FlexLayout
from lit_mm.model.encoder import Encoder
from lit_mm.model.loss import token_losses, weighted_loss
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.rows import IGNORED, IMAGE, Batch, Images, Question, Rows, behind_an_image, expand, stack


@dataclass
class Losses:
    """What a step computes.

    Args:
        total: Scalar with a gradient: the drawn scales' losses by their weights.
        per_scale: [scales] mean over the batch's own targets, without a gradient; only those of the
            drawn scales mean anything.
    """

    total: Tensor
    per_scale: Tensor


class MatryoshkaVLM(nn.Module):
    """image -> encoder -> grid -> projector -> nested tokens -> LLM, at any of the scales.

    Args:
        encoder: Image to grid.
        projector: Grid to nested tokens; its scales are the model's.
        llm: A causal LM of transformers.
    """

    def __init__(self, encoder: Encoder, projector: MatryoshkaProjector, llm: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.llm = llm

    @property
    def scales(self) -> list[int]:
        """Visual tokens per image, finest first."""
        return self.projector.scales

    def encode(self, images: Images) -> list[Tensor]:
        """N images -> their nested tokens, one [N, scale, D] per scale, finest first.

        Raises:
            ValueError: A scale does not divide an image's grid.
        """
        groups = [self.projector(self.encoder(self.encoder.normalise(pixels))) for pixels in images.groups]
        return [torch.cat(same_scale)[images.order] for same_scale in zip(*groups, strict=True)]

    def forward(self, batch: Batch, count: Tensor | int | None = None) -> Losses:
        """Next-token losses of the batch at its drawn scales (M3, equation 1 is their mean).

        The encoder and the projector run once, the LLM once for each of the batch's rows, and logits
        exist only where there is a target. A batch without rows goes through `loop`.

        Args:
            batch: Samples, packed or not.
            count: What the total is divided by; null: the batch's own number of targets.
        """
        sums, own = self.sums(batch, self.encode(batch.images)), max(1, batch.supervised)
        return Losses(sums.total / (own if count is None else count), sums.per_scale / own)

    def loop(self, batch: Batch) -> Losses:
        """What `forward` computes, in the obvious way: the LLM runs once per scale, on padded samples.

        The reference for packed rows, and the way of models that cannot be packed.
        """
        return self(replace(batch, rows=[]))

    def sums(self, batch: Batch, nested: list[Tensor]) -> Losses:
        """Sums of the batch's losses instead of means, given the images' nested tokens."""
        if not batch.rows:
            return self._loop(batch, nested)
        hidden = torch.cat([self._hidden_of(rows, nested, again=len(batch.rows) > 1) for rows in batch.rows])
        weights = torch.cat([self._weights(rows, hidden) for rows in batch.rows])
        total, losses = weighted_loss(self.llm, hidden, torch.cat([rows.targets for rows in batch.rows]), weights)
        scales = torch.cat([rows.target_scale for rows in batch.rows])
        sums = losses.new_zeros(len(self.scales) + 1).index_add_(0, scales, losses)
        return Losses(total, sums[:-1] + sums[-1])

    def _weights(self, rows: Rows, hidden: Tensor) -> Tensor:
        """[S] what each target's loss counts."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return torch.tensor(rows.weights, dtype=dtype).to(hidden.device)[rows.target_scale]

    def _hidden_of(self, rows: Rows, nested: list[Tensor], again: bool) -> Tensor:
        """Last hidden states [S, D] where a row's targets are predicted. `again` computes the LLM's
        activations anew in the backward pass, so that those of one row exist at a time."""
        embeddings = cast(nn.Module, self.llm.get_input_embeddings())(rows.token_ids)
        if nested and len(rows.visual_index):
            tokens = torch.cat(nested, dim=1).flatten(0, 1)[rows.visual_source]
            embeddings = embeddings.index_copy(0, rows.visual_index, tokens.to(embeddings.dtype))
        if again and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._decode, embeddings, rows, use_reentrant=False))
        return self._decode(embeddings, rows)

    def _decode(self, embeddings: Tensor, rows: Rows) -> Tensor:
        """Embeddings [L, D] of a row -> last hidden states [S, D] where a target is predicted."""
        if isinstance(rows.layout, FlexLayout) and rows.layout.mask is None:
            rows.layout.prepare()
        # a mask of four dimensions is handed on as it is: transformers must not build its own
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeddings.device)
        output = cast(Any, self.llm).base_model(
            inputs_embeds=embeddings[None],
            position_ids=rows.position_ids[None],
            attention_mask=nothing,
            rows_layout=rows.layout,
            use_cache=False,
        )
        return output.last_hidden_state[0, rows.target_index]

    def _loop(self, batch: Batch, nested: list[Tensor]) -> Losses:
        totals, sums, moved = [], {}, behind_an_image(batch)
        for scale in batch.drawn:
            losses = self._losses_at(batch, self.scales[scale.number], nested[scale.number] if nested else None)
            # what no scale changes counts once over all drawn scales, as in a packed row
            totals.append(torch.where(moved, losses * scale.weight, losses / len(batch.drawn)).sum())
            sums[scale.number] = losses.detach().sum()
        nothing = torch.zeros_like(totals[0])
        return Losses(
            torch.stack(totals).sum(), torch.stack([sums.get(number, nothing) for number in range(len(self.scales))])
        )

    def _losses_at(self, batch: Batch, scale: int, tokens: Tensor | None) -> Tensor:
        """Loss of every target [S] at one scale."""
        ids = stack([expand(ids, ids, scale) for ids in batch.token_ids], padding=0)
        targets = [expand(targets, ids, scale) for targets, ids in zip(batch.targets, batch.token_ids, strict=True)]
        embeddings = self._embed(ids, tokens, batch.image_index)
        return token_losses(self.llm, embeddings, stack(targets, padding=IGNORED), IGNORED)

    def _embed(self, ids: Tensor, tokens: Tensor | None, image_index: Tensor) -> Tensor:
        """Ids [B, T] with IMAGE at visual positions -> embeddings [B, T, D] with the tokens there."""
        visual = ids == IMAGE
        embeddings = cast(nn.Module, self.llm.get_input_embeddings())(ids.masked_fill(visual, 0))
        if tokens is None:
            return embeddings
        return embeddings.masked_scatter(visual[..., None], tokens[image_index].to(embeddings.dtype))

    def start_from_nothing(self, gain: float) -> None:
        """Draw the encoder's and the projector's convolutions and linear layers anew, with standard
        deviation gain / sqrt(fan-in).

        Raises:
            ValueError: The encoder is pretrained.
        """
        if self.encoder.pretrained:
            raise ValueError("init_gain starts every layer anew: it cannot go with a pretrained encoder")
        for module in [*self.encoder.modules(), *self.projector.modules()]:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=gain / module.weight[0].numel() ** 0.5)

    @torch.inference_mode()
    def generate(
        self,
        images: Images | list[Tensor],
        questions: Sequence[Question],
        scale: int,
        max_new_tokens: int = 64,
        end_ids: Sequence[int] = (),
    ) -> list[Tensor]:
        """Answer questions greedily with `scale` visual tokens an image.

        Args:
            images: Images, or the nested tokens that `encode` made of them (to ask at several scales
                and encode once).
            questions: Prompts with the places of their images.
            scale: One of the model's scales.
            max_new_tokens: The longest answer, in tokens.
            end_ids: Token ids that end an answer; the model's own end token does so always.

        Returns:
            One [t] tensor of new token ids a question, its end token and padding removed.

        Raises:
            ValueError: The model does not have this scale, or no end token is known.
        """
        if not questions:
            return []
        if scale not in self.scales:
            raise ValueError(f"scale {scale} is not one of the model's {self.scales}")
        nested = self.encode(images) if isinstance(images, Images) else images
        prompts = [expand(question.token_ids, question.token_ids, scale) for question in questions]
        mask = stack([torch.ones_like(prompt) for prompt in prompts], padding=0, left=True)
        tokens = nested[self.scales.index(scale)] if nested else None
        index = torch.tensor(
            [i for question in questions for i in question.image_index], dtype=torch.long, device=mask.device
        )
        embeddings = self._embed(stack(prompts, padding=0, left=True), tokens, index)
        ends = self._end_ids(end_ids)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0]
        )
        answers = cast(Any, self.llm).generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=config)
        return [_until(answer, ends) for answer in answers]

    def _end_ids(self, end_ids: Sequence[int]) -> list[int]:
        own = cast(GenerationConfig, self.llm.generation_config).eos_token_id
        own = own if isinstance(own, list) else [own] if own is not None else []
        if not (ends := sorted({*end_ids, *own})):
            raise ValueError("neither the caller nor the LLM's generation config names a token that ends an answer")
        return ends


def _until(ids: Tensor, ends: list[int]) -> Tensor:
    """The ids before the first end token."""
    found = torch.isin(ids, torch.tensor(ends, device=ids.device)).nonzero()
    return ids[: int(found[0])] if len(found) else ids
