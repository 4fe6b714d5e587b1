"""Judges benchmarks while a model trains: the same questions every so many steps."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lit_mm.callbacks.token_efficiency import TokenEfficiency, log, say
from lit_mm.data.datamodules import names_of
from lit_mm.training.check import evaluating


class BenchmarkEvaluation(Callback):
    """Answers a fixed draw of the benchmarks' questions at every scale while the model trains, and logs each
    benchmark's headline figure to all loggers: `bench/docvqa@16`, …, with the metric's further figures.

    Training goes on as it would without this: with the same weights, random numbers and batches. The time does not
    count as training time.
    """

    def __init__(self, benchmarks: list[str], evaluate_every: int, questions: int | None = 200, seed: int = 0) -> None:
        """Choose the benchmarks.

        Args:
            benchmarks: Benchmarks with their files, such as docvqa:PATH (see docs/evaluation.md), or files of
                questions with answers.
            evaluate_every: Optimizer steps between two evaluations.
            questions: Number of questions of each benchmark, drawn at random, the same every time and on any number
                of devices; null: all.
            seed: Seed of the draw.

        Raises:
            FileNotFoundError, ValueError: There is no such benchmark, two have one name, or a number is not positive.
        """
        for name, value in (("evaluate_every", evaluate_every), ("questions", questions)):
            if value is not None and value < 1:
                raise ValueError(f"BenchmarkEvaluation.{name}: expected a positive number, found {value}")
        self.files = names_of(benchmarks, "bench", "BenchmarkEvaluation.benchmarks")
        self.evaluate_every, self.questions, self.seed = evaluate_every, questions, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the questions, so that what is wrong with them is said before training.

        Raises:
            As `ImageDataModule.setup`, and TypeError: Another data module trains.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "fit" and not hasattr(data, "add_questions"):
            raise TypeError(f"BenchmarkEvaluation: expected lit_mm's data modules, found {type(data).__name__}")
        for name, file in self.files.items() if stage == "fit" else ():
            data.add_questions(name, file, self.questions, self.seed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has evaluated the step that it goes on from."""
        self.evaluated = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate after every so many optimizer steps."""
        step = trainer.global_step
        if step % self.evaluate_every == 0 and step > self.evaluated:
            self.evaluated = step
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, lit: Any) -> None:
        figures: dict[str, float] = {}
        with ExitStack() as stack:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, TokenEfficiency):
                    stack.enter_context(callback.not_training())
            stack.enter_context(evaluating(lit))
            for name in self.files:
                figures |= {figure: value.item() for figure, value in judged(trainer, lit, name).items()}
        log(trainer, figures, trainer.global_step - 1)
        heads = [f"{name.removeprefix('bench/')} {self._line(figures, name, lit)}" for name in self.files]
        say(trainer, f"benchmarks at step {trainer.global_step:,}: {'; '.join(heads)}")

    @staticmethod
    def _line(figures: dict[str, float], name: str, lit: Any) -> str:
        """`0.7125 @16, 0.605 @4`."""
        return ", ".join(f"{figures[f'{name}@{scale}']:.4g} @{scale}" for scale in lit.asked_scales)


def judged(trainer: Trainer, lit: Any, name: str) -> dict[str, torch.Tensor]:
    """The figures of a set of questions; every rank runs the model equally often."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    loader = data.question_loader(name)
    for batch in loader:
        with trainer.precision_plugin.val_step_context():
            lit.judge(name, trainer.strategy.batch_to_device(batch))
    loader.close()  # its processes
    return lit.figures(name)
