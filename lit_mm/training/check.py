"""Checked when a run starts: packed sequences give the same loss as padded samples with this LLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_mm.model.attention import Attention
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch, Images
from lit_mm.model.packing import Packing, pack
from lit_mm.model.vlm import MatryoshkaVLM


@torch.no_grad()
def check_packing(vlm: MatryoshkaVLM, packing: Packing, attention: Attention = "branch") -> None:
    """Compare the packed and the padded loss of a tiny random batch.

    Raises:
        RuntimeError: They differ by more than rounding errors.
    """
    if packing == "padded":
        return
    weight = cast(nn.Embedding, vlm.llm.get_input_embeddings()).weight.detach()
    words, width = len(weight), vlm.projector.layers[-1].out_features
    batch, nested = tiny_batch(words, cast(int, width), vlm.projector.scales, packing, attention)
    size = weight.square().mean().sqrt()
    size = size.full_tensor() if isinstance(size, DTensor) else size
    device = next(vlm.projector.parameters()).device
    batch = apply_to_collection(batch, Tensor, Tensor.to, device)
    nested = (nested.to(device) * size).to(weight.dtype)
    with evaluating(vlm):
        packed, padded = (vlm(each, nested=nested).loss for each in (batch, replace(batch, packed=[])))
    exact = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device.type)
    allowed = 1e-4 if exact else 1e-2
    if not abs(packed - padded) <= allowed * padded:
        raise RuntimeError(
            f"{vlm.llm.config.model_type} with packing {packing}: the packed loss is {packed:.6f}, but padded samples "
            f"give {padded:.6f}; set model.packing to padded"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule's mode and all random numbers are as before."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    with torch.no_grad(), isolate_rng():
        yield
    for each, training in modes.items():
        each.training = training


def tiny_batch(
    vocabulary: int, width: int, scales: Sequence[int], packing: Packing, attention: Attention
) -> tuple[Batch, Tensor]:
    """A random batch at the two coarsest scales, and its nested tokens: an image without a prefix, after a
    short one and after a long one, and a sample of text only."""
    generator = torch.Generator().manual_seed(0)
    words, image = torch.randint(vocabulary, (scales[-min(2, len(scales))] + 20,), generator=generator), [IMAGE]
    few = words[:6].tolist()
    ids = [torch.tensor(own) for own in (image + few, few + image + few, [*words.tolist(), *image, *few], few)]
    labels = [torch.cat([torch.full((len(own) - 4,), IGNORE_INDEX), own[-4:]]) for own in ids]
    count, index = min(2, len(scales)), torch.arange(3)
    weights = [0.0] * (len(scales) - count) + [1 / count] * count
    batch = Batch(Images([], index), ids, labels, index, weights)
    batch.packed = pack(batch, scales, packing, attention)
    return batch, torch.randn(3, sum(scales), width, generator=generator)


def stand_in(batch: Batch, scales: Sequence[int], packing: Packing, device: torch.device) -> Batch:
    """A batch of two words that replaces an empty one, so that this rank runs as many forwards as the others."""
    ids, labels = [torch.zeros(2, dtype=torch.long)], [torch.tensor([IGNORE_INDEX, 0])]
    images = Images([], torch.zeros(0, dtype=torch.long))
    two_words = Batch(images, ids, labels, images.order, batch.scale_weights)
    two_words.packed = pack(two_words, scales, packing)
    two_words.images = batch.images
    return apply_to_collection(two_words, Tensor, Tensor.to, device)
