"""Training steps of a middle size for test_memory, and what they really take, in a process of its own.

python -m tests.helpers.measured_step cpu plain sequential    # JSON: case -> bytes at most
python -m tests.helpers.measured_step cpu sharded             # of two ranks, and of their state
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lit_mm.model.attention import NAME
from lit_mm.model.batch import Batch
from lit_mm.model.encoder import ConvNeXtEncoder
from lit_mm.model.packing import Packing
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.profile.memory_plan import example_batch
from tests.helpers.processes import environment_of, free_port

RETURNING = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""Environment in which freed memory goes back to the system at once, so that what is resident is what lives."""


@dataclass
class Case:
    """A model and a batch: a small encoder and a narrow LLM, 0.5 to 1.5 GB in all."""

    samples: int = 4
    answer: int = 60
    packing: Packing = "packed"
    layers: int = 4
    vocabulary: int = 8000
    frozen_llm: bool = False
    checkpointing: bool = False
    precision: str = "32-true"
    accumulate: bool = False


CASES = {
    "plain": Case(),
    "frozen llm": Case(frozen_llm=True),
    "accumulated": Case(checkpointing=True, accumulate=True),
    "sequential": Case(packing="sequential"),
    "bf16-mixed": Case(precision="bf16-mixed"),
    "bf16-true": Case(precision="bf16-true", checkpointing=True),
}
SHARDED = Case(checkpointing=True, samples=2, layers=3)
FIRST = Case(samples=1, layers=1, vocabulary=100, answer=8)
"""Run before all others: what libraries keep from then on is not a step's."""
WIDTH = 512
SIDE, SCALES = 256, [64, 16, 4, 1]


def build(case: Case) -> MatryoshkaVLM:
    """On torch's default device."""
    encoder, llm = ConvNeXtEncoder("convnext_nano"), language_model(case)
    vlm = MatryoshkaVLM(encoder, MatryoshkaProjector(encoder.num_features, WIDTH, SCALES), llm).train()
    if case.frozen_llm:
        llm.requires_grad_(False).eval()
    if case.checkpointing:
        encoder.set_grad_checkpointing()
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    return vlm


def language_model(case: Case) -> LlamaForCausalLM:
    """With two query heads a key head."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=case.vocabulary,
        attn_implementation=NAME,
    )
    return LlamaForCausalLM(config)


def batch_of(case: Case, vlm: MatryoshkaVLM) -> Batch:
    return example_batch(vlm, case.samples, (SIDE, SIDE), answer=case.answer, packing=case.packing)


def optimizer_of(vlm: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in vlm.parameters() if parameter.requires_grad], lr=1e-4)


def units_of(vlm: MatryoshkaVLM) -> list[nn.Module]:
    return [*vlm.encoder.trunk.stages, vlm.projector, *vlm.llm.model.layers]


def step(case: Case, device: str = "cpu", prepare: Callable[[MatryoshkaVLM], None] = lambda vlm: None) -> list[int]:
    """What Lightning does in a step after the first; bytes of parameters and buffers, gradients, and AdamW's state."""
    with torch.device(device):
        vlm = build(case)
    if case.precision == "bf16-true":
        vlm.to(torch.bfloat16)
    prepare(vlm)
    optimizer = optimizer_of(vlm)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    batch = real(batch_of(case, vlm), device)
    with torch.autocast(device, torch.bfloat16, enabled=case.precision == "bf16-mixed"):
        total = vlm(batch).loss
    if not case.accumulate:
        optimizer.zero_grad()
    total.backward()
    optimizer.step()
    gradients = [p.grad for p in vlm.parameters() if p.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [sum(map(local_bytes, tensors)) for tensors in ([*vlm.parameters(), *vlm.buffers()], gradients, states)]


def real(batch: Batch, device: str) -> Batch:
    pixels = [torch.randint(256, group.shape, dtype=torch.uint8) for group in batch.images.groups]
    batch = replace(batch, images=replace(batch.images, groups=pixels))
    return apply_to_collection(batch, torch.Tensor, torch.Tensor.to, device)


def local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def measured(case: Case, device: str = "cpu", **options: Any) -> tuple[int, list[int]]:
    """Bytes at most, and those of the state."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        state = step(case, device, **options)
        return torch.cuda.max_memory_allocated() - before, state
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most that was resident, starts anew
    state = step(case, device, **options)
    return resident("VmHWM") - before, state


def resident(name: str) -> int:
    """Bytes of a line of this process's status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def on_two_ranks() -> tuple[int, list[int]]:
    """The same of a sharded step (FSDP, gloo) on the first of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        mp.start_processes(rank_of, (2, free_port(), file), 2, start_method="fork")
        return json.loads(file.read_text())


def rank_of(rank: int, ranks: int, port: int, file: Path) -> None:
    os.environ |= environment_of(rank, ranks, port)
    dist.init_process_group("gloo")
    step(FIRST, prepare=sharded)
    peak, state = measured(SHARDED, prepare=sharded)
    if rank == 0:
        file.write_text(json.dumps([peak, state]))
    dist.destroy_process_group()


def sharded(vlm: MatryoshkaVLM) -> None:
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    vlm.encoder.to(memory_format=torch.contiguous_format)
    for unit in [*units_of(vlm), vlm]:
        fully_shard(unit, mp_policy=policy)
    gc.collect()


if __name__ == "__main__":
    torch.set_num_threads(1)
    device, *names = sys.argv[1:]
    found = {name: on_two_ranks() for name in names if name == "sharded"}  # forked before this process's first step
    step(FIRST, device)
    print(json.dumps(found | {name: measured(CASES[name], device)[0] for name in names if name in CASES}))
