"""Cross-entropy at the positions with a label, and consistency between scales; logits are computed nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = {"cpu": 2**23, "cuda": 2**27}
"""Maximum number of logits in a chunk of labels in training, by device: 32 MiB in float32 on a CPU."""

Teacher = Literal["finest", "next_finer"]


@dataclass
class Consistency:
    """Coarser scales learn to answer as a finer one does (ViCO, arXiv:2510.12793; EPIC, arXiv:2510.00515).

    A scale's loss at a label becomes cross-entropy + weight × temperature² × KL(finer scale ‖ this scale), of the
    distributions of the next token; the finer scale gets no gradient from it. Both are summed over labels, weighted by
    scale and divided by the step's number of labels in the same way. A label that all scales share, as in text without
    images, adds 0. temperature² keeps the size of the gradient when the distributions are softened (Hinton et al.,
    arXiv:1503.02531, section 2).

    Args:
        weight: Weight of the KL divergence. EPIC's (1 - λ) cross-entropy + λ KL with λ = 0.7 is weight 2.3.
        teacher: The finer scale: finest, or next_finer (EPIC's); where scales are drawn, among the drawn ones. For
            video it has at least as many tokens per frame and sets of frames; next_finer is the next in tokens per
            frame, or if there is none, the next in sets of frames.
        temperature: Divides the logits of both scales.
        start: The first optimizer step with this term.
    """

    weight: float = 1.0
    teacher: Teacher = "finest"
    temperature: float = 1.0
    start: int = 0

    def __post_init__(self) -> None:
        if self.teacher not in get_args(Teacher):
            raise ValueError(f"consistency.teacher: expected finest or next_finer, found {self.teacher}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"consistency.temperature: expected a positive number, found {self.temperature}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"consistency.weight: expected a number of at least 0, found {self.weight}")
        if self.start < 0:
            raise ValueError(f"consistency.start: expected a step of at least 0, found {self.start}")


class Teaching(NamedTuple):
    """Which of S rows learns from which.

    Args:
        back: [S] how many rows before each its teacher is; 0: it has none.
        reach: Maximum of `back`.
        weight: As in Consistency.
        temperature: As in Consistency.
    """

    back: Tensor
    reach: int
    weight: float
    temperature: float

    @property
    def teacher(self) -> Tensor:
        """[S] the row of each row's teacher, or its own."""
        return torch.arange(len(self.back), device=self.back.device) - self.back

    def divergence(self, losses: Tensor, gradients: Tensor, hidden: Tensor) -> Tensor:
        """weight × KL [S] at temperature 1, from cross-entropies [S], their gradients and hidden states [S, D]."""
        at, moved = self.teacher, hidden - hidden[self.teacher]
        return self.weight * (losses - losses[at] - (gradients[at] * moved).sum(1))

    def learned(self, rows: Tensor) -> Tensor:
        """Rows [S, …] + weight × (rows - those of their teachers)."""
        return rows + self.weight * (rows - rows[self.teacher])

    def taught(self, rows: Tensor) -> Tensor:
        """The transpose of `learned`."""
        of_students = torch.zeros_like(rows).index_put_((self.teacher,), rows, accumulate=True)
        return rows + self.weight * (rows - of_students)


def teaching_of(
    consistency: Consistency, label: Tensor, scale: Tensor, scales: int, image_scales: int
) -> tuple[Tensor, Teaching]:
    """Order rows so that those of a label are next to each other, finest first, and find their teachers.

    Args:
        consistency: The configured term.
        label: [S] number of each row's label, equal at all scales.
        scale: [S] index of each row's scale: time scale × image_scales + image scale.
        scales: Number of all scales.
        image_scales: Number of image scales.

    Returns:
        The order [S], and the teachers of the rows in this order.
    """
    order = (label * scales + scale).argsort(stable=True)
    label, scale = label[order], scale[order]
    time, image, back = scale // image_scales, scale % image_scales, torch.zeros_like(order)
    steps = range(1, scales)
    for step in steps if consistency.teacher == "finest" else reversed(steps):  # the last one found stays
        finer = (time[:-step] <= time[step:]) & (image[:-step] <= image[step:]) & (scale[:-step] < scale[step:])
        back[step:].masked_fill_(finer & (label[:-step] == label[step:]), step)
    return order, Teaching(back, scales - 1, consistency.weight, consistency.temperature)


class Lesson:
    """Consistency of consecutive chunks of rows, whose teachers may be in the chunks before."""

    def __init__(self, teaching: Teaching) -> None:
        self.teaching, self.done = teaching, 0
        self.last: Tensor | None = None
        """The last rows so far, at most `reach`."""

    def divergence(self, logits: Tensor) -> Tensor:
        """Logits [c, vocabulary] of the next rows -> weight × temperature² × KL [c]; 0 without a teacher."""
        weight, temperature = self.teaching.weight, self.teaching.temperature
        self.soft = (logits / temperature).log_softmax(-1)
        self.targets = self._targets(self.soft.detach())
        return weight * temperature**2 * F.kl_div(self.soft, self.targets, reduction="none", log_target=True).sum(1)

    def _targets(self, rows: Tensor) -> Tensor:
        """The row [c, vocabulary] of each row's teacher, or the row itself."""
        start, reach = self.done, min(self.teaching.reach, len(rows))
        self.done += len(rows)
        place = torch.arange(len(rows), device=rows.device) - self.teaching.back[start : self.done]
        targets = rows.index_select(0, place.clamp(min=0))
        known = rows[:reach] if self.last is None else torch.cat([self.last, rows[:reach]])
        targets[:reach] = known[place[:reach] + len(known) - reach]
        self.last = (known if reach == len(rows) else rows)[-self.teaching.reach :].clone()
        return targets

    def gradient(self) -> Tensor:
        """d divergence / d logits [c, vocabulary] of these rows; overwrites what it is computed from.

        It is weight × temperature × (probabilities - the teacher's), both at the temperature.
        """
        return self.soft.exp_().sub_(self.targets.exp_()).mul_(self.teaching.weight * self.teaching.temperature)


def weighted_loss(
    llm: PreTrainedModel, hidden: Tensor, labels: Tensor, weights: Tensor, teaching: Teaching | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of next-token losses and consistency, with the logits of one chunk of labels at a time.

    Args:
        llm: A causal LM, whose output head is applied. A head that is not a plain nn.Linear keeps all
            its logits for the backward pass.
        hidden: [S, D] last hidden states at the positions that predict.
        labels: [S] token ids.
        weights: [S] coefficient of each loss in the sum.
        teaching: The rows' teachers; None: cross-entropy only.

    Returns:
        The sum; all cross-entropies [S] and all terms of consistency [S], without a gradient; float32 at least.
    """
    head, factor = cast(nn.Linear, llm.get_output_embeddings()), logit_factor(llm.config)
    chunk = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // head.weight.shape[0])
    weights = weights.to(torch.promote_types(hidden.dtype, torch.float32))
    if torch.is_grad_enabled() and type(head) is nn.Linear:
        return _HeadLoss.apply(hidden, head.weight, head.bias, labels, weights, teaching, factor, chunk)
    lesson, losses, terms = teaching and Lesson(teaching), [], []
    for states, ids in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = (head(states) * factor).to(weights.dtype)
        losses.append(cross_entropy(logits, ids))
        terms.append(lesson.divergence(logits) if lesson else torch.zeros_like(losses[-1]))
    all_losses, all_terms = torch.cat(losses), torch.cat(terms)
    return ((all_losses + all_terms) * weights).sum(), all_losses.detach(), all_terms.detach()


def logit_factor(config: Any) -> float:
    """Factor that some models of transformers apply to the logits: Cohere multiplies, Granite divides."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [S, vocabulary], labels [S] -> losses [S], float32 at least (bf16 would be off by 1e-3)."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


class _HeadLoss(torch.autograd.Function):
    """Output head, cross-entropy and consistency. Each chunk's gradient is computed in the forward pass, so that its
    logits need not be kept for the backward pass.

    At temperature 1 consistency costs nothing that grows with the vocabulary. Cross-entropy ℓ(h) is the logarithm of a
    sum of exponentials of linear functions of h, plus a linear function, so that the divergence is Bregman's:
    KL(p(t) ‖ p(h)) = ℓ(h) - ℓ(t) - ∇ℓ(t)·(h - t), where t and h are the teacher's and the student's hidden states. And
    as both have the same label, its gradient by the logits is the difference of their cross-entropies' gradients. In
    bf16 a label's value has the rounding errors of two cross-entropies, and may be below 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [S, D]
        weight: Tensor,  # [vocabulary, D]
        bias: Tensor | None,
        labels: Tensor,  # [S]
        weights: Tensor,  # [S]
        teaching: Teaching | None,
        factor: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_weight = torch.zeros_like(weight, dtype=weights.dtype) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=weights.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        plain = teaching if teaching and teaching.temperature == 1 else None
        lesson = Lesson(teaching) if teaching and not plain else None
        # the weights multiply the narrow side: hidden states instead of logits
        weighted, shares = weights[:, None] * hidden, weights
        if plain:
            weighted, shares = plain.taught(weighted), plain.taught(weights)
        losses, terms, products = [], [], []
        pieces = (x.split(chunk) for x in (hidden, labels, shares, weighted.to(hidden.dtype)))
        for states, ids, share, inputs in zip(*pieces, strict=True):
            raw = F.linear(states, weight, bias)
            logarithms = (raw.to(weights.dtype) * factor).log_softmax(-1)
            losses.append(-logarithms.gather(1, ids[:, None])[:, 0])
            terms.append(lesson.divergence(logarithms) if lesson else torch.zeros_like(share))
            # d loss / d logits = softmax - one-hot
            gradient = logarithms.exp_().scatter_add_(1, ids[:, None], -torch.ones_like(share)[:, None])
            if lesson:
                gradient += lesson.gradient()
            gradient = gradient.mul_(factor).to(raw.dtype)
            products.append(gradient @ weight.to(raw.dtype))
            if of_weight is not None:
                _add_product(of_weight, gradient.T, inputs)
            if of_bias is not None:
                of_bias += share @ gradient.to(share.dtype)
        all_losses, all_terms, of_hidden = torch.cat(losses), torch.cat(terms), torch.cat(products).to(weights.dtype)
        if plain:
            all_terms = plain.divergence(all_losses, of_hidden, hidden)
            of_hidden = plain.learned(of_hidden)
        of_head = (x if x is None else x.to(weight.dtype) for x in (of_weight, of_bias))
        ctx.save_for_backward((weights[:, None] * of_hidden).to(hidden.dtype), *of_head)
        ctx.mark_non_differentiable(all_losses, all_terms)
        return ((all_losses + all_terms) * weights).sum(), all_losses, all_terms

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # a one-element tensor, not a scalar: the bf16 × float32 product is then rounded only once
        made = (x if x is None else (x * gradients[0][None]).to(x.dtype) for x in ctx.saved_tensors)
        return *made, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary where the dtypes agree."""
    if total.dtype == left.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right.to(left.dtype)
