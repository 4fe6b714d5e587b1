"""Checkpoint files: written beside their destination and renamed once complete, so that none is ever half written."""

from __future__ import annotations

import io
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

SHARDED = ".metadata"
"""The file that makes a folder a sharded checkpoint (torch.distributed.checkpoint)."""


class WholeFiles(TorchCheckpointIO):
    """Writes single-file checkpoints so that a killed run leaves either the previous file or the new one.
    Remote addresses (s3://…) are written as Lightning writes them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary file, flush it to disk, then rename it."""
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
            part.replace(final)
        finally:
            part.unlink(missing_ok=True)


def is_remote(path: Any) -> bool:
    """Whether a path is an fsspec address (s3://…), which `Path` would take for a local folder."""
    return "://" in str(path)


def put_in_place(part: Path, final: Path) -> None:
    """Rename a file or folder; what has the final name already is removed only after that."""
    before = final.with_name(f"{final.name}.before")
    remove(before)
    if final.exists():
        final.rename(before)
    part.rename(final)
    remove(before)


def remove(path: Path) -> None:
    """Delete a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def check_room(folder: Path, parameters: Sequence[Tensor]) -> None:
    """Check that a folder can hold a checkpoint: the weights and AdamW's two moments of those that train.

    Raises:
        OSError: The folder cannot be written, or its disk is too full.
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


DAMAGED = (AttributeError, EOFError, IndexError, KeyError, MemoryError, RuntimeError, TypeError, ValueError)
"""What torch.load raises for archives that are damaged or made up."""


def load_tensors(path: Path, option: str = "", held: bytes | None = None) -> dict[str, Any]:
    """Read a single-file checkpoint without running pickled code; tensors stay in the file until they are used.

    Args:
        path: The file.
        option: Start of error messages, such as `--ckpt_path: `.
        held: Bytes in the file that are the archive; None: the whole file is.

    Raises:
        ValueError: The file holds pickled code, or is not a checkpoint.
    """
    size = path.stat().st_size if held is None else len(held)
    if not zipfile.is_zipfile(_archive(path, held)):
        raise ValueError(f"{option}{path} is not a checkpoint, or a truncated one ({size} bytes)")
    try:
        _check_members(_archive(path, held), size)
        return torch.load(_archive(path, held), weights_only=True, mmap=held is None, map_location="cpu")
    except pickle.UnpicklingError:
        raise ValueError(f"{option}{path} holds more than tensors (pickled code), which is not loaded") from None
    except (*DAMAGED, zipfile.BadZipFile) as error:
        raise ValueError(f"{option}{path} is not a checkpoint: {(str(error) or repr(error)).splitlines()[0]}") from None


def _archive(path: Path, held: bytes | None) -> Path | io.BytesIO:
    return path if held is None else io.BytesIO(held)


def _check_members(file: Path | io.BytesIO, size: int) -> None:
    """Check that an archive has the form that torch.save gives it: members as they are, each once. A compressed one
    could become larger than memory.

    Raises:
        ValueError: It has another form.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    names = {member.filename for member in members}
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError("it is TorchScript, whose code is not run: save its state_dict() with torch.save")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise ValueError(f"its member {member.filename} is compressed ({member.file_size} bytes)")
        if member.filename.startswith("/") or ".." in member.filename.split("/"):
            raise ValueError(f"its member {member.filename} leaves the archive")
    if len(names) < len(members):
        raise ValueError("it has two members of one name")


def check_readable(path: Path) -> None:
    """Check that `--ckpt_path` is a complete checkpoint of a run; sharded ones are not checked.

    Raises:
        ValueError: It is not. If the file is truncated, the message lists the folder's other checkpoints, newest first.
    """
    if path.is_dir():
        return
    if not zipfile.is_zipfile(path):
        others = [
            file for file in path.parent.glob("*.ckpt") if file != path and (file.is_dir() or zipfile.is_zipfile(file))
        ]
        newest = sorted(others, key=lambda file: file.stat().st_mtime, reverse=True)
        offered = f"; complete ones in its folder, newest first: {', '.join(map(str, newest))}" if newest else ""
        raise ValueError(f"--ckpt_path: {path} ({path.stat().st_size} bytes) is truncated or not a checkpoint{offered}")
    saved = load_tensors(path, "--ckpt_path: ")
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise ValueError(f"--ckpt_path: {path} is not a checkpoint of a run; --model.init_from takes weights alone")


def find_checkpoint(asked: str, root: Path, option: str = "--ckpt_path") -> Path:
    """The checkpoint that `--ckpt_path` refers to.

    Args:
        asked: `last` or `best` of the newest run below the root, a run's folder (its last.ckpt), or a checkpoint.
        root: `trainer.default_root_dir`.
        option: What errors call `asked`.

    Raises:
        FileNotFoundError: There is none.
    """
    if asked in ("last", "best"):
        return newest_checkpoint(root, asked)
    path = Path(asked).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{option}: no checkpoint {path} (expected a file, a run's folder, last or best)")
    if path.is_file() or (path / SHARDED).is_file():
        return path
    return newest_checkpoint(path, "last", option)


def newest_checkpoint(root: Path, asked: str = "last", option: str | None = None) -> Path:
    """The newest last.ckpt below a folder, or the best checkpoint of its run.

    Args:
        root: The folder.
        asked: `last` or `best`.
        option: What errors call the folder; None: `--ckpt_path` with what is asked.

    Raises:
        FileNotFoundError: There is none.
    """
    folders = ("", "checkpoints/", "*/checkpoints/", "*/*/checkpoints/")
    found = [file for folder in folders for file in root.glob(f"{folder}last.ckpt")]
    if not found:
        raise FileNotFoundError(
            f"{option or f'--ckpt_path {asked}'}: no checkpoints/last.ckpt below {root}: run fit first"
        )
    newest = max(found, key=lambda file: file.stat().st_mtime)
    return newest if asked == "last" else best_beside(newest)


def best_beside(last: Path) -> Path:
    """The best checkpoint of the run that wrote a last.ckpt, by its `checkpoint.monitor`.

    Raises:
        FileNotFoundError: The run monitored nothing, or the file is gone.
    """
    check_readable(last)
    states = {} if last.is_dir() else torch.load(last, weights_only=True, mmap=True, map_location="cpu")["callbacks"]
    paths = [Path(state["best_model_path"]) for state in states.values() if state.get("best_model_score") is not None]
    here = [last.parent / path.name for path in paths]
    if not here or not here[0].exists():
        raise FileNotFoundError(f"--ckpt_path best: the run of {last} has none: set checkpoint.monitor in its fit")
    return here[0]
