"""What a conversation keeps from turn to turn, so that a further question costs only its own tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_mm.data.collate import Visual, group_by_size
from lit_mm.inference.generation import Past
from lit_mm.model.scales import Scale
from lit_mm.model.vlm import MatryoshkaVLM


@dataclass
class Memory:
    """What one conversation keeps.

    Args:
        visuals: Its decoded images and videos.
        keys: Those that are encoded, in order.
        nested: [M, sum of scales, D] their nested tokens.
        pasts: Keys and values of each scale that was used.
    """

    visuals: dict[Hashable, Visual] = field(default_factory=dict)
    keys: list[Hashable] = field(default_factory=list)
    nested: Tensor | None = None
    pasts: dict[Scale, Past] = field(default_factory=dict)

    def past(self, scale: Scale) -> Past:
        """The keys and values of a scale."""
        return self.pasts.setdefault(scale, Past())

    def encoded(self, vlm: MatryoshkaVLM, visuals: Sequence[Visual]) -> Tensor:
        """As `vlm.encode` of all visuals of the conversation, equal ones once; only new ones are encoded.

        With time scales, whose rows are ordered by time scale first, further visuals move the rows of the earlier
        ones: everything is computed anew.
        """
        shown = list({visual.key: visual for visual in visuals}.values())
        keys = [visual.key for visual in shown]
        if self.keys != keys[: len(self.keys)] or (vlm.time_scales and self.keys != keys):
            self.keys, self.nested = [], None
            self.pasts.clear()
        new = shown[len(self.keys) :]
        if new or self.nested is None:
            device = next(vlm.projector.parameters()).device
            grouped = group_by_size([visual.pixels for visual in new], vlm.time_scales)
            images = apply_to_collection(grouped, Tensor, Tensor.to, device)
            with torch.no_grad():
                made = vlm.encode(images)
            self.nested = made if self.nested is None else torch.cat([self.nested, made])
            self.keys = keys
        return self.nested
