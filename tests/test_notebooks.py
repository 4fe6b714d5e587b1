"""The notebooks run, and what they show in the repository is what running them shows, in kind."""

import json
from base64 import b64decode
from importlib import import_module
from io import BytesIO

import nbformat
import numpy as np
import pytest
from PIL import Image

from lit_mm.data.boards import BOARDS
from lit_mm.data.easy_vqa import package_data, read_questions
from lit_mm.evaluation import results
from lit_mm.evaluation.results import Judged, scores_of, write_questions
from tests.helpers.environment import ROOT

FOLDER = ROOT / "notebooks"
PICTURES = {"1_nested_tokens": 4, "2_cost": 4, "3_oracle": 4, "4_train_and_watch": 4, "5_video": 5, "6_auto": 5}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell) -> list[list[str]]:
    """What a cell has put out: `stdout`, or the formats of what it shows."""
    return [[output.name] if "name" in output else sorted(output.data) for output in cell.outputs]


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PICTURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_runs_and_shows_what_the_repository_has(name, tmp_path, monkeypatch):
    for variable, value in {"LIT_MM_NOTEBOOKS": "tiny", "PYTHONPATH": ROOT, "IPYTHONDIR": tmp_path}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.syspath_prepend(str(FOLDER))
    now = import_module("run").executed(FOLDER / f"{name}.ipynb")  # raises what a cell raises
    assert [kinds(cell) for cell in code(now)] == [kinds(cell) for cell in code(read(name))]


@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_in_the_repository_is_whole_and_small(name):
    cells = code(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {
        "stdout"
    }  # no warnings, which name a machine's paths
    pictures = [b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[name]
    assert max(map(len, pictures)) <= 100_000
    assert all(Image.open(BytesIO(picture)).width > 900 for picture in pictures)
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= 400_000


def test_the_pictures_show_what_the_docs_say(monkeypatch):
    """Bars as high as the table's figures of the same model; the file in the repository is as large as one made now."""
    monkeypatch.syspath_prepend(str(FOLDER))
    front, made = import_module("front"), []
    monkeypatch.setattr(front, "write", lambda figure, to: made.append((figure, to)))
    front.main()
    (figure, file), (demo, demo_file) = made
    heights = [sum(bar.get_height() for bar in axes.patches) for axes in figure.axes[7:]]
    table = [
        line.split("|") for line in (ROOT / "docs/costs.md").read_text().splitlines() if line.startswith("| 1536²")
    ]
    assert [f"{heights[0]:.2f} T", f"{heights[-1]:.2f} T"] == [line[5].strip() for line in table]
    for drawn, kept in ((figure, file), (demo, demo_file)):
        assert Image.open(kept).size == tuple(round(110 * side) for side in drawn.get_size_inches())
    labels = [line.get_label() for line in demo.axes[1].lines]
    assert {"all questions", "easy-VQA", "row", "cell", "color"} <= {*labels}


def test_a_run_without_times_is_drawn_without_them(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    pictures, shown = import_module("pictures"), []
    monkeypatch.setattr(pictures, "show", shown.append)
    result = json.loads((FOLDER / "accuracy_tokens.json").read_text())
    pictures.finished_run(result)
    pictures.finished_run(result | {"scales": [row | {"measured": None} for row in result["scales"]]})
    assert [len(figure.axes) for figure in shown] == [2, 1]


def test_the_curve_is_that_of_the_results():
    """The shipped figures stand in RESULTS.md, with their command."""
    run = json.loads((FOLDER / "accuracy_tokens.json").read_text())
    figures = " / ".join(f"{100 * row['accuracy']:.2f}" for row in run["scales"])
    assert f"{figures} %" in (ROOT / "experiments/RESULTS.md").read_text()


def judged(number: int, kind: str = "row", scores: tuple[float, ...] = (1.0, 0.0)) -> Judged:
    texts = ["12", "34"]
    return Judged(f"test_{number}#1", kind, "?", ["12"], texts, [*scores], [-0.1, -0.2], [4, 1], [1, 1], [0, 0], [1, 1])


def test_a_record_of_a_run_is_the_same_draw_every_time_and_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    record = import_module("record").record
    asked, run = [judged(number) for number in range(40)], tmp_path / "run"
    run.mkdir()
    write_questions(run / "accuracy_tokens.parquet", asked, ["4", "1"])
    (run / "accuracy_tokens.json").write_text(json.dumps({"checkpoint": str(run / "last.ckpt"), "step": 7}))
    (run / "chooser.json").write_text("{}")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        record(run, tmp_path / name, most=10)
    drawn, scales = results.read_questions(tmp_path / "one/questions.parquet")
    assert drawn == results.read_questions(tmp_path / "two/questions.parquet")[0]
    assert (len(drawn), scales) == (10, ["4", "1"])
    assert [question for question in asked if question in drawn] == drawn != asked[:10]
    assert json.loads((tmp_path / "one/accuracy_tokens.json").read_text()) == {"checkpoint": "last.ckpt", "step": 7}
    assert (tmp_path / "one/chooser.json").read_text() == "{}"


def test_the_recorded_files_are_of_one_run():
    """The drawn questions are as accurate as the whole test, within four standard errors; and the steps agree."""
    questions, scales = results.read_questions(FOLDER / "questions.parquet")
    test, chooser = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("accuracy_tokens", "chooser"))
    assert scales == [row["scale"] for row in test["scales"]]
    assert chooser["calibrated_on"]["step"] == test["step"]
    whole = np.array([row["accuracy"] for row in test["scales"]])
    error = np.sqrt(whole * (1 - whole) / len(questions))
    assert (np.abs(scores_of(questions).mean(0) - whole) < 4 * error).all()


def test_a_questions_image_is_the_one_that_was_asked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    image_of = import_module("pictures").image_of
    BOARDS.write(tmp_path, train=0, val=0, test=2)
    for record in json.loads((tmp_path / "test.json").read_text()):
        assert image_of(f"{record['id']}#1").tobytes() == Image.open(tmp_path / record["image"]).tobytes()
    last = max(read_questions("test"))
    assert image_of(f"test_{last}#3").filename == str(package_data() / f"test/images/{last}.png")


def test_questions_are_shown_of_all_types_the_most_frequent_first(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    kinds = ["color", "row", "row", "cell", "row", "cell"]
    questions = [judged(number, kind) for number, kind in enumerate(kinds)]
    some = import_module("pictures").of_each_type
    assert some(questions, [0, 1, 2, 3, 4, 5], 5) == [1, 3, 0, 2, 5]
    assert some(questions, [0, 5], 4) == [0, 5]


def test_right_answers_are_marked_as_right(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    pictures, shown = import_module("pictures"), []
    monkeypatch.setattr(pictures, "show", shown.append)
    pictures.asked({"title": [(judged(0), 1)]}, ["4", "1"], certain=True)
    axes = shown[0].subfigs[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["    4: 12 ✓ 90 %", "▶   1: 34 ✗ 82 %"]
    assert [text.get_color() for text in axes.texts] == [pictures.RIGHT, pictures.WRONG]


def test_logged_values_are_averaged_with_their_neighbors(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    smooth = import_module("pictures").smooth
    assert smooth([1, 2, 6, 7], 3).tolist() == [1.5, 3, 5, 6.5]
    assert smooth([1, 2, 6, 7], 1).tolist() == [1, 2, 6, 7]


def test_curves_have_the_color_of_their_scale_and_the_line_of_their_run(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    pictures, shown = import_module("pictures"), []
    monkeypatch.setattr(pictures, "show", shown.append)
    line = np.arange(2), np.arange(2)
    one, other = {"loss@16": line, "loss@4": line}, {"loss@4": line, "norm": line}
    pictures.curves({"title": ("step", {"first": one, "second": other})})
    drawn = [(line.get_color(), line.get_linestyle()) for line in shown[0].axes[0].lines]
    fine, coarse = pictures.SCALES[:2]
    assert drawn == [(fine, "-"), (coarse, "-"), (coarse, "--"), (pictures.PREFIX, "--")]
    told = [text.get_text() for text in shown[0].legends[0].get_texts()]
    assert told == ["16 tokens", "4 tokens", "first", "second"]


def test_sets_of_frames_stand_side_by_side_in_lines_of_four(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    side_by_side = import_module("pictures")._side_by_side
    sets = np.arange(5 * 4).reshape(5, 4, 1).repeat(3, 2) / 20  # five sets of 2×2 tokens
    picture = side_by_side(sets, side=4, gap=1)
    assert picture.shape == (10, 20, 3)
    assert [picture[0, 0, 0], picture[3, 18, 0], picture[5, 0, 0]] == [sets[0, 0, 0], sets[3, 3, 0], sets[4, 0, 0]]
    assert (picture[5:, 5:] == 1).all() and (picture[4] == 1).all()
