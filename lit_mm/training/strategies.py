"""Sharding over several devices: the units of FSDP, their precision, and how they get their weights.

A unit is a decoder layer of the LLM, a stage (or ViT block) of the encoder, or the projector. Embeddings,
stem, last norm and output head belong to the root.

    --trainer.strategy ddp      every device holds everything
    --trainer.strategy fsdp     parameters, gradients and optimizer states are sharded (fully_shard, FSDP2)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.checkpoints import Weights, materialize
from lit_mm.training.saving import put_in_place, remove

warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view")  # it is not changed in place


class FSDP(ModelParallelStrategy):
    """Parameters, gradients and optimizer states are sharded over all devices (`fully_shard`)."""

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        """Shard over all devices of all nodes.

        Args:
            save_distributed_checkpoint: Every rank writes its own shard into a folder; false: rank 0
                gathers everything into one file.
        """
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """Shard over all devices; `auto` would take the number of nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write under a temporary name, then rename: a killed run leaves the previous checkpoint or the new one."""
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


class FSDP2(FSDP):
    """The old name of FSDP, which works for this release."""

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        rank_zero_warn("trainer.strategy: fsdp2 is called fsdp now, and lit_mm.FSDP2 lit_mm.FSDP")
        super().__init__(save_distributed_checkpoint)


class FSDP1(FSDP):
    """No longer supported: for this release its names raise an error that says so."""

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        raise ValueError("trainer.strategy: FSDP1 is gone, use fsdp")


StrategyRegistry.register("fsdp", FSDP, description=FSDP.__doc__ or "", override=True)
StrategyRegistry.register("fsdp2", FSDP2, description=FSDP2.__doc__ or "", override=True)
for name in ("fsdp1", "fsdp_cpu_offload"):
    StrategyRegistry.register(name, FSDP1, description="gone, use fsdp", override=True)
FSDPStrategy.get_registered_strategies().clear()  # Lightning's own `fsdp` is FSDP1, which it refuses on a CPU


def is_sharded(trainer: Trainer | None) -> bool:
    """Whether parameters are sharded, so that all ranks must run the same number of forwards."""
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


def units(vlm: MatryoshkaVLM) -> list[nn.Module]:
    """The modules whose parameters are gathered as a whole: encoder stages, the projector, decoder layers."""
    return [*vlm.encoder.stages, vlm.projector, *vlm.decoder_layers]


def policy_of(precision: str) -> MixedPrecisionPolicy:
    """The types that units compute in and that gradients are reduced in.

    Raises:
        ValueError: The precision needs loss scaling.
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
    """Shard every unit and then the root over a device mesh.

    An LLM on the `meta` device is loaded unit by unit from `llm_weights`, so that no process holds more
    than one whole unit besides its own shards.
    """
    policy = policy_of(str(strategy.precision_plugin.precision))
    vlm.encoder.to(memory_format=torch.contiguous_format)  # the only one that fully_shard accepts
    layers = set(vlm.decoder_layers)
    for unit in units(vlm):
        if unit in layers and llm_weights is not None:
            materialize(vlm.llm, unit, llm_weights)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    if llm_weights is not None:
        materialize(vlm.llm, vlm.llm, llm_weights)
    fully_shard(vlm, mesh=mesh, mp_policy=policy)
    for method in ("encode", "run"):  # these and forward must not call each other
        register_fsdp_forward_method(vlm, method)
