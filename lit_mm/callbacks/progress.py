"""The progress bar: loss per scale, and the time left of the whole run."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

MINUTE = 60


class Progress(TQDMProgressBar):
    """Lightning's progress bar with the losses and `left`, the time until the run's last step.

    The estimate uses the mean time per step since the start, including validation. If the output is not a
    terminal, the bar is written once a minute and at the end.
    """

    _written = float("-inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._last_step = pl_module.total_steps()  # type: ignore[operator]  # may have to plan the batches of every epoch

    def _should_update(self, current: int, total: int) -> bool:
        if sys.stdout.isatty() or current == total:
            return super()._should_update(current, total)
        now = time.monotonic()
        due = self.is_enabled and now - self._written >= MINUTE
        self._written = now if due else self._written
        return due

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The losses and the time left, without the logger's version."""
        metrics = {
            name.removeprefix("train/"): value for name, value in super().get_metrics(trainer, pl_module).items()
        }
        metrics.pop("v_num", None)
        if trainer.training and (done := trainer.global_step - self._first_step) > 0:
            steps_left = max(0, self._last_step - trainer.global_step)
            seconds = (time.monotonic() - self._started) / done * steps_left
            metrics["left"] = str(timedelta(seconds=round(seconds)))
        return metrics
