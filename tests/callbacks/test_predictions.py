"""Answers in files: none replaces another's, each question has one line per scale, also after an interruption and on
several ranks, whatever text and ids hold."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import pyarrow.parquet
import pytest
import torch

from lit_mm.callbacks.predictions import UNFINISHED, AnswerWriter, as_line, new_folder, repaired
from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.images import ImageOptions
from tests.helpers.benchmark_files import docvqa
from tests.helpers.killing import Killed, Recorder
from tests.helpers.records import conversation, write_instruction_set
from tests.helpers.runs import module
from tests.helpers.sharded import on_ranks

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "inference_mode": False}
QUIET |= {"use_distributed_sampler": False, "enable_model_summary": False}


@dataclass
class Prediction:
    """One run of predict.

    Args:
        root: Folder of an instruction set, of ask.json, and of the answers.
        scales: Asked scales; None: all.
        stop_after: Batch before which all of its ranks fail.
        model: Options of the module.
        trainer: Of the trainer.
        data: Of the data module.
        parquet: Whether the writer writes it.
    """

    root: Path
    scales: list[int] | None = None
    stop_after: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    parquet: bool = False

    @property
    def folder(self) -> Path:
        """Where on_ranks leaves errors."""
        return self.root


def predict(run: Prediction) -> list[str]:
    """Run it; return the ids that the model was asked."""
    lit, asked = module(**run.model), list[str]()
    lit.ask_at(run.scales)
    options = {"image_root": str(run.root), "image": ImageOptions("keep", None), "eval_batch_size": 2}
    data = ImageDataModule(lit.inputs, **{"predict": str(run.root / "ask.json"), **options, **run.data})
    way = "exception" if run.stop_after else None
    killing = Recorder(str(run.root), way, run.stop_after, int(os.environ.get("RANK", "0")), "predict_batch_start")
    noting = lightning.pytorch.callbacks.LambdaCallback(
        on_predict_batch_start=lambda _, __, batch, *___: asked.extend(q.record for q in batch.questions)
    )
    callbacks = [AnswerWriter(run.parquet), killing, noting]
    trainer = lightning.Trainer(**{**QUIET, **run.trainer}, default_root_dir=run.root, callbacks=callbacks)
    try:
        trainer.predict(lit, data, ckpt_path=run.root / "model.ckpt", weights_only=True)
    except Killed:
        (run.root / "killed").touch()
    return asked


def predict_on_rank(run: Prediction) -> None:
    """The same on a rank of several."""
    predict(replace(run, trainer={"devices": 2, "strategy": "ddp"}))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An instruction set with questions, some of them in one record, and a model's checkpoint."""
    root = write_instruction_set(tmp_path_factory.mktemp("predict"))
    items = [{"id": f"é{n}", "image": f"images/{n}.png", "text": "<image>\nwhat?"} for n in range(7)]
    items = [{"question_id": item["id"], "image": item["image"], "text": "what color?"} for item in items]
    turns = conversation(("<image>\nis there a circle?", "yes"), ("a square?", "no"), ("a line?", "no"))
    items[2:2] = [{"id": "several", "image": "images/3.png", "conversations": turns}]
    (root / "ask.json").write_text(json.dumps([*items, {"question_id": 7, "text": "is it?"}]))
    lit = module()
    torch.manual_seed(0)
    lit.configure_model()
    trainer = lightning.Trainer(**QUIET)
    trainer.strategy.connect(lit)
    trainer.save_checkpoint(root / "model.ckpt")
    return root


@pytest.fixture
def root(made, tmp_path) -> Path:
    """The same for one test."""
    return Path(shutil.copytree(made, tmp_path / "root", ignore=shutil.ignore_patterns("answers_*")))


@pytest.fixture(scope="module")
def expected(made) -> list[dict]:
    """The rows of a prediction that nothing interrupts, but for their seconds."""
    predict(Prediction(made))
    return rows_of(made / "answers_0")


def rows_of(folder: Path) -> list[dict]:
    lines = [line for file in sorted(folder.glob("answers*.jsonl")) if "@" not in file.name for line in read(file)]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def by_question(rows: list[dict]) -> list[tuple]:
    """What is asked and answered, rounded as batches of other sizes round."""
    return sorted((str(row["question_id"]), row["scale"], row["text"], round(row["logprob"], 3)) for row in rows)


def test_one_file_holds_every_scale(expected, made):
    ids = ["é0", "é1", "several#1", "several#2", "several#3", *(f"é{n}" for n in range(2, 7)), 7]
    assert [(row["question_id"], row["scale"]) for row in expected] == [(i, s) for i in ids for s in ("16", "4", "1")]
    assert {row["visual_tokens"] for row in expected[:3]} == {16, 4, 1}
    for scale in ("16", "4", "1"):
        names = ("question_id", "prompt", "text")
        own = [{name: row[name] for name in names} for row in expected if row["scale"] == scale]
        assert read(made / f"answers_0/answers@{scale}.jsonl") == own
    assert json.loads((made / "answers_0/settings.json").read_text())["scales"] == ["16", "4", "1"]


def test_a_second_prediction_leaves_the_first_alone(root):
    predict(Prediction(root, [16, 4]))
    first = {file: file.read_bytes() for file in root.glob("answers_0/*")}
    predict(Prediction(root, [16, 4]))
    predict(Prediction(root, [1], data={"image_first": True}))
    assert len(first) == 4 and all(file.read_bytes() == content for file, content in first.items())
    assert [file.name for file in sorted(root.glob("answers_2/*"))] == [
        "answers.jsonl",
        "answers@1.jsonl",
        "settings.json",
    ]
    assert len(list(root.glob("answers_*"))) == 3


@pytest.mark.parametrize("torn", ["", '{"question_id": "é2", "prom'], ids=["whole", "torn"])
def test_an_interrupted_prediction_is_gone_on_with(root, expected, torn):
    predict(Prediction(root, stop_after=4))  # in the middle of its batches, after six records
    assert (root / "killed").exists() and (root / "answers_0" / UNFINISHED).exists()
    for name in ("answers", "answers@4"):
        with (root / f"answers_0/{name}.jsonl").open("a") as file:
            file.write(torn)
    asked = predict(Prediction(root, parquet=True))
    assert asked == ["é5", "é6", 7]
    assert by_question(rows_of(root / "answers_0")) == by_question(expected)
    assert len(read(root / "answers_0/answers@4.jsonl")) == len(expected) // 3
    assert [folder.name for folder in root.glob("answers_*")] == ["answers_0"]
    assert not (root / "answers_0" / UNFINISHED).exists()
    table = pyarrow.parquet.read_table(root / "answers_0/answers.parquet").to_pylist()
    assert by_question(table) == by_question(expected) and all(row["seconds"] > 0 for row in table)


def test_wherever_it_is_cut_off_each_question_is_answered_once(root, expected):
    """Every file at a length of its own, also within a record of three questions and within a letter."""
    predict(Prediction(root, stop_after=5))
    (folder,) = root.glob("answers_*")
    whole = {file: file.read_bytes() for file in folder.glob("*.jsonl")}
    end = whole[folder / "answers.jsonl"].index(b"several#2")
    for cut in (0, 1, end, end + 40, len(whole[folder / "answers.jsonl"]) - 1):
        for file, content in whole.items():
            file.write_bytes(content[:cut] if file.name == "answers.jsonl" else content)
        predict(Prediction(root, stop_after=0 if cut == end else 1))
        if cut == end:
            assert by_question(rows_of(folder)) == by_question(expected)
            (folder / "settings.json").rename(folder / UNFINISHED)
        counts = [len(read(file)) for file in folder.glob("answers@*.jsonl")]
        assert {3 * count for count in counts} == {len(read(folder / "answers.jsonl"))}


def test_files_are_cut_to_what_all_of_them_hold(tmp_path):
    lines = [as_line({"question_id": n // 2, "text": "é"}) for n in range(8)]
    for cut in range(len("".join(lines).encode()) + 1):
        (tmp_path / "answers.jsonl").write_bytes("".join(lines).encode()[:cut])
        for scale, count in (("4", 3), ("1", 4)):
            (tmp_path / f"answers@{scale}.jsonl").write_text("a line\n" * count + "torn")
        whole = min(3, cut // len("".join(lines[:2]).encode()))
        assert repaired(tmp_path, "", ["4", "1"]) == set(range(whole))
        assert (tmp_path / "answers.jsonl").read_text() == "".join(lines[: 2 * whole])
        assert (tmp_path / "answers@1.jsonl").read_text() == "a line\n" * whole


def test_all_answered_but_not_said_so(root, expected):
    predict(Prediction(root))
    (root / "answers_0/settings.json").rename(root / "answers_0" / UNFINISHED)
    assert predict(Prediction(root, parquet=True)) == []
    assert by_question(rows_of(root / "answers_0")) == by_question(expected)
    assert (root / "answers_0/settings.json").exists() and (root / "answers_0/answers.parquet").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"scales": [16]},
        {"model": {"max_new_tokens": 2}},
        {"model": {"decoding": "own"}},
        {"data": {"image_first": True}},
        {"trainer": {"precision": "bf16-mixed"}},
        {"trainer": {"limit_predict_batches": 1}},
        {"checkpoint": 1},
        {"questions": 1},
    ],
    ids=str,
)
def test_another_prediction_is_not_gone_on_with(root, made, change):
    predict(Prediction(root, stop_after=3))
    kept = {file: file.read_bytes() for file in root.glob("answers_0/*")}
    for name, file in (("checkpoint", "model.ckpt"), ("questions", "ask.json")):
        if change.pop(name, None):
            (root / file).unlink()
            (root / file).write_bytes((made / file).read_bytes())
    predict(Prediction(root, **change))
    assert len(list(root.glob("answers_*"))) == 2
    assert all(file.read_bytes() == content for file, content in kept.items())


HOLD = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_answers_that_another_process_is_writing_are_left_alone(root):
    predict(Prediction(root, stop_after=3))
    command = [sys.executable, "-c", HOLD, str(root / "answers_0" / UNFINISHED)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert len(predict(Prediction(root))) == 11
        other.stdin.close()
    assert (root / "answers_0" / UNFINISHED).exists() and (root / "answers_1/settings.json").exists()


def test_questions_with_one_id_begin_anew(root):
    items = [{"question_id": 1, "text": text} for text in ("is it?", "was it?", "will it be?")]
    (root / "ask.json").unlink()
    (root / "ask.json").write_text(json.dumps(items))
    predict(Prediction(root, stop_after=2))
    with pytest.warns(UserWarning, match="several questions have the id 1"):
        predict(Prediction(root))
    assert [len(read(file)) for file in sorted(root.glob("answers_*/answers.jsonl"))] == [6, 9]


@pytest.mark.slow
def test_two_ranks_answer_each_question_once_also_after_an_interruption(root, expected):
    """Stopped on two ranks, gone on with on two, stopped again, and ended by one, which has the other's file, too."""
    on_ranks(2, [Prediction(root), Prediction(root, stop_after=2), Prediction(root, stop_after=2)], predict_on_rank)
    assert by_question(rows_of(root / "answers_0")) == by_question(expected)
    [part] = root.glob(f"answers_*/{UNFINISHED}")
    answered = {row["question_id"] for row in rows_of(part.parent)}
    assert 3 < len(answered) < 11
    asked = predict(Prediction(root, parquet=True))
    assert not answered & {*asked} and len(asked) == 11 - len(answered)
    assert by_question(rows_of(part.parent)) == by_question(expected)
    tables = [pyarrow.parquet.read_table(file).to_pylist() for file in part.parent.glob("*.parquet")]
    assert len(tables) == 2 and by_question([*tables[0], *tables[1]]) == by_question(expected)


@pytest.mark.slow
def test_two_ranks_write_one_submission(root):
    (folder := root / "docvqa").mkdir()
    docvqa(folder)
    data = {"predict": f"docvqa:{folder}", "eval_batch_size": 1, "image": ImageOptions("squash", 64)}
    predict(Prediction(root, data=data))
    on_ranks(2, [Prediction(root, data=data)], predict_on_rank)
    assert len(read(root / "answers_1/answers@4.rank1.jsonl")) == 1
    alone, together = (json.loads((root / f"answers_{n}/submission@4/docvqa.json").read_text()) for n in (0, 1))
    assert together == alone and len(alone) == 2


def test_folders_are_taken_in_turn(tmp_path):
    assert [new_folder(tmp_path / "run").name for _ in range(3)] == ["answers_0", "answers_1", "answers_2"]


@pytest.mark.parametrize("text", ["é 日本 😀", "half \ud83d of it", "\u2028 line", "\0"])
def test_any_id_can_be_written_and_read(root, text):
    (root / "ask.json").unlink()
    (root / "ask.json").write_text(json.dumps([{"question_id": text, "text": "is it?"}]))
    predict(Prediction(root, [1], parquet=True))
    [line] = read(root / "answers_0/answers@1.jsonl")
    assert line["question_id"] == text
    [row] = pyarrow.parquet.read_table(root / "answers_0/answers.parquet").to_pylist()
    assert row["question_id"] == text.replace("\ud83d", "\\ud83d")
    assert as_line({"text": "é"}) == '{"text": "é"}\n'
