"""The picture, the JSON and the table hold the figures that the trainer measured."""

import json
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from lit_mm.callbacks.token_efficiency import TokenEfficiency, draw, table
from lit_mm.model.projector import ClipScale

SCALES = [16, 4, 1]


def trainer(folder):
    metrics = {
        f"test/accuracy@{scale}": torch.tensor(value) for scale, value in zip(SCALES, (0.9, 0.7, 0.5), strict=True)
    }
    return SimpleNamespace(
        callback_metrics=metrics,
        world_size=1,
        log_dir=str(folder),
        default_root_dir="",
        ckpt_path="x.ckpt",
        logger=None,
        global_step=0,
    )


def judged(folder) -> TokenEfficiency:
    """After two batches of a test."""
    callback = TokenEfficiency()
    callback.on_test_start(trainer(folder), None)
    for answers in (["yes", "yes", "no"], ["red"]):
        batch = SimpleNamespace(questions=[SimpleNamespace(answer=answer) for answer in answers])
        callback.on_test_batch_end(None, None, None, batch, 0)
    return callback


def test_json_and_picture(tmp_path, capsys):
    judged(tmp_path).on_test_end(trainer(tmp_path), SimpleNamespace(levels=SCALES))
    figures = json.loads((tmp_path / "accuracy_tokens.json").read_text())
    assert figures["majority_answer"] == 0.5
    assert figures["questions"] == 4
    assert [row["visual_tokens"] for row in figures["scales"]] == SCALES
    assert np.allclose([row["accuracy"] for row in figures["scales"]], [0.9, 0.7, 0.5])
    picture = np.asarray(Image.open(tmp_path / "accuracy_tokens.png").convert("L"))
    assert picture.shape == (600, 900)
    assert (picture < 200).mean() > 0.005  # something is drawn
    printed = capsys.readouterr().out
    assert "90.00" in printed
    assert "majority answer" in printed


def test_picture_and_table_show_every_scale(tmp_path):
    result = judged(tmp_path).result(trainer(tmp_path), SCALES)
    [axes] = draw(result).axes
    assert list(axes.lines[0].get_xdata()) == SCALES
    assert np.allclose(axes.lines[0].get_ydata(), [90, 70, 50])
    assert axes.lines[1].get_ydata()[0] == 50
    assert table(result).row_count == 4


def test_a_line_for_every_time_scale(tmp_path):
    levels = [ClipScale(frames, tokens) for frames in (8, 2) for tokens in (4, 1)]
    run = trainer(tmp_path)
    accuracies = zip(levels, (0.9, 0.8, 0.6, 0.5), strict=True)
    run.callback_metrics = {f"test/accuracy@{level}": torch.tensor(accuracy) for level, accuracy in accuracies}
    result = judged(tmp_path).result(run, levels)
    assert [row["visual_tokens"] for row in result["scales"]] == [32, 8, 8, 2]
    [axes] = draw(result).axes
    assert [line.get_label() for line in axes.lines[:2]] == ["8 sets of frames", "2 sets of frames"]
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[32, 8], [8, 2]]
    assert np.allclose(axes.lines[1].get_ydata(), [60, 50])
    assert next(iter(table(result).columns[0].cells)) == "8 x 4 = 32"
