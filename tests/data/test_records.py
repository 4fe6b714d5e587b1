"""Formats in, and every kind of bad record: the error names file, record, field, found and expected."""

import json
import pickle

import pytest

from lit_mm.data.records import BadRecords, RecordError, parse, read_items
from tests.conftest import conversation


def item(**changes):
    return {"id": "a", "image": "a.png", "conversations": conversation(("<image>\nWhat?", "This."))} | changes


def test_llava_record():
    record = parse("f, record 0", item())
    assert (record.id, record.images, record.where) == ("a", ("a.png",), "f, record 0")
    assert [(turn.role, turn.text) for turn in record.turns] == [("user", "<image>\nWhat?"), ("assistant", "This.")]


def test_several_images_and_text_only():
    pair = conversation(("<image> and <image>?", "Yes."))
    assert parse("w", item(image=["a.png", "b.png"], conversations=pair)).images == ("a.png", "b.png")
    text = {"id": 7, "conversations": conversation(("Hi", "Ho"), ("And?", "So."))}
    assert list(parse("w", text).exchanges) == [("Hi", "Ho"), ("And?", "So.")]


def test_evaluation_question():
    record = parse("w", {"question_id": 3, "image": "a.png", "text": "What?"})
    assert record.id == 3
    assert list(record.exchanges) == [("<image>\nWhat?", None)]


def turns(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        (item(conversations=[]), "empty conversation", "conversations: expected a list of turns, found []"),
        (item(conversations="hi"), "empty conversation", "found 'hi'"),
        (
            item(conversations=turns(("human", "<image>"), ("human", "b"))),
            "two human turns in a row",
            "[1].from: expected gpt, found human",
        ),
        (item(conversations=turns(("gpt", "b"), ("human", "<image>"))), "first turn is not human's", "[0].from"),
        (
            item(conversations=turns(("human", "<image>"), ("bot", "b"))),
            "unknown role",
            "[1].from: expected human or gpt, found 'bot'",
        ),
        (item(conversations=turns(("human", "<image>"))), "no answer", "the last turn (0) is human's"),
        (
            item(conversations=turns(("human", "<image>"), ("gpt", " "))),
            "empty text",
            "conversations[1].value: expected text, found ' '",
        ),
        (item(conversations=turns(("human", "<image>"), ("gpt", 3))), "empty text", "found 3"),
        (item(conversations=[{"role": "human"}]), "malformed turn", "conversations[0]: expected {'from', 'value'}"),
        (item(conversations=["hi"]), "malformed turn", "found 'hi'"),
        (item(image=["a.png", "b.png"]), "image count disagrees", "1 <image> in the text, 2 in the field image"),
        (item(image=None), "image count disagrees", "1 <image> in the text, 0 in"),
        (item(conversations=conversation(("What?", "This."))), "image count disagrees", "0 <image> in the text, 1"),
        (item(conversations=conversation(("What?", "<image>"))), "image in an answer", "conversations[1].value"),
        (item(image=3), "malformed image path", "image: expected a relative path or a list, found 3"),
        (item(image=[""]), "malformed image path", "found ['']"),
        ({"a": 1}, "unknown format", "an object with ['a']"),
        ([1], "unknown format", "found list '[1]'"),
    ],
)
def test_bad_records(bad, reason, detail):
    with pytest.raises(RecordError) as caught:
        parse("set.json, record 4 (id a)", bad)
    assert caught.value.reason == reason
    assert str(caught.value).startswith("set.json, record 4 (id a): ")
    assert detail in str(caught.value)


def test_list_and_lines_are_told_apart(tmp_path):
    items = [item(), {"question_id": 1, "text": "What?"}]
    (tmp_path / "list.json").write_text("\n " + json.dumps(items, indent=1))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, items)) + "\n")
    assert [i for _, i in read_items(tmp_path / "list.json")] == items
    assert [i for _, i in read_items(tmp_path / "lines.jsonl")] == items
    assert read_items(tmp_path / "list.json")[1][0] == f"{tmp_path}/list.json, record 1 (id 1)"
    assert read_items(tmp_path / "lines.jsonl")[1][0] == f"{tmp_path}/lines.jsonl, record 2 (id 1)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": 2}', "line 1: expected a JSON list, or one JSON object a line, found '{\"a\": 1,'"),
        (b"[1, 2", "not valid JSON"),
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_files_that_are_no_list(tmp_path, content, message):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json") as caught:
        read_items(tmp_path / "bad.json")
    assert message in str(caught.value)


def test_lines_may_hold_every_other_separator(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert [item["text"] for _, item in read_items(tmp_path / "a.jsonl")] == ["a\u2028b\u0085c"]


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no instruction file nowhere\.json"):
        read_items("nowhere.json")


def test_an_object_on_one_line_is_one_record_and_refused_as_such(tmp_path):
    (tmp_path / "bad.json").write_text('{"data": []}')
    with pytest.raises(RecordError, match="unknown format"):
        parse(*read_items(tmp_path / "bad.json")[0])


def test_skipping_counts_and_reports():
    bad = BadRecords("skip")
    kept = bad.keep(
        [("f, record 0", item()), ("f, record 1", item(image=3)), ("f, record 2", item(image=4))], lambda i: parse(*i)
    )
    assert len(kept) == 1
    report = bad.report("f", 3)
    assert "f: skipped 2 of 3 records" in report
    assert "2 × malformed image path, first: f, record 1" in report
    with pytest.raises(RecordError):
        BadRecords("error").keep([("f, record 1", item(image=3))], lambda i: parse(*i))


def test_errors_survive_worker_processes():
    error = pickle.loads(pickle.dumps(RecordError("w", "r", "d")))
    assert (error.where, error.reason, error.detail, str(error)) == ("w", "r", "d", "w: r: d")
