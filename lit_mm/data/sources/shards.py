"""Webdataset shards: the headers say where every sample begins and ends; its media are read with it."""

from __future__ import annotations

import re
import tarfile
from bisect import bisect_left
from collections.abc import Iterator
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from lit_mm.data.records import MARKERS, SHOWN_BY, Kind, RecordError, id_of
from lit_mm.data.sources.base import CHUNK, Scanned, placed
from lit_mm.data.sources.json_files import parsed, utf8

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "video": (".mp4", ".webm", ".mkv", ".mov", ".avi"),
}
"""Kinds of a shard's members by suffix; .json and .txt are text, all others are ignored."""
_TAR_ERRORS = (tarfile.TarError, OSError, OverflowError)  # the last two: a bad member size
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.[^/]+$")


class Shards(Scanned):
    """Webdataset shards; table [N, 3]: number of the shard, start and end (exclusive) byte of each sample."""

    columns = 3

    def _scan(self) -> Iterator[tuple[int, ...]]:
        return ((number, *span) for number, path in enumerate(self.paths) for span in _samples(path))

    def _read(self, number: int) -> tuple[str, Any]:
        shard, start, end = self.table[number].tolist()
        first = bisect_left(self.table[:, 0], shard)
        where = f"{self.paths[shard]}, record {number - first}"
        return placed(where, _sample(where, self._bytes(shard, start, end)))


def _samples(path: str) -> Iterator[tuple[int, int]]:
    """Byte ranges of a shard's samples: neighboring members with the same name up to its first dot."""
    seen: set[str] = set()
    for sample, group in groupby(_members(path), key=itemgetter(0)):
        _, names, starts, ends = zip(*group, strict=True)
        if sample in seen or len(set(names)) < len(names):
            expected = "expected its members side by side, without duplicates"
            raise ValueError(f"{path}: sample {sample}: {expected}, found {list(names)} again")
        seen.add(sample)
        yield starts[0], ends[-1]


def _members(path: str) -> Iterator[tuple[str, str, int, int]]:
    """Sample, name, start and end (exclusive) byte of each member that belongs to a sample, from the headers."""
    with Path(path).open("rb") as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        except _TAR_ERRORS as error:
            raise ValueError(f"{path}: expected a tar archive, found none at byte 0: {error}") from None
        while True:
            before = archive.offset
            try:
                member = archive.next()
            except _TAR_ERRORS as error:
                raise ValueError(f"{path}: truncated or damaged before byte {before}: {error}") from None
            if member is None:
                break
            archive.members = []  # type: ignore[attr-defined]  # or all headers stay in memory
            if member.issparse() or not (member.isdir() or member.isreg()):
                expected = "expected a file, found a link, a device or a sparse file"
                raise ValueError(f"{path}: member {member.name}: {expected}")
            if not member.isdir() and (sample := _SAMPLE.match(member.name)):
                yield sample[1], member.name, member.offset, archive.offset
        _check_end(path, file, archive.offset)


def _check_end(path: str, file: BinaryIO, end: int) -> None:
    """An archive ends with at least two blocks of zeros. They are missing in a truncated archive, and more data
    follows them in concatenated ones."""
    file.seek(end)
    zeros = 0
    while chunk := file.read(CHUNK):
        if chunk.strip(b"\0"):
            raise ValueError(
                f"{path}: expected the end of the archive at byte {end}, found a damaged header or more data"
            )
        zeros += len(chunk)
    if zeros < 2 * tarfile.BLOCKSIZE:
        raise ValueError(f"{path}: truncated: it ends at byte {end + zeros} without an end-of-archive marker")


def _sample(where: str, content: bytes) -> Any:
    """The item of one sample, with its media as `{"bytes", "path"}` in the fields images and videos.

    A .json is the item itself. A .txt is the answer to "Describe the image."; it is used if there is no
    .json, or one without a conversation. Media are in the order in which the .json names them, or else in
    the shard's order.
    """
    members, sample = {}, ""
    with tarfile.open(fileobj=BytesIO(content), mode="r:") as archive:
        for member in archive:
            if member.isreg() and (match := _SAMPLE.match(member.name)):
                sample = match[1]
                members[member.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    media = {kind: [name for name in members if name.lower().endswith(SUFFIXES[kind])] for kind in MARKERS}
    item = _told(f"{where} ({sample})", members, media)
    if not isinstance(item, dict):
        return item
    for kind, names in media.items():
        if names:
            fields = [item.pop(field, None) for field in (kind, f"{kind}s")]
            listed = [file for value in fields for file in (value if isinstance(value, list) else [value])]
            files = [Path(file).name for file in listed if isinstance(file, str)]
            by_file = {Path(name).name: name for name in names}
            ordered = [by_file[file] for file in files] if files and set(files) <= set(by_file) else names
            item[f"{kind}s"] = [{"bytes": members[name], "path": name} for name in ordered]
    return item if id_of(item) is not None else item | {"id": sample}


def _told(where: str, members: dict[str, bytes], media: dict[Kind, list[str]]) -> Any:
    """The sample's .json, or a conversation made from its .txt."""
    told, caption = ([name for name in members if name.lower().endswith(suffix)] for suffix in (".json", ".txt"))
    if not told + caption or len(told) > 1 or len(caption) > 1:
        raise RecordError(where, "no text", f"expected one .json or .txt in a sample, found {list(members)}")
    item = parsed(f"{where}, {told[0]}", members[told[0]]) if told else {}
    if not caption or not isinstance(item, dict) or any(item.get(field) for field in SHOWN_BY.values()):
        return item
    markers = "".join(f"{MARKERS[kind]}\n" for kind, names in media.items() for _ in names)
    kind = "image" if media["image"] or not media["video"] else "video"
    answer = utf8(f"{where}, {caption[0]}", members[caption[0]])
    turns = {"human": f"{markers}Describe the {kind}.", "gpt": answer}
    return item | {"conversations": [{"from": role, "value": text} for role, text in turns.items()]}
