"""Configs -> the models that they describe, on `meta`: structure and sizes without weights.

Only the `model` section is read, with a run's own fields and overlays, but no tokenizer is loaded
for a pretrained LLM and nothing is fetched: its shapes come from this machine or from the table of
published ones.
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
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.scales import Scale, all_scales, check_scales, nested_shapes
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.renamed import accept_old_names, with_new_arguments
from lit_mm.training.module import LitMatryoshka


@dataclass
class Experiment:
    """One configured model.

    Args:
        name: How it is called in tables and pictures.
        model: The fields of the config's model section, as LitMatryoshka takes them.
        sizes: Height and width of the images to look at; empty: the one that the scales fit.
        dtype: Of the weights.
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
        """The model with random weights, or without any on `meta`."""
        dtype = getattr(torch, self.dtype)
        with torch.device(device):
            known = isinstance(self.encoder, ConvNeXtEncoder | TimmEncoder)
            encoder: Encoder = self.model.encoder(**({"pretrained": False} if known else {}))
            llm = AutoModelForCausalLM.from_config(self.llm, dtype=dtype)
            width = llm.get_input_embeddings().embedding_dim
            projector = MatryoshkaProjector(encoder.num_features, width, self.model.scales)
        return MatryoshkaVLM(encoder.to(dtype), projector.to(dtype), llm, self.model.time_scales or ()).eval()

    @property
    def frames(self) -> int:
        """Images that are encoded for an answer: with time scales one for each of the finest sets."""
        return max(self.model.time_scales or [1])

    def scales(self, size: Size) -> tuple[list[Scale], str]:
        """What is answered at for images of a size, finest first, and a note where it had to be chosen.

        Where the experiment's scales do not fit the grid, pooling by the smallest windows again and
        again gives others, as M3's come about: 24×24, 12×12, 6×6, 3×3, 1.
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
        """The only size that the encoder takes, or the square whose cells are the finest scale."""
        height, width = self.encoder.smallest
        if (height, width) != (self.encoder.stride, self.encoder.stride):
            return height, width
        side = isqrt(self.model.scales[0])
        if side**2 != self.model.scales[0]:
            raise ValueError(f"{self.name}: no square grid has {self.model.scales[0]} cells, give --sizes")
        return side * self.encoder.stride, side * self.encoder.stride


def pooled_again(rows: int, columns: int) -> list[int]:
    """Scales of a grid by pooling with the smallest square windows that fit, down to one token."""
    scales = [rows * columns]
    while windows := [k for k in range(2, min(rows, columns) + 1) if not (rows % k or columns % k)]:
        rows, columns = rows // windows[0], columns // windows[0]
        scales.append(rows * columns)
    return scales if scales[-1] == 1 else [*scales, 1]


def read_model(files: Sequence[str], overrides: Sequence[str]) -> Any:
    """The fields of the model section of configs laid over each other, then of `--model.…` overrides.

    Encoder, LLM and parts become objects; nothing else is built. What else the files configure is
    left unread.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: A config is no YAML, or no sections.
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
    for section in others:  # whose classes would be built with the model's
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
