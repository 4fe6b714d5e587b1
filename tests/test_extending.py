"""The README's two extensions, as they stand there, in one run, and its model that is built by hand."""

import json
import re
import sys

import pytest
import torch
import yaml

from tests.helpers.command_line import CONFIG, lit_mm_anew
from tests.helpers.environment import ROOT
from tests.helpers.media import draw


def blocks() -> list[str]:
    """Python of the README, in order: an encoder, a data format."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block for block in found if "class " in block]


def test_each_extension_is_short():
    assert len(blocks()) == 2
    assert all(len(block.splitlines()) <= 20 for block in blocks())


def test_a_model_built_by_hand_answers(tmp_path, monkeypatch, capsys):
    """All names of the block are public, and the answer is the model's own."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in found if "MatryoshkaVLM" in block]
    draw(tmp_path / "photo.jpg", (300, 200), "red")
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    names: dict = {}
    exec(code.replace("photo.jpg", str(tmp_path / "photo.jpg")), names)
    model, asked = names["model"], "what color is the shape?"
    assert {str(scale) for scale in model.scales} == {"16", "4", "1"}
    answer = model.answer(tmp_path / "photo.jpg", asked, tokens=4, max_new_tokens=8)
    assert answer.visual_tokens == 4 and capsys.readouterr().out == f"{answer.text}\n"


@pytest.mark.slow
def test_a_run_with_ones_own_encoder_and_format(tmp_path, monkeypatch):
    for block in blocks():
        name = re.match(r"# (\w+)\.py", block)[1]
        (tmp_path / f"{name}.py").write_text(block)
    draw(tmp_path / "a.png", (64, 64), "red")
    items = [{"image": "a.png", "query": "what color is it?", "answers": ["red", "dark red"]}] * 4
    (tmp_path / "train.json").write_text(json.dumps(items))
    config = yaml.safe_load(CONFIG)
    config["model"]["encoder"] = {"class_path": "my_encoder.PatchEncoder", "init_args": {"width": 32}}
    data = {"train": str(tmp_path / "train.json"), "image_root": str(tmp_path), "batch_size": 2, "image": {"size": 64}}
    config["data"] = {"class_path": "my_data.MyInstructions", "init_args": data}
    config["trainer"] = {"accelerator": "cpu", "max_steps": 2, "default_root_dir": str(tmp_path / "runs")}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lit_mm_anew("fit", "--config", str(tmp_path / "my.yaml"))
    assert (tmp_path / "runs/version_0/checkpoints/last.ckpt").is_file()
    assert sys.version_info >= (3, 11)
