"""Checkpoints that are whole or not there: written beside their place, on the disk, then renamed."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint of one file so that a kill leaves the one before, or the new one; at a remote address
    (s3://…) as Lightning does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the target, wait for the disk, then rename."""
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        part = final.with_name(f"{final.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, final)  # noqa: PTH105 (the same as Path.replace; this is what is meant)
        finally:
            part.unlink(missing_ok=True)


def is_remote(path: Any) -> bool:
    """Whether a path is an address of fsspec's, which `Path` would take for a local folder."""
    return "://" in str(path)


def check_room(folder: Path, parameters: Sequence[Tensor]) -> None:
    """Whether a folder can hold a checkpoint, with AdamW's two moments of what trains.

    Raises:
        OSError: It cannot be written, or its disk is too full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"checkpoint")
        probe.unlink()
    except OSError as error:
        raise OSError(f"checkpoint.dirpath: checkpoints cannot be written to {folder}: {error}") from None
    moments = sum(8 * p.numel() for p in parameters if p.requires_grad)
    needed, free = sum(p.nbytes for p in parameters) + moments, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"checkpoint.dirpath: {folder} has {free / 2**30:.1f} GiB free, a checkpoint takes about "
            f"{needed / 2**30:.1f}"
        )


def check_readable(path: Path) -> None:
    """Whether a checkpoint of one file is whole, and a run's.

    Raises:
        ValueError: It is not; of one cut short, the message names the others of its folder, newest first.
    """
    if path.is_dir():
        return
    if zipfile.is_zipfile(path):
        check_content(path)
        return
    others = [
        file for file in path.parent.glob("*.ckpt") if file != path and (file.is_dir() or zipfile.is_zipfile(file))
    ]
    newest = sorted(others, key=lambda file: file.stat().st_mtime, reverse=True)
    offered = f"; whole ones beside it, newest first: {', '.join(map(str, newest))}" if newest else ""
    raise ValueError(f"--ckpt_path: {path} ({path.stat().st_size} bytes) is no whole checkpoint{offered}")


def check_content(path: Path) -> None:
    """Whether a file that is whole is a checkpoint, without running what is pickled in it.

    Raises:
        ValueError: It holds something else.
    """
    try:
        saved = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise ValueError(f"--ckpt_path: {path} holds more than tensors (pickled code), which is not loaded") from None
    except RuntimeError as error:
        raise ValueError(f"--ckpt_path: {path} is no checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise ValueError(f"--ckpt_path: {path} is no checkpoint of a run; --model.init_from takes weights alone")
