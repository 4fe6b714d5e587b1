"""Every benchmark's questions from its files, as their authors distribute them."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import pytest

from lit_mm.data.images import ImageOptions
from lit_mm.data.media import MediaFolder
from lit_mm.data.records import parse
from lit_mm.evaluation.benchmarks import BENCHMARKS, load_benchmark, split_name
from lit_mm.evaluation.metrics import METRICS
from tests.helpers.benchmark_files import pixels, write_json, write_parquet
from tests.helpers.environment import ROOT

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
GORDON = "Which of the following could Gordon's test show?"

# id, text, references, type, group, image or video of the first and last question, and how many there are
EXPECTED = {
    "textvqa": [
        (
            34602,
            f"What is the brand of this camera?{SHORT}",
            ["nous les gosses", *["dakota"] * 7, "clos culombu", "dakota digital"],
            "train_images/003a8ae2ef43b901.jpg",
        ),
        2,
    ],
    "docvqa": [
        (
            49153,
            f"What is the ‘actual’ value per 1000, during the year 1975?{SHORT}",
            ["0.28"],
            "documents/pybv0228_81.png",
            "figure/diagram, table/list",
        ),
        2,
    ],
    "chartqa": [
        (
            "test_augmented/0",
            "What was the value in 2019?\nAnswer the question with a single word.",
            ["0.57"],
            "png/41699051005347.png",
            "augmented",
        ),
        2,
    ],
    "gqa": [("201307251", f"Is it overcast?{SHORT}", ["no"], "images/n161313.jpg", "verify"), 2],
    "pope": [
        (
            "popular/0",
            f"Is there a dining table in the image?{SHORT}",
            ["yes"],
            "val2014/COCO_val2014_000000548882.jpg",
            "popular",
        ),
        4,
    ],
    "scienceqa": [
        (
            "4",
            "Context: People can use the engineering-design process.\nGordon was an aerospace engineer.\n"
            f"{GORDON}\nA. if the spacecraft was damaged\nB. how steady a parachute was{LETTER}",
            ["B", "how steady a parachute was", "if the spacecraft was damaged", "how steady a parachute was"],
            "test/4/image.png",
            "natural science",
        ),
        2,
    ],
    "mmbench": [
        (
            "241",
            "The passage below describes an experiment.\nRead it, and answer.\n"
            f'{GORDON}\nA. if the "spacecraft" was damaged\nB. how steady it was{LETTER}',
            ["B", "how steady it was", 'if the "spacecraft" was damaged', "how steady it was", "241"],
            "data:image/jpeg;base64," + base64.b64encode(pixels()).decode(),
            "identity_reasoning",
            "241",
        ),
        3,
    ],
    "seed": [
        (
            "101669",
            f"How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four{LETTER}",
            ["A", "One", "One", "Two", "Three", "Four"],
            "SEED-Bench-image/1454426_2591111986",
            "instances counting",
        ),
        1,
    ],
    "mme": [
        (
            "artwork/14777#0",
            f"Is this artwork from 1520?{SHORT}",
            ["Yes", "artwork", "artwork/14777"],
            "artwork/images/14777.jpg",
            "artwork",
            "artwork/14777",
        ),
        4,
    ],
    "refcoco": [
        # 80×60 is padded by 10 above and below: 20/80, (12 + 10)/80, 60/80, (52 + 10)/80
        (
            "refcoco_val/0",
            "Please provide the bounding box coordinate of the region this sentence describes: two woman one in black.",
            ["[0.250000, 0.275000, 0.750000, 0.775000]"],
            "train2014/COCO_train2014_000000519404.jpg",
            "refcoco_val",
        ),
        2,
    ],
    "activitynet_qa": [
        (
            "v_1QIUV7WYKXg_3",
            "Is the athlete wearing trousers? Answer the question using a single word or phrase.",
            ["yes"],
            "v_1QIUV7WYKXg.mp4",
            "yes or no",
        ),
        2,
    ],
    "msvd_qa": [
        (37389, f"who is measuring ingredients?{SHORT}", ["cook"], "YouTubeClips/yREFLy3_f9s_20_30.avi"),
        2,
    ],
    "nextqa": [
        (
            "4010069381_6",
            "how do the two man play the instrument\nA. roll the handle\nB. tap their feet\nC. strum the string\n"
            f"D. hit with sticks\nE. pat with hand{LETTER}",
            ["A", *["roll the handle"] * 2, "tap their feet", "strum the string", "hit with sticks", "pat with hand"],
            "NExTVideo/1164/4010069381.mp4",
            "causal how",
        ),
        2,
    ],
    "egoschema": [
        (
            "0074f737-11cb-497d-8d07-77c3a8127391",
            "What does C do?\nA. C does this.\nB. C does that.\nC. C does it.\nD. C does so.\nE. C does no." + LETTER,
            ["D", "C does so.", *[f"C does {what}." for what in ("this", "that", "it", "so", "no")]],
            "videos/0074f737-11cb-497d-8d07-77c3a8127391.mp4",
        ),
        1,
    ],
    "egoschema_full": [
        (
            "001934bb-81bd-4cd8-a574-0472ef3f6678",
            "What does C do?\nA. C does this.\nB. C does that.\nC. C does it.\nD. C does so.\nE. C does no." + LETTER,
            None,
            "videos/001934bb-81bd-4cd8-a574-0472ef3f6678.mp4",
        ),
        2,
    ],
    "easy_vqa": [(0, "what is the red shape?", ["triangle"], "images/0.png"), 2],
}


def fields(item):
    medium = item.get("image", item.get("video"))
    found = (item["question_id"], item["text"], item.get("references"), medium, item.get("type"), item.get("group"))
    return tuple(found[:4]) + tuple(value for value in found[4:] if value is not None)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_questions_of_the_authors_files(files, name):
    expected, count = EXPECTED[name]
    items = load_benchmark(name).items(str(files(name)))
    assert fields(items[0]) == expected
    assert len(items) == count


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_question_is_a_record_that_its_metric_scores(files, name):
    benchmark, root = load_benchmark(name), files(name)
    metric = METRICS[benchmark.metric]()
    media = MediaFolder(benchmark.image_root(str(root)), ImageOptions("keep", None), (0, 0, 0))
    for item in benchmark.items(str(root)):
        record = parse("w", item)
        assert len(record.media) == 1
        if "image" in item:
            assert media.visuals(record)[0].pixels.shape[-2:] == (24, 32)
        for [_, references] in record.exchanges:
            if name != "egoschema_full":
                assert metric.score(references[0], references) == (1.0 if name != "textvqa" else pytest.approx(0.3))


def test_the_rounds_of_a_question_are_a_group(files):
    groups = [item["group"] for item in load_benchmark("mmbench").items(str(files("mmbench")))]
    assert groups == ["241", "252", "241"]


def test_shared_images_and_the_last_option_of_four(files):
    items = load_benchmark("mmbench").items(str(files("mmbench")))
    assert items[2]["image"] == items[0]["image"]
    assert items[1]["references"] == ["D", "a cat", 'if the "spacecraft" was damaged', "how steady it was", "a dog",
                                      "a cat", "252"]  # fmt: skip
    assert items[1]["text"].startswith("What is it?\nA. if")


def test_a_tall_images_box_is_padded_at_its_sides(files):
    [_, tall] = load_benchmark("refcoco").items(str(files("refcoco")))
    # 30×61 is padded by 15 (of 31) at the left: 15/61, 1/61, 45/61, 61/61
    assert tall["references"] == ["[0.245902, 0.016393, 0.737705, 1.000000]"]


def test_one_file_of_several(files):
    benchmark, root = load_benchmark("pope"), files("pope")
    items = benchmark.items(str(root / "coco_pope_random.json"))
    assert [item["question_id"] for item in items] == ["random/0", "random/3"]
    assert benchmark.image_root(str(root / "coco_pope_random.json")) == root


def test_a_split_without_answers_and_types(files):
    root = files("docvqa")
    content = json.loads((root / "val_v1.0_withQT.json").read_text())
    for record in content["data"]:
        record.pop("answers"), record.pop("question_types")
    write_json(root / "test_v1.0.json", content)
    items = load_benchmark("docvqa").items(str(root / "test_v1.0.json"))
    assert [sorted(item) for item in items] == [["image", "question_id", "text"]] * 2


def test_the_hubs_questions_of_gqa_beside_the_images(files, tmp_path):
    root = files("gqa")
    asked = {"id": "201307251", "imageId": "n161313", "question": "Is it overcast?", "answer": "no"}
    write_parquet(tmp_path / "testdev.parquet", [asked | {"types": {"detailed": "a", "structural": "verify"}}])
    [item] = load_benchmark("gqa").items(str(tmp_path / "testdev.parquet"), root)
    assert fields(item) == EXPECTED["gqa"][0]


def test_a_questions_file_in_a_folder_beside_the_images(files):
    root = files("gqa")
    (root / "questions1.2").mkdir()
    (root / "testdev_balanced_questions.json").rename(root / "questions1.2" / "testdev_balanced_questions.json")
    assert load_benchmark("gqa").items(str(root))[0]["image"] == "images/n161313.jpg"


def test_the_answers_of_the_same_split_are_found_by_the_files_name(files):
    root = files("activitynet_qa")
    for kind in "qa":
        (root / f"test_{kind}.json").rename(root / f"val_{kind}.json")
    assert len(load_benchmark("activitynet_qa").items(str(root / "val_q.json"))) == 2


HUB = {
    "textvqa": {"question_id": 34602, "question": "what?", "image_id": "00", "answers": ["a"] * 10, "image": pixels()},
    "docvqa": {"questionId": "49153", "question": "what?", "question_types": ["form"], "answers": ["a", "b"],
               "image": pixels()},
    "chartqa": {"type": "human_test", "question": "what?", "answer": "14", "image": pixels()},
    "pope": {"id": "0", "question_id": "1", "question": "Is it?", "answer": "yes", "image_source": "COCO",
             "image": pixels(), "category": "adversarial"},
    "scienceqa": {"image": pixels(), "question": "what?", "choices": ["a", "b"], "answer": 1, "hint": "c",
                  "subject": "natural science"},
    "mmbench": {"index": 241, "question": "what?", "hint": "", "answer": "B", "A": "a", "B": "b", "C": "nan",
                "D": "nan", "category": "ocr", "image": pixels()},
    "seed": {"answer": "B", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d", "data_id": "1",
             "data_type": "image", "question": "what?", "question_id": "101669", "question_type_id": 1,
             "image": [pixels()]},
    "mme": {"question_id": "code_reasoning/0020.png", "image": pixels(), "answer": "Yes", "category": "code_reasoning",
            "question": "Is it? Please answer yes or no."},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_the_questions_of_the_hubs_parquet_files(tmp_path, name):
    key = {"textvqa": "question_id", "docvqa": "questionId", "pope": "question_id", "mmbench": "index"}.get(name, "")
    rows = [HUB[name], HUB[name] | ({key: type(HUB[name][key])(7)} if key else {})]
    rows[1] |= {"question_id": "7"} if name == "seed" else {}
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    metric = METRICS[load_benchmark(name).metric]()
    for item in load_benchmark(name).items(str(tmp_path)):
        record = parse("w", item)
        assert [medium.data for medium in record.media] == [pixels()]
        assert metric.score(record.references[0], record.references) == 1.0
        assert "yes or no" not in item["text"]


def test_the_hubs_test_split_has_no_answers_and_no_types(tmp_path):
    row = {"questionId": "1", "question": "what?", "question_types": None, "answers": None, "image": pixels()}
    write_parquet(tmp_path / "test.parquet", [row, row | {"questionId": "2"}])
    items = load_benchmark("docvqa").items(str(tmp_path))
    assert [sorted(item) for item in items] == [["image", "question_id", "text"]] * 2


def test_benchmarks_by_name_and_by_file(files, tmp_path):
    assert split_name("train.json") == (None, "train.json")
    assert split_name("owner/name:validation") == (None, "owner/name:validation")
    (tmp_path / "my.yaml").write_bytes(BENCHMARKS["easy_vqa"].read_bytes())
    found, path = split_name(f"{tmp_path}/my.yaml:{files('easy_vqa')}")
    assert (found.name, len(found.items(path))) == ("my", 2)


def test_the_page_lists_every_benchmark_with_its_metric():
    rows = re.findall(r"^\| `(\w+)` \|.*?\| `(\w+)` \|", (ROOT / "docs/evaluation.md").read_text(), re.MULTILINE)
    assert dict(rows) == {name: load_benchmark(name).metric for name in BENCHMARKS}
    assert len(rows) == len(BENCHMARKS)


def test_easy_vqa_comes_with_its_package():
    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("the package easy-vqa is not installed")
    benchmark, path = split_name("easy_vqa:")
    assert len(benchmark.source(path, Path())) == 9_673  # as the package's README says
