"""Exact resume: a run continues as if it had never stopped.

The batch and the random numbers of a step follow from seed, epoch, rank and step, so that epoch and step
say where a run is. A checkpoint may be written inside a batch, between accumulated batches or during
validation; Lightning's counters in it are set to the place that the weights have reached.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_mm.model.scales import Scale, all_scales


@dataclass
class Place:
    """The place in a run that the weights have reached.

    Args:
        epoch: Index of the epoch.
        batches: Batches of this epoch that the weights were trained on.
        steps: Optimizer steps since the start of the run.
    """

    epoch: int = 0
    batches: int = 0
    steps: int = 0


def write_place(checkpoint: dict[str, Any], place: Place, epoch_batches: int) -> None:
    """Set a checkpoint's loop counters to a place between two batches or two epochs.

    Args:
        checkpoint: The checkpoint that Lightning is about to save.
        place: The place that the weights have reached.
        epoch_batches: Number of batches in the place's epoch.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    earlier = progress["total"]["ready"] - progress["current"]["ready"]  # batches of earlier epochs
    epoch, batches = place.epoch, place.batches
    if batches >= epoch_batches:
        epoch, batches = epoch + 1, 0
    done = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    _set(loops["epoch_progress"], dict.fromkeys(done, epoch) if batches == 0 else done)
    _set(progress, dict.fromkeys(done, batches))
    progress["total"] = dict.fromkeys(done, earlier + place.batches)
    progress["is_last_batch"] = False
    _set(loops["epoch_loop.val_loop.batch_progress"], dict.fromkeys(done, 0))
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    _set(optimizer, {"ready": place.steps, "completed": place.steps})
    loops["state_dict"]["combined_loader"] = [{"epoch": epoch, "batches": batches}]
    checkpoint["epoch"], checkpoint["global_step"] = epoch, place.steps
    checkpoint["place"] = vars(Place(epoch, batches, place.steps))


def check_order(before: dict[str, Any], now: dict[str, Any], place: Place) -> None:
    """Check that nothing that decides the batches has changed since the checkpoint was written.

    Args:
        before: The checkpoint's settings.
        now: The present settings.
        place: The place where the run continues.

    Raises:
        ValueError: A setting differs, in the middle of an epoch. At the start of an epoch it is only a warning.
    """
    differ = [name for name in before if before[name] != now.get(name)]
    if differ:
        said = ", ".join(f"{name} was {before[name]} and is {now.get(name)}" for name in differ)
        if place.batches:
            stopped = f"stopped in mid-epoch, after batch {place.batches}"
            raise ValueError(f"--ckpt_path: {stopped}, where settings of the batches must not change: {said}")
        rank_zero_warn(f"resuming with other batches than before: {said}")


def check_model(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a checkpoint's weights are used in the model that they were trained in.

    With `exact` pooling other scales are only a warning, because a scale's tokens do not depend on the
    other scales. With `adaptive` pooling they do.

    Args:
        before: The checkpoint's settings; empty in checkpoints of an older version.
        now: The present settings.

    Raises:
        ValueError: A setting differs.
    """
    differ = [name for name in before if before[name] != now[name]]
    allowed = [name for name in ("scales", "time_scales") if name in differ and now["pooling"] == "exact"]
    refused = [name for name in differ if name not in allowed]
    said = "; ".join(f"{name} was {before[name]!r:.300} and is {now[name]!r:.300}" for name in refused or allowed)
    if refused:
        raise ValueError(
            f"--ckpt_path: the checkpoint is of another model: {said}. To answer at some of its scales give --scales"
        )
    if allowed:
        rank_zero_warn(f"the checkpoint was trained differently: {said}. To answer at some of its scales give --scales")


def scales_in(identity: dict[str, Any]) -> list[Scale]:
    """The scales that a checkpoint's weights were trained at, finest first, by its settings."""
    return all_scales(identity["scales"], identity["time_scales"])


def _set(progress: dict[str, Any], values: dict[str, int]) -> None:
    for count in (progress["total"], progress["current"]):
        count.update({name: value for name, value in values.items() if name in count})


def seed_step(epoch: int, batch: int, rank: int) -> None:
    """Seed the random numbers of a training step (dropout, stochastic depth), to be the same in every run of it."""
    run = os.environ.get("PL_GLOBAL_SEED", "0")
    digest = hashlib.blake2b(f"{run} {epoch} {batch} {rank}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))
