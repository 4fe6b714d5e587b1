"""The plugin for lmms-eval: `lmms-eval --model lit_mm --model_args pretrained=RUN,tokens=36`.

lmms-eval calls `manifest` at every start, by the entry point `lmms_eval.models`, so nothing heavy is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Where lmms-eval finds the models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("lit_mm", f"{__name__}.models.SimpleModel", f"{__name__}.models.ChatModel")
