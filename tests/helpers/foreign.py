"""Models of other authors with random weights, in the layouts in which their code saves them.

LLaVA, M3 and ConvLLaVA are built by the names in their code: a Llama whose `model` also has `mm_projector` and
`vision_tower` (llava/model/llava_arch.py, multimodal_encoder/clip_encoder.py and convnext_encoder.py).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.helpers.environment import TOKENIZER

WIDTH = 32
CLIP = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
LLAMA = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 640, "rope_theta": 5000.0, "max_position_embeddings": 512}


def scrambled(model: nn.Module, seed: int = 0) -> Any:
    """With random numbers in every parameter, large enough to show where one is in the wrong place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def clip_tower(heads: int = 4, **fields: Any) -> CLIPVisionModel:
    return scrambled(CLIPVisionModel(CLIPVisionConfig(**{**CLIP, "num_attention_heads": heads, **fields})), 1)


def convnext_tower(stages: int = 5) -> ConvNextModel:
    sizes = {"hidden_sizes": [8, 16, 24, 32, 40][:stages], "depths": [1, 1, 2, 1, 2][:stages]}
    return scrambled(ConvNextModel(ConvNextConfig(**sizes, num_stages=stages, layer_norm_eps=1e-6)), 2)


def llama(**fields: Any) -> LlamaForCausalLM:
    return scrambled(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **fields})), 3)


@dataclass
class Llava:
    """LLaVA's, M3's or ConvLLaVA's modules."""

    llm: LlamaForCausalLM
    projector: nn.Sequential
    tower: CLIPVisionModel | ConvNextModel

    def grid(self, pixels: Tensor) -> Tensor:
        """[B, C, h, w], as `feature_select` and the ConvNeXt tower's `forward` choose it."""
        if isinstance(self.tower, ConvNextModel):
            return self.tower.encoder(self.tower.embeddings(pixels)).last_hidden_state
        cells = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        side = round(cells.shape[1] ** 0.5)
        return cells.unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def tokens(self, pixels: Tensor) -> Tensor:
        return self.projector(self.grid(pixels).flatten(2).transpose(1, 2))

    def logits(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Of the image and then the text."""
        embeddings = torch.cat([self.tokens(pixels), self.llm.get_input_embeddings()(ids)], 1)
        return self.llm(inputs_embeds=embeddings).logits

    def state(self, tower: str | None = None) -> dict[str, Tensor]:
        """By the authors' names; `tower` is what stands before the names in the tower, None leaves it out."""
        own = {f"model.mm_projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}
        if tower is not None:
            own |= {f"{tower}{name}": tensor for name, tensor in self.tower.state_dict().items()}
        return {**self.llm.state_dict(), **own}

    def config(self, **fields: Any) -> dict[str, Any]:
        """As their config.json."""
        layer = -1 if isinstance(self.tower, ConvNextModel) else -2
        told = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": layer, "mm_vision_select_feature": "patch"}
        told |= {"mm_use_im_start_end": False, "image_aspect_ratio": "pad", "model_type": "llava_llama"}
        return {**self.llm.config.to_dict(), **told, "architectures": ["LlavaLlamaForCausalLM"], **fields}


def llava(tower: CLIPVisionModel | ConvNextModel, **llm: Any) -> Llava:
    width = 64 if isinstance(tower, CLIPVisionModel) else tower.config.hidden_sizes[-1]
    projector = nn.Sequential(nn.Linear(width, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    return Llava(llama(**llm), scrambled(projector, 4), tower)


def write_folder(folder: Path, state: dict[str, Tensor], config: dict[str, Any], kind: str = "safetensors") -> Path:
    """Shards with an index (or one file: `bin`), config.json and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif state:
        save_torch_state_dict(state, folder, max_shard_size="20KB", safe_serialization=kind == "safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


class ResidualAttentionBlock(nn.Module):
    """A block of open_clip's ViT (open_clip/transformer.py)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2, self.mlp = nn.LayerNorm(width), nn.Sequential()
        for name, module in {"c_fc": nn.Linear(width, 96), "gelu": nn.GELU(), "c_proj": nn.Linear(96, width)}.items():
            self.mlp.add_module(name, module)

    def forward(self, cells: Tensor) -> Tensor:
        normed = self.ln_1(cells)
        cells = cells + self.attn(normed, normed, normed, need_weights=False)[0]
        return cells + self.mlp(self.ln_2(cells))


class OpenClipViT(nn.Module):
    """open_clip's ViT by the names in its code, up to the second-to-last block."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4, side: int = 4, patch: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(side * side + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))
        self.proj = nn.Parameter(torch.empty(width, 16))

    def grid(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        cells = self.ln_pre(torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + self.positional_embedding)
        for block in self.transformer.resblocks[:-1]:
            cells = block(cells)
        return cells[:, 1:].transpose(1, 2).unflatten(2, patches.shape[2:])
