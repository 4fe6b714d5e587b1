"""A table beside a file of records: which are usable, and what each costs. Made once, then mapped.

Making it parses and encodes every record and opens the header of every image, so that bad records
are known before training. A later start reads only the table, whatever its length.
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
from lit_mm.data.sources import load_table, new_file

VERSION = 3
"""Of the table's layout: a table of another version is made anew."""
CHUNK = 256
"""Records that are looked at between two signs of progress."""
LARGE = 20_000
"""Records from which on progress is shown."""

Cost = Callable[[int], list[int]]
"""Number of a record -> its row of the table without the number; a RecordError where it is unusable."""


def usable_records(
    cost: Cost, total: int, columns: int, file: Path, policy: Literal["error", "skip"], workers: int
) -> tuple[np.ndarray, BadRecords]:
    """The usable ones of `total` records, from the file if it exists, and what was left out.

    Records that were left out the last time are looked at again: a missing file may be there now.

    Args:
        cost: What a record costs.
        total: Number of records.
        columns: Of the table: the record's number and its costs.
        file: Where the table is kept.
        policy: `error` or `skip` bad records.
        workers: Processes that make the table; 0: this one.

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
    """The table's rows of some of the records."""
    pieces = [np.zeros((0, columns), np.int64)]
    own = torch.Generator()  # a loader draws a number: the run's random numbers must not depend on this
    chunks: Any = DataLoader(cast(Dataset, _Chunks(cost, numbers)), None, num_workers=workers, generator=own)
    if len(numbers) >= LARGE:
        rank_zero_info(f"looking at {len(numbers):,} records, once")
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
