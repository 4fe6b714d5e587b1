"""The sheets: every row is where it should be and nothing is cut off, and the records say what the rows say."""

import re
from dataclasses import replace

import numpy as np
import pytest

from lit_mm.data.records import parse
from lit_mm.data.rendered import SETS
from lit_mm.data.sheets import HEIGHT, SHEETS, WIDTH, make_sheet, render
from tests.helpers.records import exchanges, items


@pytest.mark.parametrize("number", range(12))
def test_every_row_is_drawn_whole_at_its_place(number):
    sheet = replace(make_sheet("test", number, seed=5), blur=0.0)
    pixels = np.asarray(render(sheet)).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH)
    inked = pixels < sum(sheet.tones) / 2
    assert not inked[:, :4].any()
    assert not inked[:, -4:].any(), "nothing is cut off at the sides"
    for place in range(len(sheet.rows)):
        without = replace(sheet, rows=tuple((" ",) if n == place else row for n, row in enumerate(sheet.rows)))
        others = np.asarray(render(without)) < sum(sheet.tones) / 2
        differs = np.flatnonzero(others.any(1) != inked.any(1))
        first, last = sheet.top + place * sheet.step, sheet.top + (place + 1) * sheet.step + sheet.size // 2
        assert ((differs >= first) & (differs < last)).all(), "a row has pixels in its own band alone"
    centers = [sheet.top + n * sheet.step + 3 * sheet.size // 4 for n in range(len(sheet.rows))]
    assert all(inked[center - sheet.size // 3 : center + sheet.size // 3].any() for center in centers)


def test_records_say_what_the_sheets_show(tmp_path):
    SHEETS.write(tmp_path, train=24, val=2, test=9, seed=3, workers=2)
    sheets = [make_sheet("train", number, seed=3) for number in range(24)]
    for sheet, item in zip(sheets, items(tmp_path, "captions"), strict=True):
        assert exchanges(item) == [("what is in the image?", "\n".join(" ".join(row) for row in sheet.rows))]
    for sheet, item in zip(sheets, items(tmp_path, "train"), strict=True):
        parse(item["id"], item)
        assert (tmp_path / item["image"]).read_bytes()
        for question, answer in exchanges(item):
            if found := re.fullmatch(r"what does line (\d+) say\?", question):
                assert answer == " ".join(sheet.rows[int(found[1]) - 1])
            else:
                label = re.fullmatch(r"what is the (\w+)\?", question)[1]
                assert [row for row in sheet.rows if row[0] == label] == [(label, answer)], "one row answers"
    assert {item["type"] for item in items(tmp_path, "test")} == {"line", "value"}


@pytest.mark.parametrize("drawn", SETS.values(), ids=SETS)
def test_several_processes_draw_what_one_draws(drawn, tmp_path):
    for name, workers in (("alone", 0), ("together", 2)):
        drawn.write(tmp_path / name, train=2, val=0, test=1, workers=workers)
    files = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.*"))
    assert len([file for file in files if file.suffix == ".png"]) == 3
    assert all(
        (tmp_path / "alone" / file).read_bytes() == (tmp_path / "together" / file).read_bytes() for file in files
    )


def test_sheets_depend_on_seed_split_and_number_alone():
    made = {make_sheet(split, number, seed) for split in ("train", "val") for number in range(9) for seed in range(3)}
    assert len(made) == 54
    assert {len(sheet.rows) == 1 for sheet in made} == {True, False}
