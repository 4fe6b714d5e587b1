"""`python -m lit_mm` on a small configuration: in a process of its own, or in one that has imported it already."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.helpers.environment import ROOT, TOKENIZER
from tests.helpers.processes import SERVER, environment_of, free_port

CONFIG = f"""
seed_everything: 3
model:
  scales: [16, 4, 1]
  encoder:
    class_path: lit_mm.ConvNeXtEncoder
    init_args:
      backbone: convnext_atto
      overrides: {{patch_size: 1, depths: [1, 1, 1, 1], dims: [8, 8, 12, 16], kernel_sizes: 3}}
      extra_stages: [{{depth: 1, width: 24}}]
  llm:
    name_or_path: LlamaConfig
    config_overrides: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4, intermediate_size: 48}}
    tokenizer: {TOKENIZER}
    chat_template: bare
  init_gain: 1.0
  max_new_tokens: 3
data:
  class_path: lit_mm.ImageDataModule
  init_args:
    image: {{mode: keep, size: null}}
    batch_size: 4
trainer: {{accelerator: cpu, max_steps: 3, val_check_interval: 3}}
"""


OFFLINE = {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def lit_mm(*arguments: str) -> str:
    """What a command prints that must end well, in a process that has imported everything already."""
    with tempfile.TemporaryDirectory() as folder:
        status, printed = forked([*arguments], Path(folder) / "log.txt")
    assert status == 0, f"{arguments}: {printed}"
    return printed


def lit_mm_anew(*arguments: str) -> str:
    """The same by `python -m lit_mm`."""
    command = [sys.executable, "-m", "lit_mm", *arguments]
    options = {"cwd": ROOT, "env": os.environ | OFFLINE, "text": True, "timeout": 300}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options)
    assert done.returncode == 0, f"{arguments}: {done.stdout}"
    return done.stdout


def forked(arguments: list[str], log: Path, *, ranks: int = 1, seconds: float = 300) -> tuple[int, str]:
    """A command in such a process, or in one for each rank as torchrun starts them: the first exit status that is not
    0, and what they printed."""
    logs, port = [log.with_suffix(f".{rank}.txt") for rank in range(ranks)], free_port()
    told = [environment_of(rank, ranks, port) for rank in range(ranks)] if ranks > 1 else [{}]
    processes = [begun(arguments, own, environment) for own, environment in zip(logs, told, strict=True)]
    for process in processes:
        process.join(seconds)
    statuses = [process.exitcode for process in processes]
    return next(filter(None, statuses), statuses[-1]), "".join(own.read_text() for own in logs)


def begun(arguments: list[str], log: Path, environment: dict[str, str]) -> BaseProcess:
    """A command that has begun in such a process."""
    process = SERVER.Process(target=main_of, args=(arguments, str(log), environment))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():  # for the server, which the first process starts
            patch.setenv(name, value)
        process.start()
    return process


def main_of(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """What the process does."""
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.chdir(ROOT)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as on the command line, for the loader's processes
    sys.argv = ["lit_mm", *arguments]
    runpy.run_module("lit_mm", run_name="__main__", alter_sys=True)


def configs(*names: str) -> list[str]:
    """Overlays as arguments of the command line."""
    return [f"--config={ROOT / 'experiments' / name}.yaml" for name in names]
