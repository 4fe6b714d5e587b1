"""A benchmark's questions as a source of records: what `test` reads."""

import pickle
from pathlib import Path

import pytest

from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.dataset import InstructionSet
from lit_mm.data.images import ImageOptions
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.media import MediaFolder
from lit_mm.data.records import RecordError
from lit_mm.data.sampler import Budget
from lit_mm.data.video import VideoOptions
from lit_mm.evaluation.benchmarks import load_benchmark, split_name
from tests.helpers.benchmark_files import picture, pixels, write_parquet, write_table
from tests.helpers.environment import ROOT
from tests.helpers.media import render


def instruction_set(source, root, tokenizer, cache, policy="error", video=None):
    inputs = ModelInputs(tokenizer, 16, [4, 1], (122, 116, 104))
    media = MediaFolder(Path(root), ImageOptions("squash", 32), inputs.color, video, source=source.fingerprint)
    made = InstructionSet(source, "question", media, "test", inputs, 2048, Budget(4), policy=policy)
    made.look(cache, workers=0)
    return made


@pytest.mark.parametrize("name", ["docvqa", "mmbench", "mme", "scienceqa", "seed", "refcoco"])
def test_questions_become_samples(files, tmp_path, tokenizer, name):
    benchmark, root = load_benchmark(name), files(name)
    source = benchmark.source(str(root), tmp_path)
    made = instruction_set(source, benchmark.image_root(str(root)), tokenizer, tmp_path / "cache")
    questions = [question for sample in made for question in sample.questions]
    items = benchmark.items(str(root))
    assert [question.record for question in questions] == source.ids == [item["question_id"] for item in items]
    assert [list(question.references) for question in questions] == [item["references"] for item in items]
    assert [question.text for question in questions] == [item["text"] for item in items]
    assert [question.group for question in questions] == [item.get("group", "") for item in items]


@pytest.mark.parametrize("mode", ["pad", "squash"])
def test_boxes_need_padded_images(files, tmp_path, tokenizer, mode):
    inputs = ModelInputs(tokenizer, 16, [4, 1], (122, 116, 104))
    named = f"refcoco:{files('refcoco')}"
    data = ImageDataModule(inputs, test=named, image=ImageOptions(mode, 32), cache=str(tmp_path / "cache"))
    if mode == "pad":
        data.setup("test")
    else:
        with pytest.raises(ValueError, match=r"refcoco: its boxes are .* found data\.image\.mode squash, expected pad"):
            data.setup("test")


def test_images_of_a_table_are_read_when_they_are_needed(tmp_path, tokenizer):
    rows = [{"questionId": str(n), "question": "what?", "question_types": ["form"], "answers": ["a"]} for n in (1, 2)]
    for row, size in zip(rows, ((40, 20), (20, 40)), strict=True):
        row["image"] = pixels(size=size)
    write_parquet(tmp_path / "validation.parquet", rows)
    source = pickle.loads(pickle.dumps(load_benchmark("docvqa").source(str(tmp_path), tmp_path / "cache")))
    assert not any("image" in row for row in source.rows.rows)
    assert [item["image"]["bytes"] for _, item in source] == [row["image"] for row in rows]
    made = instruction_set(source, tmp_path, tokenizer, tmp_path / "cache")
    assert [sample.visuals[0].pixels.shape for sample in made] == [(1, 3, 32, 32)] * 2


def test_a_video_question(files, tmp_path, tokenizer):
    root = files("activitynet_qa")
    for file in root.glob("v_*"):
        file.unlink()
    render(root / "v_1QIUV7WYKXg.mp4")
    source = load_benchmark("activitynet_qa").source(str(root), tmp_path)
    made = instruction_set(source, root, tokenizer, tmp_path / "cache", "skip", VideoOptions(max_frames=2))
    assert [question.record for sample in made for question in sample.questions] == ["v_1QIUV7WYKXg_3"]
    assert made.bad.counts == {"missing video": 1}
    with pytest.raises(RecordError, match=r"missing video: video: expected one of v_9eniCub7u60\.mp4, v_9eni"):
        instruction_set(source, root, tokenizer, tmp_path / "other", video=VideoOptions(max_frames=2))


def test_another_folder_of_images(files, tmp_path):
    root = files("docvqa")
    (root / "documents").rename(tmp_path / "documents")
    assert load_benchmark("docvqa").items(str(root), tmp_path)[0]["image"] == "documents/pybv0228_81.png"


def test_the_fingerprint_changes_with_the_files_and_the_benchmark(files, tmp_path):
    root, benchmark = files("activitynet_qa"), load_benchmark("activitynet_qa")
    first = benchmark.source(str(root), tmp_path).fingerprint
    assert benchmark.source(str(root), tmp_path).fingerprint == first
    (root / "test_a.json").write_text((root / "test_a.json").read_text() + "\n")
    changed = benchmark.source(str(root), tmp_path).fingerprint
    assert changed != first
    assert benchmark.source(str(root), tmp_path, tmp_path).fingerprint != changed


def test_the_example_of_ones_own_benchmark(tmp_path):
    rows = [
        {"image": "1.png", "question": "What is the total?", "answer": "12.50", "kind": "amount"},
        {"image": "1.png", "question": "Who, by name, sold it?", "answer": "A. Smith", "kind": "name"},
    ]
    write_table(tmp_path / "questions.csv", rows)
    picture(tmp_path / "images" / "1.png")
    benchmark, path = split_name(f"{ROOT}/experiments/evaluation/own_benchmark.yaml:{tmp_path}")
    items = benchmark.items(path)
    assert items[1] == {
        "question_id": 1,
        "text": "Who, by name, sold it?\nAnswer the question using a single word or phrase.",
        "references": ["A. Smith"],
        "type": "name",
        "image": "images/1.png",
    }
