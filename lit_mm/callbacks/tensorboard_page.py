"""A run's TensorBoard page beyond plain scalars: charts with all scales together, and HPARAMS."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lit_mm.model.scales import Scale
from lit_mm.training.parts import PARTS, parts_of, trained_parts

Layout = dict[str, dict[str, list[Any]]]


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """The writers of the trainer's TensorBoard loggers, on rank 0."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def layout(scales: Sequence[Scale], utilization: bool) -> Layout:
    """Group of charts -> chart -> the scalars that it draws; `utilization` adds a chart of MFU."""

    def chart(*names: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(name)}$" for name in names]]

    def of_scales(name: str) -> list[Any]:
        return chart(*(f"{name}@{scale}" for scale in scales))

    return {
        "quality of every scale": {
            "training loss": of_scales("train/loss"),
            "validation loss": of_scales("val/loss"),
            "validation accuracy": of_scales("val/accuracy"),
        },
        "cost of every scale": {
            "time to the first token (ms)": of_scales("scale/first_token_ms"),
            "time of a further token (ms)": of_scales("scale/further_token_ms"),
        },
        "speed": {
            "tokens per second": chart(*(f"speed/{kind}_tokens_per_s" for kind in ("visual", "text", "label"))),
            "tokens per step": chart(*(f"tokens/{kind}" for kind in ("visual", "text", "label", "padding"))),
            "time in a step by part (ms)": chart(*(f"parts/{part}_ms" for part in (*PARTS, "other"))),
            "share of time waiting for data": chart("speed/data_wait_share"),
            "peak memory (GiB)": chart(*(f"memory/{kind}_GiB" for kind in ("allocated", "reserved", "process"))),
            **({"MFU": chart("speed/MFU", *(f"parts/{part}_MFU" for part in PARTS))} if utilization else {}),
        },
    }


def settings(trainer: Trainer, lit: Any) -> dict[str, str | float]:
    """The settings that runs are compared by. TensorBoard sorts names, capitals first, and shows the first five."""
    budget = getattr(getattr(trainer, "datamodule", None), "budget", None)
    limits = {name: getattr(budget, name, None) for name in ("records", "tokens", "pixels")}
    trained = [part for part in trained_parts(lit.vlm) if not getattr(lit.parts, part).frozen]
    rates = {part: getattr(lit.parts, part).lr if part in trained else "frozen" for part in parts_of(lit.vlm)}
    found = {
        "Scales": ", ".join(map(str, lit.scales)),
        "Encoder": encoder_name(lit.vlm.encoder),
        "LLM": lit.llm.name_or_path,
        "LR": " / ".join(map(str, rates.values())),
        "Batch": ", ".join(f"{limit} {name}" for name, limit in limits.items() if limit),
        "time scales": ", ".join(map(str, lit.time_scales)),
        "scales per step": str(lit.scales_per_step),
        **({f"consistency {name}": value for name, value in vars(lit.consistency).items()} if lit.consistency else {}),
        "sampling": lit.sampling,
        **{f"lr {part}": rate for part, rate in rates.items()},
        "optimizer": type(trainer.optimizers[0]).__name__,
        "batches per step": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "packing": lit.packing,
        "steps": lit.total_steps(),
    }
    return {name: value for name, value in found.items() if value != ""}


def encoder_name(encoder: Any) -> str:
    """`convnext_atto (ConvNeXtEncoder)`."""
    trunk = getattr(getattr(encoder, "trunk", None), "pretrained_cfg", None) or {}
    kind = type(encoder).__name__
    return f"{trunk['architecture']} ({kind})" if trunk.get("architecture") else kind


def open_page(trainer: Trainer, lit: Any, utilization: bool) -> None:
    """Write the charts' layout and the run's settings. HPARAMS shows the last value of every scalar named here."""
    names = [f"{split}/accuracy@{scale}" for split in ("val", "test") for scale in lit.all_scales]
    final = dict.fromkeys(["val/loss", *names, "speed/tokens_per_s", *(["speed/MFU"] if utilization else [])], 0)
    for writer in writers(trainer):
        writer.add_custom_scalars(layout(lit.all_scales, utilization))
        for part in hparams(settings(trainer, lit), final):
            writer._get_file_writer().add_summary(part)  # add_hparams would write to a run of its own
