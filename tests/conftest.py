"""Small real things that the tests share: a tokenizer, a model, an instruction set on disk."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from lit_mm.data.records import RecordError
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage
from lit_mm.model.llm import LLM, load_llm
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM

ROOT = Path(__file__).parents[1]
TOKENIZER = str(ROOT / "experiments/quickstart_tokenizer")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
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


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tables of records are not kept in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(tiny_llm())


def draw(path: Path, size: tuple[int, int], color: str, shape: str = "ellipse") -> None:
    image = Image.new("RGB", size, "white")
    getattr(ImageDraw.Draw(image), shape)((8, 8, size[0] - 8, size[1] - 8), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def conversation(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]


@pytest.fixture
def instruction_set(tmp_path: Path) -> Path:
    """A folder with images, train.json and val.json in LLaVA's format: images of two shapes, several
    images in a record, a record without."""
    items = []
    for number, color in enumerate(["red", "green", "blue", "teal"] * 3):
        size = (64, 64) if number % 2 else (128, 32)
        draw(tmp_path / f"images/{number}.png", size, color)
        turns = conversation(("<image>\nwhat color is the shape?", color), ("is there a circle?", "yes"))
        items.append({"id": str(number), "image": f"images/{number}.png", "conversations": turns})
    both = conversation(("<image> <image>\nis there a red shape?", "yes"))
    items.append({"id": "two", "image": ["images/0.png", "images/1.png"], "conversations": both})
    items.append({"id": "text", "conversations": conversation(("is a red shape red?", "yes"))})
    (tmp_path / "train.json").write_text(json.dumps(items))
    (tmp_path / "val.json").write_text("\n".join(json.dumps(item) for item in items[:4]))
    return tmp_path


def installed(package: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed (make install brings it)"
    )


def tiny_vlm64(**options) -> MatryoshkaVLM:
    """In float64 throughout: transformers computes RMSNorm in float32 even in a float64 model."""
    vlm = tiny_vlm(dtype="float64", **options)
    for module in vlm.llm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
    return vlm


def rms_norm(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return module.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)


def kept_of(bad, items, check) -> list:
    """`check(item)` of every item that raises no RecordError; `bad` gets the others."""
    kept = []
    for item in items:
        try:
            kept.append(check(item))
        except RecordError as error:
            bad.add(error)
    return kept
