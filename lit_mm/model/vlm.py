"""Encoder, projector and LLM together: the multimodal model with elastic visual tokens.

pixels -> encoder -> grid -> projector -> nested tokens -> into the packed embeddings -> LLM -> loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_mm.model.attention import FlexLayout
from lit_mm.model.batch import Answers, Batch, FrameSets, Images, PackedSequence
from lit_mm.model.encoder import Encoder
from lit_mm.model.loss import Consistency, teaching_of, weighted_loss
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.reference import padded_sums
from lit_mm.model.router import Router, answer_losses, mean_of
from lit_mm.model.scales import Scale, all_scales, check_time_scales


@dataclass
class Losses:
    """What a step computes.

    Args:
        loss: Scalar with a gradient: the scales' losses by their weights, or with a router its own loss.
        per_scale: [scales] mean cross-entropy over the batch's own labels, without a gradient; 0 for scales
            that take no part.
        consistency: [scales] likewise what consistency with a finer scale adds to these; None if it is not
            part of the loss.
    """

    loss: Tensor
    per_scale: Tensor
    consistency: Tensor | None = None


class MatryoshkaVLM(nn.Module):
    """Image -> encoder -> grid -> projector -> nested tokens -> LLM, at any of the scales.

    Building one turns cuDNN's attention off for the whole process (`torch.backends.cuda.enable_cudnn_sdp`). On Hopper
    and newer GPUs PyTorch prefers it to FlashAttention, and it plans for up to a second whenever a branch or an answer
    has a length that it has not seen.

    Args:
        encoder: Image to grid.
        projector: Grid to nested tokens; its scales are the model's.
        llm: A causal LM of transformers.
        time_scales: Numbers of sets of neighboring frames that a video is cut into, finest first; each
            divides the one before. Empty: a video's frames are not pooled.
        router: Predicts at which scale a question should be answered; None: there is none.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: MatryoshkaProjector,
        llm: PreTrainedModel,
        time_scales: Sequence[int] = (),
        router: Router | None = None,
    ) -> None:
        super().__init__()
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.encoder = encoder
        self.projector = projector
        self.llm = llm
        self.router = router
        self.time_scales = check_time_scales(time_scales)
        self.sharded = False
        """Whether parameters are sharded, so that all ranks must run the same number of forwards."""

    @property
    def all_scales(self) -> list[Scale]:
        """The model's scales, finest first; with time scales their combinations."""
        return all_scales(self.projector.scales, self.time_scales)

    def forward(
        self,
        batch: Batch,
        count: Tensor | int | None = None,
        encodings: int = 0,
        nested: Tensor | None = None,
        consistency: Consistency | None = None,
    ) -> Losses:
        """Next-token losses of the batch at its scales (M3, equation 1 is their mean).

        The encoder and the projector run once, the LLM once for each packed sequence, and logits exist
        only where there is a label. A batch that is not packed runs through the LLM once a scale.

        Args:
            batch: Samples, packed or not.
            count: Divisor of the sum of losses; None: the batch's own number of labels, or of answers for a router.
            encodings: Minimum number of runs of the encoder and the projector. Ranks that share
                parameters or gradients must all run them equally often: ranks with fewer image sizes
                run dummy images whose loss is zero.
            nested: Output of `encode` for these images, to skip the encoder.
            consistency: Adds the divergence from finer scales, whatever its `start`; None: cross-entropy only.
        """
        nested, own = self._encode(batch.images) if nested is None else nested, max(1, batch.num_labels)
        dummies = [self._dummy() for _ in range(encodings - len(batch.images.groups))]
        if self.router is not None and num_answers(batch) is not None:
            return self._routed(batch, nested, self.router, count)
        zero = torch.stack(dummies).sum() if dummies else None
        consistency = consistency if sum(map(bool, batch.scale_weights)) > 1 else None
        if batch.packed:
            total, sums, terms = self._packed_sums(batch, nested, zero, consistency)
        else:
            total, sums, terms = padded_sums(self.llm, batch, nested, self.projector.scales, zero, consistency)
        return Losses(total / (own if count is None else count), sums / own, terms / own if consistency else None)

    def reference(self, batch: Batch, consistency: Consistency | None = None) -> Losses:
        """Same result as `forward`, computed the obvious way: the LLM runs once per scale, on padded samples."""
        return self(replace(batch, packed=[]), consistency=consistency)

    def encode(self, images: Images, encodings: int = 0) -> Tensor:
        """N images -> their nested tokens [N, sum of scales, D], finest scale first.

        With time scales [M, sum of scales, D]: the mean over the frames of every set, finest time scale
        first. `Images.nested_rows` gives the row of each image.

        Args:
            images: Images of a batch.
            encodings: As for `forward`.

        Raises:
            ValueError: A scale does not divide an image's grid.
        """
        nested = self._encode(images)
        for _ in range(encodings - len(images.groups)):
            self._dummy()
        return nested

    def _encode(self, images: Images) -> Tensor:
        if not images.groups:
            width, scales = cast(nn.Linear, self.projector.layers[-1]).out_features, sum(self.projector.scales)
            return torch.zeros(0, scales, width, device=images.order.device)
        groups = [self.projector(self.encoder(self.encoder.normalize(pixels))) for pixels in images.groups]
        nested = torch.cat(groups)[images.order]
        return torch.cat([mean_over(sets, nested) for sets in images.frame_sets]) if self.time_scales else nested

    def _dummy(self) -> Tensor:
        """Zero, computed by the encoder and the projector from the smallest image.

        It is added to the LLM's embeddings, so that the backward pass reaches the encoder on every rank.
        """
        pixels = torch.zeros(1, 3, *self.encoder.smallest, dtype=torch.uint8)
        grid = self.encoder(self.encoder.normalize(pixels.to(next(self.encoder.parameters()).device)))
        return self.projector(grid, [1])[:, :0].sum()  # the sum of an empty slice: zero even if the grid has infinities

    def _packed_sums(
        self, batch: Batch, nested: Tensor, zero: Tensor | None, consistency: Consistency | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of all losses by their scales' weights; without a gradient each scale's sum of cross-entropies, and of
        terms for consistency [scales]."""
        hidden = torch.cat([self._hidden(packed, nested, zero, len(batch.packed) > 1) for packed in batch.packed])
        labels = torch.cat([packed.labels for packed in batch.packed])
        label_scales, teaching = torch.cat([packed.label_scales for packed in batch.packed]), None  # [S, scales]
        if consistency:
            places, scales = torch.cat([packed.label_place for packed in batch.packed]), label_scales.int().argmax(1)
            sizes = label_scales.shape[1], len(self.projector.scales)
            order, teaching = teaching_of(consistency, places, scales, *sizes)
            hidden, labels, label_scales = (x.index_select(0, order) for x in (hidden, labels, label_scales))
        of_scales = label_scales.to(torch.promote_types(hidden.dtype, torch.float32))
        weights = (of_scales * of_scales.new_tensor(batch.scale_weights)).sum(1)  # [S]
        total, losses, terms = weighted_loss(self.llm, hidden, labels, weights, teaching)
        return total, (losses[:, None] * of_scales).sum(0), (terms[:, None] * of_scales).sum(0)

    def _routed(self, batch: Batch, nested: Tensor, router: Router, count: Tensor | int | None) -> Losses:
        """The router's losses; a gradient reaches only the router."""
        [packed] = batch.packed
        answers, total = cast(Answers, packed.answers), cast(int, num_answers(batch))
        with torch.no_grad():
            hidden = self._hidden(packed, nested, None, False)
            losses = weighted_loss(self.llm, hidden, packed.labels, torch.ones_like(packed.labels))[1]
            of_scales = packed.label_scales.to(losses.dtype)
            of_answers = answer_losses(losses, of_scales, answers.of_label, total)
            visual = mean_of(nested.flatten(0, 1)[answers.seen], answers.of_seen, total)
        own = router.loss(router(visual, hidden[answers.first]), of_answers).sum()
        per_scale = (losses[:, None] * of_scales).sum(0) / max(1, batch.num_labels)
        return Losses(own / (max(1, total) if count is None else count), per_scale)

    def _hidden(self, packed: PackedSequence, nested: Tensor, zero: Tensor | None, recompute: bool) -> Tensor:
        """Last hidden states [S, D] at the positions that predict labels. `recompute` runs the LLM again in
        the backward pass, so that only one packed sequence's activations exist at a time."""
        embeddings = cast(nn.Module, self.llm.get_input_embeddings())(packed.input_ids)  # [L, D]
        if len(packed.visual_index):
            tokens = nested.flatten(0, 1)[packed.visual_source].to(embeddings.dtype)  # [V, D]
            embeddings = embeddings.index_copy(0, packed.visual_index, tokens)
        embeddings = embeddings if zero is None else embeddings + zero.to(embeddings.dtype)
        if recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._decode, embeddings, packed, use_reentrant=False))
        return self._decode(embeddings, packed)

    def _decode(self, embeddings: Tensor, packed: PackedSequence) -> Tensor:
        """Embeddings [L, D] of a packed sequence -> last hidden states [S, D] at the positions that predict labels."""
        if isinstance(packed.layout, FlexLayout):
            packed.layout.prepare()
        # transformers passes a 4-D mask through unchanged instead of building its own
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeddings.device)
        output = cast(Any, self.llm).base_model(
            inputs_embeds=embeddings[None],
            position_ids=packed.position_ids[None],
            attention_mask=no_mask,
            packed_layout=packed.layout,
            use_cache=False,
        )
        return output.last_hidden_state[0, packed.label_index]

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The LLM's decoder layers: its longest ModuleList, which every causal LM of transformers has."""
        lists = [list(module) for module in self.llm.base_model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    def set_grad_checkpointing(self, parts: Sequence[str]) -> None:
        """Recompute the blocks of the encoder, the LLM or both in the backward pass."""
        if "encoder" in parts:
            self.encoder.set_grad_checkpointing()
        if "llm" in parts:
            enable = getattr(self.llm, "activation_checkpointing_enable", self.llm.gradient_checkpointing_enable)
            enable({"use_reentrant": False})  # the first is transformers' newer name
            for layer in self.decoder_layers:  # transformers recomputes in training mode only
                layer.training = True

    def init_weights(self, gain: float) -> None:
        """Reinitialize the encoder's and the projector's convolutions and linear layers, with standard
        deviation gain / sqrt(fan-in).

        Raises:
            ValueError: The encoder is pretrained.
        """
        if self.encoder.pretrained:
            raise ValueError("init_gain reinitializes every layer: it cannot be combined with a pretrained encoder")
        for module in [*self.encoder.modules(), *self.projector.modules()]:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=gain / module.weight[0].numel() ** 0.5)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(self, *arguments), run as a forward of the model so that sharded parameters are gathered."""
        return function(self, *arguments)


def num_answers(batch: Batch) -> int | None:
    """The answers that a router learns from; None if they are not listed."""
    listed = [packed.answers for packed in batch.packed]
    return sum(len(own.first) for own in listed if own) if any(listed) else None


def mean_over(sets: FrameSets, tokens: Tensor) -> Tensor:
    """Mean over each set of frames: tokens [N, T, D] of images -> [n, T, D] of sets."""
    if len(sets.sizes) == len(tokens):
        return tokens
    exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    sums = exact.new_zeros(len(sets.sizes), *tokens.shape[1:]).index_add_(0, sets.index, exact)
    return (sums / sets.sizes.to(exact)[:, None, None]).to(tokens.dtype)
