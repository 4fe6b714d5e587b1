"""Measures training steps between two reports: counts, rates over all ranks, and the time of each part.

Nothing here synchronizes with the device. Counts come from the CPU (`Batch.counts`), image sizes are
shapes, and seconds are wall-clock time between two reports, long enough for the GPU's queue to even out.
Times of parts come from CUDA events that are read once the GPU has passed them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any, cast

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from lit_mm.costs.flops import Costs, ModelFlops, Size
from lit_mm.costs.timing import Stopwatch
from lit_mm.model.batch import Batch, Counts
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.parts import PARTS

Numbers = dict[str, float]
GIB = 1024**3
LARGEST = ("seconds", "waited", "allocated", "reserved", "process")
"""Numbers reduced over ranks by their maximum, because ranks run in step; all others are summed."""
OTHER = "other"
"""The optimizer, logging, and everything else outside encoder, projector and LLM."""


class Clock:
    """Training time. The time between two batches counts, except across a pause (validation, a checkpoint,
    the end of an epoch), where only the wait for data counts."""

    def __init__(self) -> None:
        self.seconds, self.waited, self.paused, self._running = 0.0, 0.0, True, False
        self._at, self._told = 0.0, 0.0
        self._loader: Any = None

    def start(self, loader: Any) -> None:
        """A batch begins. This package's loader reports in `waited` how long training has waited for it."""
        now, told = time.perf_counter(), getattr(loader, "waited", 0.0)
        wait = told - (self._told if loader is self._loader else 0.0)
        self.seconds += wait if self.paused else now - self._at
        self.waited += wait
        self.paused, self._running, self._at, self._loader, self._told = False, True, now, loader, told

    def end(self) -> None:
        """A batch is done, or fully queued on the GPU. Nothing after a pause within the batch counts."""
        now = time.perf_counter()
        self.seconds += now - self._at if self._running else 0.0
        self._at, self._running = now, False

    def pause(self) -> None:
        """What follows is no training until the next batch begins."""
        if self._running:
            self.end()
        self.paused = True

    def take(self) -> Numbers:
        """Seconds since the last call and, if the loader reports it, how many of them were spent waiting for data."""
        taken = {"seconds": self.seconds} | ({"waited": self.waited} if hasattr(self._loader, "waited") else {})
        self.seconds = self.waited = 0.0
        return taken


class Meter:
    """Counts what this rank's batches contain.

    Args:
        scales: All image scales of the model.
        stride: The encoder pads image sides to a multiple of this.
        costs: The model's costs; None if its FLOPs are unknown.
    """

    def __init__(self, scales: Sequence[int], stride: int, costs: Costs | None) -> None:
        self.scales, self.stride, self.costs = scales, stride, costs
        self._reset()

    def _reset(self) -> None:
        self.sums, self.sizes = Counter[str](), Counter[Size]()
        self.shown = [0] * len(self.scales)

    def add(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            ValueError: The batch has no counts.
        """
        counts, kind = counts_in(batch), "visual" if batch.images.groups else "alone"
        self.sizes.update({cast(Size, tuple(group.shape[-2:])): len(group) for group in batch.images.groups})
        for name in ("text", "visual", "labels", "padding", "shown_pixels"):
            self.sums[name] += getattr(counts, name)
        for name in ("text", "visual", "pairs", "labels"):
            self.sums[f"{kind} {name}"] += getattr(counts, name)
        self.sums["frames"] += batch.images.frames
        self.shown = [before + more for before, more in zip(self.shown, counts.shown, strict=True)]

    def take(self) -> Numbers:
        """The sums since the last call, under the same names on every rank."""
        sums, stride = self.sums, self.stride
        own = {name: float(sums[name]) for name in ("text", "visual", "labels", "padding", "shown_pixels", "frames")}
        own["images"] = self.sizes.total() - sums["frames"]
        own["pixels"] = sum(height * width * number for (height, width), number in self.sizes.items())
        own["encoded_pixels"] = sum(
            (height + -height % stride) * (width + -width % stride) * number
            for (height, width), number in self.sizes.items()
        )
        own |= {f"shown {scale}": float(number) for scale, number in zip(self.scales, self.shown, strict=True)}
        if self.costs:  # FLOPs are linear in the counts, so the sums' FLOPs are the batches' total
            flops = self.costs.images((number, size) for size, number in self.sizes.items())
            for kind in ("visual", "alone"):
                tokens = sums[f"{kind} text"] + sums[f"{kind} visual"]
                flops += self.costs.text(tokens, sums[f"{kind} pairs"], sums[f"{kind} labels"], kind == "visual")
            own |= training_flops(flops)
        self._reset()
        return own


def counts_in(batch: Batch) -> Counts:
    """The batch's counts.

    Raises:
        ValueError: It has none.
    """
    if batch.counts is None:
        raise ValueError(
            "TokenEfficiency: expected Batch.counts, found none; set it to "
            "lit_mm.costs.counts.counts_of(batch, scales) before the batch goes to a device"
        )
    return batch.counts


def training_flops(flops: ModelFlops) -> Numbers:
    """Training FLOPs by part; the LLM's include its head's. Recomputation by activation checkpointing is left
    out, as MFU is defined on the FLOPs that the model needs (PaLM, appendix B)."""
    llm = flops.llm.training + flops.head.training
    return {
        "encoder_flops": float(flops.encoder.training),
        "projector_flops": float(flops.projector.training),
        "llm_flops": float(llm),
    }


class PartTimes:
    """Time of encoder, projector and LLM in a training step, forward and backward, one step at a time.

    The step, including all batches it accumulates and the optimizer, is cut where one part hands over to
    another: by module hooks in the forward pass and by hooks on the tensors between parts in the backward
    pass. The hooks exist only while a step is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.running = device, False
        self._reset()

    def _reset(self) -> None:
        self.watch, self.labels, self.hooks = Stopwatch(self.device), list[str](), list[Any]()

    def start(self, vlm: MatryoshkaVLM) -> None:
        """Measure the step that begins now."""
        self._reset()
        self.running = True
        self.mark(OTHER)
        self.hooks = [
            vlm.encoder.register_forward_pre_hook(self._marks("encoder")),
            vlm.encoder.register_forward_hook(self._marks(OTHER)),
            vlm.projector.register_forward_pre_hook(self._enter_projector),
            vlm.projector.register_forward_hook(self._leave_projector),
            vlm.llm.base_model.register_forward_pre_hook(self._marks("llm")),
        ]

    def mark(self, part: str) -> None:
        """The step works on this part from now on."""
        if self.running and self.labels[-1:] != [part]:
            self.labels.append(part)
            self.watch.mark()

    def _marks(self, part: str) -> Callable[..., None]:
        return lambda *_: self.mark(part)

    def _enter_projector(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """The gradient of the encoder's grid ends the projector's backward pass and starts the encoder's."""
        self.mark("projector")
        if inputs[0].requires_grad:
            inputs[0].register_hook(self._marks("encoder"))

    def _leave_projector(self, module: Any, inputs: tuple[Tensor, ...], nested: Tensor) -> None:
        """The gradient of the visual tokens ends the LLM's backward pass and starts the projector's."""
        self.mark("llm")
        if nested.requires_grad:
            nested.register_hook(self._marks("projector"))

    def stop(self) -> None:
        """The step is over."""
        self.mark("end")
        for hook in self.hooks:
            hook.remove()
        self.running = False

    def cancel(self) -> None:
        """Drop the step: something else, such as validation, ran between its batches."""
        self.stop()
        self._reset()

    def take(self) -> Numbers | None:
        """Milliseconds by part of the measured step, returned once; None until the device has finished it."""
        if self.running or not self.labels or not self.watch.done:
            return None
        times: Numbers = {}
        for part, milliseconds in zip(self.labels, self.watch.read(), strict=False):
            times[part] = times.get(part, 0.0) + milliseconds
        self._reset()
        return times


def over_ranks(lit: Any, own: Numbers) -> Numbers:
    """Reduce the numbers over all ranks with one small all-gather, the only point where ranks wait."""
    if lit.trainer.world_size == 1:
        return own
    mine = torch.tensor(list(own.values()), dtype=torch.float64, device=lit.device)
    columns = zip(*lit.all_gather(mine).tolist(), strict=True)
    return {name: max(column) if name in LARGEST else sum(column) for name, column in zip(own, columns, strict=True)}


def objects_of_ranks(trainer: Trainer, own: Any) -> list[Any]:
    """Gather one picklable object from every rank."""
    objects = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(objects, own)
    return objects


def report(numbers: Numbers, steps: int, ranks: int, scales: Sequence[int]) -> Numbers:
    """The scalars of an interval, by the names that loggers show.

    Tokens and images are per step over all ranks. Padding is also given as a share of all positions,
    and padding to the encoder's stride as a share of encoded pixels.

    Args:
        numbers: Reduced over all ranks.
        steps: Optimizer steps in the interval.
        ranks: Number of ranks.
        scales: All image scales of the model.
    """
    visual, text, labels, padding, seconds = (numbers[n] for n in ("visual", "text", "labels", "padding", "seconds"))
    found = {
        "tokens/visual": visual / steps,
        "tokens/text": text / steps,
        "tokens/label": labels / steps,
        "tokens/padding": padding / steps,
        "tokens/padding_share": padding / max(1, padding + text + visual),
        "images/stills": numbers["images"] / steps,
        "images/frames": numbers["frames"] / steps,
        "speed/visual_tokens_per_s": visual / seconds,
        "speed/text_tokens_per_s": text / seconds,
        "speed/label_tokens_per_s": labels / seconds,
        "speed/tokens_per_s": (visual + text) / seconds,
        "speed/images_per_s": (numbers["images"] + numbers["frames"]) / seconds,
        "speed/step_ms": 1000 * seconds / steps,
    }
    shown = [int(numbers[f"shown {scale}"]) for scale in scales]
    if sum(shown):
        found["tokens/visual_per_image"] = visual / sum(shown)
        found["tokens/visual_per_image_p95"] = percentile(scales, shown, 95)
    if visual:
        found["images/pixels_per_visual_token"] = numbers["shown_pixels"] / visual
    if numbers["encoded_pixels"]:
        found["images/stride_padding_share"] = 1 - numbers["pixels"] / numbers["encoded_pixels"]
    if "waited" in numbers:
        found["speed/data_wait_share"] = numbers["waited"] / seconds
    flops = sum(numbers.get(f"{part}_flops", 0.0) for part in PARTS)
    if flops:
        found["speed/TFLOPS_per_device"] = flops / seconds / ranks / 1e12
    if flops and not isnan(numbers["peak_flops"]):
        found["speed/MFU"] = flops / seconds / numbers["peak_flops"]
    return found | {f"memory/{name}_GiB": numbers[name] / GIB for name in LARGEST[2:] if name in numbers}


def percentile(values: Sequence[int], times: Sequence[int], percent: float) -> float:
    """The smallest value that at least `percent` of all occurrences do not exceed; values[i] occurs times[i] times."""
    order = np.argsort(values)
    reached = np.cumsum(np.array(times)[order])
    return float(np.array(values)[order][np.searchsorted(reached, percent / 100 * reached[-1])])
