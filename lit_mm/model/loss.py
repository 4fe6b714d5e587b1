"""Cross-entropy at the positions with a label; logits are computed nowhere else."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = {"cpu": 2**23, "cuda": 2**27}
"""Maximum number of logits that exist at once in training, by device: 32 MiB in float32 on a CPU."""


def weighted_loss(llm: PreTrainedModel, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token losses, with at most CHUNK logits at a time.

    Args:
        llm: A causal LM, whose output head is applied. A head that is not a plain nn.Linear keeps all
            its logits for the backward pass.
        hidden: [S, D] last hidden states at the positions that predict.
        labels: [S] token ids.
        weights: [S] coefficient of each loss in the sum.

    Returns:
        The sum, and all losses [S] without a gradient; float32 at least.
    """
    head, factor = cast(nn.Linear, llm.get_output_embeddings()), logit_factor(llm.config)
    chunk = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // head.weight.shape[0])
    weights = weights.to(torch.promote_types(hidden.dtype, torch.float32))
    if torch.is_grad_enabled() and type(head) is nn.Linear:
        total, losses = _HeadLoss.apply(hidden, head.weight, head.bias, labels, weights, factor, chunk)
        return total, losses
    pieces = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    losses = torch.cat([cross_entropy(head(states) * factor, ids) for states, ids in pieces])
    return (losses * weights).sum(), losses.detach()


def logit_factor(config: Any) -> float:
    """Factor that some models of transformers apply to the logits: Cohere multiplies, Granite divides."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [S, vocabulary], labels [S] -> losses [S], float32 at least (bf16 would be off by 1e-3)."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


class _HeadLoss(torch.autograd.Function):
    """Output head and cross-entropy. Each chunk's gradient is computed in the forward pass, so that its
    logits need not be kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [S, D]
        weight: Tensor,  # [vocabulary, D]
        bias: Tensor | None,
        labels: Tensor,  # [S]
        weights: Tensor,  # [S]
        factor: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        of_weight = torch.zeros_like(weight, dtype=weights.dtype) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=weights.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        losses, of_hidden = [], []
        pieces = (x.split(chunk) for x in (hidden, labels, weights))
        for states, ids, share in zip(*pieces, strict=True):
            raw = F.linear(states, weight, bias)
            logarithms = (raw.to(weights.dtype) * factor).log_softmax(-1)
            losses.append(-logarithms.gather(1, ids[:, None])[:, 0])
            # d loss / d logits = softmax - one-hot
            gradient = logarithms.exp_().scatter_add_(1, ids[:, None], -torch.ones_like(share)[:, None])
            gradient = gradient.mul_(factor).to(raw.dtype)
            # the weights multiply the narrow side: hidden states instead of logits
            of_hidden.append((share[:, None] * (gradient @ weight.to(raw.dtype))).to(hidden.dtype))
            if of_weight is not None:
                _add_product(of_weight, gradient.T, (share[:, None] * states).to(states.dtype))
            if of_bias is not None:
                of_bias += share @ gradient.to(share.dtype)
        of_head = (x if x is None else x.to(weight.dtype) for x in (of_weight, of_bias))
        ctx.save_for_backward(torch.cat(of_hidden), *of_head)
        all_losses = torch.cat(losses)
        ctx.mark_non_differentiable(all_losses)
        return (all_losses * weights).sum(), all_losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # a one-element tensor, not a scalar: the bf16 × float32 product is then rounded only once
        made = (x if x is None else (x * gradients[0][None]).to(x.dtype) for x in ctx.saved_tensors)
        return *made, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary where the dtypes agree."""
    if total.dtype == left.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right.to(left.dtype)
