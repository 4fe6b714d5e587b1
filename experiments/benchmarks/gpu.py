"""What a GPU is asked for the figures of RESULTS.md, one benchmark after another in one process.

    python experiments/benchmarks/gpu.py FOLDER                         # all; 80 GB are enough for all but 13b
    python experiments/benchmarks/gpu.py FOLDER training_7b_branch      # some

FOLDER gets each benchmark's output and JSON. A benchmark that fails does not stop the others.
"""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import answering
import nested_step
import torch
import training_step

RECOMPUTED = "--precision bf16-true --checkpointing encoder llm --no-plan"
COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "nested_llm": (
        nested_step.main,
        "--device cuda --size 7b --dtype bfloat16 --parts llm --texts 64 256 64,64,64,64 --repetitions 3",
    ),
    "nested_model": (
        nested_step.main,
        "--device cuda --size 7b --dtype bfloat16 --parts model --texts 64 256 --repetitions 3",
    ),
    "training_7b_branch": (training_step.main, f"{RECOMPUTED} --size 7b --samples 12 --attention branch"),
    "training_7b_flex": (training_step.main, f"{RECOMPUTED} --size 7b --samples 12 --attention flex"),
    "training_13b_branch": (training_step.main, f"{RECOMPUTED} --size 13b --samples 8 --attention branch"),
    "training_13b_flex": (training_step.main, f"{RECOMPUTED} --size 13b --samples 8 --attention flex"),
    "training_1b_branch": (training_step.main, "--size 1b --samples 8 --checkpointing encoder --no-plan"),
    "training_1b_flex": (
        training_step.main,
        "--size 1b --samples 8 --checkpointing encoder --attention flex --no-plan",
    ),
    "answering": (
        answering.main,
        "--device cuda --size 7b --dtype bfloat16 --questions 4 --new-tokens 8 --repetitions 3",
    ),
}


def main(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or COMMANDS:
        benchmark, words = COMMANDS[name]
        start = time.perf_counter()
        with (folder / f"{name}.txt").open("w") as file, redirect_stdout(file):
            try:
                benchmark([*shlex.split(words), "--json", str(folder / f"{name}.json")])
            except (Exception, SystemExit):
                traceback.print_exc(file=file)
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - start:.0f} s\n{(folder / f'{name}.txt').read_text()}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
