"""A picture of a few validation images in TensorBoard, with what the model answers at every scale."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from lit_mm.callbacks.tensorboard_page import writers
from lit_mm.evaluation.metrics import ExactMatch
from lit_mm.model.batch import Batch, Images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, GRAY = "#2e7d32", "#b3261e", "#666666"
LINE = 0.3
"""Height of a line of text, in inches."""
MOST_FRAMES = 4
"""Frames of a video that are shown, evenly spaced."""


@dataclass
class Shown:
    """A question of the picture, with S answers.

    Args:
        picture: uint8 [H, W, 3].
        question: Its text.
        references: The accepted answers.
        answers: [S].
        right: [S].
    """

    picture: np.ndarray
    question: str
    references: Sequence[str]
    answers: list[str]
    right: list[bool]


class AnswerGallery(Callback):
    """At every validation of a fit, shows the same few images as the model sees them, each with a question, the
    expected answer, and the answers at all scales: `val/answers` on TensorBoard's images page.

    The questions are the first of rank 0, one for each image; data.val_questions chooses at random.
    """

    def __init__(self, questions: int = 4) -> None:
        """Set up.

        Args:
            questions: Number of images.

        Raises:
            ValueError: It is not positive.
        """
        if questions < 1:
            raise ValueError(f"AnswerGallery.questions: expected a positive number, found {questions}")
        self.questions, self.metric = questions, ExactMatch()
        self.shown: list[Shown] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a picture."""
        self.shown = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what will be shown."""
        seen: list[list[int]] = []
        for question, generated in zip(batch.questions, outputs["answers"], strict=True):
            images = question.image_index
            if not images or images in seen or len(self.shown) == self.questions or not trainer.is_global_zero:
                continue
            seen.append(images)
            references, answers = question.references or ("",), [answer.text for answer in generated]
            right = [self.metric.score(answer, references) == 1 for answer in answers]
            self.shown.append(Shown(picture_of(batch.images, images), question.text, references, answers, right))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        if not self.shown or trainer.sanity_checking:
            return
        lit: Any = pl_module
        scales = [str(scale) for scale in lit.asked_scales]
        for writer in writers(trainer):
            writer.add_figure(
                "val/answers", draw(self.shown, scales), trainer.fit_loop.epoch_loop._batches_that_stepped
            )


def picture_of(images: Images, index: Sequence[int]) -> np.ndarray:
    """Some of a batch's images side by side, at most four: uint8 [H, W, 3]."""
    chosen = [index[n] for n in np.linspace(0, len(index) - 1, min(len(index), MOST_FRAMES)).round().astype(int)]
    flat = [image for group in images.groups for image in group]
    pictures = [flat[int(images.order[n])].permute(1, 2, 0).cpu().numpy() for n in chosen]
    height = max(len(picture) for picture in pictures)
    filled = [
        np.pad(picture, ((0, height - len(picture)), (0, 0), (0, 0)), constant_values=255) for picture in pictures
    ]
    return np.concatenate(filled, axis=1)


def draw(shown: Sequence[Shown], scales: Sequence[str]) -> Figure:
    """A row for each question: the image, then the question, the expected answer, and a line for each scale."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    texts = [textwrap.wrap(plain(each.question, 300), 62) or [""] for each in shown]
    heights = [LINE * (len(lines) + len(scales) + 2) for lines in texts]
    engine = ConstrainedLayoutEngine(h_pad=0.05, hspace=0.02)
    figure = Figure(figsize=(9, sum(heights) + 0.2), dpi=110, layout=engine)
    axes = figure.subplots(len(shown), 2, squeeze=False, width_ratios=[1, 2.2], height_ratios=heights)
    for (left, right), each, lines, height in zip(axes, shown, texts, heights, strict=True):
        left.imshow(each.picture, interpolation="nearest" if max(each.picture.shape) < 200 else None)
        left.set(xticks=[], yticks=[], anchor="N")
        left.spines[:].set_color("#d9d9d9")  # an image may be white
        draw_answers(right, each, lines, scales, height)
    return figure


def draw_answers(axes: Axes, shown: Shown, question: Sequence[str], scales: Sequence[str], height: float) -> None:
    """The texts beside an image, on axes whose unit is an inch."""
    axes.set_axis_off()
    axes.set_xlim(0, 6)
    axes.set_ylim(height, 0)

    def line(number: float, x: float, text: str, **options: Any) -> None:
        axes.text(x, LINE * (number + 0.7), text, va="center", fontsize=11, parse_math=False, **options)

    for number, text in enumerate(question):
        line(number, 0, text, fontweight="bold")
    below = len(question) + 0.2
    line(below, 0, f"expected: {plain(' or '.join(shown.references), 60)}", color=GRAY)
    axes.axhline(LINE * (below + 1.3), color="#d9d9d9", linewidth=0.8)
    for number, (scale, answer, right) in enumerate(zip(scales, shown.answers, shown.right, strict=True)):
        color = RIGHT if right else WRONG
        line(below + 1.3 + number, 0.75, scale, ha="right", color=GRAY)
        line(below + 1.3 + number, 1, f"{'✓' if right else '✗'}  {plain(answer, 60) or '(nothing)'}", color=color)


def plain(text: str, most: int) -> str:
    """A text on one line, cut after so many characters, with � for what cannot be drawn."""
    printable = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    return printable if len(printable) <= most else f"{printable[: most - 1]}…"
