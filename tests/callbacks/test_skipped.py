"""What was left out, as a table and in the logger."""

import json

import pytest

from lit_mm.callbacks.skipped import SkippedRecords
from tests.helpers.media import truncate
from tests.helpers.runs import fit


def spoil(root) -> None:
    """One record known to be bad before training, one that is found out by loading it."""
    items = json.loads((root / "train.json").read_text())
    items[1]["image"] = "images/gone.png"
    (root / "train.json").write_text(json.dumps(items))
    truncate(root / "images/2.png")


def test_a_table_at_the_end_of_every_epoch_and_numbers_for_the_logger(instruction_set, tmp_path, capsys):
    spoil(instruction_set)
    options = {"max_epochs": 2, "max_steps": -1, "limit_val_batches": 0, "callbacks": [SkippedRecords()]}
    with pytest.warns(UserWarning, match="skipped 1 of 14"):
        _, trainer = fit(instruction_set, tmp_path, data={"on_bad_record": "skip"}, **options)
    printed = capsys.readouterr().out
    assert "Records left out, to the end of epoch 0 (13 loaded)" in printed
    assert "Records left out, to the end of epoch 1 (26 loaded)" in printed
    last = printed[printed.rindex("Records left out") :]
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]]
        for line in last.splitlines()
        if line.startswith("│")
    }
    assert rows == {"missing image": ["1", "0"], "truncated image": ["0", "2"], "all": ["1", "2"]}
    assert trainer.callback_metrics["skipped/missing image"] == 1
    assert trainer.callback_metrics["skipped/truncated image"] == 2


def test_nothing_is_said_where_nothing_was_left_out(instruction_set, tmp_path, capsys):
    fit(instruction_set, tmp_path, max_epochs=1, max_steps=-1, limit_val_batches=0, callbacks=[SkippedRecords()])
    assert "left out" not in capsys.readouterr().out
