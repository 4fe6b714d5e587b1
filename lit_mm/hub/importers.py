"""python -m lit_mm import: published weights -> a folder that `lit_mm.load` opens and `model.init_from` accepts.

A whole model becomes a run's folder (checkpoints/last.ckpt, tokenizer/, config.yaml). A tower or projector alone
becomes a safetensors file for `model.init_from`. Tensors stay in their files until they are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, cast, get_args

import lightning
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import instantiate_module
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_mm.data.images import ImageOptions
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.evaluation.pictures import print_whole
from lit_mm.hub.describe import (
    check_config,
    encoder_config,
    folder_of_files,
    image_mode,
    image_size,
    layer_of,
    llm_config,
    pixels,
)
from lit_mm.hub.export import new_folder
from lit_mm.hub.layouts import Layout, Source, open_source, unknown
from lit_mm.hub.reading import Readers, find, read_json
from lit_mm.hub.template import for_texts
from lit_mm.model.encoder import Encoder
from lit_mm.model.hub import split
from lit_mm.model.llm import LLM, DType, Template
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.training.checkpoints import Weights, expected_names, is_export, is_redundant
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.parts import PARTS, PartName

PROGRAM = "python -m lit_mm import"
USAGE = f"""{PROGRAM} SOURCE OUT
       {PROGRAM} liuhaotian/llava-v1.5-7b models/llava --encoder openai/clip-vit-large-patch14-336
       {PROGRAM} models/llava-m3-lora models/m3 --base models/llava-v1.5-7b --scales 576 144 36 9 1"""
ANSWER = 128
"""The longest answer of a model whose files do not say it, in tokens, as in LLaVA's evaluation scripts."""


@dataclass
class Found:
    """What goes into the model.

    Args:
        sources: Where each part is from.
        config: The config beside the weights of the whole model.
        where: That config's file.
    """

    sources: dict[PartName, Source]
    config: dict[str, Any]
    where: Path


@dataclass
class Matched:
    """The tensors of one part, against those that the model needs.

    Args:
        state: By the names in the model.
        missing: What the source lacks.
        unused: What the model does not use.
        unknown: What no layout explains.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def main(arguments: Sequence[str]) -> None:
    """Import a model or a part of one, and print what was mapped, missing and unused.

    Raises:
        FileNotFoundError: A source is not at hand or has no weights.
        FileExistsError: OUT is not a new folder.
        ValueError: A file is damaged, hostile or of an unknown layout, or the model is not one that this package
            computes.
    """
    options = _parser().parse_args(arguments)
    out = Path(options.out).expanduser()
    with new_folder(out, "import") as made:
        found = gather(options)
        if set(found.sources) == set(PARTS):
            write_run(found, options, out, made)
            print_whole(f"{out}: `ask --ckpt_path {out}` asks it, `fit --model.init_from {out}` trains it further")
        else:
            write_parts(found, options, made)
            parts = " and ".join(found.sources)
            print_whole(f"{out} has the {parts}, for example for --model.init_from.{next(iter(found.sources))} {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, USAGE, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a file or folder of weights, or a hub name (owner/name[@revision])")
    add("out", metavar="OUT", help="a new folder")
    layouts = [each for each in get_args(Layout) if each not in ALONE]
    add("--as", dest="layout", choices=("auto", *layouts), default="auto", help="the layout to expect")
    add("--revision", help="commit, branch or tag of SOURCE on the hub")
    add("--base", help="where the LLM is if SOURCE lacks it, or the model that adapters were trained on")
    add("--encoder", help="where the vision tower is if SOURCE lacks it (default: as its config says)")
    add("--backbone", help="timm's name of a vision tower whose files do not say it")
    add("--scales", type=int, nargs="+", help="visual tokens per image, finest first (default: as SOURCE says, or all)")
    add("--size", type=int, help="pixels of an image's side, for a ConvNeXt whose files do not say it")
    add(
        "--chat_template",
        choices=get_args(Template),
        help="default: vicuna_v1 for a Llama, else the tokenizer's own",
    )
    return parser


def gather(options: argparse.Namespace) -> Found:
    """Open the sources of all parts that can be found.

    Raises:
        FileNotFoundError: A source is not at hand or has no weights.
        ValueError: A source is damaged or not of the expected layout, or the vision tower is nowhere.
    """
    if options.revision and (Path(options.source).expanduser().exists() or split(options.source)[1]):
        raise ValueError(f"import: --revision has no effect on {options.source}, expected owner/name")
    path = find(options.source, "import", options.revision)
    if own := "what `export` wrote" if is_export(path) else "a run" if (path / "checkpoints").is_dir() else None:
        raise ValueError(f"import: {path} is {own}: load, ask, serve and model.init_from take it as it is")
    source = _open(path, "import", options.base)
    if options.layout not in ("auto", source.layout):
        raise ValueError(f"import: {source.where} is {source.layout}, expected {options.layout}")
    if what := ALONE.get(source.layout or ""):
        raise ValueError(f"import: {source.where} has {what}")
    sources: dict[PartName, Source] = {part: source for part in PARTS if of_part(source, part)}
    config = read_json(where := folder_of_files(source) / "config.json")
    check_config(config, where)
    if "llm" not in sources and options.base:
        if "projector" not in sources:
            raise ValueError(f"import: {source.where} has no projector, so --base does not complete the model")
        sources["llm"] = _open(find(options.base, "import: --base"), "import: --base")
    if "llm" in sources and "encoder" not in sources:
        tower = options.encoder or config.get("mm_vision_tower")
        if not tower:
            raise ValueError(f"import: {source.where} has no vision tower: --encoder names one")
        sources["encoder"] = _open(find(str(tower), "import: --encoder"), "import: --encoder")
    found = Found(sources, config, where)
    refuse_unused(options, source, found)
    return found


ALONE = {
    "own": "weights of this package, which model.init_from takes as they are",
    "llm": "neither vision tower nor projector; model.llm.name_or_path takes an LLM",
}


def _open(path: Path, option: str, base: str | None = None) -> Source:
    """Open a source. Raises ValueError if no layout explains its weights."""
    source = open_source(path, option, base)
    if source.layout is None:
        raise ValueError(unknown(path, option, sorted(source.tensors)))
    return source


def refuse_unused(options: argparse.Namespace, source: Source, found: Found) -> None:
    """Check that every given option changes something.

    Raises:
        ValueError: One does not.
    """
    sources, whole = found.sources, set(found.sources) == set(PARTS)
    parts = " and ".join(sources)
    has = {part: f"SOURCE has its own {part}" for part in PARTS if sources.get(part) is source}
    unused = {
        "base": has.get("llm") if not source.base else None,
        "encoder": has.get("encoder") or (None if whole else f"only the {parts} is imported"),
        "backbone": None if "encoder" in sources else "there is no vision tower",
    }
    unused |= dict.fromkeys(("scales", "size", "chat_template"), None if whole else f"only the {parts} is imported")
    for name, reason in unused.items():
        if reason and getattr(options, name) is not None:
            raise ValueError(f"import: --{name} has no effect: {reason}")


def of_part(source: Source, part: PartName) -> Readers:
    """A source's tensors of one part, by the names in the part."""
    if source.layout == "llm":
        return source.tensors if part == "llm" else {}
    prefix = f"{part}."
    return {name.removeprefix(prefix): read for name, read in source.tensors.items() if name.startswith(prefix)}


def match(part: PartName, source: Source, module: nn.Module) -> Matched:
    """The tensors of a source for one part of a model, which was built on the `meta` device.

    Raises:
        ValueError: A shape differs.
    """
    weights, expected = Weights(source.where, of_part(source, part)), expected_names(module)
    found, matched = dict[int, Tensor](), Matched()
    for name, target in expected.items():
        if name not in weights.tensors:
            matched.missing.append(name)
            continue
        tensor = weights.tensors[name]()
        if tensor.shape != target.shape or not tensor.is_floating_point():
            said = f"{list(tensor.shape)}, {tensor.dtype}"
            raise ValueError(
                f"import: {source.where}: {part}.{name} is {said}, expected {list(target.shape)}, floating"
            )
        found[id(target)] = tensor
    for name in set(weights.tensors) - set(expected):
        redundant = is_redundant(part, name, expected, weights)
        (matched.unused if redundant else matched.unknown).append(name)
    kept = module.state_dict(keep_vars=True)  # a tied head has a name of its own in checkpoints
    matched.state = {name: found[id(target)] for name, target in kept.items() if id(target) in found}
    return matched


def report(matches: dict[PartName, Matched], beside: list[str]) -> None:
    """Print what was mapped, missing and unused.

    Raises:
        ValueError: The model lacks weights, or the source has some that no layout explains.
    """
    print_whole(table(matches, beside))
    for kind in ("missing", "unknown"):
        names = [f"{part}.{name}" for part, each in matches.items() for name in sorted(getattr(each, kind))]
        if names:
            raise ValueError(f"import: {len(names)} {kind} weights: {some(names, 5)}")


def table(matches: dict[PartName, Matched], beside: list[str]) -> Table:
    """One row for each part, and one for what is beside the tower."""
    shown = Table("part", "mapped", "missing", "unused", "not used, or missing", title="weights")
    for part, each in matches.items():
        names = sorted(each.missing) + sorted(each.unknown) + sorted(each.unused)
        unused = len(each.unused) + len(each.unknown)
        shown.add_row(part, str(len(each.state)), str(len(each.missing)), str(unused), some(names, 2))
    if beside:
        shown.add_row("beside them", "0", "0", str(len(beside)), some(sorted(beside), 2))
    return shown


def some(names: Sequence[str], most: int) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f", … ({len(names)})" if len(names) > most else "")


def write_parts(found: Found, options: argparse.Namespace, folder: Path) -> None:
    """Write a tower or a projector alone, by the names in a model."""
    matches, beside = dict[PartName, Matched](), list[str]()
    for part, source in found.sources.items():
        if part == "encoder":
            whole = encoder_config(source, -1, options.backbone)
            matches[part] = match(part, source, build(whole))
            _write_yaml({"model": {"encoder": encoder_config(source, None, options.backbone)}}, folder)
        else:
            first = of_part(source, part).get("layers.0.weight", lambda: torch.zeros(1, 1))()
            with torch.device("meta"):
                matches[part] = match(part, source, MatryoshkaProjector(first.shape[1], first.shape[0], [1]))
        beside += source.unused
    report(matches, beside)
    if "encoder" in found.sources:
        print_whole(pixels(found.sources["encoder"], options.backbone))
    for part, each in matches.items():
        state = {f"{part}.{name}": tensor.contiguous() for name, tensor in each.state.items()}
        save_file(state, folder / f"{part}.safetensors", {"format": "pt"})


def build(config: dict[str, Any]) -> Encoder:
    """An encoder on the `meta` device."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Encoder, "encoder")
    with torch.device("meta"):
        return parser.instantiate(parser.parse_object({"encoder": deepcopy(config)})).encoder


def write_run(found: Found, options: argparse.Namespace, out: Path, folder: Path) -> None:
    """Write a whole model as the folder of a run.

    Args:
        found: Its parts.
        options: The command's.
        out: The folder's later name.
        folder: Where to write now.
    """
    with blame(found.where):
        config = model_config(found, options)
        config["llm"]["tokenizer"] = str(folder / "tokenizer")
        save_tokenizer(found, options, config["llm"]["name_or_path"], folder / "tokenizer")
        image = ImageOptions(image_mode(found.config, found.where), _size(found, options, config))
        lit = instantiate_module(LitMatryoshka, deepcopy(config))  # which puts objects into it
        with torch.device("meta"):
            vlm = lit._build(on_meta=True)
    matches = {part: match(part, found.sources[part], getattr(vlm, part)) for part in PARTS}
    report(matches, [name for source in {id(s): s for s in found.sources.values()}.values() for name in source.unused])
    print_whole(pixels(found.sources["encoder"], options.backbone))
    config["llm"]["dtype"] = widest(matches["llm"].state)
    config["llm"]["tokenizer"] = str(out.resolve() / "tokenizer")
    checkpoint = {
        "state_dict": {f"vlm.{part}.{name}": t for part in PARTS for name, t in matches[part].state.items()},
        "hyper_parameters": {**config, "_instantiator": "lightning.pytorch.cli.instantiate_module"},
        "identity": lit._identity(),
        "answering": {"image_first": True, "image": vars(image)},
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
    }
    (folder / "checkpoints").mkdir()
    torch.save(checkpoint, folder / "checkpoints/last.ckpt")
    shown = {"mode": image.mode, "size": image.size}
    data = {"class_path": "lit_mm.ImageDataModule", "init_args": {"image": shown, "image_first": True}}
    _write_yaml({"model": config, "data": data}, folder)


@contextmanager
def blame(where: Path) -> Iterator[None]:
    """Errors of classes that were given what a file says are the file's.

    Raises:
        ValueError: The file describes no model.
    """
    try:
        yield
    except MALFORMED as error:
        said = " ".join(str(error).split())
        raise ValueError(f"import: {where} describes no model: {type(error).__name__}: {said:.200}") from error


MALFORMED = (AttributeError, IndexError, KeyError, RuntimeError, StrictDataclassError, TypeError, ZeroDivisionError)


def model_config(found: Found, options: argparse.Namespace) -> dict[str, Any]:
    """The config of LitMatryoshka.

    Raises:
        ValueError: The files leave something open, or say something that this package does not compute.
    """
    encoder = encoder_config(found.sources["encoder"], layer_of(found.config, found.where), options.backbone)
    source = found.sources["llm"]
    below = read_json((source.base or folder_of_files(source)) / "config.json")
    own = found.config if "text_config" in found.config or "num_attention_heads" in found.config else below
    name, overrides = llm_config(own, found.where)
    tensors = of_part(source, "llm")
    if (layers := overrides.get("num_hidden_layers", 0)) > len(tensors):
        raise ValueError(f"import: {found.where}: {layers} layers, but only {len(tensors)} weights of the LLM")
    llm = {"name_or_path": name, "config_overrides": overrides, "chat_template": "own"}
    file = found.where.with_name("generation_config.json")
    told = read_json(file).get("max_new_tokens")
    longest = ANSWER if told is None else told
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"import: {file}: max_new_tokens is {longest!r:.80}, expected 1 or more")
    config = {"encoder": encoder, "llm": llm, "parts": {part: {} for part in PARTS}, "max_new_tokens": longest}
    return config | {"scales": _scales(found, options, config)}


def widest(state: dict[str, Tensor]) -> DType:
    """The type that holds all weights of the LLM exactly; float32 if this package's LLMs have no such type."""
    name = str(reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))).removeprefix("torch.")
    return cast(DType, name) if name in get_args(DType) else "float32"


def _size(found: Found, options: argparse.Namespace, config: dict[str, Any]) -> int:
    own = config["encoder"]["init_args"]["overrides"]
    side = image_size(found.sources["encoder"], found.config, own)
    encoder = build(config["encoder"])
    only = encoder.smallest[0] if encoder.smallest != (encoder.stride, encoder.stride) else None
    size = options.size or only or side
    if not size:
        raise ValueError(f"import: {found.where} does not say how large images are: --size gives pixels of a side")
    if only and size != only:
        raise ValueError(f"import: --size is {size}, but the vision tower takes only images of {only} pixels a side")
    return size


def _scales(found: Found, options: argparse.Namespace, config: dict[str, Any]) -> list[int]:
    """As asked; as M3 writes them into its config; or one: all cells of the grid."""
    own = options.scales or found.config.get("matryoshka_vis_token_scale")
    if own:
        return sorted(map(int, own), reverse=True)
    side = _size(found, options, config)
    rows, columns = build(config["encoder"]).grid(side, side)
    return [rows * columns]


def save_tokenizer(found: Found, options: argparse.Namespace, name: str, folder: Path) -> None:
    """Save the tokenizer with its chat template.

    Raises:
        FileNotFoundError: The sources have none.
    """
    source = found.sources["llm"]
    places = [found.where.parent, folder_of_files(source), source.base]
    place = next((each for each in places if each and any(each.glob("tokenizer*"))), found.where.parent)
    file = place / "chat_template.jinja"
    own = file.read_text(encoding="utf-8") if file.is_file() else ""
    is_exported = for_texts(own) != own  # `export` made it of the model's template
    default: Template = "vicuna_v1" if name == "LlamaConfig" and not is_exported else "own"
    tokenizer = load_tokenizer(LLM(str(place), chat_template=options.chat_template or default))
    tokenizer.chat_template = for_texts(str(tokenizer.chat_template))
    tokenizer.save_pretrained(folder)


def _write_yaml(config: dict[str, Any], folder: Path) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
