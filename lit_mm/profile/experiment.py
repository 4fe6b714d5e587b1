"""Builds the models that configs describe on `meta`, i.e. without weights.

Only the `model` section is read. A pretrained LLM's tokenizer is not loaded and nothing is downloaded: its
config comes from this machine or from the table of published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from transformers import AutoModelForCausalLM

from lit_mm.costs.flops import Size
from lit_mm.costs.llm_shapes import config_of
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.model.encoder import ConvNeXtEncoder, Encoder, TimmEncoder
from lit_mm.model.llm import DType, load_config
from lit_mm.model.router import Router
from lit_mm.model.scales import Scale, all_scales, check_scales, nested_shapes
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.renamed import accept_old_names, with_new_arguments
from lit_mm.training.module import LitMatryoshka


@dataclass
class Experiment:
    """One configured model.

    Args:
        name: Its name in tables and pictures.
        model: The fields of the config's `model` section, as LitMatryoshka takes them.
        sizes: Height and width of the images to profile; empty: the size that fits the finest scale.
        dtype: Dtype of the weights.
    """

    name: str
    model: Any
    sizes: list[Size]
    dtype: DType

    def __post_init__(self) -> None:
        check_scales(self.model.scales)
        with torch.device("meta"):
            self.encoder: Encoder = self.model.encoder()
        llm = self.model.llm
        self.llm = load_config(llm, load_tokenizer(llm)) if llm.config_overrides else config_of(llm.name_or_path)
        self.sizes = self.sizes or [self._own_size()]

    def build(self, device: str = "meta") -> MatryoshkaVLM:
        """The model with random weights, or without weights on `meta`."""
        dtype = getattr(torch, self.dtype)
        with torch.device(device):
            known = isinstance(self.encoder, ConvNeXtEncoder | TimmEncoder)
            encoder: Encoder = self.model.encoder(**({"pretrained": False} if known else {}))
            llm = AutoModelForCausalLM.from_config(self.llm, dtype=dtype)
            width = llm.get_input_embeddings().embedding_dim
            layout = self.model.scales, self.model.sampling, self.model.pooling
            projector, options = self.model.projector(encoder.num_features, width, *layout), self.model.router
            router = Router(width, len(self.model.scales), options) if options else None
        return MatryoshkaVLM(encoder.to(dtype), projector.to(dtype), llm, self.model.time_scales or (), router).eval()

    @property
    def frames(self) -> int:
        """Images encoded for an answer: with time scales, as many as the finest one has."""
        return max(self.model.time_scales or [1])

    def scales(self, size: Size) -> tuple[list[Scale], str]:
        """The scales for images of a size, finest first, and a note if they are not the experiment's.

        If the experiment's scales do not fit the grid, repeated pooling with the smallest window gives
        others, as in M3: 24×24, 12×12, 6×6, 3×3, 1.
        """
        rows, columns = self.encoder.grid(*size)
        scales, note = list(self.model.scales), ""
        try:
            nested_shapes(rows, columns, tuple(scales), self.model.sampling, self.model.pooling)
        except ValueError as error:
            scales = pooled_again(rows, columns)
            note = f"{error}; shown are {', '.join(map(str, scales))}"
        return all_scales(scales, self.model.time_scales or ()), note

    def _own_size(self) -> Size:
        """The only size that the encoder takes, or the square with as many grid cells as the finest scale."""
        height, width = self.encoder.smallest
        if (height, width) != (self.encoder.stride, self.encoder.stride):
            return height, width
        side = isqrt(self.model.scales[0])
        if side**2 != self.model.scales[0]:
            raise ValueError(f"{self.name}: no square grid has {self.model.scales[0]} cells, give --sizes")
        return side * self.encoder.stride, side * self.encoder.stride


def pooled_again(rows: int, columns: int) -> list[int]:
    """Scales of a grid by repeated pooling with the smallest square window that fits, down to one token."""
    scales = [rows * columns]
    while windows := [k for k in range(2, min(rows, columns) + 1) if not (rows % k or columns % k)]:
        rows, columns = rows // windows[0], columns // windows[0]
        scales.append(rows * columns)
    return scales if scales[-1] == 1 else [*scales, 1]


def read_model(files: Sequence[str], overrides: Sequence[str]) -> Any:
    """The fields of the `model` section of configs, later ones overriding earlier ones, then of `--model.…` overrides.

    Encoder, LLM and parts become objects. All other sections are ignored.

    Raises:
        FileNotFoundError: A config does not exist.
        ValueError: A config is not YAML, or has no sections.
    """
    accept_old_names()
    parser = ArgumentParser("python -m lit_mm profile", usage="%(prog)s --config FILE [--model.FIELD VALUE …]")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(LitMatryoshka, "model", instantiate=False)
    others = sorted({key for file in files for key in _sections(file)} - {"model"})
    for section in others:
        parser.add_argument(f"--{section}", type=Any)
    config = parser.parse_args(
        [*(word for file in files for word in ("--config", file)), *with_new_arguments(overrides)]
    )
    for section in others:  # or their classes would be built too
        config[section] = None
    return parser.instantiate(config).model


def _sections(file: str) -> list[str]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"--config: no file {file}")
    try:
        found = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--config {file}: expected sections such as model, found {type(found).__name__}")
    return list(found)
