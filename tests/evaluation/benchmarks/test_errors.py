"""Files that are not what the benchmark says: every error names the file, the record, the field, and what was found."""

import json
import re

import pytest
import yaml

from lit_mm.data.records import RecordError
from lit_mm.evaluation.benchmarks import BENCHMARKS, load_benchmark, split_name
from tests.helpers.benchmark_files import write_json


def change(file, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    write_json(file, content)


def refused(name, path, error, *messages):
    with pytest.raises(error) as caught:
        load_benchmark(name).items(str(path))
    for message in messages:
        assert message in str(caught.value)


def test_an_unknown_benchmark():
    with pytest.raises(ValueError, match=r"unknown benchmark 'docvaq': expected a YAML file or one of .*docvqa.*, gqa"):
        split_name("docvaq:val.json")
    with pytest.raises(FileNotFoundError, match=r"no benchmark file mine\.yaml"):
        split_name("mine.yaml:val.json")


def test_no_file(files):
    root = files("docvqa")
    refused("docvqa", root / "gone.json", FileNotFoundError, "docvqa: no file or folder", "gone.json")
    refused("docvqa", root / "documents", FileNotFoundError, "val_v1.0_withQT.json", "found pybv0228_81.png")
    refused("docvqa", root / "documents" / "pybv0228_81.png", ValueError, "pybv0228_81.png: expected one of val_v1.0")
    refused("docvqa", "", ValueError, "docvqa: expected a path, as in docvqa:PATH")


def test_a_missing_image(files):
    root = files("gqa")
    (root / "images" / "n161313.jpg").unlink()
    message = "record 0 (id 201307251): missing image: image: expected one of images/n161313.jpg, n161313.jpg in"
    refused("gqa", root, RecordError, "testdev_balanced_questions.json", message)
    root = files("chartqa")
    (root / "png" / "41699051005347.png").unlink()
    refused("chartqa", root, RecordError, "test_augmented.json, record 0", "no such file in")


def test_an_image_outside_the_root(files):
    root = files("docvqa")
    (root.parent / "secret.png").write_bytes(b"")
    for path in ("../secret.png", str(root.parent / "secret.png")):
        change(root / "val_v1.0_withQT.json", lambda content, path=path: content["data"][1].update(image=path))
        refused("docvqa", root, RecordError, "record 1 (id 24580): path leaves the image root")


def test_an_id_that_comes_twice(files):
    root = files("textvqa")
    change(root / "TextVQA_0.5.1_val.json", lambda content: content["data"][1].update(question_id=34602))
    refused("textvqa", root, ValueError, "record 1: {question_id} is '34602', as in", "record 0")


def test_the_answers_of_another_split(files):
    root = files("activitynet_qa")
    change(root / "test_a.json", lambda content: content[0].update(question_id="v_other_1"))
    lacking = "test_a.json: lacks 1 of the 2 records of", "'v_9eniCub7u60_2'", "expected two files of the same split"
    refused("activitynet_qa", root, ValueError, *lacking)
    root = files("egoschema")
    change(root / "subset_answers.json", lambda content: content.update(other=1))
    refused(
        "egoschema", root, ValueError, "questions.json: lacks 1 of the 2 records of", "subset_answers.json", "'other'"
    )
    (root / "subset_answers.json").unlink()
    refused("egoschema", root, FileNotFoundError, "no subset_answers.json in")


def test_questions_with_and_without_answers(files):
    root = files("docvqa")
    change(root / "val_v1.0_withQT.json", lambda content: content["data"][1].pop("answers"))
    message = "record 1 (id 24580): no answer: {answers}: 1 of 2 questions have no answer, expected all or none"
    refused("docvqa", root, RecordError, message)
    change(root / "val_v1.0_withQT.json", lambda content: content["data"][0].pop("answers"))
    assert all("references" not in item for item in load_benchmark("docvqa").items(str(root)))


@pytest.mark.parametrize(
    ("name", "file", "edit", "message"),
    [
        ("gqa", "testdev_balanced_questions.json", lambda all: all["201640614"].pop("question"),
         "record 1: missing field: question: expected a value, found the fields"),
        ("gqa", "testdev_balanced_questions.json", lambda all: all["201640614"].update(types={}),
         "record 1: missing field: types.structural: expected a value"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda all: all["data"][0].update(question={"a": 1}),
         "record 0: malformed field: {question}: expected text, a number or a list of them, found {'a': 1}"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda all: all["data"][0].update(question_id=None),
         "record 0: missing field: question_id: expected a value, found null"),
        ("scienceqa", "problems.json", lambda all: all["4"].update(answer=2),
         "record 0: malformed field: {answer}: expected one of 0, 1, found '2'"),
        ("seed", "SEED-Bench.json", lambda all: all["questions"][0].update(answer="E"),
         "record 0: malformed field: {answer}: expected one of A, B, C, D, found 'E'"),
        ("seed", "SEED-Bench.json", lambda all: all["questions"][0].update(choice_b=""),
         "record 0: malformed field: options: expected texts, and empty ones only at the end, found ['One', '', "),
        ("activitynet_qa", "test_a.json", lambda all: all[0].pop("question_id"),
         "test_a.json, record 0: missing field: question_id"),
    ],
)  # fmt: skip
def test_a_field_that_is_missing_or_wrong(files, name, file, edit, message):
    root = files(name)
    change(root / file, edit)
    refused(name, root, RecordError, file, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [20, 12, 60]}, "expected a box of four numbers and a size, found [20, 12, 60], 80, 60"),
        ({"bbox": [20, 12, 90, 52]}, "expected x1 < x2 and y1 < y2 within 80×60 (width × height)"),
        ({"width": "80"}, "expected a box of four numbers and a size"),
        ({"bbox": [60, 12, 20, 52]}, "expected x1 < x2"),
        ({"width": None}, "expected a box of four numbers and a size"),
    ],
)
def test_a_box_that_is_none(files, change, message):
    file = files("refcoco") / "refcoco_val.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text().splitlines()[0]) | change))
    refused("refcoco", file, RecordError, "refcoco_val.jsonl, record 0: malformed field: bbox", message)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("docvqa", "val_v1.0_withQT.json", "{", "not valid JSON"),
        ("docvqa", "val_v1.0_withQT.json", '{"questions": []}', "expected the records in data, found ['questions']"),
        ("docvqa", "val_v1.0_withQT.json", '{"data": 3}', "expected a list or an object of records, found 3"),
        ("docvqa", "val_v1.0_withQT.json", '{"data": []}', "contains no records"),
        ("docvqa", "val_v1.0_withQT.json", '{"data": [3]}', "record 0: missing field"),
        ("pope", "coco_pope_random.json", '{"question_id": 1}\nnonsense\n', "line 2: not valid JSON"),
        ("nextqa", "test.csv", "video,question\n1,2,3\n", "record 0: columns disagree: expected 2 columns"),
        ("nextqa", "test.csv", 'video,question\n"1,2\n', "not a table"),
        ("nextqa", "test.csv", b"video\n\xff\n", "not UTF-8"),
        ("mme", "code_reasoning/0020.txt", "Is it?\n", "0020.txt, record 0: columns disagree: expected 2"),
        ("seed", "SEED-Bench.json", '{"questions": [{"data_type": "video"}]}', "no record has {'data_type': 'image'}"),
    ],
)
def test_a_file_of_another_format(files, name, file, content, message):
    root = files(name)
    (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(name, root, ValueError, file.split("/")[-1], message)


def test_a_file_that_is_too_large(files, monkeypatch):
    monkeypatch.setattr("lit_mm.evaluation.benchmarks.rows.MOST", 100)
    refused("docvqa", files("docvqa"), ValueError, "bytes, expected at most 100, as it is read into memory")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda all: all.update(metric="accuracy"), "metric: expected one of exact, vqa, .*, found 'accuracy'"),
        (lambda all: all.pop("prompt"), "prompt"),
        (lambda all: all["layouts"][0].update(imag="x"), "imag"),
        (lambda all: all["layouts"][0].update(format="xls"), "format"),
        (lambda all: all.update(metric="circular"), r"layouts\[0\]: metric circular needs options and a group"),
        (lambda all: all["layouts"][0].pop("references"), r"layouts\[0\]: expected either references, or options"),
        (lambda all: all.update(layouts=[]), "layouts: expected at least one"),
        (lambda all: all.update(max_new_tokens="many"), "max_new_tokens"),
    ],
)
def test_a_benchmark_file_that_is_wrong(tmp_path, edit, message):
    content = yaml.safe_load(BENCHMARKS["easy_vqa"].read_text())
    edit(content)
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=re.escape(str(file)) + f"(?s:.*){message}"):
        load_benchmark(str(file))


def test_what_is_no_yaml(tmp_path):
    for content, message in (("a: [", "not valid YAML"), ("- a", "not a benchmark"), ("", "not a benchmark")):
        (tmp_path / "my.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_benchmark(str(tmp_path / "my.yaml"))
