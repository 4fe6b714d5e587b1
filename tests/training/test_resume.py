"""Exact resume: real processes are ended at random steps in every way, and go on. The batches and, to
the last bit, the weights and the optimizer's state must be those of a run that nothing disturbed."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.helpers.command_line import CONFIG, forked, lit_mm_anew
from tests.helpers.media import draw
from tests.helpers.records import conversation
from tests.helpers.runs import fit


def configuration() -> dict:
    """That of the command line's tests, with all that is random in training, and a checkpoint every other step."""
    config = yaml.safe_load(CONFIG)
    config["model"]["scales_per_step"] = 2
    config["model"]["encoder"]["init_args"]["overrides"]["drop_path_rate"] = 0.3
    config["model"]["llm"]["config_overrides"]["attention_dropout"] = 0.1
    config["checkpoint"] = {"every_n_train_steps": 2}
    config["token_efficiency"] = {"repetitions": 0}
    config["trainer"] = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False, "logger": False}
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """A mixture: images in LLaVA's format, text as chat messages, a shard of a webdataset."""
    root = tmp_path_factory.mktemp("sets")
    items, lines = [], []
    for number, color in enumerate(["red", "green", "blue", "teal"] * 4):
        draw(root / f"{number}.png", (64, 64) if number % 2 else (128, 32), color)
        turns = conversation(("<image>\nwhat color is the shape?", color))
        items.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        messages = [{"role": "user", "content": f"is there a {color} shape?" * (number % 3 + 1)}]
        lines.append(json.dumps({"messages": [*messages, {"role": "assistant", "content": "yes"}]}))
    (root / "train.json").write_text(json.dumps(items))
    (root / "val.json").write_text(json.dumps(items[:4]))
    (root / "text.jsonl").write_text("\n".join(lines[:9]))
    with tarfile.open(root / "shard.tar", "w") as shard:
        for number, item in enumerate(items[:5]):
            for suffix, content in (
                ("json", json.dumps(item).encode()),
                ("png", (root / f"{number}.png").read_bytes()),
            ):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    mixture = [
        {"path": str(root / "train.json")},
        {"path": str(root / "text.jsonl"), "epochs": 0.7},
        {"path": str(root / "shard.tar"), "epochs": 2},
    ]
    options = {
        "image": {"mode": "keep", "size": None},
        "image_root": str(root),
        "batch_size": 4,
        "val": f"{root}/val.json",
    }
    return {"train": mixture, "tokens_per_batch": 200, **options}


class Runs:
    """Runs of one configuration, in folders of their own."""

    def __init__(self, folder: Path, data: dict, workers: int, ranks: int, **trainer) -> None:
        self.folder, self.ranks = folder, ranks
        settings = {"class_path": "lit_mm.ImageDataModule", "init_args": {**data, "num_workers": workers}}
        limits = {"max_epochs": 2, "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", **trainer}
        config = configuration()
        self.config = config | {"data": settings, "trainer": config["trainer"] | limits}

    def run(self, name: str, *options: str, **ending) -> tuple[int, str]:
        """Exit status and what was printed."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        recorder = {"class_path": "tests.helpers.killing.Recorder", "init_args": {"folder": str(folder), **ending}}
        trainer = self.config["trainer"] | {"default_root_dir": str(folder), "callbacks": [recorder]}
        checkpoint = self.config["checkpoint"] | {"dirpath": str(folder / "version_0/checkpoints")}
        (folder / "config.yaml").write_text(
            yaml.safe_dump(self.config | {"trainer": trainer, "checkpoint": checkpoint})
        )
        arguments = ["fit", "--config", str(folder / "config.yaml"), *options]
        if name == "whole" and self.ranks > 1:
            return 0, lit_mm_anew(*arguments)  # where Lightning starts the other ranks
        return forked(arguments, folder / "log.txt", ranks=self.ranks)

    def batches(self, name: str) -> dict:
        """(epoch, batch, rank) -> what was in it; a batch that was trained twice was the same twice."""
        found: dict = {}
        for rank in range(self.ranks):
            for line in (self.folder / name / f"batches{rank}.jsonl").read_text().splitlines():
                row = json.loads(line)
                key = row["epoch"], row["batch"], rank
                value = row["digest"], row["drawn"], row["step"]
                assert found.setdefault(key, value) == value, f"batch {key} came again as another one"
        return found

    def validations(self, name: str) -> set[str]:
        file = self.folder / name / "validations.txt"
        return set(file.read_text().split()) if file.is_file() else set()

    def weights(self, name: str) -> str:
        return (self.folder / name / "weights.txt").read_text()

    def length(self) -> int:
        """Batches of the undisturbed run on each rank."""
        return len(self.batches("whole")) // self.ranks

    def check(self, name: str, **ending) -> None:
        """End a run, go on, compare."""
        status, printed = self.run(name, **ending)
        expected = {"SIGTERM": 143, "SIGINT": 130}.get(ending["way"], status) if self.ranks == 1 else status
        assert status == expected != 0, f"{ending}: {printed}"
        status, printed = self.run(name, "--ckpt_path", "last")
        assert status == 0, f"{ending}: {printed}"
        assert self.batches(name) == self.batches("whole"), ending
        assert self.weights(name) == self.weights("whole"), ending
        assert self.validations(name) <= self.validations("whole"), ending
        # one that was due at the step of the checkpoint is not made up for
        assert len(self.validations("whole") - self.validations(name)) <= 1, ending


def undisturbed(folder: Path, data: dict, workers: int, ranks: int, **trainer) -> Runs:
    runs = Runs(folder, data, workers, ranks, **trainer)
    status, printed = runs.run("whole")
    assert status == 0, printed
    return runs


WAYS = [
    {"way": "SIGTERM"},
    {"way": "SIGINT"},
    {"way": "SIGKILL"},
    {"way": "exception", "where": "train_batch_start"},
    {"way": "exception", "where": "before_zero_grad"},
    {"way": "exception", "where": "train_batch_end"},
    {"way": "exception", "where": "validation_batch_start"},
]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 2)])
def test_one_rank(tmp_path, data, workers, accumulate):
    when = {} if workers else {"check_val_every_n_epoch": None, "val_check_interval": 5}
    runs = undisturbed(tmp_path, data, workers, 1, accumulate_grad_batches=accumulate, limit_val_batches=1, **when)
    steps = random.Random(workers)
    for number, ending in enumerate(WAYS if workers == 0 else WAYS[:3] + WAYS[5:6]):
        first = 2 * accumulate + 1  # after the first checkpoint
        runs.check(f"ended{number}", after=steps.randint(first, runs.length() - 1), **ending)


@pytest.mark.slow
def test_two_ranks(tmp_path, data):
    """Loader processes or none: the batches are the same. One batch for validation: the second rank has none."""
    runs = undisturbed(tmp_path, data, 0, 2)
    for workers, way, rank in ((0, "SIGKILL", 0), (2, "SIGTERM", 1)):
        runs.config["data"]["init_args"]["num_workers"] = workers
        runs.check(way, after=random.Random(workers).randint(3, runs.length() - 1), rank=rank, way=way)


def test_a_finished_run_is_not_resumed_with_other_batches(instruction_set, tmp_path):
    """The fit would end without a step and without an error."""
    file = tmp_path / "finished.ckpt"
    _, trainer = fit(instruction_set, tmp_path, max_steps=2, limit_val_batches=0)  # of an epoch's four
    trainer.save_checkpoint(file)
    _, trainer = fit(instruction_set, tmp_path, ckpt_path=str(file), max_steps=2, limit_val_batches=0)
    assert trainer.global_step == 2
    with pytest.raises(ValueError, match=r"after batch 2, .*: batch_size was 4 and is 2"):
        fit(instruction_set, tmp_path, ckpt_path=str(file), data={"batch_size": 2}, max_steps=2, limit_val_batches=0)
