"""How much memory a training step takes on every GPU, worked out before one is booked.

The step itself (forward, backward and optimizer) runs on tensors without data, on any machine and without
weights (see `ledger.py`), so checkpointing, frozen parts, adapters, mixed precision and packing are all
accounted for. What FSDP or DDP allocate is added to that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lit_mm.costs.flops import copied
from lit_mm.data.collate import Sample, Visual, collate
from lit_mm.evaluation.pictures import table_of
from lit_mm.model.attention import NAME, Attention, BranchLayout, Layout
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch
from lit_mm.model.llm import packing_of
from lit_mm.model.loss import Consistency
from lit_mm.model.packing import Packing, pack
from lit_mm.model.scales import coarsest_time_scale
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.profile.experiment import Experiment
from lit_mm.profile.ledger import KINDS, Ledger, as_on, backward, fake_like
from lit_mm.training.parts import apply_parts, parameter_groups, with_parameters
from lit_mm.training.strategies import units as fsdp_units

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


@dataclass
class MemoryPlan:
    """Bytes on every GPU at the peak of a training step.

    The CUDA context, library workspaces (together about 1 GiB) and allocator fragmentation are not included.

    Args:
        parameters: Weights and buffers, or the GPU's shard of them.
        gradients: Gradients that exist at the peak.
        optimizer: The optimizer's state.
        activations: What the forward pass keeps for the backward pass, and temporary tensors.
        communication: With FSDP, gathered weights and gradients not yet reduced; with DDP, its buckets.
        moment: When the peak occurs: `forward`, `backward` or `optimizer step`.
        gpus: Number of GPUs.
        sharded: Whether parameters, gradients and optimizer state are sharded among them.
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
        """All bytes."""
        return sum(getattr(self, kind) for kind in KINDS)


def plan_of(experiment: Experiment, gpus: int, samples: int, precision: str, strategy: str) -> MemoryPlan:
    """The memory of an experiment's training step.

    Args:
        experiment: Its parts, adapters, activation checkpointing, attention and optimizer all count.
        gpus: Number of GPUs.
        samples: Samples in each GPU's batch, with one image of the experiment's first size each.
        precision: Lightning's name.
        strategy: fsdp or ddp.
    """
    vlm, model = experiment.build(), experiment.model  # then as training sets it up: dtypes, parts, checkpointing
    packing = packing_of(experiment.llm, model.packing)
    vlm.encoder.float(), vlm.projector.float()
    vlm.llm.to(getattr(torch, model.llm.dtype))
    if packing != "padded":
        vlm.llm.set_attn_implementation(NAME)
    apply_parts(vlm, model.parts)
    vlm.set_grad_checkpointing(model.activation_checkpointing)
    size, layout = experiment.sizes[0], {"packing": packing, "attention": model.attention}
    batch = example_batch(vlm, samples, size, frames=experiment.frames, **layout)

    def optimizer(copy: MatryoshkaVLM) -> Any:
        return model.optimizer(with_parameters(parameter_groups(copy, model.parts), copy))

    units = fsdp_units(vlm) if gpus > 1 and strategy != "ddp" else None
    return plan(vlm, batch, optimizer, precision, gpus, units, consistency=model.consistency)


def memory_table(
    plans: Sequence[tuple[str, MemoryPlan]], gpus: int, samples: int, precision: str, strategy: str
) -> Table:
    """The plans in GiB, one row per experiment."""
    among = f"each of {gpus} GPUs ({strategy})" if gpus > 1 else "one GPU"
    title = f"Training: GiB on {among}, {samples} samples each, {precision}; CUDA itself takes about 1 more"
    table = table_of(title, [["experiment", *KINDS, "peak", "reached in"]])
    for name, found in plans:
        sizes = [f"{getattr(found, kind) / 2**30:,.2f}" for kind in KINDS]
        table.add_row(escape(name), *sizes, f"{found.total / 2**30:,.2f}", found.moment)
    return table


def plan(
    vlm: MatryoshkaVLM,
    batch: Batch,
    optimizer: Callable[[MatryoshkaVLM], Optimizer],
    precision: str = "bf16-mixed",
    gpus: int = 1,
    units: Sequence[nn.Module] | None = None,
    device: str = "cuda",
    accumulate: bool = False,
    consistency: Consistency | None = None,
) -> MemoryPlan:
    """Run one training step on tensors without data.

    Args:
        vlm: The model, on `meta` or any other device; it is not changed. Frozen parts, training mode and
            checkpointing count as they are set.
        batch: One GPU's batch, on the CPU; see `example_batch`.
        optimizer: Makes the optimizer for a copy of `vlm`.
        precision: Lightning's name: 32-true, bf16-mixed or bf16-true.
        gpus: Number of GPUs.
        units: Modules of `vlm` that FSDP gathers as a whole; the root gathers the rest. None: every GPU
            holds a full copy (DDP).
        device: Device type, cuda or cpu.
        accumulate: Whether gradients are accumulated over several batches.
        consistency: As `model.consistency`.

    Raises:
        ValueError: The precision is not one of these.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision}: expected one of {', '.join(PRECISIONS)}")
    step = Step(vlm, precision, gpus, units)
    ledger = step.ledger
    if units is None and gpus > 1:  # DDP's buckets
        ledger.change("communication", nbytes(p for p in step.shares.parameters() if p.requires_grad))
    with as_on(device), ledger:
        step.run(batch, step.stepped(optimizer, device), accumulate, consistency)
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
        vlm: The model; the batch has all its scales.
        samples: Number of samples.
        size: Height and width of an image, in pixels.
        prefix: Tokens before the image (35 with vicuna_v1).
        answer: Tokens after it, all supervised; LLaVA's mixture averages about 200.
        frames: Images per sample.
        packing: As `model.packing`.
        attention: As `model.attention`.
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
    batch.packed = pack(batch, vlm.projector.scales, packing, attention, vlm.router is not None)
    return batch


class Step:
    """One training step in Lightning's order, on fake tensors.

    Forward and backward run on one copy of the model and the optimizer steps another: with FSDP they differ.

    Attributes:
        ledger: Counts the step's memory.
        whole: The full model that computes, in its compute dtype.
        shares: One GPU's shard.
        gathering: What FSDP allocates beside the shard.
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
            self.ledger.book(parameter, "parameters", size=0)  # counted with the shares or in Gathering
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, share=share: self._hand_over(p, share))
        modules = [copies[id(unit)] for unit in units or []]
        self.gathering = Gathering(self.ledger, self.whole, modules) if sharded else None

    def stepped(self, make: Callable[[MatryoshkaVLM], Optimizer], device: str) -> Optimizer:
        """The optimizer after a first step: its state exists, and so do that step's gradients."""
        optimizer = make(self.shares)
        for group in optimizer.param_groups:
            if device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True  # torch's default there
            for share in group["params"]:
                self._add_gradient(share)
        with self.ledger.making("optimizer"):
            optimizer.step()
        return optimizer

    def run(self, batch: Batch, optimizer: Optimizer, accumulate: bool, consistency: Consistency | None) -> None:
        """A step after the first. Lightning clears gradients between forward and backward, so the previous
        step's gradients are still there in the forward pass."""
        self.ledger.most, self.ledger.phase = Counter(), "forward"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            total = self.whole(self._fake(batch), consistency=consistency).loss
        if not accumulate:
            optimizer.zero_grad()
        self.ledger.phase = "backward"
        backward(total)
        if self.gathering is not None:
            self.gathering.end()
        self.ledger.phase = "optimizer step"
        optimizer.step()

    def _fake(self, batch: Batch) -> Batch:
        """The batch with fake pixels, and with stand-ins for kernels that need CUDA."""
        pixels = [fake_like(group, self.ledger.fake) for group in batch.images.groups]
        for group in pixels:
            self.ledger.book(group, "activations")
        packed = [own if isinstance(own.layout, BranchLayout) else replace(own, layout=Fused()) for own in batch.packed]
        return replace(batch, images=replace(batch.images, groups=pixels), packed=packed)

    def _add_gradient(self, share: Tensor) -> None:
        with self.ledger.making("gradients"):
            share.grad = torch.empty_like(share)

    def _hand_over(self, parameter: Tensor, share: Tensor) -> None:
        """A finished gradient moves to the shard."""
        parameter.grad = None
        if share.grad is None:
            self._add_gradient(share)


class Gathering:
    """What FSDP holds beside the shards.

    - The root's full weights, throughout.
    - Forward: the current unit's weights twice, as the receive buffer stays until the next unit's arrives.
    - Backward: the weights of the current unit and of the next one, which is prefetched; the current unit's
      gradients as they appear; and the previous unit's in float32 while they are reduced.
    - The root's gradients, until the end of the backward pass.
    """

    def __init__(self, ledger: Ledger, model: nn.Module, units: Sequence[nn.Module]) -> None:
        inner = {id(parameter) for unit in units for parameter in unit.parameters()}
        self.ledger, self.root = ledger, [p for p in model.parameters() if id(p) not in inner]
        self.held = {"root": nbytes(self.root), "unit": 0, "others": 0}  # bytes; unit: its gradients
        self.order: list[nn.Module] = []
        self.at_work: nn.Module | None = None
        for parameter in model.parameters():
            if parameter.requires_grad:
                place = "unit" if id(parameter) in inner else "root"
                parameter.register_post_accumulate_grad_hook(lambda p, place=place: self._add(place, p.nbytes))
        for unit in units:
            unit.register_forward_pre_hook(lambda unit, inputs: self._works(unit))
            unit.register_forward_hook(lambda unit, inputs, outputs: self._follow(unit, outputs))

    def end(self) -> None:
        """The backward pass is over: the remaining gradients are reduced, the root's last."""
        self._hold(others=self._sent())
        self._hold(unit=0, others=in_float32(self.root))
        self._hold(root=0, others=0)

    def _works(self, unit: nn.Module) -> None:
        weights = nbytes(unit.parameters())
        if self.ledger.phase == "forward":
            self.order.append(unit)
            self._hold(others=2 * weights)
        elif unit is not self.at_work:
            sent, number = self._sent(), self.order.index(unit)
            fetched = nbytes(self.order[number - 1].parameters()) if number else 0
            self._hold(others=weights + sent)
            self._hold(unit=0, others=weights + sent + fetched)
            self.at_work = unit

    def _follow(self, unit: nn.Module, outputs: Any) -> None:
        """A unit's backward pass begins with the first gradient of its outputs."""
        if self.ledger.phase == "forward":
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(lambda gradient: self._works(unit))

    def _sent(self) -> int:
        return in_float32(self.at_work.parameters()) if self.at_work is not None else 0

    def _add(self, place: str, size: int) -> None:
        """A gradient waits."""
        self._hold(**{place: self.held[place] + size})

    def _hold(self, **sizes: int) -> None:
        self.held |= sizes
        self.ledger.change("communication", sum(self.held.values()) - self.ledger.alive["communication"])


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Total bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def in_float32(parameters: Iterable[Tensor]) -> int:
    """Bytes of the parameters' gradients in float32."""
    return sum(4 * parameter.numel() for parameter in parameters if parameter.requires_grad)


class Fused(Layout):
    """Takes as much memory as flex attention's one kernel for the packed sequence, which needs CUDA."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        """Attend over the whole sequence."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped).transpose(1, 2)
