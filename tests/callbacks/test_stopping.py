"""Signals end real processes between two batches, whatever the verb, with the status that shells have for them."""

import json
import signal

import pytest
import yaml

from lit_mm.__main__ import main
from lit_mm.callbacks.stopping import REASONS, StopBetweenBatches
from tests.helpers.command_line import CONFIG, forked
from tests.helpers.records import conversation
from tests.helpers.runs import fit


def start(root, verb: str, way: str, after: int, *options: str) -> tuple[int, str]:
    """Run a verb whose process gets a signal at the beginning of a batch: its exit status and what it printed."""
    where = {"fit": "train", "validate": "validation"}.get(verb, verb) + "_batch_start"
    ending = {"folder": str(root), "way": way, "after": after, "where": where}
    files = {split: str(root / f"{split}.json") for split in ("train", "val", "test", "predict")}
    config = yaml.safe_load(CONFIG)
    config["trainer"] |= {"default_root_dir": str(root / "runs"), "max_steps": 10_000, "val_check_interval": 1.0}
    config["trainer"] |= {"callbacks": [{"class_path": "tests.helpers.killing.Recorder", "init_args": ending}]}
    config["data"]["init_args"] |= {**files, "image_root": str(root), "eval_batch_size": 2}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    log = root / f"{verb}-{way}.txt"
    arguments = [verb, "--config", str(root / "config.yaml"), *options]
    return forked(arguments, log, seconds=120)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_every_verb_stops_between_batches(instruction_set, way, status):
    items = [{"id": str(n), "conversations": conversation(("is a red shape red?", "yes"))} for n in range(10)]
    for split in ("val", "test", "predict"):
        (instruction_set / f"{split}.json").write_text(json.dumps(items))
    run = instruction_set / "runs/version_0"
    ended, printed = start(instruction_set, "fit", way, 3)
    assert ended == status, printed
    last = (run / "checkpoints/last.ckpt").read_bytes()
    for verb in ("validate", "test", "predict"):
        ended, printed = start(instruction_set, verb, way, 4, "--ckpt_path", "last")
        assert ended == status, printed
        assert f"{way}: stopping before the next batch" in printed
        assert f"{verb} stopped after 3 batches: " in printed
        assert "Traceback" not in printed
    for scale in (16, 4, 1):
        answers = next(run.glob(f"answers_*/answers@{scale}.jsonl")).read_text().splitlines()
        assert len([json.loads(line)["text"] for line in answers]) == 6
    assert not list(run.glob("accuracy_tokens*"))
    assert (run / "checkpoints/last.ckpt").read_bytes() == last


def test_ctrl_c_before_the_first_batch(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_mm.cli.LitMMCLI", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "some.yaml"])
    assert stopped.value.code == 130


def test_signals_are_given_back(instruction_set, tmp_path):
    """After a fit with validations, and after a validation."""
    before = [signal.getsignal(number) for number in REASONS]
    lit, trainer = fit(instruction_set, tmp_path, max_steps=4, callbacks=[StopBetweenBatches()])
    assert [signal.getsignal(number) for number in REASONS] == before
    trainer.validate(lit, trainer.datamodule, verbose=False)
    assert [signal.getsignal(number) for number in REASONS] == before
