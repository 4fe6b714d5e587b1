"""A whole training step, with optimizer: memory against `python -m lit_mm profile`'s plan, time, and MFU.

    python experiments/benchmarks/training_step.py --size 7b --precision bf16-true --checkpointing encoder llm
    python experiments/benchmarks/training_step.py --device cpu --size tiny --precision 32-true
    python experiments/benchmarks/training_step.py --device cpu --size small --precision 32-true --consistency finest

A five-stage ConvNeXt and a Llama with random weights, on samples of one image, 35 tokens before it and 200 after it,
at five scales. Steps are those of Lightning: forward, gradients cleared, backward, AdamW. The first two are not timed.
MFU counts the operations that the model needs, without recomputation, at the peak that `lit_mm.costs.devices` lists.

--consistency measures steps with and without `model.consistency` in alternation. Their ratio is printed beside
its arithmetic limit: the divergence takes SOFT operations for each logit of a coarser scale, and no matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from lightning_utilities.core.apply_func import apply_to_collection
from nested_step import SCALES, SIZES, build, hardware
from torch import Tensor

from lit_mm.costs.devices import arithmetic_of, peak_flops
from lit_mm.costs.flops import Costs
from lit_mm.model.batch import Batch
from lit_mm.model.loss import Consistency, Teacher
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.profile.memory_plan import PRECISIONS, MemoryPlan, example_batch, plan
from lit_mm.training.optim import FusedAdamW

WARM_UP = 2
SOFT = 7  # p = exp, difference of logarithms, product, sum; p - q, product, sum
PIXELS = 1536


@dataclass
class Result:
    """Bytes and seconds. mfu is None on a device whose peak is unknown, measured and reserved bytes on a CPU.
    seconds_without are those of steps without consistency, and empty unless it is asked for."""

    planned_bytes: int | None
    measured_bytes: int | None
    reserved_bytes: int | None
    seconds: list[float]
    step_flops: int
    mfu: float | None
    loss: float
    seconds_without: list[float]
    limit: float


def model_of(arguments: argparse.Namespace, device: str) -> MatryoshkaVLM:
    dtype = torch.bfloat16 if arguments.precision == "bf16-true" else torch.float32
    vlm = build(SIZES[arguments.size], device, dtype).train()
    vlm.set_grad_checkpointing(arguments.checkpointing)
    return vlm


def optimizer_of(vlm: MatryoshkaVLM) -> torch.optim.Optimizer:
    return FusedAdamW([{"params": list(vlm.parameters()), "lr": 1e-5}])


def batch_of(arguments: argparse.Namespace, vlm: MatryoshkaVLM) -> Batch:
    return example_batch(vlm, arguments.samples, (PIXELS, PIXELS), attention=arguments.attention)


def real(batch: Batch, device: str) -> Batch:
    pixels = [torch.randint(256, group.shape, dtype=torch.uint8) for group in batch.images.groups]
    batch = replace(batch, images=replace(batch.images, groups=pixels))
    return apply_to_collection(batch, Tensor, Tensor.to, device)


def planned_by(arguments: argparse.Namespace) -> MemoryPlan:
    vlm = model_of(arguments, "meta")
    batch, consistency = batch_of(arguments, vlm), consistency_of(arguments)
    return plan(vlm, batch, optimizer_of, arguments.precision, device=arguments.device, consistency=consistency)


def consistency_of(arguments: argparse.Namespace) -> Consistency | None:
    name, temperature = arguments.consistency, arguments.temperature
    return Consistency(teacher=name, temperature=temperature) if name else None


def measured(arguments: argparse.Namespace) -> Result:
    planned = None if arguments.no_plan else planned_by(arguments)
    vlm, on_gpu = model_of(arguments, arguments.device), arguments.device == "cuda"
    optimizer, batch = optimizer_of(vlm), real(batch_of(arguments, vlm), arguments.device)
    mixed, consistency = arguments.precision == "bf16-mixed", consistency_of(arguments)

    def step(consistency: Consistency | None) -> float:
        start = time.perf_counter()
        with torch.autocast(arguments.device, torch.bfloat16, enabled=mixed):
            loss = vlm(batch, consistency=consistency).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        return time.perf_counter() - start

    losses: list[float] = []
    without: list[float] = []
    seconds: list[float] = []
    for number in range(WARM_UP + arguments.steps):
        if number == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        without += [step(None)] if consistency else []
        seconds.append(step(consistency))
    seconds, without = seconds[WARM_UP:], without[WARM_UP:]
    flops = Costs(vlm).step(batch).total.training
    peak = peak_flops(hardware(arguments.device), arithmetic_of(arguments.precision))
    mfu = flops / statistics.median(seconds) / peak if peak else None
    taken = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if on_gpu else [None, None]
    coarser = len(batch.packed[0].labels) * (1 - 1 / len(SCALES))
    limit = 1 + SOFT * coarser * SIZES[arguments.size].vocabulary / flops
    return Result(planned.total if planned else None, *taken, seconds, flops, mfu, losses[-1], without, limit)


def gib(number: int | None) -> str:
    return "–" if number is None else f"{number / 2**30:.2f}"


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="1b", choices=list(SIZES))
    parser.add_argument("--precision", default="bf16-mixed", choices=PRECISIONS)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--attention", default="branch", choices=["branch", "flex"])
    parser.add_argument("--checkpointing", nargs="*", default=[], choices=["encoder", "llm"])
    parser.add_argument("--consistency", choices=get_args(Teacher), help="measure steps with and without it")
    parser.add_argument("--temperature", type=float, default=1.0, help="of --consistency")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--no-plan", action="store_true", help="measure only")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parsed(words)
    found = measured(arguments)
    versions: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    print(hardware(arguments.device), versions, settings)
    mfu = f"{found.mfu:.3f}" if found.mfu else "unknown"
    print(f"GiB: {gib(found.planned_bytes)} planned, {gib(found.measured_bytes)} measured")
    print(f"step: {statistics.median(found.seconds):.3f} s, {found.step_flops / 1e12:.1f} TFLOP, MFU {mfu}")
    if found.seconds_without:
        ratio = statistics.median(found.seconds) / statistics.median(found.seconds_without)
        pairs = [a / b for a, b in zip(found.seconds, found.seconds_without, strict=True)]
        spread = f"pairs of steps {min(pairs):.3f} to {max(pairs):.3f}"
        print(f"consistency: {ratio:.3f} of a step without ({spread}), arithmetic limit {found.limit:.4f}")
    if arguments.json:
        result = {"hardware": hardware(arguments.device), "versions": versions, **settings, **asdict(found)}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
