"""Questions that are scored together: those about one image of MME, the rounds of one question of MMBench."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lit_mm.evaluation.metrics.base import AnswerMetric

Key = TypeVar("Key", bound=Hashable)


class GroupedMetric(AnswerMetric):
    """Keeps by group which answers were right; a group's questions may be on several ranks."""

    judged: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("judged", [], dist_reduce_fx="cat")  # [n, 3] kind, group, right

    def _keep(self, kind: int, group: str, right: bool) -> None:
        """Keep an answer.

        Args:
            kind: A number that all questions of the group have.
            group: The group's name; the same name with another kind is another group.
            right: Whether the answer is right.
        """
        key = int.from_bytes(blake2b(group.encode(), digest_size=7).digest())  # 56 bits, alike on all ranks
        self.judged = [*self.judged, torch.tensor([[kind, key, int(right)]], device=self.total.device)]

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather all ranks' answers. torchmetrics would gather a rank without any as floats."""
        if not len(self.judged):
            self.judged = [torch.zeros(0, 3, dtype=torch.int64, device=self.total.device)]
        super().sync(*args, **options)

    def _groups(self) -> dict[int, list[list[bool]]]:
        """Kind -> its groups, each a list of whether its answers were right."""
        groups = defaultdict[tuple[int, int], list[bool]](list)
        for rows in [self.judged] if isinstance(self.judged, Tensor) else self.judged:
            for kind, key, right in rows.tolist():
                groups[kind, key].append(bool(right))
        kinds = defaultdict[int, list[list[bool]]](list)
        for (kind, _), answers in groups.items():
            kinds[kind].append(answers)
        return kinds


def scores_by(keys: Sequence[Key], scores: np.ndarray) -> dict[Key, np.ndarray]:
    """By key the scores [n, S] of its questions, of scores [Q, S]."""
    places = defaultdict[Key, list[int]](list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return {key: scores[own] for key, own in places.items()}
