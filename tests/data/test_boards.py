"""The boards: every digit and color is read back from the written images, and the records say the same."""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lit_mm.data.boards import BOARDS, INKS, DemoDataModule, make_board
from lit_mm.data.records import parse
from tests.helpers.environment import installed
from tests.helpers.records import exchanges, items

SPLITS = {"train": 40, "val": 5, "test": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("boards")
    BOARDS.write(root, **SPLITS, seed=3)
    return root


def glyph(digit, across=0, down=0):
    """[16, 16] how much of each pixel a digit covers in an empty cell, 0 to 255."""
    cell = Image.new("L", (16, 16))
    font = ImageFont.load_default(size=15)
    ImageDraw.Draw(cell).text((8 + across, 8 + down), digit, 255, font, anchor="mm")
    return np.asarray(cell, float)


def read(file):
    """The rows and the color of a board, found again: each cell has one paper and one ink, and is the digit whose
    glyph explains its pixels exactly, at one of nine places."""
    pixels = np.asarray(Image.open(file), float)
    assert pixels.shape == (64, 64, 3)
    paper = pixels[0, 0]
    ink = min(INKS, key=lambda name: np.abs(pixels - INKS[name]).sum(-1).min())
    way = np.array(INKS[ink]) - paper
    cover = 255 * (pixels - paper) @ way / (way @ way)  # colors lie on the line from paper to ink
    glyphs = {
        (digit, *place): glyph(digit, *place) for digit in "0123456789" for place in product((-1, 0, 1), repeat=2)
    }
    cells = cover.reshape(4, 16, 4, 16).transpose(0, 2, 1, 3)
    found = [[closest(cell, glyphs) for cell in row] for row in cells]
    return ["".join(row) for row in found], ink


def closest(cell, glyphs):
    off = {name: np.abs(cell - own).max() for name, own in glyphs.items()}
    best = min(off, key=off.get)
    assert off[best] < 5, "no digit explains the cell"  # colors are rounded to whole numbers
    return best[0]


def test_answers_are_what_the_images_show(root):
    """Of questions in one conversation, questions by type, and captions."""
    counts, shown = Counter(), {}
    for name in (*SPLITS, "captions"):
        for item in items(root, name):
            rows, ink = shown.setdefault(item["image"], None) or read(root / item["image"])
            shown[item["image"]] = rows, ink
            for question, answer in exchanges(item):
                counts[kind := kind_of(question)] += 1
                assert item.get("type", kind) == kind
                assert answer == seen(kind, question, rows, ink), (item["id"], question)
    boards = sum(SPLITS.values())
    assert counts == {"row": 4 * boards, "cell": 2 * boards, "color": boards, "caption": SPLITS["train"]}
    assert len(shown) == boards


def kind_of(question):
    if "color" in question:
        return "color"
    return "cell" if "column" in question else "row" if "row" in question else "caption"


def seen(kind, question, rows, ink):
    numbers = [int(number) - 1 for number in re.findall(r"\d", question)]
    return {
        "row": lambda: rows[numbers[0]],
        "cell": lambda: rows[numbers[0]][numbers[1]],
        "color": lambda: ink,
        "caption": lambda: " ".join([ink, *rows]),
    }[kind]()


def test_records_are_llava_json_with_types(root):
    parsed = [parse(split, item) for split in SPLITS for item in items(root, split)]
    assert len({record.id for record in parsed}) == len(parsed)
    assert Counter(record.type for record in parsed) == {"": 40, "row": 10, "cell": 10, "color": 10}
    images = {item["image"] for split in SPLITS for item in items(root, split)}
    assert {file.relative_to(root).as_posix() for file in root.glob("boards_3/*")} == images


def test_boards_depend_on_seed_split_and_number_alone(root, tmp_path):
    BOARDS.write(tmp_path, train=5, val=0, test=1, seed=3)
    assert items(tmp_path, "train") == items(root, "train")[:5]
    assert items(tmp_path, "test") == items(root, "test")[:3]
    written = sorted(tmp_path.glob("boards_3/*"))
    assert len(written) == 6
    assert all(file.read_bytes() == (root / "boards_3" / file.name).read_bytes() for file in written)
    for other in (make_board("train", 0, 4), make_board("val", 0, 3), make_board("train", 2, 3)):
        assert other != make_board("train", 0, 3)


def test_what_is_there_is_not_written_again(root):
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    BOARDS.write(root, **SPLITS, seed=3)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before


def test_every_answer_is_as_frequent_as_another():
    """So that no guess is better than 1 in 10 for a digit of any cell, and 1 in 6 for the color."""
    boards = [make_board("train", number) for number in range(2000)]
    assert len({board.rows for board in boards}) == 2000
    digits = [Counter("".join(board.rows)[place] for board in boards) for place in range(16)]
    cells = [Counter(cell for board in boards for cell in board.cells)]
    for counts, kinds in ([(each, 10) for each in digits] + [(each, 16) for each in cells]) + [
        (Counter(board.ink for board in boards), 6)
    ]:
        assert len(counts) == kinds
        expected, free = counts.total() / kinds, kinds - 1
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_square < free + 4.5 * (2 * free) ** 0.5


@installed("easy_vqa")
def test_the_demo_has_easy_vqa_and_boards_in_every_split(tmp_path):
    demo = DemoDataModule(
        None, str(tmp_path), train_boards=3, val_boards=2, test_boards=2, reading_epochs=2, caption_epochs=1
    )
    demo.prepare_data()
    counts, passes = Counter(), {}
    for name in ("captions", "train", "val", "test"):
        passes[name] = [subset.epochs for subset in demo.files[name]]
        for subset in demo.files[name]:
            for item in json.loads(Path(subset.path).read_text()):
                counts[name, item.get("type", "")] += 1
                assert (Path(subset.root) / item["image"]).is_file()
    assert [counts[split, "easy-VQA"] for split in ("train", "val", "test")] == [3800, 200, 1000]
    assert counts["captions", "easy-VQA"] > 3000
    assert counts["captions", ""] == counts["train", ""] == 3
    assert [counts["test", kind] for kind in ("row", "cell", "color")] == [2, 2, 2]
    assert passes == {"captions": [1, 0.2], "train": [0.5, 0.5], "val": [1, 1], "test": [1, 1]}
    assert [demo.train_set(epoch) for epoch in range(5)] == ["reading", "reading", "captions", "train", "train"]
