"""The adapters of a LoRA run, as a peft adapter for the exported model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lit_mm.hub.loading import checkpoint_of, contents_of
from lit_mm.inference.answering import Model
from lit_mm.training.checkpoints import Readers, Weights, expected_names, is_redundant, open_weights


@dataclass
class RunAdapter:
    """The adapters of a run's LLM.

    Args:
        rank: Of the matrices.
        alpha: Their product is scaled by alpha / rank.
        tensors: Readers of the matrices, by the LLM's names: `model.layers.0.mlp.up_proj.lora_A.default.weight`.
    """

    rank: int
    alpha: int
    tensors: Readers


def take_adapter(model: Model, path: str) -> RunAdapter:
    """Take the adapters out of a model that `load` has merged them into.

    Args:
        model: Gets the weights that the adapters were trained on.
        path: What was loaded.

    Raises:
        ValueError: It is no run with adapters, or its weights are not those of the LLM.
    """
    checkpoint = checkpoint_of(path)
    trained = contents_of(checkpoint).get("trained", {})
    if "lora rank" not in trained:
        raise ValueError(f"export: --lora adapter: {checkpoint} is not of a run with model.parts.llm.lora")
    weights = open_weights(str(checkpoint), merge=False).of("llm").tensors
    adapters = {name: read for name, read in weights.items() if ".lora_" in name}
    base = {name.replace(".base_layer.", "."): read for name, read in weights.items() if name not in adapters}
    _load(model.vlm.llm, Weights(checkpoint, base))
    return RunAdapter(trained["lora rank"], trained["lora alpha"], adapters)


def _load(llm: PreTrainedModel, weights: Weights) -> None:
    """Load the weights of an LLM.

    Raises:
        ValueError: One is missing that is not a tied head, or one is not of this LLM.
    """
    expected = expected_names(llm)
    found = llm.load_state_dict({name: read() for name, read in weights.tensors.items()}, strict=False)
    tied = set(llm.state_dict()) - set(expected)
    unexpected = [name for name in found.unexpected_keys if not is_redundant("llm", name, expected, weights)]
    if wrong := sorted({*found.missing_keys, *unexpected} - tied):
        said = f"{len(wrong)} missing or unexpected weights: {', '.join(wrong[:5])}"
        raise ValueError(f"export: --lora adapter: {weights.where} does not fit the LLM: {said}")


def write_adapter(adapter: RunAdapter, base: str, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        adapter: The adapters.
        base: What the LLM calls all but its output head, such as `model`.
        folder: Where.
    """
    folder.mkdir()
    names = {name: name.replace(f"{base}.", "model.language_model.", 1) for name in adapter.tensors}
    layers = sorted({name.partition(".lora_")[0] for name in names.values()})
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=layers, inference_mode=True)
    config.save_pretrained(str(folder))
    state = {
        f"base_model.model.{theirs.replace('.default.', '.')}": adapter.tensors[name]().contiguous()
        for name, theirs in names.items()
    }
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
