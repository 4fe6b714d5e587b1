"""The slow, obvious forward: the LLM runs once per scale on padded samples.

Packed sequences are tested against it, and LLMs that cannot be packed run through it: those with attention
windows or soft caps, recurrent ones, and those that no test here covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch, Images
from lit_mm.model.loss import cross_entropy


def padded_sums(
    llm: PreTrainedModel, batch: Batch, nested: Tensor, scales: Sequence[int], zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of all losses by their scales' weights, and each scale's sum [all scales] without a gradient.

    Args:
        llm: A causal LM.
        batch: Samples.
        nested: [M, sum of scales, D] output of `MatryoshkaVLM.encode`.
        scales: Tokens per image, finest first.
        zero: Scalar zero that is added to the embeddings, so that a gradient reaches what computed it.
    """
    losses = {
        scale: scale_losses(llm, batch, nested, scales, scale, zero)
        for scale, weight in enumerate(batch.scale_weights)
        if weight
    }
    total = torch.stack([batch.scale_weights[scale] * own.sum() for scale, own in losses.items()]).sum()
    nothing = torch.zeros_like(total)
    return total, torch.stack([losses.get(scale, nothing).detach().sum() for scale in range(len(batch.scale_weights))])


def scale_losses(
    llm: PreTrainedModel, batch: Batch, nested: Tensor, scales: Sequence[int], scale: int, zero: Tensor | None = None
) -> Tensor:
    """Loss [S] of every label at one scale, given by its index among all scales."""
    samples = batch.input_ids, batch.image_index, batch.time_scale
    index, tokens = at_scale(batch.images, nested, scales, scale, *samples)
    input_ids = [ids[own] for ids, own in zip(batch.input_ids, index, strict=True)]
    labels = [each[own] for each, own in zip(batch.labels, index, strict=True)]
    embeddings = embed(llm, pad_sequence(input_ids, batch_first=True), tokens)  # [B, T, D]
    embeddings = embeddings if zero is None else embeddings + zero.to(embeddings.dtype)
    return token_losses(llm, embeddings, pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX))


def at_scale(
    images: Images,
    nested: Tensor,
    scales: Sequence[int],
    scale: int,
    input_ids: Sequence[Tensor],
    image_index: Tensor,
    time_scale: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Samples or prompts at one scale, given by its index among all scales.

    Args:
        images: The batch's images.
        nested: [M, sum of scales, D] output of `MatryoshkaVLM.encode`.
        scales: Tokens per image, finest first.
        scale: Index of the scale.
        input_ids: [T_i] for each sample.
        image_index: [K] the image that each IMAGE means, over all samples.
        time_scale: [T_i] for each sample, as in a Batch; empty without time scales.

    Returns:
        [T_i'] for each sample: indices into its positions, with IMAGE repeated once per token. And the
        nested tokens [K', tokens, D] of the images that are still there.
    """
    time, image_scale = divmod(scale, len(scales))
    stays = [own >= time for own in time_scale] or [torch.ones_like(ids, dtype=torch.bool) for ids in input_ids]
    pairs = list(zip(input_ids, stays, strict=True))
    repeats = [torch.where(ids == IMAGE, scales[image_scale], 1) * own for ids, own in pairs]
    index = [torch.arange(len(own), device=own.device).repeat_interleave(own) for own in repeats]
    shown = torch.cat([own[ids == IMAGE] for ids, own in pairs])
    rows = images.nested_rows()[time if images.frame_sets else 0][image_index[shown]]
    return index, nested.split(list(scales), dim=1)[image_scale][rows]


def embed(llm: PreTrainedModel, input_ids: Tensor, tokens: Tensor) -> Tensor:
    """input_ids [B, T] with IMAGE at visual positions -> embeddings [B, T, D] with tokens [K, s, D] there."""
    visual = input_ids == IMAGE
    embeddings = cast(nn.Module, llm.get_input_embeddings())(input_ids.masked_fill(visual, 0))
    return embeddings.masked_scatter(visual[..., None], tokens.to(embeddings.dtype))


def token_losses(llm: PreTrainedModel, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Next-token losses [S] of the S positions of labels [B, T] that are not IGNORE_INDEX, in their order.

    Args:
        llm: A causal LM.
        embeddings: Input embeddings [B, T, D]; padding, if any, stands on the right.
        labels: Token ids [B, T]; the token at t is predicted from position t - 1.
    """
    labels = labels[:, 1:]
    supervised = labels != IGNORE_INDEX
    with head_only_at(llm, F.pad(supervised, (0, 1))):
        logits = llm(inputs_embeds=embeddings, use_cache=False).logits
    return cross_entropy(logits, labels[supervised])


@contextmanager
def head_only_at(llm: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within this context the output head computes logits [S, vocabulary] at the S marked positions [B, T].

    The model's own forward is used because some architectures change the logits after the head: Granite
    and Cohere scale them, Gemma 2 caps them.
    """
    head = cast(nn.Module, llm.get_output_embeddings())
    handle = head.register_forward_pre_hook(lambda module, hidden: (hidden[0][positions],))
    try:
        yield
    finally:
        handle.remove()
