"""Which part of the model learns how fast: parameter groups for the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Part:
    """How one part trains.

    Args:
        lr: Peak learning rate.
    """

    lr: float = 2e-5


@dataclass
class Parts:
    """How the three parts train; the defaults are M3's and ConvLLaVA's (2e-5 everywhere).

    Args:
        encoder: The image encoder.
        projector: The Matryoshka projector.
        llm: The language model.
    """

    encoder: Part = field(default_factory=Part)
    projector: Part = field(default_factory=Part)
    llm: Part = field(default_factory=Part)


def parameter_groups(model: nn.Module, parts: Parts) -> list[dict[str, Any]]:
    """Up to two groups a part, named `encoder`, `encoder_no_decay`, …, each with the part's lr.

    Norms, biases and layer scales (everything with fewer than two dimensions) get no weight decay.
    """
    return [
        group for part in ("encoder", "projector", "llm") for group in _groups_of(model, part, getattr(parts, part))
    ]


def _groups_of(model: nn.Module, name: str, part: Part) -> Iterator[dict[str, Any]]:
    parameters = [p for p in getattr(model, name).parameters() if p.requires_grad]
    if decayed := [p for p in parameters if p.ndim >= 2]:
        yield {"name": name, "params": decayed, "lr": part.lr}
    if spared := [p for p in parameters if p.ndim < 2]:
        yield {"name": f"{name}_no_decay", "params": spared, "lr": part.lr, "weight_decay": 0.0}
