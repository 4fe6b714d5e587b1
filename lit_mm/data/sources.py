"""Reads raw items from files of records, one at a time, with constant memory.

    JSON list, JSON-lines --one scan--> where every record begins and ends --one read--> item
    webdataset shards     --headers---> where every sample begins and ends --one read--> item, media as bytes
    parquet, datasets     --the library datasets--> memory-mapped Arrow    ------------> item, media as bytes

The result of a scan is cached as an int64 table, so that each file is scanned only once. `records` turns
items into validated records.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from glob import glob
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal
from uuid import uuid4

import numpy as np

from lit_mm.data.records import MARKERS, SHOWN_BY, Kind, RecordError, id_of

FileFormat = Literal["json", "jsonl", "parquet", "dataset", "tar"]

CHUNK = 1 << 20
"""Bytes that a scan reads at a time."""
TWICE = "same key twice"
"""The reason for refusing JSON objects with a duplicate key, which are ambiguous."""
HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's answer."""
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "video": (".mp4", ".webm", ".mkv", ".mov", ".avi"),
}
"""Kinds of a shard's members by suffix; .json and .txt are text, all others are ignored."""


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
    if format == "dataset" or (format is None and len(paths) == 1 and _is_dataset(paths[0])):
        return _dataset(paths[0], cache)
    files = [file for one in paths for file in _files_of(one, format)]
    format = format or _format_of(files)
    name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if format == "parquet":
        return _parquet(name, files, cache)
    if format != "tar" and len(files) > 1:
        raise ValueError(f"{name}: expected one file of {format}, found {len(files)}")
    scanned: dict[FileFormat, type[_Scanned]] = {"json": _JsonList, "jsonl": _JsonLines, "tar": _Shards}
    return scanned[format](name, files, cache)


def _is_dataset(path: str) -> bool:
    saved = ("dataset_info.json", "state.json", "dataset_dict.json")
    if Path(path).exists():
        return any((Path(path) / name).is_file() for name in saved)
    is_file_name = Path(path).suffix in (".json", ".jsonl", ".parquet", ".tar", ".arrow", ".gz", ".zst", ".csv")
    return bool(_hub_name(path)) and not is_file_name and not Path(path).parent.is_dir()


def _hub_name(path: str) -> re.Match | None:
    return re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", path)


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
    head = _head(path)
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


def _head(path: str) -> bytes:
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


Stamp = tuple[str, int, int]
"""Path, size and modification time of a file, to detect changes."""


def _stamp(path: str) -> Stamp:
    found = Path(path).stat()
    return str(Path(path).resolve()), found.st_size, found.st_mtime_ns


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Scanned(Source):
    """Records found by scanning the files once; `table` [N, columns] has the place of each.

    Args:
        name: The files, as the user wrote them.
        paths: The files, which must not change while they are used.
        cache: Folder for the table.
    """

    columns: int

    def __init__(self, name: str, paths: list[str], cache: Path) -> None:
        for path in paths:
            _head(path)
        self.name, self.cache, self.paths, self.stamps = name, cache, paths, [_stamp(path) for path in paths]
        self.fingerprint = _digest(type(self).__name__, self.stamps)
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
                if _stamp(path) != self.stamps[number]:
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


class _JsonList(_Scanned):
    """A JSON list; table [N, 2]: start and end (exclusive) byte of each element."""

    columns = 2

    def _scan(self) -> Iterator[tuple[int, ...]]:
        return _elements(self.paths[0])

    def _read(self, number: int) -> tuple[str, Any]:
        where = f"{self.name}, record {number}"
        return _placed(where, _parsed(where, self._bytes(0, *self.table[number].tolist())))


class _JsonLines(_Scanned):
    """One JSON object per line; table [N, 3]: start and end (exclusive) byte of each line, and its number."""

    columns = 3

    def __init__(self, name: str, paths: list[str], cache: Path) -> None:
        super().__init__(name, paths, cache)
        self._check_lines()

    def _scan(self) -> Iterator[tuple[int, ...]]:
        with Path(self.paths[0]).open("rb") as file:
            start = len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)
            file.seek(start)
            for number, line in enumerate(file):
                if line.strip():
                    yield start, start + len(line.rstrip(b"\n")), number
                start += len(line)

    def _read(self, number: int) -> tuple[str, Any]:
        start, end, line = self.table[number].tolist()
        item = _parsed(f"{self.name}, line {line + 1}", self._bytes(0, start, end))
        return _placed(f"{self.name}, record {number}", item)

    def _check_lines(self) -> None:
        """A single bad line is a bad record, but if the first two are bad, the file is not JSON-lines."""
        errors = []
        for number in range(min(2, len(self))):
            try:
                self._read(number)
            except RecordError as error:
                errors += [error] if error.reason != TWICE else []
        if len(errors) == min(2, len(self)):
            raise ValueError(f"{errors[0]}; expected a JSON list, or one JSON object per line")


class _Shards(_Scanned):
    """Webdataset shards; table [N, 3]: number of the shard, start and end (exclusive) byte of each sample."""

    columns = 3

    def _scan(self) -> Iterator[tuple[int, ...]]:
        return ((number, *span) for number, path in enumerate(self.paths) for span in _samples(path))

    def _read(self, number: int) -> tuple[str, Any]:
        shard, start, end = self.table[number].tolist()
        first = bisect_left(self.table[:, 0], shard)
        where = f"{self.paths[shard]}, record {number - first}"
        return _placed(where, _sample(where, self._bytes(shard, start, end)))


def _placed(where: str, item: Any) -> tuple[str, Any]:
    name = id_of(item)
    return where if name is None else f"{where} (id {name})", item


def _parsed(where: str, content: bytes) -> Any:
    text = _utf8(where, content)
    try:
        return json.loads(text, object_pairs_hook=partial(_object, where))
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise RecordError(where, "not valid JSON", f"expected an object, found {text[:60]!r} ({error})") from None


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):  # Python would silently keep the last value
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RecordError(where, TWICE, f"{key!r:.80}: expected once in an object, found {times} times")
    return item


def _utf8(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"expected UTF-8, found byte {error.object[error.start]:#x} at {error.start}: {error.reason}"
        raise RecordError(where, "not UTF-8 text", detail) from None


def _elements(path: str) -> Iterator[tuple[int, int]]:
    """Byte ranges of the elements of a JSON list, which are checked for syntax."""
    with Path(path).open("rb") as file:
        text = _JsonText(path, file)
        text.expect("[")
        if (closed := text.peek()) == "]":
            text.expect("]")
        while closed != "]":
            yield text.value()
            closed = text.expect(",", "]")
        text.expect("")


class _JsonText:
    """Parses JSON in a window that slides over a file.

    The window is decoded as latin-1, where every character is one byte; JSON's syntax is ASCII, which is the
    same in UTF-8. Whether the bytes are valid UTF-8 is checked separately.
    """

    SLACK = 16  # longer than any word, number end or escape that the window may cut

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.start = len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)
        self.text, self.at, self.ended, self.elements, self.lines = "", 0, False, 0, 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decoder = json.JSONDecoder(parse_int=str)  # values are not needed, only where they end
        file.seek(self.start)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            self.at = _WHITE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._slide()

    def expect(self, *characters: str) -> str:
        """Skip one of these characters; "" means the end of the file."""
        found = self.peek()
        if found not in characters:
            expected = " or ".join(repr(character) if character else "the end" for character in characters)
            raise self._error(f"expected {expected}, {f'found {found!r}' if found else 'it ends'}", self.at)
        self.at += len(found)
        return found

    def value(self) -> tuple[int, int]:
        """Skip one value; returns its start and end (exclusive) byte in the file."""
        self.peek()
        while True:
            try:
                end = self._decoder.raw_decode(self.text, self.at)[1]
                if self.ended or end + self.SLACK < len(self.text):
                    break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + self.SLACK >= len(self.text)
                if self.ended or not cut:
                    raise self._error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._error(str(error), self.at) from None
            self._slide()
        span = self.start + self.at, self.start + end
        self.at, self.elements = end, self.elements + 1
        return span

    def _slide(self) -> None:
        """Drop what was skipped and read on; an incomplete value doubles the window."""
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        try:
            self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            byte = self.file.tell() - len(error.object) + error.start
            raise ValueError(f"{self.path}: not UTF-8 text: {error.reason}: byte {byte}") from None
        self.lines += self.text.count("\n", 0, self.at)
        self.start, self.at = self.start + self.at, 0
        self.text, self.ended = rest + chunk.decode("latin-1"), not chunk

    def _error(self, message: str, at: int) -> ValueError:
        line = 1 + self.lines + self.text.count("\n", 0, at)
        place = f"line {line}, byte {self.start + at}, after {self.elements} whole records"
        return ValueError(f"{self.path}: not valid JSON: {message}: {place}")


_WHITE = re.compile(r"[ \t\n\r]*")
_TAR_ERRORS = (tarfile.TarError, OSError, OverflowError)  # the last two: a bad member size
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.[^/]+$")


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
    item = _parsed(f"{where}, {told[0]}", members[told[0]]) if told else {}
    if not caption or not isinstance(item, dict) or any(item.get(field) for field in SHOWN_BY.values()):
        return item
    markers = "".join(f"{MARKERS[kind]}\n" for kind, names in media.items() for _ in names)
    kind = "image" if media["image"] or not media["video"] else "video"
    answer = _utf8(f"{where}, {caption[0]}", members[caption[0]])
    turns = {"human": f"{markers}Describe the {kind}.", "gpt": answer}
    return item | {"conversations": [{"from": role, "value": text} for role, text in turns.items()]}


class _Table(Source):
    """Rows of a dataset, read as Arrow, where images are still the bytes of their files."""

    def __init__(self, name: str, dataset: Any, fingerprint: str) -> None:
        self.name, self.fingerprint, self.rows = name, fingerprint, dataset.with_format("arrow")
        _check_columns(name, dataset.column_names)
        if not len(self):
            raise ValueError(f"{name}: contains no records")

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, number: int) -> tuple[str, Any]:
        return _placed(f"{self.name}, record {number}", self.rows[number].to_pylist()[0])


def _check_columns(name: str, found: list[str]) -> None:
    if not set(SHOWN_BY.values()) & set(found):
        expected = " or ".join(SHOWN_BY.values())
        raise ValueError(f"{name}: expected a column {expected}, found the columns {', '.join(found) or 'none'}")


def _parquet(name: str, paths: list[str], cache: Path) -> Source:
    """Parquet files, converted to Arrow in the cache once and memory-mapped from there."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    shapes = [_shape_of(path) for path in paths]
    for path, (found, _) in zip(paths, shapes, strict=True):
        _check_columns(path, found)
        if found != (first := shapes[0][0]):
            expected = f"the columns of {paths[0]}, {', '.join(first)}"
            raise ValueError(f"{path}: expected {expected}, found {', '.join(found)}")
    filled = [path for path, (_, rows) in zip(paths, shapes, strict=True) if rows]
    if not filled:
        raise ValueError(f"{name}: contains no records")
    fingerprint = _digest("parquet", [_stamp(path) for path in paths])
    try:
        dataset = load_dataset("parquet", data_files=filled, split="train", cache_dir=str(cache))
    except DatasetGenerationError as error:
        raise ValueError(f"{name}: not readable as parquet: {error.__cause__ or error}") from error
    return _Table(name, dataset, fingerprint)


def _shape_of(path: str) -> tuple[list[str], int]:
    """Column names and number of rows of a parquet file, from its footer."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        footer = read_metadata(path)
        return footer.schema.to_arrow_schema().names, footer.num_rows
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file, found a damaged or different one: {error}") from None


def _dataset(path: str, cache: Path) -> Source:
    if Path(path).is_dir():
        return _saved_dataset(path)
    if name := _hub_name(path):
        return _hub_dataset(path, name[1], name[2] or "train", cache)
    raise FileNotFoundError(f"no folder {path}, and the hub's datasets are named owner/name or owner/name:split")


def _saved_dataset(path: str) -> Source:
    from datasets import load_from_disk
    from pyarrow import ArrowException

    if (splits := Path(path) / "dataset_dict.json").is_file():
        found = json.loads(splits.read_text())["splits"]
        raise ValueError(f"{path}: contains the splits {', '.join(found)}, expected one: {Path(path) / found[0]}")
    stamps = [_stamp(str(file)) for file in sorted(Path(path).rglob("*")) if file.is_file()]
    try:
        dataset = load_from_disk(path)
    except (ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: expected a dataset as save_to_disk writes it: {error}") from error
    return _Table(path, dataset, _digest("dataset", stamps))


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
    return _Table(path, dataset, _digest("hub", dataset._fingerprint))


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
