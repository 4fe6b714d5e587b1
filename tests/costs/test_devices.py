"""Peaks of devices against what their units and clocks make, and the names that torch gives them."""

import pytest
import torch
from lightning.fabric.utilities.throughput import _CUDA_FLOPS

from lit_mm.costs.devices import PeakMemory, arithmetic_of, device_name, peak_flops, versions

UNITS = {
    # multiprocessors (AMD: compute units), FLOP per clock and unit in half precision, boost clock in GHz
    "NVIDIA A100-SXM4-80GB": (108, 2048, 1.41),
    "NVIDIA A100-PCIE-40GB": (108, 2048, 1.41),
    "NVIDIA A100 80GB PCIe": (108, 2048, 1.41),
    "NVIDIA H100 80GB HBM3": (132, 4096, 1.83),
    "NVIDIA H100 PCIe": (114, 4096, 1.62),
    "NVIDIA H100 NVL": (132, 4096, 1.545),
    "NVIDIA H200": (132, 4096, 1.83),
    "NVIDIA H200 NVL": (132, 4096, 1.545),
    "NVIDIA GH200 480GB": (132, 4096, 1.83),
    "NVIDIA GH200 144G HBM3e": (132, 4096, 1.83),
    "NVIDIA B200": (148, 8192, 1.85),
    "NVIDIA L4": (58, 1024, 2.04),
    "NVIDIA L40": (142, 512, 2.49),
    "NVIDIA L40S": (142, 1024, 2.49),
    "NVIDIA RTX 6000 Ada Generation": (142, 1024, 2.505),
    "NVIDIA GeForce RTX 4090": (128, 512, 2.52),
    "NVIDIA GeForce RTX 4080": (76, 512, 2.505),
    "NVIDIA GeForce RTX 5090": (170, 512, 2.407),
    "NVIDIA GeForce RTX 5080": (84, 512, 2.617),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (188, 1024, 2.617),
    "NVIDIA A30": (56, 2048, 1.44),
    "NVIDIA A10": (72, 1024, 1.695),
    "NVIDIA A10G": (80, 512, 1.71),
    "NVIDIA A40": (84, 1024, 1.74),
    "NVIDIA RTX A6000": (84, 1024, 1.8),
    "NVIDIA GeForce RTX 3090": (82, 512, 1.695),
    "AMD Instinct MI300X": (304, 2048, 2.1),
}


@pytest.mark.parametrize("name", UNITS)
def test_half_precision_is_units_times_clock(name):
    units, per_clock, clock = UNITS[name]
    assert peak_flops(name, "half") == pytest.approx(units * per_clock * clock * 1e9, rel=0.015)


@pytest.mark.parametrize("name", UNITS)
def test_tf32_has_half_the_rate_and_float32_at_most_that(name):
    half, tf32, single = (peak_flops(name, kind) for kind in ("half", "tf32", "float32"))
    assert tf32 == pytest.approx(half / 2, rel=0.02)
    assert single <= tf32 * 1.01


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100 sxm"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA A10", "a10g"),  # whose data sheet theirs is
    ],
)
def test_lightning_lists_the_same(name, theirs):
    """Where its table has dense figures of tensor cores: the H200's are with sparsity, GeForce's of plain cores."""
    listed = _CUDA_FLOPS[theirs]
    for kind, dtype in (("half", torch.bfloat16), ("tf32", "tfloat32"), ("float32", torch.float32)):
        assert peak_flops(name, kind) == pytest.approx(listed[dtype], rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H20",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "NVIDIA L40G",
        "Intel(R) Xeon(R) Processor (2 threads)",
        "",
    ],
)
def test_nothing_is_made_up_for_others(name):
    assert peak_flops(name, "half") is None


@pytest.mark.parametrize(
    ("precision", "arithmetic"),
    [("bf16-mixed", "half"), ("bf16-true", "half"), ("16-mixed", "half"), ("32-true", "float32"), ("64-true", None)],
)
def test_precisions(precision, arithmetic):
    assert arithmetic_of(precision) == arithmetic
    assert peak_flops("NVIDIA H200", arithmetic_of("64-true")) is None


def test_tensor_cores_take_float32_where_torch_lets_them(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert arithmetic_of("32-true") == "tf32"


def test_a_mixture_of_types_has_no_peak():
    """An LLM kept in bfloat16 beside an encoder in float32, without autocast."""
    assert arithmetic_of("32-true", {torch.float32, torch.bfloat16}) is None
    assert arithmetic_of("bf16-mixed", {torch.float32, torch.bfloat16}) == "half"


def test_where_it_ran():
    assert f"({torch.get_num_threads()} threads)" in device_name(torch.device("cpu"))
    assert versions()["torch"] == torch.__version__


def test_memory_on_a_cpu_is_the_process():
    memory = PeakMemory(torch.device("cpu"))
    before = memory.take()["process"]
    block = torch.ones(100 * 2**20, dtype=torch.uint8)
    assert memory.take()["process"] >= max(before, block.nbytes)


def test_memory_on_a_gpu_forgets_what_is_not_training(monkeypatch):
    """A fake allocator: peaks rise by use and fall with a reset."""
    peak = {"allocated": 5, "reserved": 8}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak["reserved"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update(allocated=1, reserved=2))
    memory = PeakMemory(torch.device("cuda"))
    memory.note()  # validation begins
    peak.update(allocated=100, reserved=100)
    memory.forget()
    assert memory.take() == {"allocated": 5, "reserved": 8}
    assert memory.take() == {"allocated": 1, "reserved": 2}
