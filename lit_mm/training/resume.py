"""Exact resume: what a checkpoint must say so that a run goes on as if it had never stopped.

A batch is decided by (seed, epoch, rank, step), a step's random numbers likewise, so the place of a run
is two numbers. Lightning's own counters, whenever a checkpoint is written (inside a batch, in the
middle of accumulated batches, during validation), are set to the place that the weights have reached.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn


@dataclass
class Place:
    """How far the weights have come.

    Args:
        epoch: Number of the epoch, from 0.
        batches: Batches of it that the weights have seen.
        steps: Optimizer steps of the whole run.
    """

    epoch: int = 0
    batches: int = 0
    steps: int = 0


def write_place(checkpoint: dict[str, Any], place: Place, epoch_batches: int) -> None:
    """Set a checkpoint's loop counters to a place, between two batches or two epochs.

    Args:
        checkpoint: As Lightning is about to save it.
        place: Where the weights are.
        epoch_batches: Batches of the place's epoch.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    earlier = progress["total"]["ready"] - progress["current"]["ready"]  # batches of the epochs before
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
    """Whether what decides the batches is as it was when a run began.

    Args:
        before: What the checkpoint says; empty for a run that begins.
        now: What the configuration says.
        place: Where the run goes on.

    Raises:
        ValueError: Something differs, and an epoch is not at its beginning.
    """
    differ = [name for name in before if before[name] != now.get(name)]
    if differ:
        said = ", ".join(f"{name} was {before[name]} and is {now.get(name)}" for name in differ)
        if place.batches:
            raise ValueError(f"--ckpt_path: stopped after batch {place.batches} of an epoch of other batches: {said}")
        rank_zero_warn(f"resuming with other batches than before: {said}")


def check_model(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Whether a checkpoint's weights are used by the model that they were trained as.

    Coarser scales of `exact` pooling are means of the same windows whatever the other scales are: they
    are allowed, and told. `adaptive` cuts its boxes along the whole chain of scales.

    Args:
        before: What the checkpoint says; empty for one of an older version.
        now: What the configuration says.

    Raises:
        ValueError: They differ.
    """
    differ = [name for name in before if before[name] != now[name]]
    told = [name for name in ("scales", "time_scales") if name in differ and now["pooling"] == "exact"]
    refused = [name for name in differ if name not in told]
    said = "; ".join(f"{name} was {before[name]!r:.300} and is {now[name]!r:.300}" for name in refused or told)
    if refused:
        raise ValueError(
            f"--ckpt_path: the checkpoint is of another model: {said}. To answer at some of its scales give --scales"
        )
    if told:
        rank_zero_warn(f"not as the checkpoint was trained: {said}. To answer at some of its scales give --scales")


def _set(progress: dict[str, Any], values: dict[str, int]) -> None:
    for count in (progress["total"], progress["current"]):
        count.update({name: value for name, value in values.items() if name in count})


def seed_step(epoch: int, batch: int, rank: int) -> None:
    """Random numbers of one training step (dropout, stochastic depth), the same whenever it is run."""
    run = os.environ.get("PL_GLOBAL_SEED", "0")
    digest = hashlib.blake2b(f"{run} {epoch} {batch} {rank}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))
