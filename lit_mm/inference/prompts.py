"""Prompts -> one packed sequence, in which prompts that begin alike share their beginning.

A prompt is an array of codes: token ids, and for a visual token -1 - (its row in the nested tokens). Two questions
about one image at scales 4 and 1, with the text `5` before the image:

    5 a b c d 7 8      shared beginning [5 a b c d], branches [7 8] [9]
    5 a b c d 9
    5 e 7 8            shared beginning [5 e], branches [7 8] [9]
    5 e 9

One question at many scales shares the text before its image instead. `pack_prompts` groups the prompts in the way that
leaves the fewest positions to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lit_mm.model.attention import Layout, Segment, layout_of
from lit_mm.model.batch import IMAGE, Images, Question
from lit_mm.model.loss import logit_factor
from lit_mm.model.scales import Scale
from lit_mm.model.vlm import MatryoshkaVLM


@dataclass
class PackedPrompts:
    """Prompts laid out for one run of the LLM.

    Args:
        codes: [L] token ids; -1 - row for visual tokens.
        position_ids: [L].
        layout: Which positions attend to which.
        index: [T] for each prompt, its positions in the packed sequence.
    """

    codes: Tensor
    position_ids: Tensor
    layout: Layout
    index: list[Tensor]


def prompt_codes(vlm: MatryoshkaVLM, images: Images, question: Question, scale: Scale) -> np.ndarray:
    """Codes [T] of a question's prompt at a scale.

    Args:
        vlm: The model.
        images: The batch's images; visual tokens are rows of `MatryoshkaVLM.encode`'s output for them,
            [M, sum of scales, D] flattened to [M × sum of scales, D].
        question: One question of the batch.
        scale: One of the model's scales.
    """
    scales = vlm.projector.scales
    time, image_scale = divmod(vlm.all_scales.index(scale), len(scales))
    ids = question.input_ids.cpu().numpy()
    stays = np.full(len(ids), True) if question.time_scale is None else question.time_scale.cpu().numpy() >= time
    shown = np.array(question.image_index, np.int64)[stays[ids == IMAGE]]
    rows = images.nested_rows()[time if images.frame_sets else 0].cpu().numpy()[shown]  # [K]
    first = sum(scales[:image_scale])
    tokens = rows[:, None] * sum(scales) + np.arange(first, first + scales[image_scale])  # [K, s]
    ids = ids[stays]
    codes = ids.repeat(np.where(ids == IMAGE, scales[image_scale], 1))
    codes[codes == IMAGE] = -1 - tokens.ravel()
    return codes


def prompt_length(vlm: MatryoshkaVLM, question: Question, scale: Scale) -> tuple[int, int]:
    """The number of a prompt's codes, and how many of them are visual tokens."""
    time, image_scale = divmod(vlm.all_scales.index(scale), len(vlm.projector.scales))
    ids = question.input_ids if question.time_scale is None else question.input_ids[question.time_scale >= time]
    images = int((ids == IMAGE).sum())
    visual = images * vlm.projector.scales[image_scale]
    return len(ids) - images + visual, visual


def pack_prompts(prompts: Sequence[np.ndarray], ends: Sequence[int] = ()) -> PackedPrompts:
    """Lay prompts out so that what they share is computed once.

    Args:
        prompts: [T] codes of each.
        ends: Where each prompt's shared part may end, besides before its first and after its last visual token:
            for answers to one question, the length of the question.
    """
    visual = [np.flatnonzero(codes < 0) for codes in prompts]
    choices = [
        [int(own[0]) if len(own) else 0 for own in visual],
        [int(own[-1]) + 1 if len(own) else 0 for own in visual],
        *([list(ends)] if ends else []),
    ]
    ways = [_grouped(prompts, cuts) for cuts in choices]
    groups = min(ways, key=lambda way: sum(cut + sum(len(prompts[n]) - cut for n in own) for cut, own in way))
    pieces, positions, segments = [], [], list[Segment]()
    index = [np.zeros(0, np.int64)] * len(prompts)
    length = 0

    def add(codes: np.ndarray, begin: int, prefix_start: int, prefix_length: int) -> np.ndarray:
        nonlocal length
        pieces.append(codes)
        positions.append(begin + np.arange(len(codes)))
        segments.append(Segment(prefix_start, prefix_length, length, len(codes)))
        length += len(codes)
        return np.arange(length - len(codes), length)

    for cut, members in groups:
        start = length
        prefix = add(prompts[members[0]][:cut], 0, start, 0) if cut else np.zeros(0, np.int64)
        for number in members:
            own = add(prompts[number][cut:], cut, start if cut else length, cut)
            index[number] = np.concatenate([prefix, own])
    codes, position_ids = (torch.from_numpy(np.concatenate(each)) for each in (pieces, positions))
    return PackedPrompts(codes, position_ids, layout_of(segments, "branch"), [torch.from_numpy(own) for own in index])


def _grouped(prompts: Sequence[np.ndarray], cuts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(cut, prompts) of prompts that are the same up to the cut; a prompt that shares with none has cut 0."""
    groups: dict[bytes, list[int]] = {}
    for number, (codes, cut) in enumerate(zip(prompts, cuts, strict=True)):
        groups.setdefault(codes[: min(cut, len(codes) - 1)].tobytes(), []).append(number)
    width = prompts[0].itemsize
    return [(len(key) // width if len(own) > 1 else 0, own) for key, own in groups.items()]


def embed(vlm: MatryoshkaVLM, nested: Tensor, codes: Tensor) -> Tensor:
    """Codes [...] -> embeddings [..., D]."""
    embeddings = vlm.llm.get_input_embeddings()(codes.clamp(min=0))
    visual = codes < 0
    embeddings[visual] = nested.flatten(0, 1)[-1 - codes[visual]].to(embeddings.dtype)
    return embeddings


def run(vlm: MatryoshkaVLM, nested: Tensor, packed: PackedPrompts, cache: DynamicCache | None = None) -> Tensor:
    """Last hidden states [L, D] of packed prompts; a cache is filled with the keys and values of all positions."""
    embeddings = embed(vlm, nested, packed.codes)[None]  # [1, L, D]
    output = vlm.llm.base_model(
        inputs_embeds=embeddings,
        position_ids=packed.position_ids[None],
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeddings.device),
        packed_layout=packed.layout,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state[0]


def logits_of(vlm: MatryoshkaVLM, hidden: Tensor) -> Tensor:
    """Logits [..., vocabulary] of last hidden states [..., D], in float32 at least."""
    head: nn.Module = vlm.llm.get_output_embeddings()
    logits = head(hidden) * logit_factor(vlm.llm.config)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
