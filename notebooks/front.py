"""Draw the README's pictures: the nested tokens of a photo with the cost of an answer from each set, and what the
demo's questions need.

Run it with `python notebooks/front.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from pictures import ENCODER, TEXT, VISUAL, draw_accuracy, grid_lines, photo_of, write
from PIL import Image

from lit_mm.data.boards import make_board, render
from lit_mm.data.images import ImageOptions, to_pixels, to_rgb
from lit_mm.evaluation.answer_costs import UNITS
from lit_mm.evaluation.front import draw_cost
from lit_mm.model.projector import mean_pool, nest
from lit_mm.profile.experiment import Experiment, read_model
from lit_mm.profile.figures import figures_of

ROOT = Path(__file__).parents[1]
RECIPE = [f"experiments/{name}.yaml" for name in ("base", "m3/tune", "m3/convllava_1536")]
SIDE, PROMPT, ANSWER = 1536, 64, 64


def main() -> None:
    """Write docs/elastic_tokens.png and docs/demo.png."""
    with chdir(ROOT):  # the paths in recipes are relative to it
        experiment = Experiment("ConvLLaVA", read_model(RECIPE, []), [(SIDE, SIDE)], "bfloat16")
    [figures] = figures_of(experiment, PROMPT, ANSWER)["sizes"]
    mean = torch.tensor(experiment.encoder.mean)
    photo = to_rgb(Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    color = tuple((255 * mean).int().tolist())
    pixels = to_pixels(photo, ImageOptions("pad", SIDE).target(photo.height, photo.width), color)[None]
    cells = mean_pool(pixels.permute(0, 2, 3, 1) / 255, *figures["grid"])
    sets = nest(cells, [row["visual_tokens"] for row in figures["scales"]])
    write(drawn(pixels, sets, figures), ROOT / "docs/elastic_tokens.png")
    write(demo(json.loads((ROOT / "notebooks/accuracy_tokens.json").read_text())), ROOT / "docs/demo.png")


def drawn(pixels: torch.Tensor, sets: Sequence[torch.Tensor], figures: dict[str, Any]) -> Figure:
    """Above, the photo and its sets of tokens; below, the FLOPs of an answer from each set."""
    figure = Figure(figsize=(12, 4.7), layout="constrained")
    above, below = figure.subplots(2, 1 + len(sets), sharey="row", gridspec_kw={"height_ratios": [1.05, 1]})
    above[0].imshow(photo_of(pixels), extent=(0, 1, 1, 0))
    above[0].set_title(f"{SIDE} × {SIDE} pixels")
    for axes, tokens in zip(above[1:], sets, strict=True):
        _draw_tokens(axes, tokens)
    for axes, row in zip(below[1:], figures["scales"], strict=True):
        _draw_cost(axes, row, figures["text_only"]["total_flops"])
    for axes in (*above, *below):
        axes.axis("off")
    below[1].margins(y=0.12)
    handles, labels = below[1].get_legend_handles_labels()
    below[0].legend(handles[::-1], labels[::-1], frameon=False, loc="lower right", fontsize=10, borderaxespad=0)
    told = f"What an answer costs:\nConvLLaVA with Vicuna-7B,\n{PROMPT} tokens of prompt,\n{ANSWER} of answer"
    below[0].text(1.02, 0.97, told, transform=below[0].transAxes, ha="right", va="top", linespacing=1.4)
    return figure


def _draw_tokens(axes: Axes, tokens: torch.Tensor) -> None:
    side = round(tokens.shape[1] ** 0.5)
    axes.imshow(tokens.view(side, side, 3).clip(0, 1), extent=(0, 1, 1, 0), interpolation="nearest")
    lines = torch.linspace(0, 1, side + 1).tolist()
    grid_lines(axes, lines, lines)
    axes.set_title(f"{side**2} token{'s' * (side > 1)}", fontweight="bold")


def _draw_cost(axes: Axes, row: dict[str, Any], text: int) -> None:
    """A bar of three parts: the text, the encoder with the projector, and the LLM on visual tokens."""
    image = row["encoder_flops"] + row["projector_flops"]
    parts = {"text": (text, TEXT), "encoder": (image, ENCODER)}
    parts["LLM on visual tokens"] = row["total_flops"] - text - image, VISUAL
    bottom = 0.0
    for name, (flops, color) in parts.items():
        axes.bar(0, flops / 1e12, 0.8, bottom, color=color, label=name)
        bottom += flops / 1e12
    axes.set_xlim(-0.8, 0.8)
    axes.annotate(f"{bottom:.1f} TFLOPs", (0, bottom), (0, 4), textcoords="offset points", ha="center")


def demo(result: dict[str, Any]) -> Figure:
    """A test board as 16 tokens see it, with its questions; the run's accuracy by type of question, and its front."""
    figure = Figure(figsize=(14.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 2.2, 1.8])
    board = make_board("test", 0)
    left.imshow(render(board), extent=(0, 4, 4, 0), interpolation="nearest")
    grid_lines(left, range(5), range(5))
    left.set_title("a board: one digit in each\nof its 16 tokens", fontsize=10)
    asked = [pairs[0] for pairs in board.questions().values()]
    told = "\n".join(f"{question}  {answer}" for question, answer in asked)
    left.text(0, 4.2, told, va="top", linespacing=1.5)
    left.axis("off")
    draw_accuracy(middle, result)
    draw_cost(right, result["chooser"]["costs"]["tokens"], *UNITS["tokens"])
    right.set_title("The scale chosen per question", loc="left", fontsize=12)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__":
    main()
