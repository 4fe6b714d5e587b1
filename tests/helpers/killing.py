"""What the tests of exact resume put into a run: a callback that writes down every batch, and one way or
another ends the process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning import Callback


class Killed(RuntimeError):
    """An exception in the middle of a run."""


class Recorder(Callback):
    """Writes a line for every batch: epoch, batch, rank, and a digest of what is in it."""

    def __init__(
        self, folder: str, way: str | None = None, after: int = 0, rank: int = 0, where: str = "train_batch_start"
    ) -> None:
        self.folder, self.way, self.after, self.rank, self.where = Path(folder), way, after, rank, where
        self.seen = 0

    def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
        """Record, and perhaps end."""
        self.seen += 1
        line = {"epoch": trainer.current_epoch, "batch": batch_idx, "step": trainer.global_step}
        line |= {
            "rank": trainer.global_rank,
            "digest": digest_of(batch),
            "drawn": [n for n, w in enumerate(batch.scale_weights) if w],
        }
        with (self.folder / f"batches{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._end(trainer, "train_batch_start")

    def on_before_zero_grad(self, trainer: Any, *_: Any) -> None:
        """Before the gradients of a step are made."""
        self._end(trainer, "before_zero_grad")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """After the step, before checkpoints are written."""
        self._end(trainer, "train_batch_end")

    def on_test_batch_start(self, trainer: Any, *_: Any) -> None:
        """Count, and perhaps end."""
        self.seen += 1
        self._end(trainer, "test_batch_start")

    def on_predict_batch_start(self, trainer: Any, *_: Any) -> None:
        """Likewise."""
        self.seen += 1
        self._end(trainer, "predict_batch_start")

    def on_validation_start(self, trainer: Any, lit: Any) -> None:
        """Record."""
        with (self.folder / "validations.txt").open("a") as file:
            file.write(f"{trainer.global_step}\n")

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        """In the middle of a validation, of a fit or on its own."""
        self.seen += trainer.state.fn == "validate"
        self._end(trainer, "validation_batch_start")

    def _end(self, trainer: Any, where: str) -> None:
        if self.seen < self.after or where != self.where or trainer.global_rank != self.rank or not self.way:
            return
        way, self.way = self.way, None
        if way == "exception":
            raise Killed(where)
        os.kill(os.getpid(), getattr(signal, way))

    def on_train_end(self, trainer: Any, lit: Any) -> None:
        """The weights' and the optimizer's digest."""
        if trainer.is_global_zero:
            state = [*lit.state_dict().values(), *tensors(trainer.optimizers[0].state_dict()["state"])]
            lines = [hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest() for t in state]
            (self.folder / "weights.txt").write_text("\n".join(lines))


def tensors(state: Any) -> list[torch.Tensor]:
    """All tensors in nested dicts, in order."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def digest_of(batch: Any) -> str:
    """Of ids, labels and pixels."""
    parts = [*batch.input_ids, *batch.labels, batch.image_index, *batch.images.groups]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]
