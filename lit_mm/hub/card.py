"""The model card of an exported model: how to use it, and what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lit_mm.inference.answering import Model

CARD = "README.md"


@dataclass
class Origin:
    """Where a model comes from.

    Args:
        run: The folder of its run, with what was measured; None: there is none.
        step: The training step of its weights.
        name: What it is called from now on: that of a folder, or on the hub.
    """

    run: Path | None = None
    step: int | None = None
    name: str = "model"


def card_of(model: Model, origin: Origin) -> str:
    """The model card, in Markdown."""
    name = origin.name
    scales, llm = model.vlm.projector.scales, type(model.vlm.llm).__name__
    encoder, size = model.vlm.encoder.arguments["backbone"], model.media.image.size
    coarse = scales[len(scales) // 2]
    videos = "\nThe classes in this folder take images; `lit_mm.load` takes videos, too.\n" if model.media.video else ""
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [lit_mm, elastic-visual-tokens]
---

# {name}

A multimodal model that answers at {_listed(scales)} visual tokens per image: fewer tokens cost less, more tokens show
more detail. Image encoder: {encoder} at stride {model.vlm.encoder.stride}, images of {size or "any"} pixels
({model.media.image.mode}); LLM: {llm}. Trained with lit_mm{f", {origin.step} steps" if origin.step else ""}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
messages = [{{"role": "user", "content": [{{"type": "image", "url": "photo.jpg"}},
                                       {{"type": "text", "text": "What is it?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, num_visual_tokens={coarse})[:, inputs["input_ids"].shape[1]:]
print(processor.decode(answer[0], skip_special_tokens=True))
```

Without `num_visual_tokens` it answers at {scales[0]}. It needs torch, timm and transformers; the code in this folder is
`configuration_lit_mm.py`, `modeling_lit_mm.py`, `processing_lit_mm.py` and what they import.
{videos}
{"".join(_measured(origin))}"""


def _listed(scales: list[int]) -> str:
    *others, last = map(str, scales)
    return f"{', '.join(others)} or {last}" if others else last


def _measured(origin: Origin) -> Iterator[str]:
    """A section with a table for each test of the run, and for its validation."""
    files = sorted(origin.run.glob("*.json")) if origin.run else []
    for file in files:
        told = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(told, dict) and {"split", "scales", "run"} <= set(told):
            yield from _table(told, file, origin.step)


def _table(told: dict[str, Any], file: Path, step: int | None) -> Iterator[str]:
    date = datetime.fromtimestamp(file.stat().st_mtime, UTC).date()
    others = "" if told.get("step") in (None, step) else f", with the weights of step {told['step']}"
    yield f"\n## {told['split']}: {told['questions']} questions, {told['metric']}{others}\n\n"
    yield "| visual tokens | accuracy | 95 % interval | prefill FLOPs | first token |\n|--:|--:|--:|--:|--:|\n"
    for row in told["scales"]:
        low, high = row["interval"]
        flops, first = row.get("prefill_flops"), (row.get("measured") or {}).get("first_token_ms")
        yield f"| {row['scale']} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} "
        yield f"| {'' if flops is None else f'{flops:.3g}'} | {'' if first is None else _milliseconds(first)} |\n"
    run = told["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    yield f"\nMeasured on {run['device']}, {run['precision']}, {date}; {versions}.\n"


def _milliseconds(measured: Any) -> str:
    return f"{measured:.2f} ms" if isinstance(measured, float | int) else f"{measured.get('median', 0):.2f} ms"
