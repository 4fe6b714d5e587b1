"""The memory plan against arithmetic, and against what steps on real tensors take."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_mm.model import loss
from lit_mm.model.attention import NAME
from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.profile.ledger import FLOAT32
from lit_mm.profile.memory_plan import MemoryPlan, example_batch, plan
from tests.helpers.environment import ROOT
from tests.helpers.measured_step import CASES, RETURNING, SHARDED, Case, batch_of, build, optimizer_of, real, units_of
from tests.helpers.models import packing_vlm, tiny_vlm

GIB = 2**30
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc"
)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to measure on")


def planned(case: Case, **options) -> MemoryPlan:
    with torch.device("meta"):
        vlm = build(case)
    if "units" in options:
        options["units"] = options["units"](vlm)
    return plan(vlm, batch_of(case, vlm), optimizer_of, case.precision, accumulate=case.accumulate, **options)


def tiny_plan(vlm=None, **options) -> MemoryPlan:
    vlm = packing_vlm().train() if vlm is None else vlm
    return plan(vlm, example_batch(vlm, 2, (64, 64), answer=20), optimizer_of, **{"device": "cpu", **options})


def measure(device: str, *names: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.helpers.measured_step", device, *CASES, *names]
    environment = os.environ | RETURNING | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT, check=True).stdout)


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, Any]:
    return measure("cpu", "sharded")


@pytest.fixture(scope="module")
def on_gpu() -> dict[str, Any]:
    return measure("cuda")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_the_cpu_takes_what_was_planned(name, on_cpu):
    """Resident memory, which knows nothing of tensors. Libraries take 1 to 3 %."""
    assert planned(CASES[name], device="cpu").total == pytest.approx(on_cpu[name], rel=0.05)


@cuda
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_the_gpu_takes_what_was_planned(name, on_gpu):
    assert planned(CASES[name], device="cuda").total == pytest.approx(on_gpu[name], rel=0.15)


@linux
@pytest.mark.slow
def test_a_sharded_step_takes_what_was_planned(on_cpu):
    """Two ranks (FSDP, gloo): the state to the byte, the peak of resident memory nearly."""
    peak, (parameters, gradients, states) = on_cpu["sharded"]
    found = planned(SHARDED, device="cpu", gpus=2, units=units_of)
    assert found.total == pytest.approx(peak, rel=0.05)
    assert (found.parameters, found.optimizer) == (parameters, states)
    assert 0 <= parameters - gradients < 1000  # buffers


@pytest.mark.parametrize(
    ("packing", "checkpointing"), [("packed", True), ("sequential", False), ("padded", False), ("padded", True)]
)
def test_torchs_own_tracker_of_real_tensors_finds_as_much(packing, checkpointing):
    vlm = packing_vlm().train()
    if checkpointing:
        vlm.encoder.set_grad_checkpointing()
        vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
    batch = example_batch(vlm, 2, (64, 64), answer=20, packing=packing)
    found = plan(vlm, batch, optimizer_of, "32-true", device="cpu")
    optimizer, tracker, batch = optimizer_of(vlm), MemTracker(), real(batch, "cpu")
    for parameter in vlm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tracker.track_external(vlm, optimizer)
    with tracker:
        total = vlm(batch).loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert found.total == pytest.approx(peak + sum(pixels.nbytes for pixels in batch.images.groups), rel=0.01)


def counted(vlm, trained: bool) -> int:
    return sum(p.numel() for p in vlm.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize(
    ("frozen", "precision", "width"),
    [("", "32-true", 4), ("encoder", "bf16-mixed", 4), ("llm", "bf16-true", 2)],
)
def test_the_state_is_that_of_the_parameters(frozen, precision, width):
    """AdamW has two values a trained parameter, and one number of steps a tensor."""
    vlm = packing_vlm().train()
    if frozen:
        getattr(vlm, frozen).requires_grad_(False)
    found, trained = tiny_plan(vlm, precision=precision), counted(vlm, trained=True)
    tensors = sum(parameter.requires_grad for parameter in vlm.parameters())
    assert found.moment == "forward"  # the gradients of the step before are there
    assert found.parameters == width * (counted(vlm, trained=False) + sum(b.numel() for b in vlm.buffers()))
    assert (found.gradients, found.optimizer) == (width * trained, 2 * width * trained + 4 * tensors)


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_shares_are_the_first_of_torchs_chunks(gpus):
    vlm = packing_vlm().train()
    found = tiny_plan(vlm, gpus=gpus, units=units_of(vlm), precision="bf16-mixed")
    shares = sum(parameter.chunk(gpus)[0].numel() for parameter in vlm.parameters())
    buffers = sum(buffer.nbytes for buffer in vlm.buffers())
    tensors = len(list(vlm.parameters()))
    assert (found.parameters - buffers, found.gradients) == (4 * shares, 4 * shares)
    assert found.optimizer == 8 * shares + 4 * tensors


def test_whole_copies_have_buckets_for_their_gradients():
    one, eight = tiny_plan(), tiny_plan(gpus=8)
    assert eight.communication == one.gradients
    assert eight.total == one.total + one.gradients


def test_accumulated_gradients_outlive_the_backward_pass(monkeypatch):
    """Where a layer computed anew takes most, they make the difference."""
    vlm = packing_vlm().train()
    vlm.encoder.set_grad_checkpointing()
    once, added_up = (tiny_plan(vlm, accumulate=accumulate) for accumulate in (False, True))
    assert (once.moment, added_up.moment) == ("backward", "backward")
    assert added_up.total - once.total == added_up.gradients - once.gradients > 0


def test_the_loss_takes_the_planned_devices_chunks(monkeypatch):
    """Logits, their logarithms and what becomes of them, of all 160 targets or of three at a time."""
    monkeypatch.setitem(loss.CHUNK, "cpu", 348 * 3)
    vlm = packing_vlm().train()
    batch = example_batch(vlm, 2, (64, 64), answer=20)
    targets, bytes_of = 2 * 20 * 3, {}
    for chunk in (targets, 3):
        monkeypatch.setitem(loss.CHUNK, "cuda", 348 * chunk)
        bytes_of[chunk] = plan(vlm, batch, optimizer_of, "32-true").activations
        assert loss.CHUNK["cpu"] == 348 * 3
    assert bytes_of[targets] - bytes_of[3] > 1.9 * targets * 348 * 4


def test_what_autocast_computes_in_float32_on_cuda():
    """By torch's own list, in the headers that come with it."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    [listed] = re.findall(r"#define AT_FORALL_FP32\(_\)(.*?)#define AT_FORALL_DIFFERENT", header, re.DOTALL)
    names = set(re.findall(r"_\((\w+)", listed))
    later = {"rms_norm"}  # not yet in torch 2.11's
    assert {function.__name__ for function in FLOAT32} - {"norm"} <= names | later
    assert "frobenius_norm" in names


def test_the_model_stays_as_it_is():
    vlm = packing_vlm().train()
    before = {name: (id(p), p.sum().item(), p.grad) for name, p in vlm.named_parameters()}
    tiny_plan(vlm, gpus=2, units=units_of(vlm))
    assert before == {name: (id(p), p.sum().item(), p.grad) for name, p in vlm.named_parameters()}


def test_kernels_of_cuda_alone_are_planned_without_what_only_branches_need():
    """Copies of queries, keys and values: branch gathers all of them, flex none."""
    vlm, found = packing_vlm().train(), []
    for attention in ("flex", "branch"):
        batch = example_batch(vlm, 2, (64, 64), answer=20, attention=attention)
        found.append(plan(vlm, batch, optimizer_of, "bf16-true").activations)
    assert found == sorted(set(found))
    assert found[-1] < 1.1 * found[0]


def test_a_video_is_as_many_images_at_every_time_scale():
    vlm = tiny_vlm(time_scales=[4, 1]).train()
    batch = example_batch(vlm, 2, (64, 64), prefix=5, answer=7, frames=8)
    assert [len(group) for group in batch.images.groups] == [16]
    assert len(batch.packed[0].input_ids) == 2 * (5 + sum(sets * scale + 7 for sets in (4, 1) for scale in (16, 4, 1)))
    assert plan(vlm, batch, optimizer_of, device="cpu").activations > 16 * 3 * 64 * 64 * 4


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision 16-mixed: expected one of 32-true, bf16-mixed, bf16-true"):
        tiny_plan(precision="16-mixed")


def convllava() -> MatryoshkaVLM:
    """ConvLLaVA with Vicuna-7B in its second stage: all but the encoder's first two stages train."""
    with torch.device("meta"):
        encoder, scales = ConvNeXtEncoder(extra_stages=[ExtraStage()]), [144, 36, 9, 1]
        config = LlamaConfig(intermediate_size=11008)  # all else is Vicuna-7B's
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=NAME)
        vlm = MatryoshkaVLM(encoder, MatryoshkaProjector(3072, 4096, scales), llm).train()
    for frozen in (encoder.trunk.stem, *encoder.trunk.stages[:2]):
        frozen.requires_grad_(False)
    encoder.set_grad_checkpointing()
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    return vlm


@pytest.mark.slow
def test_convllavas_second_stage_on_eight_gpus():
    """Sixteen bytes a trained parameter (weight, gradient, two of AdamW's), four a frozen one, shared
    out among eight; 32 samples each of 768 pixels beside them fit into 80 GB."""
    vlm = convllava()
    everything, trained = counted(vlm, trained=False), counted(vlm, trained=True)
    assert everything == pytest.approx(669.16e6 + 6738.4e6 + (3072 + 4096 + 2) * 4096, rel=1e-4)
    batch = example_batch(vlm, 4, (768, 768))
    found = plan(vlm, batch, optimizer_of, "bf16-mixed", gpus=8, units=units_of(vlm))
    state = found.parameters + found.gradients + found.optimizer
    assert state == pytest.approx((12 * trained + 4 * everything) / 8, rel=1e-3)
    assert state < found.total < 80e9 / 3
