"""What the data has to know of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lit_mm.data.sampler import ScaleDraw
from lit_mm.model.attention import Attention
from lit_mm.model.llm import Positions
from lit_mm.model.packing import Packing
from lit_mm.model.scales import Pooling, Sampling, all_scales


class ModelInputs:
    """The model's properties that the data depends on.

    Args:
        tokenizer: The LLM's tokenizer, with its chat template set.
        stride: Pixels per grid cell along a side.
        scales: Visual tokens per image, finest first.
        color: The encoder's mean color in 0..255, for padding.
        sampling: As `model.sampling`.
        pooling: As `model.pooling`.
        time_scales: Sets of frames per video, finest first, if any.
        packing: As `model.packing`.
        attention: As `model.attention`.
        scales_per_step: Number of scales in a training step.
        keep_finest: Whether every step includes the finest scale.
        positions: The LLM's maximum sequence length; None: unlimited.
        max_new_tokens: Maximum tokens of an answer.
        router: Whether a router is trained.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stride: int,
        scales: list[int],
        color: tuple[int, int, int],
        sampling: Sampling = "mean",
        pooling: Pooling = "exact",
        time_scales: Sequence[int] = (),
        packing: Packing = "packed",
        scales_per_step: int | Literal["all"] = "all",
        keep_finest: bool = False,
        positions: Positions | None = None,
        max_new_tokens: int = 0,
        attention: Attention = "branch",
        router: bool = False,
    ) -> None:
        self.tokenizer, self.stride, self.scales, self.color = tokenizer, stride, scales, color
        self.sampling, self.pooling, self.time_scales = sampling, pooling, list(time_scales)
        self.packing, self.attention, self.router = packing, attention, router
        self.scales_per_step, self.keep_finest = scales_per_step, keep_finest
        self.positions, self.max_new_tokens = positions, max_new_tokens

    def draw(self, training: bool, seed: int = 0) -> ScaleDraw:
        """Draws the scales of each step."""
        count = len(all_scales(self.scales, self.time_scales))
        return ScaleDraw(count, self.scales_per_step if training else "all", self.keep_finest, seed)

    def settings(self) -> dict[str, Any]:
        """The settings that affect a record's costs and whether it is too long."""
        others = ("tokenizer", "color", "packing", "attention", "max_new_tokens", "router")
        told = {name: value for name, value in vars(self).items() if name not in others}
        return told | {"tokenizer": _identity(self.tokenizer)}


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(f"{told} {tokenizer.chat_template}".encode(), digest_size=16).hexdigest()
