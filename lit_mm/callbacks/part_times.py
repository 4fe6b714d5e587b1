"""How long encoder, projector and LLM take in a training step, forward and backward.

A step, with all batches that it accumulates and the optimizer's work, is cut into pieces at the parts'
borders: hooks on modules in the forward pass, hooks on the tensors that cross a border in the backward
pass. On a GPU a cut is an event in its queue, read when it lies behind: nothing is waited for. Hooks
exist during a watched step alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_mm.costs.timing import Stopwatch
from lit_mm.model.vlm import MatryoshkaVLM

OTHER = "other"
"""Optimizer, logging, and what else is no part's."""


class PartTimes:
    """Watches one step at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.running = device, False
        self._begin()

    def _begin(self) -> None:
        self.watch, self.labels, self.hooks = Stopwatch(self.device), list[str](), list[Any]()

    def start(self, vlm: MatryoshkaVLM) -> None:
        """Watch the step that begins."""
        self._begin()
        self.running = True
        self.mark(OTHER)
        self.hooks = [
            vlm.encoder.register_forward_pre_hook(self._marks("encoder")),
            vlm.encoder.register_forward_hook(self._marks(OTHER)),
            vlm.projector.register_forward_pre_hook(self._enter_projector),
            vlm.projector.register_forward_hook(self._leave_projector),
            vlm.llm.base_model.register_forward_pre_hook(self._marks("llm")),
        ]

    def mark(self, part: str) -> None:
        """From here on the step computes this part."""
        if self.running and self.labels[-1:] != [part]:
            self.labels.append(part)
            self.watch.mark()

    def _marks(self, part: str) -> Callable[..., None]:
        return lambda *_: self.mark(part)

    def _enter_projector(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """The grid's gradient tells that the projector's backward pass is over and the encoder's begins."""
        self.mark("projector")
        if inputs[0].requires_grad:
            inputs[0].register_hook(self._marks("encoder"))

    def _leave_projector(self, module: Any, inputs: tuple[Tensor, ...], nested: Tensor) -> None:
        """The nested tokens' gradient comes when the LLM's backward pass is over."""
        self.mark("llm")
        if nested.requires_grad:
            nested.register_hook(self._marks("projector"))

    def stop(self) -> None:
        """The step is over."""
        self.mark("end")
        for hook in self.hooks:
            hook.remove()
        self.running = False

    def forget(self) -> None:
        """Something else came between the step's batches."""
        self.stop()
        self._begin()

    def take(self) -> dict[str, float] | None:
        """Milliseconds of each part of the watched step, once; None while it is not over on the device."""
        if self.running or not self.labels or not self.watch.done:
            return None
        times = Counter[str]()
        for part, milliseconds in zip(self.labels, self.watch.read(), strict=False):
            times[part] += milliseconds  # type: ignore[assignment]
        self._begin()
        return dict(times)
