"""Experiments -> figures, as a dict that is written as JSON, shown as tables and drawn.

FLOPs are of one answer of `new_tokens` tokens to one image with a prompt of `prompt_tokens` tokens,
greedily and with a KV cache, attention counted as needed (see `lit_mm.costs.flops`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lit_mm.costs.flops import Answer, Costs, nested_segments
from lit_mm.model.scales import Scale, VideoScale
from lit_mm.profile.experiment import Experiment, Size
from lit_mm.training.parts import apply_parts

Timer = Callable[[Size, int], dict[str, Any]]
"""Times an answer: size of the image, visual tokens -> figures."""


def figures_of(experiment: Experiment, prompt: int, new_tokens: int, timer: Timer | None = None) -> dict[str, Any]:
    """All figures of an experiment.

    Args:
        experiment: The experiment.
        prompt: Tokens of the question.
        new_tokens: Tokens of the answer.
        timer: Measures each scale; null: nothing is measured.
    """
    costs, width = Costs(experiment.build().requires_grad_(False)), getattr(torch, experiment.dtype).itemsize
    parameters = {part: counts.total for part, counts in costs.parameters.items()}
    asking = _Asking(experiment, costs, prompt, new_tokens, width)
    training = _Training(experiment, prompt, new_tokens)
    return {
        "name": experiment.name,
        "encoder": type(experiment.encoder).__name__,
        "llm": experiment.model.llm.name_or_path,
        "parameters": parameters,
        "dtype": experiment.dtype,
        "weight_bytes": sum(parameters.values()) * width,
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "sizes": [asking.at(size, timer) | {"training": training.at(size)} for size in experiment.sizes],
    }


class _Asking:
    """Answers of one experiment."""

    def __init__(self, experiment: Experiment, costs: Costs, prompt: int, new_tokens: int, width: int) -> None:
        self.experiment, self.costs = experiment, costs
        self.prompt, self.new_tokens, self.width = prompt, new_tokens, width

    def at(self, size: Size, timer: Timer | None) -> dict[str, Any]:
        """Figures for images of one size: the prompt without image, and every scale."""
        scales, note = self.experiment.scales(size)
        without = self._answer(size, 0, images=0)
        rows, columns = self.experiment.encoder.grid(*size)
        return {
            "height": size[0],
            "width": size[1],
            "grid": [rows, columns],
            "images": self.experiment.frames,
            "note": note,
            "text_only": _described(without, without),
            "scales": [self._scale(size, scale, without, timer) for scale in scales],
        }

    def _scale(self, size: Size, scale: Scale, without: Answer, timer: Timer | None) -> dict[str, Any]:
        visual = _tokens(scale)
        figures = {"scale": str(scale), **_described(self._answer(size, visual, self.experiment.frames), without)}
        return figures | ({"measured": timer(size, visual)} if timer else {})

    def _answer(self, size: Size, visual: int, images: int) -> Answer:
        return self.costs.answer(size, visual, self.prompt, self.new_tokens, images, self.width)


def _described(answer: Answer, without: Answer) -> dict[str, Any]:
    prefill = answer.prefill
    return {
        "visual_tokens": answer.visual_tokens,
        "encoder_flops": prefill.encoder.forward,
        "projector_flops": prefill.projector.forward,
        "prefill_flops": prefill.llm.forward + prefill.head.forward,
        "decode_flops": answer.decode,
        "decode_flops_per_token": answer.decode_per_token,
        "total_flops": answer.total,
        "visual_share": (answer.total - without.total) / answer.total,
        "kv_bytes": answer.cache,
    }


class _Training:
    """Training on one sample, the image first, prompt and answer behind it. What the config freezes
    costs what a frozen part does."""

    def __init__(self, experiment: Experiment, prompt: int, new_tokens: int) -> None:
        self.experiment, self.text, self.targets = experiment, prompt + new_tokens, new_tokens
        vlm = experiment.build()
        apply_parts(vlm, experiment.model.parts)
        self.costs = Costs(vlm, experiment.model.activation_checkpointing)

    def at(self, size: Size) -> dict[str, Any]:
        """FLOPs with all scales in a packed row, and with the finest alone."""
        scales = [_tokens(scale) for scale in self.experiment.scales(size)[0]]
        segments = nested_segments(0, self.text, scales)
        images = self.costs.images([(self.experiment.frames, size)])
        row = images + self.costs.row(segments, len(scales) * self.targets)
        finest = images + self.costs.row(segments[:1], self.targets)
        return {
            "row_tokens": sum(length for *_, length in segments),
            **{f"{part}_flops": getattr(row, part).training for part in ("encoder", "projector", "llm", "head")},
            "total_flops": row.total.training,
            "recompute_flops": row.total.recompute,
            "finest_alone_flops": finest.total.training,
        }


def _tokens(scale: Scale) -> int:
    return scale.frames * scale.tokens if isinstance(scale, VideoScale) else scale
