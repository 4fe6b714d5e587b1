"""Files of records, read at random: against json.load of the whole file, and files that other libraries wrote."""

import io
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from lit_mm.data.records import BadRecords, RecordError, parse
from lit_mm.data.sources import json_files, open_source
from tests.helpers.environment import ROOT
from tests.helpers.records import conversation, kept_of

VARIED = [
    {"id": "a", "text": 'brackets ] } , in "text" \\ and \\" escapes\n\t'},
    {"id": "ü", "text": "naïve 日本語 😀 \u2028 \u0085"},
    {"question_id": 3, "text": "x" * 300, "deep": [[[{"a": [1, 2.5e-7, -0, True, None, {}]}]], []]},
    {"text": ""},
    {"id": 0, "text": "é" * 77},
]


def items_of(source):
    return [source[number][1] for number in range(len(source))]


def write(path, text, **options):
    path.write_bytes(text.encode("utf-8", **options) if isinstance(text, str) else text)
    return str(path)


def many(count):
    """About 200 bytes each, every one with a text of its own."""
    text = "What is in the picture, and where? "
    return [
        {"id": f"item {n}", "conversations": conversation((text * 2 + str(n), f"{n} things " * 3))}
        for n in range(count)
    ]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"indent": 3}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_json_list(tmp_path, monkeypatch, chunk, layout):
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    text = json.dumps(VARIED, **layout)
    plain = open_source(write(tmp_path / "a.json", text), tmp_path / "cache")
    marked = open_source(write(tmp_path / "b.json", "\ufeff \r\n" + text + "\n\t "), tmp_path / "cache")
    assert items_of(plain) == items_of(marked) == json.loads(text)
    assert plain[2][0] == f"{tmp_path}/a.json, record 2 (id 3)"
    assert plain[3][0] == f"{tmp_path}/a.json, record 3"


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \t\n\n"])
def test_json_lines(tmp_path, monkeypatch, chunk, end):
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    lines = [json.dumps(item, ensure_ascii=False) for item in VARIED]
    whole = open_source(write(tmp_path / "a.jsonl", end.join(lines) + end), tmp_path / "cache")
    marked = open_source(write(tmp_path / "b.txt", "\ufeff\n \n" + end.join(lines)), tmp_path / "cache")
    assert items_of(whole) == items_of(marked) == VARIED
    assert whole[2][0] == f"{tmp_path}/a.jsonl, record 2 (id 3)"


def spoiled(text, seed):
    """One byte of a text removed, doubled, replaced or all that follows it cut off."""
    rng = random.Random(seed)
    at = rng.randrange(len(text))
    new = rng.choice([b"", text[at : at + 1] * 2, bytes([rng.choice(b'[]{},:"\\ \n1e.-tnx\xc3\x00')])])
    return text[:at] if seed % 5 == 0 else text[:at] + new + text[at + 1 :]


def test_a_list_is_refused_exactly_when_json_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "CHUNK", 8)
    good = json.dumps([*VARIED[:2], 1.5e-7, -12, "tail", None, True], ensure_ascii=False).encode()
    outcomes = []
    for seed in range(600):
        content = spoiled(good, seed)
        path = write(tmp_path / f"{seed}.json", content)
        try:
            expected = json.loads(content.decode())
        except ValueError:
            expected = None
        if isinstance(expected, list) and expected:
            assert items_of(open_source(path, tmp_path / "cache", "json")) == expected
        else:
            with pytest.raises(ValueError, match=rf"{seed}\.json: "):
                open_source(path, tmp_path / "cache", "json")
        outcomes.append(expected is None)
    assert 100 < sum(outcomes) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1,\n2,\n]", "Expecting value: line 3, byte 7, after 2 whole records"),
        ('[{"a": 1}\n {"a": 2}]', "expected ',' or ']', found '{': line 2, byte 11, after 1 whole records"),
        ('[{"a": 1},\n\n{"a": 2', "not valid JSON: Expecting ',' delimiter: line 3, byte 19, after 1"),
        ('[{"a": 1}', "expected ',' or ']', it ends: line 1, byte 9"),
        ('[{"a": "b}]', "not valid JSON: Unterminated string"),
        ("[1] 2", "expected the end, found '2': line 1, byte 4"),
        ("[" * 100_000, "recursion"),
        ("[]", "contains no records"),
        (b'[{"a": "\xff"}]', "not UTF-8 text: invalid start byte: byte 8"),
        (b'[{"a": "\xc3', "not UTF-8 text: unexpected end of data: byte 8"),
    ],
)
def test_bad_lists_name_the_place(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=r"bad\.json: ") as caught:
        open_source(path, tmp_path / "cache")
    assert message in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_the_place_of_an_error_does_not_hang_on_the_window(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    text = json.dumps(many(20), indent=1) + "é"
    with pytest.raises(ValueError, match="after 20 whole records") as caught:
        open_source(write(tmp_path / "bad.json", text), tmp_path / "cache")
    assert f"line {text.count(chr(10)) + 1}, byte {len(text) - 1}," in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,\n "b": 2}', "line 1: not valid JSON: expected an object, found '{\"a\": 1,' ("),
        ('{\n "a": 1}\n', "expected a JSON list, or one JSON object per line"),
        ("", "contains no records: the file is empty"),
        (" \n\n", "contains no records"),
        (b"\xff\xfe[\x00", "neither UTF-8 text nor parquet nor tar"),
        ("id,text\n1,a", "expected a JSON list, or one JSON object per line, or parquet, or tar, found b'id,text"),
        (b"\x1f\x8b\x08rest", "compressed by gzip, expected an uncompressed file"),
        (b"(\xb5/\xfdrest", "compressed by zstd"),
    ],
)
def test_files_that_are_nothing(tmp_path, content, message):
    with pytest.raises(ValueError, match=r"bad\.json") as caught:
        open_source(write(tmp_path / "bad.json", content), tmp_path / "cache")
    assert message in str(caught.value)


def test_bad_lines_are_bad_records(tmp_path):
    lines = [b'{"question_id": 1, "text": "a"}', b"", b'{"text": ', b'{"text": "\xff"}', b'{"text": "b"}']
    source = open_source(write(tmp_path / "a.jsonl", b"\n".join(lines)), tmp_path / "cache")
    bad = BadRecords("skip")
    kept = kept_of(bad, range(len(source)), lambda number: parse(*source[number]))
    assert [record.turns[0] for record in kept] == ["a", "b"]
    assert bad.counts == {"not valid JSON": 1, "not UTF-8 text": 1}
    assert bad.examples["not valid JSON"].startswith(f"{tmp_path}/a.jsonl, line 3: not valid JSON: expected an object")
    assert "a.jsonl, line 4: not UTF-8 text: expected UTF-8, found byte 0xff at 10" in bad.examples["not UTF-8 text"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"id": 1, "image": "a.png", "text": "x", "image": "b.png"}', "image"),
        ('{"id": 1, "text": "x", "conversations": [{"from": "human", "value": "x", "from": "gpt"}]}', "from"),
        ('{"id": 1, "id": 1}', "id"),
    ],
)
def test_a_key_that_stands_twice_is_a_bad_record(tmp_path, text, key):
    """JSON leaves open which of the two counts, and Python's reader takes the last one."""
    files = {"a.json": f'[{{"id": 0, "text": "x"}}, {text}]', "a.jsonl": f"{text}\n{text}\n"}
    files["a.tar"] = shard({"0.json": b"{}", "1.json": text.encode()})
    opened = {name: open_source(write(tmp_path / name, content), tmp_path / "cache") for name, content in files.items()}
    for name, place in (("a.json", "record 1"), ("a.jsonl", "line 2"), ("a.tar", "record 1")):
        with pytest.raises(RecordError, match=f"{name}, {place}.*: same key twice: '{key}': expected once .* 2 times"):
            opened[name][1]
    assert opened["a.json"][0][1] == {"id": 0, "text": "x"}


def test_a_bad_last_line_without_an_end(tmp_path):
    source = open_source(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n\n{"te'), tmp_path / "cache")
    with pytest.raises(RecordError, match=r"a\.jsonl, line 4: not valid JSON"):
        source[1]


def test_a_bad_first_line_among_good_ones_is_a_bad_record(tmp_path):
    source = open_source(write(tmp_path / "a.jsonl", '{"text": \n{"text": "b"}\n'), tmp_path / "cache")
    with pytest.raises(RecordError, match="line 1: not valid JSON"):
        source[0]
    assert source[1][1] == {"text": "b"}


def test_an_object_on_one_line_is_one_record_and_refused_as_such(tmp_path):
    source = open_source(write(tmp_path / "bad.json", '{"data": []}'), tmp_path / "cache")
    with pytest.raises(RecordError, match="unknown format"):
        parse(*source[0])


def test_numbers_outside_are_refused(tmp_path):
    source = open_source(write(tmp_path / "a.json", '[{"text": "a"}, {"text": "b"}]'), tmp_path / "cache")
    assert [item["text"] for _, item in source] == ["a", "b"]
    for number in (-1, 2):
        with pytest.raises(IndexError, match=rf"a\.json: expected a record of 0 to 1, found {number}"):
            source[number]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_memory_stays_flat(tmp_path, kind):
    items = many(20_000)
    text = json.dumps(items) if kind == "json" else "\n".join(map(json.dumps, items))
    path = write(tmp_path / f"a.{kind}", text)
    tracemalloc.start()
    loaded = json.loads(json.dumps(items))
    whole, _ = tracemalloc.get_traced_memory()
    del loaded
    tracemalloc.stop()
    tracemalloc.start()
    source = open_source(path, tmp_path / "cache")
    read = [source[number][1] == items[number] for number in range(0, len(source), 7)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(read)
    assert len(source) == 20_000
    assert peak < whole / 3
    assert peak < 8 * json_files.CHUNK


def test_a_second_opening_does_not_scan(tmp_path):
    """What a table says is taken for true: turned around it turns the items."""
    (tmp_path / "shard.tar").write_bytes(shard({"0.txt": b"text", "0.jpg": b"0", "1.txt": b"more", "1.jpg": b"1"}))
    paths = [
        write(tmp_path / "a.json", json.dumps(VARIED)),
        write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}'),
    ]
    paths.append(str(tmp_path / "shard.tar"))
    first = [items_of(open_source(path, tmp_path / "cache")) for path in paths]
    assert all(len(items) > 1 for items in first)
    for file in (tmp_path / "cache").glob("*"):
        np.save(file, np.load(file, allow_pickle=False)[::-1])
    assert [items_of(open_source(path, tmp_path / "cache"))[::-1] for path in paths] == first


def test_a_changed_file_is_scanned_anew(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "a"}, {"text": "b"}]')
    before = open_source(path, tmp_path / "cache")
    assert before[0][1] == {"text": "a"}
    assert open_source(path, tmp_path / "cache").fingerprint == before.fingerprint
    write(tmp_path / "new.json", '[{"text": "longer"}]')
    os.replace(tmp_path / "new.json", path)  # noqa: PTH105
    after = open_source(path, tmp_path / "cache")
    assert after.fingerprint != before.fingerprint
    assert items_of(after) == [{"text": "longer"}]
    with pytest.raises(ValueError, match=r"a\.json: changed since it was opened"):
        pickle.loads(pickle.dumps(before))[1]


def test_a_changed_file_of_the_same_size_is_known_by_its_time(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "a"}, {"text": "b"}]')
    before = open_source(path, tmp_path / "cache")
    write(tmp_path / "a.json", '[{"text": "c"}, {"text": "d"}]')
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=r"a\.json: changed since it was opened"):
        before[0]
    after = open_source(path, tmp_path / "cache")
    assert after[0][1] == {"text": "c"}
    assert after.fingerprint != before.fingerprint


def test_a_file_cut_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, many(1000))))
    source = open_source(path, tmp_path / "cache")
    os.truncate(path, 50_000)
    with pytest.raises(ValueError, match=r"a\.jsonl: changed since it was opened"):
        source[999]


def test_a_file_that_changes_during_the_scan_leaves_no_table(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", json.dumps(VARIED))
    scan = json_files.JsonList._scan

    def slow_scan(self):
        yield from scan(self)
        os.utime(path, (1, 1))

    monkeypatch.setattr(json_files.JsonList, "_scan", slow_scan)
    with pytest.raises(ValueError, match=r"a\.json: changed since it was opened"):
        open_source(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00", None])
def test_a_damaged_table_is_made_anew(tmp_path, damage):
    path = write(tmp_path / "a.json", json.dumps(VARIED))
    open_source(path, tmp_path / "cache")
    [table] = (tmp_path / "cache").iterdir()
    table.write_bytes(table.read_bytes()[:-1] if damage is None else damage)
    assert items_of(open_source(path, tmp_path / "cache")) == VARIED


def test_a_table_of_pickled_objects_is_never_loaded(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(VARIED))
    open_source(path, tmp_path / "cache")
    [table] = (tmp_path / "cache").iterdir()
    np.save(table, np.array([[Unpickled()] * 2], object))
    assert items_of(open_source(path, tmp_path / "cache")) == VARIED


class Unpickled:
    def __reduce__(self):
        return sys.exit, ("a table was unpickled",)


def test_many_processes_may_open_a_file_for_the_first_time(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(many(2000)))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        lengths = pool.starmap(opened_length, [(path, tmp_path / "cache")] * 8)
    assert lengths == [2000] * 8
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npy"]


def opened_length(path, cache):
    return len(open_source(path, cache))


def every_kind(folder):
    """A source of each kind, with the items it must give."""
    items = many(300)
    columns = {"id": [item["id"] for item in items], "conversations": [item["conversations"] for item in items]}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    texts = {f"{n:03}.json": json.dumps(item).encode() for n, item in enumerate(items)}
    (folder / "a.tar").write_bytes(shard(texts))
    write(folder / "a.json", json.dumps(items))
    write(folder / "a.jsonl", "\n".join(map(json.dumps, items)))
    return [
        open_source(str(folder / f"a.{kind}"), folder / "cache") for kind in ("json", "jsonl", "tar", "parquet")
    ], items


def test_workers_share_nothing(tmp_path):
    """Forked workers read at the same time as each other; what the parent had open is not theirs."""
    opened, items = every_kind(tmp_path)
    order = random.Random(0).choices(range(300), k=4000)
    for source in opened:
        assert source[7][1] == items[7]
        loader = DataLoader(source, sampler=order, batch_size=None, num_workers=2, multiprocessing_context="fork")
        read = [(item, source[number][1]) for (_, item), number in zip(loader, order, strict=True)]
        assert read == [(items[number], items[number]) for number in order]


def test_sources_go_to_spawned_processes(tmp_path):
    opened, items = every_kind(tmp_path)
    places = [source[7][0] for source in opened]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(eighth, opened) == [(place, items[7]) for place in places]
    assert all(len(pickle.dumps(source)) < 4000 for source in opened[:3])


def eighth(source):
    return source[7]


# --- which files ---


def test_missing_files(tmp_path):
    for path in ("nowhere.json", f"{tmp_path}/train.json", "data/train.json", f"{tmp_path}/*.tar", "a{0..3}.tar"):
        with pytest.raises(FileNotFoundError, match="no instruction file"):
            open_source(path, tmp_path / "cache")
    (tmp_path / "a0.tar").write_bytes(shard({"a.txt": b"a"}))
    with pytest.raises(FileNotFoundError, match=r"no instruction file .*/a1\.tar"):
        open_source(f"{tmp_path}/a{{0..1}}.tar", tmp_path / "cache")


def test_a_missing_file_in_a_folder_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match="no instruction file data/train"):
        open_source("data/train", tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="no folder train, and the hub's datasets are named owner/name"):
        open_source("train", tmp_path / "cache", "dataset")


def test_folders_without_anything_usable(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder of \*\.parquet or \*\.tar.*found nothing"):
        open_source(str(tmp_path), tmp_path / "cache")
    write(tmp_path / "a.jpg", b"0")
    with pytest.raises(ValueError, match=r"found \['a\.jpg'\]"):
        open_source(str(tmp_path), tmp_path / "cache")
    for name in ("a.tar", "a.parquet"):
        write(tmp_path / name, b"0")
    with pytest.raises(ValueError, match=r"found \['a\.jpg', 'a\.parquet', 'a\.tar'\]"):
        open_source(str(tmp_path), tmp_path / "cache")


def test_one_format_at_a_time(tmp_path):
    one, two = write(tmp_path / "a.json", '[{"text": "a"}]'), write(tmp_path / "b.json", '{"text": "a"}')
    with pytest.raises(ValueError, match=r"expected files of one format, found: .*a\.json is json, .*b\.json is jsonl"):
        open_source([one, two], tmp_path / "cache")
    with pytest.raises(ValueError, match="expected one file of json, found 2"):
        open_source([one, one], tmp_path / "cache")


def test_a_format_that_is_named_is_not_looked_for(tmp_path):
    path = write(tmp_path / "a", '{"text": "a"}')
    with pytest.raises(ValueError, match=r"not valid JSON: expected '\[', found '\{'"):
        open_source(path, tmp_path / "cache", "json")
    with pytest.raises(ValueError, match="expected a tar archive, found none at byte 0"):
        open_source(path, tmp_path / "cache", "tar")
    with pytest.raises(ValueError, match="expected a parquet file"):
        open_source(path, tmp_path / "cache", "parquet")
    assert items_of(open_source(path, tmp_path / "cache", "jsonl")) == [{"text": "a"}]


# --- parquet and datasets ---

NO_IMAGE = b"these bytes would not survive a decoder"
ROWS = [
    {
        "id": n,
        "messages": [{"role": "user", "content": f"<image>\nWhat is {n}?"}, {"role": "assistant", "content": "It."}],
    }
    for n in range(5)
]


def with_images(rows):
    return [row | {"images": [{"bytes": NO_IMAGE + bytes([row["id"]]), "path": f"{row['id']}.png"}]} for row in rows]


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def typed(rows):
    """The rows as a dataset whose images are of the type that decodes itself."""
    import datasets

    dataset = datasets.Dataset.from_list(with_images(rows))
    features = dataset.features | {"images": datasets.List(datasets.Image())}
    return dataset.cast(datasets.Features(features))


def test_parquet_by_arrow_and_by_datasets(tmp_path):
    plain = open_source(write_parquet(tmp_path / "a.parquet", with_images(ROWS)), tmp_path / "cache")
    typed(ROWS).to_parquet(tmp_path / "b.parquet")
    decoding = open_source(str(tmp_path / "b.parquet"), tmp_path / "cache")
    assert items_of(plain) == items_of(decoding) == with_images(ROWS)
    assert plain[3][0] == f"{tmp_path}/a.parquet, record 3 (id 3)"
    [image] = parse(*plain[3]).media
    assert (image.kind, image.name, image.data) == ("image", "3.png", NO_IMAGE + b"\x03")


def test_an_image_column_of_one_image_a_row(tmp_path):
    import datasets

    rows = [{"id": 1, "text": "What?", "image": {"bytes": NO_IMAGE, "path": None}}]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(tmp_path / "a.parquet")
    record = parse(*open_source(str(tmp_path / "a.parquet"), tmp_path / "cache")[0])
    assert record.media[0].data == NO_IMAGE
    assert record.turns[0] == "<image>\nWhat?"


def test_typed_parts_of_a_parquet_column(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": parts}], "images": [{"bytes": NO_IMAGE, "path": None}]}
    record = parse(*open_source(write_parquet(tmp_path / "a.parquet", [row]), tmp_path / "cache")[0])
    assert (record.turns[0], record.media[0].data) == ("<image>\nWhat?", NO_IMAGE)


def test_several_parquet_files(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    paths = [write_parquet(folder / f"p-{n}.parquet", ROWS[2 * n : 2 * n + 2]) for n in range(3)]
    for path in (paths, str(folder), f"{folder}/*.parquet", f"{folder}/p-{{0..2}}.parquet"):
        assert items_of(open_source(path, tmp_path / "cache")) == ROWS
    assert items_of(open_source(paths[:2], tmp_path / "cache")) == ROWS[:4]
    pq.write_table(pa.Table.from_pylist(ROWS)[:0], paths[0])
    assert items_of(open_source(paths, tmp_path / "cache")) == ROWS[2:]


def test_a_changed_parquet_file_is_read_anew(tmp_path):
    before = open_source(write_parquet(tmp_path / "a.parquet", ROWS), tmp_path / "cache")
    after = open_source(write_parquet(tmp_path / "a.parquet", ROWS[:2]), tmp_path / "cache")
    assert before.fingerprint != after.fingerprint
    assert items_of(after) == ROWS[:2]


def test_bad_parquet(tmp_path):
    other = write_parquet(tmp_path / "other.parquet", [{"question": "a", "picture": "b"}])
    good = write_parquet(tmp_path / "good.parquet", ROWS)
    more = write_parquet(tmp_path / "more.parquet", with_images(ROWS))
    cut = write(tmp_path / "cut.parquet", Path(good).read_bytes()[:-9])
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS)[:0], empty)
    for path, message in [
        (other, r"other\.parquet: expected a column .*messages.*, found the columns question, picture"),
        (
            [good, more],
            r"more\.parquet: expected the columns of .*good\.parquet, id, messages, found id, messages, images",
        ),
        (cut, r"cut\.parquet: expected a parquet file, found a damaged or different one"),
        (str(empty), r"empty\.parquet: contains no records"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(path, tmp_path / "cache")


def test_parquet_with_a_damaged_middle(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", with_images(ROWS))
    content = bytearray(Path(path).read_bytes())
    content[4:400] = b"\xff" * 396
    with pytest.raises(ValueError, match=r"a\.parquet: not readable as parquet"):
        open_source(write(tmp_path / "a.parquet", bytes(content)), tmp_path / "cache")


def test_a_saved_dataset(tmp_path):
    typed(ROWS).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), tmp_path / "cache")
    assert items_of(source) == with_images(ROWS)
    assert source[1][0] == f"{tmp_path}/saved, record 1 (id 1)"
    typed(ROWS[:2]).save_to_disk(tmp_path / "saved")
    assert open_source(str(tmp_path / "saved"), tmp_path / "cache").fingerprint != source.fingerprint


def test_bad_saved_datasets(tmp_path):
    import datasets

    datasets.DatasetDict({"train": typed(ROWS), "val": typed(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"splits: contains the splits train, val, expected one: .*/splits/train"):
        open_source(str(tmp_path / "splits"), tmp_path / "cache")
    assert items_of(open_source(str(tmp_path / "splits/train"), tmp_path / "cache")) == with_images(ROWS)
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: expected a column .* found the columns a"):
        open_source(str(tmp_path / "other"), tmp_path / "cache")
    for file in (tmp_path / "other").glob("*.arrow"):
        file.unlink()
    with pytest.raises(ValueError, match="other: expected a dataset as save_to_disk writes it"):
        open_source(str(tmp_path / "other"), tmp_path / "cache")


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or typed(ROWS))
    source = open_source("owner/name", tmp_path / "cache")
    assert items_of(source) == with_images(ROWS)
    assert source[1][0] == "owner/name, record 1 (id 1)"
    open_source("owner/name:val", tmp_path / "cache")
    assert [call[1]["split"] for call in asked[1::2]] == ["train", "val"]
    assert [call[0] for call in asked[1::2]] == [("owner/name",)] * 2
    assert asked[0::2] == ["owner/name"] * 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "the hub does not answer for owner/name"),
        ({"HF_HUB_OFFLINE": "1"}, "not in the cache"),
    ],
)
def test_without_a_network_the_hub_fails_at_once(tmp_path, setting, message):
    code = "import sys; from pathlib import Path; from lit_mm.data.sources import open_source\n"
    code += "try: open_source('owner/name:val', Path(sys.argv[1]))\nexcept ConnectionError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"HF_HOME": str(tmp_path)} | setting,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("owner/name:val: no such file or folder")
    assert message in done.stdout
    assert "Retry" not in done.stderr


# --- shards ---


def shard(members, **options):
    """A tar as tarfile writes it, of name -> content or of ready TarInfos."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", **options) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def pair(key, question="<image>\nWhat?"):
    item = {"conversations": conversation((question, f"It is {key}."))}
    return {f"{key}.json": json.dumps(item).encode(), f"{key}.jpg": NO_IMAGE + key.encode()}


@pytest.mark.parametrize("dialect", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards(tmp_path, dialect):
    folder = "a/long.folder/" * (16 if dialect != tarfile.USTAR_FORMAT else 1)
    for number in range(3):
        keys = [f"{folder}{number}{n}" for n in range(4)]
        (tmp_path / f"s-{number}.tar").write_bytes(shard(merged(map(pair, keys)), format=dialect))
    for path in (str(tmp_path), f"{tmp_path}/s-{{0..2}}.tar", f"{tmp_path}/s-*.tar"):
        source = open_source(path, tmp_path / "cache")
        assert len(source) == 12
        where, item = source[6]
        assert where == f"{tmp_path}/s-1.tar, record 2 (id {folder}12)"
        assert item["images"] == [{"bytes": NO_IMAGE + f"{folder}12".encode(), "path": f"{folder}12.jpg"}]
        assert [parse(*source[number]).turns[1] for number in range(12)] == [
            f"It is {folder}{number // 4}{number % 4}." for number in range(12)
        ]


def merged(parts):
    return {name: data for part in parts for name, data in part.items()}


def only_item(tmp_path, members, name="a.tar"):
    (tmp_path / name).write_bytes(shard(members))
    source = open_source(str(tmp_path / name), tmp_path / "cache")
    assert len(source) == 1
    return source[0]


def test_a_text_is_the_answer_to_describe_the_image(tmp_path):
    record = parse(*only_item(tmp_path, {"7.png": b"0", "7.txt": "a réd car\n".encode()}))
    assert (record.id, list(record.turns)) == ("7", ["<image>\nDescribe the image.", "a réd car"])
    assert [(media.kind, media.name, media.data) for media in record.media] == [("image", "7.png", b"0")]
    film = parse(*only_item(tmp_path, {"8.txt": b"a car", "8.mp4": b"1"}, "b.tar"))
    assert (film.turns[0], film.media[0].data) == ("<video>\nDescribe the video.", b"1")


def test_a_text_beside_a_json_that_holds_no_conversation(tmp_path):
    members = {"7.jpg": b"0", "7.json": b'{"width": 3, "id": "own"}', "7.txt": b"a car"}
    record = parse(*only_item(tmp_path, members))
    assert (record.id, record.turns[1]) == ("own", "a car")
    told = {"7.json": json.dumps({"text": "<image> What?"}).encode(), "7.jpg": b"0", "7.txt": b"a car"}
    assert list(parse(*only_item(tmp_path, told, "b.tar")).turns) == ["<image> What?"]


def test_several_images_come_in_the_order_of_the_json_if_it_names_them(tmp_path):
    files = {"0.b.PNG": b"b", "0.a.jpg": b"a", "0.cls": b"left out"}
    text = {"conversations": conversation(("<image><image>?", "Yes."))}
    plain = parse(*only_item(tmp_path, files | {"0.json": json.dumps(text).encode()}))
    assert [media.data for media in plain.media] == [b"b", b"a"]
    named = text | {"image": ["x/0.a.jpg", "x/0.b.PNG"]}
    ordered = parse(*only_item(tmp_path, files | {"0.json": json.dumps(named).encode()}, "b.tar"))
    assert [media.data for media in ordered.media] == [b"a", b"b"]
    foreign = text | {"image": ["coco/9.jpg", "coco/7.jpg"]}
    source = only_item(tmp_path, files | {"0.json": json.dumps(foreign).encode()}, "c.tar")
    assert [media.data for media in parse(*source).media] == [b"b", b"a"]


@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        ({"0.jpg": b"0"}, "no text", "a.tar, record 0 (0): no text: expected one .json or .txt in a sample, found"),
        ({"0.txt": b"a", "0.b.txt": b"b"}, "no text", "found ['0.txt', '0.b.txt']"),
        ({"0.json": b"{"}, "not valid JSON", "a.tar, record 0 (0), 0.json: not valid JSON"),
        ({"0.txt": b"\xff"}, "not UTF-8 text", "record 0 (0), 0.txt: not UTF-8 text: expected UTF-8, found byte 0xff"),
        ({"0.json": b"[1]"}, "unknown format", "found list"),
        ({"0.json": b'{"a": 1}', "0.jpg": b"0"}, "unknown format", "found an object with ['a', 'id', 'images']"),
        ({"0.txt": b"a car", "0.jpg": b""}, "malformed image path", "expected a relative path or a list"),
    ],
)
def test_bad_samples_are_bad_records(tmp_path, members, reason, detail):
    (tmp_path / "a.tar").write_bytes(shard(members | pair("1")))
    source = open_source(str(tmp_path / "a.tar"), tmp_path / "cache")
    bad = BadRecords("skip")
    [kept] = kept_of(bad, range(len(source)), lambda number: parse(*source[number]))
    assert kept.id == "1"
    assert detail in bad.examples[reason]


def test_folders_and_files_without_a_sample_are_passed_over(tmp_path):
    folder = tarfile.TarInfo("x")
    folder.type = tarfile.DIRTYPE
    hidden = {"x/._0.jpg": b"0", "x/README": b"1"}
    where, item = only_item(tmp_path, {folder: b"", **hidden, **pair("x/0")})
    assert where == f"{tmp_path}/a.tar, record 0 (id x/0)"
    assert [image["path"] for image in item["images"]] == ["x/0.jpg"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("0.jpg")
    link.type, link.linkname = kind, "/etc/passwd"
    write(tmp_path / "a.tar", shard({"0.txt": b"a", link: b""}))
    with pytest.raises(ValueError, match=r"a\.tar: member 0\.jpg: expected a file, found a link, a device"):
        open_source(str(tmp_path / "a.tar"), tmp_path / "cache")


def test_a_sparse_member_is_refused(tmp_path):
    """Some bytes that would unpack to a terabyte."""
    sparse = tarfile.TarInfo("0.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.jpg"}
    sparse.pax_headers["GNU.sparse.realsize"] = str(1 << 40)
    data = b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512
    write(tmp_path / "a.tar", shard({sparse: data, "0.txt": b"a"}, format=tarfile.PAX_FORMAT))
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getmember("0.jpg").size == 1 << 40
    with pytest.raises(ValueError, match=r"a\.tar: member 0\.jpg: expected a file, found a link, a device or a sparse"):
        open_source(str(tmp_path / "a.tar"), tmp_path / "cache")


def test_a_shard_cut_anywhere_is_refused(tmp_path):
    whole = shard(merged([pair("0"), pair("1")]))
    end = len(whole.rstrip(b"\0"))
    end += -end % 512 + 1024
    assert len(items_of(open_source(write(tmp_path / "whole.tar", whole[:end]), tmp_path / "cache"))) == 2
    for size in [*range(1, end, 97), *range(512, end, 512), end - 1]:
        path = write(tmp_path / f"cut-{size}.tar", whole[:size])
        with pytest.raises(ValueError, match=rf"cut-{size}\.tar: .*byte \d+"):
            open_source(path, tmp_path / "cache", "tar")


def test_damaged_and_joined_shards_are_refused(tmp_path):
    whole = shard(merged([pair("0"), pair("1")]))
    damaged = whole[:1024] + b"x" * 512 + whole[1536:]
    with pytest.raises(ValueError, match=r"a\.tar: expected the end of the archive at byte 1024, found a damaged"):
        open_source(write(tmp_path / "a.tar", damaged), tmp_path / "cache")
    endless = tarfile.TarInfo("2.txt")
    endless.size = -4096
    header = endless.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match=r"d\.tar: truncated or damaged"):
        open_source(write(tmp_path / "d.tar", header + whole), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"b\.tar: expected the end of the archive at byte 4096, found"):
        open_source(write(tmp_path / "b.tar", whole + whole), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"c\.tar: contains no records"):
        open_source(write(tmp_path / "c.tar", shard({"README": b"a"})), tmp_path / "cache")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        archive.addfile(tarfile.TarInfo("0.txt"))
    for format in (None, "tar"):
        with pytest.raises(ValueError, match=r"a\.tar: compressed by .*, expected an uncompressed file"):
            open_source(str(tmp_path / "a.tar"), tmp_path / "cache", format)


def test_members_of_a_sample_stand_side_by_side(tmp_path):
    apart = {"0.txt": b"a", "1.txt": b"b", "0.jpg": b"c"}
    with pytest.raises(ValueError, match=r"a\.tar: sample 0: expected its members side by side, without duplicates"):
        open_source(write(tmp_path / "a.tar", shard(apart)), tmp_path / "cache")
    twice = {tarfile.TarInfo("0.txt"): b"a", tarfile.TarInfo("0.txt"): b"b"}
    with pytest.raises(ValueError, match=r"b\.tar: sample 0: expected its members side by side, without duplicates"):
        open_source(write(tmp_path / "b.tar", shard(twice)), tmp_path / "cache")


def test_memory_stays_flat_over_a_shard(tmp_path):
    path = write(tmp_path / "a.tar", shard({f"{number}.txt": b"a" for number in range(10_000)}))
    tracemalloc.start()
    source = open_source(path, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [source[number][1]["id"] for number in (0, 9_999)] == ["0", "9999"]
    assert peak < 4_000_000  # the headers of all members together take 8 MB


def test_many_shards_are_not_kept_open(tmp_path):
    count = 21
    for number in range(count):
        (tmp_path / f"s-{number:02}.tar").write_bytes(shard(pair(f"{number:02}")))
    source = open_source(str(tmp_path), tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None  # noqa: PTH208
    order = random.Random(0).choices(range(count), k=200)
    assert [source[number][1]["id"] for number in order] == [f"{number:02}" for number in order]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_a_number_too_long_for_python_spoils_its_record_alone(tmp_path):
    """It is legal JSON: the list is read, the record is not."""
    long = "1" * 5000
    source = open_source(
        write(tmp_path / "a.json", f'[{{"id": {long}, "text": "a"}}, {{"id": 2, "text": "b"}}]'), tmp_path / "cache"
    )
    assert source[1][1] == {"id": 2, "text": "b"}
    with pytest.raises(RecordError):
        source[0]
