"""Writes answers to files, also in the format that LLaVA's evaluation scripts read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_mm.model.scales import Scale


class AnswerWriter(BasePredictionWriter):
    """Writes the answers of one prediction to a new folder `answers_0`, `answers_1`, … in the run's folder.

    `answers.jsonl` has one line per question and scale: question_id, prompt, scale, text, logprob (of the whole
    answer), tokens, visual_tokens and finish (`stop`, `length` or `error`). `answers@16.jsonl`, … have the format
    of LLaVA's scripts, {"question_id", "prompt", "text"}, one file per scale. Other ranks' files are
    `answers.rank1.jsonl`, ….
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self.files: dict[Scale | None, TextIO] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the files in a new folder, the same on every rank."""
        run = Path(trainer.log_dir or trainer.default_root_dir)
        self.folder = Path(trainer.strategy.broadcast(str(new_folder(run)) if trainer.is_global_zero else ""))
        self.folder.mkdir(parents=True, exist_ok=True)  # this rank may be on another machine
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        names = {scale: f"answers@{scale}{rank}.jsonl" for scale in cast(Any, pl_module).asked_scales}
        for scale, name in {None: f"answers{rank}.jsonl", **names}.items():
            self.files[scale] = (self.folder / name).open("w", encoding="utf-8")

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
            asked = {"question_id": row["question_id"], "prompt": row["prompt"]}
            for scale, answer in row["answers"].items():
                self.files[scale].write(as_line({**asked, "text": answer.text}))
                told = {"scale": str(scale), "text": answer.text, "logprob": sum(answer.logprobs)}
                told |= {"tokens": len(answer.ids), "visual_tokens": answer.visual_tokens, "finish": answer.finish}
                self.files[None].write(as_line({**asked, **told}))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the files and print where they are."""
        self._close()
        names = ", ".join(Path(file.name).name for file in self.files.values())
        rank_zero_info(f"Answers: {names} in {self.folder}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the answers written so far."""
        self._close()

    def _close(self) -> None:
        for file in self.files.values():
            file.close()


def new_folder(run: Path) -> Path:
    """Create and return the first of `answers_0`, `answers_1`, … that does not exist yet."""
    number = 0
    while True:
        try:
            (run / f"answers_{number}").mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return run / f"answers_{number}"


def as_line(answer: dict[str, Any]) -> str:
    """A line of JSON in UTF-8, with half characters (lone surrogates) escaped."""
    line = json.dumps(answer, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(answer)
    return line + "\n"
