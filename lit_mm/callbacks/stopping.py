"""Ctrl-C and SIGTERM between two batches of any verb, on all ranks at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

REASONS: dict[int, Callable[[], BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: lambda: SIGTERMException(128 + signal.SIGTERM),  # the exit status that shells give it
}


KEPT = {
    TrainerFn.VALIDATING: "its figures need all of them, so none are written",
    TrainerFn.TESTING: "its figures need all of them, so none are written",
    TrainerFn.PREDICTING: "their answers are kept",
}
"""What is left of the batches of a verb that was stopped; a fit's checkpoint speaks for itself."""


class StopBetweenBatches(Callback):
    """Lets the batch in hand finish when a signal asks to stop, so that checkpoints and answers are whole.

    The process then ends with status 143 after SIGTERM and 130 after Ctrl-C. A second Ctrl-C stops at once.
    With several ranks, one that gets a signal stops all of them.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nobody has asked yet."""
        self.asked = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, which the trainer gives back when it ends. Its own handler would speak to other ranks
        in the middle of a step, let a prediction run to its end and stop a test with status 0."""
        for number in REASONS:
            signal.signal(number, self._ask)
        if trainer.received_sigterm:  # since the trainer took it
            self.asked = signal.SIGTERM

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        rank_zero_info(f"{signal.Signals(number).name}: stopping before the next batch")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop if any rank was asked to."""
        asked = self.asked
        if trainer.world_size > 1:
            number = torch.tensor(asked, device=pl_module.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            asked = int(number)
        if asked:
            if (verb := trainer.state.fn) and verb in KEPT:
                rank_zero_info(f"{verb.value} stopped after {batch_idx} batches: {KEPT[verb]}")
            raise REASONS[asked]()

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start
