"""Answers to files, in the format that LLaVA's evaluation scripts read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_mm.model.scales import Scale


class AnswerWriter(BasePredictionWriter):
    """Writes `answers@16.jsonl`, …: one {"question_id", "prompt", "text"} a line, a file a scale.

    The files of one prediction go to a new folder `answers_0`, `answers_1`, … of the run's, so that none
    replaces another's. Those of rank 1 and higher are `answers@16.rank1.jsonl`, ….
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self.files: dict[Scale, TextIO] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the files in a folder of their own, the same on every rank."""
        run = Path(trainer.log_dir or trainer.default_root_dir)
        self.folder = Path(trainer.strategy.broadcast(str(new_folder(run)) if trainer.is_global_zero else ""))
        self.folder.mkdir(parents=True, exist_ok=True)  # on another machine
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        for scale in pl_module.asked_scales:  # type: ignore[union-attr]
            self.files[scale] = (self.folder / f"answers@{scale}{rank}.jsonl").open("w", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's answers."""
        for row in prediction:
            for scale, text in row["answers"].items():
                self.files[scale].write(
                    as_line({"question_id": row["question_id"], "prompt": row["prompt"], "text": text})
                )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the files and say where they are."""
        self._close()
        names = ", ".join(Path(file.name).name for file in self.files.values())
        rank_zero_info(f"Answers: {names} in {self.folder}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the answers of the batches before."""
        self._close()

    def _close(self) -> None:
        for file in self.files.values():
            file.close()


def new_folder(run: Path) -> Path:
    """The first of `answers_0`, `answers_1`, … that is not there yet, made."""
    number = 0
    while True:
        try:
            (run / f"answers_{number}").mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return run / f"answers_{number}"


def as_line(answer: dict[str, Any]) -> str:
    """A line of JSON in UTF-8; what is half of a character is escaped."""
    line = json.dumps(answer, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(answer)
    return line + "\n"
