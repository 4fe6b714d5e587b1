"""Questions -> answers at one scale, greedily or with the settings that the LLM comes with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from lit_mm.model.batch import Images, Question
from lit_mm.model.reference import at_scale, embed
from lit_mm.model.scales import Scale
from lit_mm.model.vlm import MatryoshkaVLM

Decoding = Literal["greedy", "own"]


@torch.no_grad()  # tensors of inference mode do not go with sharded parameters
def generate(
    vlm: MatryoshkaVLM,
    images: Images,
    questions: Sequence[Question],
    scale: Scale,
    max_new_tokens: int = 64,
    end_ids: Sequence[int] = (),
    nested: Tensor | None = None,
    decoding: Decoding = "greedy",
) -> list[Tensor]:
    """Answer questions with so many visual tokens an image.

    Args:
        vlm: The model, in evaluation mode.
        images: What the questions are about.
        questions: Prompts with the places of their images.
        scale: One of the model's scales.
        max_new_tokens: The longest answer, in tokens.
        end_ids: Token ids that end an answer; the model's own end token does so always.
        nested: What `encode` made of the images, to ask at several scales and encode once.
        decoding: greedy, or own for the settings of the LLM's generation_config, of which only the
            end tokens are taken otherwise.

    Returns:
        One [t] tensor of new token ids a question, its end token and padding removed.

    Raises:
        ValueError: The model does not have this scale, or no end token is known.
    """
    if not questions and not vlm.sharded:
        return []
    if scale not in vlm.all_scales:
        raise ValueError(f"scale {scale} is not one of the model's {', '.join(map(str, vlm.all_scales))}")
    nested = vlm.encode(images) if nested is None else nested
    asked = questions or [Question("", "", torch.zeros(1, dtype=torch.long, device=nested.device), [])]
    ends = all_end_ids(vlm.llm, end_ids)
    chosen = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": ends[0]}
    with settings(vlm.llm, decoding, **chosen) as config:
        answers = vlm.run(_generate, images, asked, vlm.all_scales.index(scale), nested, config)
    return [_until(answer, ends) for answer in answers[: len(questions)]]


def _generate(
    vlm: MatryoshkaVLM,
    images: Images,
    questions: Sequence[Question],
    scale: int,
    nested: Tensor,
    config: GenerationConfig,
) -> Tensor:
    """New token ids [Q, t] of the questions, whose prompts are padded on the left."""
    input_ids = [question.input_ids for question in questions]
    shown = torch.tensor([i for q in questions for i in q.image_index], dtype=torch.long, device=nested.device)
    stays = [question.time_scale for question in questions if question.time_scale is not None]
    index, tokens = at_scale(images, nested, vlm.projector.scales, scale, input_ids, shown, stays)
    prompts = [ids[own] for ids, own in zip(input_ids, index, strict=True)]
    left: Any = {"batch_first": True, "padding_side": "left"}
    embeddings = embed(vlm.llm, pad_sequence(prompts, **left), tokens)
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], **left)
    return cast(Any, vlm.llm).generate(
        inputs_embeds=embeddings, attention_mask=mask, generation_config=config, synced_gpus=vlm.sharded
    )


def _until(ids: Tensor, ends: list[int]) -> Tensor:
    """The ids before the first end token."""
    found = torch.isin(ids, torch.tensor(ends, device=ids.device)).nonzero()
    return ids[: int(found[0])] if len(found) else ids


def all_end_ids(llm: PreTrainedModel, further: Sequence[int] = ()) -> list[int]:
    """Token ids that end an answer: the LLM's own, and further ones.

    Raises:
        ValueError: There are none.
    """
    own = cast(GenerationConfig, llm.generation_config).eos_token_id
    own = own if isinstance(own, list) else [own] if own is not None else []
    if not (ends := sorted({*further, *own})):
        raise ValueError("neither the caller nor the LLM's generation config names a token that ends an answer")
    return ends


@contextmanager
def settings(llm: PreTrainedModel, decoding: Decoding, **chosen: Any) -> Iterator[GenerationConfig]:
    """The settings of `generate`, and meanwhile an LLM that has none of its own: transformers would take from
    there what a greedy answer leaves unset, such as a repetition penalty, banned n-grams or beams."""
    own = cast(GenerationConfig, llm.generation_config)
    config = deepcopy(own) if decoding == "own" else GenerationConfig(do_sample=False)
    config.update(**chosen, max_length=None, num_return_sequences=1, return_dict_in_generate=False)
    llm.generation_config = GenerationConfig()
    try:
        yield config
    finally:
        llm.generation_config = own


def described(llm: PreTrainedModel, decoding: Decoding) -> str:
    """In words, with what it takes or leaves of the LLM's generation_config."""
    differs = cast(GenerationConfig, llm.generation_config).to_diff_dict()
    nothing = ("transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
    changes = [n for n, value in differs.items() if value is not False and n not in nothing and n[0] != "_"]
    own = ", ".join(f"{name} {differs[name]}" for name in changes)
    if decoding == "own":
        return f"as the LLM's generation_config says ({own or 'greedily'})"
    return f"greedily, without {own} of the LLM's generation_config" if own else "greedily"
