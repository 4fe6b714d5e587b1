"""`test` with several benchmarks: each question is judged at every scale by its benchmark's metric, and all is kept."""

import json

import pytest

from lit_mm import load
from lit_mm.data.images import ImageOptions
from lit_mm.evaluation.results import read_questions
from tests.helpers import benchmark_files
from tests.helpers.command_line import lit_mm
from tests.helpers.serving import trained_run

SCALES = ["16", "4", "1"]
SIZE = ImageOptions("squash", 64)
SQUASH = ("--data.image", "{mode: squash, size: 64}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def judged(run):
    """The run's folder after a test on a file, DocVQA and POPE, whose references are near what the run answers."""
    folder = run.parent.parent
    for name in ("docvqa", "pope"):
        getattr(benchmark_files, name)(folder / name)
    file = folder / "docvqa/val_v1.0_withQT.json"
    content, model = json.loads(file.read_text()), load(run, image=SIZE)
    picture = folder / "docvqa/documents/pybv0228_81.png"
    for record, changed in zip(content["data"], ("{}", "{}x"), strict=True):
        prompt = f"{record['question']}\nAnswer the question using a single word or phrase."
        record["answers"] = [
            changed.format(model.answer(picture, prompt, max_new_tokens=32).text),
            "none of them at all",
        ]
    file.write_text(json.dumps(content))
    sets = f"[{folder}/val.json, docvqa:{folder}/docvqa, pope:{folder}/pope/coco_pope_random.json]"
    printed = lit_mm("test", "--config", str(folder / "exp.yaml"), "--ckpt_path", "last", "--data.test", sets, *SQUASH)
    return run, printed


def test_each_set_is_judged_by_its_own_metric(judged):
    run, _ = judged
    docvqa, pope, val = (json.loads((run / f"test_{name}.json").read_text()) for name in ("docvqa", "pope", "val"))
    assert [each["metric"] for each in (docvqa, pope, val)] == ["ANLS", "YesNo", "ExactMatch"]
    exact, near = (question.answers[0] for question in read_questions(run / "test_docvqa.parquet")[0])
    assert exact and near
    anls = 1 - 1 / (len(near) + 1)  # one letter is missing
    assert docvqa["scales"][0]["accuracy"] == pytest.approx((1 + anls) / 2)
    assert {name: own["questions"] for name, own in docvqa["types"].items()} == {"figure/diagram": 2, "table/list": 2}
    assert [row["figures"] for row in pope["scales"]] == 3 * [  # what is not no is yes
        {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "yes_rate": 1.0}
    ]


def test_headlines_that_are_no_means_of_questions(run, tmp_path):
    for name in ("mme", "mmbench"):
        (tmp_path / name).mkdir()
        getattr(benchmark_files, name)(tmp_path / name)
    config = str(run.parent.parent / "exp.yaml")
    sets = f"[mme:{tmp_path}/mme, mmbench:{tmp_path}/mmbench]"
    printed = lit_mm("test", "--config", config, "--ckpt_path", "last", "--data.test", sets, *SQUASH)
    mme, mmbench = (json.loads((run / f"test_{name}.json").read_text())["scales"] for name in ("mme", "mmbench"))
    for row in mme:
        assert row["headline"]["value"] == pytest.approx(row["figures"]["perception"], abs=1e-4)
        assert row["headline"]["interval"][0] <= row["headline"]["value"] <= row["headline"]["interval"][1]
    questions, _ = read_questions(run / "test_mmbench.parquet")
    right = [all(q.scores[0] == 1 for q in questions if q.references[-1] == group) for group in ("241", "252")]
    assert mmbench[0]["headline"]["value"] == pytest.approx(sum(right) / 2)
    assert "mme (perception points)" in printed and "mmbench (all rounds right %)" in printed


def test_every_question_is_in_a_file_with_what_was_answered(judged):
    run, _ = judged
    questions, scales = read_questions(run / "test_docvqa.parquet")
    assert scales == SCALES
    assert [question.id for question in questions] == ["49153", "24580"]
    assert questions[0].references[1] == "none of them at all"
    assert questions[0].visual_tokens == [16, 4, 1]
    assert all(logprob < 0 for question in questions for logprob in question.logprobs)
    for question in questions:
        for whole, least, tokens, margin in zip(
            question.logprobs, question.least_logprobs, question.tokens, question.margins, strict=True
        ):
            assert whole <= least <= whole / tokens and margin >= 0
    folder = run.parent.parent
    prompt = (
        "What is the ‘actual’ value per 1000, during the year 1975?\nAnswer the question using a single word or phrase."
    )
    answers = load(run, image=SIZE).answer(
        folder / "docvqa/documents/pybv0228_81.png", prompt, "all", max_new_tokens=32
    )
    assert questions[0].answers == [answer.text for answer in answers.values()]


def test_tables_pictures_and_the_oracle(judged):
    run, printed = judged
    lines = [line.split("│") for line in printed.splitlines()]
    [head] = [n for n, line in enumerate(printed.splitlines()) if "docvqa" in line and "pope" in line and "val" in line]
    rows = {line[1].strip(): line[2:5] for line in lines[head:] if len(line) > 5}
    accuracies = [json.loads((run / f"test_{name}.json").read_text())["scales"] for name in ("val", "docvqa", "pope")]
    for place, scale in enumerate(SCALES):
        for cell, own in zip(rows[scale], accuracies, strict=True):
            assert float(cell.split("±")[0]) == pytest.approx(100 * own[place]["accuracy"], abs=0.006)
    for name in ("val", "docvqa", "pope"):
        for end in (".png", "_oracle.png"):
            assert (run / f"test_{name}{end}").read_bytes().startswith(b"\x89PNG")
    found = json.loads((run / "test_docvqa.json").read_text())["oracle"]
    best = [max(question.scores) for question in read_questions(run / "test_docvqa.parquet")[0]]
    assert found["oracle"]["right"] == pytest.approx(sum(score >= 0.5 for score in best) / 2)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ("docvga:{}", "docvqa"),  # the known ones are listed
        ("[docvqa:{}, docvqa:{}]", "would both be called docvqa"),
        ("docvqa:{}/missing", "missing"),
        ("[]", "empty list"),
    ],
)
def test_what_cannot_be_judged_is_said(run, tmp_path, sets, said):
    with pytest.raises(AssertionError, match=said):
        lit_mm(
            "test",
            *("--config", str(run.parent.parent / "exp.yaml"), "--ckpt_path", "last"),
            *("--data.test", sets.replace("{}", str(tmp_path))),
        )


def predict(run, *arguments):
    config = str(run.parent.parent / "exp.yaml")
    return lit_mm("predict", "--config", config, "--ckpt_path", "last", *SQUASH, *arguments)


@pytest.fixture
def unanswered(run, tmp_path):
    """DocVQA's test split, whose answers only the server knows."""
    folder = tmp_path / "test"
    benchmark_files.docvqa(folder)
    file = folder / "val_v1.0_withQT.json"
    content = json.loads(file.read_text())
    content["data"] = [{k: v for k, v in record.items() if k != "answers"} for record in content["data"]]
    (folder / "test_v1.0.json").write_text(json.dumps(content))
    file.unlink()
    return folder


def test_predict_writes_the_servers_file_of_every_scale(run, unanswered):
    printed = predict(run, "--data.predict", f"docvqa:{unanswered}", "--scales", "[16, 1]")
    assert "submission@16/docvqa.json, submission@1/docvqa.json" in " ".join(printed.split())
    [folder] = run.glob("answers_*")
    for scale in "16", "1":
        lines = [json.loads(line) for line in (folder / f"answers@{scale}.jsonl").read_text().splitlines()]
        expected = [{"questionId": line["question_id"], "answer": line["text"].strip()} for line in lines]
        assert [each["questionId"] for each in expected] == [49153, 24580]
        assert json.loads((folder / f"submission@{scale}/docvqa.json").read_text()) == expected
        assert lines[0]["prompt"].endswith("\nAnswer the question using a single word or phrase.")
    assert not (folder / "submission@4").exists()


def test_a_prediction_that_lacks_answers_is_no_submission(run, unanswered):
    short = ("--data.predict", f"docvqa:{unanswered}", "--data.eval_batch_size", "1")
    with pytest.raises(AssertionError, match=r"1 answers to 2 questions: 1 without an answer, such as '24580'"):
        predict(run, *short, "--trainer.limit_predict_batches", "1")
    folder = sorted(run.glob("answers_*"))[-1]
    assert len((folder / "answers@16.jsonl").read_text().splitlines()) == 1
    assert not list(folder.glob("submission*"))
