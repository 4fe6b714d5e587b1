"""Cross-entropy where it is supervised, and logits nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = {"cpu": 2**23, "cuda": 2**27}
"""Most logits that exist at once in training, by device: 32 MiB in float32 on a CPU."""


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
        llm: A causal LM; its output head is applied. A head that is no plain nn.Linear keeps all its
            logits for the backward pass.
        hidden: [S, D] last hidden states at the positions that predict.
        targets: [S] token ids.
        weights: [S] of each loss in the sum.

    Returns:
        The sum, and all losses [S] without a gradient; float32 at least.
    """
    head, behind = cast(nn.Linear, llm.get_output_embeddings()), Behind.of(llm.config)
    chunk = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // head.weight.shape[0])
    weights = weights.to(torch.promote_types(hidden.dtype, torch.float32))
    if torch.is_grad_enabled() and type(head) is nn.Linear:
        return cast(
            tuple[Tensor, Tensor], _HeadLoss.apply(hidden, head.weight, head.bias, targets, weights, behind, chunk)
        )
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = torch.cat([_cross_entropy(behind(head(states)), ids) for states, ids in pieces])
    return (losses * weights).sum(), losses.detach()


@dataclass
class Behind:
    """What transformers' models do to the logits behind their head.

    Args:
        factor: Cohere multiplies them, Granite divides.
        cap: Gemma 2 keeps them within ± cap, smoothly.
    """

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Behind:
        """As the LLM's config says."""
        factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(factor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Raw logits -> logits."""
        logits = logits * self.factor if self.factor != 1.0 else logits
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Gradient of the logits -> of the raw logits, in place."""
        if self.cap:
            gradient *= 1 - (logits / self.cap).square()
        return gradient.mul_(self.factor) if self.factor != 1.0 else gradient


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


class _HeadLoss(torch.autograd.Function):
    """Output head and cross-entropy. Each chunk's gradient is made in the forward pass, so that its
    logits never wait for a backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        behind: Behind,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        of_weight = torch.zeros_like(weight, dtype=weights.dtype) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=weights.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        losses, of_hidden = [], []
        pieces = (x.split(chunk) for x in (hidden, targets, weights))
        for states, ids, share in zip(*pieces, strict=True):
            raw = F.linear(states, weight, bias)
            logits = behind(raw).to(weights.dtype)
            logarithms = logits.log_softmax(-1)
            losses.append(-logarithms.gather(1, ids[:, None])[:, 0])
            gradient = logarithms.exp_().scatter_add_(1, ids[:, None], -torch.ones_like(share)[:, None])
            gradient = behind.backward(gradient, logits).to(raw.dtype)
            # the weights go to the narrow side: hidden states instead of logits
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
        # by a tensor of one element, not a scalar: a bf16 product with a float32 factor is rounded once
        made = (x if x is None else (x * gradients[0][None]).to(x.dtype) for x in ctx.saved_tensors)
        return *made, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a matrix in between where the types agree."""
    if total.dtype == left.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right.to(left.dtype)
