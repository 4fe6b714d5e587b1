"""A model that was trained at one scale and is judged at coarser ones: every output says so."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

from lit_mm import load
from lit_mm.callbacks.efficiency_report import draw, in_short, markdown, sets_cells
from lit_mm.data.images import ImageOptions
from lit_mm.evaluation import oracle_report
from tests.helpers.command_line import CONFIG, lit_mm
from tests.helpers.records import write_instruction_set


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was trained at 16 tokens, then tested at 16, 4 and 1; and what the test printed."""
    root = write_instruction_set(tmp_path_factory.mktemp("untrained").resolve())
    config = yaml.safe_load(CONFIG)
    config["model"]["scales"] = [16]
    config["trainer"]["default_root_dir"] = str(root / "runs")
    files = {"train": "train.json", "val": "val.json", "test": "val.json"}
    config["data"]["init_args"] |= {name: str(root / file) for name, file in files.items()}
    config["data"]["init_args"]["image_root"] = str(root)
    (root / "exp.yaml").write_text(yaml.safe_dump(config))
    lit_mm("fit", "--config", str(root / "exp.yaml"))
    told = ("--config", str(root / "exp.yaml"), "--ckpt_path", "last", "--model.scales", "[16, 4, 1]")
    return root / "runs/version_0", lit_mm("test", *told)


@pytest.fixture(scope="module")
def result(run):
    return json.loads((run[0] / "accuracy_tokens.json").read_text())


def test_json_and_tables_name_them(run, result):
    folder, printed = run
    trained = {"16": True, "4": False, "1": False}
    assert {row["scale"]: row["trained"] for row in result["scales"]} == trained
    assert {row["scale"]: row["trained"] for row in result["oracle"]["scales"]} == trained
    for text in (printed, markdown(result), oracle_report.markdown(result["oracle"])):
        assert "4 (untrained)" in text and "1 (untrained)" in text and "16 (untrained)" not in text
    assert [line[0] for line in sets_cells([result, result])[1:]] == ["16", "4 (untrained)", "1 (untrained)"]
    assert json.loads((folder / "accuracy_tokens_val.json").read_text())["scales"][0]["trained"]
    typed = result | {"types": {kind: {"accuracy": [0.9, 0.8, 0.1]} for kind in ("a", "b")}}
    assert "1 token (untrained)" in in_short(typed)[0] and "16 tokens:" in in_short(typed)[0]


def test_tensorboard_names_them(run):
    events = EventAccumulator(str(run[0]), {TENSORS: 0})
    events.Reload()
    [table] = events.Tensors("test/table/text_summary")
    assert "4 (untrained)" in table.tensor_proto.string_val[0].decode()


def test_pictures_show_hollow_markers(result):
    for figure in (draw(result), oracle_report.draw(result["oracle"])):
        [line] = [line for line in figure.axes[0].lines if line.get_label() == "not trained at this scale"]
        assert line.get_markerfacecolor() == "white" and len(line.get_xdata()) == 2
        assert max(line.get_xdata()) < 16
    for row in (*result["scales"], *result["oracle"]["scales"]):
        row["trained"] = True
    for figure in (draw(result), oracle_report.draw(result["oracle"])):
        assert not [line for line in figure.axes[0].lines if line.get_label() == "not trained at this scale"]


def test_load_takes_other_scales(run):
    folder, _ = run
    plain, pooled = load(folder), load(folder, scales=[16, 4, 1])
    assert plain.scales == plain.trained_scales == pooled.trained_scales == [16]
    assert pooled.scales == [16, 4, 1]
    picture = folder.parent.parent / "images/1.png"
    answers = pooled.answer(picture, "what color is the shape?", "all")
    assert answers["16"].ids == plain.answer(picture, "what color is the shape?").ids
    assert answers["4"].visual_tokens == 4
    pixels = np.array(Image.open(picture).convert("RGB"))
    assert load(folder, image=ImageOptions("keep", None), scales=[4]).answer(pixels, "what?").visual_tokens == 4


def test_adaptive_pooling_depends_on_the_scales(run, tmp_path):
    import torch

    saved = torch.load(run[0] / "checkpoints/last.ckpt", weights_only=True)
    saved["hyper_parameters"]["pooling"] = saved["identity"]["pooling"] = "adaptive"
    (tmp_path / "checkpoints").mkdir()
    torch.save(saved, tmp_path / "checkpoints/last.ckpt")
    assert load(tmp_path / "checkpoints/last.ckpt").scales == [16]
    with pytest.raises(ValueError, match=r"with pooling adaptive expected those of training, \[16\], found \[16, 4\]"):
        load(tmp_path / "checkpoints/last.ckpt", scales=[16, 4])
