"""The cost of a training step on nested scales, compared with a step on the finest scale only.

    python experiments/benchmarks/nested_step.py                     # CPU sizes
    python experiments/benchmarks/nested_step.py --device cuda --size 1b --dtype bfloat16

Methods, each a forward and backward pass without an optimizer:

- single: the finest scale only, on padded samples, without packing or chunks, logits only at targets. All ratios are
  relative to it.
- authors: as in M3's public code: encoder, projector, embedding and LLM on padded samples for each scale, float32
  logits at every position, and all graphs kept until one backward pass.
- reference: this package's plain loop: encoder once, LLM once per scale, padded samples, logits only at targets.
- packed-…: one packed sequence with each attention; packed-sequential: one sequence per scale.

Parts: `llm` (from image embeddings) and `model` (from images to loss). Times are medians of repetitions in alternating
order after one warm-up; on a CPU, peak memory is measured in a separate process for each method. `limit` is the
arithmetic limit of a packed step: its floating point operations over those of single, counted from shapes (linear
layers, causal pairs of attention, the head at targets, the encoder once). It applies to `authors` and `reference` too,
because no method needs more operations.

The script fails without writing anything if the figures are impossible: if the LLM part runs the encoder, takes longer
than the whole model, or, on a CPU, takes less time than its operations need at the speed of single (which leaves a GPU
half idle).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning_utilities.core.apply_func import apply_to_collection
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lit_mm.data.collate import group_by_size
from lit_mm.model.attention import NAME, Attention, FlexLayout
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch
from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage
from lit_mm.model.packing import Packing, pack
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.reference import at_scale, embed
from lit_mm.model.vlm import MatryoshkaVLM

SCALES = [576, 144, 36, 9, 1]
WAYS = ["single", "authors", "reference", *(f"packed-{name}" for name in ("branch", "flex", "sequential"))]


@dataclass
class Size:
    """An LLM's width, layers, heads and vocabulary, and an encoder's five widths and depths, at
    1536 pixels. The encoder needs about as many operations, relative to the LLM's 675 tokens of one
    sample, as ConvNeXt-L with stage 5 does relative to the LLM that the size is named after."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    widths: list[int]
    depths: list[int]


SIZES = {
    "tiny": Size(64, 1, 4, 1000, [8, 8, 8, 8, 8], [1, 1, 1, 1, 1]),  # for trying the script out
    "small": Size(512, 6, 8, 32000, [16, 32, 64, 128, 256], [3, 3, 9, 3, 3]),
    "wide": Size(2048, 2, 16, 32000, [32, 64, 128, 256, 512], [3, 3, 9, 3, 3]),
    "1b": Size(2048, 16, 32, 32000, [192, 384, 768, 1536, 3072], [3, 3, 27, 3, 6]),
    "3b": Size(3072, 28, 24, 32000, [192, 384, 768, 1536, 3072], [3, 3, 27, 3, 6]),
    "7b": Size(4096, 32, 32, 32000, [192, 384, 768, 1536, 3072], [3, 3, 27, 3, 6]),
    "13b": Size(5120, 40, 40, 32000, [192, 384, 768, 1536, 3072], [3, 3, 27, 3, 6]),
}


@dataclass
class Row:
    """One measurement, as the JSON holds it: seconds and ratio are medians, memory in bytes."""

    way: str
    part: str
    prefix: int
    texts: list[int]
    seconds: float
    fastest: float
    slowest: float
    ratio: float
    limit: float
    peak_bytes: int | None


def build(size: Size, device: str, dtype: torch.dtype) -> MatryoshkaVLM:
    torch.manual_seed(0)
    with torch.device(device):
        encoder = ConvNeXtEncoder(
            "convnext_atto",
            [ExtraStage(size.depths[4], size.widths[4])],
            overrides={"dims": size.widths[:4], "depths": size.depths[:4]},
        )
        config = LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3 // 64 * 64,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            vocab_size=size.vocabulary,
            attn_implementation=NAME,
        )
        projector = MatryoshkaProjector(encoder.num_features, size.width, SCALES)
        vlm = MatryoshkaVLM(encoder, projector, LlamaForCausalLM(config))
    return vlm.to(dtype)


def batch_of(
    prefix: int,
    texts: Sequence[int],
    weights: list[float],
    device: str,
    packing: Packing = "packed",
    attention: Attention = "branch",
) -> Batch:
    """One sample a text length: prefix, one image, text of which every token is a label."""
    torch.manual_seed(1)
    ids = [torch.cat([torch.randint(9, 999, (n,)) for n in (prefix, 1, text)]) for text in texts]
    for own in ids:
        own[prefix] = IMAGE
    labels = [torch.where(torch.arange(len(own)) > prefix, own, IGNORE_INDEX) for own in ids]
    images = group_by_size([torch.randint(0, 255, (1, 3, 1536, 1536), dtype=torch.uint8) for _ in texts])
    batch = Batch(images, ids, labels, torch.arange(len(texts)), weights)
    batch.packed = pack(batch, SCALES, packing, attention)
    return apply_to_collection(batch, Tensor, Tensor.to, device)


def authors_loss(vlm: MatryoshkaVLM, batch: Batch, nested: Tensor | None) -> Tensor:
    """M3's own step, scale after scale; `nested` stands in for the encoder and the projector."""
    losses, shown = [], (batch.input_ids, batch.image_index, [])
    for number in range(len(SCALES)):
        own = vlm.encode(batch.images) if nested is None else nested
        index, tokens = at_scale(batch.images, own, SCALES, number, *shown)
        ids, labels = ([x[i] for x, i in zip(each, index, strict=True)] for each in (batch.input_ids, batch.labels))
        mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        embeddings = embed(vlm.llm, pad_sequence(ids, batch_first=True), tokens)
        logits = vlm.llm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
        wanted = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
    return torch.stack(losses).mean()


def make_step(vlm: MatryoshkaVLM, way: str, part: str, case: tuple[int, list[int]], device: str) -> Callable[[], None]:
    """One forward and backward pass."""
    weights = [1.0] + [0.0] * 4 if way == "single" else [1 / len(SCALES)] * len(SCALES)
    packing = {"packed-branch": "packed", "packed-flex": "packed", "packed-sequential": "sequential"}.get(way, "padded")
    batch = batch_of(*case, weights, device, packing, "flex" if way == "packed-flex" else "branch")
    like = vlm.llm.get_input_embeddings().weight
    shape = len(case[1]), sum(SCALES), like.shape[1]
    given = torch.randn(*shape, dtype=like.dtype, device=device) * 0.02

    def step() -> None:
        nested = given.clone().requires_grad_() if part == "llm" else None
        for packed in batch.packed:
            if isinstance(packed.layout, FlexLayout):
                packed.layout.mask = None  # a new batch has to make its own
        loss = authors_loss(vlm, batch, nested) if way == "authors" else vlm(batch, nested=nested).loss
        loss.backward()
        for parameter in vlm.parameters():
            parameter.grad = None

    return step


def operations(size: Size, part: str, prefix: int, texts: list[int], scales: list[int], encoder: float) -> float:
    """Floating point operations of one forward pass, from shapes; training takes three times as many."""
    hidden = size.width * 8 // 3 // 64 * 64
    per_token = 2 * size.layers * (4 * size.width**2 + 3 * size.width * hidden)
    total = 0.0
    for text in texts:
        branches = [scale + text for scale in scales]
        pairs = prefix**2 / 2 + sum(branch * prefix + branch**2 / 2 for branch in branches)
        total += per_token * (prefix + sum(branches)) + 4 * size.layers * size.width * pairs
        total += 2 * size.width * size.vocabulary * text * len(scales)
    projector = 2 * 576 * (size.widths[-1] * size.width + size.width**2)
    return total + (len(texts) * (encoder + projector) if part == "model" else 0.0)


def encoder_operations(size: Size) -> float:
    """Of one image, counted by torch on the meta device."""
    with torch.device("meta"):
        encoder = build(Size(64, 1, 1, 9, size.widths, size.depths), "meta", torch.float32).encoder
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, 1536, 1536))
    return counter.get_total_flops()


def measure(*arguments: Any, **named: Any) -> dict[str, float]:
    """Median seconds of each step; arguments as for `times_of`."""
    return {way: statistics.median(values) for way, values in times_of(*arguments, **named).items()}


def times_of(
    steps: dict[str, Callable[[], Any]], repetitions: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each repetition of each step, in alternation, by a clock."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    for repetition in range(repetitions + 1):
        for way, step in shuffled(steps, repetition):
            start = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repetition:
                times[way].append(clock() - start)
    return times


def shuffled(steps: dict[str, Any], seed: int) -> list[tuple[str, Any]]:
    """In another order each time: whoever comes first finds other memory than whoever follows."""
    return random.Random(seed).sample(list(steps.items()), len(steps))


def peak_bytes(arguments: argparse.Namespace, way: str, part: str, case: tuple[int, list[int]]) -> int:
    """What a step takes beside the weights, measured in a process of its own."""
    case_words = ["--prefix", str(case[0]), "--texts", ",".join(map(str, case[1]))]
    command = [sys.executable, __file__, "--peak", way, "--parts", part, *case_words]
    command += ["--size", arguments.size, "--dtype", arguments.dtype]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def peak_bytes_on_gpu(step: Callable[[], None]) -> int:
    """What a step takes beside the weights."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def print_peak(arguments: argparse.Namespace, case: tuple[int, list[int]]) -> None:
    vlm = build(SIZES[arguments.size], arguments.device, getattr(torch, arguments.dtype))
    step = make_step(vlm, arguments.peak, arguments.parts[0], case, arguments.device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far counts no longer (Linux)
    before = resident("VmHWM")
    step()
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of a field of this process's status, such as VmHWM, the most memory held so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def ways_of(arguments: argparse.Namespace) -> list[str]:
    gpu = ["packed-flex"] if arguments.device == "cuda" else []
    chosen = arguments.ways or ["authors", "reference", "packed-branch", *gpu, "packed-sequential"]
    return ["single", *(way for way in chosen if way != "single")]


def rows_of(arguments: argparse.Namespace, part: str, case: tuple[int, list[int]]) -> list[Row]:
    size = SIZES[arguments.size]
    vlm = build(size, arguments.device, getattr(torch, arguments.dtype))
    steps = {way: make_step(vlm, way, part, case, arguments.device) for way in ways_of(arguments)}
    for way, step in steps.items():
        check_encodings(vlm, way, part, step)
    times = times_of(steps, arguments.repetitions, arguments.device)
    seconds = {way: statistics.median(values) for way, values in times.items()}
    encoder = encoder_operations(size) if part == "model" else 0.0
    limit = operations(size, part, *case, SCALES, encoder) / operations(size, part, *case, SCALES[:1], encoder)
    peaks: dict[str, int | None] = dict.fromkeys(steps)
    if arguments.device == "cuda":
        peaks = {way: peak_bytes_on_gpu(step) for way, step in steps.items()}
    del vlm, steps
    if arguments.device == "cpu" and not arguments.no_memory:
        peaks = {way: peak_bytes(arguments, way, part, case) for way in peaks}
    return [
        Row(
            way,
            part,
            *case,
            seconds[way],
            min(times[way]),
            max(times[way]),
            seconds[way] / seconds["single"],
            1.0 if way == "single" else limit,
            peaks[way],
        )
        for way in seconds
    ]


def check_encodings(vlm: MatryoshkaVLM, way: str, part: str, step: Callable[[], None]) -> None:
    """Whether a step runs the encoder as often as its way and its part say.

    Raises:
        RuntimeError: It does not: another part would be measured under this one's name.
    """
    runs: list[Any] = []
    hook = vlm.encoder.register_forward_hook(lambda *_: runs.append(None))
    step()
    hook.remove()
    expected = 0 if part == "llm" else len(SCALES) if way == "authors" else 1
    if len(runs) != expected:
        raise RuntimeError(f"{way}, {part}: expected {expected} runs of the encoder in a step, found {len(runs)}")


def impossible(rows: list[Row], device: str) -> list[str]:
    """What is wrong with figures by more than their noise and a tenth."""
    found = []
    for row in (row for row in rows if row.part == "llm"):
        others = [other for other in rows if (other.prefix, other.texts) == (row.prefix, row.texts)]
        [single] = [other for other in others if (other.way, other.part) == ("single", "llm")]
        name = f"{row.way}, P={row.prefix}, T={row.texts}: the LLM part takes"
        if device == "cpu" and row.slowest / single.fastest < 0.9 * row.limit:
            found.append(f"{name} {row.ratio / row.limit:.2f} of the arithmetic limit")
        for whole in (other for other in others if (other.way, other.part) == (row.way, "model")):
            if row.fastest > 1.1 * whole.slowest:
                found.append(f"{name} {row.seconds:.3f} s, the whole model {whole.seconds:.3f} s")
    return found


def show(rows: list[Row], console: Console) -> None:
    prefix, texts = rows[0].prefix, rows[0].texts
    tokens = sum(prefix + sum(SCALES) + len(SCALES) * t for t in texts) / sum(prefix + SCALES[0] + t for t in texts)
    console.print(f"{rows[0].part}: P={prefix}, T={texts}, scales {SCALES}; by tokens alone the limit is {tokens:.2f}")
    table = Table()
    for column in ("way", "seconds", "ratio", "limit", "ratio / limit", "peak MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        peak = f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes else "–"
        figures = f"{row.seconds:.3f}", f"{row.ratio:.2f}", f"{row.limit:.2f}", f"{row.ratio / row.limit:.2f}"
        table.add_row(row.way, *figures, peak)
    console.print(table)


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="+", default=["llm", "model"], choices=["llm", "model"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="beside single; default: all that the device can do")
    parser.add_argument("--prefix", type=int, default=35, help="tokens before the image")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=["64", "256"],
        type=lambda word: [int(n) for n in word.split(",")],
        help="tokens after the image; several samples in a row as 32,64,128",
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (CPU)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    made = parser.parse_args(words)
    made.texts = [[int(text)] if isinstance(text, str) else text for text in made.texts]
    return made


def main(words: Sequence[str] | None = None) -> None:
    arguments, console = parsed(words), Console(width=110)
    if arguments.peak:
        print_peak(arguments, (arguments.prefix, arguments.texts[0]))
        return
    versions: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    console.print(
        f"{hardware(arguments.device)}; {versions}; {arguments.size} {SIZES[arguments.size]} {arguments.dtype}"
    )
    rows = []
    for part in arguments.parts:
        for texts in arguments.texts:
            rows += (found := rows_of(arguments, part, (arguments.prefix, texts)))
            show(found, console)
    if wrong := impossible(rows, arguments.device):
        sys.exit("refused, these figures cannot be:\n" + "\n".join(wrong))
    if arguments.json:
        result = {"hardware": hardware(arguments.device), "versions": versions, "dtype": arguments.dtype}
        result |= {"sizes": asdict(SIZES[arguments.size]), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
