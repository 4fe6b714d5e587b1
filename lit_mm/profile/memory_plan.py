"""How much memory a training step takes on every GPU, before one is booked.

The step itself, forward, backward and optimizer, runs on tensors without data, on any machine and
without weights (see `ledger.py`), so that checkpointing, frozen parts, adapters, mixed precision and
packing count as they are. Added to that is what sharding or DDP take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lit_mm.data.collate import Sample, Visual, collate
from lit_mm.model.attention import Attention, BranchLayout, Layout
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch
from lit_mm.model.packing import Packing, pack
from lit_mm.model.scales import coarsest_time_scale
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.profile.ledger import KINDS, Ledger, as_on, backward, copied, fake_like

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


@dataclass
class MemoryPlan:
    """Bytes on every GPU at the moment when a training step needs most.

    What is not in it: the CUDA context and the libraries' workspaces (about 1 GiB), and what the
    allocator cannot use for being in pieces.

    Args:
        parameters: Weights and buffers, or the GPU's share of them.
        gradients: Of the weights that train, as far as they exist at that moment.
        optimizer: The optimizer's state.
        activations: What the forward pass keeps for the backward pass, and temporary tensors.
        communication: Sharded: weights gathered to compute with, and gradients not yet shared out.
            Otherwise, on more than one GPU: DDP's buckets.
        moment: `forward`, `backward` or `optimizer step`.
        gpus: How many.
        sharded: Whether parameters, gradients and optimizer state are shared out among them.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    moment: str
    gpus: int
    sharded: bool

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, kind) for kind in KINDS)


def plan(
    vlm: MatryoshkaVLM,
    batch: Batch,
    optimizer: Callable[[MatryoshkaVLM], Optimizer],
    precision: str = "bf16-mixed",
    gpus: int = 1,
    units: Sequence[nn.Module] | None = None,
    device: str = "cuda",
    accumulate: bool = False,
) -> MemoryPlan:
    """Run one training step on tensors without data.

    Args:
        vlm: The model, on the `meta` device or any other; it stays as it is. What trains, its modes and
            its checkpointing count as they are set.
        batch: What one GPU gets in a step, on the CPU; see `example_batch`.
        optimizer: Makes the optimizer for a copy of `vlm`.
        precision: Lightning's name: 32-true, bf16-mixed or bf16-true.
        gpus: How many take part.
        units: Modules of `vlm` that FSDP gathers as a whole; the rest is the root's. None: every GPU
            holds a whole copy (DDP).
        device: Its type, cuda or cpu.
        accumulate: Whether gradients are added up over several batches.

    Raises:
        ValueError: Another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision}: expected one of {', '.join(PRECISIONS)}")
    step = Step(vlm, precision, gpus, units)
    ledger = step.ledger
    if units is None and gpus > 1:  # DDP's buckets
        ledger.change("communication", nbytes(p for p in step.shares.parameters() if p.requires_grad))
    with as_on(device), ledger:
        step.run(batch, step.stepped(optimizer, device), accumulate)
    sizes: dict[str, Any] = {kind: ledger.most[kind] for kind in KINDS}
    return MemoryPlan(**sizes, moment=ledger.moment, gpus=gpus, sharded=units is not None)


def example_batch(
    vlm: MatryoshkaVLM,
    samples: int,
    size: tuple[int, int],
    prefix: int = 35,
    answer: int = 200,
    frames: int = 1,
    packing: Packing = "packed",
    attention: Attention = "branch",
) -> Batch:
    """Samples of one image or video each, their pixels on the `meta` device.

    Args:
        vlm: Its scales are laid out.
        samples: How many.
        size: Height and width of an image, in pixels.
        prefix: Tokens before the image; vicuna_v1's are 35.
        answer: Tokens behind it, all of them supervised; LLaVA's mixture has about 200 in the mean.
        frames: Images a sample.
        packing: How they are laid out.
        attention: How a packed sequence attends.
    """
    last, made = len(vlm.time_scales) - 1, []
    for number in range(samples):
        visual = Visual(number, torch.empty(frames, 3, *size, dtype=torch.uint8, device="meta"))
        ids = torch.tensor([1] * prefix + [IMAGE] * frames + [1] * answer)
        labels = torch.where(torch.arange(len(ids)) < prefix + frames, IGNORE_INDEX, ids)
        time_scale = torch.tensor([last] * prefix + coarsest_time_scale(frames, vlm.time_scales) + [last] * answer)
        made.append(Sample([visual], ids, labels, time_scale if vlm.time_scales else None))
    batch = collate(made, vlm.time_scales)
    scales = len(vlm.all_scales)
    batch.scale_weights = [1 / scales] * scales
    batch.packed = pack(batch, vlm.projector.scales, packing, attention)
    return batch


class Step:
    """One training step in Lightning's order, on fake tensors.

    What computes and what the optimizer steps are two copies of the model: sharded, they differ.

    Attributes:
        ledger: What the step takes.
        whole: What computes, in the type that it computes in.
        shares: What one GPU holds.
        gathering: What FSDP adds to the shares.
    """

    def __init__(self, vlm: MatryoshkaVLM, precision: str, gpus: int, units: Sequence[nn.Module] | None) -> None:
        self.ledger, self.mixed, sharded = Ledger(), precision == "bf16-mixed", units is not None
        fake, held = self.ledger.fake, torch.bfloat16 if precision == "bf16-true" else None

        def computing(tensor: Tensor) -> Tensor:
            gathered = self.mixed and sharded and isinstance(tensor, nn.Parameter)  # whole and contiguous
            return fake_like(tensor, fake, torch.bfloat16 if gathered else held, 1 if sharded else None)

        self.whole, copies = copied(vlm, computing)
        self.shares, _ = copied(vlm, lambda tensor: fake_like(tensor, fake, held, gpus if sharded else None))
        for buffer in self.whole.buffers():
            self.ledger.book(buffer, "parameters")
        for parameter, share in zip(self.whole.parameters(), self.shares.parameters(), strict=True):
            self.ledger.book(share, "parameters")
            self.ledger.book(parameter, "parameters", size=0)  # they are the shares, or Gathering has them
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, share=share: self._hand_over(p, share))
        modules = [copies[id(unit)] for unit in units or []]
        self.gathering = Gathering(self.ledger, self.whole, modules) if sharded else None

    def stepped(self, make: Callable[[MatryoshkaVLM], Optimizer], device: str) -> Optimizer:
        """The optimizer after a first step: it has its state, and the gradients are still there."""
        optimizer = make(self.shares)
        for group in optimizer.param_groups:
            if device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True  # torch's choice there
            for share in group["params"]:
                self._add_gradient(share)
        with self.ledger.making("optimizer"):
            optimizer.step()
        return optimizer

    def run(self, batch: Batch, optimizer: Optimizer, accumulate: bool) -> None:
        """A step after the first. Lightning clears the gradients between forward and backward: those of
        the step before live through the forward pass."""
        self.ledger.most, self.ledger.phase = Counter(), "forward"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            total = self.whole(self._fake(batch)).loss
        if not accumulate:
            optimizer.zero_grad()
        self.ledger.phase = "backward"
        backward(total)
        if self.gathering is not None:
            self.gathering.end()
        self.ledger.phase = "optimizer step"
        optimizer.step()

    def _fake(self, batch: Batch) -> Batch:
        """The batch with fake pixels, and kernels for CUDA alone replaced."""
        pixels = [fake_like(group, self.ledger.fake) for group in batch.images.groups]
        for group in pixels:
            self.ledger.book(group, "activations")
        packed = [replace(own, layout=planned(own.layout)) for own in batch.packed]
        return replace(batch, images=replace(batch.images, groups=pixels), packed=packed)

    def _add_gradient(self, share: Tensor) -> None:
        with self.ledger.making("gradients"):
            share.grad = torch.empty_like(share)

    def _hand_over(self, parameter: Tensor, share: Tensor) -> None:
        """A gradient is done: it becomes the share's."""
        parameter.grad = None
        if share.grad is None:
            self._add_gradient(share)


class Gathering:
    """What FSDP holds beside the shares.

    The root's weights, whole, throughout. In the forward pass those of the unit at work, twice: what was
    received stays until the next unit's comes. In the backward pass those of the unit at work and of the
    next one, on their way; its gradients as they come; and those of the unit before in float32, on their
    way to the ranks. The root's gradients wait for the end.
    """

    def __init__(self, ledger: Ledger, model: nn.Module, units: Sequence[nn.Module]) -> None:
        inner = {id(parameter) for unit in units for parameter in unit.parameters()}
        self.ledger, self.root = ledger, [p for p in model.parameters() if id(p) not in inner]
        self.of_root, self.of_unit, self.others = nbytes(self.root), 0, 0
        self.order: list[nn.Module] = []
        self.at_work: nn.Module | None = None
        for parameter in model.parameters():
            if parameter.requires_grad:
                wait = self._wait_in_unit if id(parameter) in inner else self._wait_in_root
                parameter.register_post_accumulate_grad_hook(wait)
        for unit in units:
            unit.register_forward_pre_hook(lambda unit, inputs: self._works(unit))
            unit.register_forward_hook(lambda unit, inputs, outputs: self._follow(unit, outputs))

    def end(self) -> None:
        """The backward pass is over: what is left is shared out, the root's gradients last."""
        self._hold(self._sent())
        self.of_unit = 0
        self._hold(in_float32(self.root))
        self.of_root = 0
        self._hold(0)

    def _works(self, unit: nn.Module) -> None:
        weights = nbytes(unit.parameters())
        if self.ledger.phase == "forward":
            self.order.append(unit)
            self._hold(2 * weights)
        elif unit is not self.at_work:
            sent, number = self._sent(), self.order.index(unit)
            self._hold(weights + sent)
            self.of_unit, self.at_work = 0, unit
            self._hold(weights + sent + (nbytes(self.order[number - 1].parameters()) if number else 0))

    def _follow(self, unit: nn.Module, outputs: Any) -> None:
        """When the first gradient of its outputs comes, a unit is at work again."""
        if self.ledger.phase == "forward":
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(lambda gradient: self._works(unit))

    def _wait_in_root(self, parameter: Tensor) -> None:
        self.of_root += parameter.nbytes
        self._hold(self.others)

    def _wait_in_unit(self, parameter: Tensor) -> None:
        self.of_unit += parameter.nbytes
        self._hold(self.others)

    def _sent(self) -> int:
        return in_float32(self.at_work.parameters()) if self.at_work is not None else 0

    def _hold(self, others: int) -> None:
        self.others = others
        self.ledger.change("communication", self.of_root + self.of_unit + others - self.ledger.alive["communication"])


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.nbytes for tensor in tensors)


def in_float32(parameters: Iterable[Tensor]) -> int:
    """Bytes of their gradients in float32."""
    return sum(4 * parameter.numel() for parameter in parameters if parameter.requires_grad)


class Fused(Layout):
    """One attention kernel for the whole packed sequence, as flex has on CUDA."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        """Takes as much memory as the kernel."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped).transpose(1, 2)


def planned(layout: Layout) -> Layout:
    """The layout, or what takes as much memory."""
    return layout if isinstance(layout, BranchLayout) else Fused()
