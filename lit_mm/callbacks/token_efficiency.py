"""What every visual token costs and buys: counted in training, judged in validation and test.

Training     tokens, images, speed, memory, MFU, every `trainer.log_every_n_steps` steps
Validation   accuracy and cost of every scale, as scalars, a picture and a table, the last one's also as
             accuracy_tokens_val.png and .json and at the end in the terminal
Test         the same as accuracy_tokens.png and .json

A training step is never waited for: what is counted comes with the batch, ranks share one small
tensor per report, and times on a GPU are read from events that lie behind (`meter`, `part_times`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_mm.callbacks.efficiency_report import Result, draw, markdown, table
from lit_mm.callbacks.judgement import Judgement
from lit_mm.callbacks.meter import GIB, Clock, Meter, Numbers, over_ranks, report, training_flops
from lit_mm.callbacks.part_times import OTHER, PartTimes
from lit_mm.callbacks.tensorboard_page import open_page, writers
from lit_mm.costs.devices import PeakMemory, arithmetic_of, device_name, peak_flops
from lit_mm.evaluation.pictures import print_whole
from lit_mm.model.batch import Batch
from lit_mm.training.parts import PARTS


class TokenEfficiency(Callback):
    """Logs what visual tokens cost and buy, to every logger and in pictures and tables to TensorBoard.

    Groups: `tokens/` and `images/` per step over all ranks, `speed/` over all ranks, `parts/` of one
    step in each interval on rank 0 (not the first of a run, which has more to do), `memory/` the most of
    any rank, `scale/` and `val/accuracy_area` of every scale, `train/lr_` of every part. Pixels are those
    that the encoder gets: of a photo that was made square, its filling too; `stride_padding_share` is what
    the encoder adds to reach its stride.
    MFU is the FLOPs that the model needs (lit_mm.costs.flops; what checkpointing computes again is
    not counted) by the time, as a share of the devices' peak; that of a part by the time of this part
    alone, forward and backward.
    """

    def __init__(self, peak_tflops: float | None = None, repetitions: int = 5) -> None:
        """Set up.

        Args:
            peak_tflops: The most TFLOP/s that a device can do in the precision of the run, for MFU;
                null: by the device's name, and no MFU for an unknown device.
            repetitions: Answers that are timed at every scale behind each validation and test, one at a
                time; 0: none.

        Raises:
            ValueError: repetitions is 1, of which there are no quartiles, or negative; a peak is not positive.
        """
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"token_efficiency.peak_tflops: expected more than 0, found {peak_tflops}")
        if repetitions < 0 or repetitions == 1:
            raise ValueError(f"token_efficiency.repetitions: expected 0 or at least 2, found {repetitions}")
        self.peak_tflops, self.repetitions = peak_tflops, repetitions
        self.clock = Clock()
        self.last: Result | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing is judged yet. All ranks must ask for the run's folder, one tells it to the others; a trial of a
        batch (fast_dev_run) has none."""
        self.last = None
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self.folder = None if trainer.fast_dev_run else folder  # type: ignore[attr-defined]

    # training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is counted yet."""
        lit: Any = pl_module
        self.clock, self.meter = Clock(), Meter(lit.scales, lit.vlm.encoder.stride, lit.costs)
        self.memory, self.parts = PeakMemory(lit.device), PartTimes(lit.device)
        self.watched = Counter[str]()
        self.warm, self.due, self.begins = False, False, True
        self.peak = self.peak_of(trainer, lit)
        if lit.costs:  # counted once, before the clock runs
            lit.costs.image(tuple(lit.vlm.encoder.smallest))
            for visual in (False, True):
                lit.costs.text(0, 0, 0, visual)
        if lit.costs is None:
            rank_zero_info(f"no FLOPs and no MFU: costs of {type(lit.vlm.llm).__name__} are not known")
        elif self.peak is None:
            name = device_name(lit.device)
            rank_zero_info(f"no MFU: the peak of {name} is not known, token_efficiency.peak_tflops tells it")

    def peak_of(self, trainer: Trainer, lit: Any) -> float | None:
        """FLOP/s of this rank's device, None if unknown."""
        if self.peak_tflops is not None:
            return 1e12 * self.peak_tflops
        arithmetic = arithmetic_of(str(trainer.precision), {parameter.dtype for parameter in lit.vlm.parameters()})
        return peak_flops(device_name(trainer.strategy.root_device), arithmetic)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out TensorBoard's page."""
        self.reported = self.steps = trainer.global_step
        open_page(trainer, pl_module, utilization=bool(self.peak and pl_module.costs))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock; watch the parts in one step of each interval."""
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
        """And ends."""
        self.parts.mark(OTHER)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop the clock, and report when Lightning does."""
        self.clock.end()
        self.begins, self.steps = trainer.global_step > self.steps, trainer.global_step
        if self.begins:
            self.parts.stop()  # from the second step on one is watched: the first has more to do
            self.warm, self.due = True, self.due or not self.warm
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.steps % every == 0 and self.steps > self.reported:
            self._report(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what is left of the last interval."""
        if trainer.log_every_n_steps and self.steps > self.reported:  # type: ignore[attr-defined]
            self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, lit: Any) -> None:
        own = {**self.meter.take(), **self.clock.take(), **self.memory.take()}
        own["peak_flops"] = float("nan") if self.peak is None else self.peak
        values = report(over_ranks(lit, own), self.steps - self.reported, trainer.world_size, lit.scales)
        self.reported = self.steps
        log(trainer, values | self._parts() | _learning_rates(trainer), self.steps - 1)

    def _parts(self) -> Numbers:
        """Of the step that was watched, if it is over on the device."""
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

    def _pause(self) -> None:
        """Validation, perhaps between two batches of a step."""
        self.clock.paused = True
        if self.parts.running:
            self.parts.forget()
            self.due = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writing it is no training."""
        self.clock.paused = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nor are tables and new loaders."""
        self.clock.paused = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last validation's result."""
        if self.last:
            self._tell(self.last)

    # validation and test

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is judged yet; training's peak of memory is kept."""
        if trainer.state.fn == "fit":
            self._pause()
            self.memory.note()
        self.judgement = Judgement(pl_module, "val", self.repetitions)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is judged yet."""
        self.judgement = Judgement(pl_module, "test", self.repetitions)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the questions."""
        self.judgement.add(batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the ranks' questions together."""
        self.judgement.gather(trainer)

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time every scale, log scalars, picture and table."""
        if not trainer.sanity_checking and trainer.is_global_zero and self.judgement.expected:
            self.last = self._judged(trainer)
        if trainer.state.fn == "fit":
            self.memory.forget()
            if trainer.is_global_zero and not trainer.sanity_checking:
                bar: Any = trainer.progress_bar_callback
                told = in_a_line(trainer.callback_metrics, trainer.global_step)
                (bar.print if bar and bar.is_enabled else print)(told)
        elif self.last:
            self._tell(self.last)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, and the table to the terminal."""
        if trainer.is_global_zero and self.judgement.expected:
            self._tell(self._judged(trainer))
        elif trainer.is_global_zero:
            rank_zero_warn("nothing was judged: no record of the test could be asked")

    def _judged(self, trainer: Trainer) -> Result:
        result = self.judgement.result(trainer, self.peak_of(trainer, self.judgement.lit))
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self.judgement.split == "val":
            log(trainer, scalars(result), step)
        for writer in writers(trainer):
            writer.add_figure(f"{result['split']}/accuracy against tokens", draw(result), step)
            writer.add_text(f"{result['split']}/table", markdown(result), step)
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / FILES[result["split"]]
            file.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
            draw(result).savefig(file.with_suffix(".png"))
        return result

    def _tell(self, result: Result) -> None:
        """The table to the terminal, and where the files are."""
        print_whole(table(result))
        if self.folder:
            print_whole(f"Picture and figures: {self.folder / FILES[result['split']]}.png and .json")


FILES = {"val": "accuracy_tokens_val", "test": "accuracy_tokens"}


def log(trainer: Trainer, values: Numbers, step: int) -> None:
    """To every logger, at so many optimizer steps before the one that is logged, as Lightning counts for them."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step)


def in_a_line(metrics: Mapping[str, torch.Tensor], step: int) -> str:
    """`validation at step 700: loss 1.234, accuracy % 45.00 @16, 40.00 @4`: what one validation found."""
    found = [f"loss {metrics['val/loss']:.3f}"] if "val/loss" in metrics else []
    scales = [name.split("@")[1] for name in metrics if name.startswith("val/accuracy@")]
    accuracies = [f"{100 * metrics[f'val/accuracy@{scale}']:.2f} @{scale}" for scale in scales]
    found += [f"accuracy % {', '.join(accuracies)}"] if accuracies else []
    return f"validation at step {step:,}: {', '.join(found)}"


def scalars(result: Result) -> Numbers:
    """What of a validation is worth a curve."""
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
    """The highest of each part's groups."""
    found: Numbers = {}
    for group in trainer.optimizers[0].param_groups:
        name = f"train/lr_{str(group.get('name', 'all')).split('_')[0]}"
        found[name] = max(found.get(name, 0.0), float(group["lr"]))
    return found
