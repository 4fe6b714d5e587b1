"""Parquet files and data sets of the library datasets, memory-mapped as Arrow. The library takes a second to import, so
it is imported where it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lit_mm.data.records import SHOWN_BY
from lit_mm.data.sources.base import Source, digest, placed, stamp_of

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's answer."""


def is_dataset(path: str) -> bool:
    """Whether this names a saved data set or one of the hub, not files."""
    saved = ("dataset_info.json", "state.json", "dataset_dict.json")
    if Path(path).exists():
        return any((Path(path) / name).is_file() for name in saved)
    is_file_name = Path(path).suffix in (".json", ".jsonl", ".parquet", ".tar", ".arrow", ".gz", ".zst", ".csv")
    return bool(_hub_name(path)) and not is_file_name and not Path(path).parent.is_dir()


def _hub_name(path: str) -> re.Match | None:
    return re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", path)


def open_parquet(name: str, paths: list[str], cache: Path, columns: Collection[str] = SHOWN_BY.values()) -> Table:
    """Parquet files, converted to Arrow in the cache once and memory-mapped from there.

    Args:
        name: What errors call the files.
        paths: The files.
        cache: The folder for Arrow files.
        columns: Columns of which the files must have one; empty: any will do.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    shapes = [_shape_of(path) for path in paths]
    for path, (found, _) in zip(paths, shapes, strict=True):
        _check_columns(path, found, columns)
        if found != (first := shapes[0][0]):
            expected = f"the columns of {paths[0]}, {', '.join(first)}"
            raise ValueError(f"{path}: expected {expected}, found {', '.join(found)}")
    filled = [path for path, (_, rows) in zip(paths, shapes, strict=True) if rows]
    if not filled:
        raise ValueError(f"{name}: contains no records")
    fingerprint = digest("parquet", [stamp_of(path) for path in paths])
    try:
        dataset = load_dataset("parquet", data_files=filled, split="train", cache_dir=str(cache))
    except DatasetGenerationError as error:
        raise ValueError(f"{name}: not readable as parquet: {error.__cause__ or error}") from error
    return Table(name, dataset, fingerprint, columns)


def open_dataset(path: str, cache: Path) -> Source:
    """A folder that the library datasets saved, or a data set of the hub."""
    if Path(path).is_dir():
        return _saved_dataset(path)
    if name := _hub_name(path):
        return _hub_dataset(path, name[1], name[2] or "train", cache)
    raise FileNotFoundError(f"no folder {path}, and the hub's datasets are named owner/name or owner/name:split")


def _shape_of(path: str) -> tuple[list[str], int]:
    """Column names and number of rows of a parquet file, from its footer."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        footer = read_metadata(path)
        return footer.schema.to_arrow_schema().names, footer.num_rows
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file, found a damaged or different one: {error}") from None


def _saved_dataset(path: str) -> Source:
    from datasets import load_from_disk
    from pyarrow import ArrowException

    if (splits := Path(path) / "dataset_dict.json").is_file():
        found = json.loads(splits.read_text())["splits"]
        raise ValueError(f"{path}: contains the splits {', '.join(found)}, expected one: {Path(path) / found[0]}")
    stamps = [stamp_of(str(file)) for file in sorted(Path(path).rglob("*")) if file.is_file()]
    try:
        dataset = load_from_disk(path)
    except (ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: expected a dataset as save_to_disk writes it: {error}") from error
    return Table(path, dataset, digest("dataset", stamps))


def _hub_dataset(path: str, name: str, split: str, cache: Path) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    _ask_hub(path, name)
    try:
        dataset = load_dataset(name, split=split, cache_dir=str(cache))
    except ConnectionError as error:
        raise ConnectionError(f"{path}: no such file or folder, and not in the cache {cache}: {error}") from error
    except (DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"{path}: the hub's dataset {name} cannot be read: {error}") from error
    return Table(path, dataset, digest("hub", dataset._fingerprint))


def _ask_hub(path: str, name: str) -> None:
    """Raise immediately the errors that load_dataset raises after half a minute of retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except OfflineModeIsEnabled:
        return  # cached data can still be used
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file or folder, and the hub has no dataset {name}") from error
    except Exception as error:  # the hub's HTTP library, and so its errors, has changed before
        hint = "HF_HUB_OFFLINE=1 uses a dataset from the cache"
        raise ConnectionError(
            f"{path}: no such file or folder, and the hub does not answer for {name}: {error} ({hint})"
        ) from error


class Table(Source):
    """Rows of a dataset, read as Arrow, where images are still the bytes of their files."""

    def __init__(self, name: str, dataset: Any, fingerprint: str, columns: Collection[str] = SHOWN_BY.values()) -> None:
        self.name, self.fingerprint, self.rows = name, fingerprint, dataset.with_format("arrow")
        _check_columns(name, dataset.column_names, columns)
        if not len(self):
            raise ValueError(f"{name}: contains no records")

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, number: int) -> tuple[str, Any]:
        return placed(f"{self.name}, record {number}", self.rows[number].to_pylist()[0])


def _check_columns(name: str, found: list[str], columns: Collection[str]) -> None:
    if columns and not set(columns) & set(found):
        expected = " or ".join(columns)
        raise ValueError(f"{name}: expected a column {expected}, found the columns {', '.join(found) or 'none'}")
