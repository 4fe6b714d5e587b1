"""A table beside a file of records: which are usable, and what each costs. Made once, then mapped.

Making it parses and encodes every record and opens the header of every image, so that bad records
are known before training. Afterwards a start reads nothing but the table, whatever its length.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from lit_mm.data.batching import Costs
from lit_mm.data.records import BadRecords, RecordError

VERSION = 1
"""Of the table's layout: a table of another version is made anew."""
CHUNK = 256
"""Records that are looked at between two signs of progress."""
LARGE = 20_000
"""Records from which on progress is shown."""


class Measured(Protocol):
    """A set of records that can tell what each costs."""

    def __len__(self) -> int: ...

    def cost(self, number: int) -> list[int]:
        """One row of the table without the number: before, pixels, words and frames at each time scale.

        Raises:
            RecordError: The record is unusable.
        """
        ...


@dataclass
class Index:
    """The usable records of a file.

    Args:
        table: int32 [n, 3 + 2 T]: the record's number in the file, before, pixels, T words, T frames.
        bad: What was left out, and why.
        total: Records in the file.
    """

    table: np.ndarray
    bad: BadRecords
    total: int

    @property
    def items(self) -> np.ndarray:
        """[n] numbers of the usable records in the file."""
        return self.table[:, 0]

    @property
    def costs(self) -> Costs:
        """What they cost."""
        times = (self.table.shape[1] - 3) // 2
        words, frames = self.table[:, 3 : 3 + times], self.table[:, 3 + times :]
        return Costs(self.table[:, 1], words, frames, self.table[:, 2])


def index_of(records: Measured, cache: Path, settings: dict[str, Any], policy: Any, times: int, workers: int) -> Index:
    """The table of a file, from the cache if it was made before with the same settings.

    Args:
        records: The file's records.
        cache: Folder of tables.
        settings: All that decides what a table says.
        policy: `error` or `skip` bad records.
        times: Time scales, one without any.
        workers: Processes that make it; 0: this one.

    Raises:
        RecordError: A bad record, if the policy is `error`.
    """
    told = repr(sorted({**settings, "version": VERSION, "policy": policy, "times": times}.items()))
    folder = cache / f"index-{hashlib.blake2b(told.encode(), digest_size=16).hexdigest()}"
    if not folder.is_dir():
        table, bad = _make(records, policy, times, workers)
        _keep(folder, table, {"total": len(records), "counts": dict(bad.counts), "examples": bad.examples})
    said, bad = json.loads((folder / "bad.json").read_text()), BadRecords("skip")
    bad.counts.update(said["counts"])
    bad.examples.update(said["examples"])
    return Index(np.load(folder / "table.npy", mmap_mode="r", allow_pickle=False), bad, said["total"])


def _make(records: Measured, policy: Any, times: int, workers: int) -> tuple[np.ndarray, BadRecords]:
    bad, pieces = BadRecords(policy), [np.zeros((0, 3 + 2 * times), np.int32)]
    own = torch.Generator()  # a loader draws a number: the run's random numbers must not depend on this
    chunks: Any = DataLoader(cast(Dataset, _Chunks(records)), batch_size=None, num_workers=workers, generator=own)
    if len(records) >= LARGE:
        rank_zero_info(f"looking at {len(records):,} records, once")
        chunks = track(chunks, total=len(chunks), description="records")
    for rows, errors in chunks:
        pieces.append(np.array(rows, np.int32).reshape(-1, 3 + 2 * times))
        for error in errors:
            bad.add(error)
    return np.concatenate(pieces), bad


class _Chunks(Sequence):
    """Records by chunks, each as the rows of its usable records and the faults of the others."""

    def __init__(self, records: Measured) -> None:
        self.records = records

    def __len__(self) -> int:
        return math.ceil(len(self.records) / CHUNK)

    def __getitem__(self, chunk: Any) -> tuple[list[list[int]], list[RecordError]]:
        rows, errors = [], []
        for number in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.records))):
            try:
                rows.append([number, *self.records.cost(number)])
            except RecordError as error:
                errors.append(error)
        return rows, errors


def _keep(folder: Path, table: np.ndarray, said: dict[str, Any]) -> None:
    """Write both files into a folder that appears at once, whatever other processes do."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as made:
        inner = Path(made) / "index"
        inner.mkdir()
        np.save(inner / "table.npy", table, allow_pickle=False)
        (inner / "bad.json").write_text(json.dumps(said))
        with suppress(OSError):  # another process was faster
            inner.rename(folder)
