"""Around one optimizer step: clipping, gradients that are no numbers, and learning rates that were
changed for a resumed run."""

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
    """Limit the gradients, by their common norm or each value; return their norm, over all shares, before.

    Lightning refuses the norm for fused optimizers in mixed precision.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if most and algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, most)
    elif most:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def refuse_not_finite(norm: Tensor, trainer: Trainer, recent: Sequence[tuple[list[str], Tensor]]) -> None:
    """Stop before a step that would spoil the weights; every rank writes down the records of its batches.

    Raises:
        FloatingPointError: The gradients' norm is not finite.
    """
    if torch.isfinite(norm) or trainer.precision == "16-mixed":  # whose loss scaling skips such steps
        return
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"not_finite.step_{trainer.global_step}.rank_{trainer.global_rank}.json"
    losses = [str(float(loss)) for _, loss in recent]
    batches = [{"loss": loss, "records": where} for loss, (where, _) in zip(losses, recent, strict=True)]
    place = {"epoch": trainer.current_epoch, "step": trainer.global_step, "gradient_norm": str(float(norm))}
    file.write_text(json.dumps(place | {"batches": batches}, indent=2) + "\n")
    raise FloatingPointError(
        f"step {trainer.global_step}: the gradients' norm is {float(norm)}, losses "
        f"{', '.join(losses)}; the records are in {file}. The weights are those before "
        "this step. A lower learning rate, trainer.gradient_clip_val or bf16-mixed instead of bf16-true may help"
    )


def refuse_hidden_scale(trainer: Trainer) -> None:
    """Whether gradients can be clipped as they are.

    Raises:
        ValueError: They are multiplied by a scale that the optimizer takes out only as it steps.
    """
    [optimizer] = trainer.optimizers
    if trainer.precision == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError("trainer.precision 16-mixed: a fused optimizer hides the loss scale, use torch.optim.AdamW")


def refuse_unknown_metrics(trainer: Trainer, known: Sequence[str]) -> None:
    """Whether all that callbacks monitor or put into file names is going to be logged; callbacks that are neither
    Lightning's nor this package's may log more.

    Raises:
        ValueError: One of them waits for a metric that nothing logs.
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
    """Learning rates and the optimizer's other options as they are configured now, whatever a checkpoint says."""
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
