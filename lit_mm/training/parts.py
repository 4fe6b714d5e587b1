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
    """Up to three groups a part, each with the part's lr: `encoder` with the matrices of its hidden
    layers (marked `hidden`), `encoder_other` with convolutions, embeddings and output heads, and
    `encoder_no_decay` with norms, biases and layer scales, which get no weight decay.
    """
    return [
        group for part in ("encoder", "projector", "llm") for group in _groups_of(model, part, getattr(parts, part))
    ]


def _groups_of(model: nn.Module, name: str, part: Part) -> Iterator[dict[str, Any]]:
    module = getattr(model, name)
    parameters = [p for p in module.parameters() if p.requires_grad]
    outer = _embeddings(module)
    if hidden := [p for p in parameters if p.ndim == 2 and id(p) not in outer]:
        yield {"name": name, "params": hidden, "lr": part.lr, "hidden": True}
    if others := [p for p in parameters if p.ndim > 2 or id(p) in outer]:
        yield {"name": f"{name}_other", "params": others, "lr": part.lr}
    if spared := [p for p in parameters if p.ndim < 2]:
        yield {"name": f"{name}_no_decay", "params": spared, "lr": part.lr, "weight_decay": 0.0}


def _embeddings(module: nn.Module) -> set[int]:
    """Matrices with a row for every token id."""
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return {id(part.weight) for part in [*tables, head] if part is not None}
