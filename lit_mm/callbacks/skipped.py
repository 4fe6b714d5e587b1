"""Counts records left out of the data: a table at the end of every epoch, and scalars in the logger."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.table import Table

from lit_mm.callbacks.meter import objects_of_ranks
from lit_mm.evaluation.pictures import print_whole, table_of


class SkippedRecords(Callback):
    """Counts bad records by reason, over all ranks: those found bad before training and those
    that failed to load."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and log `skipped/<reason>`, if anything was left out at all."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "skipped"):
            return
        shares = objects_of_ranks(trainer, (data.skipped.counts, data.seen))
        loading, seen = sum((counts for counts, _ in shares), Counter[str]()), sum(number for _, number in shares)
        before = Counter[str]()
        for mixture in data.sets.values():
            for each in mixture.sets:
                before.update(each.bad.counts)
        for reason in {*before, *loading}:
            pl_module.log(f"skipped/{reason}", float(before[reason] + loading[reason]), rank_zero_only=True)
        if trainer.is_global_zero and (before or loading):
            print_whole(table(trainer.current_epoch, before, loading, seen))


def table(epoch: int, before: Counter[str], loading: Counter[str], seen: int) -> Table:
    """The counts for the terminal."""
    title = f"Records left out, to the end of epoch {epoch} ({seen:,} loaded)"
    rows = table_of(title, [["reason", "before training", "while loading"]])
    for reason in sorted({*before, *loading}):
        rows.add_row(reason, f"{before[reason]:,}", f"{loading[reason]:,}")
    rows.add_row("all", f"{before.total():,}", f"{loading.total():,}", style="bold")
    return rows
