"""Files of weights -> tensors that are read one at a time. Nothing that a file says is trusted: pickled code does not
run, an index cannot name files outside its folder, and no tensor claims more elements than its file holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn, strided

from lit_mm.model.hub import folder_of, is_hub_name
from lit_mm.training.saving import load_tensors

Readers = dict[str, Callable[[], Tensor]]
"""Functions that read one tensor each, by the tensor's name."""

NEEDED = ["*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja"]
"""What is downloaded of a repository; patterns reach into its folders."""
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
WEIGHTS += ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
"""Where a folder's weights are, in the order in which transformers and open_clip look."""
BIN = (".bin", ".pt", ".pth", ".ckpt")


def find(source: str, option: str, revision: str | None = None) -> Path:
    """The file or folder of a source: a path, or `owner/name` or `owner/name@revision` on the hub.

    Raises:
        FileNotFoundError: It does not exist, or the hub is out of reach and the cache lacks it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_name(source):
        raise FileNotFoundError(f"{option}: no file or folder {path}")
    return folder_of(source, NEEDED, option, revision)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys; an empty one if there is no file.

    Raises:
        ValueError: It is something else.
    """
    if not file.is_file():
        return {}
    return _object(file.read_bytes(), str(file))


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, found {found!r:.60}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise ValueError(f"duplicate key {twice[0]!r:.80}")
    return dict(pairs)


def read_folder(folder: Path) -> Readers:
    """Tensors of a folder's weights; empty if it has none.

    Raises:
        ValueError: A file is damaged or holds more than tensors, or two files hold one name.
        FileNotFoundError: The index names a file that is not there.
    """
    return read_files(_files(folder))


def read_files(files: Iterable[Path]) -> Readers:
    """Tensors of several files, of which no two may hold the same name."""
    readers: Readers = {}
    for file in files:
        own = read_file(file)
        if twice := sorted(readers.keys() & own.keys()):
            raise ValueError(f"{file}: {twice[0]} is in another file of the folder, too ({len(twice)} such names)")
        readers |= own
    return readers


def read_file(file: Path) -> Readers:
    """Tensors of one safetensors file or one that torch.save wrote (`.bin`, `.pt`, `.ckpt`).

    Raises:
        ValueError: It is damaged, or holds more than tensors.
    """
    return _safetensors(file) if file.suffix == ".safetensors" else state_of(load_tensors(file), file)


def _files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if (file := folder / name).is_file():
            return _shards(file) if name.endswith(".json") else [file]
    own = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "adapter_model.safetensors"]
    return own or sorted(folder.glob("pytorch_model*.bin"))


def _shards(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        ValueError: It names no files, or one outside its folder.
        FileNotFoundError: One does not exist.
    """
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ValueError(f"{index}: expected names of tensors and their files under weight_map")
    for file in (files := sorted(set(named.values()))):
        if Path(file).name != file:
            raise ValueError(f"{index}: weight_map names {file!r}, expected a file of this folder")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not there: was it downloaded completely?")
    return [index.parent / file for file in files]


def _safetensors(file: Path) -> Readers:
    try:
        opened = safe_open(file, "pt")  # checks every size against the length of the file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a safetensors file, or a truncated one: {error}") from None
    with file.open("rb") as stream:
        _object(stream.read(int.from_bytes(stream.read(8), "little")), f"{file}: header")
    return {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118


def state_of(loaded: Any, file: Path) -> Readers:
    """The tensors of what torch.load returned: a dict of them, or one with a `state_dict`.

    Raises:
        ValueError: It is something else, or a tensor claims more elements than the file holds.
    """
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        raise ValueError(f"{file}: expected tensors by name, found a {type(state).__name__}")
    for name, tensor in state.items():
        check_tensor(f"{file}: {name!s:.200}", tensor)
    return {str(name): partial(state.__getitem__, name) for name in state}


def check_tensor(what: str, tensor: Any) -> None:
    """Check that something read from a file is a plain tensor.

    Args:
        what: The file and the name, for error messages.
        tensor: What was read.

    Raises:
        ValueError: It is something else, or claims more elements than the file holds.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{what}: expected a tensor, found a {type(tensor).__name__}")
    if tensor.is_meta or tensor.layout is not strided or tensor.is_quantized:
        raise ValueError(f"{what}: expected a plain tensor, found {tensor.layout}, {tensor.dtype} on {tensor.device}")
    if tensor.numel() * tensor.element_size() > (held := tensor.untyped_storage().nbytes()):
        raise ValueError(f"{what} claims {list(tensor.shape)}, {tensor.dtype}; the file holds {held} bytes of it")
