"""One validation or test: what was asked at every scale, how well it went, what an answer takes."""

from __future__ import annotations

from math import ceil
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_mm.callbacks.efficiency_report import Result
from lit_mm.callbacks.meter import counted
from lit_mm.costs.devices import arithmetic_of, device_name, versions
from lit_mm.costs.timing import WARM_UP, AnswerTimer
from lit_mm.evaluation.efficiency import Asked, accuracy_per_tflop, scale_costs, summary
from lit_mm.evaluation.metrics import majority_share
from lit_mm.model.batch import Batch
from lit_mm.training.parts import PARTS

MOST_NEW_TOKENS = 8


class Judgement:
    """Figures of one validation or test.

    Args:
        lit: The LitMatryoshka that is judged.
        split: Which data it is judged on.
        repetitions: Answers that are timed at every scale, behind a warm-up.
    """

    def __init__(self, lit: Any, split: Literal["val", "test"], repetitions: int) -> None:
        self.lit, self.split, self.repetitions = lit, split, repetitions
        self.expected: list[str] = []
        self.asked = Asked(lit.all_scales)

    def add(self, batch: Batch) -> None:
        """Remember what was asked and expected."""
        self.expected += [question.answer or "" for question in batch.questions]
        self.asked.add(counted(batch), len(batch.questions))

    def gather(self, trainer: Trainer) -> None:
        """Bring the ranks together."""
        self.numbers = self.asked.numbers(self.lit.costs)
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, (self.expected, self.numbers))
            self.expected = [answer for answers, _ in shares for answer in answers]
            self.numbers = {name: sum(numbers[name] for _, numbers in shares) for name in self.numbers}

    def result(self, trainer: Trainer, peak: float | None) -> Result:
        """All figures, as `accuracy_tokens.json` holds them; accuracies in 0..1, finest scale first.

        Args:
            trainer: The trainer, at the end of the validation or test.
            peak: FLOP/s that a device can do at most, if that is known.
        """
        asked = {str(scale) for scale in self.lit.asked_scales}
        rows = scale_costs(self.numbers, self.lit.all_scales, self._cached(trainer))
        rows = [row for row in rows if row["scale"] in asked]
        for row in rows:
            row["accuracy"] = trainer.callback_metrics[f"{self.split}/accuracy@{row['scale']}"].item()
            if (loss := trainer.callback_metrics.get(f"{self.split}/loss@{row['scale']}")) is not None:
                row["loss"] = loss.item()
            row["accuracy_per_tflop"] = accuracy_per_tflop(row)
        timed = self._time(trainer, rows)
        return {
            "split": self.split,
            "step": self.lit.place.steps,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "questions": len(self.expected),
            "majority_answer": majority_share(self.expected),
            **summary(rows),
            "scales": rows,
            "timed": timed,
            "run": described(trainer, self.lit, peak),
        }

    def _cached(self, trainer: Trainer) -> int | None:
        """Bytes that a token leaves in the KV cache: of the weights' type also under autocast; sharded weights
        are cast before they compute."""
        if self.lit.costs is None:
            return None
        half = self.lit.vlm.sharded and arithmetic_of(str(trainer.precision)) == "half"
        return self.lit.costs.language.cached * (2 if half else self.lit.vlm.llm.dtype.itemsize)

    def _time(self, trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, int] | None:
        """Time every scale on images of the most frequent size, as many as a question shows on average; what
        was timed, or None where it can not be."""
        for row in rows:
            row["measured"] = None
        if reason := self._not_timed():
            rank_zero_info(f"answers are not timed: {reason}")
            return None
        [((height, width), _)] = self.asked.images.most_common(1)
        images = ceil(self.asked.images.total() / self.asked.questions)
        pixels = torch.zeros(images, 3, height, width, dtype=torch.uint8)
        new_tokens = max(2, min(self.lit.max_new_tokens, MOST_NEW_TOKENS))
        measured = []
        try:
            for row in rows:
                visual = round(row["mean_visual_tokens"])
                timer = AnswerTimer(self.lit.vlm, round(row["prompt_tokens"]) - visual, new_tokens, self.repetitions)
                with trainer.precision_plugin.val_step_context():
                    measured.append(timer(pixels, visual))
        except torch.OutOfMemoryError:  # no reason to lose a run
            rank_zero_info("answers are not timed: the memory does not suffice")
            return None
        for row, times in zip(rows, measured, strict=True):
            row["measured"] = times
        described = {"images": images, "height": height, "width": width, "new_tokens": new_tokens, "batch_size": 1}
        return described | {"repetitions": self.repetitions, "warm_up": WARM_UP}

    def _not_timed(self) -> str:
        """Why not; empty if they are."""
        if not self.repetitions:
            return "token_efficiency.repetitions is 0"
        if self.lit.vlm.sharded:
            return "the model is sharded over ranks"
        if self.lit.costs is None:
            return f"{type(self.lit.vlm.llm).__name__} may not keep a plain KV cache"
        return "" if self.asked.images else "no question shows an image"


def described(trainer: Trainer, lit: Any, peak: float | None) -> dict[str, Any]:
    """Where and how the figures came about."""
    data: Any = getattr(trainer, "datamodule", None)
    budget = getattr(data, "budget", None)
    return {
        "device": device_name(lit.device),
        "devices": trainer.world_size,
        "nodes": trainer.num_nodes,
        "peak_tflops": None if peak is None else peak / 1e12,
        "precision": str(trainer.precision),
        "dtype": {name: str(next(getattr(lit.vlm, name).parameters()).dtype)[6:] for name in PARTS},
        "packing": lit.packing,
        "strategy": type(trainer.strategy).__name__,
        "batch_size": {
            "training_records": getattr(budget, "records", None),
            "training_tokens": getattr(budget, "tokens", None),
            "training_pixels": getattr(budget, "pixels", None),
            "evaluation_records": getattr(data, "eval_batch_size", None),
        },
        "versions": versions(),
    }
