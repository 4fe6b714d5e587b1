"""What the tests of strategies run in one process or in several: short runs on given batches."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from lit_mm.costs.counts import counts_of
from lit_mm.model.batch import Batch, Question
from lit_mm.model.packing import Packing, pack
from lit_mm.training import strategies  # noqa: F401 (registers fsdp)
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.optim import FusedAdamW
from lit_mm.training.parts import LLMPart, Part, Parts
from tests.helpers.batches import SCALES, batch_of, random_samples
from tests.helpers.models import tiny_encoder, tiny_llm
from tests.helpers.processes import environment_of, free_port

STEPS = [[[0, 1], [2]], [[6], [3, 4]], [[6], [7]], [[5, 2], [0]]]
"""Samples of each step and rank; 6 and 7 are text alone, the others have images of two shapes."""
QUESTIONS = [[0, 1], [2], [], [3]]
"""Samples of each validation batch: the third is empty, as a rank's last one may be."""


QUIET: dict[str, Any] = {
    "max_steps": 4,
    "logger": False,
    "inference_mode": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


@dataclass
class Run:
    """One short run.

    Args:
        folder: Where it leaves its checkpoint, `after.ckpt`, and `told.pt`.
        strategy: The trainer's.
        parts: What trains.
        model: Further arguments of LitMatryoshka.
        trainer: Further arguments of the Trainer.
        watch: Further callbacks.
        test: Whether a test follows, on what validation has.
        resume: The checkpoint to go on from.
        fails: An error that is expected, by a part of its text.
    """

    folder: Path
    strategy: str = "auto"
    parts: Parts = field(default_factory=lambda: Parts(Part(0.01), Part(0.01), LLMPart(0.01)))
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    watch: list[lightning.Callback] = field(default_factory=list)
    test: bool = False
    resume: Path | None = None
    fails: str | None = None


class Epoch(DataLoader):
    """Goes on at the beginning of an epoch alone."""

    def state_dict(self) -> dict[str, int]:
        """Where the checkpoint says that a run is, `write_place` decides."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing was seen of the epoch."""
        assert state["batches"] == 0


class Samples(lightning.LightningDataModule):
    """The given batches; one process alone has those of all ranks together."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packed_of = partial(packed_of, packing=packing)

    def share(self, lists: list[list[int]]) -> list[int]:
        """This rank's."""
        return [*chain(*lists)] if self.trainer.world_size == 1 else lists[self.trainer.global_rank]

    def train_dataloader(self) -> DataLoader:
        return Epoch([self.share(step) for step in STEPS], batch_size=None, collate_fn=self.packed_of)

    def val_dataloader(self) -> DataLoader:
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(QUESTIONS[rank::ranks], batch_size=None, collate_fn=partial(self.packed_of, ask=True))

    test_dataloader = val_dataloader


def packed_of(numbers: list[int], packing: Packing, ask: bool = False) -> Batch:
    """Samples -> a packed batch, with a question each if asked for."""
    made = random_samples(11, 12, [(64, 64), (32, 128)])
    ordered = [sample for sample in made if sample[2]][:6] + [sample for sample in made if not sample[2]]
    samples = [ordered[number] for number in numbers]
    batch = batch_of(*samples)
    batch.packed = pack(batch, SCALES, packing)
    first = 0
    for ids, _, images in samples if ask else []:
        index = list(range(first, first + len(images)))
        batch.questions.append(Question(first, "", torch.tensor(ids), index, ("a",)))
        first += len(images)
    batch.counts = counts_of(batch, SCALES)
    return batch


def perform(run: Run) -> None:
    """Fit, validate and save; told.pt has the losses of all ranks' labels, and the answers."""
    lightning.seed_everything(5, verbose=False)
    llm = run.model.pop("llm", None) or tiny_llm()
    defaults: dict[str, Any] = {"init_gain": 1.0, "optimizer": partial(FusedAdamW, eps=1e-3), "max_new_tokens": 4}
    lit = LitMatryoshka(tiny_encoder, llm, SCALES, parts=run.parts, **{**defaults, **run.model})
    told = Teller()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=run.strategy,
        callbacks=[told, *run.watch],
        default_root_dir=run.folder,
        **{**QUIET, **run.trainer},
    )
    try:
        trainer.fit(lit, Samples(lit.packing), ckpt_path=run.resume, weights_only=True)
    except Exception as error:
        if run.fails and run.fails in str(error):
            return
        raise
    assert not run.fails, f"expected to fail with {run.fails}"
    trainer.save_checkpoint(run.folder / "after.ckpt")
    values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    torch.save({"losses": told.losses, "val": values}, run.folder / f"told{trainer.global_rank}.pt")
    if run.test:
        trainer.test(lit, Samples(lit.packing), verbose=False)


class Teller(lightning.Callback):
    """Keeps the loss of every step over all ranks, and the gradients' norm."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, lit: Any, outputs: Any, *_: Any) -> None:
        """A rank's loss is divided by its share of all labels, so that their mean is the whole's."""
        norm = float(trainer.callback_metrics.get("train/gradient_norm", 0.0))
        self.losses.append((float(lit.all_gather(outputs["loss"]).mean()), norm))


def unchanged(optimizer: Any, steps: int) -> Any:
    """A rate that stays."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def on_ranks(count: int, runs: list[Any], act: Callable[[Any], None] = perform) -> None:
    """Every run in the same processes."""
    mp.start_processes(_rank, (free_port(), runs, count, act), count, start_method="forkserver")


def _rank(rank: int, port: int, runs: list[Any], count: int, act: Callable[[Any], None]) -> None:
    torch.set_num_threads(1)
    os.environ |= environment_of(rank, count, port)
    for run in runs:
        try:
            act(run)
        except Exception:
            (run.folder / f"error{rank}.txt").write_text(traceback.format_exc())
            raise
