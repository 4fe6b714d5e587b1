"""Encoder, projector and LLM together: the multimodal model with elastic visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_mm.model.attention import FlexLayout
from lit_mm.model.encoder import Encoder
from lit_mm.model.generation import Decoding, all_end_ids, settings
from lit_mm.model.loss import token_losses, weighted_loss
from lit_mm.model.projector import MatryoshkaProjector, Scale, all_levels, checked_time_scales
from lit_mm.model.rows import (
    IGNORED,
    IMAGE,
    Batch,
    FrameSets,
    Images,
    Question,
    Rows,
    at_time,
    behind_an_image,
    expand,
    in_sets,
    levels_of_kinds,
    stack,
)


@dataclass
class Losses:
    """What a step computes.

    Args:
        total: Scalar with a gradient: the drawn levels' losses by their weights.
        per_level: [levels] mean over the batch's own targets, without a gradient; only those of the
            drawn levels mean anything.
    """

    total: Tensor
    per_level: Tensor


class MatryoshkaVLM(nn.Module):
    """image -> encoder -> grid -> projector -> nested tokens -> LLM, at any of the scales.

    Args:
        encoder: Image to grid.
        projector: Grid to nested tokens; its scales are the model's.
        llm: A causal LM of transformers.
        time_scales: Sets of neighbouring frames that a video is cut into, finest first; each divides
            the one before. Empty: a video's frames are not pooled.

    """

    def __init__(
        self,
        encoder: Encoder,
        projector: MatryoshkaProjector,
        llm: PreTrainedModel,
        time_scales: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.llm = llm
        self.time_scales = checked_time_scales(time_scales) if time_scales else []
        self.sharded = False
        """Whether ranks wait for each other's parameters, and so must compute equally often."""

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The LLM's: its longest list of modules, as every model of transformers has one."""
        lists = [list(module) for module in self.llm.base_model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    def recompute(self, parts: Sequence[str]) -> None:
        """Compute the blocks of the encoder, the LLM or both again in the backward pass."""
        if "encoder" in parts:
            self.encoder.set_grad_checkpointing()
        if "llm" in parts:
            enable = getattr(self.llm, "activation_checkpointing_enable", self.llm.gradient_checkpointing_enable)
            enable({"use_reentrant": False})  # the first is transformers' newer name
            for layer in self.decoder_layers:  # transformers recomputes in training mode only
                layer.training = True

    @property
    def levels(self) -> list[Scale]:
        """What the model answers at, finest first: its scales, at each of its time scales."""
        return all_levels(self.projector.scales, self.time_scales)

    def encode(self, images: Images, encodings: int = 0) -> list[Tensor]:
        """N images -> their nested tokens, one [N, scale, D] per level, finest first.

        With time scales it is [sets of frames, scale, D], the means over the frames of every set.

        Args:
            images: To be encoded.
            encodings: As for `forward`.

        Raises:
            ValueError: A scale does not divide an image's grid.
        """
        nested = self._encode(images)
        for _ in range(encodings - len(images.groups)):
            self._blank()
        return nested

    def _encode(self, images: Images) -> list[Tensor]:
        groups = [self.projector(self.encoder(self.encoder.normalise(pixels))) for pixels in images.groups]
        nested = [torch.cat(same_scale)[images.order] for same_scale in zip(*groups, strict=True)]
        if not self.time_scales:
            return nested
        return [mean_over(sets, tokens) for sets in images.over_time for tokens in nested]

    def _blank(self) -> Tensor:
        """Zero, with a gradient of zero for the encoder and the projector, from the smallest image.

        Added to the LLM's embeddings, so that every backward goes through the LLM into the encoder.
        """
        pixels = torch.zeros(1, 3, *self.encoder.smallest, dtype=torch.uint8)
        grid = self.encoder(self.encoder.normalise(pixels.to(next(self.encoder.parameters()).device)))
        [tokens] = self.projector(grid, [1])
        return tokens[:, :0].sum()  # of nothing: not even an infinity can come through

    def forward(
        self,
        batch: Batch,
        count: Tensor | int | None = None,
        encodings: int = 0,
        nested: list[Tensor] | None = None,
    ) -> Losses:
        """Next-token losses of the batch at its drawn levels (M3, equation 1 is their mean).

        The encoder and the projector run once, the LLM once for each of the batch's rows, and logits
        exist only where there is a target. A batch without rows goes through `loop`.

        Args:
            batch: Samples, packed or not.
            count: What the total is divided by; null: the batch's own number of targets.
            encodings: How many times the encoder and the projector run at least. Where ranks wait
                for each other's parameters or gradients, all must run them as often; what the
                batch's images lack, blank ones make up for, which add nothing.
            nested: What `encode` made of the images, if that is known.
        """
        nested, own = self._encode(batch.images) if nested is None else nested, max(1, batch.supervised)
        blanks = [self._blank() for _ in range(encodings - len(batch.images.groups))]
        sums = self._sums(batch, nested, torch.stack(blanks).sum() if blanks else None)
        return Losses(sums.total / (own if count is None else count), sums.per_level / own)

    def loop(self, batch: Batch) -> Losses:
        """What `forward` computes, in the obvious way: the LLM runs once per level, on padded samples.

        The reference for packed rows, and the way of models that cannot be packed.
        """
        return self(replace(batch, rows=[]))

    def _sums(self, batch: Batch, nested: list[Tensor], zero: Tensor | None) -> Losses:
        """Sums of the batch's losses instead of means, given the images' nested tokens."""
        if not batch.rows:
            return self._loop(batch, nested, zero)
        again = len(batch.rows) > 1
        hidden = torch.cat([self._hidden_of(rows, nested, zero, again) for rows in batch.rows])
        weights = torch.cat([self._weights(rows, hidden) for rows in batch.rows])
        total, losses = weighted_loss(self.llm, hidden, torch.cat([rows.targets for rows in batch.rows]), weights)
        kinds = torch.cat([rows.target_kind for rows in batch.rows])
        belongs = torch.from_numpy(levels_of_kinds(len(self.projector.scales), len(self.time_scales))).to(losses)
        sums = losses.new_zeros(len(belongs)).index_add_(0, kinds, losses)
        return Losses(total, (sums[:, None] * belongs).sum(0))

    def _weights(self, rows: Rows, hidden: Tensor) -> Tensor:
        """[S] what each target's loss counts."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return torch.tensor(rows.weights, dtype=dtype).to(hidden.device)[rows.target_kind]

    def _hidden_of(self, rows: Rows, nested: list[Tensor], zero: Tensor | None, again: bool) -> Tensor:
        """Last hidden states [S, D] where a row's targets are predicted. `again` computes the LLM's
        activations anew in the backward pass, so that those of one row exist at a time."""
        embeddings = cast(nn.Module, self.llm.get_input_embeddings())(rows.token_ids)
        if nested and len(rows.visual_index):
            tokens = self._in_one(nested)[rows.visual_source]
            embeddings = embeddings.index_copy(0, rows.visual_index, tokens.to(embeddings.dtype))
        embeddings = embeddings if zero is None else embeddings + zero.to(embeddings.dtype)
        if again and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._decode, embeddings, rows, use_reentrant=False))
        return self._decode(embeddings, rows)

    def _in_one(self, nested: list[Tensor]) -> Tensor:
        """The nested tokens of every level, in the order of a row's `visual_source`: [all, D]."""
        count = len(self.projector.scales)
        times = [nested[first : first + count] for first in range(0, len(nested), count)]
        return torch.cat([torch.cat(same_time, dim=1).flatten(0, 1) for same_time in times])

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

    def _loop(self, batch: Batch, nested: list[Tensor], zero: Tensor | None) -> Losses:
        totals, sums, moved = [], {}, behind_an_image(batch)
        for level in batch.drawn:
            losses = self._losses_at(batch, level.number, nested, zero)
            # what no level changes counts once over all drawn levels, as in a packed row
            totals.append(torch.where(moved, losses * level.weight, losses / len(batch.drawn)).sum())
            sums[level.number] = losses.detach().sum()
        nothing = torch.zeros_like(totals[0])
        return Losses(
            torch.stack(totals).sum(), torch.stack([sums.get(number, nothing) for number in range(len(self.levels))])
        )

    def _losses_at(self, batch: Batch, level: int, nested: list[Tensor], zero: Tensor | None) -> Tensor:
        """Loss of every target [S] at one level."""
        time, scale = divmod(level, len(self.projector.scales))
        kept: list[Tensor | None] = [*batch.kept] or [None] * len(batch.token_ids)
        stay = [at_time(ids, own, time) for ids, own in zip(batch.token_ids, kept, strict=True)]
        ids = [ids[positions] for ids, (positions, _) in zip(batch.token_ids, stay, strict=True)]
        targets = [own[positions] for own, (positions, _) in zip(batch.targets, stay, strict=True)]
        index = batch.image_index[torch.cat([images for _, images in stay])]
        count = self.projector.scales[scale]
        targets = [expand(own, each, count) for own, each in zip(targets, ids, strict=True)]
        padded = stack([expand(each, each, count) for each in ids], padding=0)
        embeddings = self._embed(padded, nested[level] if nested else None, in_sets(index, batch.images, time))
        embeddings = embeddings if zero is None else embeddings + zero.to(embeddings.dtype)
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

    @torch.no_grad()  # tensors of inference mode do not go with sharded parameters
    def generate(
        self,
        images: Images,
        questions: Sequence[Question],
        level: Scale,
        max_new_tokens: int = 64,
        end_ids: Sequence[int] = (),
        nested: list[Tensor] | None = None,
        decoding: Decoding = "greedy",
    ) -> list[Tensor]:
        """Answer questions with so many visual tokens an image.

        Args:
            images: What the questions are about.
            questions: Prompts with the places of their images.
            level: One of the model's levels.
            max_new_tokens: The longest answer, in tokens.
            end_ids: Token ids that end an answer; the model's own end token does so always.
            nested: What `encode` made of the images, to ask at several levels and encode once.
            decoding: greedy, or own for the settings of the LLM's generation_config, of which only the
                end tokens are taken otherwise.

        Returns:
            One [t] tensor of new token ids a question, its end token and padding removed.

        Raises:
            ValueError: The model does not have this level, or no end token is known.
        """
        if not questions and not self.sharded:
            return []
        if level not in self.levels:
            raise ValueError(f"scale {level} is not one of the model's {', '.join(map(str, self.levels))}")
        nested = self._encode(images) if nested is None else nested
        number = self.levels.index(level)
        asked = questions or [Question("", "", torch.zeros(1, dtype=torch.long, device=self.llm.device), [])]
        embeddings, mask = self._prompts(images, asked, number, nested[number] if nested else None)
        ends = all_end_ids(self.llm, end_ids)
        chosen = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": ends[0]}
        with settings(self.llm, decoding, **chosen) as config:
            answers = cast(Any, self.llm).generate(
                inputs_embeds=embeddings, attention_mask=mask, generation_config=config, synced_gpus=self.sharded
            )
        return [_until(answer, ends) for answer in answers[: len(questions)]]

    def _prompts(
        self, images: Images, questions: Sequence[Question], level: int, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [Q, T, D] of the questions at a level, padded on the left, and their mask [Q, T]."""
        time, scale = divmod(level, len(self.projector.scales))
        count, prompts, index = self.projector.scales[scale], [], []
        for question in questions:
            positions, shown = at_time(question.token_ids, question.kept, time)
            ids = question.token_ids[positions]
            prompts.append(expand(ids, ids, count))
            index.append(torch.tensor(question.image_index, dtype=torch.long, device=ids.device)[shown])
        mask = stack([torch.ones_like(prompt) for prompt in prompts], padding=0, left=True)
        padded = stack(prompts, padding=0, left=True)
        return self._embed(padded, tokens, in_sets(torch.cat(index), images, time)), mask


def _until(ids: Tensor, ends: list[int]) -> Tensor:
    """The ids before the first end token."""
    found = torch.isin(ids, torch.tensor(ends, device=ids.device)).nonzero()
    return ids[: int(found[0])] if len(found) else ids


def mean_over(sets: FrameSets, tokens: Tensor) -> Tensor:
    """Tokens [N, scale, D] of images -> of their sets of frames [n, scale, D]."""
    if len(sets.sizes) == len(tokens):
        return tokens
    exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    sums = exact.new_zeros(len(sets.sizes), *tokens.shape[1:]).index_add_(0, sets.number, exact)
    return (sums / sets.sizes.to(exact)[:, None, None]).to(tokens.dtype)
