"""Before a run: does this LLM compute the same in packed rows as sample by sample?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_mm.model.rows import IGNORED, IMAGE, Batch, Drawn, Images, Packing, pack
from lit_mm.model.vlm import MatryoshkaVLM


@torch.no_grad()
def check_packing(vlm: MatryoshkaVLM, packing: Packing) -> None:
    """Compare packed with looped losses of a tiny batch of random tokens.

    Raises:
        RuntimeError: They differ by more than rounding explains.
    """
    if packing == "loop":
        return
    weight = cast(nn.Embedding, vlm.llm.get_input_embeddings()).weight.detach()
    words, width = len(weight), vlm.projector.layers[-1].out_features
    batch, nested = tiny_batch(words, cast(int, width), vlm.projector.scales, packing)
    size = weight.square().mean().sqrt()
    size = size.full_tensor() if isinstance(size, DTensor) else size
    device = next(vlm.projector.parameters()).device
    batch = apply_to_collection(batch, Tensor, Tensor.to, device)
    nested = [(tokens.to(device) * size).to(weight.dtype) for tokens in nested]
    modes = {module: module.training for module in vlm.modules()}
    vlm.eval()
    packed, looped = (vlm(each, nested=nested).total for each in (batch, replace(batch, rows=[])))
    for module, training in modes.items():
        module.training = training
    exact = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device.type)
    allowed = 1e-4 if exact else 1e-2
    if not abs(packed - looped) <= allowed * looped:
        raise RuntimeError(
            f"{vlm.llm.config.model_type} with attention {packing}: a packed row's loss is {packed:.6f} where one "
            f"scale after another gives {looped:.6f}; set model.attention to loop"
        )


def tiny_batch(vocabulary: int, width: int, scales: Sequence[int], packing: Packing) -> tuple[Batch, list[Tensor]]:
    """Random samples at the two coarsest scales, with their nested tokens: an image first, one behind
    a short and one behind a long prefix, text alone."""
    generator = torch.Generator().manual_seed(0)
    words, image = torch.randint(vocabulary, (scales[-min(2, len(scales))] + 20,), generator=generator), [IMAGE]
    few = words[:6].tolist()
    ids = [torch.tensor(own) for own in (image + few, few + image + few, [*words.tolist(), *image, *few], few)]
    targets = [torch.cat([torch.full((len(own) - 4,), IGNORED), own[-4:]]) for own in ids]
    count = min(2, len(scales))
    drawn = [Drawn(len(scales) - number, 1 / count) for number in range(count, 0, -1)]
    index = torch.arange(3)
    batch = Batch(Images([], index), ids, targets, index, drawn, pack(ids, targets, index, scales, drawn, packing))
    return batch, [torch.randn(3, scale, width, generator=generator) for scale in scales]


def stand_in(batch: Batch, scales: Sequence[int], packing: Packing, device: torch.device) -> Batch:
    """In place of a batch without samples two words, for the others' sake that wait."""
    ids, targets = [torch.zeros(2, dtype=torch.long)], [torch.tensor([IGNORED, 0])]
    index = torch.zeros(0, dtype=torch.long)
    rows = pack(ids, targets, index, scales, batch.drawn, packing) if packing != "loop" else []
    return apply_to_collection(Batch(batch.images, ids, targets, index, batch.drawn, rows), Tensor, Tensor.to, device)
