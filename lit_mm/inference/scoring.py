"""How likely given answers are, at every scale, from one packed run of the LLM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_mm.inference.prompts import embed, logits_of, pack_prompts, prompt_codes, run
from lit_mm.model.attention import NAME
from lit_mm.model.batch import Images, Question
from lit_mm.model.scales import Scale
from lit_mm.model.vlm import MatryoshkaVLM


@torch.no_grad()
def score(
    vlm: MatryoshkaVLM,
    images: Images,
    questions: Sequence[Question],
    answers: Sequence[Sequence[Sequence[int]]],
    scales: Sequence[Scale],
) -> list[list[list[Tensor]]]:
    """Log-probabilities of given answers.

    A question and its images are computed once for all of its answers.

    Args:
        vlm: The model, in evaluation mode.
        images: What the questions are about.
        questions: Prompts.
        answers: For each question the token ids of its answers, each of one id at least.
        scales: Some of the model's scales.

    Returns:
        By question, scale and answer: log-probabilities [t] of the answer's ids.

    Raises:
        ValueError: An answer without ids.
    """
    if any(not len(ids) for own in answers for ids in own):
        raise ValueError("score: an answer without tokens has no probability")
    nested = vlm.encode(images)
    prompts = [[prompt_codes(vlm, images, question, scale) for scale in scales] for question in questions]
    asked = [
        (codes, np.array(ids, np.int64))
        for own, given in zip(prompts, answers, strict=True)
        for codes in own
        for ids in given
    ]
    flat = iter(vlm.run(_scored, nested, asked)) if asked else iter([])
    return [[[next(flat) for _ in given] for _ in scales] for given in answers]


def _scored(vlm: MatryoshkaVLM, nested: Tensor, asked: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Tensor]:
    """Log-probabilities [t] of each (prompt, answer)."""
    sequences = [np.concatenate(pair) for pair in asked]
    if vlm.llm.config._attn_implementation == NAME:
        packed = pack_prompts(sequences, [len(codes) for codes, _ in asked])
        index = packed.index
        packed = apply_to_collection(packed, Tensor, Tensor.to, nested.device)
        hidden = run(vlm, nested, packed)  # [L, D]
        states = [hidden[own[len(codes) - 1 : -1]] for own, (codes, _) in zip(index, asked, strict=True)]
        logits = logits_of(vlm, torch.cat(states)).split([len(ids) for _, ids in asked])
    else:
        logits = tuple(
            _alone(vlm, nested, own)[len(codes) - 1 : -1] for own, (codes, _) in zip(sequences, asked, strict=True)
        )
    ids = (torch.from_numpy(answer).to(nested.device)[:, None] for _, answer in asked)
    return [own.log_softmax(-1).gather(1, answer)[:, 0] for own, answer in zip(logits, ids, strict=True)]


def _alone(vlm: MatryoshkaVLM, nested: Tensor, codes: np.ndarray) -> Tensor:
    """Logits [T, vocabulary] of one sequence of codes [T], by the model's own forward."""
    embeddings = embed(vlm, nested, torch.from_numpy(codes).to(nested.device))
    logits = vlm.llm(inputs_embeds=embeddings[None], use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
