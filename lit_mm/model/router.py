"""Predicts at which scale a question should be answered, from its prompt at the coarsest scale.

The router is a small head beside the LLM. It is trained alone, on the losses that each scale's answers have in the
same packed forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass
class RouterOptions:
    """What the router sees, and what it learns.

    Args:
        loss: ranking: order the scales by the losses of their answers (AVG-LLaVA, arXiv 2410.02745). sufficient: name
            the coarsest scale whose loss is near the lowest (the smallest sufficient size of CARES, arXiv 2510.19496).
        question: Whether it sees the question besides the image.
        hidden: Width of its hidden layer.
        margin: Of ranking: how far two scales' scores must be apart, in differences of their losses; AVG-LLaVA's is 1.
        tolerance: Of sufficient: a scale is sufficient if the mean loss of an answer's tokens is at most this far above
            the lowest of all scales, in nats.
    """

    loss: Literal["ranking", "sufficient"] = "ranking"
    question: bool = True
    hidden: int = 256
    margin: float = 1.0
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.margin < 0 or self.tolerance < 0:
            found = f"hidden {self.hidden}, margin {self.margin:g}, tolerance {self.tolerance:g}"
            raise ValueError(f"router: expected hidden from 1, margin and tolerance from 0 on, found {found}")


class Router(nn.Module):
    """Two layers on a question's state and on its images' mean token.

    Args:
        width: D, the LLM's.
        scales: Number of the model's scales.
        options: What it sees and learns.
    """

    def __init__(self, width: int, scales: int, options: RouterOptions) -> None:
        super().__init__()
        self.options, self.width = options, width
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        inputs = width * (2 if options.question else 1)
        self.layers = nn.Sequential(nn.Linear(inputs, options.hidden), nn.GELU(), nn.Linear(options.hidden, scales))

    @property
    def flops(self) -> int:
        """Of one question's scores."""
        return 2 * sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)

    def forward(self, visual: Tensor, question: Tensor) -> Tensor:
        """Log-probability of each scale, [A, scales], finest first; float32 at least.

        Args:
            visual: [A, D] mean of the tokens that show the prompt's images at the coarsest scale, as they enter the
                LLM, so that they know nothing of the text.
            question: [A, D] last hidden state of the prompt, from which the answer's first token is predicted.
        """
        states = [visual, question] if self.options.question else [visual]
        exact = [self.norm(state.to(torch.promote_types(state.dtype, torch.float32))) for state in states]
        logits = self.layers(torch.cat(exact, 1).to(next(self.parameters()).dtype))
        return logits.to(exact[0].dtype).log_softmax(-1)

    def scores(self, visual: Tensor, question: Tensor) -> Tensor:
        """What a chooser compares, [A, scales]: for the ranking loss as `forward`; for `sufficient` the logarithm of
        the probability that a scale suffices: that the smallest sufficient scale is this one or a coarser one."""
        found = self(visual, question)
        return found if self.options.loss == "ranking" else found.flip(-1).logcumsumexp(-1).flip(-1)

    def loss(self, found: Tensor, losses: Tensor) -> Tensor:
        """Loss of each answer, [A].

        Args:
            found: [A, scales] as `forward` returns it.
            losses: [A, scales] mean loss of each answer's tokens at every scale, finest first.
        """
        if self.options.loss == "ranking":
            return ranking_loss(found, losses, self.options.margin)
        return -found.gather(1, smallest_sufficient(losses, self.options.tolerance)[:, None])[:, 0]


def ranking_loss(found: Tensor, losses: Tensor, margin: float) -> Tensor:
    """AVG-LLaVA's loss [A]: with the scales sorted by their losses l, lowest first, and their scores s, the sum over
    all pairs i < j of max(0, s_j - s_i + margin (j - i) (l_j - l_i)), and 0.1 times the cross-entropy to the best.

    The authors' code takes the mean over the pairs of each distance j - i, the paper the sum.
    """
    ordered, order = losses.sort(dim=1, stable=True)
    scores, place = found.gather(1, order), torch.arange(losses.shape[1], device=losses.device)
    apart = (place - place[:, None]) * (ordered[:, None] - ordered[:, :, None])  # [A, i, j]
    pairs = (scores[:, None] - scores[:, :, None] + margin * apart).relu().triu(1)
    return pairs.sum((1, 2)) - 0.1 * scores[:, 0]


def smallest_sufficient(losses: Tensor, tolerance: float) -> Tensor:
    """[A, scales] -> [A] the last scale, i.e. the coarsest, whose loss is at most so far above the lowest."""
    enough = losses <= losses.amin(1, keepdim=True) + tolerance
    return losses.shape[1] - 1 - enough.flip(1).int().argmax(1)


def answer_losses(losses: Tensor, of_scales: Tensor, of_label: Tensor, answers: int) -> Tensor:
    """Mean loss of each answer's tokens at every scale.

    Args:
        losses: [S] of all labels.
        of_scales: [S, scales] 1 where a label counts in a scale, otherwise 0.
        of_label: [S] the answer that each label is of; A for those of none.
        answers: A.

    Returns:
        [A, scales].
    """
    sums, counts = of_scales.new_zeros(2, answers + 1, of_scales.shape[1]).unbind()
    sums = sums.index_add(0, of_label, losses[:, None] * of_scales)[:-1]
    return sums / counts.index_add(0, of_label, of_scales)[:-1]


def mean_of(rows: Tensor, index: Tensor, groups: int) -> Tensor:
    """Rows [P, D] and the group of each [P] -> means [groups, D], float32 at least."""
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    sums = exact.new_zeros(groups, rows.shape[1]).index_add(0, index, exact)
    return sums / exact.new_zeros(groups, 1).index_add(0, index, exact.new_ones(len(index), 1))
