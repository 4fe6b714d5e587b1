"""What tables and pictures of costs have in common, of `profile` and of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENCODER, WHOLE_PROMPT = "#1f5fa8", "#3f8f83"
"""Colors of the encoder, and of the LLM on text and image together."""


def print_whole(*things: Any) -> None:
    """In the terminal, a thing a line; a file or a pipe has room for whole tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for thing in things:
        text = isinstance(thing, str)
        console.print(thing, soft_wrap=text, markup=not text, highlight=not text)


def spread(times: dict[str, float] | None) -> str:
    """`5.26 (0.14)`: the median and the interquartile range."""
    return f"{times['median']:.4g} ({times['q3'] - times['q1']:.2g})" if times else ""


def draw_times(axes: Axes, measured: Sequence[dict[str, Any]], labels: tuple[str | None, str | None]) -> None:
    """A bar for each of AnswerTimer's results, from the left: encoding, and the LLM up to the first token;
    above it what each further token takes. The labels are those of the two pieces."""
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
