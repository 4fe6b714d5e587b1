"""Ctrl-C and SIGTERM between two batches, on all ranks at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

REASONS: dict[int, Callable[[], BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: lambda: SIGTERMException(128 + signal.SIGTERM),  # the exit status that shells give it
}


class StopBetweenBatches(Callback):
    """Lets the batch in hand finish when a signal asks to stop, so that a checkpoint is whole.

    A second Ctrl-C stops at once. With several ranks, one that gets a signal stops all of them.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals; Lightning's own handler would speak to other ranks in the middle of a step."""
        self.asked = 0
        self.before = {number: signal.signal(number, self._ask) for number in REASONS}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        rank_zero_info(f"{signal.Signals(number).name}: stopping before the next batch")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop if any rank was asked to."""
        self._obey(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Likewise."""
        if self.before:
            self._obey(trainer, pl_module)

    def _obey(self, trainer: Trainer, pl_module: LightningModule) -> None:
        asked = self.asked
        if trainer.world_size > 1:
            number = torch.tensor(asked, device=pl_module.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            asked = int(number)
        if asked:
            raise REASONS[asked]()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
