"""Formats in, and every kind of bad record: the error names file, record, field, found and expected."""

import base64
import datetime
import json
import pickle
import uuid

import pytest

from lit_mm.data import records
from lit_mm.data.records import BadRecords, Media, RecordError, id_of, image_first, parse
from tests.helpers.records import conversation, kept_of


def item(**changes):
    return {"id": "a", "image": "a.png", "conversations": conversation(("<image>\nWhat?", "This."))} | changes


def test_llava_record():
    record = parse("f, record 0", item())
    assert (record.id, record.media, record.where) == ("a", (Media("image", "a.png"),), "f, record 0")
    assert record.system is None
    assert record.turns == ("<image>\nWhat?", "This.")


def names(record):
    return [medium.name for medium in record.media]


def test_several_images_and_text_only():
    pair = conversation(("<image> and <image>?", "Yes."))
    assert names(parse("w", item(image=["a.png", "b.png"], conversations=pair))) == ["a.png", "b.png"]
    text = {"id": 7, "conversations": conversation(("Hi", "Ho"), ("And?", "So."))}
    assert list(parse("w", text).exchanges) == [("Hi", ("Ho",)), ("And?", ("So.",))]


def test_evaluation_question():
    record = parse("w", {"question_id": 3, "image": "a.png", "text": "What?"})
    assert record.id == 3
    assert list(record.exchanges) == [("<image>\nWhat?", ())]


def test_accepted_answers_and_the_labels_of_a_question():
    listed = {"references": ["red", ""], "type": "color", "group": 4}
    record = parse("w", {"question_id": 3, "text": "What?"} | listed)
    assert (list(record.exchanges), record.type, record.group) == ([("What?", ("red", ""))], "color", "4")
    assert list(parse("w", item(references=["That.", "It."])).exchanges) == [("<image>\nWhat?", ("That.", "It."))]
    record = parse("w", item(references=None, type=None))
    assert ([answers for _, answers in record.exchanges], record.type, record.group) == ([("This.",)], "", "")


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
        (item(conversations=turns(("human", "<image>"), ("gpt", 3))), "not text", "expected text, found int 3"),
        (item(conversations=[{"role": "human"}]), "malformed turn", "conversations[0]: expected {'from', 'value'}"),
        (item(conversations=["hi"]), "malformed turn", "found 'hi'"),
        (item(image=["a.png", "b.png"]), "image count disagrees", "1 <image> in the text, 2 in the field image"),
        (item(image=None), "image count disagrees", "1 <image> in the text, 0 in"),
        (item(conversations=conversation(("What?", "This."))), "image count disagrees", "0 <image> in the text, 1"),
        (item(conversations=conversation(("What?", "<image>"))), "image in an answer", "conversations[1].value"),
        (item(references="This."), "malformed references", "references: expected a list of accepted answers as text"),
        (item(references=[3]), "malformed references", "found [3]"),
        (item(references=[]), "malformed references", "found []"),
        (
            item(references=["a"], conversations=conversation(("<image>", "a"), ("b", "c"))),
            "references of several questions",
            "references: expected one question, found 2",
        ),
        (item(type=["a"]), "malformed type", "type: expected text or a number, found ['a']"),
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


def test_images_and_videos_stand_in_the_order_of_their_markers():
    text = conversation(("<video> then <image>?", "No."), ("<image> then <video> then <image>?", "Yes."))
    media = {"images": ["a.png", "b.png", "c.png"], "video": ["a.mp4", "b.mp4"]}
    record = parse("w", {"conversations": text} | media)
    expected = [("video", "a.mp4"), ("image", "a.png"), ("image", "b.png"), ("video", "b.mp4"), ("image", "c.png")]
    assert [(medium.kind, medium.name) for medium in record.media] == expected


def test_a_question_gets_the_markers_that_it_has_not():
    media = {"images": ["a.png", "b.png"], "video": "a.mp4"}
    record = parse("w", {"text": "What?"} | media)
    assert record.turns[0] == "<image>\n<image>\n<video>\nWhat?"
    record = parse("w", {"text": "Is <image> like <image>?"} | media)
    assert record.turns[0] == "<video>\nIs <image> like <image>?"
    assert names(record) == ["a.mp4", "a.png", "b.png"]


PIXELS = bytes(range(256))
URI = "data:image/png;base64," + base64.b64encode(PIXELS).decode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a/b.png", Media("image", "a/b.png")),
        ({"path": "a.png", "bytes": None}, Media("image", "a.png")),
        ({"path": "a.png", "bytes": PIXELS}, Media("image", "a.png", PIXELS)),
        ({"path": None, "bytes": PIXELS}, Media("image", "image", PIXELS)),
        ({"bytes": PIXELS}, Media("image", "image", PIXELS)),
        (PIXELS, Media("image", "image", PIXELS)),
        (URI, Media("image", "image", PIXELS)),
    ],
)
def test_where_an_image_may_stand(value, expected):
    assert parse("w", item(image=value)).media == (expected,)
    label = expected.name if expected.name != "image" else "images[0]"
    assert parse("w", item(image=None, images=[value])).media == (Media("image", label, expected.data),)


def chat(*messages, **fields):
    return {"messages": [{"role": role, "content": content} for role, content in messages]} | fields


def test_chat_of_plain_texts():
    messages = [("system", " Be brief. "), ("user", "<image>\nWhat?"), ("assistant", "This."), ("user", "Sure?")]
    record = parse("f, record 0", chat(*messages, images=["a.png"], id=7))
    assert (record.id, record.system, names(record)) == (7, "Be brief.", ["a.png"])
    assert list(record.exchanges) == [("<image>\nWhat?", ("This.",)), ("Sure?", ())]


def test_chat_of_typed_parts():
    asked = [
        {"type": "text", "text": " Is this: "},
        {"type": "image"},
        {"type": "text", "text": "in"},
        {"type": "video", "video": "own.mp4"},
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image", "text": None, "image": "own.png"},
        {"type": "image", "index": 1},
    ]
    answer = [{"type": "text", "text": "Yes,"}, {"type": "text", "text": "it is."}]
    system = [{"type": "text", "text": "Be brief."}]
    item = chat(("system", system), ("user", asked), ("assistant", answer), images=["a.png", {"bytes": PIXELS}])
    record = parse("f, record 0", item)
    assert record.system == "Be brief."
    assert list(record.turns) == [
        "Is this:\n<image>\nin\n<video>\n<image>\n<image>\n<image>",
        "Yes,\nit is.",
    ]
    assert record.media == (
        Media("image", "a.png"),
        Media("video", "own.mp4"),
        Media("image", "messages[1].content[4].image_url.url", PIXELS),
        Media("image", "own.png"),
        Media("image", "images[1]", PIXELS),
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": {"path": "a.png", "bytes": None}, "url": None},
    ],
)
def test_where_a_part_names_its_file(part):
    assert parse("w", chat(("user", [part]))).media == (Media("image", "a.png"),)


def image(**fields):
    return {"type": "image", **fields}


def uri(header, content):
    return {"type": "image_url", "image_url": {"url": f"{header},{content}"}}


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        (chat(), "empty conversation", "messages: expected a list of messages, found []"),
        ({"messages": "hi"}, "empty conversation", "found 'hi'"),
        (chat(("system", "a")), "empty conversation", "expected a user message, found only a system message"),
        ({"messages": ["hi"]}, "malformed turn", "messages[0]: expected {'role', 'content'}, found 'hi'"),
        ({"messages": [{"role": "user"}]}, "malformed turn", "messages[0]: expected {'role', 'content'}"),
        (chat(("assistant", "a")), "first turn is not user's", "messages[0].role: expected user, found assistant"),
        (chat(("system", "a"), ("assistant", "b")), "first turn is not user's", "messages[1].role: expected user"),
        (chat(("user", "a"), ("user", "b")), "two user turns in a row", "messages[1].role: expected assistant"),
        (chat(("user", "a"), ("system", "b")), "unknown role", "messages[1].role: expected user or assistant"),
        (chat(("user", "a"), ("tool", "b")), "unknown role", "found 'tool'"),
        (chat(("user", "a"), (["x"], "b")), "unknown role", "found ['x']"),
        (chat(("user", "")), "empty text", "messages[0].content: expected text, found ''"),
        (chat(("user", [])), "not text", "messages[0].content: expected text, found list []"),
        (chat(("user", None)), "empty text", "found None"),
        (chat(("user", [{"type": "text"}])), "empty text", "messages[0].content[0].text: expected text, found None"),
        (chat(("user", ["a"])), "unknown part", "messages[0].content[0]: expected an object of type text, image, "),
        (chat(("user", [{"type": "input_audio"}])), "unknown part", "found {'type': 'input_audio'}"),
        (chat(("user", [{"type": ["image"]}])), "unknown part", "found {'type': ['image']}"),
        (chat(("user", "<image>"), ("assistant", "<image>")), "image in an answer", "messages[1].content: <image> in"),
        (chat(("user", "a"), ("assistant", [image()])), "image in an answer", "messages[1].content: <image> in"),
        (chat(("user", "a"), ("assistant", [{"type": "video"}])), "video in an answer", "<video> in an assistant"),
        (chat(("system", "<image>"), ("user", "a")), "image in a system message", "messages[0].content: <image>"),
        (chat(("user", [image()])), "image count disagrees", "1 <image> in the text, 0 in the field image"),
        (chat(("user", [image()]), images=["a", "b"]), "image count disagrees", "1 <image> in the text, 2 in"),
        (chat(("user", [image(image="a")]), images=["a"]), "image count disagrees", "0 <image> in the text, 1 in"),
        (chat(("user", "a"), videos=["a"]), "video count disagrees", "0 <video> in the text, 1 in the field video"),
        (
            chat(("user", [image(index=1)]), image="a"),
            "image order disagrees",
            "image number 0 of the text has index 1",
        ),
        (
            chat(("user", [image(), {"type": "text", "text": "<image>"}]), images=["a", "b"]),
            "image marker in a text part",
            "messages[0].content[1].text: <image> in a text, expected a part of that type",
        ),
        (
            chat(("user", [{"type": "text", "text": "a"}]), ("assistant", "b"), ("user", "<video>"), videos=["a"]),
            "video marker in a text part",
            "messages[2].content: <video> in a text",
        ),
        (
            chat(("user", [{"type": "image_url", "image_url": {"url": "HTTPS://host/a.png"}}])),
            "a URL",
            "messages[0].content[0].image_url.url: expected a relative path or data, found HTTPS://host/a.png",
        ),
        (chat(("user", [image(url="http://host/a.png")])), "a URL", "content[0].url: expected a relative path or data"),
        (chat(("user", [image(image=3)])), "malformed image path", "content[0].image: expected one relative path"),
        (chat(("user", [image(image="a", url="b")])), "malformed image path", "expected one relative path or data"),
        (chat(("user", [image(image=["a"])])), "malformed image path", "found {'type': 'image', 'image': ['a']}"),
        (chat(("user", [uri("data:image/png;base64", "AAA")])), "malformed data URI", "of 25 characters"),
        (chat(("user", [uri("data:image/png;base64", "AA AA")])), "malformed data URI", "expected data:image/…;base64"),
        (chat(("user", [uri("data:image/png;base64", "é")])), "malformed data URI", "url: expected data:image/"),
        (chat(("user", [uri("data:image/png;base64", "")])), "malformed data URI", "url: expected data:image/"),
        (chat(("user", [uri("data:image/png", "AAAA")])), "malformed data URI", "url: expected data:image/"),
        (chat(("user", [uri("data:text/html;base64", "AAAA")])), "malformed data URI", "found 'data:text/html;base64"),
        (item(image={"path": "a.png", "bytes": b""}), "malformed image path", "expected a relative path or a list"),
        (item(image={"path": "a.png", "bytes": "b"}), "malformed image path", "expected a relative path or a list"),
        (item(image={"path": None, "bytes": None}), "malformed image path", "expected a relative path or a list"),
        (item(image=""), "image count disagrees", "1 <image> in the text, 0 in"),
        (item(images=["b.png"]), "two image fields", "expected either image or images, found both"),
        (item(video=3), "malformed video path", "video: expected a relative path or a list, found 3"),
        (item(video="a.mp4"), "video count disagrees", "0 <video> in the text, 1 in the field video"),
    ],
)
def test_bad_chats_and_media(bad, reason, detail):
    test_bad_records(bad, reason, detail)


def test_a_field_that_is_null_is_absent():
    empty = {"id": None, "conversations": None, "messages": None, "text": None, "images": None, "videos": []}
    assert list(parse("w", empty | {"text": "What?"}).exchanges) == [("What?", ())]
    assert list(parse("w", empty | chat(("user", "Why?"))).exchanges) == [("Why?", ())]
    assert list(parse("w", empty | {"conversations": conversation(("a", "b"))}).exchanges) == [("a", ("b",))]
    assert parse("w, record 0", empty | {"text": "What?"}).id == "w, record 0"
    assert parse("w", empty | {"text": "What?", "question_id": 0}).id == 0
    assert (id_of(empty), id_of([1]), id_of({"question_id": 3})) == (None, None, 3)


def test_the_format_can_be_named():
    both = item(image=None, conversations=conversation(("a", "b"))) | chat(("user", "c")) | {"text": "d"}
    asked = {
        format: next(parse("w", both, format).exchanges)[0] for format in ("conversations", "messages", "question")
    }
    assert asked == {"conversations": "a", "messages": "c", "question": "d"}
    assert next(parse("w", both).exchanges)[0] == "a"
    with pytest.raises(
        RecordError, match=r"unknown format: expected an object with 'messages', found an object with \["
    ):
        parse("w", item(), "messages")


def test_skipping_counts_and_reports():
    bad = BadRecords("skip")
    kept = kept_of(
        bad,
        [("f, record 0", item()), ("f, record 1", item(image=3)), ("f, record 2", item(image=4))],
        lambda i: parse(*i),
    )
    assert len(kept) == 1
    report = bad.report("f", 3)
    assert "f: skipped 2 of 3 records" in report
    assert "2 × malformed image path, first: f, record 1" in report
    with pytest.raises(RecordError):
        kept_of(BadRecords("error"), [("f, record 1", item(image=3))], lambda i: parse(*i))


def test_errors_survive_worker_processes():
    error = pickle.loads(pickle.dumps(RecordError("w", "r", "d")))
    assert (error.where, error.reason, error.detail, str(error)) == ("w", "r", "d", "w: r: d")


def test_half_of_a_surrogate_pair_is_a_bad_record():
    turns = json.loads('[{"from": "human", "value": "hi \\ud800 there"}, {"from": "gpt", "value": "yes"}]')
    with pytest.raises(RecordError, match=r"w: not Unicode: conversations\[0\]\.value"):
        parse("w", {"conversations": turns})


@pytest.fixture
def queries(monkeypatch):
    """A format of one's own, for one test."""
    monkeypatch.setattr(records, "SHOWN_BY", dict(records.SHOWN_BY))
    monkeypatch.setattr(records, "TRANSLATED", {})

    def translate(item):
        turns = [{"from": "human", "value": item["query"]}, {"from": "gpt", "value": item["answers"][0]}]
        return {"id": item["key"], "conversations": turns}

    records.add_format("queries", "query", translate)


def test_another_format_is_read_as_llavas(queries):
    record = records.parse("a.json, record 3", {"key": 7, "query": "what?", "answers": ["this"]})
    assert record.id == 7 and list(record.turns) == ["what?", "this"]
    assert records.parse("a", {"key": 7, "query": "what?", "answers": ["this"]}, "queries").turns == record.turns


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"query": "what?", "answers": ["this"]}, "a.json, record 3: malformed item: items queries: KeyError: 'key'"),
        ({"key": 1, "query": 3, "answers": ["this"]}, "conversations\\[0\\].value"),
    ],
)
def test_what_another_format_trips_over_is_a_bad_record(queries, item, message):
    with pytest.raises(records.RecordError, match=message):
        records.parse("a.json, record 3", item)


def test_formats_are_not_taken_twice_nor_guessed(queries):
    with pytest.raises(ValueError, match="taken by one of"):
        records.add_format("others", "conversations", dict)
    with pytest.raises(ValueError, match="items nothing: expected one of conversations, messages, question, queries"):
        records.parse("a", {"query": "?"}, "nothing")


def test_a_conversation_may_begin_with_the_system():
    raw = [{"from": "system", "value": "Be brief."}, *conversation(("<image>\nWhat?", "A dog."))]
    record = parse("set.json, record 0", {"image": "a.jpg", "conversations": raw})
    assert (record.system, record.turns) == ("Be brief.", ("<image>\nWhat?", "A dog."))
    for wrong, said in (([raw[0]], "the system's"), ([raw[1], raw[2], raw[0]], "found 'system'")):
        with pytest.raises(RecordError, match=said):
            parse("set.json, record 0", {"image": "a.jpg", "conversations": wrong})


def test_a_video_may_be_marked_as_an_image():
    """As in LLaVA-NeXT's video sets."""
    item = {"video": "a.mp4", "conversations": conversation(("<image>\nWhat?", "A dog."))}
    record = parse("set.json, record 0", item)
    assert [(medium.kind, medium.name) for medium in record.media] == [("video", "a.mp4")]
    assert record.turns[0] == "<video>\nWhat?"


def test_an_empty_image_field_is_none():
    assert parse("set.json, record 0", {"image": "", "conversations": conversation(("What?", "A dog."))}).media == ()


@pytest.mark.parametrize("asked", ["<image>\nWhat?", "What?\n<image>", "<image> What?", "What?<image>"])
def test_image_first_puts_the_image_on_a_line_before_the_text(asked):
    item = {"image": "a.jpg", "conversations": conversation(("Hello.", "Hi."), (asked, "A dog."))}
    record = image_first(parse("set.json, record 0", item))
    assert list(record.turns) == ["Hello.", "Hi.", "<image>\nWhat?", "A dog."]


def test_image_first_leaves_several_images_where_they_are():
    item = {"image": ["a.jpg", "b.jpg"], "conversations": conversation(("Is <image> like <image>?", "No."))}
    record = parse("set.json, record 0", item)
    assert image_first(record) == record


def test_ids_are_what_json_can_write():
    """Parquet and datasets have dates, UUIDs and bytes too; predict would fail on them after its work."""
    when, known = datetime.date(2026, 11, 25), uuid.UUID(int=5)
    for id, expected in ((7, 7), ("a", "a"), (when, "2026-11-25"), (known, str(known)), (1.5, "1.5")):
        assert parse("set, record 0", item(id=id)).id == expected
    for id in (b"abc", ["a"], {"a": 1}):
        with pytest.raises(RecordError, match="malformed id: id: expected text or a number, found"):
            parse("set, record 0", item(id=id))
