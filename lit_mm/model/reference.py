"""The slow, obvious forward: the LLM runs once per scale on padded samples.

Packed sequences are tested against it, and LLMs that cannot be packed run through it: those with attention
windows or soft caps, recurrent ones, and those that no test here covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch, Images
from lit_mm.model.loss import Consistency, Lesson, cross_entropy, teaching_of


def padded_sums(
    llm: PreTrainedModel,
    batch: Batch,
    nested: Tensor,
    scales: Sequence[int],
    zero: Tensor | None = None,
    consistency: Consistency | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of all losses by their scales' weights; without a gradient each scale's sum of cross-entropies, and of
    terms for consistency [all scales].

    Args:
        llm: A causal LM.
        batch: Samples.
        nested: [M, sum of scales, D] output of `MatryoshkaVLM.encode`.
        scales: Tokens per image, finest first.
        zero: Scalar zero that is added to the embeddings, so that a gradient reaches what computed it.
        consistency: Adds the divergence from finer scales.
    """
    drawn = [scale for scale, weight in enumerate(batch.scale_weights) if weight]
    losses: list[Tensor] = []
    kept: list[tuple[Tensor, Tensor]] = []
    for scale in drawn:
        logits, labels, places = scale_logits(llm, batch, nested, scales, scale, zero)
        losses.append(cross_entropy(logits, labels))
        kept += [(logits, places)] if consistency else []
    terms: Sequence[Tensor] = [torch.zeros_like(own) for own in losses]
    if consistency:
        terms = consistency_terms(consistency, batch, drawn, len(scales), kept)
    weights, sums = losses[0].new_tensor(batch.scale_weights)[drawn], losses[0].new_zeros(2, len(batch.scale_weights))
    of_drawn = torch.stack([torch.stack([own.sum() for own in each]) for each in (losses, terms)])  # [2, drawn]
    sums[:, drawn] = of_drawn.detach()
    return (of_drawn.sum(0) * weights).sum(), sums[0], sums[1]


def consistency_terms(
    consistency: Consistency,
    batch: Batch,
    drawn: Sequence[int],
    image_scales: int,
    found: Sequence[tuple[Tensor, Tensor]],
) -> Sequence[Tensor]:
    """Terms [S] of the labels at each of the drawn scales, from their logits [S, vocabulary] and places [S]."""
    videos = [bool((own < own.max()).any()) for own in batch.time_scale] or [False] * len(batch.input_ids)
    is_video = torch.cat([ids.new_full(ids.shape, video) for ids, video in zip(batch.input_ids, videos, strict=True)])
    logits, places = (torch.cat(own) for own in zip(*found, strict=True))
    own = [  # without video, scales that differ in time alone are equal
        torch.where(is_video[at] > 0, scale, scale % image_scales) for scale, (_, at) in zip(drawn, found, strict=True)
    ]
    order, teaching = teaching_of(consistency, places, torch.cat(own), len(batch.scale_weights), image_scales)
    logarithms = logits[order].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    terms = Lesson(teaching).divergence(logarithms)
    return terms[order.argsort()].split([len(at) for _, at in found])


def scale_logits(
    llm: PreTrainedModel, batch: Batch, nested: Tensor, scales: Sequence[int], scale: int, zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [S, vocabulary], label [S] and place [S] in the batch's samples laid end to end, of every label at one
    scale, given by its index among all scales."""
    samples = batch.input_ids, batch.image_index, batch.time_scale
    index, tokens = at_scale(batch.images, nested, scales, scale, *samples)
    starts = accumulate((len(ids) for ids in batch.input_ids), initial=0)
    columns = [
        [own[i] for own, i in zip(batch.input_ids, index, strict=True)],
        [own[i] for own, i in zip(batch.labels, index, strict=True)],
        [start + i for start, i in zip(starts, index, strict=False)],
    ]
    padded = (pad_sequence(own, True, value) for own, value in zip(columns, (0, IGNORE_INDEX, 0), strict=True))
    input_ids, labels, places = padded
    embeddings = embed(llm, input_ids, tokens)  # [B, T, D]
    embeddings = embeddings if zero is None else embeddings + zero.to(embeddings.dtype)
    supervised = labels[:, 1:] != IGNORE_INDEX  # the token at t is predicted from position t - 1
    with head_only_at(llm, F.pad(supervised, (0, 1))):
        logits = llm(inputs_embeds=embeddings, use_cache=False).logits
    return logits, labels[:, 1:][supervised], places[:, 1:][supervised]


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
