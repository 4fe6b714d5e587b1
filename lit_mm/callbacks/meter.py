"""What training steps did between two reports, in Python numbers, and their rates over all ranks.

Nothing here asks a device: batches were counted on the CPU (`Batch.counts`), image sizes are shapes,
time is the wall clock's between two reports, over which what a GPU has queued evens out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from math import isnan
from typing import Any, cast

import numpy as np
import torch

from lit_mm.costs.flops import Costs, ModelFlops, Size
from lit_mm.model.batch import Batch, Counts
from lit_mm.training.parts import PARTS

Numbers = dict[str, float]
GIB = 1024**3
LARGEST = ("seconds", "waited", "allocated", "reserved", "process")
"""What is the largest of all ranks, as they go in step; all else is their sum."""


class Clock:
    """Seconds of training. What lies between two batches counts as well, unless it was a pause
    (validation, a checkpoint, the end of an epoch): of that only the wait for data counts."""

    def __init__(self) -> None:
        self.seconds, self.waited, self.paused = 0.0, 0.0, True
        self._at, self._told = 0.0, 0.0
        self._loader: Any = None

    def start(self, loader: Any) -> None:
        """A batch begins; the loader it came from tells how long it let us wait, if it is this package's."""
        now, told = time.perf_counter(), getattr(loader, "waited", 0.0)
        wait = told - (self._told if loader is self._loader else 0.0)
        self.seconds += wait if self.paused else now - self._at
        self.waited += wait
        self.paused, self._at, self._loader, self._told = False, now, loader, told

    def end(self) -> None:
        """A batch is done, or has been queued."""
        now = time.perf_counter()
        self.seconds += now - self._at
        self._at = now

    def take(self) -> Numbers:
        """Seconds since they were last taken and, where it is known, those of waiting for data among them."""
        taken = {"seconds": self.seconds} | ({"waited": self.waited} if hasattr(self._loader, "waited") else {})
        self.seconds = self.waited = 0.0
        return taken


class Meter:
    """What one rank's batches held since the last report.

    Args:
        scales: All scales of the model.
        stride: To which the encoder pads the sides of images.
        costs: Of the model; None: FLOPs are not known.
    """

    def __init__(self, scales: Sequence[int], stride: int, costs: Costs | None) -> None:
        self.scales, self.stride, self.costs = scales, stride, costs
        self._forget()

    def _forget(self) -> None:
        self.sums, self.sizes = Counter[str](), Counter[Size]()
        self.shown = [0] * len(self.scales)

    def add(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            ValueError: Nobody counted it before it went to a device.
        """
        counts, kind = counted(batch), "visual" if batch.images.groups else "alone"
        self.sizes.update({cast(Size, tuple(group.shape[-2:])): len(group) for group in batch.images.groups})
        for name in ("text", "visual", "labels", "padding", "shown_pixels"):
            self.sums[name] += getattr(counts, name)
        for name in ("text", "visual", "pairs", "labels"):
            self.sums[f"{kind} {name}"] += getattr(counts, name)
        self.sums["frames"] += batch.images.frames
        self.shown = [before + more for before, more in zip(self.shown, counts.shown, strict=True)]

    def take(self) -> Numbers:
        """The sums since they were last taken; the same names on every rank."""
        images, sums = sum(self.sizes.values()), self.sums
        own = {name: float(sums[name]) for name in ("text", "visual", "labels", "padding", "shown_pixels", "frames")}
        own["images"] = images - sums["frames"]
        own["pixels"] = sum(height * width * number for (height, width), number in self.sizes.items())
        own["encoded_pixels"] = sum(self._padded(size) * number for size, number in self.sizes.items())
        own |= {f"shown {scale}": float(number) for scale, number in zip(self.scales, self.shown, strict=True)}
        own |= training_flops(self._flops()) if self.costs else {}
        self._forget()
        return own

    def _padded(self, size: Size) -> int:
        height, width = (side + -side % self.stride for side in size)
        return height * width

    def _flops(self) -> ModelFlops:
        """FLOPs are linear in what the batches held, so those of the sums are the sum."""
        costs, sums = cast(Costs, self.costs), self.sums
        total = costs.images((number, size) for size, number in self.sizes.items())
        for kind in ("visual", "alone"):
            tokens = sums[f"{kind} text"] + sums[f"{kind} visual"]
            total += costs.text(tokens, sums[f"{kind} pairs"], sums[f"{kind} labels"], visual=kind == "visual")
        return total


def counted(batch: Batch) -> Counts:
    """The batch's counts.

    Raises:
        ValueError: There are none.
    """
    if batch.counts is None:
        raise ValueError(
            "TokenEfficiency: expected Batch.counts, found none; whoever makes a batch must set it to "
            "lit_mm.costs.counts.counts_of(batch, scales), before it goes to a device"
        )
    return batch.counts


def training_flops(flops: ModelFlops) -> Numbers:
    """FLOPs that training needs by part, the head's with the LLM's. What checkpointing computes again
    is not among them: needed FLOPs are what MFU counts (PaLM, appendix B)."""
    llm = flops.llm.training + flops.head.training
    return {
        "encoder_flops": float(flops.encoder.training),
        "projector_flops": float(flops.projector.training),
        "llm_flops": float(llm),
    }


def over_ranks(lit: Any, own: Numbers) -> Numbers:
    """Bring the numbers of all ranks together: one small tensor, the only thing ranks wait for."""
    if lit.trainer.world_size == 1:
        return own
    mine = torch.tensor(list(own.values()), dtype=torch.float64, device=lit.device)
    columns = zip(*lit.all_gather(mine).tolist(), strict=True)
    return {name: max(column) if name in LARGEST else sum(column) for name, column in zip(own, columns, strict=True)}


def report(numbers: Numbers, steps: int, ranks: int, scales: Sequence[int]) -> Numbers:
    """The scalars of an interval, by the names that loggers show.

    Args:
        numbers: Of all ranks.
        steps: Optimizer steps of the interval.
        ranks: How many ranks there are.
        scales: All scales of the model.
    """
    return (
        {f"tokens/{name}": value for name, value in _tokens(numbers, steps, scales).items()}
        | {f"images/{name}": value for name, value in _images(numbers, steps).items()}
        | {f"speed/{name}": value for name, value in _speed(numbers, steps, ranks).items()}
        | {f"memory/{name}_GiB": numbers[name] / GIB for name in LARGEST[2:] if name in numbers}
    )


def _tokens(numbers: Numbers, steps: int, scales: Sequence[int]) -> Numbers:
    """Per step, over all ranks; padding as a share of all positions."""
    names = {"visual": "visual", "text": "text", "label": "labels", "padding": "padding"}
    found = {name: numbers[key] / steps for name, key in names.items()}
    found["padding_share"] = numbers["padding"] / max(1, numbers["padding"] + numbers["text"] + numbers["visual"])
    shown = [int(numbers[f"shown {scale}"]) for scale in scales]
    if sum(shown):
        found["visual_per_image"] = numbers["visual"] / sum(shown)
        found["visual_per_image_p95"] = percentile(scales, shown, 95)
    return found


def percentile(values: Sequence[int], times: Sequence[int], percent: float) -> float:
    """The smallest value that at least so many percent of all do not exceed; each occurs so many times."""
    order = np.argsort(values)
    reached = np.cumsum(np.array(times)[order])
    return float(np.array(values)[order][np.searchsorted(reached, percent / 100 * reached[-1])])


def _images(numbers: Numbers, steps: int) -> Numbers:
    """Still images and frames per step; how many pixels, as the encoder gets them, a visual token stands for;
    padding to the stride."""
    found = {"stills": numbers["images"] / steps, "frames": numbers["frames"] / steps}
    if numbers["visual"]:
        found["pixels_per_visual_token"] = numbers["shown_pixels"] / numbers["visual"]
    if numbers["encoded_pixels"]:
        found["stride_padding_share"] = 1 - numbers["pixels"] / numbers["encoded_pixels"]
    return found


def _speed(numbers: Numbers, steps: int, ranks: int) -> Numbers:
    seconds = numbers["seconds"]
    kinds = {"visual_tokens": "visual", "text_tokens": "text", "label_tokens": "labels"}
    found = {f"{name}_per_s": numbers[key] / seconds for name, key in kinds.items()}
    found["tokens_per_s"] = (numbers["visual"] + numbers["text"]) / seconds
    found["images_per_s"] = (numbers["images"] + numbers["frames"]) / seconds
    found["step_ms"] = 1000 * seconds / steps
    if "waited" in numbers:
        found["data_wait_share"] = numbers["waited"] / seconds
    flops = sum(numbers.get(f"{part}_flops", 0.0) for part in PARTS)
    if flops:
        found["TFLOPS_per_device"] = flops / seconds / ranks / 1e12
    if flops and not isnan(numbers["peak_flops"]):
        found["MFU"] = flops / seconds / numbers["peak_flops"]
    return found
