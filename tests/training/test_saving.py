"""Checkpoints are whole, a failed start writes nothing, and `--ckpt_path` finds what is meant."""

import errno
import json
import re

import fsspec
import pytest
import torch
import yaml

from lit_mm.__main__ import main
from lit_mm.training import saving
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.saving import WholeFiles, check_readable, check_room
from tests.helpers.command_line import CONFIG


@pytest.fixture
def fit(instruction_set, monkeypatch):
    """A small fit in this process; further arguments win. A message in place of an error."""
    monkeypatch.chdir(instruction_set)
    config = yaml.safe_load(CONFIG)
    config["trainer"] |= {"default_root_dir": "runs", "limit_val_batches": 0, "enable_progress_bar": False}
    config["data"]["init_args"] |= {"train": "train.json", "val": "val.json", "test": "val.json", "image_root": "."}
    (instruction_set / "exp.yaml").write_text(yaml.safe_dump(config))

    def call(verb="fit", *arguments):
        try:
            main([verb, "--config", "exp.yaml", *arguments])
        except SystemExit as end:
            return str(end.code)
        return None

    return call


def test_a_refused_resume_writes_nothing(fit, instruction_set):
    assert fit() is None
    folder = instruction_set / "runs/version_0"
    before = {file: file.read_bytes() for file in (folder / "checkpoints/last.ckpt", folder / "config.yaml")}
    said = fit("fit", "--ckpt_path", "last", "--data.batch_size", "2", "--trainer.max_steps", "5")
    assert "stopped in mid-epoch, after batch 3, where settings of the batches must not change" in said
    assert before == {file: file.read_bytes() for file in before}
    assert fit("fit", "--ckpt_path", "last", "--trainer.max_steps", "5", "--model.parts.llm.lr", "1e-5") is None
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    assert (folder / "config.yaml").read_bytes() == before[folder / "config.yaml"]
    assert [run.name for run in (instruction_set / "runs").iterdir()] == ["version_0"]


def test_a_failed_start_leaves_no_folder(fit, instruction_set):
    (instruction_set / "images/3.png").unlink()
    assert "missing image" in fit()
    assert not (instruction_set / "runs/version_0").exists()


def test_a_run_without_checkpoints_keeps_its_logs_when_it_fails(fit, instruction_set, monkeypatch):
    def broken(module, batch, batch_idx):
        if batch_idx:
            raise ValueError("in the second batch")
        return step(module, batch, batch_idx)

    step = LitMatryoshka.training_step
    monkeypatch.setattr(LitMatryoshka, "training_step", broken)
    assert "in the second batch" in fit("fit", "--trainer.enable_checkpointing", "false", "--trainer.max_steps", "2")
    assert (instruction_set / "runs/version_0/config.yaml").exists()


def test_a_folder_that_takes_no_checkpoint_stops_the_run_before_training(fit, instruction_set, monkeypatch):
    (instruction_set / "taken").write_text("a file")
    assert "checkpoints cannot be written to" in fit("fit", "--checkpoint.dirpath", "taken/here")
    assert not (instruction_set / "runs/version_0").exists()

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.Path, "write_bytes", full)
    assert "No space left on device" in fit()


def test_a_disk_that_is_too_full_for_the_weights_is_refused(tmp_path, monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(1000))]
    check_room(tmp_path, parameters)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 11_999}))
    with pytest.raises(OSError, match="a checkpoint takes about"):
        check_room(tmp_path, parameters)  # 4,000 bytes of weights and twice as much of AdamW's


def test_an_interrupted_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, file)

    def dies(checkpoint, opened):
        opened.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(saving.torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        WholeFiles().save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_a_checkpoint_cut_short_is_named_and_others_offered(tmp_path, kept):
    for name in ("step=1.ckpt", "last.ckpt"):
        WholeFiles().save_checkpoint({"state_dict": {"weight": torch.zeros(1000)}}, tmp_path / name)
    check_readable(tmp_path / "last.ckpt")
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: int(kept if kept != 0.5 else len(whole) / 2)])
    with pytest.raises(ValueError, match=r"last.ckpt \(\d+ bytes\) is truncated or not a checkpoint; .*step=1.ckpt"):
        check_readable(tmp_path / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["false", "lightning.pytorch.loggers.CSVLogger"])
def test_last_and_best_are_found_whatever_the_logger(fit, instruction_set, logger, capsys):
    options = ["--trainer.logger", logger, *(["--trainer.logger.save_dir", "runs"] if logger != "false" else [])]
    watched = [
        "--checkpoint.monitor",
        "val/loss",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.val_check_interval",
        "1",
    ]
    assert fit("fit", *options, *watched, "--checkpoint.filename", "found") is None
    for asked in ("last", "best", "runs", str(next(instruction_set.glob("runs/**/found.ckpt")))):
        assert fit("validate", *options, "--trainer.limit_val_batches", "1", "--ckpt_path", asked) is None, asked


def test_judging_without_a_checkpoint_is_refused(fit):
    for verb in ("validate", "test", "predict"):
        assert f"{verb} needs trained weights: --ckpt_path last" in fit(verb)
    assert "no checkpoints/last.ckpt below" in fit("test", "--ckpt_path", "last")
    assert "no checkpoint nowhere.ckpt" in fit("test", "--ckpt_path", "nowhere.ckpt")


def test_a_checkpoint_is_used_as_the_model_it_was_trained_as(fit, instruction_set, capsys):
    """Adaptive pooling cuts its boxes along all scales: [4] alone would be another model than [16, 4, 1]."""
    assert fit("fit", "--model.pooling", "adaptive") is None
    for wrong in (["--model.scales", "[4]"], ["--model.sampling", "spatial"], ["--model.llm.chat_template", "plain"]):
        said = fit("test", "--model.pooling", "adaptive", "--ckpt_path", "last", *wrong)
        assert "another model" in said or "adaptive goes with" in said, wrong
    assert "pooling was 'adaptive' and is 'exact'" in fit("test", "--ckpt_path", "last")
    assert "--scales: 9 is not among the model's 16, 4, 1" in fit("test", "--ckpt_path", "last", "--scales", "[9]")
    (instruction_set / "ask.json").write_text('{"question_id": 1, "text": "is it?"}')
    for verb, scales in (("validate", "[4]"), ("predict", "4"), ("test", "4")):
        options = ["--data.predict", str(instruction_set / "ask.json"), "--ckpt_path", "last", "--scales", scales]
        assert fit(verb, "--model.pooling", "adaptive", *options) is None
    [line] = (instruction_set / "runs/version_0/answers_0/answers.jsonl").read_text().splitlines()
    assert json.loads(line)["scale"] == "4"
    figures = json.loads((instruction_set / "runs/version_0/accuracy_tokens.json").read_text())
    assert [row["scale"] for row in figures["scales"]] == ["4"]


def test_other_scales_of_exact_pooling_are_told(fit, capsys):
    assert fit() is None
    with pytest.warns(
        UserWarning, match=r"the checkpoint was trained differently: scales was \[16, 4, 1\] and is \[4, 1\]"
    ):
        assert fit("test", "--ckpt_path", "last", "--model.scales", "[4,1]") is None


class Code:
    """What weights_only does not load."""


def test_what_is_no_checkpoint_of_this_model_is_refused_in_one_line(fit, instruction_set):
    assert fit() is None
    last = instruction_set / "runs/version_0/checkpoints/last.ckpt"
    wrong = {"code.ckpt": {"state_dict": {}, "more": Code()}, "weights.ckpt": {"weight": torch.zeros(2)}}
    for name, content in wrong.items():
        torch.save(content, instruction_set / name)
    said = {name: fit("test", "--ckpt_path", name) for name in wrong}
    assert "code.ckpt holds more than tensors" in said["code.ckpt"]
    assert "not a checkpoint of a run; --model.init_from" in said["weights.ckpt"]
    said["other"] = fit("test", "--ckpt_path", str(last.parent), "--model.llm.config_overrides.intermediate_size", "40")
    assert "the checkpoint is of another model: size mismatch for vlm.llm" in said["other"]
    torch.save({"state_dict": {}, "callbacks": Code()}, last)
    said["best"] = fit("test", "--ckpt_path", "best")
    assert "last.ckpt holds more than tensors" in said["best"]
    assert all("\n" not in each for each in said.values())


def test_a_metric_in_a_file_name_makes_no_folder(fit, instruction_set):
    validated = ["--trainer.limit_val_batches", "1", "--checkpoint.monitor", "val/loss"]
    name = "{step}-{val/loss:.1f}-{val/accuracy@16:.2f}-{epoch}"
    assert fit("fit", *validated, "--checkpoint.filename", name) is None
    [best] = {file.name for file in instruction_set.glob("runs/version_0/checkpoints/*")} - {"last.ckpt"}
    assert re.fullmatch(r"step=3-val_loss=\d\.\d-val_accuracy@16=[01]\.\d\d-epoch=0\.ckpt", best)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--checkpoint.monitor", "train/los"], "Checkpoints: nothing logs train/los, do you mean train/loss?"),
        (["--checkpoint.monitor", "val/loss"], "Checkpoints: nothing logs val/loss"),  # without validation
        (["--checkpoint.filename", "{stp}-{epoch}"], "Checkpoints: nothing logs stp, do you mean step?"),
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "train/loss@8"],
            "EarlyStopping: nothing logs train/loss@8, do you mean train/loss@",
        ),
    ],
)
def test_a_metric_that_nothing_logs_is_told_at_start(fit, instruction_set, arguments, told):
    assert told in fit("fit", *arguments)
    assert not (instruction_set / "runs/version_0").exists()


@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_another_progress_bar_takes_the_place_of_ours(fit, bar):
    assert fit("fit", "--trainer.enable_progress_bar", "true", "--trainer.callbacks", bar) is None


def test_the_records_of_a_first_step_that_is_not_finite_are_kept(fit, instruction_set, monkeypatch):
    monkeypatch.setattr("lit_mm.training.module.clip", lambda *_: torch.tensor(float("nan")))
    message = fit("fit")
    assert "step 0: the gradient norm is nan" in message
    assert "Traceback" not in message
    assert (instruction_set / "runs/version_0/not_finite.step_0.rank_0.json").exists()


def test_a_remote_checkpoint_is_no_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WholeFiles().save_checkpoint({"step": 1}, "memory://runs/last.ckpt")
    with fsspec.open("memory://runs/last.ckpt") as file:
        assert torch.load(file, weights_only=True) == {"step": 1}
    assert not list(tmp_path.iterdir())
