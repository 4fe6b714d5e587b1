"""Sharded checkpoints (torch.distributed.checkpoint, as FSDP writes them) -> tensors that are read one at a time.

torch's own reader unpickles the file `.metadata`, which runs any code that it names, and believes the paths and sizes
in it. Here a plain record stands in for each of torch's classes, and every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lit_mm.hub.reading import Readers, check_tensor
from lit_mm.training.saving import DAMAGED, SHARDED, load_tensors

METADATA = "torch.distributed.checkpoint.metadata."
RECORDS = {
    *(f"{METADATA}{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(f"{METADATA}{kind}StorageMetadata" for kind in ("Tensor", "Bytes", "Chunk")),
    f"{METADATA}_MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "_local.PosixPath", "_local.WindowsPath")),
}
"""What torch names in `.metadata`, beside sizes and dtypes."""


class Record:
    """Stands in for one of torch's classes: its fields, without its code."""

    fields: Any = None

    def __init__(self, *_: Any) -> None:
        """Called where torch would call a function or an enum; nothing here needs their values."""

    def __setstate__(self, fields: Any) -> None:
        """Keep the fields."""
        self.fields = fields


class _Unpickler(pickle._Unpickler):  # the one in C allocates whatever memo index a file names
    dispatch: ClassVar[Any] = {
        code: run for code, run in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }
    """Without the instruction that allocates as many bytes as the file claims; torch writes none."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in RECORDS:
            return Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}: pickled code is not run")


@dataclass(frozen=True)
class Piece:
    """A chunk of a tensor.

    Args:
        offsets: Where it begins in the tensor.
        sizes: Its shape.
        file: The file that holds it as an archive of torch.save.
        start: Where the archive begins in the file, in bytes.
        length: The archive's bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def read_shards(folder: Path) -> Readers:
    """Tensors of a sharded checkpoint, by their names in it.

    Raises:
        ValueError: Its `.metadata` is damaged, names anything but torch's own classes or a file outside the folder, or
            claims more than the files hold.
    """
    file = folder / SHARDED
    try:
        told = _Unpickler(io.BytesIO(file.read_bytes())).load().fields
        stored = {(key.fields["fqn"], key.fields.get("offset")): own for key, own in told["storage_data"].items()}
        _check_files(folder, [own.fields for own in stored.values()])
        tensors = {name: own.fields for name, own in told["state_dict_metadata"].items() if own.fields}
        if others := [type(name).__name__ for name in tensors if not isinstance(name, str)]:
            raise ValueError(f"a name in it is of type {others[0]}, expected text")
        return {name: _reader(folder, name, own, stored) for name, own in tensors.items()}
    except (*DAMAGED, pickle.UnpicklingError, struct.error, ArithmeticError) as error:
        said = (str(error) if isinstance(error, ValueError | pickle.UnpicklingError) else "") or repr(error)
        raise ValueError(f"{file} is not that of a sharded checkpoint: {said.splitlines()[0]:.300}") from None


def _check_files(folder: Path, stored: Iterable[dict[str, Any]]) -> None:
    """Check that all that is stored is in files of the folder, and not twice in the same bytes."""
    used: Counter[str] = Counter()
    for own in stored:
        name, start, length = own["relative_path"], own["offset"], own["length"]
        _check_whole((start, length))
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"it names {name!r:.200}, expected a file of this folder")
        if transforms := own.get("transform_descriptors"):
            raise ValueError(f"{name}: expected plain tensors, found transforms {reprlib.repr(transforms)}")
        used[name] += length
        if (last := max(start + length, used[name])) > (size := (folder / name).stat().st_size):
            raise ValueError(f"it claims {last} bytes of {name}, which has {size}")


def _check_whole(numbers: tuple[int, ...]) -> None:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"expected whole numbers from 0, found {reprlib.repr(numbers)}")  # short, however deep


def _reader(folder: Path, name: str, told: dict[str, Any], stored: dict[Any, Record]) -> partial[Tensor]:
    """A function that reads one tensor, whose chunks are checked before: in its bounds, and no larger than stored."""
    size, dtype = told["size"], told["properties"].fields[0]
    chunks = [(chunk.fields["offsets"], chunk.fields["sizes"]) for chunk in told["chunks"]]
    for numbers in (size, *(each for chunk in chunks for each in chunk)):
        _check_whole(numbers)
    chunks = [chunk for chunk in chunks if math.prod(chunk[1])]  # more ranks than rows: some have none
    held = sum(math.prod(sizes) for _, sizes in chunks)
    if held != math.prod(size) or len({offsets for offsets, _ in chunks}) < len(chunks):
        raise ValueError(f"{name} claims {list(size)}, its {len(chunks)} chunks have {held} elements")
    pieces = []
    for offsets, sizes in chunks:
        if any(begin + own > whole for begin, own, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"{name} has a chunk {list(sizes)} at {list(offsets)}, outside of {list(size)}")
        own = stored[name, offsets].fields
        if math.prod(sizes) * dtype.itemsize > own["length"]:
            raise ValueError(f"{name} claims {list(sizes)}, {dtype}; the file holds {own['length']} bytes of it")
        pieces.append(Piece(offsets, sizes, folder / own["relative_path"], own["offset"], own["length"]))
    return partial(_joined, name, size, dtype, pieces)


def _joined(name: str, size: tuple[int, ...], dtype: torch.dtype, pieces: list[Piece]) -> Tensor:
    if len(pieces) == 1:
        return _read(name, dtype, pieces[0])
    whole, filled = torch.empty(size, dtype=dtype), torch.zeros(size, dtype=torch.bool)
    for piece in pieces:
        where = tuple(slice(begin, begin + own) for begin, own in zip(piece.offsets, piece.sizes, strict=True))
        whole[where], filled[where] = _read(name, dtype, piece), True
    if not filled.all():  # they have as many elements as the tensor
        raise ValueError(f"{pieces[0].file.parent}: chunks of {name} overlap")
    return whole


def _read(name: str, dtype: torch.dtype, piece: Piece) -> Tensor:
    """A chunk of a tensor.

    Raises:
        ValueError: It is damaged, or another one than `.metadata` says.
    """
    what = f"{piece.file}: {name}"
    with piece.file.open("rb") as stream:
        stream.seek(piece.start)
        tensor = cast(Tensor, load_tensors(piece.file, f"{name} in ", stream.read(piece.length)))
    check_tensor(what, tensor)
    if (tuple(tensor.shape), tensor.dtype) != (piece.sizes, dtype):
        found = f"{list(tensor.shape)}, {tensor.dtype}"
        raise ValueError(f"{what} is {found}, expected {list(piece.sizes)}, {dtype}, as {SHARDED} says")
    return tensor
