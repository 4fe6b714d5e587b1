"""Sharded over two ranks (FSDP, gloo): batches of different kinds wait for nobody and lose nothing."""

import datetime
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from lit_mm.model.attention import NAME
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch
from tests.helpers.batches import batch_of, packed, picture
from tests.helpers.models import tiny_vlm

KINDS = {
    "text": [[(64, 64)], [None]],
    "shapes": [[(64, 64), (32, 128)], [(64, 64), (64, 64)]],
    "all text": [[None], [None]],
}


def batch_for(sizes) -> Batch:
    torch.manual_seed(0)
    samples = []
    for size in sizes:
        images = [] if size is None else [picture(*size)]
        ids = [5, 6, *[IMAGE] * len(images), 7, 8]
        samples.append((ids, [IGNORE_INDEX] * (len(ids) - 1) + [8], images))
    return packed(batch_of(*samples))


def rank_of(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    for kind in KINDS:
        step(rank, kind)
        dist.barrier()
    dist.destroy_process_group()


def step(rank: int, kind: str) -> None:
    """Forward and backward: the loss of the unsharded model, and a gradient for every parameter."""
    vlm, batch = tiny_vlm().train(), batch_for(KINDS[kind][rank])
    vlm.llm.set_attn_implementation(NAME)
    vlm.encoder.to(memory_format=torch.contiguous_format)  # what cannot be sharded otherwise
    expected = vlm(batch).loss.item()
    for part in [*vlm.encoder.trunk.stages, vlm.projector, *vlm.llm.model.layers]:
        fully_shard(part)
    fully_shard(vlm)
    encodings = max(len({size for size in sizes if size}) for sizes in KINDS[kind])
    total = vlm(batch, encodings=max(1, encodings)).loss
    total.backward()
    assert abs(total.item() - expected) < 1e-5
    missing = [name for name, parameter in vlm.named_parameters() if parameter.grad is None]
    assert not missing, kind


@pytest.mark.slow
def test_ranks_with_batches_of_different_kinds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_of, (port,), 2)
