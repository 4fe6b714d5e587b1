"""The plots of the notebooks, as small PNGs. The notebooks compute the numbers."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from IPython.display import Image as Shown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from torch import Tensor

warnings.filterwarnings("ignore", message="IProgress not found")  # about progress bars, which no cell shows
from lit_mm.callbacks.efficiency_report import draw_accuracy, draw_speed  # noqa: E402 (after the filter)
from lit_mm.callbacks.gallery import plain  # noqa: E402
from lit_mm.data.boards import make_board, render  # noqa: E402
from lit_mm.data.easy_vqa import package_data  # noqa: E402
from lit_mm.evaluation.answer_costs import UNITS  # noqa: E402
from lit_mm.evaluation.front import draw_cost  # noqa: E402
from lit_mm.evaluation.oracle_report import draw_envelope, draw_needed, draw_types  # noqa: E402
from lit_mm.evaluation.results import Judged  # noqa: E402

SCALES = ["#1f5fa8", "#2f8f83", "#8a9a2b", "#d9822b", "#b5403a"]
"""Colors of the scales, finest first; repeated if there are more scales."""
PREFIX, QUESTION, ANSWER = "#4a525c", "#c9ced5", "#8c95a1"
ENCODER, VISUAL, TEXT = "#1f5fa8", "#d9822b", "#d3d7dc"
MARK = "#ffe600"
RIGHT, WRONG = "#2e7d32", "#b5403a"
TITLES = {"tokens": "Visual tokens", "flops": "FLOPs", "ms": "Time"}
STATISTICS = {
    "mean": "mean log-probability of the answer",
    "least": "log-probability of the answer's least likely token",
    "margin": "log-probability of the first token, less the second likeliest's",
    "agreement": "same answer as at the scale before",
}
matplotlib.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}


def show(figure: Figure) -> Shown:
    """Turn a figure into an output of a notebook."""
    kept = BytesIO()
    write(figure, kept)
    return Shown(kept.getvalue())


def write(figure: Figure, to: BytesIO | Path) -> None:
    """Write a figure as a PNG with at most 192 colors, to keep it small."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(192).save(to, "png", optimize=True)


def photo_of(pixels: Tensor, side: int = 330) -> np.ndarray:
    """uint8 pixels [1, 3, H, W] -> [h, w, 3], downscaled to about the size at which it is shown."""
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    image.thumbnail((side, side))
    return np.asarray(image)


def nested_sets(pixels: Tensor, sets: Sequence[Tensor], shapes: Sequence[tuple[int, int]], number: int) -> Shown:
    """The photo and each set of tokens as colors, with a box around the same region in all of them: that of token
    `number`, in reading order, of the second coarsest scale."""
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    places = figure.subplots(-(-(len(sets) + 1) // 3), 3, squeeze=False).ravel()
    height, width = pixels.shape[-2:]
    places[0].imshow(photo_of(pixels), extent=(0, width, height, 0))
    places[0].set_title(f"{height} × {width} pixels", loc="left")
    rows, columns = shapes[-2]
    row, column = divmod(number, columns)
    box = column * width / columns, row * height / rows, width / columns, height / rows
    for axes, tokens, (down, across) in zip(places[1:], sets, shapes, strict=False):
        axes.imshow(tokens.view(down, across, 3).clip(0, 1), extent=(0, width, height, 0), interpolation="nearest")
        grid_lines(axes, np.linspace(0, height, down + 1), np.linspace(0, width, across + 1))
        inside = down * across // (rows * columns)
        family = f", {inside} in the box" if inside else ""
        axes.set_title(f"{_count(down * across)} ({down} × {across}){family}", loc="left")
    for axes in places:
        axes.axis("off")
    for axes in places[: len(sets)]:  # the tokens of the last set are larger than the box
        axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, edgecolor=MARK, linewidth=3, clip_on=False, zorder=3))
    return show(figure)


def cut_sets(photos: Sequence[tuple[Tensor, Sequence[tuple[Tensor, tuple[list[int], list[int]]]]]], cell: int) -> Shown:
    """One row per photo: the photo, and its sets of tokens as boxes between cuts (in cells)."""
    heights = [cuts[0][-1] for _, ((_, cuts), *_) in photos]
    columns = 1 + len(photos[0][1])
    figure = Figure(figsize=(9.6, 9.6 / columns * sum(heights) / max(w for w in _widths(photos)) + 0.9))
    figure.set_layout_engine("constrained")
    places = figure.subplots(len(photos), columns, gridspec_kw={"height_ratios": heights}, squeeze=False)
    for (pixels, sets), line in zip(photos, places, strict=True):
        high, wide = pixels.shape[-2:]
        line[0].imshow(photo_of(pixels), extent=(0, wide / cell, high / cell, 0))
        line[0].set_title(f"{high} × {wide} pixels", loc="left")
        for axes, (tokens, (down, across)) in zip(line[1:], sets, strict=True):
            colors = tokens.view(len(down) - 1, len(across) - 1, 3).clip(0, 1).numpy()
            axes.pcolormesh(across, down, colors)
            grid_lines(axes, down, across)
            axes.set_title(f"{tokens.shape[1]} = {len(down) - 1} × {len(across) - 1}", loc="left")
        for axes in line:
            axes.set(xlim=(0, sets[0][1][1][-1]), ylim=(sets[0][1][0][-1], 0), aspect="equal")
            axes.axis("off")
    return show(figure)


def _widths(photos: Sequence[Any]) -> list[int]:
    return [sets[0][1][1][-1] for _, sets in photos]


def grid_lines(axes: Axes, down: Sequence[float], across: Sequence[float]) -> None:
    """Draw white lines between tokens."""
    width = 3.0 / max(1.0, len(down) ** 0.5)
    axes.hlines(down, across[0], across[-1], color="white", linewidth=width)
    axes.vlines(across, down[0], down[-1], color="white", linewidth=width)


def colors_of(kinds: np.ndarray) -> np.ndarray:
    """[L] kinds -> [L, 3]: -3 prefix, -2 question, -1 answer, otherwise the index of the visual token's scale."""
    table = [matplotlib.colors.to_rgb(color) for color in [PREFIX, QUESTION, ANSWER, *SCALES * 3]]
    return np.array(table)[kinds + 3]


def packed_sequence(kinds: np.ndarray, positions: np.ndarray, scales: Sequence[int]) -> Shown:
    """Above, the packed sequence in memory; below, each branch at the position ids that the LLM gets."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1, len(scales) + 1]})
    starts = branch_starts(kinds, positions)
    _strip(above, kinds, (0, len(kinds)), (0, 1))
    above.vlines(starts, 0, 1, color="white", linewidth=2)
    above.set(yticks=[], xlim=(0, len(kinds)), xlabel="index in memory")
    above.set_title(f"In memory: one packed sequence of {len(kinds):,} positions", loc="left")
    for number, (start, end) in enumerate(zip([0, *starts], [*starts, len(kinds)], strict=True)):
        _strip(below, kinds[start:end], (positions[start], positions[end - 1] + 1), (number + 0.4, number - 0.4))
    below.set_yticks(range(len(scales) + 1), ["prefix", *map(_count, scales)])
    for label, color in zip(below.get_yticklabels(), [PREFIX, *SCALES * 3], strict=False):
        label.set(color=color, fontweight="bold")
    below.set(xlabel="position id", xlim=(0, positions.max() + 1), ylim=(len(scales) + 0.5, -0.5))
    below.set_title("As the LLM reads it: one branch per scale, each after the prefix", loc="left")
    below.axvline(positions[starts[0]], color="#9aa3ad", linewidth=1, linestyle=":", zorder=0)
    below.legend(handles=_kinds(), frameon=False, loc="lower right")
    for axes in (above, below):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return show(figure)


def branch_starts(kinds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Where a branch starts: after the prefix, and wherever position ids jump back."""
    return np.flatnonzero((np.diff(positions) < 1) | (np.diff(kinds == -3) != 0)) + 1


def _strip(axes: Axes, kinds: np.ndarray, across: tuple[float, float], down: tuple[float, float]) -> None:
    axes.imshow(colors_of(kinds)[None], aspect="auto", extent=(*across, *down), interpolation="nearest")


def _count(tokens: int) -> str:
    return f"{tokens:,} token{'s' * (tokens > 1)}"


def _kinds() -> list[Patch]:
    kinds = [("prefix", PREFIX), ("question", QUESTION), ("answer: the targets", ANSWER)]
    kinds.append(("visual tokens, one color per scale", SCALES[0]))
    return [Patch(color=color, label=name) for name, color in kinds]


def attention(sees: np.ndarray, moved: np.ndarray, kinds: np.ndarray) -> Shown:
    """Two matrices [queries, keys] side by side, in the colors of the keys."""
    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="In theory", xlabel="… that position", ylabel="this position sees …")
    right.set(title="In a model", xlabel="… that position changes", ylabel="this output moves if …")
    for axes, pairs in ((left, sees), (right, moved)):
        axes.imshow(np.where(pairs[..., None], colors_of(kinds), 1.0), interpolation="antialiased")
        _strip(axes, kinds, (0, len(kinds)), (-0.015 * len(kinds), -0.045 * len(kinds)))
        axes.set(xlim=(0, len(kinds)), ylim=(len(kinds), -0.05 * len(kinds)), aspect="equal")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    for scale in range(kinds.max() + 1):
        own = np.flatnonzero(kinds == scale)
        place = (own[-1] + 0.07 * len(kinds), own[len(own) // 2] + 0.012 * len(kinds))
        color = SCALES[scale % len(SCALES)]
        left.annotate(_count(len(own)), place, color=color, fontweight="bold", annotation_clip=False)
    return show(figure)


def bars(models: Sequence[dict[str, Any]], columns: int = 3) -> Shown:
    """One panel per model: FLOPs to the first token at every scale, by part, with the encoder's share above each bar.

    Each has a `name` and `answers`: (tokens, FLOPs of encoder and projector, of the LLM on the whole
    prompt, of the LLM on the text alone) at every scale.
    """
    figure, places = _panels(len(models), columns, 2.9)
    for axes, model in zip(places, models, strict=True):
        shares = [f"{image / (image + prompt):.0%}" for _, image, prompt, _ in model["answers"]]
        _stacks(axes, model["answers"], shares, 1e12)
        axes.set_title(model["name"], loc="left", pad=12)
    for axes in places[::columns]:
        axes.set_ylabel("TFLOPs to the first token")
    for axes in places[-columns:]:
        axes.set_xlabel("visual tokens")
    _name_parts(figure, "text of the prompt", "encoder, with its share above", "LLM on visual tokens")
    return show(figure)


def _stacks(axes: Axes, answers: Sequence[tuple[int, int, int, int]], labels: Sequence[str], unit: float) -> None:
    for place, ((_, image, prompt, text), label) in enumerate(zip(answers, labels, strict=True)):
        stacked = np.array([text, image, prompt - text]) / unit
        bottoms = np.cumsum([0, *stacked[:-1]])
        axes.bar([place] * 3, stacked, 0.7, bottoms, color=[TEXT, ENCODER, VISUAL])
        axes.annotate(label, (place, stacked.sum()), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(answers)), [f"{tokens:,}" for tokens, *_ in answers])
    axes.tick_params(length=0)
    axes.margins(y=0.12)


def _name_parts(figure: Figure, *names: str) -> None:
    handles = [Patch(color=color, label=name) for name, color in zip(names, (TEXT, ENCODER, VISUAL), strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def eaten(models: Sequence[dict[str, Any]], columns: int = 3) -> Shown:
    """One panel per model: how many times fewer FLOPs than at its finest scale, with and without the encoder."""
    figure, places = _panels(len(models), columns, 2.7, sharey=True)
    for axes, model in zip(places, models, strict=True):
        tokens, image, prompt, _ = (np.array(column, float) for column in zip(*model["answers"], strict=True))
        alone, whole = prompt[0] / prompt, (image + prompt)[0] / (image + prompt)
        axes.fill_between(tokens, whole, alone, color=ENCODER, alpha=0.16, linewidth=0)
        axes.plot(tokens, alone, "o--", color=VISUAL, label="the LLM's prefill alone")
        axes.plot(tokens, whole, "o-", color=ENCODER, linewidth=2, label="with the encoder")
        for line, color in ((alone, VISUAL), (whole, ENCODER)):
            place = (tokens[-1], line[-1])
            axes.annotate(f" {line[-1]:.1f}×", place, (6, -3), textcoords="offset points", color=color)
        axes.set(xscale="log", yscale="log", title=model["name"])
        axes.set_xticks(tokens, [f"{int(n):,}" for n in tokens])
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1×", "2×", "5×", "10×", "20×", "50×"])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.title.set(horizontalalignment="left", x=0)
        axes.margins(x=0.18)
        axes.grid(axis="y", color="#e5e5e5")
    for axes in places[::columns]:
        axes.set_ylabel("fewer FLOPs")
    for axes in places[-columns:]:
        axes.set_xlabel("visual tokens")
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return show(figure)


def _panels(count: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure = Figure(figsize=(9.6, height * rows + 0.3), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).ravel()[:count])


def against_resolution(lines: dict[str, list[tuple[int, int, float, float]]]) -> Shown:
    """Two panels against the image side in pixels: tokens; FLOPs of the encoder and to the first token.

    Each line has points (side, tokens, FLOPs of encoder and projector, FLOPs to the first token).
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, points), color in zip(lines.items(), SCALES, strict=False):
        sides, tokens, image, whole = (np.array(column, float) for column in zip(*points, strict=True))
        left.plot(sides, tokens, "o-", color=color, linewidth=2, label=name)
        right.plot(sides, whole / 1e12, "o-", color=color, linewidth=2)
        right.plot(sides, image / 1e12, "o:", color=color, markersize=4)
    left.set_title("Visual tokens", loc="left")
    right.set_title("TFLOPs to the first token; dotted: the encoder's", loc="left")
    ticks = _apart(sorted({side for points in lines.values() for side, *_ in points}))
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="side of the image in pixels")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid(color="#ededed")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return show(figure)


def _apart(ticks: Sequence[int]) -> list[int]:
    """The ticks that have room for their labels, largest first."""
    kept: list[int] = []
    for tick in reversed(ticks):
        if not kept or kept[-1] > 1.25 * tick:
            kept.append(tick)
    return kept


def finished_run(result: dict[str, Any]) -> Shown:
    """Accuracy against tokens and, if it was measured, the time to the first token."""
    measured = any(row["measured"] for row in result["scales"])
    figure, (left, *right) = _panels(1 + measured, 1 + measured, 4)
    draw_accuracy(left, result)
    for axes in right:
        draw_speed(axes, result)
    return show(figure)


def image_of(question_id: str) -> Image.Image:
    """The image of one of the demo's questions: of a board, `board_test_7_row#2`, or of easy-VQA, `test_7#2`."""
    board, split, number = re.findall("^(board_)?([a-z]+)_([0-9]+)", question_id)[0]
    if board:
        return render(make_board(split, int(number)))
    return Image.open(package_data() / f"{split}/images/{number}.png")


def of_each_type(questions: Sequence[Judged], numbers: Sequence[int], most: int = 4) -> list[int]:
    """Some of the numbered questions: one of each type, the most frequent first, then a second of each, and so on."""
    by_type: dict[str, list[int]] = {}
    for number in numbers:
        by_type.setdefault(questions[number].type, []).append(number)
    turns = chain.from_iterable(zip_longest(*sorted(by_type.values(), key=len, reverse=True)))
    return [number for number in turns if number is not None][:most]


def asked(
    lines: dict[str, Sequence[tuple[Judged, int]]],
    scales: Sequence[str],
    certain: bool = False,
    image_of: Callable[[str], Image.Image] = image_of,
) -> Shown:
    """Up to four questions below each title: the image, the question, and the answer at every scale, right or wrong.

    Each question comes with the index of the scale that it is about: an arrow marks its answer, and the areas of its
    tokens are drawn over the image. `certain` adds each answer's probability; `image_of` finds the image of a
    question's id.
    """
    figure = Figure(figsize=(9.6, len(lines) * (2.8 + 0.2 * len(scales))))
    figure.set_layout_engine("constrained", w_pad=0.2, h_pad=0.1)
    parts = np.atleast_1d(figure.subfigures(len(lines), 1))
    for part, (title, line) in zip(parts, lines.items(), strict=True):
        part.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        places = part.subplots(1, 4)
        for axes in places:
            axes.axis("off")
        for axes, (question, scale) in zip(places, line, strict=False):
            axes.imshow(image_of(question.id), extent=(0, 1, 1, 0), interpolation="nearest")
            _draw_question(axes, question, scales, scale, certain)
    return show(figure)


def _draw_question(axes: Axes, question: Judged, scales: Sequence[str], marked: int, certain: bool) -> None:
    _draw_areas(axes, question.visual_tokens[marked], 1)
    title = textwrap.fill(question.question, 28)
    axes.set_title(title + "\n" * (1 - title.count("\n")), fontsize=10, loc="left")
    for place, scale in enumerate(scales):
        right = question.scores[place] >= 0.5
        line = f"{'▶' if place == marked else ' '} {scale:>3}: {plain(question.answers[place], 24)}"
        line += " ✓" if right else " ✗"
        line += f" {100 * np.exp(question.logprobs[place]):.0f} %" * certain
        told = {"color": RIGHT if right else WRONG, "family": "DejaVu Sans Mono", "fontsize": 9}
        told["fontweight"] = "bold" if place == marked else "normal"
        axes.annotate(line, (0, 1), (-8, -14 * place - 5), "data", "offset points", va="top", **told)


def _draw_areas(axes: Axes, tokens: int, side: float) -> None:
    """The areas of a square number of tokens, as lines over a square image."""
    cuts = np.linspace(0, side, round(tokens**0.5) + 1)
    for draw in (axes.hlines, axes.vlines):
        draw(cuts, 0, side, color="#555555", linewidth=1, clip_on=False)


def needed(result: dict[str, Any]) -> Shown:
    """What the oracle reaches and chooses, of all questions and by type."""
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    axes = figure.subplot_mosaic(
        [["accuracy", "needed"], ["types", "types"]], width_ratios=[3, 2], height_ratios=[3, 2]
    )
    draw_envelope(axes["accuracy"], result)
    draw_needed(axes["needed"], result)
    draw_types(axes["types"], result)
    _move_legend(axes["accuracy"])
    return show(figure)


def _move_legend(axes: Axes) -> None:
    """Put it below the panel, where it covers no curve."""
    axes.get_legend().remove()
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def digits(shares: dict[str, np.ndarray]) -> Shown:
    """For every scale, a board with the share of digits [4, 4] that are read right, and the areas of its tokens."""
    figure, places = _panels(len(shares), len(shares), 3.0)
    for axes, (scale, share) in zip(places, shares.items(), strict=True):
        axes.imshow(share, "Blues", vmin=0, vmax=1.2, extent=(0, 4, 4, 0))
        for (row, column), value in np.ndenumerate(share):
            color = "white" if value > 0.6 else "black"
            axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=color)
        _draw_areas(axes, int(scale), 4)
        axes.set_title(f"{_count(int(scale))}: {100 * share.mean():.0f} % of the digits", loc="left")
        axes.axis("off")
    return show(figure)


def fronts(result: dict[str, Any]) -> Shown:
    """Accuracy against each cost: fixed scales, the chooser and the oracle; against tokens also the choosers of other
    token budgets."""
    figure, places = _panels(len(result["costs"]), len(result["costs"]), 3.8, sharey=True)
    for axes, (cost, own) in zip(places, result["costs"].items(), strict=True):
        draw_cost(axes, own if cost == "tokens" else own | {"front": []}, *UNITS[cost])
        axes.set_title(TITLES[cost], loc="left")
        axes.set_xlabel(f"mean {UNITS[cost][0]} per question")
    for axes in places[1:]:
        axes.set_ylabel("")
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return show(figure)


def stopped(tables: dict[str, tuple[Sequence[str], np.ndarray]], stops: Sequence[str]) -> Shown:
    """Numbers of questions [rows, stops], with names of the rows: at which scale the chooser stopped."""
    figure, places = _panels(len(tables), len(tables), 0.5 + 0.5 * max(len(names) for names, _ in tables.values()))
    for axes, (title, (names, counts)) in zip(places, tables.items(), strict=True):
        axes.imshow(np.log1p(counts), "Blues", aspect="auto", vmax=1.4 * np.log1p(counts.max()))
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column, row, f"{count:,}", ha="center", va="center")
        axes.set_xticks(range(len(stops)), [f"stopped at {stop}" for stop in stops])
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title, loc="left")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
    return show(figure)


def certainty(panels: dict[str, tuple[np.ndarray, np.ndarray, float]], statistic: str) -> Shown:
    """For each scale but the path's last: the statistic of right and of wrong answers, and the threshold."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    places = figure.subplots(2, len(panels), sharex="col", sharey=True, squeeze=False)
    for column, (scale, (values, right, threshold)) in zip(places.T, panels.items(), strict=True):
        finite = values[np.isfinite(values)]
        edges = np.linspace(np.quantile(finite, 0.01), finite.max(), 50)
        for axes, own, name, color in zip(column, (right, ~right), ("right", "wrong"), (RIGHT, WRONG), strict=True):
            axes.hist(values[own].clip(*edges[[0, -1]]), edges, color=color)
            axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2)
            axes.set(yscale="log", ylabel=f"{name} answers")
        column[0].text(threshold, 1.01, "goes on ◀ ▶ stands", transform=column[0].get_xaxis_transform(), ha="center")
        column[1].set_xlabel(f"{STATISTICS[statistic]}, at {_count(int(scale))}")
    return show(figure)


def examples(images: Sequence[Image.Image], texts: Sequence[str]) -> Shown:
    """Images in a row, each with a text below."""
    figure, places = _panels(len(images), len(images), 3.4)
    for axes, image, text in zip(places, images, texts, strict=True):
        axes.imshow(image, extent=(0, 1, 1, 0), interpolation="nearest")
        axes.annotate(text, (0, 1), (0, -5), "data", "offset points", va="top", linespacing=1.4)
        axes.set_anchor("N")
        axes.axis("off")
    return show(figure)


Curves = dict[str, tuple[np.ndarray, np.ndarray]]
"""The name of something that was logged -> where along the x-axis, and its values."""


def curves(panels: dict[str, tuple[str, dict[str, Curves]]], columns: int = 3) -> Shown:
    """One panel per title, with the name of its x-axis and the curves of one or several runs.

    A name that ends in a scale, `loss@16`, has the scale's color; the runs' lines are solid, dashed and dotted.
    """
    figure, places = _panels(len(panels), columns, 2.6)
    logged = [name for _, runs in panels.values() for own in runs.values() for name in own]
    scales = list(dict.fromkeys(name.split("@")[1] for name in logged if "@" in name))
    colors = dict(zip(scales, SCALES, strict=False))
    styles = dict(
        zip(dict.fromkeys(name for _, runs in panels.values() for name in runs), ("-", "--", ":"), strict=False)
    )
    for axes, (title, (along, runs)) in zip(places, panels.items(), strict=True):
        for run, own in runs.items():
            for name, (where, values) in own.items():
                color = colors.get(name.rpartition("@")[2], PREFIX)
                axes.plot(where, values, styles[run], color=color, linewidth=1.6)
        axes.set_title(title, loc="left")
        axes.set_xlabel(along)
        axes.grid(color="#ededed")
        if "loss" in title:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
    handles = [Patch(color=color, label=_count(int(scale))) for scale, color in colors.items()]
    handles += [Line2D([], [], color=PREFIX, linestyle=styles[run], label=run) for run in styles if len(styles) > 1]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return show(figure)


def smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    """The mean of each value and its neighbors, `width` in all where there are so many."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def film(whole: Sequence[Image.Image], shown: Sequence[Image.Image], seconds: Sequence[float]) -> Shown:
    """Above, many frames of a video in thin slices of a strip; below, those that the model sees, with their times."""
    figure = Figure(figsize=(9.6, 2.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2])
    for part, images in ((above, whole), (below, shown)):
        for axes, image in zip(part.subplots(1, len(images)), images, strict=True):
            axes.imshow(image)
            axes.axis("off")
    for axes, second in zip(below.axes, seconds, strict=True):
        axes.set_title(f"{second:.1f} s")
    above.suptitle("The clip, every second frame", x=0.01, ha="left", fontsize=10)
    return show(figure)


def sets_in_time(sets: dict[str, Tensor], columns: int) -> Shown:
    """One panel per scale of a video, by its name: the sets of frames [sets, T, 3] side by side, each as its tokens."""
    pictures = {name: _side_by_side(tokens.clip(0, 1).numpy()) for name, tokens in sets.items()}
    heights = [picture.shape[0] for picture in [*pictures.values()][::columns]]
    figure = Figure(figsize=(9.6, sum(heights) / 155 + 0.3 * len(heights)), layout="constrained")
    places = figure.subplots(len(heights), columns, height_ratios=heights, squeeze=False).ravel()
    for axes, (name, picture) in zip(places, pictures.items(), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(f"{name}: {_count(sets[name].shape[0] * sets[name].shape[1])}", loc="left")
        axes.axis("off")
        axes.set_anchor("NW")
    return show(figure)


def _side_by_side(sets: np.ndarray, side: int = 96, gap: int = 8, most: int = 4) -> np.ndarray:
    """Square sets of tokens [sets, T, 3] -> one picture on white, of lines of at most four sets."""
    own = round(sets.shape[1] ** 0.5)
    white = np.ones((-(-len(sets) // most) * (side + gap), most * (side + gap), 3))
    for number, tokens in enumerate(sets):
        row, column = (place * (side + gap) for place in divmod(number, most))
        large = tokens.reshape(own, own, 3).repeat(side // own, 0).repeat(side // own, 1)
        white[row : row + side, column : column + side] = large
    return white


def tables(values: dict[str, np.ndarray], times: Sequence[int], scales: Sequence[int]) -> Shown:
    """For every title a table [time scales, scales] in shades of its values."""
    figure, places = _panels(len(values), len(values), 0.55 * len(times) + 0.9)
    for axes, (title, table) in zip(places, values.items(), strict=True):
        axes.imshow(table, "Blues", aspect="auto", vmin=0, vmax=1.6 * table.max() or 1)
        digits = 0 if (table % 1 == 0).all() or table.min() >= 10 else 1
        for (row, column), value in np.ndenumerate(table):
            axes.text(column, row, f"{value:,.{digits}f}", ha="center", va="center")
        axes.set_xticks(range(len(scales)), scales)
        axes.set_yticks(range(len(times)), times)
        axes.set(xlabel="tokens per set", ylabel="sets of frames")
        axes.set_title(title, loc="left")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return show(figure)
