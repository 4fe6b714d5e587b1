"""The layouts of published weights -> this package's names: `encoder.trunk.…`, `projector.layers.…`, `llm.…`.

A tower is found by the name of one of its weights, with whatever prefix; what stands beside it is known by its name.
Names that no layout explains stay as they are, so that whoever copies the weights finds them unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_mm.hub.lora import base_of, merged_adapter, read_adapter
from lit_mm.hub.reading import BIN, Readers, find, read_file, read_folder

Layout = Literal["llava", "hf_llava", "projector", "convnext", "clip", "open_clip", "timm", "llm", "own"]
LAYOUTS: dict[Layout, str] = {
    "llava": "LLaVA-1.5, M3 and ConvLLaVA: model.mm_projector.…, perhaps model.vision_tower.… or vision_tower/, or "
    "LoRA adapters with non_lora_trainables.bin",
    "hf_llava": "transformers' LlavaForConditionalGeneration",
    "projector": "LLaVA's mm_projector.bin",
    "convnext": "transformers' ConvNextModel and ConvNextForImageClassification, four or more stages",
    "clip": "transformers' CLIPVisionModel and CLIPModel",
    "open_clip": "open_clip's ConvNeXt and ViT (visual.…)",
    "timm": "timm's ConvNeXt and ViT",
    "llm": "a causal LM of transformers, perhaps with peft's adapters",
    "own": "a run, a checkpoint or an export of this package",
}
OWN = ("encoder.trunk.", "projector.layers.", "llm.", "trunk.", "layers.")
"""What names of this package's weights begin with, of a whole model or one part."""
Tower = Literal["convnext", "clip", "open_clip", "timm"]

ANCHORS: dict[str, Tower] = {
    "embeddings.patch_embeddings.weight": "convnext",
    "embeddings.class_embedding": "clip",
    "visual.class_embedding": "open_clip",
    "stem.0.weight": "timm",
    "patch_embed.proj.weight": "timm",
}
"""A weight that every tower of a kind has, and no other."""
PROJECTOR = re.compile(r"(?:^|\.)(mm_projector\.|multi_modal_projector\.linear_)(\d+)\.(weight|bias)$")
EMBEDDINGS = re.compile(
    r"(?:^|\.)(embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed|embeddings?|embed|emb)"
    r"(\.base_layer)?\.weight$"
)
"""The table of token embeddings, which every LLM has."""
BESIDE = re.compile(
    r"(text_model|text_projection|visual_projection|logit_scale|logit_bias|classifier|visual\.(proj|head|attn_pool)"
    r"|transformer|token_embedding|positional_embedding|ln_final|text)(\.|$)"
)
"""What stands beside a tower and has no part in its grid: CLIP's text side and the classifiers."""

CONVNEXT = [
    (r"^layernorm\.", "norm."),
    ("layer_scale_parameter", "gamma"),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.", "stages."),
    ("downsampling_layer", "downsample"),
    (r"\.layers\.", ".blocks."),
    ("dwconv", "conv_dw"),
    (r"\.layernorm\.", ".norm."),
    ("pwconv1", "mlp.fc1"),
    ("pwconv2", "mlp.fc2"),
]
CLIP = [
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm", ".norm"),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
]
OPEN_CLIP = [
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_", ".norm"),
    (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
]
NAMES: dict[Tower, list[tuple[str, str]]] = {"convnext": CONVNEXT, "clip": CLIP, "open_clip": OPEN_CLIP, "timm": []}
"""Regular expressions from the names in a tower of each kind to timm's."""


@dataclass
class Source:
    """Weights by this package's names.

    Args:
        where: Their file or folder.
        layout: What they were found to be; None: no layout explains their names.
        tensors: The weights.
        unused: Their names of what the model has no use for.
        base: The folder of the model that adapters were trained on.
    """

    where: Path
    layout: Layout | None
    tensors: Readers
    unused: list[str]
    base: Path | None = None


def open_source(path: Path, option: str, base: str | None = None) -> Source:
    """Open a file or folder of weights in any of the layouts.

    Args:
        path: The file or folder.
        option: What errors call it.
        base: The model that adapters were trained on; None: the one that their config names.

    Raises:
        FileNotFoundError: It has no weights in a known format; the message lists the layouts.
        ValueError: A file is damaged or holds more than tensors, it has two towers, or its adapters are of a kind that
            is not merged here.
    """
    adapter = read_adapter(path) if path.is_dir() else None
    below = _base(path, option, base) if adapter else None
    raw = _raw(below or path)
    if not raw:
        raise FileNotFoundError(unknown(below or path, option))
    layout, tensors, unused = translate(raw | (adapter.tensors if adapter else {}), path)
    if adapter:
        tensors = merged_adapter(tensors, adapter.scaling)
    return Source(path, layout, tensors, unused, below)


def _base(folder: Path, option: str, base: str | None) -> Path:
    """The folder of the model that adapters were trained on.

    Raises:
        FileNotFoundError: It is not at hand.
    """
    if base:
        return find(base, f"{option}: --base")
    try:
        return find(base_of(folder), option)
    except FileNotFoundError as error:
        file = folder / "adapter_config.json"
        raise FileNotFoundError(f"{file}: base_model_name_or_path: {error}; `import --base` names another") from None


def unknown(path: Path, option: str, names: Sequence[str] = ()) -> str:
    """What a path holds instead of weights, or the first names of weights that no layout explains; and the layouts."""
    files = sorted(file.name for file in path.iterdir())[:8] if path.is_dir() else [path.name]
    first = ", ".join(f"{name:.80}" for name in names[:3])
    found = f"weights of no known layout ({first})" if names else f"no weights found in {files or 'nothing'}"
    known = "\n  ".join(LAYOUTS.values())
    return f"{option}: {path}: {found}; expected a file or folder of\n  {known}"


def _raw(path: Path) -> Readers:
    """Tensors by their authors' names; ConvLLaVA saves the tower that it trained in a folder of its own."""
    if path.is_file():
        known = path.suffix in (".safetensors", *BIN)
        return read_file(path) if known else {}
    tower = {f"model.vision_tower.{name}": read for name, read in read_folder(path / "vision_tower").items()}
    own = read_folder(path)
    if not own and (projector := path / "mm_projector.bin").is_file():
        own = read_file(projector)
    return tower | own


def translate(raw: Readers, where: Path) -> tuple[Layout | None, Readers, list[str]]:
    """Their names -> the layout (None: not recognized), the tensors by our names, and the names of what is not used.

    Raises:
        ValueError: There are two towers.
    """
    raw = {name.removeprefix("module."): read for name, read in raw.items()}  # of DistributedDataParallel
    found = towers(raw)
    if len(found) > 1:
        raise ValueError(f"{where} has two vision towers: {' and '.join(f'{prefix}…' for prefix in found)}")
    is_llava = any(PROJECTOR.search(name) for name in raw)
    if not found and not is_llava:
        is_own = any(name.startswith(OWN) for name in raw)
        return "own" if is_own else "llm" if any(map(EMBEDDINGS.search, raw)) else None, raw, []
    [(prefix, kind)] = found.items() or [("\0", None)]
    tower = {name.removeprefix(prefix): read for name, read in raw.items() if name.startswith(prefix)}
    tensors = {f"encoder.trunk.{name}": read for name, read in _trunk(kind, tower).items()} if kind else {}
    rest = {name: _beside(name, is_llava) for name in raw if not name.startswith(prefix)}
    tensors |= {ours: raw[name] for name, ours in rest.items() if ours}
    unused = [name for name, ours in rest.items() if not ours]
    return _layout(raw, kind, tensors), tensors, unused


def _layout(raw: Readers, kind: Tower | None, tensors: Readers) -> Layout:
    if any("multi_modal_projector" in name for name in raw):
        return "hf_llava"
    if any(name.startswith("llm.") for name in tensors) or kind is None:
        return "llava" if any(name.startswith("llm.model.layers") for name in tensors) else "projector"
    return "open_clip" if any(name.startswith("visual.") for name in raw) else kind


def towers(raw: Readers) -> dict[str, Tower]:
    """The prefix of each vision tower, and its kind; none for this package's own encoders (`trunk.…`)."""
    found: dict[str, Tower] = {}
    for name in raw:
        for anchor, kind in ANCHORS.items():
            prefix = name.removesuffix(anchor.removeprefix("visual."))
            whole = name == anchor or name.endswith(f".{anchor}")
            if whole and prefix not in ("trunk.", "encoder.trunk."):
                found[prefix] = kind
    return found


def _beside(name: str, is_llava: bool) -> str | None:
    """Our name of a weight outside the tower; None: not used."""
    if match := PROJECTOR.search(name):
        layer = int(match[2]) if match[1] == "mm_projector." else 2 * int(match[2]) - 2  # linear_1 is layer 0
        return f"projector.layers.{layer}.{match[3]}"
    if not is_llava:
        return None if BESIDE.match(name) else f"encoder.{name}"
    if name.startswith("language_model."):  # transformers 4
        return f"llm.{name.removeprefix('language_model.')}"
    return f"llm.{name.replace('model.language_model.', 'model.', 1)}"


def _trunk(kind: Tower, tower: Readers) -> Readers:
    """A tower's weights by timm's names and in its shapes."""
    trunk: Readers = {}
    for theirs, read in tower.items():
        name = theirs
        for pattern, ours in NAMES[kind]:
            name = re.sub(pattern, ours, name)
        trunk[name] = read
    if kind in ("clip", "open_clip"):
        _reshape(trunk)
    return trunk


def _reshape(trunk: Readers) -> None:
    """A CLIP's class token, positions, and joint queries, keys and values, as timm has them."""
    trunk.pop("embeddings.position_ids", None)
    for name, shape in (("cls_token", (1, 1, -1)), ("pos_embed", (1, -1))):
        if name in trunk:
            trunk[name] = partial(_viewed, trunk[name], shape)
    for query in [name for name in trunk if ".attn.q_proj." in name]:
        names = [query.replace(".q_proj.", f".{each}_proj.") for each in "qkv"]
        if all(name in trunk for name in names):
            trunk[query.replace("q_proj", "qkv")] = partial(_joined, [trunk.pop(name) for name in names])


def _viewed(read: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
    tensor = read()
    return tensor.reshape(shape) if len(shape) == 3 else tensor[None]


def _joined(reads: list[Callable[[], Tensor]]) -> Tensor:
    return torch.cat([read() for read in reads])


def is_after_grid(name: str, expected: Collection[str]) -> bool:
    """Whether a weight of an encoder's source comes after the grid, so that the encoder has no use for it: later
    blocks, the last norm, the head.

    Args:
        name: Its name in the encoder (`trunk.blocks.23.norm1.weight`).
        expected: The names of the encoder's own weights.
    """
    if name in expected:
        return False
    if match := re.match(r"trunk\.blocks\.(\d+)\.", name):
        own = [re.match(r"trunk\.blocks\.(\d+)\.", each) for each in expected]
        return int(match[1]) > max((int(each[1]) for each in own if each), default=int(match[1]))
    before = r"norm_pre|" if "trunk.stem.0.weight" in expected else ""  # a ConvNeXt's is its last norm
    return re.match(rf"trunk\.({before}norm|fc_norm|head|head_norm|attn_pool)\.", name) is not None
