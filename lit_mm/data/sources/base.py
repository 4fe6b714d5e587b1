"""What all sources have in common: items by number, and for scanned files a cached table of their places."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np

from lit_mm.data.records import id_of

CHUNK = 1 << 20
"""Bytes that a scan reads at a time."""


class Source(ABC):
    """The raw items of a set by number, as `(where, item)` with the item's place for errors.

    Sources are passed to forked or spawned worker processes; each process opens the files itself.

    Attributes:
        name: The file or files, as the user wrote them.
        fingerprint: Changes whenever the content may have changed.
    """

    name: str
    fingerprint: str

    def __getitem__(self, number: int) -> tuple[str, Any]:
        """Place and raw item of one record.

        Raises:
            IndexError: There is no such record.
            RecordError: It is not a valid item, such as broken JSON or a sample without text.
            ValueError: The file changed after it was opened.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self.name}: expected a record of 0 to {len(self) - 1}, found {number}")
        return self._read(int(number))

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, number: int) -> tuple[str, Any]: ...


def placed(where: str, item: Any) -> tuple[str, Any]:
    """The place with the item's own id, if it has one, and the item."""
    name = id_of(item)
    return where if name is None else f"{where} (id {name})", item


Stamp = tuple[str, int, int]
"""Path, size and modification time of a file, to detect changes."""


def stamp_of(path: str) -> Stamp:
    """The file as it is now."""
    found = Path(path).stat()
    return str(Path(path).resolve()), found.st_size, found.st_mtime_ns


def digest(*parts: Any) -> str:
    """A fingerprint of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def limited(file: Path, most: int) -> bytes:
    """The whole content of a file of at most `most` bytes; larger ones are refused."""
    if (size := file.stat().st_size) > most:
        raise ValueError(f"{file}: {size} bytes, expected at most {most}, as it is read into memory")
    return file.read_bytes()


def head_of(path: str) -> bytes:
    """The first bytes of a file; compressed files are refused."""
    with Path(path).open("rb") as file:
        head = file.read(4096)
    if not head:
        raise ValueError(f"{path}: contains no records: the file is empty")
    magics = {
        b"\x1f\x8b": "gzip",
        b"BZh": "bzip2",
        b"\xfd7zXZ": "xz",
        b"\x28\xb5\x2f\xfd": "zstd",
        b"PK\x03\x04": "zip",
    }
    if packer := next((name for magic, name in magics.items() if head.startswith(magic)), None):
        raise ValueError(
            f"{path}: compressed by {packer}, expected an uncompressed file, as records are read in random order"
        )
    return head


class Scanned(Source):
    """Records found by scanning the files once; `table` [N, columns] has the place of each.

    Args:
        name: The files, as the user wrote them.
        paths: The files, which must not change while they are used.
        cache: Folder for the table.
    """

    columns: int

    def __init__(self, name: str, paths: list[str], cache: Path) -> None:
        for path in paths:
            head_of(path)
        self.name, self.cache, self.paths, self.stamps = name, cache, paths, [stamp_of(path) for path in paths]
        self.fingerprint = digest(type(self).__name__, self.stamps)
        self._length = len(self.table)

    def __len__(self) -> int:
        return self._length

    @cached_property
    def table(self) -> np.ndarray:
        """int64, memory-mapped from the cache; scans the files if there is no cached table."""
        file = self.cache / f"{self.fingerprint}.npy"
        table = load_table(file, self.columns)
        if table is None:
            table = np.fromiter(self._scan(), np.dtype((np.int64, self.columns)))
            if not len(table):
                raise ValueError(f"{self.name}: contains no records")
            for number, path in enumerate(self.paths):
                if stamp_of(path) != self.stamps[number]:
                    raise self._changed(number)
            with new_file(file) as opened:
                np.save(opened, table, allow_pickle=False)
            table = np.load(file, mmap_mode="r", allow_pickle=False)
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "table"}

    @abstractmethod
    def _scan(self) -> Iterator[tuple[int, ...]]: ...

    def _bytes(self, file: int, start: int, end: int) -> bytes:
        """Bytes start to end of one of the files."""
        with Path(self.stamps[file][0]).open("rb") as opened:
            found = os.fstat(opened.fileno())
            opened.seek(start)
            content = opened.read(end - start)
        if (found.st_size, found.st_mtime_ns) != self.stamps[file][1:] or len(content) != end - start:
            raise self._changed(file)
        return content

    def _changed(self, file: int) -> ValueError:
        _, size, time = self.stamps[file]
        return ValueError(
            f"{self.paths[file]}: changed since it was opened: expected {size} bytes, written at {time} ns"
        )


def load_table(file: Path, columns: int) -> np.ndarray | None:
    """The cached int64 table [n, columns], memory-mapped; None if there is no usable one."""
    try:
        table = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.dtype == np.int64 and table.shape[1:] == (columns,) and len(table) else None


@contextmanager
def new_file(file: Path) -> Iterator[IO[bytes]]:
    """Write a file atomically, even if other processes write it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{uuid4().hex}.tmp")
    try:
        with partial.open("xb") as opened:
            yield opened
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
