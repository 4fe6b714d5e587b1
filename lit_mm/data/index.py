"""A table beside a file of records: which are usable, and what each costs. Made once, then mapped.

Making it parses and encodes every record and opens the header of every image, so that bad records
are known before training. Afterwards a start reads nothing but the table, whatever its length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from lit_mm.data.records import BadRecords, RecordError
from lit_mm.data.sampler import RecordSizes

VERSION = 3
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
        table: int64 [n, 3 + 2 T]: the record's number in the file, before, pixels, T words, T frames.
        bad: What was left out, and why.
        total: Records in the file.
    """

    table: np.ndarray
    bad: BadRecords
    total: int

    @property
    def costs(self) -> RecordSizes:
        """What the usable records cost."""
        return costs_of(self.table)


def costs_of(table: np.ndarray) -> RecordSizes:
    """The costs in a table [n, 3 + 2 T]."""
    times = (table.shape[1] - 3) // 2
    return RecordSizes(table[:, 1], table[:, 3 : 3 + times], table[:, 3 + times :], table[:, 2])


def index_of(records: Measured, cache: Path, settings: dict[str, Any], policy: Any, times: int, workers: int) -> Index:
    """The table of a file, from the cache if it was made before with the same settings.

    Records that were left out then are looked at again: what was missing may have come.

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
    file = cache / f"index-{hashlib.blake2b(told.encode(), digest_size=16).hexdigest()}.npy"
    kept = _kept(file, times)
    table = np.zeros((0, 3 + 2 * times), np.int64) if kept is None else kept
    numbers = np.setdiff1d(np.arange(len(records)), table[:, 0], assume_unique=True)
    bad = BadRecords(policy)
    made = _made(records, numbers, bad, times, workers) if len(numbers) else table[:0]
    if kept is None or len(made):
        table = np.concatenate([table, made])
        table = table[table[:, 0].argsort()]
        _keep(file, table)
    return Index(table, bad, len(records))


def _kept(file: Path, times: int) -> np.ndarray | None:
    """What a former start has left, if it is whole."""
    try:
        table = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.ndim == 2 and table.shape[1] == 3 + 2 * times else None


def _made(records: Measured, numbers: np.ndarray, bad: BadRecords, times: int, workers: int) -> np.ndarray:
    """The table's rows of some of the records."""
    pieces = [np.zeros((0, 3 + 2 * times), np.int64)]
    own = torch.Generator()  # a loader draws a number: the run's random numbers must not depend on this
    chunks: Any = DataLoader(cast(Dataset, _Chunks(records, numbers)), None, num_workers=workers, generator=own)
    if len(numbers) >= LARGE:
        rank_zero_info(f"looking at {len(numbers):,} records, once")
        chunks = track(chunks, total=len(chunks), description="records")
    for rows, errors in chunks:
        pieces.append(np.array(rows, np.int64).reshape(-1, 3 + 2 * times))
        for error in errors:
            bad.add(error)
    return np.concatenate(pieces)


class _Chunks(Sequence):
    """Records by chunks, each as the rows of its usable records and the faults of the others."""

    def __init__(self, records: Measured, numbers: np.ndarray) -> None:
        self.records, self.numbers = records, numbers

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / CHUNK)

    def __getitem__(self, chunk: Any) -> tuple[list[list[int]], list[RecordError]]:
        rows, errors = [], []
        for number in self.numbers[chunk * CHUNK : (chunk + 1) * CHUNK].tolist():
            try:
                rows.append([number, *self.records.cost(number)])
            except RecordError as error:
                errors.append(error)
        return rows, errors


def _keep(file: Path, table: np.ndarray) -> None:
    """Write a table that appears at once, whatever other processes do."""
    with NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
        np.save(part, table, allow_pickle=False)
    Path(part.name).replace(file)
