"""A server that answers with a small trained model, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.helpers.command_line import CONFIG, OFFLINE, lit_mm
from tests.helpers.environment import ROOT
from tests.helpers.records import write_instruction_set


def trained_run(folder: Path) -> Path:
    """An instruction set in the folder, and the run that was trained on it by the command line."""
    folder = write_instruction_set(folder.resolve())
    config = yaml.safe_load(CONFIG)
    config["trainer"]["default_root_dir"] = str(folder / "runs")
    files = {split: str(folder / f"{split}.json") for split in ("train", "val")}
    config["data"]["init_args"] |= {**files, "predict": str(folder / "ask.jsonl"), "image_root": str(folder)}
    (folder / "exp.yaml").write_text(yaml.safe_dump(config))
    lit_mm("fit", "--config", str(folder / "exp.yaml"))
    return folder / "runs/version_0"


@contextmanager
def serving(run: Path, *options: str, log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """`python -m lit_mm serve` on a free port: its address and its process, which ends by SIGTERM.

    Raises:
        AssertionError: It ends before it listens; the message is what it printed.
    """
    command = [sys.executable, "-m", "lit_mm", "serve", "--ckpt_path", str(run), "--port", "0", *options]
    environment = os.environ | OFFLINE | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process,
    ):
        lines = iter(process.stdout.readline, "")
        printed = []
        try:
            for line in lines:
                printed.append(line)
                file.write(line)
                if address := re.search(r"http://\S+:\d+", line):
                    break
            else:
                raise AssertionError("".join(printed))
            copier = threading.Thread(target=lambda: [file.write(line) or file.flush() for line in lines])
            copier.start()
            yield address[0], process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        copier.join(10)
