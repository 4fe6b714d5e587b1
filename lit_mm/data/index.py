"""A cached table for each file of records: which are usable, and what each costs.

The first start parses and encodes every record and reads the header of every image, so that bad records are
known before training. Later starts only memory-map the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from lit_mm.data.records import BadRecords, RecordError
from lit_mm.data.sources.base import load_table, new_file

VERSION = 3
"""Version of the table's layout; tables of other versions are rebuilt."""
CHUNK = 256
"""Records per step of the progress bar."""
LARGE = 20_000
"""Progress is shown from this many records on."""

Cost = Callable[[int], list[int]]
"""Number of a record -> its table row without the number; raises a RecordError if it is unusable."""


def usable_records(
    cost: Cost, total: int, columns: int, file: Path, policy: Literal["error", "skip"], workers: int
) -> tuple[np.ndarray, BadRecords]:
    """The usable ones of `total` records, from the cached table if there is one, and the bad ones.

    Records that were bad the last time are checked again: a missing file may exist now.

    Args:
        cost: Computes a record's row.
        total: Number of records.
        columns: Number of the table's columns: the record's number and its costs.
        file: The cached table.
        policy: `error` or `skip` bad records.
        workers: Processes that build the table; 0: this one.

    Returns:
        int64 [n, columns] sorted by number, and the bad records.

    Raises:
        RecordError: A bad record, if the policy is `error`.
    """
    kept, bad = load_table(file, columns), BadRecords(policy)
    table = np.zeros((0, columns), np.int64) if kept is None else kept
    numbers = np.setdiff1d(np.arange(total), table[:, 0], assume_unique=True)
    made = _made(cost, numbers, columns, bad, workers) if len(numbers) else table[:0]
    if kept is None or len(made):
        table = np.concatenate([table, made])
        table = table[table[:, 0].argsort()]
        with new_file(file) as opened:
            np.save(opened, table, allow_pickle=False)
    return table, bad


def _made(cost: Cost, numbers: np.ndarray, columns: int, bad: BadRecords, workers: int) -> np.ndarray:
    """Table rows of the given records."""
    pieces = [np.zeros((0, columns), np.int64)]
    own = torch.Generator()  # a loader draws a random number, which must not change the run's own
    chunks: Any = DataLoader(cast(Dataset, _Chunks(cost, numbers)), None, num_workers=workers, generator=own)
    if len(numbers) >= LARGE:
        rank_zero_info(f"checking {len(numbers):,} records, once")
        chunks = track(chunks, total=len(chunks), description="records")
    for rows, errors in chunks:
        pieces.append(np.array(rows, np.int64).reshape(-1, columns))
        for error in errors:
            bad.add(error)
    return np.concatenate(pieces)


class _Chunks(Sequence):
    """Chunks of records, each as the rows of its usable records and the errors of the others."""

    def __init__(self, cost: Cost, numbers: np.ndarray) -> None:
        self.cost, self.numbers = cost, numbers

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / CHUNK)

    def __getitem__(self, chunk: Any) -> tuple[list[list[int]], list[RecordError]]:
        rows, errors = [], []
        for number in self.numbers[chunk * CHUNK : (chunk + 1) * CHUNK].tolist():
            try:
                rows.append([number, *self.cost(number)])
            except RecordError as error:
                errors.append(error)
        return rows, errors
