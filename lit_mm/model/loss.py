"""Cross-entropy where it is supervised, and logits nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 2**25
"""Most logits that exist at once (times 4 bytes: 128 MiB in float32)."""


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
    return _cross_entropy(logits, targets[supervised])


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


def weighted_loss(llm: PreTrainedModel, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weighted next-token losses, with at most CHUNK logits at a time.

    Args:
        llm: A causal LM; its output head is applied.
        hidden: [S, D] last hidden states at the positions that predict.
        targets: [S] token ids.
        weights: [S] of each loss in the sum.

    Returns:
        The sum, and all losses [S] without a gradient; float32 at least.
    """
    logits_of, vocabulary = logits_function(llm), cast(nn.Linear, llm.get_output_embeddings()).weight.shape[0]
    weights = weights.to(torch.promote_types(hidden.dtype, torch.float32))
    chunk = max(1, CHUNK // vocabulary)
    if len(targets) > chunk and torch.is_grad_enabled():
        parameters = [p for p in cast(nn.Module, llm.get_output_embeddings()).parameters() if p.requires_grad]
        return _ChunkedLoss.apply(hidden, targets, weights, logits_of, chunk, *parameters)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = torch.cat([_cross_entropy(logits_of(states), ids) for states, ids in pieces])
    return (losses * weights).sum(), losses.detach()


def logits_function(llm: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Hidden states -> logits, with what transformers' models do behind their head."""
    head, config = cast(nn.Module, llm.get_output_embeddings()), llm.config
    factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def logits(hidden: Tensor) -> Tensor:
        values = head(hidden) * factor / divisor if factor != divisor else head(hidden)
        return torch.tanh(values / cap) * cap if cap else values

    return logits


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    """Each chunk's gradient is made in the forward pass, so that its logits never wait for a backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        chunk: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses, of_hidden = [], []
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        for states, ids, share in zip(hidden.split(chunk), targets.split(chunk), weights.split(chunk), strict=True):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                loss = _cross_entropy(logits_of(leaf), ids)
                gradient, *others = torch.autograd.grad(loss, [leaf, *parameters], share.to(loss.dtype))
            losses.append(loss.detach())
            of_hidden.append(gradient)
            torch._foreach_add_(sums, others)
        all_losses = torch.cat(losses)
        ctx.save_for_backward(torch.cat(of_hidden), *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)))
        ctx.mark_non_differentiable(all_losses)
        return (all_losses * weights).sum(), all_losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_parameters = (saved * gradients[0].to(saved.dtype) for saved in ctx.saved_tensors)
        return of_hidden, None, None, None, None, *of_parameters
