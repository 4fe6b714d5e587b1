"""Hand-off: weights from an earlier run, a file or the published models into parts of a new one, and out again.

This is no resume. `--ckpt_path` restores a run with its optimizer and its place in the data;
`init_from` gives a new run weights to begin with. Both read without unpickling code.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from lightning.pytorch.utilities import rank_zero_info
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_mm.model.llm import LLM
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.parts import PARTS, PartName, merge_adapters, start_adapters

SHARDED = ".metadata"
"""The file that marks a folder as a checkpoint of several ranks (torch.distributed.checkpoint)."""


@dataclass
class InitFrom:
    """Weights to start from, part by part.

    Each source is a run's folder (`runs/stage_1`, or one `version_0` of it), a checkpoint, a folder
    that `export` wrote, a safetensors file, or a Hugging Face folder (safetensors or
    pytorch_model*.bin), published LLaVA and ConvLLaVA models included.

    Args:
        run: For all parts.
        encoder: For the encoder, instead of the run's.
        projector: For the projector, instead of the run's.
        llm: For the LLM, instead of the run's.
        allow_missing: Patterns (`encoder.trunk.stages.4.*`) of names that may keep their values.
        allow_unexpected: Patterns of names that may be left over.
    """

    run: str | None = None
    encoder: str | None = None
    projector: str | None = None
    llm: str | None = None
    allow_missing: list[str] = field(default_factory=list)
    allow_unexpected: list[str] = field(default_factory=list)

    @property
    def sources(self) -> dict[PartName, str]:
        """Where each part comes from, if it comes from anywhere."""
        named = {part: getattr(self, part) or self.run for part in PARTS}
        return {part: source for part, source in named.items() if source}


@dataclass
class Weights:
    """Tensors by name, read when asked for.

    Args:
        where: The file or folder, for errors.
        tensors: Readers by name.
    """

    where: Path
    tensors: dict[str, Callable[[], Tensor]]

    def of(self, part: PartName) -> Weights:
        """Only a part's, by their names within it: all of them if the file knows no parts."""
        if not any(name.startswith(tuple(f"{each}." for each in PARTS)) for name in self.tensors):
            return self
        own = {
            name.removeprefix(f"{part}."): read for name, read in self.tensors.items() if name.startswith(f"{part}.")
        }
        return Weights(self.where, own)


def open_weights(source: str, merge: bool = True) -> Weights:
    """Find and open a source of weights; names are this package's, `encoder.…`, `projector.…`, `llm.…`.

    Args:
        source: A run, a checkpoint, safetensors or a folder of them.
        merge: Whether the adapters of a run are added to the weights that they adapt.

    Raises:
        FileNotFoundError: There is nothing, or nothing with weights.
    """
    named = Path(source).expanduser()
    path = newest_of(named)
    if path != named:
        rank_zero_info(f"init_from: {source} is {path}")
    if path.is_file() and path.suffix == ".safetensors":
        return Weights(path, renamed(_safetensors([path])))
    if path.is_file():
        return Weights(path, _of_checkpoint(path, merge))
    if (path / SHARDED).is_file():
        return Weights(path, _of_shards(path, merge))
    if (path / "llm").is_dir():
        return Weights(path, _of_export(path))
    if tensors := _of_folder(path):
        # ConvLLaVA saves a tower that trained beside the main files, with the names of ConvNextModel
        tower = {f"encoder.{name}": read for name, read in _of_folder(path / "vision_tower").items()}
        return Weights(path, tower | tensors)
    raise FileNotFoundError(f"init_from: {source}: expected a run, a checkpoint, safetensors or a folder of them")


def llm_weights(llm: LLM, source: str | None) -> Weights | None:
    """Where an LLM's weights can be read one by one: what it starts from, or its own safetensors; None
    for random models, GGUF and other files, which only transformers reads, as a whole.

    Raises:
        FileNotFoundError: No such source.
    """
    if source is not None:
        return open_weights(source).of("llm")
    if llm.name_or_path.endswith(("Config", ".gguf")) or llm.name_or_path.startswith("package:"):
        return None
    folder = Path(llm.name_or_path).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(llm.name_or_path, allow_patterns=["*.safetensors", "pytorch_model*.bin"]))
    found = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return open_weights(str(folder)).of("llm") if found else None


def newest_of(path: Path) -> Path:
    """The newest checkpoint of a run's folder or of a folder of runs; any other path as it is.

    Raises:
        FileNotFoundError: No such path.
    """
    if not path.exists():
        raise FileNotFoundError(f"init_from: no file or folder {path}")
    found = [*path.glob("checkpoints/last.ckpt"), *path.glob("version_*/checkpoints/last.ckpt")]
    return max(found, key=lambda file: file.stat().st_mtime) if found else path


def _of_folder(path: Path) -> dict[str, Callable[[], Tensor]]:
    """Of a Hugging Face folder, safetensors or pytorch_model*.bin; nothing where there are none."""
    if files := sorted(path.glob("*.safetensors")):
        return renamed(_safetensors(files))
    files = sorted(path.glob("pytorch_model*.bin"))
    return renamed({name: read for file in files for name, read in _of_checkpoint(file).items()})


def _safetensors(files: Iterable[Path]) -> dict[str, Callable[[], Tensor]]:
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        opened = safe_open(file, "pt")
        readers |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
    return readers


def _of_checkpoint(path: Path, merge: bool = True) -> dict[str, Callable[[], Tensor]]:
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors (pickled code), which is not loaded") from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from None
    state = loaded.get("state_dict", loaded)
    tensors: dict[str, Callable[[], Tensor]] = {
        name.removeprefix("vlm."): partial(state.__getitem__, name) for name in state
    }
    return merged(tensors, loaded.get("trained", {})) if merge else tensors


def merged(tensors: dict[str, Callable[[], Tensor]], trained: dict[str, float]) -> dict[str, Callable[[], Tensor]]:
    """Adapters added to the weights that they adapt, if the checkpoint says how much they count."""
    if "lora alpha" not in trained:
        return tensors
    scaling = trained["lora alpha"] / trained["lora rank"]

    def adapted(layer: str) -> Tensor:
        base, down, up = (tensors[f"{layer}.{end}"]() for end in ADAPTED)
        return (base.float() + scaling * (up.float() @ down.float())).to(base.dtype)

    layers = [name.removesuffix(f".{ADAPTED[1]}") for name in tensors if name.endswith(ADAPTED[1])]
    plain = {name.replace(".base_layer.", "."): read for name, read in tensors.items() if ".lora_" not in name}
    return plain | {f"{layer}.weight": partial(adapted, layer) for layer in layers}


ADAPTED = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
"""What peft calls a layer's own weight and the two matrices of its adapter."""


def is_of_fsdp1(path: Path) -> bool:
    """Whether a sharded checkpoint was written by FSDP1, which an earlier version had."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return any(name.startswith("model.vlm.") for name in entries)


def _of_shards(path: Path, merge: bool) -> dict[str, Callable[[], Tensor]]:
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = re.compile(r"^(state_dict|model)\.vlm\.")
    tensors = {name: cast(TensorStorageMetadata, entry) for name, entry in entries.items() if prefix.match(name)}
    ready: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in ready:  # with what follows: every call opens all files anew
            ready.clear()
            for following in list(tensors)[list(tensors).index(name) :][:32]:
                entry = tensors[following]
                ready[following] = torch.empty(entry.size, dtype=entry.properties.dtype)
            dcp.load(ready, checkpoint_id=path, no_dist=True)
        return ready.pop(name)

    readers: dict[str, Callable[[], Tensor]] = {prefix.sub("", name): partial(read, name) for name in tensors}
    return merged(readers, torch.load(path / "meta.pt", weights_only=True).get("trained", {})) if merge else readers


def _of_export(path: Path) -> dict[str, Callable[[], Tensor]]:
    llm = renamed(_safetensors(sorted((path / "llm").glob("*.safetensors"))))
    files = [path / f"{part}.safetensors" for part in ("encoder", "projector")]
    own = {f"{file.stem}.{name}": read for file in files for name, read in _safetensors([file]).items()}
    return own | {f"llm.{name.removeprefix('llm.')}": read for name, read in llm.items()}


CONVNEXT = [
    (r"^.*?(embeddings\.|encoder\.stages\.)", r"\1"),
    ("layer_scale_parameter", "gamma"),
    (r"embeddings\.patch_embeddings\.", "stem.0."),
    (r"embeddings\.layernorm\.", "stem.1."),
    (r"encoder\.stages\.", "stages."),
    ("downsampling_layer", "downsample"),
    (r"\.layers\.", ".blocks."),
    ("dwconv", "conv_dw"),
    (r"\.layernorm\.", ".norm."),
    ("pwconv1", "mlp.fc1"),
    ("pwconv2", "mlp.fc2"),
    ("^", "trunk."),
]
"""From the names of transformers' ConvNextModel, in which ConvLLaVA's towers are published, to timm's."""


def renamed(tensors: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """Published names -> this package's: LLaVA's and ConvLLaVA's whole models, and the latter's towers."""
    is_tower = any("patch_embeddings" in name and "dwconv" not in name for name in tensors) and any(
        "dwconv" in name for name in tensors
    )
    is_llava = any(name.startswith("model.mm_projector.") for name in tensors)
    if not is_tower and not is_llava:
        return tensors
    names = {name: _our_name(name, is_llava) for name in tensors}
    return {ours: tensors[name] for name, ours in names.items() if ours}


def _our_name(name: str, is_llava: bool) -> str | None:
    if is_llava and name.startswith("model.mm_projector."):
        return name.replace("model.mm_projector.", "projector.layers.")
    if is_llava and "vision_tower" not in name:
        return f"llm.{name}"
    if re.search(r"(^|\.)layernorm\.(weight|bias)$", name) and ".layers." not in name and "embeddings" not in name:
        return None  # the classifier's norm, which the grid does not pass
    for pattern, ours in CONVNEXT:
        name = re.sub(pattern, ours, name)
    return f"encoder.{name}" if is_llava else name


def start_from(vlm: MatryoshkaVLM, init: InitFrom) -> None:
    """Copy the named weights into the model; what is on the `meta` device is left for `materialize`.

    Raises:
        ValueError: Names are missing or left over and no pattern allows it, or a shape differs.
    """
    for part, source in init.sources.items():
        expected = expected_names(getattr(vlm, part))
        adapted = any(".lora_" in name for name in expected)  # a run's own model, about to be exported
        weights = open_weights(source, merge=not adapted).of(part)
        check_names(part, weights, expected, init)
        copy_weights(expected, weights)


def expected_names(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a tied one once."""
    kept = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters())
    return {name: tensor for name, tensor in kept.items() if name in parameters or not isinstance(tensor, nn.Parameter)}


def check_names(part: PartName, weights: Weights, expected: dict[str, Tensor], init: InitFrom) -> None:
    """Whether a part and its source have the same names.

    Raises:
        ValueError: They do not, and no pattern allows it.
    """
    given = {name for name in weights.tensors if not _is_copy(name, expected, weights)}
    differ = {"missing": set(expected) - given, "unexpected": given - set(expected)}
    allowed = {"missing": init.allow_missing, "unexpected": init.allow_unexpected}
    wrong = {
        kind: sorted(name for name in names if not any(fnmatch(f"{part}.{name}", each) for each in allowed[kind]))
        for kind, names in differ.items()
    }
    if any(wrong.values()):
        said = "; ".join(f"{len(names)} {kind}: {_listed(part, names)}" for kind, names in wrong.items() if names)
        hint = " (adapters: `export` merges them)" if any("lora_" in name for name in given) else ""
        raise ValueError(f"init_from: {weights.where} does not fit the {part}{hint}: {said}")


def _is_copy(name: str, expected: dict[str, Tensor], weights: Weights) -> bool:
    """Rotary tables, which are computed, or a head that is tied to the embeddings and stored with them."""
    if name in expected or name != "lm_head.weight":
        return name not in expected and name.endswith("rotary_emb.inv_freq")
    tables = [read for own, read in weights.tensors.items() if own.endswith("embed_tokens.weight")]
    return len(tables) == 1 and torch.equal(tables[0](), weights.tensors[name]())


def _listed(part: str, names: Sequence[str], most: int = 20) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*(f"{part}.{name}" for name in names[:most]), *more])


@torch.no_grad()
def copy_weights(targets: dict[str, Tensor], weights: Weights) -> None:
    """Copy every tensor that the source has.

    Raises:
        ValueError: A shape differs.
    """
    for name, target in targets.items():
        if name in weights.tensors and not target.is_meta:
            given = weights.tensors[name]()
            if given.shape != target.shape:
                raise ValueError(
                    f"init_from: {weights.where}: {name} is {list(given.shape)}, expected {list(target.shape)}"
                )
            if target.is_floating_point() and not given.is_floating_point():
                raise ValueError(
                    f"init_from: {weights.where}: {name} is {given.dtype}, expected floating point numbers"
                )
            target.copy_(given)


@torch.no_grad()
def materialize(llm: PreTrainedModel, module: nn.Module, weights: Weights) -> None:
    """Give a module of an LLM that was built on the `meta` device its weights, on the CPU.

    Args:
        llm: The whole.
        module: A decoder layer, say, or the LLM itself for what is left.
        weights: The LLM's.

    Raises:
        ValueError: A weight is missing, or its shape differs.
    """
    inside, head = set(module.modules()), llm.get_output_embeddings()
    table = cast(nn.Embedding, llm.get_input_embeddings())
    tied = head is not None and head.weight is table.weight
    bare = [child for child in module.modules() if isinstance(child, LoraLayer) and _on_meta(child)]
    for name, child in llm.named_modules():
        if child in inside and _on_meta(child, recurse=False) and not (tied and child is head):
            child.to_empty(device="cpu", recurse=False)
            if child._buffers:
                llm._init_weights(child)  # rotary tables, as transformers' own loading does
            _fill(child, f"{name}.".replace(".base_layer.", "."), weights)
    for layer in bare:
        start_adapters(layer)
    if tied and head in inside:
        head.weight = table.weight


def _on_meta(module: nn.Module, recurse: bool = True) -> bool:
    return any(tensor.is_meta for tensor in [*module.parameters(recurse), *module.buffers(recurse)])


def _fill(module: nn.Module, prefix: str, weights: Weights) -> None:
    named = {f"{prefix}{name}": parameter for name, parameter in module.named_parameters(recurse=False)}
    if missing := [name for name in named if name not in weights.tensors and "lora_" not in name]:
        raise ValueError(f"llm: {weights.where} lacks {', '.join(missing)}")
    kept = {f"{prefix}{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
    copy_weights({**named, **{name: kept[name] for name in kept if name in weights.tensors}}, weights)


def check_new(folder: Path) -> None:
    """Whether nothing would be overwritten.

    Raises:
        FileExistsError: The folder is not empty, or something else has its name.
    """
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(f"export: {folder} is a link to {folder.readlink()}, which does not exist")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"export: {folder} is a file, expected a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"export: {folder} is not empty")


def export(vlm: MatryoshkaVLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model as plain files: encoder.safetensors, projector.safetensors, and in llm/ a Hugging
    Face model with its tokenizer, adapters merged. `init_from` takes the folder, and `model.llm.name_or_path`
    or transformers the folder llm/. The folder appears when it is complete.

    Raises:
        FileExistsError: The folder is not empty, or something else has its name.
    """
    check_new(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        part = Path(made) / "export"
        write_export(vlm, tokenizer, part)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)


def write_export(vlm: MatryoshkaVLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of `export` into a new folder."""
    folder.mkdir()
    merge_adapters(vlm.llm)
    for part in ("encoder", "projector"):
        state = {name: tensor.contiguous() for name, tensor in getattr(vlm, part).state_dict().items()}
        save_file(state, folder / f"{part}.safetensors", {"format": "pt"})
    vlm.llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
