"""Published configs of the LLMs in the recipes, so that costs can be computed without a network.

The values are those of each model's config.json on the hub, and tests compare the resulting parameter
counts with the published ones.
"""

from __future__ import annotations

import logging
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from lit_mm.model.llm import from_source


def _sizes(width: int, layers: int, heads: int, kv_heads: int, head: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": inner,
    }


def _rope(theta: float, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | others}


VICUNA = _rope(10000.0) | {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN3 = _rope(1000000.0) | {
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SMOLLM2 = _rope(100000.0) | {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
STRETCHED = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA32 = _rope(500000.0, rope_type="llama3", **STRETCHED) | {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "lmsys/vicuna-7b-v1.5": ("LlamaConfig", VICUNA | _sizes(4096, 32, 32, 32, 128, 11008)),
    "Qwen/Qwen3-0.6B": ("Qwen3Config", QWEN3 | _sizes(1024, 28, 16, 8, 128, 3072)),
    "Qwen/Qwen3-1.7B": ("Qwen3Config", QWEN3 | _sizes(2048, 28, 16, 8, 128, 6144)),
    "Qwen/Qwen3-4B": ("Qwen3Config", QWEN3 | _sizes(2560, 36, 32, 8, 128, 9728)),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("LlamaConfig", SMOLLM2 | _sizes(576, 30, 9, 3, 64, 1536)),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("LlamaConfig", SMOLLM2 | _sizes(960, 32, 15, 5, 64, 2560)),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        "LlamaConfig",
        SMOLLM2 | _rope(130000.0) | _sizes(2048, 24, 32, 32, 64, 8192),
    ),
    "meta-llama/Llama-3.2-1B-Instruct": ("LlamaConfig", LLAMA32 | _sizes(2048, 16, 32, 8, 64, 8192)),
    "meta-llama/Llama-3.2-3B-Instruct": ("LlamaConfig", LLAMA32 | _sizes(3072, 28, 24, 8, 128, 8192)),
}
"""Hub name -> the config class of transformers and its keywords."""


def config_of(source: str) -> PretrainedConfig:
    """The config of a pretrained LLM, without weights and if possible without a network.

    Looks on this machine first (a folder, a GGUF file, the hub's cache), then in the table of published
    configs, with a note in the log, and finally on the hub.

    Args:
        source: As in `LLM.name_or_path`, but not the name of a config class.

    Raises:
        FileNotFoundError: None of these has it, or a folder, file or package does not exist.
    """
    try:
        config: PretrainedConfig = from_source(AutoConfig, source, local_files_only=True)
    except FileNotFoundError:
        if source in PUBLISHED:
            logging.getLogger(__name__).warning(f"{source}: not on this machine, using its published config")
            return published(source)
        config = from_source(AutoConfig, source)
    return config


def published(source: str) -> PretrainedConfig:
    """The config of a model in `PUBLISHED`."""
    kind, sizes = PUBLISHED[source]
    config: PretrainedConfig = getattr(transformers, kind)(**sizes)
    return config
