"""The loss is a mean over all labels of a step: over ranks and over accumulated batches, however
unevenly they hold them. One SGD step from the same weights must end at the same weights."""

from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader

from lit_mm.model.batch import Batch
from lit_mm.model.packing import pack
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.parts import LLMPart, Part, Parts
from tests.helpers.batches import SCALES, batch_of, random_samples
from tests.helpers.models import tiny_encoder, tiny_llm


class Samples(lightning.LightningDataModule):
    """The given batches of samples, rank by rank."""

    def __init__(self, shares: list[list[list[int]]]) -> None:
        super().__init__()
        self.shares = shares

    def train_dataloader(self) -> DataLoader:
        # padded pixels, all zero, have huge gradients in an untrained network
        samples = random_samples(11, 12, [(64, 64), (32, 128)])
        samples = [sample for sample in samples if sample[2]][:6] + [sample for sample in samples if not sample[2]]
        return DataLoader(
            [[samples[i] for i in numbers] for numbers in self.shares[self.trainer.global_rank]],
            batch_size=None,
            collate_fn=packed_of,
        )


def packed_of(samples) -> Batch:
    batch = batch_of(*samples)
    batch.packed = pack(batch, SCALES)
    return batch


def weights_after_a_step(shares, folder: Path, accumulate: int = 1, strategy: str = "auto") -> dict[str, torch.Tensor]:
    lightning.seed_everything(5, verbose=False)
    parts = Parts(Part(0.1), Part(0.1), LLMPart(0.1))
    lit = LitMatryoshka(
        tiny_encoder, tiny_llm(), SCALES, parts=parts, optimizer=torch.optim.SGD, scheduler=unchanged, init_gain=1.0
    )
    file = folder / "after.pt"
    trainer = lightning.Trainer(
        callbacks=[LambdaCallback(on_train_end=partial(save, file))],
        accelerator="cpu",
        devices=len(shares),
        strategy=strategy,
        max_steps=1,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(lit, Samples(shares))
    return torch.load(file, weights_only=True)


def save(file: Path, trainer: lightning.Trainer, lit: LitMatryoshka) -> None:
    if trainer.is_global_zero:
        torch.save(lit.state_dict(), file)


def unchanged(optimizer, steps):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def assert_equal(found, expected):
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6), name


def test_accumulated_unequal_parts_give_the_gradient_of_one_batch(tmp_path):
    whole = weights_after_a_step([[[0, 1, 2, 3, 4, 5]]], tmp_path)
    assert_equal(weights_after_a_step([[[0], [1, 2, 3], [4, 5]]], tmp_path, accumulate=3), whole)


def test_a_short_last_accumulation_counts_its_own_targets(tmp_path):
    whole = weights_after_a_step([[[0, 1, 2]]], tmp_path)
    assert_equal(weights_after_a_step([[[0], [1, 2]]], tmp_path, accumulate=3), whole)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_give_the_gradient_of_one(tmp_path, accumulate):
    whole = weights_after_a_step([[[0, 1, 2, 3, 4, 5]]], tmp_path)
    shares = {1: [[[0, 1, 2, 3]], [[4, 5]]], 2: [[[0], [1, 2]], [[3, 4], [5]]]}[accumulate]
    assert_equal(weights_after_a_step(shares, tmp_path, accumulate, "ddp_spawn"), whole)


@pytest.mark.slow
def test_ranks_without_an_image_wait_for_nobody(tmp_path):
    """Text alone on one rank, then on both, images on the other: DDP counts on every parameter's gradient."""
    whole = weights_after_a_step([[[0, 1, 6]]], tmp_path)
    assert_equal(weights_after_a_step([[[0, 1]], [[6]]], tmp_path, strategy="ddp_spawn"), whole)
    text = weights_after_a_step([[[6, 7]]], tmp_path)
    assert_equal(weights_after_a_step([[[6]], [[7]]], tmp_path, strategy="ddp_spawn"), text)
