"""Trained runs -> models that answer, without the config that trained them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.utilities import rank_zero_warn

from lit_mm.data.images import ImageOptions
from lit_mm.data.video import VideoOptions
from lit_mm.evaluation.calibration import CHOOSER
from lit_mm.hub.folders import open_folder
from lit_mm.inference.answering import Model
from lit_mm.inference.choosers import Calibrated, read_chooser
from lit_mm.model.hub import folder_of, is_hub_name
from lit_mm.model.scales import Scale
from lit_mm.renamed import with_new_names
from lit_mm.training.checkpoints import InitFrom, is_export, own_config, start_from
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.resume import check_model, scales_in
from lit_mm.training.saving import SHARDED, find_checkpoint, load_tensors

PATTERNS = ["*.json", "*.jinja", "*.safetensors", "README.md"]
"""What is fetched of a model on the hub: all but its code."""
TOKENIZER = "tokenizer"
"""The folder in a run's folder that holds the tokenizer with its chat template."""


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    image: ImageOptions | None = None,
    video: VideoOptions | None = None,
    mean_tokens: float | None = None,
    scales: list[int] | None = None,
    module: LitMatryoshka | None = None,
) -> Model:
    """Open a trained model, with adapters merged and without quantization, which a warning says, and with the chooser
    of its run, if it was calibrated.

    Args:
        path: A run's folder, a folder of runs (its newest), a checkpoint, sharded or not, or what `export` wrote: a
            folder, or a name on the hub (`owner/name`, `owner/name@revision`).
        device: Where it computes; None: a GPU if there is one.
        dtype: Type of its weights; None: as configured.
        image: How images are brought to size; None: as in training.
        video: Which frames of a video are shown; None: as in training.
        mean_tokens: Visual tokens of a question that the chooser may spend on average; None: as calibrated.
        scales: Visual tokens per image to answer at, finest first, also others than in training; None: those of
            training. `Model.trained_scales` has these in any case. The chooser is left out unless mean_tokens asks
            for it.
        module: For a run that a script or a notebook trained, whose checkpoint does not describe its model: the
            LightningModule, made as for training. It gets the checkpoint's weights, and answers at its own scales.

    Returns:
        A model that answers; see `Model.answer`.

    Raises:
        FileNotFoundError: No such checkpoint, no chooser for mean_tokens, or a tokenizer or LLM config that is not at
            hand.
        ValueError: The checkpoint does not describe its model, or holds more than tensors, or its tokens depend on
            the scales (adaptive pooling) and there are others; `export` did not write what the hub has; or no such
            device.
    """
    if module and (scales or is_export(Path(path))):
        raise ValueError("load: module: expected a checkpoint without scales, as the module says them")
    target = _device(device)
    if is_hub_name(str(path)):
        path = _of_hub(str(path))
    if is_export(folder := Path(path).expanduser()):
        model = open_folder(folder, image, video, scales)
        model.vlm.to(target, dtype)
        if not scales or mean_tokens:
            model.chooser = _chooser(*run_of(path), model.scales, mean_tokens)
        return model
    checkpoint = checkpoint_of(path)
    saved = contents_of(checkpoint)
    described = saved.get("hyper_parameters") if isinstance(saved, dict) else None
    if module is None and (not isinstance(described, dict) or "_instantiator" not in described):
        raise ValueError(
            f"load: {checkpoint} does not describe its model, as it was not trained by the command line: "
            "give load the module that was trained, load(…, module=…)"
        )
    lit = module or _module(cast(Any, described), checkpoint.parent.parent / TOKENIZER, scales)
    identity: dict[str, Any] = saved.get("identity", {})
    if module:
        check_model(identity, module._identity())
    if lit.pooling != "exact" and lit.scales != identity.get("scales", lit.scales):
        said = f"with pooling {lit.pooling} expected those of training, {identity['scales']}, found {lit.scales}"
        raise ValueError(f"load: scales: {said}")
    lit.configure_model()
    start_from(lit.vlm, InitFrom(str(checkpoint)))
    given: dict[str, Any] = saved.get("answering", {})
    own_video = VideoOptions(**given["video"]) if given.get("video") else None
    return Model(
        lit.vlm.to(target, dtype),
        lit.tokenizer,
        image or ImageOptions(**given.get("image", {})),
        video or own_video,
        ImageOptions(**given["frame"]) if given.get("frame") else None,
        given.get("image_first", False),
        lit.max_new_tokens,
        lit.decoding,
        _chooser(*run_of(checkpoint), lit.all_scales, mean_tokens) if not scales or mean_tokens else None,
        scales_in(identity) if identity else None,
    )


def _of_hub(name: str) -> Path:
    """The folder of a name on the hub. Only its config is downloaded if `export` did not write it.

    Raises:
        FileNotFoundError: The hub has no such repository or is out of reach, and the cache lacks it.
        ValueError: `export` did not write it.
    """
    if not is_export(folder_of(name, ["config.json"], "load")):
        raise ValueError(
            f"load: {name} is not what `export` wrote: `python -m lit_mm import {name} FOLDER` brings published models "
            "into a folder that load opens"
        )
    return folder_of(name, PATTERNS, "load")


def _device(name: str | torch.device | None) -> torch.device:
    """Where the model computes.

    Raises:
        ValueError: There is no such device.
    """
    try:
        return torch.zeros(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise ValueError(f"load: device {name}: {str(error).splitlines()[0]}") from None


def run_of(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The folder that lies around a checkpoint, with its chooser and what was measured, and the step of its weights.
    Around what `export` wrote, it is that folder."""
    if is_export(folder := Path(path).expanduser()):
        return folder, own_config(folder)["step"]
    checkpoint = checkpoint_of(path)
    return checkpoint.parent.parent, contents_of(checkpoint).get("global_step")


def name_of(path: str) -> str:
    """What a model is called: its name on the hub, the name of its exported folder, or its run's folder and the one
    above it, such as quickstart/version_0."""
    if is_hub_name(path):
        return path
    if is_export(folder := Path(path).expanduser()):
        return folder.resolve().name
    checkpoint = checkpoint_of(path).resolve()
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.with_suffix("")
    return f"{run.parent.name}/{run.name}"


def checkpoint_of(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means; `last` is that of the newest run in runs."""
    return find_checkpoint(str(path), Path("runs"), "load")


def contents_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, of a sharded one without its tensors."""
    sharded = (checkpoint / SHARDED).is_file()
    return load_tensors(checkpoint / "meta.pt" if sharded else checkpoint, "load: ")


def _chooser(run: Path, step: int | None, scales: Sequence[Scale], mean_tokens: float | None) -> Calibrated | None:
    """The chooser of a run; a warning says if it was calibrated on other weights than those of this step."""
    file = run / CHOOSER
    if not file.is_file():
        if mean_tokens is not None:
            raise FileNotFoundError(f"mean_tokens {mean_tokens:g}: no {file}, `python -m lit_mm calibrate` writes it")
        return None
    chooser, at = read_chooser(file, scales, mean_tokens)
    if at != step:
        rank_zero_warn(
            f"{file} was calibrated at step {at}, the weights are of step {step}: validate and calibrate again"
        )
    return chooser


def _module(hyper_parameters: dict[str, Any], tokenizer: Path, scales: list[int] | None) -> LitMatryoshka:
    """The module of a checkpoint, perhaps with other scales, without weights of its own from elsewhere."""
    config = {name: value for name, value in hyper_parameters.items() if name != "_instantiator"}
    config = with_new_names({"model": config})["model"]
    if scales and scales != config["scales"]:
        config["router"] = None  # it has a score for each scale of training
    config["scales"] = scales or config["scales"]
    config["init_from"] = None
    if bits := config["llm"].get("quantize"):
        dtype = config["llm"].get("dtype") or "float32"
        rank_zero_warn(f"load: the LLM was trained in {bits} and is opened in {dtype}: it takes more memory")
    config["llm"] = {**config["llm"], "quantize": None}
    if config["parts"]["llm"].get("lora"):  # adapters are merged as the checkpoint is read
        rank_zero_warn("load: the LLM's adapters (LoRA) are merged into its weights")
        config["parts"]["llm"]["lora"] = None
    if tokenizer.is_dir():
        config["llm"] |= {"tokenizer": str(tokenizer), "chat_template": "own"}
    try:
        return instantiate_module(LitMatryoshka, config)
    except FileNotFoundError as error:
        if tokenizer.is_dir():
            raise
        raise FileNotFoundError(f"load: no folder {tokenizer}: copy the run's with the checkpoint. {error}") from None
