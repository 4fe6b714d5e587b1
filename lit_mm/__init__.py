"""Large multimodal models with elastic visual tokens, on Lightning.

The public names are imported when they are first used, so that `import lit_mm` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ConvNeXtEncoder": "model.encoder",
    "ExtraStage": "model.encoder",
    "TimmEncoder": "model.encoder",
    "MatryoshkaProjector": "model.projector",
    "LLM": "model.llm",
    "load_llm": "model.llm",
    "load_tokenizer": "data.tokenizer",
    "MatryoshkaVLM": "model.vlm",
    "DemoDataModule": "data.boards",
    "EasyVQADataModule": "data.easy_vqa",
    "ImageDataModule": "data.datamodules",
    "ImageOptions": "data.images",
    "RenderedDataModule": "data.rendered",
    "Subset": "data.dataset",
    "VideoShapesDataModule": "data.clips",
    "VideoDataModule": "data.datamodules",
    "VideoOptions": "data.video",
    "Model": "inference.answering",
    "load": "hub.loading",
    "LitMatryoshka": "training.module",
    "FSDP": "training.strategies",
    "FSDP1": "training.strategies",  # gone, says so
    "FSDP2": "training.strategies",  # FSDP's old name, for this release
    "FusedAdamW": "training.optim",
    "InitFrom": "training.checkpoints",
    "Consistency": "model.loss",
    "Part": "training.parts",
    "Parts": "training.parts",
    "LLMPart": "training.parts",
    "LoRA": "training.parts",
    "MuonAdamW": "training.optim",
    "WarmupCosine": "training.schedule",
    "AnswerGallery": "callbacks.gallery",
    "BenchmarkEvaluation": "callbacks.benchmark_evaluation",
    "TokenEfficiency": "callbacks.token_efficiency",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in ("EasyVQA", "ImageInstructions", "VideoInstructions", "VideoShapes"):
        renamed = import_module("lit_mm.renamed")
        renamed.warn(f"lit_mm.{name}", f"lit_mm.{renamed.CLASSES[name]}")
        name = renamed.CLASSES[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
