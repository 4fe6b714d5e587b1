"""`python -m lit_mm profile`: what configured models cost, without weights or data."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch

from lit_mm.costs.devices import device_name
from lit_mm.costs.timing import AnswerTimer
from lit_mm.evaluation.pictures import print_whole
from lit_mm.model.llm import DType
from lit_mm.profile.experiment import Experiment, Size, read_model
from lit_mm.profile.figures import Timer, figures_of
from lit_mm.profile.memory_plan import PRECISIONS, memory_table, plan_of
from lit_mm.profile.report import draw, image, tables

ABOUT = """\
What every visual token costs: FLOPs of encoder, projector and LLM, KV cache, weights, and the share of
an answer that is spent on the image; with --gpus also the memory that training takes on each GPU. Computed
from shapes in seconds, without weights, data, network or a pretrained LLM's tokenizer.

  python -m lit_mm profile --config a.yaml --sizes 768 1024 1536x1100 --plot costs.png
  python -m lit_mm profile --config a.yaml --config overlay.yaml --model.scales '[144,36]' --and --config b.yaml

Several experiments are separated by --and and compared in one table and one picture. --config, --name,
--sizes and --model.FIELD apply to one experiment, all other options to the whole call."""


PROGRAM = "python -m lit_mm profile"
PICTURES = (".png", ".pdf", ".svg")
USAGE = f"{PROGRAM} --config FILE [--config FILE …] [--sizes SIZE …] [--and --config FILE …] [options]"


def main(arguments: Sequence[str]) -> None:
    """Run the verb with its arguments."""
    if {"-h", "--help"} & set(arguments):
        both, layout = [_own_options(), _options()], argparse.RawDescriptionHelpFormatter
        argparse.ArgumentParser(
            PROGRAM, USAGE, ABOUT, parents=both, formatter_class=layout, add_help=False
        ).print_help()
        return
    options, rest = _options().parse_known_args(arguments)
    experiments = [_experiment(own, options.dtype) for own in _separated(rest)]
    how = options.gpus, options.samples, options.precision, options.strategy
    plans = [plan_of(own, *how) for own in experiments] if options.gpus else []
    asked = options.prompt, options.new_tokens
    found = [figures_of(own, *asked, _timer(own, *asked) if options.measure else None) for own in experiments]
    for figures, plan in zip(found, plans, strict=False):
        figures["training_memory"] = {**asdict(plan), "total": plan.total, "samples": options.samples}
    _write(found, options)
    for own in experiments:
        if own.model.llm.quantize:
            note = f"llm.quantize {own.model.llm.quantize} is ignored: figures are those of the unquantized LLM"
            print_whole(f"{own.name}: {note}")
    if plans:
        print_whole(memory_table([(own.name, plan) for own, plan in zip(experiments, plans, strict=True)], *how))


def _timer(experiment: Experiment, prompt: int, new_tokens: int) -> Timer:
    """Times random images with random weights, on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answer = AnswerTimer(experiment.build(device.type), prompt, new_tokens)

    def measured(size: Size, visual: int) -> dict[str, Any]:
        pixels = torch.randint(256, (experiment.frames, 3, *size), dtype=torch.uint8)
        return {"device": device_name(device), **answer(pixels, visual)}

    return measured


def _write(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print_whole(*tables(found))
    print_whole(*(f"{own['name']}, {image(at)}: {at['note']}" for own in found for at in own["sizes"] if at["note"]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if options.plot:
        draw(found).savefig(options.plot)


def _own_options() -> argparse.ArgumentParser:
    """Options of one experiment."""
    parser = argparse.ArgumentParser(PROGRAM, USAGE, add_help=False, allow_abbrev=False)
    own = parser.add_argument_group("of one experiment")
    own.add_argument("--config", action="append", default=[], help="its config; later configs override earlier ones")
    own.add_argument("--name", help="its name (default: its configs' names)")
    own.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[],
        metavar="SIZE",
        help="image sizes, 768 or 1536x1100 (height x width); default: the size that fits the finest scale",
    )
    return parser


def _options() -> argparse.ArgumentParser:
    """Options of the whole call."""
    parser = argparse.ArgumentParser(PROGRAM, USAGE, add_help=False, allow_abbrev=False)
    whole = parser.add_argument_group("of the whole call")
    whole.add_argument("--prompt", type=_positive, default=64, metavar="N", help="text tokens in the prompt (64)")
    whole.add_argument("--new-tokens", type=_positive, default=64, metavar="N", help="tokens of the answer (64)")
    whole.add_argument(
        "--dtype", choices=get_args(DType), default="bfloat16", help="dtype of weights and KV cache (bfloat16)"
    )
    whole.add_argument("--measure", action="store_true", help="time each scale on this machine, with random weights")
    whole.add_argument(
        "--gpus",
        type=_positive,
        metavar="N",
        help="also plan training's memory on N GPUs: weights, gradients, …; without gradient accumulation",
    )
    whole.add_argument("--samples", type=_positive, default=1, metavar="N", help="per GPU, for --gpus (1)")
    whole.add_argument("--precision", choices=PRECISIONS, default="bf16-mixed", help="for --gpus (bf16-mixed)")
    choices = ["fsdp", "ddp"]
    whole.add_argument("--strategy", type=_strategy, choices=choices, default="fsdp", help="for --gpus (fsdp)")
    whole.add_argument("--json", type=_file, metavar="FILE", help="write all figures to FILE")
    whole.add_argument("--plot", type=_picture, metavar="FILE.png", help="draw FLOPs over visual tokens to FILE")
    return parser


def _strategy(name: str) -> str:
    """The strategy's current name."""
    if name == "fsdp1":
        raise argparse.ArgumentTypeError("FSDP1 is gone, use fsdp")
    if name == "fsdp2":
        warnings.warn("--strategy fsdp2 is called fsdp now", stacklevel=1)
    return "fsdp" if name == "fsdp2" else name


def _separated(arguments: Sequence[str]) -> list[Sequence[str]]:
    """The arguments of each experiment, split at --and."""
    borders = [place for place, word in enumerate(arguments) if word == "--and"]
    return [arguments[start + 1 : end] for start, end in pairwise([-1, *borders, len(arguments)])]


def _experiment(arguments: Sequence[str], dtype: DType) -> Experiment:
    own, overrides = _own_options().parse_known_args(arguments)
    if not own.config:
        raise ValueError("profile: each experiment needs --config FILE, before and after every --and")
    model = read_model(own.config, overrides)
    return Experiment(own.name or name_of([Path(file) for file in own.config]), model, own.sizes, dtype)


def name_of(files: Sequence[Path]) -> str:
    """`base + m3/tune`: the configs' paths relative to the first one's folder."""
    home = files[0].parent
    return " + ".join(
        (file.relative_to(home).with_suffix("") if file.is_relative_to(home) else Path(file.stem)).as_posix()
        for file in files
    )


def _size(text: str) -> Size:
    height, times, width = text.lower().partition("x")
    return _positive(height), _positive(width if times else height)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return int(text)


def _file(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {Path(text).parent}")
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, found the folder {text}")
    return Path(text)


def _picture(text: str) -> Path:
    file = _file(text)
    if file.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(PICTURES)}, found {text!r}")
    return file
