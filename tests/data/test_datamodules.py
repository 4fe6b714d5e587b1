"""ImageDataModule on files on disk: what comes out, and what is refused before training."""

import json
import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.images import ImageOptions
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.records import RecordError
from lit_mm.model.batch import IMAGE
from tests.helpers.media import draw, truncate
from tests.helpers.records import conversation


@pytest.fixture
def make(instruction_set, tokenizer):
    def build(**options) -> ImageDataModule:
        inputs = ModelInputs(tokenizer, 16, [16, 4, 1], (122, 116, 104))
        files = {"train": str(instruction_set / "train.json"), "val": str(instruction_set / "val.json")}
        settings = {"image": ImageOptions("keep", None), "image_root": str(instruction_set), "batch_size": 4}
        return ImageDataModule(inputs, **{**files, **settings, **options})

    return build


def write(root, items, name="bad.json") -> str:
    (root / name).write_text(json.dumps(items))
    return str(root / name)


def one(image="images/1.png", question="<image>\nwhat?", answer="this"):
    return {"id": "x", "image": image, "conversations": conversation((question, answer))}


def test_training_batches_hold_every_record(make):
    data = make()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(len(batch.input_ids) for batch in batches) == 14
    for batch in batches:
        markers = sum(int((ids == IMAGE).sum()) for ids in batch.input_ids)
        assert markers == len(batch.image_index)
        assert sorted(set(batch.image_index.tolist())) == list(range(len(batch.images.order)))
        assert batch.questions == []
        assert all(group.dtype == torch.uint8 for group in batch.images.groups)


def test_validation_asks_every_question_alone(make):
    data = make()
    data.setup("validate")
    questions = [question for batch in data.val_dataloader() for question in batch.questions]
    assert [(q.record, q.text, q.references) for q in questions[:2]] == [
        ("0#1", "what color is the shape?", ("red",)),
        ("0#2", "is there a circle?", ("yes",)),
    ]
    assert len(questions) == 8
    assert all((question.input_ids == IMAGE).sum() == 1 for question in questions)
    assert "yes" not in data.inputs.tokenizer.decode(questions[1].input_ids[questions[1].input_ids >= 0])


def drawn(make, rank=0, ranks=1, **options) -> list[str]:
    """The ids of the questions that validation asks on one rank, in two epochs."""
    data = make(val="train.json", eval_batch_size=3, **options)
    strategy = SimpleNamespace(barrier=lambda: None)
    data.trainer = SimpleNamespace(
        global_rank=rank, local_rank=rank, world_size=ranks, overfit_batches=0, strategy=strategy
    )
    data.setup("validate")
    first, second = ([q.record for batch in data.val_dataloader() for q in batch.questions] for _ in range(2))
    assert first == second
    return first


@pytest.mark.parametrize("asked", [1, 5, 9])
def test_validation_of_some_questions(make, instruction_set, monkeypatch, asked):
    """Exactly as many, always the same ones, whatever the number of ranks; others with another seed."""
    monkeypatch.chdir(instruction_set)
    every, some = drawn(make), drawn(make, val_questions=asked)
    assert len({*some}) == asked == len(some)
    assert {*some} < {*every} and some == [id for id in every if id in some]
    for ranks in (2, 3):
        shared = [id for rank in range(ranks) for id in drawn(make, rank, ranks, val_questions=asked)]
        assert sorted(shared) == sorted(some)
    assert any(drawn(make, val_questions=asked, seed=seed) != some for seed in range(1, 4))
    assert drawn(make, val_questions=asked, num_workers=1) == some


def test_validation_of_more_questions_than_there_are(make, instruction_set, monkeypatch):
    said = []
    monkeypatch.chdir(instruction_set)
    monkeypatch.setattr("lit_mm.data.datamodules.rank_zero_info", said.append)
    assert drawn(make, val_questions=500) == drawn(make)
    assert said == ["data.val_questions 500: all 26 questions are asked"]
    with pytest.raises(ValueError, match=r"data\.val_questions: expected a positive number, found 0"):
        make(val_questions=0)


def test_prediction_reads_questions_without_answers(make, instruction_set):
    items = [
        {"question_id": 5, "image": "images/1.png", "text": "what color is the shape?"},
        {"question_id": 6, "text": "is it?"},
    ]
    (instruction_set / "ask.jsonl").write_text("\n".join(map(json.dumps, items)))
    data = make(predict=str(instruction_set / "ask.jsonl"))
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert [(q.record, q.references, q.image_index) for q in batch.questions] == [(5, (), [0]), (6, (), [])]
    assert batch.input_ids == []


def test_a_test_asks_questions_with_lists_of_accepted_answers(make, instruction_set):
    listed = {"references": ["red", "scarlet"], "type": "color", "group": 3}
    question = {"question_id": 5, "image": "images/1.png", "text": "what color is the shape?", **listed}
    data = make(test=write(instruction_set, [question, one() | {"references": ["this", "that"]}, one()]))
    data.setup("test")
    [[batch]] = data.test_dataloader()
    assert [(q.references, q.type, q.group) for q in batch.questions] == [
        (("red", "scarlet"), "color", "3"),
        (("this", "that"), "", ""),
        (("this",), "", ""),
    ]
    with pytest.raises(RecordError, match="no answer: val needs conversations, found a question"):
        make(val=data.files["test"]).setup("validate")


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(make, workers):
    data = make(num_workers=workers)
    data.setup("fit")
    ids = [ids.tolist() for batch in data.train_dataloader() for ids in batch.input_ids]
    alone = make()
    alone.setup("fit")
    assert ids == [ids.tolist() for batch in alone.train_dataloader() for ids in batch.input_ids]


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        (one("images/gone.png"), {}, "missing image: image images/gone.png"),
        (one("../x.png"), {}, "path leaves the image root"),
        (one("train.json"), {}, "not an image"),
        (
            one(answer="yes " * 300),
            {"max_length": 64},
            "too long: .* tokens with the images at scale 16, the limit is 64",
        ),
        (
            one("images/odd.png"),
            {},
            "scales: an image of 48×80 pixels \\(height × width\\): "
            "scales \\[16, 4\\] do not divide a 3×5 grid, which allows \\[15, 1\\]",
        ),
        (one(question="what?"), {}, "image count disagrees"),
    ],
)
def test_bad_records_stop_the_run_before_training(make, instruction_set, item, options, message):
    draw(instruction_set / "images/odd.png", (80, 48), "red")
    good = one()
    data = make(train=write(instruction_set, [good, item]), **options)
    with pytest.raises(RecordError, match=rf"bad\.json, record 1 \(id x\): {message}"):
        data.setup("fit")


def test_skipping_leaves_them_out_and_reports(make, instruction_set):
    items = [one(), one("images/gone.png"), one("images/none.png"), one(answer="yes " * 300)]
    data = make(train=write(instruction_set, items), max_length=64, on_bad_record="skip")
    with pytest.warns(
        UserWarning, match=r"skipped 3 of 4 records\n  2 × missing image, first: .*gone.png[\s\S]*1 × too long"
    ):
        data.setup("fit")
    assert len(data.sets["train"]) == 1


def test_nothing_usable_is_an_error(make, instruction_set):
    data = make(train=write(instruction_set, [one("images/gone.png")]), on_bad_record="skip")
    with pytest.raises(ValueError, match="no usable record"), pytest.warns(UserWarning, match="skipped 1 of 1"):
        data.setup("fit")


def test_truncated_image_stops_or_is_counted(make, instruction_set):
    truncate(instruction_set / "images/2.png")
    data = make()
    data.setup("fit")
    with pytest.raises(RecordError, match=r"train\.json, record 2 \(id 2\): truncated image: image images/2\.png"):
        list(data.train_dataloader())
    data = make(on_bad_record="skip")
    data.setup("fit")
    with pytest.warns(UserWarning, match="truncated image"):
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    assert sum(len(batch.input_ids) for batch in batches) == 13  # the others of its batch are trained on
    with pytest.warns(UserWarning, match="while loading: skipped 1 of 14 records"):
        data.teardown("fit")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": None}, ValueError, r"data\.train: no file of records is set"),
        ({"train": "nowhere.json"}, FileNotFoundError, r"no instruction file nowhere\.json"),
        ({"batch_size": 0}, ValueError, r"data\.batch_size: expected a positive number, found 0"),
        ({"image_root": "nowhere"}, FileNotFoundError, r"data\.image_root: no folder nowhere"),
    ],
)
def test_missing_files(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options).setup("fit")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_questions_without_answers_are_for_predict_alone(make, instruction_set, split):
    data = make(**{split: write(instruction_set, [{"question_id": 1, "text": "what?"}])})
    with pytest.raises(RecordError, match=f"no answer: {split} needs conversations"):
        data.setup({"train": "fit", "val": "validate"}.get(split, split))


def test_an_unreadable_batch_does_not_end_a_run_that_skips(make, instruction_set):
    truncate(instruction_set / "images/2.png")
    data = make(on_bad_record="skip", batch_size=1, test=str(instruction_set / "train.json"))
    data.setup("fit")
    data.setup("test")
    with pytest.warns(UserWarning, match="truncated image"):
        trained = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
        judged = [data.on_after_batch_transfer(batch, 0) for loader in data.test_dataloader() for batch in loader]
    assert [len(batch.input_ids) for batch in trained] == [1] * 14
    assert sum(len(batch.questions) == 0 for batch in judged) == 1


def test_an_error_in_a_worker_keeps_its_message(make, instruction_set):
    truncate(instruction_set / "images/2.png")
    data = make(num_workers=1)
    data.setup("fit")
    with pytest.raises(RecordError, match=r"record 2 \(id 2\): truncated image: image images/2\.png"):
        list(data.train_dataloader())


def test_a_forked_process_leaves_its_parents_workers_alone(make):
    """It may find the parent's loader among its garbage, as a loader's process of the next epoch does."""
    data = make(num_workers=2)
    data.setup("fit")
    loader = data.train_dataloader()
    next(iter(loader))
    workers = loader._iterator._workers
    forked = multiprocessing.get_context("fork").Process(target=loader.close)
    forked.start()
    forked.join(60)
    assert forked.exitcode == 0
    assert [worker.exitcode for worker in workers] == [None, None]
    loader.close()
    assert all(not worker.is_alive() for worker in workers)


def test_pad_mode_gives_every_image_the_same_grid(make):
    data = make(image=ImageOptions("pad", 64))
    data.setup("fit")
    assert {tuple(group.shape[1:]) for batch in data.train_dataloader() for group in batch.images.groups} == {
        (3, 64, 64)
    }


def test_images_in_a_later_question_cannot_be_asked_alone(make, instruction_set):
    item = {"id": "x", "image": ["images/1.png", "images/3.png"]}
    item["conversations"] = conversation(("<image> what?", "this"), ("<image> and this?", "that"))
    data = make(val=write(instruction_set, [item]))
    with pytest.raises(RecordError, match="images in several questions"):
        data.setup("validate")
    make(train=write(instruction_set, [item])).setup("fit")  # as a conversation it is fine


def test_padded_batches_hold_records_of_like_length(make):
    data = make()
    data.inputs.packing = "padded"
    data.setup("fit")
    assert data.train_plans(0).choice == "alike"
