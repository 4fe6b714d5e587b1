"""Models of a few thousand parameters, in float32 or float64."""

from functools import partial

import torch

from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.model.attention import NAME
from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage
from lit_mm.model.llm import LLM, load_llm
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from tests.helpers.environment import TOKENIZER

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}


CLASSES = {
    "cohere": "CohereConfig",
    "gemma": "GemmaConfig",
    "granite": "GraniteConfig",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "olmo": "OlmoConfig",
    "olmo2": "Olmo2Config",
    "phi3": "Phi3Config",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "smollm3": "SmolLM3Config",
    "starcoder2": "Starcoder2Config",
}


EXTRA = {
    "gemma": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "phi3": {"pad_token_id": 0},
}


def tiny_llm(source: str = "LlamaConfig", dtype: str = "float32", **sizes) -> LLM:
    return LLM(source, {**SIZES, **sizes}, TOKENIZER, "bare", dtype)


def tiny_encoder() -> ConvNeXtEncoder:
    """Stride 16 after five stages, 24 channels."""
    overrides = {
        "patch_size": 1,
        "depths": [1, 1, 1, 1],
        "dims": [8, 8, 12, 16],
        "kernel_sizes": 3,
        "ls_init_value": 1.0,
    }
    return ConvNeXtEncoder("convnext_atto", [ExtraStage(1, 24, 1.0)], overrides=overrides)


def tiny_vlm(
    scales=(16, 4, 1), source: str = "LlamaConfig", dtype: str = "float32", time_scales=(), **sizes
) -> MatryoshkaVLM:
    torch.manual_seed(0)
    llm = tiny_llm(source, dtype, **sizes)
    encoder, model = tiny_encoder(), load_llm(llm, load_tokenizer(llm))
    projector = MatryoshkaProjector(24, 32, scales)
    return MatryoshkaVLM(encoder, projector, model, time_scales).to(getattr(torch, dtype)).eval()


def tiny_vlm64(**options) -> MatryoshkaVLM:
    """In float64 throughout: transformers computes RMSNorm in float32 even in a float64 model."""
    vlm = tiny_vlm(dtype="float64", **options)
    for module in vlm.llm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
    return vlm


def rms_norm(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return module.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)


def packing_vlm(**options) -> MatryoshkaVLM:
    """With the attention of packed sequences."""
    vlm = tiny_vlm(**options)
    vlm.llm.set_attn_implementation(NAME)
    return vlm


def packing_vlm64(**options) -> MatryoshkaVLM:
    """The same in float64."""
    vlm = tiny_vlm64(**options)
    vlm.llm.set_attn_implementation(NAME)
    return vlm


def gradients(total, vlm):
    found = torch.autograd.grad(total, list(vlm.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, vlm.parameters(), strict=True)]
