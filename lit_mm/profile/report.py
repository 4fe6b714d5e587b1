"""Shows experiments' figures as tables in the terminal and as one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from lit_mm.costs.units import in_bytes, in_flops, unit_of
from lit_mm.evaluation.pictures import ENCODER, draw_times, spread, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = dict[str, Any]
"""One experiment's figures, from `figures_of`."""

COLORS = {
    "text of the prompt": "#d3d7dc",
    "text of the answer": "#adb4be",
    "encoder": ENCODER,
    "projector": "#6fb1e0",
    "LLM on visual tokens": "#d9822b",
}
"""Colors of a bar's pieces, from the bottom up."""


def tables(experiments: Sequence[Figures]) -> list[Table]:
    """Tables of models, answers at every scale, training and, if measured, timings."""
    found = [models_table(experiments), answers_table(experiments), training_table(experiments)]
    return found + ([timings_table(experiments)] if _measured(experiments) else [])


def models_table(experiments: Sequence[Figures]) -> Table:
    """Parameters by part, and bytes of the weights."""
    names = ["experiment", "encoder", "LLM", "encoder M", "projector M", "LLM M", "weights", "dtype"]
    rows = table_of("Models (parameters in millions)", [names], left=3)
    for own in experiments:
        millions = [f"{own['parameters'][part] / 1e6:,.2f}" for part in ("encoder", "projector", "llm")]
        rows.add_row(_name(own), own["encoder"], own["llm"], *millions, in_bytes(own["weight_bytes"]), own["dtype"])
    return rows


def answers_table(experiments: Sequence[Figures]) -> Table:
    """A row for every scale at every size, and one for the prompt without an image."""
    first = experiments[0]
    asked = f"a prompt of {first['prompt_tokens']} tokens and an answer of {first['new_tokens']}"
    names = ["experiment", "image", "tokens", "encoder", "projector", "LLM prefill", "decode/token"]
    rows = table_of(f"FLOPs of {asked}", [[*names, "answer", "visual share", "KV cache"]], left=2)
    for own, at in _sizes(experiments):
        for row in at["scales"]:
            share = f"{100 * row['visual_share']:.1f} %"
            rows.add_row(_name(own), image(at), _tokens(row), *_flops_of(row), share, in_bytes(row["kv_bytes"]))
        none = at["text_only"]
        rows.add_row(_name(own), "none", "0", *_flops_of(none), "", in_bytes(none["kv_bytes"]), style="dim")
        rows.add_section()
    return rows


def training_table(experiments: Sequence[Figures]) -> Table:
    """One sample's training FLOPs at all scales in a packed sequence, compared with the finest scale alone."""
    names = ["experiment", "image", "tokens", "encoder", "projector", "LLM", "head", "total", "recompute", "÷ finest"]
    rows = table_of("Training on one such sample: FLOPs of all scales in a packed sequence", [names], left=2)
    for own, at in _sizes(experiments):
        cost = at["training"]
        parts = [in_flops(cost[f"{part}_flops"]) for part in ("encoder", "projector", "llm", "head", "total")]
        ratio = f"{cost['total_flops'] / cost['finest_alone_flops']:.2f}" if cost["finest_alone_flops"] else ""
        again = in_flops(cost["recompute_flops"])
        rows.add_row(_name(own), image(at), f"{cost['packed_tokens']:,}", *parts, again, ratio)
    return rows


def timings_table(experiments: Sequence[Figures]) -> Table:
    """Measured times in milliseconds."""
    device = experiments[0]["sizes"][0]["scales"][0]["measured"]["device"]
    names = ["experiment", "image", "tokens", "encode ms", "first token ms", "further token ms", "peak memory"]
    rows = table_of(f"Measured on {device}, random weights (median, interquartile range)", [names], left=2)
    for own, at in _sizes(experiments):
        for row in at["scales"]:
            seen = row["measured"]
            times = [spread(seen[f"{name}_ms"]) for name in ("encode", "first_token", "further_token")]
            memory = in_bytes(seen["peak_bytes"]) if seen["peak_bytes"] else ""
            rows.add_row(_name(own), image(at), _tokens(row), *times, memory)
        rows.add_section()
    return rows


def draw(experiments: Sequence[Figures]) -> Figure:
    """A panel for every experiment and size, with an answer's FLOPs by part at every scale; if measured, the time
    to the first token below."""
    import matplotlib
    from matplotlib.figure import Figure

    panels, measured = list(_sizes(experiments)), _measured(experiments)
    bars = [len(at["scales"]) for _, at in panels]
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(max(7.8, 1.4 + 0.72 * sum(bars)), 7.6 if measured else 4.6), dpi=150)
        figure.set_layout_engine("constrained")
        options: dict[str, Any] = {"squeeze": False, "sharey": "row", "gridspec_kw": {"width_ratios": bars}}
        axes = figure.subplots(2 if measured else 1, len(panels), **options)
    highest = max(row["total_flops"] for _, at in panels for row in at["scales"])
    factor, unit = unit_of(highest)
    titles = iter(without_common_start([own["name"] for own in experiments]))
    for number, (own, at) in enumerate(panels):
        _draw_flops(axes[0][number], at, factor, named=number == 0)
        title = next(titles).replace(" + ", "\n+ ") if at is own["sizes"][0] else ""
        axes[0][number].set_title(title, fontweight="bold", loc="left", pad=22)
        axes[0][number].annotate(
            f"{image(at)} pixels", (0, 1), (0, 8), "axes fraction", "offset points", color="#555555"
        )
        if measured:
            label = None if number else "LLM on the whole prompt"  # the legend names each color once
            draw_times(axes[1][number], [row["measured"] for row in at["scales"]], (None, label))
            _finish(axes[1][number], at)
            axes[1][number].margins(y=0.18)
        axes[-1][number].set_xlabel("visual tokens" if at["images"] == 1 else "sets of frames x visual tokens")
    axes[0][0].set_ylim(0, 1.12 * highest / factor)
    axes[0][0].set_ylabel(f"{unit}FLOPs per answer")
    if measured:
        axes[1][0].set_ylabel("time to the first token (ms)")
    _add_legend(figure, experiments[0])
    return figure


def without_common_start(names: Sequence[str]) -> list[str]:
    """`m3/convllava_768`, … for `base + m3/tune + m3/convllava_768`, …: drops what all names have in common."""
    pieces, same = [name.split(" + ") for name in names], 0
    while len(set(names)) > 1 and same < min(map(len, pieces)) - 1 and len({own[same] for own in pieces}) == 1:
        same += 1
    return [" + ".join(own[same:]) for own in pieces]


def _draw_flops(axes: Axes, at: Figures, factor: float, named: bool) -> None:
    for place, row in enumerate(at["scales"]):
        bottom = 0.0
        for part, flops in _stacked(row, at["text_only"]).items():
            label = part if named and place == 0 else None
            axes.bar(place, flops / factor, 0.74, bottom, color=COLORS[part], label=label, zorder=2)
            bottom += flops / factor
        share = f"{100 * row['visual_share']:.0f} %"
        axes.annotate(share, (place, bottom), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    _finish(axes, at)


def _stacked(row: Figures, none: Figures) -> dict[str, int]:
    """A bar's pieces. What visual tokens add to prefill and decoding counts as `LLM on visual tokens`."""
    text = row["prefill_flops"] + row["decode_flops"] - none["prefill_flops"] - none["decode_flops"]
    flops = [none["prefill_flops"], none["decode_flops"], row["encoder_flops"], row["projector_flops"], text]
    return dict(zip(COLORS, flops, strict=True))


def _finish(axes: Axes, at: Figures) -> None:
    axes.set_xticks(range(len(at["scales"])), [row["scale"] for row in at["scales"]])
    axes.grid(axis="y", color="#e5e5e5", zorder=0)
    axes.tick_params(axis="both", length=0)
    axes.spines["left"].set_visible(False)


def _add_legend(figure: Figure, first: Figures) -> None:
    title = f"What an answer costs: a prompt of {first['prompt_tokens']} tokens, an answer of {first['new_tokens']}"
    figure.suptitle(f"{title}; in % what the image adds", x=0.008, ha="left", fontsize=12)
    figure.legend(
        loc="outside lower center",
        ncols=6 if figure.get_figwidth() > 9 else 3,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.4,
    )


def _name(own: Figures) -> str:
    """The name as a table cell, with brackets escaped for rich."""
    return escape(own["name"])


def image(at: Figures) -> str:
    """`1536×1536`, height first."""
    several = f"{at['images']} × " if at["images"] > 1 else ""
    return f"{several}{at['height']}×{at['width']}"


def _tokens(row: Figures) -> str:
    """`576`, or `8x16 = 128` with time scales."""
    tokens = f"{row['visual_tokens']:,}"
    return tokens if row["scale"] == str(row["visual_tokens"]) else f"{row['scale']} = {tokens}"


def _flops_of(row: Figures) -> list[str]:
    names = ["encoder_flops", "projector_flops", "prefill_flops", "decode_flops_per_token", "total_flops"]
    return [in_flops(row[name]) for name in names]


def _measured(experiments: Sequence[Figures]) -> bool:
    return any("measured" in row for _, at in _sizes(experiments) for row in at["scales"])


def _sizes(experiments: Sequence[Figures]) -> Iterator[tuple[Figures, Figures]]:
    return ((own, at) for own in experiments for at in own["sizes"])
