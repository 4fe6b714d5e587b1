"""What the servers of benchmarks want."""

import json

import openpyxl
import pytest
import yaml

from lit_mm.evaluation.benchmarks import BENCHMARKS, load_benchmark
from tests.helpers.benchmark_files import pixels, write_parquet


def predictions(name, root, answers):
    items = load_benchmark(name).items(str(root))
    return [
        {"question_id": item["question_id"], "prompt": item["text"], "text": answer}
        for item, answer in zip(items, answers, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        (
            "textvqa",
            ["Dakota", "copenhagen "],
            [{"question_id": 34602, "answer": "Dakota"}, {"question_id": 34603, "answer": "copenhagen"}],
        ),
        (
            "docvqa",
            ["0.28", "UC"],
            [{"questionId": 49153, "answer": "0.28"}, {"questionId": 24580, "answer": "UC"}],
        ),
        (
            "gqa",
            ["no", "woman"],
            [
                {"questionId": "201307251", "prediction": "no"},
                {"questionId": "201640614", "prediction": "woman"},
            ],
        ),
        (
            "egoschema_full",
            ["D", "The answer is E."],
            {"001934bb-81bd-4cd8-a574-0472ef3f6678": 3, "0074f737-11cb-497d-8d07-77c3a8127391": 4},
        ),
    ],
)
def test_json_for_a_server(files, tmp_path, name, answers, expected):
    root = files(name)
    given = predictions(name, root, answers)[::-1]  # in any order
    file = load_benchmark(name).submission(given, tmp_path / "out" / "deep", str(root))
    assert json.loads(file.read_text()) == expected


def test_lines_for_a_server(files, tmp_path):
    root = files("seed")
    file = load_benchmark("seed").submission(predictions("seed", root, ["(A) One"]), tmp_path, str(root))
    assert file.read_text() == '{"question_id": "101669", "prediction": "A"}\n'


def test_an_answer_that_means_no_option_is_told_as_none(files, tmp_path):
    root = files("egoschema_full")
    file = load_benchmark("egoschema_full").submission(
        predictions("egoschema_full", root, ["Nothing at all", "A"]), tmp_path, str(root)
    )
    assert list(json.loads(file.read_text()).values()) == [-1, 0]


def test_a_table_for_a_server(files, tmp_path):
    root = files("mmbench")
    given = predictions("mmbench", root, ["B", "D. a cat\x07", "=1+1"])
    file = load_benchmark("mmbench").submission(given, tmp_path, str(root))
    head, first, second, third = openpyxl.load_workbook(file).active.values
    assert head == ("index", "question", "A", "B", "C", "D", "prediction")
    assert first == (241, "Which of the following could Gordon's test show?", 'if the "spacecraft" was damaged',
                     "how steady it was", None, None, "B")  # fmt: skip
    assert (second[0], second[-2:]) == (252, ("a cat", "D. a cat_x0007_"))  # Excel's way to write a bell
    assert (third[0], third[-1]) == (1000241, "=1+1")
    assert openpyxl.load_workbook(file).active.cell(4, 7).data_type == "s"  # not a formula


def test_ids_of_the_hubs_files_are_numbers_too(tmp_path):
    row = {"questionId": "337", "question": "what?", "question_types": ["form"], "answers": None}
    write_parquet(tmp_path / "test.parquet", [row | {"image": pixels()}])
    file = load_benchmark("docvqa").submission([{"question_id": "337", "text": "a"}], tmp_path, str(tmp_path))
    assert json.loads(file.read_text()) == [{"questionId": 337, "answer": "a"}]


def test_answers_that_disagree_with_the_questions(files, tmp_path):
    root, benchmark = files("docvqa"), load_benchmark("docvqa")
    first, second = predictions("docvqa", root, ["a", "b"])
    for given, message in (
        ([first], "1 answers to 2 questions: 1 without an answer, such as '24580'; expected one answer to each"),
        ([first, second, first], "3 answers to 2 questions: 1 answered twice, such as '49153'"),
        ([first, second, second | {"question_id": 5}], "3 answers to 2 questions: 1 that it does not ask, such as '5'"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.submission(given, tmp_path / "out", str(root))
    assert not (tmp_path / "out").exists()


def test_a_benchmark_without_a_server(files, tmp_path):
    root = files("chartqa")
    with pytest.raises(ValueError, match="chartqa: has no server for submissions"):
        load_benchmark("chartqa").submission([], tmp_path, str(root))


def test_a_tsv_file_by_ones_own_benchmark(files, tmp_path):
    content = yaml.safe_load(BENCHMARKS["easy_vqa"].read_text())
    content["submission"] = {"file": "mine.tsv", "row": {"id": "{question_id}", "asked": "{0}", "said": "{prediction}"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    given = [{"question_id": 0, "text": "circle"}, {"question_id": 1, "text": "no"}]
    file = load_benchmark(str(tmp_path / "my.yaml")).submission(given, tmp_path, str(files("easy_vqa")))
    assert file.read_text() == "id\tasked\tsaid\n0\twhat is the red shape?\tcircle\n1\tis there a circle?\tno\n"
