"""easy-VQA as records: the published counts, the split, the captions."""

import json

import pytest

from lit_mm.data.easy_vqa import EasyVQADataModule, caption, package_data
from lit_mm.data.records import parse
from tests.helpers.environment import installed

pytestmark = installed("easy_vqa")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("easy")
    EasyVQADataModule(None, root=str(root)).prepare_data()
    return root


def records(root, split):
    return [parse(split, item) for item in json.loads((root / f"{split}.json").read_text())]


def test_counts_are_the_published_ones(root):
    """4,000 images and 38,575 questions, 1,000 and 9,673 (the set's README)."""
    train, val, test = (records(root, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (3800, 200, 1000)
    assert sum(len(list(record.exchanges)) for record in train + val) == 38_575
    assert sum(len(list(record.exchanges)) for record in test) == 9_673
    assert not {record.media for record in train} & {record.media for record in val}


def test_captions_agree_with_every_question_of_the_image(root):
    """A caption says nothing that a question's answer contradicts."""
    by_image = {record.media: record for record in records(root, "train")}
    captioned = [(by_image[record.media], record) for record in records(root, "captions")]
    assert len(captioned) > 3000
    for questions, told in captioned:
        [(_, [text])] = told.exchanges
        words = text.replace("<image>", "").split()
        assert len(words) == 3
        for question, [answer] in questions.exchanges:
            asked = question.removeprefix("<image>\n").rstrip("?").split()
            if answer in ("yes", "no"):
                negated = bool({"no", "not"} & set(asked))
                named = bool({words[1], words[2]} & set(asked))
                assert answer == ("yes" if named != negated else "no")
            else:
                assert answer in words


def test_caption_is_none_where_the_questions_do_not_tell():
    assert caption([("is there a red shape?", "no"), ("what shape is present?", "circle")]) is None
    assert caption([("is there a red shape?", "yes"), ("what shape is present?", "circle")]) == "a red circle"
    assert caption([("is no red circle present?", "no")]) == "a red circle"


def test_prepared_files_are_llava_json(root):
    [first, *_] = json.loads((root / "test.json").read_text())
    assert first["image"] == "test/images/0.png"
    assert (package_data() / first["image"]).is_file()
    assert first["conversations"][0] == {"from": "human", "value": "<image>\nwhat is the red shape?"}
