"""What every visual token buys: accuracy against visual tokens, as a picture, a table and a JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lit_mm.evaluation.metrics import majority_share
from lit_mm.model.projector import ClipScale, Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLOURS = ["#1f5fa8", "#c8641e", "#3a8f4d", "#8a4fa3", "#a33f4f"]
"""Of the lines, one a time scale."""


class TokenEfficiency(Callback):
    """At the end of a test, write accuracy at every scale beside the majority answer's share.

    `accuracy_tokens.png` and `accuracy_tokens.json` go to the run's folder, the picture to
    TensorBoard as well, a table to the terminal.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is judged yet; all ranks must ask for the folder, it is told by one to the others."""
        self.expected: list[str] = []
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Remember the expected answers of what was judged."""
        self.expected += [question.answer for question in batch.questions]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the ranks' answers together."""
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self.expected)
            self.expected = [answer for share in shares for answer in share]

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture, the JSON and the table."""
        result = self.result(trainer, cast(list[Scale], pl_module.levels))
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "accuracy_tokens.json").write_text(json.dumps(result, indent=2) + "\n")
        figure = draw(result)
        figure.savefig(folder / "accuracy_tokens.png")
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_figure("test/accuracy against tokens", figure, trainer.global_step)
        Console().print(table(result), f"Picture and figures: {folder}/accuracy_tokens.png and .json", sep="\n")

    def result(self, trainer: Trainer, levels: list[Scale]) -> dict[str, Any]:
        """What the JSON holds: accuracies in 0..1, finest level first."""
        return {
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "questions": len(self.expected),
            "majority_answer": majority_share(self.expected),
            "scales": [_row(trainer, level) for level in levels],
        }


def _row(trainer: Trainer, level: Scale) -> dict[str, Any]:
    """`frames` and tokens of all of them together, for a level of video; tokens of an image otherwise."""
    accuracy = {"accuracy": trainer.callback_metrics[f"test/accuracy@{level}"].item()}
    if isinstance(level, ClipScale):
        return {"frames": level.frames, "visual_tokens": level.frames * level.tokens, **accuracy}
    return {"visual_tokens": level, **accuracy}


def draw(result: dict[str, Any]) -> Figure:
    """Accuracy (%) over visual tokens on a logarithmic axis, the majority answer as a dashed line."""
    import matplotlib
    from matplotlib.figure import Figure

    tokens = sorted({row["visual_tokens"] for row in result["scales"]})
    majority = 100 * result["majority_answer"]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
    for (frames, line), colour in zip(_lines(result).items(), COLOURS * len(tokens), strict=False):
        label = None if frames is None else f"{frames} sets of frames" if frames > 1 else "1 set of frames"
        axes.plot(*zip(*line, strict=True), "o-", color=colour, linewidth=2, markersize=7, label=label, zorder=3)
        for x, y in line:
            axes.annotate(f"{y:.1f}", (x, y), (0, -16), textcoords="offset points", ha="center", color=colour)
    if None not in _lines(result):
        axes.legend(frameon=False, loc="lower right")
    axes.axhline(majority, color="#888888", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"majority answer {majority:.1f}",
        (min(tokens), majority),
        xytext=(0, 5),
        textcoords="offset points",
        color="#666666",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(token) for token in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_xlabel("visual tokens per image" if None in _lines(result) else "visual tokens per video, at most")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"One model, any token budget ({result['questions']:,} questions)", loc="left", fontsize=12)
    return figure


def _lines(result: dict[str, Any]) -> dict[int | None, list[tuple[int, float]]]:
    """(tokens, accuracy in %) of each time scale; of None without any."""
    lines: dict[int | None, list[tuple[int, float]]] = {}
    for row in result["scales"]:
        lines.setdefault(row.get("frames"), []).append((row["visual_tokens"], 100 * row["accuracy"]))
    return lines


def table(result: dict[str, Any]) -> Table:
    """The same figures for the terminal."""
    rows = Table(title=f"Test accuracy, {result['questions']:,} questions", title_justify="left")
    rows.add_column("visual tokens", justify="right")
    rows.add_column("accuracy (%)", justify="right")
    for row in result["scales"]:
        tokens, frames = row["visual_tokens"], row.get("frames")
        name = f"{frames} x {tokens // frames} = {tokens}" if frames else str(tokens)
        rows.add_row(name, f"{100 * row['accuracy']:.2f}")
    rows.add_row("majority answer", f"{100 * result['majority_answer']:.2f}", style="dim")
    return rows
