"""Reads raw items from files of records, one at a time, with constant memory.

    JSON list, JSON-lines --one scan--> where every record begins and ends --one read--> item
    webdataset shards     --headers---> where every sample begins and ends --one read--> item, media as bytes
    parquet, datasets     --the library datasets--> memory-mapped Arrow    ------------> item, media as bytes

The result of a scan is cached as an int64 table, so that each file is scanned only once. `records` turns
items into validated records.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Literal

from lit_mm.data.sources.base import Scanned, Source, head_of
from lit_mm.data.sources.json_files import JsonLines, JsonList
from lit_mm.data.sources.shards import Shards
from lit_mm.data.sources.tables import is_dataset, open_dataset, open_parquet

FileFormat = Literal["json", "jsonl", "parquet", "dataset", "tar"]


def open_source(path: str | Sequence[str], cache: Path, format: FileFormat | None = None) -> Source:
    """Open a file of records, several files, or a data set.

    Args:
        path: A JSON list or a JSON-lines file; parquet files or webdataset shards (a file, a list, a
            folder of them, a glob, or a range such as `train-{0000..0099}.tar`); a folder saved by the library
            datasets; or a data set of the hub, `owner/name` or `owner/name:split`.
        cache: Folder for cached tables; created if needed.
        format: The files' format; None: detected from their first bytes.

    Raises:
        FileNotFoundError: A file or folder does not exist.
        ConnectionError: The hub does not answer.
        ValueError: A file is malformed or has no records; the message names the file and the place.
    """
    cache, named = Path(cache), [path] if isinstance(path, str) else path
    paths = [str(Path(one).expanduser()) if one.startswith("~") else one for one in named]
    if format == "dataset" or (format is None and len(paths) == 1 and is_dataset(paths[0])):
        return open_dataset(paths[0], cache)
    files = [file for one in paths for file in _files_of(one, format)]
    format = format or _format_of(files)
    name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if format == "parquet":
        return open_parquet(name, files, cache)
    if format != "tar" and len(files) > 1:
        raise ValueError(f"{name}: expected one file of {format}, found {len(files)}")
    scanned: dict[FileFormat, type[Scanned]] = {"json": JsonList, "jsonl": JsonLines, "tar": Shards}
    return scanned[format](name, files, cache)


def _files_of(path: str, format: FileFormat | None) -> list[str]:
    """All files of a path, with ranges, globs and folders expanded."""
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        return _files_in(path, [f".{format}"] if format else [".parquet", ".tar"])
    if choice := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        first, last = choice.groups()
        numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        found = [file for number in numbers for file in _files_of(path.replace(choice[0], number, 1), format)]
    else:
        found = sorted(filter(os.path.isfile, glob(path)))  # noqa: PTH207 (Path.glob needs the root separately)
    if not found:
        raise FileNotFoundError(f"no instruction file {path}")
    return found


def _files_in(folder: str, suffixes: list[str]) -> list[str]:
    found = sorted(str(file) for file in Path(folder).iterdir() if file.suffix in suffixes)
    if len({Path(file).suffix for file in found}) == 1:
        return found
    names = sorted(file.name for file in Path(folder).iterdir())
    expected = " or ".join(f"*{suffix}" for suffix in suffixes)
    raise ValueError(f"{folder}: expected a folder of {expected}, or a saved dataset, found {names[:8] or 'nothing'}")


def _format_of(files: list[str]) -> FileFormat:
    formats = {_format_of_one(file): file for file in files}
    if len(formats) > 1:
        found = ", ".join(f"{file} is {format}" for format, file in formats.items())
        raise ValueError(f"expected files of one format, found: {found}")
    return next(iter(formats))


def _format_of_one(path: str) -> FileFormat:
    head = head_of(path)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "tar"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"[") or text[:1] in (b"{", b""):
        return "json" if text.startswith(b"[") else "jsonl"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: neither UTF-8 text nor parquet nor tar: {error}") from None
    raise ValueError(
        f"{path}: expected a JSON list, or one JSON object per line, or parquet, or tar, found {head[:60]!r}"
    )
