"""Loading weights into a new model from an earlier run, a file or a published model.

This is not a resume: `--ckpt_path` restores a run with its optimizer and its position in the data, whereas
`init_from` only gives a new run its first weights. Pickled code is never executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.rank_zero import WarningCache
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_mm import __version__
from lit_mm.hub.layouts import is_after_grid, open_source, translate
from lit_mm.hub.lora import merged, merged_adapter, read_adapter
from lit_mm.hub.reading import Readers, find, read_files, read_folder, read_json, state_of
from lit_mm.hub.shards import read_shards
from lit_mm.model.llm import LLM
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.parts import PARTS, PartName, start_adapters
from lit_mm.training.saving import SHARDED, load_tensors

SAID = WarningCache()
"""What was printed, as each part opens its weights."""


@dataclass
class InitFrom:
    """Weights to start from, part by part.

    Each source is a run's folder (`runs/stage_1`, or one `version_0` of it), a checkpoint, a folder
    that `export` or `import` wrote, or a file or folder of published weights: a causal LM, LLaVA, M3, ConvLLaVA, their
    adapters or projector, a CLIP or ConvNeXt tower of transformers, timm or open_clip (docs/checkpoints.md). It is a
    path, or a hub name with or without a revision (`owner/name@revision`).

    Args:
        run: Source of all parts; a model with a router takes that of the run, if it has one.
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
        source: As for `InitFrom`. In a folder of runs the newest last.ckpt is taken.
        merge: Merge a run's adapters into the weights that they adapt.

    Raises:
        FileNotFoundError: The source does not exist, or contains no weights.
        ValueError: A file of it is damaged or holds more than tensors.
    """
    path = find(source, "init_from")
    if runs := [*path.glob("checkpoints/last.ckpt"), *path.glob("version_*/checkpoints/last.ckpt")]:
        path = max(runs, key=lambda file: file.stat().st_mtime)
        SAID.info(f"init_from: {source} is {path}")
    if path.is_file() and path.suffix != ".safetensors":
        return Weights(path, _of_checkpoint(path, merge))
    if (path / SHARDED).is_file():
        return Weights(path, _of_shards(path, merge))
    if is_export(path):
        return Weights(path, _of_export(path))
    if (path / "llm").is_dir():
        return Weights(path, _of_old_export(path))
    return Weights(path, open_source(path, "init_from").tensors)


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
    tensors = read_folder(find(llm.name_or_path, "llm"))
    return Weights(Path(llm.name_or_path), tensors) if tensors else None


def _of_checkpoint(path: Path, merge: bool = True) -> Readers:
    loaded = load_tensors(path)
    state = state_of(loaded, path)
    if not any(name.startswith("vlm.") for name in state):  # not of a run
        return translate(state, path)[1]
    tensors: Readers = {name.removeprefix("vlm."): read for name, read in state.items()}
    return _merged(tensors, loaded.get("trained", {})) if merge else tensors


def _of_shards(path: Path, merge: bool) -> Readers:
    prefix = re.compile(r"^(state_dict|model)\.vlm\.")  # FSDP1 wrote `model`
    tensors = {prefix.sub("", name): read for name, read in read_shards(path).items() if prefix.match(name)}
    return _merged(tensors, load_tensors(path / "meta.pt").get("trained", {})) if merge else tensors


def is_of_fsdp1(path: Path) -> bool:
    """Whether a sharded checkpoint was written by FSDP1, which an earlier version had."""
    return any(name.startswith("model.vlm.") for name in read_shards(path))


def is_export(path: Path) -> bool:
    """Whether `export` wrote a folder."""
    return read_json(path / "config.json").get("model_type") == "lit_mm"


def own_config(folder: Path) -> dict[str, Any]:
    """What only this package reads in the config of a folder that `export` wrote.

    Raises:
        ValueError: A newer version wrote it, or a field is missing.
    """
    file = folder / "config.json"
    told = read_json(file).get("lit_mm")
    fields = told if isinstance(told, dict) else {}
    by = str(fields.get("version"))
    if _numbers(by) > _numbers(__version__):
        raise ValueError(f"{file}: version {by} of lit_mm wrote it, found {__version__}: install the newer one")
    if lacking := [name for name in OWN_FIELDS if name not in fields]:
        raise ValueError(f"{file}: lit_mm lacks {', '.join(lacking)}; expected what `export` of {__version__} writes")
    if not isinstance(fields["names"], dict) or not {"base", "head"} <= fields["names"].keys():
        raise ValueError(f"{file}: lit_mm.names is {fields['names']!r:.80}, expected base and head")
    return fields


OWN_FIELDS = (
    "names",
    "time_scales",
    "trained_scales",
    "video",
    "frame",
    "image_first",
    "max_new_tokens",
    "decoding",
    "step",
)
"""The fields of `lit_mm` in an export's config.json that every version writes."""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _of_export(path: Path) -> Readers:
    """What `export` wrote, by the names of transformers' classes -> this package's names."""
    names = own_config(path)["names"]
    ours = {
        "model.vision_tower.": "encoder.",
        "model.multi_modal_projector.": "projector.",
        "model.language_model.": f"llm.{names['base']}.",
        "lm_head.": f"llm.{names['head']}.",
    }
    found: Readers = {}
    for name, read in read_folder(path).items():
        if not (part := next((each for each in ours if name.startswith(each)), "")):
            raise ValueError(f"{path}: found the weight {name}, expected names that begin with {', '.join(ours)}")
        found[ours[part] + name.removeprefix(part)] = read
    if (router := path / "router").is_dir():
        found |= {f"router.{name}": read for name, read in read_folder(router).items()}
    return _with_adapter(found, path / "adapter", ours["model.language_model."])


def _with_adapter(tensors: Readers, folder: Path, llm: str) -> Readers:
    """Weights with the peft adapter merged that `export --lora adapter` wrote beside them, if it did.

    Args:
        tensors: The weights, by this package's names.
        folder: The adapter's.
        llm: What this package's names of the LLM's layers begin with.
    """
    adapter = read_adapter(folder)
    if not adapter:
        return tensors
    own = {name.replace("model.language_model.", llm, 1): read for name, read in adapter.tensors.items()}
    return merged_adapter(tensors | own, adapter.scaling)


def _of_old_export(path: Path) -> Readers:
    """An earlier layout of `export`: encoder.safetensors, projector.safetensors, and a Hugging Face LLM in llm/."""
    files = [path / f"{part}.safetensors" for part in ("encoder", "projector")]
    own = {f"{file.stem}.{name}": read for file in files for name, read in read_files([file]).items()}
    llm = read_folder(path / "llm")
    return own | {f"llm.{name.removeprefix('llm.')}": read for name, read in llm.items()}


def _merged(tensors: Readers, trained: dict[str, float]) -> Readers:
    """Weights with their adapters merged, if `trained`, which a run's checkpoint contains, says that it has some."""
    return merged(tensors, trained["lora alpha"] / trained["lora rank"]) if "lora alpha" in trained else tensors


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
    if vlm.router is not None and init.run:
        weights = open_weights(init.run)
        own = {n.removeprefix("router."): read for n, read in weights.tensors.items() if n.startswith("router.")}
        if own:
            expected = expected_names(vlm.router)
            _check_names("router", Weights(weights.where, own), expected, init)
            _copy(expected, Weights(weights.where, own))


def expected_names(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied parameter is listed once."""
    kept = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters())
    return {name: tensor for name, tensor in kept.items() if name in parameters or not isinstance(tensor, nn.Parameter)}


def _check_names(part: PartName, weights: Weights, expected: dict[str, Tensor], init: InitFrom) -> None:
    given = {name for name in weights.tensors if not is_redundant(part, name, expected, weights)}
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


def is_redundant(part: PartName, name: str, expected: dict[str, Tensor], weights: Weights) -> bool:
    """Whether an unexpected weight holds nothing new: rotary tables, an output head equal to the embeddings, or what
    comes after an encoder's grid."""
    if part == "encoder":
        return is_after_grid(name, expected)
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
