"""Tables and pictures shared by `profile` and by the callbacks of a run."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENCODER, WHOLE_PROMPT = "#1f5fa8", "#3f8f83"
"""Colors of the encoder and of the LLM on the whole prompt."""


def table_of(title: str, cells: Sequence[Sequence[str]], caption: str = "", left: int = 1) -> Table:
    """A table for the terminal: a header and rows, to which more can be added; `left` columns are left-justified."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for number, name in enumerate(cells[0]):
        table.add_column(escape(name), justify="left" if number < left else "right")
    for line in cells[1:]:
        table.add_row(*map(escape, line))
    return table


def markdown_table(title: str, cells: Sequence[Sequence[str]], caption: str = "") -> str:
    """The same as text for TensorBoard."""
    return f"**{title}**\n\n{markdown_rows(cells)}\n\n{caption}".rstrip()


def markdown_rows(cells: Sequence[Sequence[str]]) -> str:
    """A header and lines as Markdown, all columns but the first aligned right."""
    rule = [":--", *["--:"] * (len(cells[0]) - 1)]
    plain = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in (plain[0], rule, *plain[1:]))


def print_whole(*things: Any) -> None:
    """Print each thing on a line of its own. If a table is too wide for the terminal, its last columns are left
    out and named below it; files and pipes get all columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max([160, *(width_of(thing) for thing in things if isinstance(thing, Table))]))
    for thing in things:
        text = isinstance(thing, str)
        shown, left_out = fit_into(thing, console.width) if isinstance(thing, Table) else (thing, "")
        console.print(shown, soft_wrap=text, markup=not text, highlight=not text)
        if left_out:
            console.print(f"no room in {console.width} characters for: {left_out}", soft_wrap=True, markup=False)


def width_of(table: Table) -> int:
    """The table's smallest width at which no number is cut or wrapped; text and headers wrap between words."""
    return 1 + sum(_widths(column)[0] + 3 for column in table.columns)


def fit_into(table: Table, width: int) -> tuple[Table, str]:
    """The table without as many last columns as do not fit, and the headers of these columns."""
    shown = copy(table)
    shown.columns = [replace(column, overflow="fold") for column in table.columns]
    while width_of(shown) > width and len(shown.columns) > 1:
        shown.columns.pop()
    spare = width - width_of(shown)
    for column in sorted(shown.columns, key=lambda column: column.justify == "right"):  # text first
        fewest, most = _widths(column)
        column.width = min(most, fewest + spare)
        spare -= column.width - fewest
    return shown, ", ".join(str(column.header) for column in table.columns[len(shown.columns) :])


def _widths(column: Column) -> tuple[int, int]:
    """The column's smallest width, and the width at which no line wraps."""
    cells, head = [Text.from_markup(str(cell)).plain for cell in column.cells], str(column.header)
    whole = cells if column.justify == "right" else [word for cell in cells for word in cell.split()]
    return max(map(len, [*whole, *head.split(), ""])), max(map(len, [*cells, head]))


def spread(times: dict[str, float] | None) -> str:
    """`5.26 (0.14)`: median and interquartile range."""
    return f"{times['median']:.4g} ({times['q3'] - times['q1']:.2g})" if times else ""


def draw_untrained(axes: Axes, points: Sequence[tuple[float, float]], color: str) -> None:
    """Make the markers at these points hollow: of scales that the model was not trained at."""
    if points:
        hollow: dict[str, Any] = {"color": color, "markerfacecolor": "white", "markersize": 7, "zorder": 4}
        axes.plot(*zip(*points, strict=True), "o", label="not trained at this scale", **hollow)


def draw_times(axes: Axes, measured: Sequence[dict[str, Any]], labels: tuple[str | None, str | None]) -> None:
    """A bar for each AnswerTimer result, from the left: encoding and the LLM up to the first token, with the time
    per further token above. The two labels name the two pieces in the legend."""
    for place, times in enumerate(measured):
        encode, first, further = (times[f"{name}_ms"] for name in ("encode", "first_token", "further_token"))
        named = labels if place == 0 else (None, None)
        axes.bar(place, encode["median"], 0.72, color=ENCODER, label=named[0], zorder=2)
        rest = max(0.0, first["median"] - encode["median"])
        axes.bar(place, rest, 0.72, encode["median"], color=WHOLE_PROMPT, label=named[1], zorder=2)
        quartiles = [[first["median"] - first["q1"]], [first["q3"] - first["median"]]]
        axes.errorbar(place, first["median"], quartiles, color="#333333", capsize=3, linewidth=1, zorder=3)
        told = f"+{further['median']:.3g}\na token" if further else ""
        axes.annotate(told, (place, first["q3"]), (0, 4), textcoords="offset points", ha="center", fontsize=8)
