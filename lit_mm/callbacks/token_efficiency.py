"""What every visual token costs and buys: counted in training, evaluated in validation and test.

Training     tokens, images, speed, memory, MFU, every `trainer.log_every_n_steps` steps
Validation   accuracy and cost of every scale, as scalars, a picture and a table; the last validation's
             also as accuracy_tokens_val.png and .json, and in the terminal when the run ends
Test         the same as accuracy_tokens.png and .json

Training never waits for this: counts come with the batch, ranks share one small tensor per report,
and GPU times are read from events that have already passed (see `meter.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_mm.callbacks.efficiency_report import (
    Evaluation,
    Result,
    draw,
    in_short,
    markdown,
    set_name,
    sets_markdown,
    sets_table,
    table,
)
from lit_mm.callbacks.meter import GIB, OTHER, Clock, Meter, Numbers, PartTimes, over_ranks, report, training_flops
from lit_mm.callbacks.tensorboard_page import open_page, writers
from lit_mm.costs.devices import PeakMemory, arithmetic_of, device_name, peak_flops
from lit_mm.evaluation import front, oracle_report
from lit_mm.evaluation.answer_costs import rows_by_cost
from lit_mm.evaluation.calibration import CHOOSER
from lit_mm.evaluation.pictures import print_whole
from lit_mm.evaluation.results import Judged, write_questions
from lit_mm.model.batch import Batch
from lit_mm.training.parts import PARTS


class TokenEfficiency(Callback):
    """Logs what visual tokens cost and buy: scalars to every logger, pictures and tables to TensorBoard.

    Groups of scalars:

    - `tokens/`, `images/`: per step, summed over ranks.
    - `speed/`: over all ranks.
    - `parts/`: one step of each interval, on rank 0; never a run's first step, which does extra work.
    - `memory/`: the largest of any rank.
    - `scale/`, `val/accuracy_area`: validation, by scale.
    - `train/lr_`: by part.

    Pixels are counted as the encoder gets them, including the padding that makes a photo square;
    `stride_padding_share` is what the encoder adds to reach a multiple of its stride.
    MFU is the FLOPs that the model needs (lit_mm.costs.flops; without recomputation by activation
    checkpointing) divided by the time and the devices' peak FLOP/s. A part's MFU divides its FLOPs by the
    time of this part alone, forward and backward.
    """

    def __init__(self, peak_tflops: float | None = None, repetitions: int = 5) -> None:
        """Set up.

        Args:
            peak_tflops: A device's peak TFLOP/s in the run's precision, for MFU; null: looked up by the
                device's name, with no MFU for unknown devices.
            repetitions: Answers timed at every scale after each validation and test, one at a time; 0: none.

        Raises:
            ValueError: repetitions is negative or 1 (one answer has no quartiles), or the peak is not positive.
        """
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"token_efficiency.peak_tflops: expected more than 0, found {peak_tflops}")
        if repetitions < 0 or repetitions == 1:
            raise ValueError(f"token_efficiency.repetitions: expected 0 or at least 2, found {repetitions}")
        self.peak_tflops, self.repetitions = peak_tflops, repetitions
        self.clock = Clock()
        self.last: Result | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder; fast_dev_run has none. Every rank must read `log_dir`: rank 0 broadcasts it."""
        self.last = None
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self.folder = None if trainer.fast_dev_run else folder  # type: ignore[attr-defined]

    # training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset all counters and look up the device's peak."""
        lit: Any = pl_module
        self.clock, self.meter = Clock(), Meter(lit.scales, lit.vlm.encoder.stride, lit.costs)
        self.memory, self.parts = PeakMemory(lit.device), PartTimes(lit.device)
        self.watched = Counter[str]()
        self.warm, self.due, self.begins = False, False, True
        self.peak = self.peak_of(trainer, lit)
        if lit.costs:  # cached here, before the clock runs
            lit.costs.image(tuple(lit.vlm.encoder.smallest))
            for visual in (False, True):
                lit.costs.text(0, 0, 0, visual)
        if lit.costs is None:
            rank_zero_info(f"no FLOPs and no MFU: costs of {type(lit.vlm.llm).__name__} are not known")
        elif self.peak is None:
            name = device_name(lit.device)
            rank_zero_info(f"no MFU: the peak of {name} is not known, set it with token_efficiency.peak_tflops")

    def peak_of(self, trainer: Trainer, lit: Any) -> float | None:
        """Peak FLOP/s of this rank's device, None if unknown."""
        if self.peak_tflops is not None:
            return 1e12 * self.peak_tflops
        arithmetic = arithmetic_of(str(trainer.precision), {parameter.dtype for parameter in lit.vlm.parameters()})
        return peak_flops(device_name(trainer.strategy.root_device), arithmetic)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set up TensorBoard's page."""
        self.reported = self.steps = trainer.global_step
        open_page(trainer, pl_module, utilization=bool(self.peak and pl_module.costs))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock; time the parts in one step of each interval."""
        lit: Any = pl_module
        self.clock.start(trainer.train_dataloader)
        self.meter.add(batch)
        if self.due and self.begins:
            self.due, self.watched = False, Counter()
            self.parts.start(lit.vlm)
        if self.parts.running:
            self.parts.mark(OTHER)
            self.watched.update(training_flops(lit.costs.step(batch)) if lit.costs else {})

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """The backward pass begins with the LLM's."""
        self.parts.mark("llm")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward pass is over."""
        self.parts.mark(OTHER)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop the clock, and report when Lightning does."""
        self.clock.end()
        self.begins, self.steps = trainer.global_step > self.steps, trainer.global_step
        if self.begins:
            self.parts.stop()  # the first step is never timed, it does extra work
            self.warm, self.due = True, self.due or not self.warm
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.steps % every == 0 and self.steps > self.reported:
            self._report(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last, unfinished interval."""
        if trainer.log_every_n_steps and self.steps > self.reported:  # type: ignore[attr-defined]
            self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, lit: Any) -> None:
        own = {**self.meter.take(), **self.clock.take(), **self.memory.take()}
        own["peak_flops"] = float("nan") if self.peak is None else self.peak
        values = report(over_ranks(lit, own), self.steps - self.reported, trainer.world_size, lit.scales)
        self.reported = self.steps
        log(trainer, values | self._parts() | _learning_rates(trainer), self.steps - 1)

    def _parts(self) -> Numbers:
        """Figures of the timed step, once the device has finished it."""
        times = self.parts.take()
        if times is None:
            return {}
        self.due = True
        found = {f"parts/{part}_ms": times.get(part, 0.0) for part in (*PARTS, OTHER)}
        flops, total = self.watched, self.watched.total()
        for part in PARTS if total else ():
            found[f"parts/{part}_FLOPs_share"] = flops[f"{part}_flops"] / total
            if self.peak and times.get(part):
                found[f"parts/{part}_MFU"] = flops[f"{part}_flops"] / (times[part] / 1000) / self.peak
        return found

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writing a checkpoint is not training time."""
        self.clock.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of an epoch is not training time."""
        self.clock.pause()

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """What runs inside, during a fit, counts neither in training's time nor in its memory."""
        self.clock.pause()
        if self.parts.running:  # time another step
            self.parts.cancel()
            self.due = True
        self.memory.note()
        yield
        self.memory.forget()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last validation's result."""
        if self.last:
            self._tell(self.last)

    # validation and test

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause training's clock and save its memory peak."""
        self.pause = ExitStack()
        if trainer.state.fn == "fit":
            self.pause.enter_context(self.not_training())
        self.evaluations = [Evaluation(pl_module, "val", self.repetitions)]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting questions."""
        lit: Any = pl_module
        self.evaluations = [Evaluation(lit, name, self.repetitions) for name in lit.test_names]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge and count the questions."""
        self.evaluations[dataloader_idx].add(batch, outputs["answers"])

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Combine the questions of all ranks."""
        for evaluation in self.evaluations:
            evaluation.gather(trainer)

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time every scale; log scalars, picture and table."""
        [evaluation] = self.evaluations
        if not trainer.sanity_checking and trainer.is_global_zero and evaluation.questions:
            self.last = self._evaluate(trainer, evaluation)
        self.pause.close()
        if trainer.state.fn == "fit":
            if not trainer.sanity_checking:
                say(trainer, in_a_line(trainer.callback_metrics, trainer.global_step))
        elif self.last:
            self._tell(self.last)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time every scale, log picture and table, and print the table, of every test set and of all together."""
        if not trainer.is_global_zero:
            return
        results = [self._evaluate(trainer, each) for each in self.evaluations if each.questions]
        for result in results:
            self._tell(result)
        if len(results) > 1:
            self._tell_all(trainer, results)
        if len(results) < len(self.evaluations):
            names = ", ".join(set_name(each.name) for each in self.evaluations if not each.questions)
            rank_zero_warn(f"nothing was evaluated: no record of {names} has a question to ask")

    def _evaluate(self, trainer: Trainer, evaluation: Evaluation) -> Result:
        result = evaluation.result(trainer, self.peak_of(trainer, evaluation.lit))
        if self.folder and evaluation.name.startswith("test") and (self.folder / CHOOSER).is_file():
            result["chooser"] = chosen(self.folder / CHOOSER, evaluation.questions, result)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if evaluation.name == "val":
            log(trainer, scalars(result), step)
        for writer in writers(trainer):
            writer.add_figure(f"{evaluation.name}/accuracy against tokens", draw(result), step)
            writer.add_text(f"{evaluation.name}/table", markdown(result), step)
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / file_of(evaluation.name)
            file.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
            draw(result).savefig(file.with_suffix(".png"))
            scales = [row["scale"] for row in result["scales"]]
            write_questions(file.with_suffix(".parquet"), evaluation.questions, scales)
        if result["oracle"] and evaluation.name != "val":
            self._show(trainer, result, "oracle", oracle_report.draw, oracle_report.markdown)
        if result.get("chooser"):
            self._show(trainer, result, "chooser", front.draw, front.markdown)
        return result

    def _show(self, trainer: Trainer, result: Result, part: str, draw: Any, markdown: Any) -> None:
        """Log the picture and the table of one part of the figures, and write the picture."""
        step, picture = trainer.fit_loop.epoch_loop._batches_that_stepped, draw(result[part])
        for writer in writers(trainer):
            writer.add_figure(f"{result['split']}/{part}", picture, step, close=False)
            writer.add_text(f"{result['split']}/{part}", markdown(result[part]), step)
        if self.folder:
            picture.savefig(self.folder / f"{file_of(result['split'])}_{part}.png")

    def _tell(self, result: Result) -> None:
        """Print the tables and the files' names."""
        of_oracle = result["oracle"] if result["split"] != "val" else None
        auto = [front.table(result["chooser"])] if result.get("chooser") else []
        print_whole(table(result), *(oracle_report.tables(of_oracle) if of_oracle else []), *auto, *in_short(result))
        if self.folder:
            file = self.folder / file_of(result["split"])
            others = "".join(
                f", {file.name}_{part}.png" for part in ("oracle", "chooser") if result.get(part) and of_oracle
            )
            print_whole(f"Picture, figures and every question: {file}.png, .json, .parquet{others}")

    def _tell_all(self, trainer: Trainer, results: list[Result]) -> None:
        """Print and log the table of several test sets."""
        print_whole(sets_table(results))
        for writer in writers(trainer):
            writer.add_text("test/all", sets_markdown(results), trainer.fit_loop.epoch_loop._batches_that_stepped)


def chosen(file: Path, questions: list[Judged], result: Result) -> Result | None:
    """What the run's chooser, calibrated on validation, reaches on a test; None where it does not fit the test."""
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["calibrated_on"]["step"] != result["step"]:
        at = told["calibrated_on"]["step"]
        rank_zero_warn(
            f"{file} was calibrated at step {at}, this is step {result['step']}: validate and calibrate again"
        )
    try:
        chooser, others = front.rules_of(told, [row["scale"] for row in result["scales"]])
        return front.front_of(rows_by_cost(questions, result["scales"]), chooser, others)
    except ValueError as error:
        rank_zero_info(f"{set_name(result['split'])}: no answers at chosen scales: {error}")
        return None


def file_of(name: str) -> str:
    """The files of a set in the run's folder, without suffix."""
    return {"val": "accuracy_tokens_val", "test": "accuracy_tokens"}.get(name, name.replace("/", "_"))


def log(trainer: Trainer, values: Numbers, step: int) -> None:
    """Log to every logger. `step` is the number of optimizer steps before this one, as Lightning counts."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step)


def say(trainer: Trainer, line: str) -> None:
    """Print a line above the progress bar, on rank 0."""
    if trainer.is_global_zero:
        bar: Any = trainer.progress_bar_callback
        (bar.print if bar and bar.is_enabled else print)(line)


def in_a_line(metrics: Mapping[str, torch.Tensor], step: int) -> str:
    """`validation at step 700: loss 1.234, accuracy % 45.00 @16, 40.00 @4`: one validation in a line."""
    found = [f"loss {metrics['val/loss']:.3f}"] if "val/loss" in metrics else []
    scales = [name.split("@")[1] for name in metrics if name.startswith("val/accuracy@")]
    accuracies = [f"{100 * metrics[f'val/accuracy@{scale}']:.2f} @{scale}" for scale in scales]
    found += [f"accuracy % {', '.join(accuracies)}"] if accuracies else []
    return f"validation at step {step:,}: {', '.join(found)}"


def scalars(result: Result) -> Numbers:
    """The scalars of a validation."""
    found: Numbers = {"val/accuracy_area": result["area"]} if result["area"] is not None else {}
    for row in result["scales"]:
        values = {
            "visual_tokens": row["mean_visual_tokens"],
            "prompt_tokens": row["prompt_tokens"],
            "prefill_GFLOPs": row["prefill_flops"] / 1e9 if "prefill_flops" in row else None,
            "KV_MiB": row["kv_bytes"] / 2**20 if "kv_bytes" in row else None,
            **{name: row["measured"][name]["median"] for name in row["measured"] or {} if name.endswith("_ms")},
            "peak_GiB": row["measured"]["peak_bytes"] / GIB if (row["measured"] or {}).get("peak_bytes") else None,
        }
        found |= {f"scale/{name}@{row['scale']}": value for name, value in values.items() if value is not None}
    return found


def _learning_rates(trainer: Trainer) -> Numbers:
    """The highest learning rate among each part's parameter groups."""
    found: Numbers = {}
    for group in trainer.optimizers[0].param_groups:
        name = f"train/lr_{str(group.get('name', 'all')).split('_')[0]}"
        found[name] = max(found.get(name, 0.0), float(group["lr"]))
    return found
