"""Many devices: what is sharded as a unit, in which precision, and how weights get there.

The units follow from the model's own blocks: every decoder layer of the LLM, every stage (or ViT
block) of the encoder, the projector; embeddings, stem, last norm and output head are the root's.

    --trainer.strategy ddp      every device holds everything
    --trainer.strategy fsdp     parameters, gradients and optimizer states shared out (fully_shard, FSDP2)
"""

from __future__ import annotations

import shutil
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

warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view")  # nothing changes it in place


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


class FSDP(ModelParallelStrategy):
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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write beside the target, then rename: a killed run leaves the checkpoint before or the new one."""
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
    """The old name of FSDP, for this release."""

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        """Warn.

        Args:
            save_distributed_checkpoint: As FSDP's.
        """
        rank_zero_warn("trainer.strategy: fsdp2 is called fsdp now, lit_mm.FSDP2 lit_mm.FSDP")
        super().__init__(save_distributed_checkpoint)


class FSDP1(FSDP):
    """Gone. For this release its names end in an error that says so."""

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        """Refuse.

        Args:
            save_distributed_checkpoint: Ignored.

        Raises:
            ValueError: Always.
        """
        raise ValueError("trainer.strategy: FSDP1 is gone, use fsdp")


StrategyRegistry.register("fsdp", FSDP, description=FSDP.__doc__ or "", override=True)
StrategyRegistry.register("fsdp2", FSDP2, description=FSDP2.__doc__ or "", override=True)
for name in ("fsdp1", "fsdp_cpu_offload"):
    StrategyRegistry.register(name, FSDP1, description="gone, use fsdp", override=True)
FSDPStrategy.get_registered_strategies().clear()  # Lightning's own `fsdp`, FSDP1, which it refuses on a CPU


def is_sharded(trainer: Trainer | None) -> bool:
    """Whether ranks wait for each other's parameters."""
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


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
    """Shard every unit, then the root, over a mesh.

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
