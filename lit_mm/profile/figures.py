"""The figures of experiments, as a dict for JSON, tables and pictures.

FLOPs are those of one answer of `new_tokens` tokens to one image and a prompt of `prompt_tokens` tokens,
with greedy decoding, a KV cache and causal attention pairs (see `lit_mm.costs.flops`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lit_mm.costs.flops import AnswerCost, Costs, nested_segments
from lit_mm.model.scales import Scale, VideoScale
from lit_mm.profile.experiment import Experiment, Size
from lit_mm.training.parts import apply_parts

Timer = Callable[[Size, int], dict[str, Any]]
"""Times an answer: (image size, visual tokens) -> figures."""


def figures_of(experiment: Experiment, prompt: int, new_tokens: int, timer: Timer | None = None) -> dict[str, Any]:
    """All figures of an experiment.

    Args:
        experiment: The experiment.
        prompt: Tokens of the question.
        new_tokens: Tokens of the answer.
        timer: Times each scale; None: nothing is timed.
    """
    costs, width = Costs(experiment.build().requires_grad_(False)), getattr(torch, experiment.dtype).itemsize
    trained = experiment.build()
    apply_parts(trained, experiment.model.parts)
    training = Costs(trained, experiment.model.activation_checkpointing)

    def at(size: Size) -> dict[str, Any]:
        scales, note = experiment.scales(size)
        ask = partial(costs.answer, size, text=prompt, new_tokens=new_tokens, width=width)
        without, rows = ask(0, images=0), []
        for scale in scales:
            visual = tokens_of(scale)
            rows.append({"scale": str(scale), **_described(ask(visual, images=experiment.frames), without)})
            rows[-1] |= {"measured": timer(size, visual)} if timer else {}
        return {
            "height": size[0],
            "width": size[1],
            "grid": list(experiment.encoder.grid(*size)),
            "images": experiment.frames,
            "note": note,
            "text_only": _described(without, without),
            "scales": rows,
            "training": _training(training, experiment.frames, size, scales, prompt + new_tokens, new_tokens),
        }

    return {
        "name": experiment.name,
        "encoder": type(experiment.encoder).__name__,
        "llm": experiment.model.llm.name_or_path,
        "parameters": costs.parameters,
        "dtype": experiment.dtype,
        "weight_bytes": sum(costs.parameters.values()) * width,
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "sizes": [at(size) for size in experiment.sizes],
    }


def tokens_of(scale: Scale) -> int:
    """Visual tokens at a scale, of all frames together."""
    return scale.frames * scale.tokens if isinstance(scale, VideoScale) else scale


def _described(answer: AnswerCost, without: AnswerCost) -> dict[str, Any]:
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


def _training(costs: Costs, frames: int, size: Size, scales: list[Scale], text: int, labels: int) -> dict[str, Any]:
    """Training FLOPs of one sample that starts with its image: all scales packed, and the finest scale alone."""
    segments = nested_segments(0, text, [tokens_of(scale) for scale in scales])
    images = costs.images([(frames, size)])
    row = images + costs.sequence(segments, len(scales) * labels)
    return {
        "packed_tokens": sum(length for *_, length in segments),
        **{f"{part}_flops": getattr(row, part).training for part in ("encoder", "projector", "llm", "head")},
        "total_flops": row.total.training,
        "recompute_flops": row.total.recompute,
        "finest_alone_flops": (images + costs.sequence(segments[:1], labels)).total.training,
    }
