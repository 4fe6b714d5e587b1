"""The command line as a user meets it: help, overlays, round trips, wrong keys and paths, run folders."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from tensorboard.backend.event_processing import event_accumulator

from lit_mm.__main__ import HELP, main
from lit_mm.cli import LitMMCLI
from tests.helpers.browser import until
from tests.helpers.command_line import CONFIG, begun, lit_mm, lit_mm_anew
from tests.helpers.environment import ROOT
from tests.helpers.media import render
from tests.helpers.records import conversation


@pytest.fixture
def run(monkeypatch, capsys):
    """The same in this process, for what ends before training: (stopped with an error, stdout, stderr)."""

    def call(*arguments: str) -> tuple[bool, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", ["lit_mm", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        code, printed = stopped.value.code, capsys.readouterr()
        return code not in (0, None), printed.out, printed.err + (code if isinstance(code, str) else "")

    return call


@pytest.fixture
def experiment(instruction_set: Path) -> list[str]:
    """Arguments of a three-step run on an instruction set in a temporary folder."""
    config = yaml.safe_load(CONFIG)
    config["trainer"]["default_root_dir"] = str(instruction_set / "runs")
    files = {
        split: str(instruction_set / f"{'train' if split == 'train' else 'val'}.json")
        for split in ("train", "val", "test")
    }
    config["data"]["init_args"] |= {**files, "image_root": str(instruction_set)}
    (instruction_set / "exp.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(instruction_set / "exp.yaml")]


def test_no_arguments_help_without_heavy_imports():
    code = (
        "import sys, lit_mm.__main__ as m; m.main([]); m.main(['--help']); "
        "print([name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"{HELP}\n{HELP}\n[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"), [(["fit"], "fit needs an experiment"), (["train"], "unknown command 'train'")]
)
def test_missing_config_and_unknown_command_show_the_help(arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert HELP in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("command", ["calibrate", "export", "import"])
def test_commands_without_an_experiment_name_what_they_need(command, capsys):
    with pytest.raises(SystemExit):
        main([command])
    said = capsys.readouterr().err
    assert "the following arguments are required" in said
    assert "--config" not in said


def test_help_explains_every_field_of_the_model(run):
    text = " ".join(run("fit", "--help")[1].split())
    for words in (
        "Visual tokens per image, or per frame of a video, finest first",
        "Where the model comes from: a hub name",
        "Chat template. own: the tokenizer's",
        "Peak learning rate",
        "--model.encoder.help",
        "Image encoder: ConvNeXtEncoder",
    ):
        assert words in text, words
    text = " ".join(run("fit", "--model.encoder.help", "ConvNeXtEncoder")[1].split())
    assert "Name of a timm ConvNeXt or ConvNeXt-V2" in text
    text = " ".join(run("fit", "--data.help", "EasyVQADataModule")[1].split())
    assert "Training images held out for validation" in text


def test_printed_config_round_trips_and_overlays_win(run, experiment, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {scales: [16, 1]}\ntrainer: {max_steps: 7}\n")
    arguments = [
        *experiment,
        "--config",
        str(overlay),
        "--trainer.max_epochs",
        "2",
        "--model.encoder.drop_path",
        "0.25",
    ]
    failed, printed, error = run("fit", *arguments, "--print_config")
    assert not failed, error
    config = yaml.safe_load(printed)
    assert config["model"]["scales"] == [16, 1]
    assert (config["trainer"]["max_steps"], config["trainer"]["max_epochs"]) == (7, 2)
    assert config["model"]["encoder"]["init_args"]["drop_path"] == 0.25
    (tmp_path / "printed.yaml").write_text(printed)
    assert yaml.safe_load(run("fit", "--config", str(tmp_path / "printed.yaml"), "--print_config")[1]) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.scale", "[1]"], "model.scale"),
        (["--model.scales", "[16,3,1]"], "scales [3] do not divide a 2×8 grid, which allows [16, 4, 1]"),
        (["--model.scales", "[1,16]"], "finest first"),
        (["--model.llm.name_or_path", "LamaConfig"], "no such config class"),
        (["--model.llm.tokenizer", "./nowhere"], "no folder nowhere"),
        (
            ["--model.encoder.backbone", "resnet18", "--model.encoder.overrides", "{}"],
            "resnet18 is a ResNet, not a ConvNeXt",
        ),
        (["--model.encoder.backbone", "convnxt_atto"], "encoder.backbone convnxt_atto"),
        (["--trainer.accelerator", "gpu"], "error: "),
        (["--data.train", "nowhere.json"], "no instruction file nowhere.json"),
        (["--data.image_root", "nowhere"], "no folder nowhere"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--ckpt_path", "nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["--ckpt_path", "last"], "run fit first"),
        (["--data.batch_size", "0"], "error: data.batch_size: expected a positive number, found 0\n"),
        (["--data.batch_size", "many"], "Expected a <class 'int'>\n  Given value: many"),
        (["--data.num_workers", "-1"], "data.num_workers: expected 0 or more, found -1"),
        (["--data.batchsize", "4"], "did you mean batch_size?"),
        (
            ["--model.scheduler.warmup_steps", "10"],
            "Option 'warmup_steps' is not accepted by lit_mm.WarmupCosine, which takes optimizer, steps, warmup, floor"
            "\n  did you mean warmup?",
        ),
        (["--model.encoder.depth", "9"], "by lit_mm.ConvNeXtEncoder, which takes backbone, extra_stages, pretrained"),
        (["--model.llm.tokenizer", "tests"], "llm: tests"),
        (["--model.llm.tokenizer", "./tests"], "expected a folder with a tokenizer, found ["),
        (["--model.parts.llm.lora", "{r: 0}"], "parts.llm.lora.r: expected a positive number, found 0"),
        (["--model.consistency.weight", "-1"], "consistency.weight: expected a number of at least 0, found -1"),
        (["--model.consistency.teacher", "coarsest"], "model.consistency"),
        (["--model.consistency.weight", "1", "--model.scales", "[1]"], "model.consistency needs at least two scales"),
        (["--model.encoder.overrides", "{dims: [8, 8]}"], "encoder.backbone convnext_atto with"),
        (["--model.init_from", "README.md"], "README.md is not a checkpoint"),
        (["--trainer.strategy", "fsdpx"], "LIT_MM_TRACEBACK=1"),
        (["--trainer.strategy", "fsdp1"], "error: trainer.strategy: FSDP1 is gone, use fsdp"),
        (["--trainer.strategy.class_path", "lit_mm.FSDP1"], "  trainer.strategy: FSDP1 is gone, use fsdp"),
    ],
)
def test_mistakes_end_in_one_message(run, experiment, arguments, message):
    failed, _, error = run("fit", *experiment, *arguments)
    assert failed
    assert message in error
    assert "Traceback" not in error and "Namespace(" not in error


def test_a_checkpoint_of_fsdp1_is_told_from_one_of_fsdp(run, experiment, tmp_path):
    """By the names that Lightning gives a sharded model: `model` in FSDP1's, `state_dict` in FSDP's."""
    dcp.save({"model": {"vlm.weight": torch.ones(2)}}, checkpoint_id=tmp_path / "old.ckpt", no_dist=True)
    for strategy, said in (("fsdp", "is of FSDP1, which is gone"), ("auto", "is sharded: use trainer.strategy fsdp")):
        arguments = ["--ckpt_path", str(tmp_path / "old.ckpt"), "--trainer.strategy", strategy]
        failed, _, error = run("fit", *experiment, *arguments)
        assert failed
        assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  scales: [16]\n  scales: [4]\n", "line 2: duplicate key scales"),
        ("model:\n  scales: [16, 4\n", "line"),
        ("", "expected keys and values such as `model:`, found None"),
        ("- a\n", "found ['a']"),
    ],
)
def test_a_broken_config_is_named_with_its_fault(run, experiment, tmp_path, text, said):
    (tmp_path / "overlay.yaml").write_text(text)
    failed, _, error = run("fit", *experiment, "--config", str(tmp_path / "overlay.yaml"))
    assert failed
    assert f"--config {tmp_path / 'overlay.yaml'}: " in error
    assert said in error


@pytest.mark.parametrize(
    ("text", "meant"), [("model: {scale: [16]}", "model.scales"), ("data: {init_args: {batchsize: 4}}", "batch_size")]
)
def test_a_wrong_key_names_its_file_and_the_nearest_right_one(run, experiment, tmp_path, text, meant):
    (tmp_path / "overlay.yaml").write_text(text)
    failed, _, error = run("fit", *experiment, "--config", str(tmp_path / "overlay.yaml"))
    assert failed
    assert f"it is in {tmp_path / 'overlay.yaml'}\n  did you mean {meant}?" in error


def test_consistency_is_off_until_one_of_its_fields_is_given(run, experiment, tmp_path):
    def made(*arguments):
        return yaml.safe_load(run("fit", *experiment, *arguments, "--print_config")[1])["model"]["consistency"]

    assert made() is None
    defaults = {"weight": 1.0, "teacher": "finest", "temperature": 1.0, "start": 0}
    assert made("--model.consistency.weight", "0.5") == defaults | {"weight": 0.5}
    (tmp_path / "overlay.yaml").write_text("model: {consistency: {teacher: next_finer, start: 7}}")
    own = made("--config", str(tmp_path / "overlay.yaml"), "--model.consistency.temperature", "2")
    assert own == defaults | {"teacher": "next_finer", "start": 7, "temperature": 2.0}


def test_wrong_key_in_the_yaml_is_named(run, experiment, tmp_path):
    (tmp_path / "wrong.yaml").write_text("model: {llm: {sorce: x}}")
    failed, _, error = run("fit", *experiment, "--config", str(tmp_path / "wrong.yaml"))
    assert failed
    assert "sorce" in error


def test_the_last_checkpoint_is_the_end_of_the_run(experiment, instruction_set, monkeypatch):
    """Three steps, of which Lightning would keep two."""
    monkeypatch.setattr("sys.argv", ["lit_mm"])
    LitMMCLI(["fit", *experiment, "--checkpoint.every_n_train_steps=2", "--trainer.limit_val_batches=0"])
    last = torch.load(instruction_set / "runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3


def logged_steps(folder, scalar):
    """Steps of TensorBoard's events."""
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    return [event.step for event in events.Scalars(scalar)]


@pytest.mark.slow
def test_a_run_and_what_follows_share_a_folder(experiment, instruction_set):
    """fit, test, predict, resume and a second fit, as a user would run them."""
    runs = instruction_set / "runs"
    printed = lit_mm_anew("fit", *experiment)
    first = runs / "version_0"
    assert (first / "checkpoints/last.ckpt").is_file()
    assert yaml.safe_load((first / "config.yaml").read_text())["model"]["scales"] == [16, 4, 1]
    assert "left" in printed and "loss@16" in printed

    lit_mm("test", *experiment, "--ckpt_path", "last")
    figures = json.loads((first / "accuracy_tokens.json").read_text())
    assert [row["visual_tokens"] for row in figures["scales"]] == [16, 4, 1]
    assert figures["questions"] == 8
    assert figures["step"] == 3
    assert logged_steps(first, "test/accuracy@16") == logged_steps(first, "val/accuracy@16")[-1:] == [2]
    assert (first / "accuracy_tokens.png").read_bytes().startswith(b"\x89PNG")

    ask = instruction_set / "ask.jsonl"
    ask.write_text(json.dumps({"question_id": 5, "image": "images/1.png", "text": "what color is the shape?"}))
    lit_mm("predict", *experiment, "--ckpt_path", "last", "--data.predict", str(ask))
    [line] = (first / "answers_0/answers@4.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"question_id", "prompt", "text"}

    lit_mm("fit", *experiment, "--ckpt_path", "last", "--trainer.max_steps", "5")
    assert [folder.name for folder in runs.iterdir()] == ["version_0"]
    assert [file.name for file in first.glob("checkpoints/last*")] == ["last.ckpt"]
    checkpoint = torch.load(first / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    assert yaml.safe_load((first / "config.yaml").read_text())["ckpt_path"] is None
    lit_mm("fit", *experiment, "--trainer.enable_progress_bar", "false")
    assert (runs / "version_1/checkpoints/last.ckpt").is_file()


@pytest.mark.slow
def test_images_videos_and_text_in_one_run(experiment, instruction_set):
    """A mixture with nested sets of frames, budgets and two workers: fit, test, predict."""
    turns = conversation(("<video>\nwhat moves?", "a shape"))
    render(instruction_set / "a.mp4", times=[250 * number for number in range(20)], width=64, height=64)
    for name in ("video", "val_video"):
        (instruction_set / f"{name}.json").write_text(json.dumps([{"video": "a.mp4", "conversations": turns}] * 3))
    overlay = {
        "model": {"time_scales": [4, 2], "scales_per_step": 2},
        "data": {
            "class_path": "lit_mm.VideoDataModule",
            "init_args": {
                "train": [{"path": str(instruction_set / name)} for name in ("train.json", "video.json")],
                "val": str(instruction_set / "val_video.json"),
                "test": str(instruction_set / "val_video.json"),
                "video": {"max_frames": 6, "timestamps": True},
                "image": {"mode": "squash", "size": 64},
                "tokens_per_batch": 400,
                "num_workers": 2,
            },
        },
    }
    (instruction_set / "video.yaml").write_text(yaml.safe_dump(overlay))
    both = [*experiment, "--config", str(instruction_set / "video.yaml")]
    lit_mm("fit", *both, "--trainer.max_steps", "6")
    lit_mm("test", *both, "--ckpt_path", "last")
    figures = json.loads((instruction_set / "runs/version_0/accuracy_tokens.json").read_text())
    assert [row["visual_tokens"] for row in figures["scales"]] == [64, 16, 4, 32, 8, 2]
    ask = instruction_set / "ask.jsonl"
    ask.write_text(json.dumps({"question_id": 5, "video": "a.mp4", "text": "what moves?"}))
    lit_mm("predict", *both, "--ckpt_path", "last", "--data.predict", str(ask))
    assert (instruction_set / "runs/version_0/answers_0/answers@2x4.jsonl").is_file()


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_to_go_on_from(experiment, instruction_set):
    run = instruction_set / "runs/version_0"
    endless = ["fit", *experiment, "--trainer.max_steps", "100000", "--trainer.limit_val_batches", "0"]
    log = instruction_set / "log.txt"
    log.touch()
    fit = begun([*endless, "--checkpoint.every_n_epochs", "100000"], log, {})
    until(lambda: "loss@16" in log.read_text() or not fit.is_alive(), 120)
    assert not (run / "checkpoints/last.ckpt").exists()
    os.kill(fit.pid, signal.SIGINT)
    fit.join(60)
    assert fit.exitcode == 130, log.read_text()
    kept = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    more = str(kept["global_step"] + 2)
    lit_mm("fit", *experiment, "--ckpt_path", "last", "--trainer.max_steps", more)
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == int(more)
