"""What the data side hands to the model, and how one scale's sequences are laid out from it.

A sample is token ids in which IMAGE stands once for each image. At a scale of s tokens every IMAGE
becomes s positions; the model fills them with that image's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

IMAGE = -200
"""The id that stands for one image in token ids (LLaVA's IMAGE_TOKEN_INDEX)."""
IGNORED = -100
"""The target of positions without a loss."""


@dataclass
class Images:
    """Distinct images, grouped by size so that each group is one tensor.

    Args:
        groups: uint8 pixels [n, 3, H, W], one tensor a size; empty without images.
        order: [N] where image i stands in the concatenation of the groups.
    """

    groups: list[Tensor]
    order: Tensor


@dataclass
class Question:
    """One prompt to be answered by generation.

    Args:
        record: The record's id.
        text: The question as asked, for reports.
        token_ids: [T] the prompt, IMAGE once for each image.
        image_index: Which images of the batch stand there, in order.
        answer: The expected answer; None where there is none (predict).
    """

    record: str | int
    text: str
    token_ids: Tensor
    image_index: list[int]
    answer: str | None = None


@dataclass
class Batch:
    """Samples with their images.

    Args:
        images: The distinct images of all samples and questions.
        token_ids: [T_i] a sample: ids with IMAGE once for each image.
        targets: [T_i] a sample: the ids where supervised, else IGNORED.
        image_index: [K] which image each of the K IMAGE ids means, over all samples in order.
        questions: What validation, test and predict ask.
        records: How many records were asked for.
        skipped: What was left out of this batch: (reason, message) of every bad record.
    """

    images: Images
    token_ids: list[Tensor]
    targets: list[Tensor]
    image_index: Tensor
    questions: list[Question] = field(default_factory=list)
    records: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def supervised(self) -> int:
        """Number of targets."""
        return sum(int((targets != IGNORED).sum()) for targets in self.targets)


def expand(values: Tensor, token_ids: Tensor, scale: int) -> Tensor:
    """Repeat what stands at an IMAGE `scale` times: values [T] -> [T + images × (scale - 1)]."""
    return values.repeat_interleave(torch.where(token_ids == IMAGE, scale, 1))


def stack(sequences: list[Tensor], padding: int, left: bool = False) -> Tensor:
    """Sequences [T_i] -> [B, max T_i], padded on the right, or on the left for generation."""
    return torch.nn.utils.rnn.pad_sequence(
        sequences, batch_first=True, padding_value=padding, padding_side="left" if left else "right"
    )
