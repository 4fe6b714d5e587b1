"""Loading weights into a new model from an earlier run, a file or a published model.

This is not a resume: `--ckpt_path` restores a run with its optimizer and its position in the data, whereas
`init_from` only gives a new run its first weights. Pickled code is never executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from lightning.pytorch.utilities import rank_zero_info
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel

from lit_mm.model.llm import LLM
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.parts import PARTS, PartName, start_adapters
from lit_mm.training.saving import SHARDED, load_tensors

Readers = dict[str, Callable[[], Tensor]]
"""Functions that read one tensor each, by the tensor's name."""


@dataclass
class InitFrom:
    """Weights to start from, part by part.

    Each source is a run's folder (`runs/stage_1`, or one `version_0` of it), a checkpoint, a folder
    that `export` wrote, a safetensors file, or a Hugging Face folder (safetensors or
    pytorch_model*.bin), including published LLaVA and ConvLLaVA models.

    Args:
        run: Source of all parts.
        encoder: Source of the encoder, if not `run`.
        projector: Source of the projector, if not `run`.
        llm: Source of the LLM, if not `run`.
        allow_missing: Patterns (`encoder.trunk.stages.4.*`) of weights that the source may lack; they
            keep their initial values.
        allow_unexpected: Patterns of weights in the source that the model may lack.
    """

    run: str | None = None
    encoder: str | None = None
    projector: str | None = None
    llm: str | None = None
    allow_missing: list[str] = field(default_factory=list)
    allow_unexpected: list[str] = field(default_factory=list)

    @property
    def sources(self) -> dict[PartName, str]:
        """The source of each part that has one."""
        named = {part: getattr(self, part) or self.run for part in PARTS}
        return {part: source for part, source in named.items() if source}


@dataclass
class Weights:
    """Tensors that are read on demand.

    Args:
        where: The file or folder, for error messages.
        tensors: Readers by name.
    """

    where: Path
    tensors: Readers

    def of(self, part: PartName) -> Weights:
        """One part's weights, without the part's prefix; all of them if no name has a part's prefix."""
        if not any(name.startswith(tuple(f"{each}." for each in PARTS)) for name in self.tensors):
            return self
        prefix = f"{part}."
        own = {name.removeprefix(prefix): read for name, read in self.tensors.items() if name.startswith(prefix)}
        return Weights(self.where, own)


def open_weights(source: str, merge: bool = True) -> Weights:
    """Open a source of weights; names are translated to this package's: `encoder.…`, `projector.…`, `llm.…`.

    Args:
        source: A run, a checkpoint, a safetensors file, or a folder of them. In a folder of runs the
            newest last.ckpt is taken.
        merge: Merge a run's adapters into the weights that they adapt.

    Raises:
        FileNotFoundError: The source does not exist, or contains no weights.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"init_from: no file or folder {path}")
    if runs := [*path.glob("checkpoints/last.ckpt"), *path.glob("version_*/checkpoints/last.ckpt")]:
        path = max(runs, key=lambda file: file.stat().st_mtime)
        rank_zero_info(f"init_from: {source} is {path}")
    if path.is_file() and path.suffix == ".safetensors":
        return Weights(path, _renamed(_safetensors([path])))
    if path.is_file():
        return Weights(path, _of_checkpoint(path, merge))
    if (path / SHARDED).is_file():
        return Weights(path, _of_shards(path, merge))
    if is_export(path):
        return Weights(path, _of_export(path))
    if (path / "llm").is_dir():
        return Weights(path, _of_old_export(path))
    if tensors := _of_folder(path):
        # ConvLLaVA saves an encoder that was trained in a folder of its own, with the names of ConvNextModel
        tower = {f"encoder.{name}": read for name, read in _of_folder(path / "vision_tower").items()}
        return Weights(path, tower | tensors)
    raise FileNotFoundError(f"init_from: {source}: expected a run, a checkpoint, safetensors or a folder of them")


def llm_weights(llm: LLM, source: str | None) -> Weights | None:
    """The LLM's weights if they can be read one by one: from its `init_from`, or its own safetensors. None for
    random models, GGUF and other files, which only transformers reads.

    Raises:
        FileNotFoundError: The source does not exist.
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


def _of_folder(path: Path) -> Readers:
    """Weights of a Hugging Face folder (safetensors or pytorch_model*.bin); empty if it has none."""
    if files := sorted(path.glob("*.safetensors")):
        return _renamed(_safetensors(files))
    files = sorted(path.glob("pytorch_model*.bin"))
    return _renamed({name: read for file in files for name, read in _of_checkpoint(file).items()})


def _safetensors(files: Iterable[Path]) -> Readers:
    readers: Readers = {}
    for file in files:
        opened = safe_open(file, "pt")
        readers |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
    return readers


def _of_checkpoint(path: Path, merge: bool = True) -> Readers:
    loaded = load_tensors(path)
    state = loaded.get("state_dict", loaded)
    tensors: Readers = {name.removeprefix("vlm."): partial(state.__getitem__, name) for name in state}
    return _merged(tensors, loaded.get("trained", {})) if merge else tensors


def _of_shards(path: Path, merge: bool) -> Readers:
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = re.compile(r"^(state_dict|model)\.vlm\.")  # FSDP1 wrote `model`
    tensors = {name: cast(TensorStorageMetadata, entry) for name, entry in entries.items() if prefix.match(name)}
    names, ready = list(tensors), dict[str, Tensor]()

    def read(name: str) -> Tensor:
        if name not in ready:  # every dcp.load opens all files, so 32 tensors are read at a time
            ready.clear()
            first = names.index(name)
            for each in names[first : first + 32]:
                ready[each] = torch.empty(tensors[each].size, dtype=tensors[each].properties.dtype)
            dcp.load(ready, checkpoint_id=path, no_dist=True)
        return ready.pop(name)

    readers: Readers = {prefix.sub("", name): partial(read, name) for name in names}
    return _merged(readers, torch.load(path / "meta.pt", weights_only=True).get("trained", {})) if merge else readers


def is_of_fsdp1(path: Path) -> bool:
    """Whether a sharded checkpoint was written by FSDP1, which an earlier version had."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return any(name.startswith("model.vlm.") for name in entries)


def is_export(path: Path) -> bool:
    """Whether `export` wrote a folder."""
    file = path / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == "lit_mm"


def _of_export(path: Path) -> Readers:
    """What `export` wrote, by the names of transformers' classes -> this package's names."""
    names = json.loads((path / "config.json").read_text(encoding="utf-8"))["lit_mm"]["names"]
    ours = {
        "model.vision_tower.": "encoder.",
        "model.multi_modal_projector.": "projector.",
        "model.language_model.": f"llm.{names['base']}.",
        "lm_head.": f"llm.{names['head']}.",
    }
    found: Readers = {}
    for name, read in _safetensors(sorted(path.glob("*.safetensors"))).items():
        [part] = [part for part in ours if name.startswith(part)]
        found[ours[part] + name.removeprefix(part)] = read
    return _with_adapter(found, path / "adapter", ours["model.language_model."])


def _with_adapter(tensors: Readers, folder: Path, llm: str) -> Readers:
    """Weights with the peft adapter merged that `export --lora adapter` wrote beside them, if it did.

    Args:
        tensors: The weights, by this package's names.
        folder: The adapter's.
        llm: What this package's names of the LLM's layers begin with.
    """
    if not folder.is_dir():
        return tensors
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name, read in _safetensors([folder / "adapter_model.safetensors"]).items():
        layer, end = name.replace("base_model.model.model.language_model.", llm, 1).split(".lora_")
        tensors[f"{layer}.lora_{end.replace('.', '.default.')}"] = read
        if f"{layer}.weight" in tensors:
            tensors[f"{layer}.base_layer.weight"] = tensors.pop(f"{layer}.weight")
    return _merged(tensors, {"lora rank": config["r"], "lora alpha": config["lora_alpha"]})


def _of_old_export(path: Path) -> Readers:
    """A folder of a version before 0.2: encoder.safetensors, projector.safetensors, and a Hugging Face LLM in llm/."""
    files = [path / f"{part}.safetensors" for part in ("encoder", "projector")]
    own = {f"{file.stem}.{name}": read for file in files for name, read in _safetensors([file]).items()}
    llm = _of_folder(path / "llm")
    return own | {f"llm.{name.removeprefix('llm.')}": read for name, read in llm.items()}


ADAPTED = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
"""peft's names for the weight of an adapted layer and the two matrices of its adapter."""


def _merged(tensors: Readers, trained: dict[str, float]) -> Readers:
    """Weights with their adapters merged, if `trained`, which a run's checkpoint contains, says that it has some."""
    if "lora alpha" not in trained:
        return tensors
    scaling = trained["lora alpha"] / trained["lora rank"]

    def adapted(layer: str) -> Tensor:
        base, down, up = (tensors[f"{layer}.{end}"]() for end in ADAPTED)
        return (base.float() + scaling * (up.float() @ down.float())).to(base.dtype)

    layers = [name.removesuffix(f".{ADAPTED[1]}") for name in tensors if name.endswith(ADAPTED[1])]
    plain = {name.replace(".base_layer.", "."): read for name, read in tensors.items() if ".lora_" not in name}
    return plain | {f"{layer}.weight": partial(adapted, layer) for layer in layers}


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
"""Regular expressions from the names of transformers' ConvNextModel, as in ConvLLaVA's files, to timm's names."""


def _renamed(tensors: Readers) -> Readers:
    """The names of published LLaVA and ConvLLaVA models and of ConvLLaVA's encoders -> this package's names."""
    is_encoder = any("patch_embeddings" in name and "dwconv" not in name for name in tensors) and any(
        "dwconv" in name for name in tensors
    )
    is_llava = any(name.startswith("model.mm_projector.") for name in tensors)
    if not is_encoder and not is_llava:
        return tensors
    names = {name: _our_name(name, is_llava) for name in tensors}
    return {ours: tensors[name] for name, ours in names.items() if ours}


def _our_name(name: str, is_llava: bool) -> str | None:
    if is_llava and name.startswith("model.mm_projector."):
        return name.replace("model.mm_projector.", "projector.layers.")
    if is_llava and "vision_tower" not in name:
        return f"llm.{name}"
    if re.search(r"(^|\.)layernorm\.(weight|bias)$", name) and ".layers." not in name and "embeddings" not in name:
        return None  # the classifier's norm, which the grid does not pass through
    for pattern, ours in CONVNEXT:
        name = re.sub(pattern, ours, name)
    return f"encoder.{name}" if is_llava else name


def start_from(vlm: MatryoshkaVLM, init: InitFrom) -> None:
    """Copy the named weights into the model, except into tensors on the `meta` device: see `materialize`.

    Raises:
        ValueError: Weights are missing or unexpected and no pattern allows it, or a shape differs.
    """
    for part, source in init.sources.items():
        expected = expected_names(getattr(vlm, part))
        weights = open_weights(source).of(part)
        _check_names(part, weights, expected, init)
        _copy(expected, weights)


def expected_names(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied parameter is listed once."""
    kept = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters())
    return {name: tensor for name, tensor in kept.items() if name in parameters or not isinstance(tensor, nn.Parameter)}


def _check_names(part: PartName, weights: Weights, expected: dict[str, Tensor], init: InitFrom) -> None:
    given = {name for name in weights.tensors if not _is_redundant(name, expected, weights)}
    wrong = []
    for kind, names, allowed in (
        ("missing", set(expected) - given, init.allow_missing),
        ("unexpected", given - set(expected), init.allow_unexpected),
    ):
        full = [f"{part}.{name}" for name in sorted(names)]
        if left := [name for name in full if not any(fnmatch(name, pattern) for pattern in allowed)]:
            more = f", and {len(left) - 20} more" if len(left) > 20 else ""
            wrong.append(f"{len(left)} {kind}: {', '.join(left[:20])}{more}")
    if wrong:
        hint = " (adapters: `export` merges them)" if any("lora_" in name for name in given) else ""
        raise ValueError(f"init_from: {weights.where} does not fit the {part}{hint}: {'; '.join(wrong)}")


def _is_redundant(name: str, expected: dict[str, Tensor], weights: Weights) -> bool:
    """Whether an unexpected weight holds nothing new: rotary tables, or an output head equal to the embeddings."""
    if name in expected or name != "lm_head.weight":
        return name not in expected and name.endswith("rotary_emb.inv_freq")
    tables = [read for own, read in weights.tensors.items() if own.endswith("embed_tokens.weight")]
    return len(tables) == 1 and torch.equal(tables[0](), weights.tensors[name]())


@torch.no_grad()
def _copy(targets: dict[str, Tensor], weights: Weights) -> None:
    """Copy every weight that the source has; raises ValueError where shapes or types differ."""
    for name, target in targets.items():
        if name not in weights.tensors or target.is_meta:
            continue
        given = weights.tensors[name]()
        what = f"init_from: {weights.where}: {name}"
        if given.shape != target.shape:
            raise ValueError(f"{what} is {list(given.shape)}, expected {list(target.shape)}")
        if target.is_floating_point() and not given.is_floating_point():
            raise ValueError(f"{what} is {given.dtype}, expected floating point numbers")
        target.copy_(given)


@torch.no_grad()
def materialize(llm: PreTrainedModel, module: nn.Module, weights: Weights) -> None:
    """Load the weights of one module of an LLM that was built on the `meta` device, on the CPU.

    Args:
        llm: The LLM.
        module: One of its modules, such as a decoder layer; the LLM itself loads all that is still on `meta`.
        weights: The LLM's weights.

    Raises:
        ValueError: A weight is missing, or its shape differs.
    """
    inside, head = set(module.modules()), llm.get_output_embeddings()
    table = cast(nn.Embedding, llm.get_input_embeddings())
    tied = head is not None and head.weight is table.weight
    adapters = [child for child in module.modules() if isinstance(child, LoraLayer) and _on_meta(child)]
    for name, child in llm.named_modules():
        if child in inside and _on_meta(child, recurse=False) and not (tied and child is head):
            child.to_empty(device="cpu", recurse=False)
            if child._buffers:
                llm._init_weights(child)  # rotary tables, as in transformers' own loading
            _fill(child, f"{name}.".replace(".base_layer.", "."), weights)
    for layer in adapters:
        start_adapters(layer)
    if tied and head in inside:
        head.weight = table.weight


def _on_meta(module: nn.Module, recurse: bool = True) -> bool:
    return any(tensor.is_meta for tensor in [*module.parameters(recurse), *module.buffers(recurse)])


def _fill(module: nn.Module, prefix: str, weights: Weights) -> None:
    """Load a module's own parameters and, where the source has them, its buffers."""
    named = {f"{prefix}{name}": parameter for name, parameter in module.named_parameters(recurse=False)}
    if missing := [name for name in named if name not in weights.tensors and "lora_" not in name]:
        raise ValueError(f"llm: {weights.where} lacks {', '.join(missing)}")
    buffers = {f"{prefix}{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
    _copy({**named, **buffers}, weights)
