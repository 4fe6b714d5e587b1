"""The five-stage encoder compared with timm's four stages and Hugging Face's ConvNext with the same five stages.

    python experiments/benchmarks/encoder.py
    python experiments/benchmarks/encoder.py --device cuda --backbone convnext_large --width 3072 --depth 6

timm has only four stages. Its time is multiplied by the ratio of the operations of five stages to those of four
(counted by torch on the meta device): the time it would take if stage 5 ran as fast as the others. timm is timed in
both memory formats, Hugging Face in its own. `ours / other` below 1 means that this package is faster. Times are
medians of repetitions in alternating order after one warm-up. The script fails without writing anything if the figures
are impossible: if a forward pass takes over a tenth longer than a forward and backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from nested_step import hardware, shuffled
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import ConvNextConfig, ConvNextModel

from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage

Step = Callable[[Tensor], Tensor]


def encoders(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours, timm's in both memory formats, Hugging Face's."""
    stage = ExtraStage(arguments.depth, arguments.width)
    ours = ConvNeXtEncoder(arguments.backbone, [stage])
    depths = [len(s.blocks) for s in ours.trunk.stages]
    widths = [info["num_chs"] for info in ours.trunk.feature_info]
    made = {"lit_mm": ours}
    for name, memory in (("timm", torch.contiguous_format), ("timm channels_last", torch.channels_last)):
        made[name] = timm.create_model(arguments.backbone, num_classes=0, global_pool="").to(memory_format=memory)
    config = ConvNextConfig(num_stages=5, depths=depths, hidden_sizes=widths)
    made["Hugging Face"] = ConvNextModel(config)
    return {name: model.to(arguments.device) for name, model in made.items()}


def steps(models: dict[str, Any]) -> dict[str, Step]:
    """Pixels -> feature map, each in its own way."""
    found: dict[str, Step] = {"lit_mm": models["lit_mm"]}
    for name in ("timm", "timm channels_last"):
        memory = torch.channels_last if "last" in name else torch.contiguous_format
        found[name] = lambda pixels, model=models[name], memory=memory: model.forward_features(
            pixels.contiguous(memory_format=memory)
        )
    found["Hugging Face"] = lambda pixels: models["Hugging Face"](pixels).last_hidden_state
    return found


def stage_share(arguments: argparse.Namespace) -> float:
    """Operations of five stages over those of four."""
    counted = []
    for extra in ([ExtraStage(arguments.depth, arguments.width)], []):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            ConvNeXtEncoder(arguments.backbone, extra)(torch.empty(1, 3, arguments.pixels, arguments.pixels))
        counted.append(counter.get_total_flops())
    return counted[0] / counted[1]


def measure(found: dict[str, Step], pixels: Tensor, repetitions: int, backward: bool) -> dict[str, float]:
    """Median seconds of each, in alternation."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for repetition in range(repetitions + 1):
        for name, step in shuffled(found, repetition):
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                output = step(pixels)
            if backward:
                output.sum().backward()
            if pixels.is_cuda:
                torch.cuda.synchronize()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def impossible(rows: list[dict[str, Any]]) -> list[str]:
    """Encoders whose forward pass takes longer than forward and backward."""
    seconds = {(row["encoder"], row["backward"]): row["seconds"] for row in rows}
    return [
        f"{name}: forward takes {seconds[name, False]:.4f} s, with the backward pass {both:.4f} s"
        for (name, backward), both in seconds.items()
        if backward and seconds[name, False] > 1.1 * both
    ]


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backbone", default="convnext_tiny")
    parser.add_argument("--width", type=int, default=1536, help="of stage 5")
    parser.add_argument("--depth", type=int, default=3, help="of stage 5")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments, console = parsed(words), Console(width=100)
    torch.manual_seed(0)
    share, found = stage_share(arguments), steps(encoders(arguments))
    pixels = torch.randn(arguments.batch, 3, arguments.pixels, arguments.pixels, device=arguments.device)
    console.print(f"{hardware(arguments.device)}, torch {torch.__version__}, timm {timm.__version__}")
    console.print(f"{arguments.backbone} + stage 5, {arguments.pixels} px: stage 5 adds {share - 1:.1%} of operations")
    rows = []
    for backward in (False, True):
        seconds = measure(found, pixels, arguments.repetitions, backward)
        table = Table(title="forward and backward" if backward else "forward", title_justify="left")
        for column in ("encoder", "seconds", "for five stages", "ours / other"):
            table.add_column(column, justify="left" if column == "encoder" else "right")
        for name, value in seconds.items():
            five = value * share if name.startswith("timm") else value
            rows.append({"encoder": name, "backward": backward, "seconds": value, "five_stages": five})
            table.add_row(name, f"{value:.3f}", f"{five:.3f}", f"{seconds['lit_mm'] / five:.3f}")
        console.print(table)
    if wrong := impossible(rows):
        sys.exit("refused, these figures cannot be:\n" + "\n".join(wrong))
    if arguments.json:
        arguments.json.write_text(json.dumps({"hardware": hardware(arguments.device), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
