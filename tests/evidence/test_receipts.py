"""Real receipts are copied with their texts, and nothing that the test asks about is trained on or chosen by."""

import json

import pytest

from experiments.evidence import receipts
from tests.helpers.records import exchanges


def test_receipts_are_split_and_read_whole(tmp_path):
    folder, to = tmp_path / "given", tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    splits = {"train": range(70), "val": range(70, 75)}
    for split, numbers in splits.items():
        records = [{"id": str(n), "image": f"images/{n}.jpg", "conversations": []} for n in numbers]
        (folder / f"{split}.json").write_text(json.dumps(records))
    lines = [{"image": f"images/{n}.jpg", "text": f"{word} {n}"} for n in range(70) for word in ("TO\u2028TAL", "DATE")]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "train_lines.jsonl").write_text(text, encoding="utf-8")
    (folder / "images/3.jpg").write_bytes(b"a picture")
    receipts.main(folder, to)
    found = {name: json.loads((to / f"{name}.json").read_text()) for name in ("train", "val", "test", "text")}
    assert {name: [int(each["image"][7:-4]) for each in own] for name, own in found.items()} == {
        "train": [*range(10)],
        "val": [*range(10, 70)],
        "test": [*range(70, 75)],
        "text": [*range(10)],
    }
    assert exchanges(found["text"][3]) == [("what is in the image?", "TO\u2028TAL 3\nDATE 3")]
    assert (to / "images/3.jpg").read_bytes() == b"a picture"


def test_receipts_without_text_and_too_few_receipts_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "val.json").write_text("[]")
    for count, said in ((60, "expected more than 60 receipts, found 60"), (61, "no line of text for images/0.jpg")):
        records = [{"id": str(n), "image": f"images/{n}.jpg", "conversations": []} for n in range(count)]
        (tmp_path / "train.json").write_text(json.dumps(records))
        (tmp_path / "train_lines.jsonl").write_text('{"image": "images/1.jpg", "text": "TOTAL"}\n')
        with pytest.raises(ValueError, match=said):
            receipts.main(tmp_path, tmp_path / "to")
