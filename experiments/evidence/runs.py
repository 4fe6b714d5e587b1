"""Trains and tests arms in processes of their own, each once: a run is found again by its settings.

A run's folder has state.json (the command, the seconds of every finished step, commit, date), log.txt, and what
lit_mm writes. A step that is in state.json is not repeated; an interrupted training goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from experiments.evidence.claims import Arm, Set

LIT_MM = (sys.executable, "-m", "lit_mm")


class OutOfTime(Exception):
    """The budget is used up."""


class Failed(Exception):
    """A step of a run failed; the message names it."""


def merged(into: Any, further: Any) -> Any:
    """Two configs, of which the second overrides the first."""
    if not (isinstance(into, dict) and isinstance(further, dict)):
        return further
    return into | {name: merged(into.get(name), value) for name, value in further.items()}


def resolved(configs: Sequence[Path], options: Sequence[str]) -> dict[str, Any]:
    """What config files and `--a.b value` or `--a.b=value` say together.

    Raises:
        ValueError: An option has no value.
    """
    found: dict[str, Any] = {}
    for config in configs:
        found = merged(found, yaml.safe_load(config.read_text(encoding="utf-8")))
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ValueError(f"expected options as --FIELD VALUE, found {shlex.join(options)}")
    for name, value in zip(words[::2], words[1::2], strict=True):
        nested: Any = yaml.safe_load(value)
        for part in reversed(name[2:].split(".")):
            nested = {part: nested}
        found = merged(found, nested)
    return found


@dataclass
class Run:
    """An arm with one seed.

    Args:
        arm: The arm.
        seed: Of weights and of the records' order.
        folder: Its place.
        words: The command line of fit and test, without the verb.
    """

    arm: Arm
    seed: int
    folder: Path
    words: list[str]

    @property
    def state(self) -> dict[str, Any]:
        """What is known of it."""
        file = self.folder / "state.json"
        return json.loads(file.read_text()) if file.is_file() else {"seconds": {}}

    @property
    def steps(self) -> dict[str, list[str]]:
        """Name -> command of each step, in order."""
        root = ["--trainer.default_root_dir"]
        checkpoint = str(self.folder / "version_0")
        found = {"fit": ["fit", *self.words, *root, str(self.folder)]}
        if self.arm.judged:
            words = [*self.arm.judged, *root, str(self.folder / self.judged_as), "--ckpt_path", checkpoint]
            return found | {self.judged_as: ["test", *self.words, *words]}
        test = ["test", *self.words, *root, str(self.folder), "--ckpt_path", checkpoint]
        return found | (
            {"calibrate": ["calibrate", checkpoint], "test_auto": test} if self.arm.auto else {"test": test}
        )

    @property
    def judged_as(self) -> str:
        """The name of a test with fields of its own."""
        return f"test_{_digest(self.arm.judged)}" if self.arm.judged else "test"

    @property
    def results(self) -> Path:
        """The folder with accuracy_tokens.json and .parquet."""
        return (self.folder / self.judged_as if self.arm.judged else self.folder) / "version_0"

    @property
    def missing(self) -> list[str]:
        """Names of the steps that are left."""
        return [name for name in self.steps if name not in self.state["seconds"]]

    def note(self, **further: Any) -> None:
        """Write state.json with further facts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "state.tmp"
        partial.write_text(json.dumps(self.state | further, indent=1) + "\n")
        partial.replace(self.folder / "state.json")


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


@dataclass
class Runs:
    """The runs of a set.

    Args:
        set: The set.
        folder: Of all its runs.
        options: Fields of the command line for every arm.
        deadline: Of `time.monotonic`; a step that runs longer is interrupted.
        program: The command line's program.
    """

    set: Set
    folder: Path
    options: tuple[str, ...] = ()
    deadline: float = float("inf")
    program: Sequence[str] = LIT_MM

    def find(self, arm: Arm, seed: int) -> Run:
        """The run of an arm, made or not. The folder's name has a hash of all settings but the data's place."""
        configs = [self.set.config, *self.set.overlays, *arm.overlays]
        options = [*arm.options, *self.options, "--seed_everything", str(seed)]
        options += ["--data.init_args.seed", str(seed)] if self.set.seeded else []
        settings = resolved(configs, options)
        words = [word for config in configs for word in ("--config", str(config))] + [*self.set.options, *options]
        return Run(arm, seed, self.folder / f"{arm.name}_seed{seed}_{_digest(settings)}", words)

    def make(self, run: Run) -> None:
        """Do the steps of a run that are left.

        Raises:
            Failed: A step failed; it is tried again the next time.
            OutOfTime: The deadline came first.
            KeyboardInterrupt: Ctrl-C; the step's process has saved and ended.
        """
        for name in run.missing:
            command = run.steps[name]
            if name == "fit":
                command = command + self._resumed(run)
                run.note(command=shlex.join(["python", "-m", "lit_mm", *run.steps[name]]), **_here())
            elif name.startswith("test_"):
                shutil.rmtree(run.folder / name, ignore_errors=True)
            before, start = run.state.get(f"{name} before", 0.0), time.monotonic()
            try:
                status = self._process(command, run.folder / "log.txt")
            finally:
                run.note(**{f"{name} before": before + time.monotonic() - start})
            if status:
                log = run.folder / "log.txt"
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise Failed(f"{run.folder.name}: {name} ended with status {status}: {' '.join(last)[-300:]} ({log})")
            run.note(seconds=run.state["seconds"] | {name: run.state[f"{name} before"]})

    def _resumed(self, run: Run) -> list[str]:
        """Options with which a training goes on; what an interrupted one left without a checkpoint is removed."""
        last = run.folder / "version_0/checkpoints/last.ckpt"
        if last.is_file():
            return ["--ckpt_path", str(last)]
        for left in run.folder.glob("version_*"):
            shutil.rmtree(left)
        return []

    def _process(self, command: Sequence[str], log: Path) -> int:
        """The status of a command, which is interrupted at the deadline or by Ctrl-C, and may then save."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        with log.open("ab") as file:
            file.write(f"\n$ python -m lit_mm {shlex.join(command)}\n".encode())
            file.flush()
            # children of a shell's background job would ignore SIGINT
            heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            own: dict[str, Any] = {"stdout": file, "stderr": file, "start_new_session": True, "preexec_fn": heed}
            process = subprocess.Popen([*self.program, *command], **own)
            try:
                return process.wait(None if left == float("inf") else left)
            except subprocess.TimeoutExpired:
                raise OutOfTime from None
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    process.wait()

    def expected(self, claim_arms: Sequence[Arm], seed: int) -> float:
        """Seconds that the arms of a claim still take, by the mean of the runs that are finished; 0 if none is."""
        states = [json.loads(file.read_text()) for file in self.folder.glob("*/state.json")]
        known = [sum(state["seconds"].values()) for state in states if "fit" in state["seconds"]]
        left = {run.folder for run in (self.find(arm, seed) for arm in claim_arms) if "fit" in run.missing}
        return len(left) * sum(known) / len(known) if known else 0.0


def _here() -> dict[str, str]:
    """Today and the commit."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"date": str(date.today()), "commit": found.stdout.strip() or "unknown"}
