"""Out-of-memory errors: says what was in the batch and which settings would reduce memory."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class MemoryAdvice(Callback):
    """When memory runs out, says what was in the batch and what would take less memory, cheapest first."""

    def __init__(self) -> None:
        self.batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch."""
        self.batch = batch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the training batch; validation has its own."""
        self.batch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Warn with advice, if the error is an out-of-memory error."""
        if isinstance(exception, torch.OutOfMemoryError) or "can't allocate memory" in str(exception):
            warnings.warn(
                f"out of memory{contents(self.batch)}. To use less memory:\n{advice(trainer, pl_module)}", stacklevel=1
            )


def contents(batch: Any) -> str:
    """The batch's contents, without reading tensors on the device."""
    if batch is None:
        return ""
    positions = sum(len(rows.input_ids) for rows in batch.packed) or sum(len(ids) for ids in batch.input_ids)
    sizes = ", ".join(f"{len(group)} of {group.shape[2]}×{group.shape[3]} pixels" for group in batch.images.groups)
    return f" in a batch of {len(batch.input_ids)} samples, {positions} positions, images: {sizes or 'none'}"


def advice(trainer: Trainer, lit: Any) -> str:
    """A line for each memory-saving setting that is not used yet."""
    sharded = lit.vlm.sharded if hasattr(lit, "vlm") else False
    missing = [part for part in ("encoder", "llm") if part not in lit.activation_checkpointing]
    fewest = 2 if lit.consistency else 1
    knobs = {
        f"model.activation_checkpointing: [encoder, llm] ({' and '.join(missing)} not yet)": bool(missing),
        "trainer.precision: bf16-mixed": str(trainer.precision).startswith("32"),
        "data.tokens_per_batch, data.pixels_per_batch or data.batch_size: smaller, with "
        "trainer.accumulate_grad_batches larger by the same factor": True,
        "model.packing: sequential, one scale at a time": lit.packing != "sequential" and not sharded,
        f"model.scales_per_step: {fewest}, drawn in every step": lit.scales_per_step == "all"
        and len(lit.all_scales) > fewest,
        "trainer.strategy: fsdp, on more devices": not sharded,
        "model.parts.llm.lora.r: 128, adapters instead of the LLM": not (lit.parts.llm.lora or lit.parts.llm.frozen),
    }
    return "\n".join(f"  {knob}" for knob, open_yet in knobs.items() if open_yet)
