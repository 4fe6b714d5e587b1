"""The overhead of the TokenEfficiency callback in a training step, from alternating runs with and without it.

python experiments/benchmarks/watching.py [--steps 60] [--repetitions 5] [--json out.json]

It reports the median step time of each kind of run, and the time of the callback's hooks and of counting batches,
which is more precise than the difference of two noisy medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))

from lit_mm.callbacks.token_efficiency import TokenEfficiency
from lit_mm.costs.devices import device_name, versions
from lit_mm.data import collate
from lit_mm.data.easy_vqa import EasyVQADataModule
from lit_mm.profile.experiment import read_model
from lit_mm.training.module import LitMatryoshka

HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")
WARM_UP = 10
"""Steps of every run that are left out."""


class Steps(lightning.Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Now."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each step behind the warm-up."""
        kept = self.ends[WARM_UP:]
        return [end - before for before, end in pairwise(kept)]


class Spent:
    """Seconds in each of some functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time taken."""

        def wrapper(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return wrapper


def run(steps: int, callbacks: list[lightning.Callback], folder: str, overrides: list[str]) -> list[float]:
    """Seconds of each step of a short run."""
    lightning.seed_everything(1, verbose=False)
    model = read_model(["experiments/quickstart.yaml"], overrides)
    lit, watch = LitMatryoshka(**vars(model)), Steps()
    data = EasyVQADataModule(lit.inputs, root=f"{folder}/data", batch_size=16)
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 10}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        logger=TensorBoardLogger(folder),
        callbacks=[watch, *callbacks],
        **options,
    )
    trainer.fit(lit, data)
    return watch.seconds()


def watched() -> tuple[TokenEfficiency, Spent]:
    """The callback with its hooks timed."""
    callback, spent = TokenEfficiency(peak_tflops=1.0), Spent()
    for name in HOOKS:
        setattr(callback, name, spent.timed(name, getattr(callback, name)))
    return callback, spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    hooks: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        once = partial(run, options.steps, folder=folder, overrides=overrides)
        once(callbacks=[])
        for repetition in range(options.repetitions):
            for kind in sorted(seconds, reverse=bool(repetition % 2)):
                callback, spent = watched()
                counting, collate.counts_of = collate.counts_of, spent.timed("counting", collate.counts_of)
                seconds[kind] += once(callbacks=[callback] if kind == "with" else [])
                collate.counts_of = counting
                for name, total in spent.seconds.items():
                    hooks[name].append(total / options.steps)
    report(seconds, hooks, options)


def report(seconds: dict[str, list[float]], hooks: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print, and write if asked to."""
    medians = {kind: 1000 * statistics.median(times) for kind, times in seconds.items()}
    spent = {name: 1e6 * statistics.median(times) for name, times in hooks.items()}
    found = {
        "hardware": device_name(torch.device("cpu")),
        "versions": versions(),
        "steps": options.steps,
        "repetitions": options.repetitions,
        "step_ms": medians,
        "difference_percent": 100 * (medians["with"] / medians["without"] - 1),
        "hooks_us_per_step": spent,
        "hooks_percent": sum(spent.values()) / medians["without"] / 10,
    }
    Console(width=120).print_json(json.dumps(found))
    if not 0 < found["hooks_percent"] < 100:
        sys.exit(f"refused, this cannot be: the hooks take {found['hooks_percent']:.1f} % of a step without them")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
