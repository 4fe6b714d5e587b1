"""The figures of a validation or test: accuracy and cost of every scale, as JSON, picture and tables."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from lit_mm.callbacks.meter import counts_in, objects_of_ranks
from lit_mm.costs.devices import arithmetic_of, device_name, versions
from lit_mm.costs.timing import WARM_UP, AnswerTimer, router_times
from lit_mm.costs.units import in_bytes, in_flops
from lit_mm.evaluation.benchmarks import Benchmark
from lit_mm.evaluation.efficiency import (
    ONE_POINT,
    Asked,
    accuracy_per_tflop,
    scale_costs,
    summary,
    untrained,
)
from lit_mm.evaluation.metrics import METRICS, majority_share
from lit_mm.evaluation.oracle_report import results_of
from lit_mm.evaluation.pictures import draw_times, draw_untrained, markdown_table, spread, table_of
from lit_mm.evaluation.results import Judged, by_type, headline_of, intervals, scores_of
from lit_mm.inference.generation import Generated
from lit_mm.model.batch import Batch, Question
from lit_mm.training.parts import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]
"""The figures, as `TokenEfficiency` writes them to JSON."""

MOST_NEW_TOKENS = 8
ALL_SETS = "All test sets: accuracy %"
GRAY = "#999999"
LINES = ["#1f5fa8", "#c8641e", "#3a8f4d", "#8a4fa3", "#a33f4f"]
"""Line colors, one per time scale."""
TYPES = ["#c8641e", "#3a8f4d", "#8a4fa3", "#a33f4f", "#7a6a1f", "#2b8a9b"]
"""Line colors of question types. The picture and the lines below the table leave types out if there are more."""


class Evaluation:
    """Collects one validation's or test's questions, then works out its figures.

    Args:
        lit: The LitMatryoshka that is evaluated.
        name: What it is evaluated on: val, test, or one of several test sets, such as test/docvqa.
        repetitions: Answers timed at every scale, after a warm-up; 0: none.
    """

    def __init__(self, lit: Any, name: str, repetitions: int) -> None:
        self.lit, self.name, self.repetitions = lit, name, repetitions
        self.benchmark: Benchmark | None = lit.benchmark(name)
        self.metric = METRICS[self.benchmark.metric if self.benchmark else "exact"]()
        self.questions: list[Judged] = []
        self.asked = Asked(lit.all_scales)

    def add(self, batch: Batch, answers: Sequence[Sequence[Generated]]) -> None:
        """Judge and count a batch's questions.

        Args:
            batch: The questions.
            answers: To every question, at each of the asked scales.
        """
        self.questions += [self._judged(*pair) for pair in zip(batch.questions, answers, strict=True)]
        self.asked.add(counts_in(batch), len(batch.questions))

    def _judged(self, question: Question, answers: Sequence[Generated]) -> Judged:
        references = list(question.references) or [""]
        return Judged(
            str(question.record),
            question.type,
            question.text,
            references,
            [answer.text for answer in answers],
            [self.metric.score(answer.text, references) for answer in answers],
            [sum(answer.logprobs) for answer in answers],
            [answer.visual_tokens for answer in answers],
            [len(answer.logprobs) for answer in answers],
            [-inf if answer.finish == "error" else min(answer.logprobs) for answer in answers],
            [-inf if answer.finish == "error" else answer.margin for answer in answers],
            [own.router[scale] for own in answers if own.router for scale in self.lit.asked_scales],
        )

    def gather(self, trainer: Trainer) -> None:
        """Combine the questions of all ranks."""
        shares = objects_of_ranks(trainer, (self.questions, self.asked.numbers(self.lit.costs)))
        self.questions = [question for questions, _ in shares for question in questions]
        self.numbers = {name: sum(numbers[name] for _, numbers in shares) for name in shares[0][1]}

    def result(self, trainer: Trainer, peak: float | None) -> Result:
        """All figures, as in `accuracy_tokens.json`; accuracies in 0..1, finest scale first.

        Args:
            trainer: The trainer, at the end of the validation or test.
            peak: The device's peak FLOP/s, if known.
        """
        cached = None  # bytes per token in the KV cache
        if self.lit.costs is not None:  # the weights' dtype, even under autocast, or what FSDP casts them to
            half = self.lit.vlm.sharded and arithmetic_of(str(trainer.precision)) == "half"
            cached = self.lit.costs.language.cached * (2 if half else self.lit.vlm.llm.dtype.itemsize)
        asked = {str(scale) for scale in self.lit.asked_scales}
        rows = [row for row in scale_costs(self.numbers, self.lit.all_scales, cached) if row["scale"] in asked]
        if self.lit.vlm.router is not None and cached is not None:
            rows[-1]["router_flops"] = self.lit.vlm.router.flops
        scores, trained = scores_of(self.questions), {str(scale) for scale in self.lit.trained_scales}
        for row, own, interval in zip(rows, scores.T, intervals(scores), strict=True):
            row |= {"trained": row["scale"] in trained, "accuracy": float(own.mean()), "interval": interval.tolist()}
            if figures := self._figures(trainer, row["scale"]):
                row["figures"] = figures
            if (loss := trainer.callback_metrics.get(f"{self.name}/loss@{row['scale']}")) is not None:
                row["loss"] = loss.item()
            row["accuracy_per_tflop"] = accuracy_per_tflop(row)
        if strata := self.metric.strata(scores, [question.references for question in self.questions]):
            for row, value, interval in zip(rows, *headline_of(strata), strict=True):
                row["headline"] = {"name": self.metric.headline, "value": float(value), "interval": interval.tolist()}
        timed = self._time(trainer, rows)
        return {
            "split": self.name,
            "metric": type(self.metric).__name__,
            "step": self.lit.place.steps,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "questions": len(self.questions),
            "majority_answer": majority_share([question.references[0] for question in self.questions]),
            **summary(rows),
            "scales": rows,
            "types": by_type(self.questions),
            "oracle": self._oracle(rows),
            "timed": timed,
            "run": self._described(trainer, peak),
        }

    def _oracle(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What the oracle reaches; None with one scale, or where no question shows an image."""
        tokens = np.array([question.visual_tokens for question in self.questions])
        if len(rows) == 1 or not tokens.any():
            return None
        scales, trained = ([row[name] for row in rows] for name in ("scale", "trained"))
        types = [question.type for question in self.questions]
        return results_of(scores_of(self.questions), tokens, scales, types, trained=trained)

    def _figures(self, trainer: Trainer, scale: str) -> dict[str, float]:
        """The metric's further figures at a scale, and its headline figure where this is not the mean score."""
        logged = trainer.callback_metrics
        start, end = f"{self.name}/", f"@{scale}"
        names = [name for name in logged if name.startswith(start) and name.endswith(end)]
        found = {name.removeprefix(start).removesuffix(end): logged[name].item() for name in names}
        return {name: value for name, value in found.items() if name not in ("accuracy", "loss")}

    def _time(self, trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, int] | None:
        """Time every scale with a question's average number of images, in the most frequent size. Returns what
        was timed, or None if nothing could be."""
        for row in rows:
            row["measured"] = None
        if reason := self._not_timed():
            rank_zero_info(f"answers are not timed: {reason}")
            return None
        [((height, width), _)] = self.asked.images.most_common(1)
        images = ceil(self.asked.images.total() / self.asked.questions)
        pixels = torch.zeros(images, 3, height, width, dtype=torch.uint8)
        new_tokens = max(2, min(self.lit.max_new_tokens, MOST_NEW_TOKENS))
        measured = []
        try:
            for row in rows:
                visual = round(row["mean_visual_tokens"])
                timer = AnswerTimer(self.lit.vlm, round(row["prompt_tokens"]) - visual, new_tokens, self.repetitions)
                with trainer.precision_plugin.val_step_context():
                    measured.append(timer(pixels, visual))
            if self.lit.vlm.router is not None:
                measured[-1]["router_ms"] = router_times(self.lit.vlm.router, self.repetitions)
        except torch.OutOfMemoryError:  # no reason to lose a run
            rank_zero_info("answers are not timed: out of memory")
            return None
        for row, times in zip(rows, measured, strict=True):
            row["measured"] = times
        found = {"images": images, "height": height, "width": width, "new_tokens": new_tokens, "batch_size": 1}
        return found | {"repetitions": self.repetitions, "warm_up": WARM_UP}

    def _not_timed(self) -> str:
        """The reason why answers cannot be timed, or an empty string."""
        if not self.repetitions:
            return "token_efficiency.repetitions is 0"
        if self.lit.vlm.sharded:
            return "the model is sharded over ranks"
        if self.lit.costs is None:
            return f"{type(self.lit.vlm.llm).__name__} may not keep a plain KV cache"
        return "" if self.asked.images else "no question shows an image"

    def _described(self, trainer: Trainer, peak: float | None) -> dict[str, Any]:
        """The run's hardware and settings."""
        data: Any = getattr(trainer, "datamodule", None)
        budget = getattr(data, "budget", None)
        return {
            "device": device_name(self.lit.device),
            "devices": trainer.world_size,
            "nodes": trainer.num_nodes,
            "peak_tflops": None if peak is None else peak / 1e12,
            "precision": str(trainer.precision),
            "dtype": {name: str(next(getattr(self.lit.vlm, name).parameters()).dtype)[6:] for name in PARTS},
            "packing": self.lit.packing,
            "strategy": type(trainer.strategy).__name__,
            "batch_size": {
                "training_records": getattr(budget, "records", None),
                "training_tokens": getattr(budget, "tokens", None),
                "training_pixels": getattr(budget, "pixels", None),
                "evaluation_records": getattr(data, "eval_batch_size", None),
            },
            "versions": versions(),
        }


def draw(result: Result) -> Figure:
    """Accuracy (%) over visual tokens on a log axis, with the majority answer as a dashed line. If answers were
    timed, a second panel shows the time to the first token of every scale."""
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
    """One curve, or one per time scale, with confidence intervals, and a ring around the fewest tokens within a
    point of the best. For images, a thin curve for each type of question, if there are a few."""
    lines, tokens = _lines(result), sorted({row["visual_tokens"] for row in result["scales"]})
    types = _types(result) if None in lines else {}
    for (frames, line), color in zip(lines.items(), LINES * len(tokens), strict=False):
        label = f"{frames} sets of frames" if frames and frames > 1 else "1 set of frames" if frames else None
        label = "all questions" if types else label
        axes.plot(*zip(*line, strict=True), "o-", color=color, linewidth=2, markersize=7, label=label, zorder=3)
        for point in line:
            axes.annotate(f"{point[1]:.1f}", point, (0, -16), textcoords="offset points", ha="center", color=color)
    rows = [row for row in result["scales"] if untrained(row)]
    draw_untrained(axes, [(row["visual_tokens"], 100 * row["accuracy"]) for row in rows], LINES[0])
    bars = [(row["visual_tokens"], *row["interval"]) for row in result["scales"]]
    x, low, high = ([bar[place] for bar in bars] for place in range(3))
    axes.vlines(x, [100 * end for end in low], [100 * end for end in high], color=GRAY, zorder=2)
    [enough] = [row for row in result["scales"] if row["scale"] == result["smallest_within_a_point"]]
    ring = enough["visual_tokens"], 100 * enough["accuracy"]
    label = "fewest tokens within\na point of the best" if types else "fewest tokens within a point of the best"
    axes.plot(*ring, "o", markersize=15, markerfacecolor="none", markeredgecolor="#333333", label=label, zorder=4)
    for (name, own), color in zip(types.items(), TYPES, strict=False):
        accuracies = [100 * accuracy for accuracy in own["accuracy"]]
        axes.plot([row["visual_tokens"] for row in result["scales"]], accuracies, ".--", color=color, label=name)
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 9}
    axes.legend(frameon=False, **(beside if types else {"loc": "lower right"}))
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
    """Time to the first token of every scale, fewest tokens first as in the panel above."""
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
    """Time scale -> its (tokens, accuracy in %) points; the key is None for images."""
    lines: dict[int | None, list[tuple[int, float]]] = {}
    for row in result["scales"]:
        lines.setdefault(row.get("frames"), []).append((row["visual_tokens"], 100 * row["accuracy"]))
    return lines


def _types(result: Result) -> dict[str, dict[str, Any]]:
    """The figures of each type of question, cheapest to answer first; none if there is one type, or too many."""
    found = result["types"] if 1 < len(result["types"]) <= len(TYPES) else {}
    return dict(sorted(found.items(), key=lambda pair: (enough(result, pair[1])["visual_tokens"], pair[0])))


def enough(result: Result, own: dict[str, Any]) -> dict[str, Any]:
    """The row, with the type's own accuracy, of the fewest tokens within a point of the type's best."""
    rows = [row | {"accuracy": it} for row, it in zip(result["scales"], own["accuracy"], strict=True)]
    return next(row for row in rows if row["scale"] == summary(rows)["smallest_within_a_point"])


def in_short(result: Result) -> list[str]:
    """Two lines to remember: the accuracy at every scale, and how many tokens each type of question needs."""
    if not (types := _types(result)):
        return []
    all_scales = [f"{_tokens(row)}: {100 * row['accuracy']:.1f} %" for row in result["scales"]]
    return [" · ".join(all_scales), "; ".join(_need(result, name, own) for name, own in types.items())]


def _need(result: Result, name: str, own: dict[str, Any]) -> str:
    """`row needs 16 tokens (99.1 %; 0.2 % with 1 token)`, or `no scale answers row (at most 0.4 %)`."""
    if (best := max(own["accuracy"])) <= ONE_POINT:
        return f"no scale answers {name} (at most {100 * best:.1f} %)"
    needed, fewest, accuracy = enough(result, own), result["scales"][-1], own["accuracy"][-1]
    less = f"; {100 * accuracy:.1f} % with {_tokens(fewest)}" if needed["scale"] != fewest["scale"] else ""
    return f"{name} needs {_tokens(needed)} ({100 * needed['accuracy']:.1f} %{less})"


def _tokens(row: dict[str, Any]) -> str:
    return f"{row['visual_tokens']} token{'s' * (row['visual_tokens'] != 1)}{untrained(row)}"


def table(result: Result) -> Table:
    """The figures as a table for the terminal."""
    rows = table_of(_title(result), _cells(result), _caption(result), left=0)
    rows.add_row("majority answer", f"{100 * result['majority_answer']:.2f}", style="dim")
    return rows


def markdown(result: Result) -> str:
    """The same table for TensorBoard."""
    cells = _cells(result)
    cells.append(["majority answer", f"{100 * result['majority_answer']:.2f}", *[""] * (len(cells[0]) - 2)])
    return markdown_table(_title(result), cells, _caption(result))


def sets_table(results: Sequence[Result]) -> Table:
    """A row for each scale and a column for each test set: accuracies, then mean visual tokens and FLOPs."""
    return table_of(ALL_SETS, sets_cells(results), left=0)


def sets_markdown(results: Sequence[Result]) -> str:
    """The same table for TensorBoard."""
    return markdown_table(ALL_SETS, sets_cells(results))


def sets_cells(results: Sequence[Result]) -> list[list[str]]:
    """The same as a header and rows."""
    names, lines = [_set_head(result) for result in results], []
    for rows in zip(*(result["scales"] for result in results), strict=True):
        tokens = sum(row["mean_visual_tokens"] for row in rows) / len(rows)
        flops = [row["encode_flops"] + row["prefill_flops"] for row in rows if "prefill_flops" in row]
        costs = [f"{tokens:.1f}", in_flops(sum(flops) / len(flops)) if flops else ""]
        lines.append(
            [
                rows[0]["scale"] + untrained(rows[0]),
                *(_headline(row) or _percent(row["accuracy"], row["interval"]) for row in rows),
                *costs,
            ]
        )
    return [["scale", *names, "mean visual tokens", "mean FLOPs"], *lines]


def _set_head(result: Result) -> str:
    """`docvqa`, or `mme (perception points)` for a headline figure that is not the accuracy."""
    name = result["scales"][0].get("headline", {}).get("name")
    return f"{set_name(result['split'])} ({name})" if name else set_name(result["split"])


def _headline(row: dict[str, Any]) -> str:
    """The headline figure where this is not the accuracy, otherwise nothing."""
    if not (told := row.get("headline")):
        return ""
    (low, high), value = told["interval"], told["value"]
    return _percent(value, (low, high)) if told["name"].endswith("%") else f"{value:.1f} ± {(high - low) / 2:.1f}"


def _percent(share: float, interval: Sequence[float]) -> str:
    """`97.70 ± 0.55`, in percent; after ± half the interval's width."""
    return f"{100 * share:.2f} ± {50 * (interval[1] - interval[0]):.2f}"


def _title(result: Result) -> str:
    return f"{set_name(result['split'])} at step {result['step']:,}: accuracy on {result['questions']:,} questions"


def set_name(name: str) -> str:
    """`Validation`, `Test`, or the name of one of several test sets."""
    return {"val": "Validation", "test": "Test"}.get(name, name.removeprefix("test/"))


def _caption(result: Result) -> str:
    """The figures that belong to no single scale, and how times were measured."""
    area = "" if result["area"] is None else f"Area under accuracy over log2(tokens): {100 * result['area']:.2f} %. "
    told = f"{area}Fewest tokens within a point of the best: {result['smallest_within_a_point']}."
    if any(map(untrained, result["scales"])):
        told += " Untrained: the model was not trained at this scale; its tokens are only pooled now."
    if "prefill_flops" in result["scales"][0]:
        told += " FLOPs until the first token of an answer, encoder included."
    told += " ± half the 95 % confidence interval (bootstrap over questions)."
    if timed := result["timed"]:
        size = f"{timed['images']} × {timed['height']}×{timed['width']} pixels"
        told += f" Times of one answer on {result['run']['device']}, {size}: median (interquartile range)."
    return told


def _cells(result: Result) -> list[list[str]]:
    """The header and one row per scale, without columns that are empty for every scale."""
    headline = result["scales"][0].get("headline", {}).get("name", "")
    heads = [
        "visual tokens",
        headline,
        "accuracy %",
        "loss",
        "prompt tokens",
        "FLOPs",
        "accuracy per TFLOP",
        "KV cache",
    ]
    heads += ["encode ms", "first token ms", "next token ms", "memory"]
    columns = zip(heads, *map(_line, result["scales"]), strict=True)
    kept = [column for column in columns if any(column[1:])]
    return [list(line) for line in zip(*kept, strict=True)]


def _line(row: dict[str, Any]) -> list[str]:
    tokens, frames, seen = row["visual_tokens"], row.get("frames"), row["measured"] or {}
    name = f"{frames} x {tokens // frames} = {tokens}" if frames else str(tokens)
    flops = in_flops(row["encode_flops"] + row["prefill_flops"]) if "prefill_flops" in row else ""
    return [
        name + untrained(row),
        _headline(row),
        _percent(row["accuracy"], row["interval"]),
        f"{row['loss']:.3f}" if "loss" in row else "",
        f"{row['prompt_tokens']:.1f}" if "prompt_tokens" in row else "",
        flops,
        f"{row['accuracy_per_tflop']:,.{2 if row['accuracy_per_tflop'] < 100 else 0}f}" if flops else "",
        in_bytes(row["kv_bytes"]) if "kv_bytes" in row else "",
        *(spread(seen[f"{part}_ms"]) if seen else "" for part in ("encode", "first_token", "further_token")),
        in_bytes(seen["peak_bytes"]) if seen.get("peak_bytes") else "",
    ]
