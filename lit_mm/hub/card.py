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


def card_of(model: Model, origin: Origin, llava: bool = False) -> str:
    """The model card, in Markdown; `llava` says that the folder has transformers' own classes."""
    name, scales, encoder, image = origin.name, model.vlm.projector.scales, model.vlm.encoder, model.media.image
    trust = "" if llava else ", trust_remote_code=True"
    chosen = f", num_visual_tokens={scales[len(scales) // 2]}" if len(scales) > 1 else ""
    trained = f", {origin.step} steps" if origin.step else ""
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [lit_mm, elastic-visual-tokens]
---

# {name}

A multimodal model that answers from {_listed(scales)} visual tokens per image. Image encoder:
{encoder.arguments["backbone"]} at stride {encoder.stride}; images: {image.mode}, {image.size or "any"} pixels; LLM:
{type(model.vlm.llm).__name__}. Trained with lit_mm{trained}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}"{trust})
processor = AutoProcessor.from_pretrained("{name}"{trust})
content = [{{"type": "image", "image": "photo.jpg"}}, {{"type": "text", "text": "What is it?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs{chosen})[:, inputs["input_ids"].shape[1] :]
print(processor.decode(answer[0], skip_special_tokens=True))
```

{"" if llava else _code(scales)}{_types(model)}{VIDEO if model.media.video else ""}{"".join(_measured(origin))}"""


VIDEO = "The classes of transformers take images; `lit_mm.load` takes videos, too.\n"


def _code(scales: list[int]) -> str:
    """What is needed, and what is said about scales if there are several."""
    default = f" Without `num_visual_tokens` it answers from {scales[0]} tokens." if len(scales) > 1 else ""
    return (
        "It needs torch, timm and transformers; its code is in `configuration_lit_mm.py`, `modeling_lit_mm.py`,\n"
        f"`processing_lit_mm.py` and what they import.{default}\n"
    )


def _types(model: Model) -> str:
    """In which type transformers opens encoder and LLM, if they have two."""
    parts = (next(part.parameters()).dtype for part in (model.vlm.encoder, model.vlm.llm))
    encoder, llm = (str(dtype).removeprefix("torch.") for dtype in parts)
    if encoder == llm:
        return ""
    return (
        f"The encoder's weights are {encoder}, those of the LLM {llm}. transformers opens both in a type that rounds\n"
        "neither; a smaller one, such as `dtype=torch.bfloat16`, takes less memory.\n"
    )


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
        measured = "" if first is None else f"{first['median']:.2f} ms"
        yield f"| {'' if flops is None else f'{flops:.3g}'} | {measured} |\n"
    run = told["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    yield f"\nMeasured on {run['device']}, {run['precision']}, {date}; {versions}.\n"
