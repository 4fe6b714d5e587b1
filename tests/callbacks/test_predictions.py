"""Answers in files: none replaces another's, each question has an id, whatever text and ids hold."""

import json
from types import SimpleNamespace

import pytest

from lit_mm.callbacks.predictions import AnswerWriter, as_line, new_folder
from lit_mm.inference.generation import Generated


def made(text):
    return Generated([5, 6], [-0.5, -1.0, -0.25], "stop", 16, text)


def write(folder, scales, rows):
    """One prediction, as the trainer calls the writer."""
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer = SimpleNamespace(log_dir=str(folder), is_global_zero=True, global_rank=0, strategy=strategy)
    writer, lit = AnswerWriter(), SimpleNamespace(asked_scales=scales)
    writer.on_predict_start(trainer, lit)
    answers = [{"question_id": id, "prompt": "?", "answers": dict.fromkeys(scales, made(text))} for id, text in rows]
    writer.write_on_batch_end(trainer, lit, answers, None, None, 0, 0)
    writer.on_predict_end(trainer, lit)


def test_a_second_prediction_leaves_the_first_alone(tmp_path):
    write(tmp_path, [16, 4], [(1, "yes")])
    first = {file: file.read_bytes() for file in tmp_path.rglob("*.jsonl")}
    write(tmp_path, [1], [(1, "no")])
    assert all(file.read_bytes() == content for file, content in first.items())
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.jsonl")}
    names = {"answers_0/answers@16.jsonl", "answers_0/answers@4.jsonl", "answers_1/answers@1.jsonl"}
    assert found == names | {"answers_0/answers.jsonl", "answers_1/answers.jsonl"}


def test_one_file_holds_every_scale(tmp_path):
    write(tmp_path, [16, 4], [(1, "yes"), (2, "no")])
    lines = [json.loads(line) for line in (tmp_path / "answers_0/answers.jsonl").read_text().splitlines()]
    assert [(line["question_id"], line["scale"], line["text"]) for line in lines] == [
        (1, "16", "yes"),
        (1, "4", "yes"),
        (2, "16", "no"),
        (2, "4", "no"),
    ]
    told = {"prompt": "?", "logprob": -1.75, "tokens": 2, "visual_tokens": 16, "finish": "stop"}
    assert told.items() <= lines[0].items()


def test_folders_are_taken_in_turn(tmp_path):
    assert [new_folder(tmp_path / "run").name for _ in range(3)] == ["answers_0", "answers_1", "answers_2"]


@pytest.mark.parametrize("text", ["é 日本 😀", "half \ud83d of it", "\u2028 line", "\0"])
def test_any_answer_can_be_written_and_read(tmp_path, text):
    write(tmp_path, [1], [("a", text)])
    [line] = (tmp_path / "answers_0/answers@1.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["text"] == text
    assert as_line({"text": "é"}) == '{"text": "é"}\n'
