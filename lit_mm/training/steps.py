"""Around an optimizer step: clipping, checks before a run, and options of the optimizer that changed on resume."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def clip(optimizer: Optimizer, most: float | None, algorithm: str | None) -> Tensor:
    """Clip the gradients by norm or by value, and return their norm over all ranks before clipping.

    Lightning's own clipping refuses the norm for fused optimizers in mixed precision.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if most and algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, most)
    elif most:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def refuse_not_finite(norm: Tensor, trainer: Trainer, recent: Sequence[tuple[list[str], Tensor]]) -> None:
    """Stop before a step that would ruin the weights. Every rank writes the records of its batches to a file.

    Raises:
        FloatingPointError: The gradient norm is not finite.
    """
    if torch.isfinite(norm) or trainer.precision == "16-mixed":  # loss scaling skips such steps itself
        return
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"not_finite.step_{trainer.global_step}.rank_{trainer.global_rank}.json"
    losses = [str(float(loss)) for _, loss in recent]
    batches = [{"loss": loss, "records": where} for loss, (where, _) in zip(losses, recent, strict=True)]
    place = {"epoch": trainer.current_epoch, "step": trainer.global_step, "gradient_norm": str(float(norm))}
    file.write_text(json.dumps(place | {"batches": batches}, indent=2) + "\n")
    raise FloatingPointError(
        f"step {trainer.global_step}: the gradient norm is {float(norm)}, losses {', '.join(losses)}; the records "
        f"are listed in {file}. The weights are those before this step. A lower learning rate, "
        "trainer.gradient_clip_val or bf16-mixed instead of bf16-true may help"
    )


def refuse_hidden_scale(trainer: Trainer) -> None:
    """Refuse optimizers that remove the loss scale inside their step: gradients could not be clipped before it.

    Raises:
        ValueError: The optimizer is fused and the precision 16-mixed.
    """
    [optimizer] = trainer.optimizers
    if trainer.precision == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError("trainer.precision 16-mixed: a fused optimizer hides the loss scale, use torch.optim.AdamW")


def refuse_unknown_metrics(trainer: Trainer, known: Sequence[str]) -> None:
    """Refuse callbacks that monitor, or put into a file name, a metric that is never logged. Nothing is checked if
    some callback is neither Lightning's nor this package's, because it may log metrics of its own.

    Raises:
        ValueError: A metric is not among the known ones.
    """
    callbacks: list[Any] = cast(Any, trainer).callbacks
    if any(type(callback).__module__.split(".")[0] not in ("lightning", "lit_mm") for callback in callbacks):
        return
    for callback in callbacks:
        fields = re.findall(r"\{([^}:]*)", getattr(callback, "filename", None) or "")
        for name in filter(None, [getattr(callback, "monitor", None), *fields]):
            if name not in known and not name.startswith("skipped/"):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                kind = type(callback).__name__
                raise ValueError(f"{kind}: nothing logs {name}, do you mean {near}? There are {', '.join(known)}")


def set_options(trainer: Trainer, options: Sequence[dict[str, Any]]) -> None:
    """Set learning rates and the optimizer's other options to the configured ones instead of the checkpoint's."""
    [optimizer], [config] = trainer.optimizers, trainer.lr_scheduler_configs
    scheduler: Any = config.scheduler
    for number, (group, configured) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        peak = configured["lr"]
        if isinstance(scheduler, LambdaLR):
            rate = peak * scheduler.lr_lambdas[number](scheduler.last_epoch)
        else:
            rate = group["lr"] * (peak / group["initial_lr"] if peak != group["initial_lr"] else 1)
        group.update(configured, lr=rate, initial_lr=peak)
    scheduler.base_lrs = [configured["lr"] for configured in options]
