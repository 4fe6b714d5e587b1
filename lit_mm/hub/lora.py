"""Low-rank adapters: a run's, and those in folders that peft or LLaVA wrote, merged into the weights they adapt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_mm.hub.reading import Readers, read_file, read_json

ADAPTED = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
"""peft's names for the weight of an adapted layer and the two matrices of its adapter."""
OTHERS = (
    *("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication", "megatron_config"),
    *("lora_bias", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
)
"""Fields of an adapter_config.json that make adapters something other than `base + scaling * B A`."""
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""


@dataclass
class Adapter:
    """Adapters and the weights that trained beside them, by the names of the model that they belong to.

    Args:
        tensors: Their tensors.
        scaling: The factor of an adapter's output.
    """

    tensors: Readers
    scaling: float


def read_adapter(folder: Path) -> Adapter | None:
    """A folder of adapters, with LLaVA's `non_lora_trainables.bin` if it is there; None if it is not such a folder.

    Raises:
        ValueError: The adapters are of a kind that is not merged here.
        FileNotFoundError: There is an adapter_config.json without its weights.
    """
    config = read_json(file := folder / "adapter_config.json")
    if not config:
        return None
    kind, others = config.get("peft_type"), [name for name in OTHERS if config.get(name)]
    others += [] if config.get("init_lora_weights") in INITIAL else ["init_lora_weights"]
    if kind != "LORA" or others or config.get("bias", "none") != "none":
        said = ", ".join(f"{name} {config.get(name)!r:.40}" for name in ("peft_type", "bias", *others))
        raise ValueError(f"{file}: {said}; expected plain LoRA (peft_type LORA, bias none)")
    weights = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    found = [each for each in weights if each.is_file()]
    if not found:
        raise FileNotFoundError(f"{file}: no adapter_model.safetensors or adapter_model.bin beside it")
    beside = folder / "non_lora_trainables.bin"
    files = [found[0], beside] if beside.is_file() else [found[0]]
    tensors = {_model_name(name): read for each in files for name, read in read_file(each).items()}
    return Adapter(tensors, _scaling(config, file))


def base_of(folder: Path) -> str:
    """The model that adapters were trained on, as their config names it.

    Raises:
        ValueError: It does not.
    """
    named = read_json(file := folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{file}: base_model_name_or_path is {named!r}, expected the model that the adapters are for")
    return named


def _scaling(config: dict[str, Any], file: Path) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ValueError(f"{file}: r {rank!r}, lora_alpha {alpha!r}: expected two numbers")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _model_name(name: str) -> str:
    """peft's name of a tensor -> the adapted model's, with the adapter's own name where a file leaves it out."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".lora_A.weight", f".{ADAPTED[1]}").replace(".lora_B.weight", f".{ADAPTED[2]}")


def merged_adapter(tensors: Readers, scaling: float) -> Readers:
    """Weights with the adapters beside them merged, where the adapted weights have their plain names."""
    layers = {name.removesuffix(f".{ADAPTED[1]}") for name in tensors if name.endswith(ADAPTED[1])}
    named = {f"{layer}.weight": f"{layer}.{ADAPTED[0]}" for layer in layers}
    return merged({named.get(name, name): read for name, read in tensors.items()}, scaling)


def merged(tensors: Readers, scaling: float) -> Readers:
    """Weights with their adapters merged: `base + scaling * B A`, computed in float32 when a weight is read.

    Raises:
        ValueError: An adapter lacks one of its matrices or the weight that it adapts; or, when a weight is read, its
            matrices do not fit the weight.
    """

    def adapted(layer: str) -> Tensor:
        base, down, up = (tensors[f"{layer}.{end}"]() for end in ADAPTED)
        if down.ndim != 2 or up.ndim != 2 or base.shape != (len(up), down.shape[1]) or up.shape[1] != len(down):
            shapes = f"B {list(up.shape)} and A {list(down.shape)}, its weight is {list(base.shape)}"
            raise ValueError(f"the adapter of {layer} is {shapes}: was it trained on another base?")
        return (base.float() + scaling * (up.float() @ down.float())).to(base.dtype)

    layers = [name.removesuffix(f".{ADAPTED[1]}") for name in tensors if name.endswith(ADAPTED[1])]
    if lacking := [f"{layer}.{end}" for layer in layers for end in ADAPTED if f"{layer}.{end}" not in tensors]:
        raise ValueError(f"adapters without {', '.join(lacking[:3])} ({len(lacking)} such names)")
    used = {f"{layer}.{end}" for layer in layers for end in ADAPTED}
    plain = {name.replace(".base_layer.", "."): read for name, read in tensors.items() if name not in used}
    return plain | {f"{layer}.weight": partial(adapted, layer) for layer in layers}
