"""Before a run: does this LLM compute the same in packed rows as sample by sample?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

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
    weight: Tensor = vlm.llm.get_input_embeddings().weight  # type: ignore[assignment]
    batch, nested = tiny_batch(weight, vlm.projector.scales, packing)
    modes = {module: module.training for module in vlm.modules()}
    vlm.eval()
    packed, looped = (vlm.sums(each, nested).total / batch.supervised for each in (batch, replace(batch, rows=[])))
    for module, training in modes.items():
        module.training = training
    allowed = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 1e-2
    if not abs(packed - looped) <= allowed * looped:
        raise RuntimeError(
            f"{vlm.llm.config.model_type} with attention {packing}: a packed row's loss is {packed:.6f} where one "
            f"scale after another gives {looped:.6f}; set model.attention to loop"
        )


def tiny_batch(like: Tensor, scales: Sequence[int], packing: Packing) -> tuple[Batch, list[Tensor]]:
    """Random samples at the two coarsest scales, with their nested tokens: an image first, one behind
    a short and one behind a long prefix, text alone."""
    generator = torch.Generator().manual_seed(0)
    words, image = torch.randint(len(like), (scales[-min(2, len(scales))] + 20,), generator=generator), [IMAGE]
    few = words[:6].tolist()
    ids = [torch.tensor(own) for own in (image + few, few + image + few, [*words.tolist(), *image, *few], few)]
    targets = [torch.cat([torch.full((len(own) - 4,), IGNORED), own[-4:]]) for own in ids]
    count = min(2, len(scales))
    drawn = [Drawn(len(scales) - number, 1 / count) for number in range(count, 0, -1)]
    index = torch.arange(3)
    batch = Batch(Images([], index), ids, targets, index, drawn, pack(ids, targets, index, scales, drawn, packing))
    noise = [torch.randn(3, scale, like.shape[1], generator=generator) for scale in scales]
    moved = apply_to_collection(batch, Tensor, Tensor.to, like.device)
    return moved, [(like.std().cpu() * tokens).to(like) for tokens in noise]
