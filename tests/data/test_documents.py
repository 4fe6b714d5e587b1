"""The documents: texts are found again in the written images where they should be, and the records say the same."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lit_mm.data.documents import DOCUMENTS, FONTS, SIDE, make_document, render
from lit_mm.data.records import parse
from lit_mm.data.rendered import RenderedDataModule
from lit_mm.data.writing import font_of
from tests.helpers.records import exchanges, items

SPLITS = {"train": 30, "val": 4, "test": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    DOCUMENTS.write(root, **SPLITS, seed=3)
    return root


def bands(pixels):
    """Where ink is, from top to bottom: the rows of pixels of each line of text, first and last + 1. Lines are at least
    four blank rows apart, which parts of a letter are not."""
    inked = np.flatnonzero((pixels < 255).any(1))
    ends = np.flatnonzero(np.diff(inked) > 4)
    return list(zip(inked[np.r_[0, ends + 1]], inked[np.r_[ends, len(inked) - 1]] + 1, strict=True))


def alone(kind, size, text, part):
    """[h, w] a text's pixels, black on white, without margins; it begins at a part of a pixel."""
    image = Image.new("L", (SIDE, 40), 255)
    ImageDraw.Draw(image).text((4 + part, 10), text, 0, font_of(FONTS[kind], size))
    pixels = np.asarray(image)
    rows, columns = np.flatnonzero((pixels < 255).any(1)), np.flatnonzero((pixels < 255).any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(int)


def shows(band, kind, size, text):
    """Whether a text is in a line of the image, beginning at any 32nd of a pixel."""
    for part in np.arange(32) / 32:
        drawn = alone(kind, size, text, part)
        windows = np.lib.stride_tricks.sliding_window_view(band.astype(int), drawn.shape)
        if (np.abs(windows - drawn).max((2, 3)) <= 2).any():
            return True
    return False


@pytest.mark.parametrize("number", range(12))
def test_every_answer_stands_where_it_is_asked_for(number):
    document = make_document("test", number, seed=5)
    pixels = np.asarray(render(document).convert("L"))
    assert not (pixels[:4] < 255).any()
    assert not (pixels[-4:] < 255).any()
    assert not (pixels[:, [*range(4), *range(SIDE - 4, SIDE)]] < 255).any(), "nothing is cut off"
    lines = [pixels[max(0, start - 3) : end + 3] for start, end in bands(pixels)]
    priced = document.kind != "page"
    assert len(lines) == 2 + len(document.lines) + priced

    def seen(place, text):
        return shows(lines[place], document.kind, document.size, text)

    asked = document.questions()
    assert seen(0, asked["company"][0][1])
    assert seen(1, asked["date"][0][1])
    for question, answer in asked["line"]:
        place = int(re.fullmatch(r"what does line (\d) say\?", question)[1])
        assert seen(1 + place, f"{place}. {answer}")
        assert not seen(2 + place % len(document.lines), f"{place}. {answer}")
    assert ("total" in asked) == priced
    if priced:
        shown = [f"{price // 100}.{price % 100:02}" for price in document.prices]
        assert all(seen(2 + place, price) for place, price in enumerate(shown))
        [(_, total)] = asked["total"]
        assert round(100 * float(total)) == sum(round(100 * float(price)) for price in shown)
        assert seen(-1, total)


def test_records_say_what_the_documents_show(root):
    for name, count in SPLITS.items():
        documents = [make_document(name, number, seed=3) for number in range(count)]
        pairs = Counter(pair for item in items(root, name) for pair in exchanges(item))
        assert pairs == Counter(pair for each in documents for own in each.questions().values() for pair in own)
        for item in items(root, name):
            assert np.array_equal(
                np.asarray(Image.open(root / item["image"])),
                np.asarray(render(documents[int(re.search(r"_(\d+)\.png", item["image"])[1])])),
            )
            parse(item["id"], item)
    kinds = Counter(item["type"] for item in items(root, "test"))
    assert kinds["company"] == kinds["date"] == kinds["line"] == 8
    assert kinds["total"] == sum(make_document("test", number, seed=3).kind != "page" for number in range(8))
    for number, item in enumerate(items(root, "captions")):
        own = make_document("train", number, seed=3)
        [(_, text)] = exchanges(item)
        assert all(line in text for line in (own.company, own.date, *own.lines))


def test_documents_depend_on_seed_split_and_number_alone(root, tmp_path):
    DOCUMENTS.write(tmp_path, **dict.fromkeys(SPLITS, 2), seed=3)
    for split in SPLITS:
        name = f"documents_3/{split}_1.png"
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()
    made = {make_document(split, number, seed) for split in SPLITS for number in range(9) for seed in range(3)}
    assert len(made) == 81
    assert {document.kind for document in made} == {*FONTS}


@pytest.mark.parametrize(("content", "types"), [("boards", 3), ("documents", 4)])
def test_the_data_module_reads_captions_first(content, types, tmp_path):
    data = RenderedDataModule(None, content, str(tmp_path), train_images=3, val_images=2, test_images=9)
    data.prepare_data()
    assert [data.train_set(epoch) for epoch in range(3)] == ["captions", "captions", "train"]
    assert [len(items(tmp_path / content, name)) for name in ("captions", "train")] == [3, 3]
    assert all((tmp_path / content / item["image"]).is_file() for item in items(tmp_path / content, "test"))
    assert len({item["type"] for item in items(tmp_path / content, "test")}) == types
    whole = RenderedDataModule(None, content, str(tmp_path), val_images=2, test_images=9, asked="captions")
    told = json.loads(Path(whole.files["test"]).read_text())
    assert [item["image"] for item in told] == list(dict.fromkeys(item["image"] for item in items(whole.root, "test")))
