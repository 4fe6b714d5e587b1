"""How much memory training takes on every GPU, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from lit_mm.model.attention import NAME
from lit_mm.model.llm import packing_of
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.profile.experiment import Experiment
from lit_mm.profile.memory_plan import KINDS, MemoryPlan, example_batch, plan
from lit_mm.training.parts import apply_parts, parameter_groups, with_parameters
from lit_mm.training.strategies import units


def plan_of(experiment: Experiment, gpus: int, samples: int, precision: str, strategy: str) -> MemoryPlan:
    """What a training step takes.

    Args:
        experiment: Its parts, adapters, activation checkpointing, attention and optimizer count.
        gpus: How many.
        samples: In every GPU's batch, of one image of the experiment's first size each.
        precision: Lightning's name.
        strategy: How several GPUs share the work: fsdp or ddp.
    """
    vlm, model = experiment.build(), experiment.model  # in the types, parts and checkpointing of training
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

    shared = units(vlm) if gpus > 1 and strategy != "ddp" else None
    return plan(vlm, batch, optimizer, precision, gpus, shared)


def memory_table(
    plans: Sequence[tuple[str, MemoryPlan]], gpus: int, samples: int, precision: str, strategy: str
) -> Table:
    """Experiments' plans, a row each, in GiB."""
    among = f"each of {gpus} GPUs ({strategy})" if gpus > 1 else "one GPU"
    title = f"Training: GiB on {among}, {samples} samples each, {precision}; CUDA itself takes about 1 more"
    table = Table(title=title, title_justify="left")
    table.add_column("experiment")
    for kind in (*KINDS, "all, at most", "in the"):
        table.add_column(kind, justify="right")
    for name, found in plans:
        sizes = [f"{getattr(found, kind) / 2**30:,.2f}" for kind in KINDS]
        table.add_row(escape(name), *sizes, f"{found.total / 2**30:,.2f}", found.moment)
    return table
