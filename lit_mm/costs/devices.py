"""A device's peak FLOP/s, memory use and name."""

from __future__ import annotations

import platform
import re
import resource
import sys
from collections.abc import Collection
from importlib.metadata import version
from typing import Literal

import torch

import lit_mm

Arithmetic = Literal["half", "tf32", "float32"]
"""Arithmetic of matrix products: bfloat16 or float16 accumulated in float32, TF32, or float32."""

PEAKS: dict[str, tuple[float, float, float]] = {
    # NVIDIA A100, H100 and H200 Tensor Core GPU data sheets; H100 architecture white paper
    r"A100-SXM4-\d+GB|A100-PCIE-40GB|A100 80GB PCIe": (312, 156, 19.5),
    r"H100 80GB HBM3": (989.4, 494.7, 66.9),
    r"H100 PCIe": (756, 378, 51.2),
    r"H100 NVL": (835.5, 417.5, 60),
    r"H200": (989.4, 494.7, 66.9),
    r"H200 NVL": (835.5, 417.5, 60),
    r"GH200 (480GB|144G HBM3e)": (989.4, 494.7, 66.9),
    # NVIDIA Blackwell data sheet: HGX B200, GB200 NVL72
    r"B200": (2250, 1125, 75),
    r"GB200": (2500, 1250, 80),
    # NVIDIA L4, L40 and L40S data sheets; RTX 6000 Ada Generation data sheet; Ada architecture white paper
    r"L4": (121, 60, 30.3),
    r"L40": (181, 90.5, 90.5),
    r"L40S": (362, 183, 91.6),
    r"RTX 6000 Ada Generation": (364.2, 182.1, 91.1),
    r"GeForce RTX 4090": (165.2, 82.6, 82.6),
    r"GeForce RTX 4080": (97.5, 48.7, 48.7),
    # NVIDIA RTX Blackwell and RTX PRO Blackwell architecture white papers
    r"GeForce RTX 5090": (209.5, 104.8, 104.8),
    r"GeForce RTX 5080": (112.6, 56.3, 56.3),
    r"RTX PRO 6000 Blackwell Workstation Edition": (503.8, 251.9, 126),
    # NVIDIA A30, A10, A10G, A40 and RTX A6000 data sheets; GA102 architecture white paper
    r"A30": (165, 82, 10.3),
    r"A10": (125, 62.5, 31.2),
    r"A10G": (70, 35, 35),
    r"A40": (149.7, 74.8, 37.4),
    r"RTX A6000": (154.8, 77.4, 38.7),
    r"GeForce RTX 3090": (71, 35.6, 35.6),
    # AMD Instinct MI300X data sheet
    r"Instinct MI300X( OAM)?": (1307.4, 653.7, 163.4),
}
"""Device name as torch gives it, without the vendor -> dense TFLOP/s in half precision, TF32 and float32.

The whole name must match, so slower variants (RTX 4090 D, laptop GPUs, a slice of an H100) are unknown."""


def arithmetic_of(precision: str, dtypes: Collection[torch.dtype] = ()) -> Arithmetic | None:
    """The arithmetic of matrix products under a trainer's precision, for weights of these dtypes; None if it is
    mixed or its peaks are not listed."""
    if precision.startswith(("bf16", "16")):
        return "half"
    if not precision.startswith("32") or {torch.bfloat16, torch.float16} & set(dtypes):
        return None
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "float32"


def peak_flops(name: str, arithmetic: Arithmetic | None) -> float | None:
    """A device's peak FLOP/s, by its name; None if unknown."""
    own = re.sub(r"^(NVIDIA|AMD) ", "", name)
    for pattern, peaks in PEAKS.items():
        if arithmetic and re.fullmatch(pattern, own):
            return 1e12 * dict(zip(("half", "tf32", "float32"), peaks, strict=True))[arithmetic]
    return None


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the processor and the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as told:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in told if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect speed and accuracy."""
    others = {name: version(name) for name in ("transformers", "timm", "lightning")}
    own = {"python": platform.python_version(), "lit_mm": lit_mm.__version__, "torch": torch.__version__}
    return own | others


class PeakMemory:
    """Peak memory since the last call of `take`, read without synchronizing.

    On a GPU it is the memory that torch allocated and reserved; elsewhere it is the process's peak resident
    memory, which never goes down.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seen = device, {"allocated": 0, "reserved": 0}

    def note(self) -> None:
        """Save the peaks so far and reset them, before something that should not count."""
        for name in self.seen if self.device.type == "cuda" else ():
            most = getattr(torch.cuda, f"max_memory_{name}")(self.device)
            self.seen[name] = max(self.seen[name], most)
        self.forget()

    def forget(self) -> None:
        """Reset the peaks and drop what was seen since `note`."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def take(self) -> dict[str, int]:
        """Peaks by name, in bytes."""
        if self.device.type != "cuda":
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return {"process": most if sys.platform == "darwin" else 1024 * most}
        self.note()
        taken, self.seen = self.seen, dict.fromkeys(self.seen, 0)
        return taken
