"""Cross-entropy where it is supervised, and logits nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def token_losses(llm: PreTrainedModel, embeddings: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Next-token losses [S] of the S positions of `targets` [B, T] that are not `ignored`.

    Args:
        llm: A causal LM.
        embeddings: Input embeddings [B, T, D]; padding, if any, stands on the right.
        targets: Token ids [B, T]; the token at t is predicted from position t - 1.
        ignored: The id that marks positions without a target.

    Returns:
        Losses in the order of `targets`, float32 at least (bf16 logits would be off by 1e-3).
    """
    targets = targets[:, 1:]
    supervised = targets != ignored
    with head_only_at(llm, F.pad(supervised, (0, 1))):
        logits = llm(inputs_embeds=embeddings, use_cache=False).logits
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[supervised], reduction="none"
    )


@contextmanager
def head_only_at(llm: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within this context the output head computes logits [S, vocabulary] of the S marked positions.

    Going through the model's own forward keeps what it does behind its head exact for every
    architecture: Granite and Cohere scale their logits, Gemma 2 caps them.
    """
    head = cast(nn.Module, llm.get_output_embeddings())
    handle = head.register_forward_pre_hook(lambda module, hidden: (hidden[0][positions],))
    try:
        yield
    finally:
        handle.remove()
