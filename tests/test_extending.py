"""The extensions of docs/extending.md, as they stand there, in one run; a model built by hand."""

import importlib
import json
import re

import pytest
import torch
import yaml

from lit_mm import MatryoshkaProjector, load
from lit_mm.hub.export import export
from tests.helpers.command_line import CONFIG, lit_mm_anew
from tests.helpers.environment import ROOT
from tests.helpers.media import draw


def blocks() -> dict[str, str]:
    """Its Python files, by module."""
    text = (ROOT / "docs/extending.md").read_text()
    return dict(re.findall(r"```python\n# (my_\w+)\.py\n(.*?)```", text, re.DOTALL))


def test_each_extension_is_short():
    assert set(blocks()) == {"my_encoder", "my_data", "my_projector", "my_chooser"}
    assert all(len(block.splitlines()) <= 20 for block in blocks().values())


def test_the_benchmark_in_the_guide_is_the_one_that_is_tested():
    """`tests/evaluation/benchmarks/test_source.py` reads questions with the file."""
    [shown] = re.findall(r"```yaml\n(about: .*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL)
    file = ROOT / "experiments/evaluation/own_benchmark.yaml"
    assert yaml.safe_load(shown) == yaml.safe_load(file.read_text()) and len(shown.splitlines()) <= 20


def test_a_model_built_by_hand_answers(tmp_path, monkeypatch, capsys):
    """All names of the block are public, and the answer is the model's own."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
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
def test_a_run_with_ones_own_encoder_projector_format_and_chooser(tmp_path, monkeypatch):
    for name, block in blocks().items():
        (tmp_path / f"{name}.py").write_text(block)
    draw(tmp_path / "a.png", (64, 64), "red")
    items = [{"image": "a.png", "query": "what color is it?", "answers": ["red", "dark red"]}] * 4
    (tmp_path / "train.json").write_text(json.dumps(items))
    config = yaml.safe_load(CONFIG)
    config["model"]["encoder"] = {"class_path": "my_encoder.PatchEncoder", "init_args": {"width": 32}}
    config["model"]["projector"] = {"class_path": "my_projector.NormedProjector", "init_args": {"hidden": 2}}
    data = {"train": str(tmp_path / "train.json"), "image_root": str(tmp_path), "batch_size": 2, "image": {"size": 64}}
    config["data"] = {"class_path": "my_data.MyInstructions", "init_args": data}
    config["trainer"] = {"accelerator": "cpu", "max_steps": 2, "default_root_dir": str(tmp_path / "runs")}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lit_mm_anew("fit", "--config", str(tmp_path / "my.yaml"))
    assert (tmp_path / "runs/version_0/checkpoints/last.ckpt").is_file()

    monkeypatch.syspath_prepend(tmp_path)
    model = load(tmp_path / "runs/version_0", "cpu")
    projector = model.vlm.projector
    assert isinstance(projector, MatryoshkaProjector) and len(projector.layers) == 1 + 2 * 2 + 3
    chooser = importlib.import_module("my_chooser").ByWords(1, 16)
    assert model.answer(tmp_path / "a.png", "which number is it?", chooser).tried == [16]
    assert model.answer(tmp_path / "a.png", "what color is it?", chooser).tried == [1]
    with pytest.raises(ValueError, match="is a PatchEncoder"):
        export(model, tmp_path / "exported")
