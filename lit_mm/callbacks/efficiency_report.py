"""Quality and cost of every scale as a picture and as a table, for the terminal and for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from lit_mm.costs.units import in_bytes, in_flops
from lit_mm.evaluation.pictures import draw_times, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]
"""As `TokenEfficiency` writes it into its JSON."""

LINES = ["#1f5fa8", "#c8641e", "#3a8f4d", "#8a4fa3", "#a33f4f"]
"""Of the lines, one a time scale."""
SPLITS = {"val": "Validation", "test": "Test"}


def draw(result: Result) -> Figure:
    """Accuracy (%) over visual tokens on a logarithmic axis, the majority answer as a dashed line; below
    it, where it was measured, the time to the first token of every scale."""
    import matplotlib
    from matplotlib.figure import Figure

    measured = any(row["measured"] for row in result["scales"])
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 7 if measured else 4), dpi=150, layout="constrained")
        axes = figure.subplots(2 if measured else 1, squeeze=False, height_ratios=[4, 3] if measured else None)[:, 0]
    draw_accuracy(axes[0], result)
    if measured:
        draw_speed(axes[1], result)
    return figure


def draw_accuracy(axes: Axes, result: Result) -> None:
    """The curve, or one for every time scale, with a ring around the scale that suffices."""
    lines, tokens = _lines(result), sorted({row["visual_tokens"] for row in result["scales"]})
    for (frames, line), color in zip(lines.items(), LINES * len(tokens), strict=False):
        label = None if frames is None else f"{frames} sets of frames" if frames > 1 else "1 set of frames"
        axes.plot(*zip(*line, strict=True), "o-", color=color, linewidth=2, markersize=7, label=label, zorder=3)
        for x, y in line:
            axes.annotate(f"{y:.1f}", (x, y), (0, -16), textcoords="offset points", ha="center", color=color)
    [enough] = [row for row in result["scales"] if row["scale"] == result["smallest_within_a_point"]]
    ring = enough["visual_tokens"], 100 * enough["accuracy"]
    label = "fewest tokens within a point of the best"
    axes.plot(*ring, "o", markersize=15, markerfacecolor="none", markeredgecolor="#333333", label=label, zorder=4)
    axes.legend(frameon=False, loc="lower right", fontsize=10)
    majority = 100 * result["majority_answer"]
    axes.axhline(majority, color="#888888", linestyle="--", linewidth=1.2)
    named = f"majority answer {majority:.1f}"
    axes.annotate(named, (min(tokens), majority), (0, 5), textcoords="offset points", color="#666666")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(token) for token in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_xlabel("visual tokens per image" if None in lines else "visual tokens per video, at most")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"One model, any token budget ({result['questions']:,} questions)", loc="left", fontsize=12)


def draw_speed(axes: Axes, result: Result) -> None:
    """The time to the first token of every scale, fewest tokens first, as in the panel above."""
    rows = [row for row in reversed(result["scales"]) if row["measured"]]
    draw_times(axes, [row["measured"] for row in rows], ("encoding", "LLM on the prompt"))
    axes.set_xticks(range(len(rows)), [row["scale"] for row in rows])
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.42)
    axes.grid(axis="y", color="#e5e5e5", zorder=0)
    axes.set_xlabel("scale")
    axes.set_ylabel("ms to the first token")
    axes.legend(frameon=False, loc="upper right", fontsize=9, ncols=2)
    axes.set_title(f"measured on {result['run']['device']}", loc="left", fontsize=11)


def _lines(result: Result) -> dict[int | None, list[tuple[int, float]]]:
    """(tokens, accuracy in %) of each time scale; of None without any."""
    lines: dict[int | None, list[tuple[int, float]]] = {}
    for row in result["scales"]:
        lines.setdefault(row.get("frames"), []).append((row["visual_tokens"], 100 * row["accuracy"]))
    return lines


def table(result: Result) -> Table:
    """The figures for the terminal."""
    names, *lines = _cells(result)
    rows = Table(title=_title(result), title_justify="left", caption=_caption(result), caption_justify="left")
    for name in names:
        rows.add_column(name, justify="right")
    for line in lines:
        rows.add_row(*line)
    rows.add_row("majority answer", f"{100 * result['majority_answer']:.2f}", style="dim")
    return rows


def markdown(result: Result) -> str:
    """The same for TensorBoard."""
    names, *lines = _cells(result)
    lines.append(["majority answer", f"{100 * result['majority_answer']:.2f}", *[""] * (len(names) - 2)])
    rule = [":--", *["--:"] * (len(names) - 1)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in (names, rule, *lines))
    return f"**{_title(result)}**\n\n{body}\n\n{_caption(result)}"


def _title(result: Result) -> str:
    return f"{SPLITS[result['split']]} at step {result['step']:,}: accuracy on {result['questions']:,} questions"


def _caption(result: Result) -> str:
    """What is between the lines, in sentences."""
    area = "" if result["area"] is None else f"Area under accuracy over log2(tokens): {100 * result['area']:.2f} %. "
    told = f"{area}Fewest tokens within a point of the best: {result['smallest_within_a_point']}."
    if "prefill_flops" in result["scales"][0]:
        told += " FLOPs until the first token of an answer, encoder included."
    if timed := result["timed"]:
        size = f"{timed['images']} × {timed['height']}×{timed['width']} pixels"
        told += f" Times of one answer on {result['run']['device']}, {size}: median (interquartile range)."
    return told


def _cells(result: Result) -> list[list[str]]:
    """Head and a line for every scale; columns that no scale has a figure for are left out."""
    heads = ["visual tokens", "accuracy %", "loss", "prompt tokens", "FLOPs", "accuracy per TFLOP", "KV cache"]
    heads += ["encode ms", "first token ms", "next token ms", "memory"]
    columns = zip(heads, *map(_line, result["scales"]), strict=True)
    kept = [column for column in columns if any(column[1:])]
    return [list(line) for line in zip(*kept, strict=True)]


def _line(row: dict[str, Any]) -> list[str]:
    tokens, frames, seen = row["visual_tokens"], row.get("frames"), row["measured"] or {}
    name = f"{frames} x {tokens // frames} = {tokens}" if frames else str(tokens)
    flops = in_flops(row["encode_flops"] + row["prefill_flops"]) if "prefill_flops" in row else ""
    return [
        name,
        f"{100 * row['accuracy']:.2f}",
        f"{row['loss']:.3f}" if "loss" in row else "",
        f"{row['prompt_tokens']:.1f}" if "prompt_tokens" in row else "",
        flops,
        f"{row['accuracy_per_tflop']:,.{2 if row['accuracy_per_tflop'] < 100 else 0}f}" if flops else "",
        in_bytes(row["kv_bytes"]) if "kv_bytes" in row else "",
        *(spread(seen[f"{part}_ms"]) if seen else "" for part in ("encode", "first_token", "further_token")),
        in_bytes(seen["peak_bytes"]) if seen.get("peak_bytes") else "",
    ]
