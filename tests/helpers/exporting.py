"""Small models to export, and what lit_mm computes of a prompt."""

import sys

import pytest
import torch
import transformers.dynamic_module_utils

from lit_mm.data.images import ImageOptions
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.inference.answering import Model
from lit_mm.inference.prompts import embed, prompt_codes
from lit_mm.model.batch import IMAGE
from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage, TimmEncoder
from lit_mm.model.llm import LLM, load_llm
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from tests.helpers.models import SIZES, tiny_encoder
from tests.helpers.tokenizers import FIXTURES, folder_of

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
V2 = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 12, 16], "kernel_sizes": 3}
ENCODERS = {
    "five stages": tiny_encoder,
    "ConvNeXt-V2": lambda: ConvNeXtEncoder("convnextv2_atto", [ExtraStage(1, 24)], overrides=V2),
    "ViT": lambda: TimmEncoder("vit_base_patch16_clip_quickgelu_224", overrides=VIT),
    "CLIP with GELU": lambda: TimmEncoder("vit_base_patch16_clip_224", -1, overrides=VIT),
    "EVA": lambda: TimmEncoder("eva02_tiny_patch14_224", overrides=VIT),  # whose rotary tables are in no file
}


def model_of(encoder: str, llm: LLM, image: ImageOptions, scales=(16, 4, 1), **pooling) -> Model:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(llm)
    made, lm = ENCODERS[encoder](), load_llm(llm, tokenizer)
    width = lm.get_input_embeddings().embedding_dim
    vlm = MatryoshkaVLM(made, MatryoshkaProjector(made.num_features, width, scales, **pooling), lm)
    return Model(vlm, tokenizer, image, max_new_tokens=3)


def vicuna(path, legacy: bool) -> LLM:
    return LLM("LlamaConfig", SIZES, folder_of(path, FIXTURES / "llama_tokenizer.model", legacy), "vicuna_v1")


def our_logits(model: Model, prompt, scale) -> tuple[list[int], torch.Tensor]:
    """Token ids with IMAGE for each visual token, and logits [T, vocabulary] of the prompt alone."""
    images, [question] = model.on_device([prompt.sample])
    with torch.no_grad():
        codes = torch.from_numpy(prompt_codes(model.vlm, images, question, scale))
        embeddings = embed(model.vlm, model.vlm.encode(images), codes)
        logits = model.vlm.llm(inputs_embeds=embeddings[None], use_cache=False).logits[0]
    return [IMAGE if code < 0 else code for code in codes.tolist()], logits


def keep_code_in(folder, patch: pytest.MonkeyPatch) -> None:
    """Has transformers copy the code of models into a folder, and forget what it has imported before."""
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    patch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        patch.delitem(sys.modules, name)
