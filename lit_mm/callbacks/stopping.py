"""Stops any verb between two batches after Ctrl-C or SIGTERM, on all ranks at once."""

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
"""What happens to the batches done so far when a verb is stopped; `fit` reports its checkpoint itself."""


class StopBetweenBatches(Callback):
    """On a signal, finishes the current batch before stopping, so that checkpoints and answers are complete.

    The exit status is 143 after SIGTERM and 130 after Ctrl-C. A second Ctrl-C stops immediately. A signal to
    one rank stops all ranks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clear the request to stop."""
        self.asked = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; the trainer restores the old ones at its end. Lightning's own handler would
        communicate with other ranks in the middle of a step, not stop predict, and end test with status 0."""
        for number in REASONS:
            signal.signal(number, self._ask)
        if trainer.received_sigterm:  # before these handlers were installed
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
