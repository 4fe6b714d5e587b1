"""The cost of answers at all scales, about one image and in a batch, compared with answers one at a time.

    python experiments/benchmarks/answering.py --json answers.json
    python experiments/benchmarks/answering.py --device cuda --size 1b --dtype bfloat16

A model with random weights answers greedily, without an end token, so that all answers have the same length:

- all scales together, relative to the finest scale alone, and to one call for each scale;
- several questions about one image, relative to as many questions about as many images;
- the questions about several images in one batch, relative to one call for each;
- the first token at each scale and at all of them, relative to the first token at the finest scale;
- the first token of a conversation's fifth turn when keys, values and the encoded image are kept, relative to computing
  the whole conversation anew.

Parts: `llm` (from image embeddings) and `model` (from images; every call encodes its images). Times are medians of
repetitions in alternating order after one warm-up, ratios are of medians. `limit` is the ratio of floating point
operations, counted from shapes by `lit_mm.costs`: the positions of the packed prompts, one position for each further
token of each answer, attention's causal pairs, the head, and in `model` the encoder and the projector.

A step that decodes one sequence mostly waits for weights to be read. Sequences that are decoded together share that
time, so where a ratio compares many sequences a step with one, it can be below its limit. Nothing takes less time than
its operations need at the speed of a large matrix product, measured in the same run; this is `least`.

The script fails without writing anything if the figures are impossible: if a run encodes another number of images or
makes another number of tokens than its name says, takes much less than `least`, or has a ratio far below 1 though its
limit is above, or far below its limit where both sides decode equally many sequences a step or none.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from latency import MATRIX
from nested_step import SCALES, SIZES, Size, build, hardware, times_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_mm.costs.flops import Costs, ModelFlops, nested_segments
from lit_mm.data.collate import group_by_size
from lit_mm.inference.decoding import settings
from lit_mm.inference.generation import Asked, Past, generate, generate_each
from lit_mm.model.attention import causal_pairs
from lit_mm.model.batch import IMAGE, Question

NO_TOKEN = -1
"""As the only end token: answers never end early."""
PIXELS = 1536
TURNS = 5
TURN_NAMES = "first token, fifth turn anew", "first token, fifth turn"
OWN_SIZES = SIZES | {"small": Size(512, 8, 8, 4096, [16, 32, 64, 128, 256], [2, 2, 2, 2, 2])}


@dataclass
class Call:
    """One call: one question at some scales, or several at the finest, or the last turn of a conversation about an
    image, whose earlier turns may be kept."""

    scales: Sequence[int] = (SCALES[0],)
    questions: int = 1
    images: int = 1
    new_tokens: int = 1
    turns: int = 1
    kept: bool = False

    @property
    def sequences(self) -> int:
        """Decoded together."""
        return self.questions * len(self.scales)


@dataclass
class Row:
    """One comparison, as the JSON holds it.

    Args:
        case: What was run.
        part: llm or model.
        base: What it is compared with.
        seconds: Median.
        base_seconds: Median.
        ratio: Of the two.
        limit: The ratio of their floating point operations.
        least: Seconds that the operations take at the speed of a large matrix product.
        lowest: What the ratio cannot be below.
        most: The slowest of the case over the fastest of the base.
    """

    case: str
    part: str
    base: str
    seconds: float
    base_seconds: float
    ratio: float
    limit: float
    least: float
    lowest: float
    most: float


def runs_of(arguments: argparse.Namespace) -> dict[str, list[Call]]:
    """Name -> the calls, one after another."""
    n, new_tokens = arguments.questions, arguments.new_tokens
    runs = {
        "finest scale": [Call(new_tokens=new_tokens)],
        "all scales": [Call(SCALES, new_tokens=new_tokens)],
        "scale after scale": [Call([scale], new_tokens=new_tokens) for scale in SCALES],
        f"{n} questions, one image": [Call(questions=n, new_tokens=new_tokens)],
        f"{n} questions, {n} images": [Call(questions=n, images=n, new_tokens=new_tokens)],
        "question after question": [Call(new_tokens=new_tokens)] * n,
    }
    runs |= {f"first token, {scale}": [Call([scale])] for scale in SCALES}
    runs |= {"first token, all scales": [Call(SCALES)]}
    return runs | {name: [Call(images=1 - kept, turns=TURNS, kept=bool(kept))] for kept, name in enumerate(TURN_NAMES)}


def pairs_of(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(case, what it is compared with)."""
    n = arguments.questions
    one_image, batch = f"{n} questions, one image", f"{n} questions, {n} images"
    firsts = [f"first token, {scale}" for scale in SCALES]
    return [
        ("all scales", "finest scale"),
        ("all scales", "scale after scale"),
        (one_image, batch),
        (batch, "question after question"),
        *((first, firsts[0]) for first in [*firsts, "first token, all scales"]),
        (TURN_NAMES[1], TURN_NAMES[0]),
    ]


class Answering:
    """A model with random weights, its questions, and what their answers cost.

    Args:
        arguments: The command line.
        part: llm or model.
    """

    def __init__(self, arguments: argparse.Namespace, part: str) -> None:
        self.prefix, self.text, self.part = arguments.prefix, arguments.text, part
        self.vlm = build(OWN_SIZES[arguments.size], arguments.device, getattr(torch, arguments.dtype)).eval()
        self.vlm.llm.generation_config.eos_token_id = None
        self.costs = Costs(self.vlm)
        torch.manual_seed(1)
        before = torch.cat([torch.randint(9, 999, (self.prefix,)), torch.tensor([IMAGE])])
        self.ids = [torch.cat([before, torch.randint(9, 999, (self.text,))]) for _ in range(arguments.questions)]
        like = self.vlm.llm.get_input_embeddings().weight
        shape = arguments.questions, sum(SCALES), like.shape[1]
        self.nested = torch.randn(*shape, dtype=like.dtype, device=like.device) * 0.02
        self.pixels = torch.randint(0, 255, (arguments.questions, 1, 3, PIXELS, PIXELS), dtype=torch.uint8)
        self.pixels = self.pixels.to(like.device)
        own = [torch.randint(9, 999, (arguments.new_tokens + self.text,)) for _ in range(TURNS - 1)]
        self.conversation, self.past = torch.cat([self.ids[0], *own]), Past()
        self._turn(self.conversation[: -self.text - 1], self.past)  # an answer's last token has no keys yet
        self.known = len(self.past.codes)

    def run(self, calls: Sequence[Call]) -> list[int]:
        """Answer; return the number of tokens of each answer."""
        return [length for call in calls for length in self._call(call)]

    def _turn(self, ids: Tensor, past: Past | None) -> list[int]:
        """The first token after a conversation about the first image."""
        asked = [Asked(Question(0, "", ids, [0]), SCALES[0])]
        nested = self.nested[:1] if self.part == "llm" or past else None
        config = settings(self.vlm.llm, max_new_tokens=1)
        [answer] = generate_each(
            self.vlm, group_by_size([self.pixels[0]]), asked, config, [NO_TOKEN], nested=nested, past=past
        )
        return [len(answer.ids)]

    def _call(self, call: Call) -> list[int]:
        if call.turns > 1:
            self.past.codes = self.past.codes[: self.known]  # as the turn before left it
            return self._turn(self.conversation, self.past if call.kept else None)
        asked = [Question(n, "", self.ids[n], [n % call.images]) for n in range(call.questions)]
        images = group_by_size(list(self.pixels[: call.images]))
        nested = self.nested[: call.images] if self.part == "llm" else None
        config = settings(self.vlm.llm, max_new_tokens=call.new_tokens)
        answers = generate(self.vlm, images, asked, call.scales, config, [NO_TOKEN], nested=nested)
        return [len(answer.ids) for own in answers for answer in own]

    def operations(self, call: Call) -> int:
        """Floating point operations of a call, from shapes."""
        flops = self._of_conversation(call) if call.turns > 1 else self._of_questions(call)
        if self.part == "model":
            flops += self.costs.image((PIXELS, PIXELS)) * call.images
        return flops.total.forward

    def _of_conversation(self, call: Call) -> ModelFlops:
        before = self.known if call.kept else 0
        own = self.known + 1 + self.text - before
        return self.costs.text(own, causal_pairs(own, before), 1)

    def _of_questions(self, call: Call) -> ModelFlops:
        if len(call.scales) == call.images == 1:  # the questions share the text before the image and the image
            segments = nested_segments(self.prefix + call.scales[0], self.text, [0] * call.questions)
        else:  # the text before the image is shared
            segments = nested_segments(self.prefix, self.text, [*call.scales] * call.questions)
        further = call.new_tokens - 1
        flops = self.costs.sequence(segments, call.sequences)
        for scale in call.scales:
            pairs = causal_pairs(further, before=self.prefix + scale + self.text)
            flops += self.costs.text(further, pairs, further) * call.questions
        return flops

    def check(self, name: str, calls: Sequence[Call]) -> None:
        """Whether a run does what its name says.

        Raises:
            RuntimeError: It encodes another number of images, or makes another number of tokens.
        """
        encoded: list[int] = []
        hook = self.vlm.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
        found = self.run(calls), sum(encoded)
        hook.remove()
        lengths = [call.new_tokens for call in calls for _ in range(call.sequences)]
        expected = lengths, sum(call.images for call in calls) if self.part == "model" else 0
        if found != expected:
            raise RuntimeError(f"{name}, {self.part}: expected (tokens, images encoded) {expected}, found {found}")


def product_of(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A large matrix product, and its floating point operations."""
    side = MATRIX[device]
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return lambda: left @ right, 2.0 * side**3


def rows_of(arguments: argparse.Namespace, part: str) -> list[Row]:
    answering, pairs = Answering(arguments, part), [pair for pair in pairs_of(arguments) if arguments.only in pair[0]]
    runs = {name: calls for name, calls in runs_of(arguments).items() if name in {*chain(*pairs)}}
    for name, calls in runs.items():
        answering.check(name, calls)
    product, flops = product_of(arguments.device, getattr(torch, arguments.dtype))
    steps: dict[str, Callable[[], Any]] = {name: lambda own=own: answering.run(own) for name, own in runs.items()}
    times = times_of(steps | {"product": product}, arguments.repetitions, arguments.device)
    speed = flops / min(times["product"])
    seconds = {name: statistics.median(own) for name, own in times.items()}
    operations = {name: sum(answering.operations(call) for call in calls) for name, calls in runs.items()}
    rows = []
    for case, base in pairs:
        ratio, limit = seconds[case] / seconds[base], operations[case] / operations[base]
        lowest = lowest_ratio(runs[case], runs[base], part, limit)
        least = operations[case] / speed
        most = max(times[case]) / min(times[base])
        rows.append(Row(case, part, base, seconds[case], seconds[base], ratio, limit, least, lowest, most))
    return rows


def lowest_ratio(case: Sequence[Call], base: Sequence[Call], part: str, limit: float) -> float:
    """What a ratio cannot be below. What both sides have in common is slower than its operations suggest, which brings
    a ratio closer to 1; so is a large batch of images, and a step that decodes one sequence."""
    if limit > 1:
        return 1.0
    images = {max(call.images for call in calls) for calls in (case, base)}
    same = decoded_together(case) == decoded_together(base) and (part == "llm" or len(images) == 1)
    return limit if same else 0.0


def decoded_together(calls: Sequence[Call]) -> int:
    """How many sequences a step decodes; 0 if all that is made is the first token."""
    return max(call.sequences if call.new_tokens > 1 else 0 for call in calls)


def impossible(rows: Sequence[Row], device: str) -> list[str]:
    """What is wrong with figures by more than their noise and a fifth. On a GPU, small work does not use all of the
    device, and the matrix product that is timed need not be the fastest."""
    found = []
    for row in rows if device == "cpu" else ():
        name = f"{row.case}, {row.part}:"
        if row.seconds < 0.8 * row.least:
            found.append(f"{name} {row.seconds:.3g} s, its operations alone take {row.least:.3g} s")
        if row.most < 0.8 * row.lowest:
            found.append(f"{name} {row.ratio:.2f} relative to {row.base}, expected at least {row.lowest:.2f}")
    return found


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title=rows[0].part, title_justify="left")
    for column in ("case", "relative to", "seconds", "at least", "ratio", "limit", "ratio / limit"):
        table.add_column(column, justify="left" if column in ("case", "relative to") else "right")
    for row in rows:
        figures = f"{row.ratio:.2f}", f"{row.limit:.2f}", f"{row.ratio / row.limit:.2f}"
        table.add_row(row.case, row.base, f"{row.seconds:.3f}", f"{row.least:.3f}", *figures)
    console.print(table)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=list(OWN_SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="+", default=["llm", "model"], choices=["llm", "model"])
    parser.add_argument("--prefix", type=int, default=35, help="tokens before the image")
    parser.add_argument("--text", type=int, default=29, help="tokens after the image")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--questions", type=int, default=10, help="questions, and images, of a batch; at least 2")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default="", metavar="WORDS", help="only cases with these words in their name")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    made = parser.parse_args(words)
    if made.questions < 2:
        parser.error(f"--questions: found {made.questions}, expected 2 or more: one is no batch")
    if not any(made.only in case for case, _ in pairs_of(made)):
        parser.error(f"--only: found {made.only!r}, expected a part of {', '.join(case for case, _ in pairs_of(made))}")
    return made


def main(words: Sequence[str] | None = None) -> None:
    arguments, console = parsed(words), Console(width=120)
    versions: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    size = OWN_SIZES[arguments.size]
    console.print(f"{hardware(arguments.device)}; {versions}; {arguments.size} {size} {arguments.dtype}")
    rows = []
    for part in arguments.parts:
        rows += (found := rows_of(arguments, part))
        show(found, console)
    if wrong := impossible(rows, arguments.device):
        sys.exit("refused, these figures cannot be:\n" + "\n".join(wrong))
    if arguments.json:
        command = shlex.join(["answering.py", *(sys.argv[1:] if words is None else words)])
        result = {"hardware": hardware(arguments.device), "versions": versions, "command": command}
        result |= {"dtype": arguments.dtype, "sizes": asdict(size), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
