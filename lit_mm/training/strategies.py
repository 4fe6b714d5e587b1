"""Many devices: what is sharded as a unit, in which precision, and how weights get there.

The units follow from the model's own blocks: every decoder layer of the LLM, every stage (or ViT
block) of the encoder, the projector; embeddings, stem, last norm and output head are the root's.

    --trainer.strategy ddp      every device holds everything
    --trainer.strategy fsdp2    parameters, gradients and optimizer states shared out (fully_shard)
    --trainer.strategy fsdp1    likewise, PyTorch's first implementation
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torchmetrics import Metric

from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.checkpoints import Weights, materialize

warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view")  # nothing changes it in place


class WholeCheckpoints(Strategy):
    """A checkpoint replaces the one before when it is complete: a killed run leaves no folder of both."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write beside, then rename."""
        final = Path(self.broadcast(filepath))
        part = final.with_name(f"{final.name}.part")
        self._on_rank_zero(remove, part)
        super().save_checkpoint(checkpoint, part, storage_options)
        self._on_rank_zero(lambda path: put_in_place(path, final), part)

    def _on_rank_zero(self, act: Callable[[Path], Any], path: Path) -> None:
        self.barrier()
        if self.is_global_zero:
            act(path)
        self.barrier()


def put_in_place(part: Path, final: Path) -> None:
    """Rename a file or folder; what stood there goes when the new one is there."""
    before = final.with_name(f"{final.name}.before")
    remove(before)
    if final.exists():
        final.rename(before)
    part.rename(final)
    remove(before)


def remove(path: Path) -> None:
    """A file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


class FSDP2(WholeCheckpoints, ModelParallelStrategy):
    """Parameters, gradients and optimizer states shared out among all devices (`fully_shard`)."""

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        """Shard over all devices of all nodes.

        Args:
            save_distributed_checkpoint: Every rank writes its own share into a folder; false gathers
                one file on rank 0.
        """
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """As many shares as there are devices: `auto` would take the number of nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class FSDP1(WholeCheckpoints, FSDPStrategy):
    """Likewise with FullyShardedDataParallel. Every process builds the whole model on its CPU first."""

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        """Shard over all devices of all nodes.

        Args:
            save_distributed_checkpoint: As FSDP2's.
        """
        super().__init__(state_dict_type="sharded" if save_distributed_checkpoint else "full")

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """Compute in bf16, add gradients up in float32; Lightning would add them up in bf16."""
        if self.precision_plugin.precision == "bf16-mixed":
            return MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        return super().mixed_precision_config

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        """Wrap the model's own blocks, then the whole; Lightning could not know them, nor share a CPU."""
        vlm = cast(Any, model).vlm
        vlm.encoder.to(memory_format=torch.contiguous_format)  # other weights cannot be made flat
        for module in model.modules():
            if isinstance(module, Metric):
                module.to(self.root_device)
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(unit) for unit in units(vlm)}),
            mixed_precision=self.mixed_precision_config,
            device_id=self.root_device,
            **self.kwargs,
        )


StrategyRegistry.register("fsdp2", FSDP2, description=FSDP2.__doc__ or "", override=True)
StrategyRegistry.register("fsdp1", FSDP1, description=FSDP1.__doc__ or "", override=True)


def is_sharded(trainer: Trainer | None) -> bool:
    """Whether ranks wait for each other's parameters."""
    return trainer is not None and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)


def units(vlm: MatryoshkaVLM) -> list[nn.Module]:
    """What is gathered as a whole when it computes: decoder layers, encoder stages, the projector."""
    return [*vlm.encoder.stages, vlm.projector, *vlm.decoder_layers]


def policy_of(precision: str) -> MixedPrecisionPolicy:
    """What units compute in and gradients are added up in.

    Raises:
        ValueError: A precision that needs loss scaling.
    """
    kinds = {
        "32-true": MixedPrecisionPolicy(cast_forward_inputs=False),
        "bf16-mixed": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
        "bf16-true": MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False),
    }
    if precision not in kinds:
        raise ValueError(f"trainer.precision {precision} does not go with sharding: expected one of {', '.join(kinds)}")
    return kinds[precision]


def shard(vlm: MatryoshkaVLM, mesh: DeviceMesh, strategy: Strategy, llm_weights: Weights | None = None) -> None:
    """Shard every unit, then the root, over a mesh (FSDP2).

    An LLM on the `meta` device gets its weights unit by unit, so that no process ever holds more
    than one unit beside its own share.
    """
    policy = policy_of(str(strategy.precision_plugin.precision))
    vlm.encoder.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    layers = set(vlm.decoder_layers)
    for unit in units(vlm):
        if unit in layers and llm_weights is not None:
            materialize(vlm.llm, unit, llm_weights)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    if llm_weights is not None:
        materialize(vlm.llm, vlm.llm, llm_weights)
    fully_shard(vlm, mesh=mesh, mp_policy=policy)
    for method in ("encode", "run"):  # which must not call each other, nor forward call them
        register_fsdp_forward_method(vlm, method)
