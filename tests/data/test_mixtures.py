"""Several sets of every format in one DataModule: what comes out, what is kept, what is refused."""

import io
import json
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset as HFDataset
from PIL import Image

from lit_mm.data.datamodules import ImageDataModule, VideoDataModule
from lit_mm.data.dataset import InstructionSet, Subset, shares_of
from lit_mm.data.images import ImageOptions
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.records import RecordError
from lit_mm.data.video import VideoOptions
from lit_mm.model.batch import IMAGE
from tests.helpers.environment import ROOT
from tests.helpers.media import draw, render
from tests.helpers.records import conversation


def png(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(out, "PNG")
    return out.getvalue()


def messages(question: str, answer: str, *media: str) -> list[dict]:
    parts = [{"type": kind} for kind in media]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


@pytest.fixture
def sets(tmp_path):
    """Five files: LLaVA's format, videos, text as chat, parquet with image bytes, a webdataset shard."""
    for number in range(6):
        draw(tmp_path / f"images/{number}.png", (64, 64) if number % 2 else (128, 32), "red")
    images = [
        {"id": n, "image": f"images/{n}.png", "conversations": conversation((f"<image>\nimage {n}?", "yes"))}
        for n in range(6)
    ]
    (tmp_path / "images.json").write_text(json.dumps(images))
    for number, times in enumerate(([0, 500, 900], [250 * n for n in range(20)])):
        render(tmp_path / f"{number}.mp4", times=times, width=64, height=64)
    videos = [{"video": f"{n}.mp4", "conversations": conversation((f"<video>\nvideo {n}?", "yes"))} for n in range(2)]
    (tmp_path / "videos.json").write_text(json.dumps(videos))
    chat = [
        {"messages": [{"role": "user", "content": f"text {n}?"}, {"role": "assistant", "content": "yes"}]}
        for n in range(4)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, chat)))
    columns = {"messages": [messages(f"table {n}?", "yes", "image") for n in range(3)]}
    columns["images"] = [[{"bytes": png("blue"), "path": None}] for _ in range(3)]
    HFDataset.from_dict(columns).to_parquet(tmp_path / "table.parquet")
    with tarfile.open(tmp_path / "shard-000.tar", "w") as shard:
        for name, content in (
            ("a.json", json.dumps({"conversations": conversation(("<image>\nshard 0?", "yes"))}).encode()),
            ("a.png", png("green")),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return tmp_path


ALL = ["images.json", "videos.json", "text.jsonl", "table.parquet", "shard-000.tar"]


@pytest.fixture
def make(sets, tokenizer):
    def build(names=ALL, cls=VideoDataModule, times=(), pooling="exact", **options):
        inputs = ModelInputs(tokenizer, 16, [16, 4, 1], (122, 116, 104), pooling=pooling, time_scales=times)
        subsets = [name if isinstance(name, Subset) else Subset(name) for name in names]
        for subset in subsets:
            subset.path = str(sets / subset.path)
        settings = {"image": ImageOptions("keep", None), "image_root": str(sets), "batch_size": 4}
        if cls is VideoDataModule:
            settings["video"] = VideoOptions(max_frames=4)
        return cls(inputs, train=subsets, **settings | options)

    return build


def loader_of(data, epoch=0):
    """The training batches of an epoch of a run."""
    run = {"current_epoch": epoch, "max_epochs": 1, "global_rank": 0, "world_size": 1, "overfit_batches": 0}
    data.trainer = SimpleNamespace(**run)
    return data.train_dataloader()


def questions(data, epoch=0) -> list[str]:
    """What the records of an epoch ask."""
    data.setup("fit")
    loader = loader_of(data, epoch)
    decode = data.inputs.tokenizer.decode
    found = []
    for batch in loader:
        assert len(batch.image_index) == sum(int((ids == IMAGE).sum()) for ids in batch.input_ids)
        found += [decode([t for t in ids.tolist() if t != IMAGE]).split("?")[0].strip() for ids in batch.input_ids]
    return sorted(found)


EXPECTED = sorted(
    [
        f"{kind} {number}"
        for kind, count in zip(("image", "video", "text", "table", "shard"), (6, 2, 4, 3, 1), strict=True)
        for number in range(count)
    ]
)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_videos_and_text_of_every_format_in_one_run(make, workers):
    assert questions(make(num_workers=workers)) == EXPECTED


def test_a_video_becomes_frames_of_its_own_number(make):
    data = make(["videos.json"])
    data.setup("fit")
    [batch] = list(data.train_dataloader())
    assert sorted(int((ids == IMAGE).sum()) for ids in batch.input_ids) == [3, 4]
    assert len(batch.images.order) == 7
    assert batch.images.frame_sets == []


def test_time_scales_come_with_the_batch(make):
    data = make(times=[2, 1])
    data.setup("fit")
    for batch in data.train_dataloader():
        assert len(batch.time_scale) == len(batch.input_ids)
        assert [len(sets.index) for sets in batch.images.frame_sets] == [len(batch.images.order)] * 2
    kinds = {int(kept.min()) for batch in data.train_dataloader() for kept in batch.time_scale}
    assert kinds == {-1, 1}  # of four frames two begin no set; images and text stand at every time scale


def test_times_of_frames_are_written_on_request(make):
    data = make(["videos.json"], video=VideoOptions(max_frames=4, timestamps=True))
    data.setup("fit")
    [batch] = list(data.train_dataloader())
    texts = [data.inputs.tokenizer.decode([t for t in ids.tolist() if t != IMAGE]) for ids in batch.input_ids]
    assert any("0.0s: 0.5s: 0.9s:" in text for text in texts)


def test_sets_are_gone_through_as_often_as_their_epochs_say(make):
    names = [Subset("images.json", epochs=2), Subset("text.jsonl", epochs=0.5)]
    first, second = (questions(make([Subset(s.path, epochs=s.epochs) for s in names]), epoch) for epoch in (0, 1))
    images = sorted([f"image {n}" for n in range(6)] * 2)
    assert [q for q in first if q.startswith("image")] == [q for q in second if q.startswith("image")] == images
    assert sorted(q for q in first + second if q.startswith("text")) == [f"text {n}" for n in range(4)]


def test_weights_are_shares_of_the_records():
    subsets = [Subset("a", weight=3), Subset("b", weight=1)]
    assert [share * count for share, count in zip(shares_of(subsets, [10, 30]), [10, 30], strict=True)] == [30, 10]
    with pytest.raises(ValueError, match="give all sets a weight or none"):
        shares_of([Subset("a", weight=3), Subset("b")], [1, 1])
    with pytest.raises(ValueError, match="must be positive, found \\[0, 1"):
        shares_of([Subset("a", epochs=0), Subset("b")], [1, 1])


def test_batches_keep_to_their_budgets(make):
    data = make(batch_size=None, tokens_per_batch=400, pixels_per_batch=6 * 64 * 64)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(len(batch.input_ids) for batch in batches) == 16
    for batch in batches:
        assert len(batch.packed[0].input_ids) <= 400
        assert sum(group.shape[0] * group.shape[2] * group.shape[3] for group in batch.images.groups) <= 6 * 64 * 64
    assert max(len(batch.input_ids) for batch in batches) > 1


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (
            {"tokens_per_batch": 60},
            r"more tokens than a batch allows: \d+ tokens in a training batch, data.tokens_per_b",
        ),
        ({"pixels_per_batch": 64 * 64}, r"more pixels than a batch allows: (12288|16384) pixels in a training batch"),
    ],
)
def test_a_record_that_fits_no_batch_is_a_bad_record(make, budget, said):
    with pytest.raises(RecordError, match=said):
        make(["videos.json"], **budget).setup("fit")


def test_something_must_end_a_batch(make):
    with pytest.raises(ValueError, match="set one of batch_size, tokens_per_batch, pixels_per_batch"):
        make(batch_size=None)


def test_adaptive_pooling_takes_images_of_any_shape(make, sets):
    draw(sets / "images/0.png", (80, 112), "red")
    with pytest.raises(RecordError, match="do not divide a 7×5 grid"):
        make(["images.json"]).setup("fit")
    make(["images.json"], pooling="adaptive").setup("fit")


def test_image_instructions_refuse_videos(make):
    with pytest.raises(RecordError, match=r"unexpected video: video 0\.mp4: expected an image"):
        make(["videos.json"], cls=ImageDataModule).setup("fit")


class Looked(Exception):
    pass


def test_a_second_start_looks_at_no_record(make, sets, monkeypatch):
    make().setup("fit")

    def look(*_):
        raise Looked

    monkeypatch.setattr(InstructionSet, "cost", look)
    assert questions(make()) == EXPECTED
    for changed in ({"max_length": 999}, {"image": ImageOptions("squash", 64)}, {"times": [2, 1]}):
        with pytest.raises(Looked):
            make(**changed).setup("fit")
    (sets / "text.jsonl").write_text((sets / "text.jsonl").read_text() + "\n")
    with pytest.raises(Looked):
        make().setup("fit")


def test_what_was_left_out_is_told_at_every_start(make, sets):
    items = json.loads((sets / "images.json").read_text())
    items[2]["image"] = "images/gone.png"
    (sets / "images.json").write_text(json.dumps(items))
    for _ in range(2):
        data = make(["images.json"], on_bad_record="skip")
        with pytest.warns(UserWarning, match=r"skipped 1 of 6 records\n  1 × missing image, first: .*record 2"):
            data.setup("fit")
        assert len(data.sets["train"]) == 5


def test_tables_do_not_depend_on_the_number_of_processes(make):
    tables = []
    for workers in (0, 2):
        data = make(num_workers=workers, max_length=1000 + workers)
        data.setup("fit")
        tables.append([np.array(each.table) for each in data.sets["train"].sets])
    assert all(np.array_equal(a, b) for a, b in zip(*tables, strict=True))


BAD = {
    "truncated video": lambda root: (root / "0.mp4").write_bytes((root / "0.mp4").read_bytes()[:-200]),
    "not a video": lambda root: (root / "0.mp4").write_bytes(b""),
    "missing video": lambda root: (root / "0.mp4").unlink(),
    "path leaves the video root": lambda root: ((root / "0.mp4").unlink(), (root / "0.mp4").symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_videos_are_named_or_counted(make, sets, reason):
    BAD[reason](sets)
    with pytest.raises(RecordError, match=rf"videos\.json, record 0: {reason}: video 0\.mp4: "):
        make(["videos.json"]).setup("fit")
    data = make(["videos.json"], on_bad_record="skip")
    with pytest.warns(UserWarning, match=f"skipped 1 of 2 records\n  1 × {reason}"):
        data.setup("fit")


HOSTILE = [
    "/etc/passwd",
    "../secret.png",
    "images/../../secret.png",
    "http://host/a.png",
    "file:///etc/passwd",
    "link.png",
]


@pytest.mark.parametrize("path", HOSTILE)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_hostile_paths_in_every_format(make, sets, path, kind):
    (sets.parent / "secret.png").write_bytes(png("red"))
    (sets / "link.png").symlink_to(sets.parent / "secret.png")
    chat = {"messages": messages("what?", "yes", kind), f"{kind}s": [path]}
    llava = {kind: path, "conversations": conversation((f"<{kind}> what?", "yes"))}
    for item in (chat, llava):
        (sets / "bad.jsonl").write_text(json.dumps(item))
        with pytest.raises(RecordError, match=f"path leaves the {kind} root|a URL"):
            make(["bad.jsonl"]).setup("fit")


def test_a_record_of_a_hundred_thousand_tokens_is_refused(make, sets):
    item = {"conversations": conversation(("what?", "yes " * 100_000))}
    (sets / "long.jsonl").write_text(json.dumps(item))
    with pytest.raises(RecordError, match=r"long\.jsonl.*: too long: \d{6} tokens"):
        make(["long.jsonl"]).setup("fit")


def test_a_truncated_shard_is_named(make, sets):
    file = sets / "shard-000.tar"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"shard-000\.tar"):
        make(["shard-000.tar"]).setup("fit")


def test_a_table_without_the_columns_is_named(make, sets):
    HFDataset.from_dict({"prompt": ["a"], "picture": ["b"]}).to_parquet(sets / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet: expected a column .*, found the columns prompt, picture"):
        make(["other.parquet"]).setup("fit")


def test_a_file_that_comes_later_is_found(make, sets):
    content = (sets / "images/2.png").read_bytes()
    (sets / "images/2.png").unlink()
    for _ in range(2):
        data = make(["images.json"], on_bad_record="skip")
        with pytest.warns(UserWarning, match="skipped 1 of 6"):
            data.setup("fit")
    (sets / "images/2.png").write_bytes(content)
    data = make(["images.json"], on_bad_record="skip")
    data.setup("fit")
    assert data.sets["train"].sets[0].table[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["images/1.png", "1.mp4"])
def test_media_that_changed_after_the_first_start_are_named(make, sets, name):
    """Another shape has other scales, another number of frames another length."""
    data = make(["images.json", "videos.json"], video=VideoOptions(max_frames=30))
    data.setup("fit")
    if name.endswith("png"):
        draw(sets / name, (128, 128), "red")
    else:
        render(sets / name, times=[250 * n for n in range(25)], width=64, height=64)
    with pytest.raises(
        RecordError, match=r"record 1.*: changed since the first start: expected .* its images or videos"
    ):
        list(data.train_dataloader())


def test_a_spoiled_table_is_made_anew(make):
    data = make(["text.jsonl"])
    data.setup("fit")
    for file in data.cache.glob("index-*.npy"):
        file.write_bytes(file.read_bytes()[:-9])
    assert questions(make(["text.jsonl"])) == [f"text {n}" for n in range(4)]


def test_a_cache_that_is_no_folder_is_named(make, sets):
    with pytest.raises(OSError, match=r"data\.cache: expected a writable folder"):
        make(["text.jsonl"], cache=str(sets / "text.jsonl")).setup("fit")


def test_images_inside_of_records_of_two_files_are_not_taken_for_each_other(make, sets):
    columns = {"messages": [messages("other 0?", "yes", "image")], "images": [[{"bytes": png("red"), "path": None}]]}
    for folder in ("a", "b"):
        (sets / folder).mkdir()
        HFDataset.from_dict(columns).to_parquet(sets / folder / "0.parquet")
        columns["images"] = [[{"bytes": png("white"), "path": None}]]
    data = make([Subset("a/0.parquet"), Subset("b/0.parquet")])
    for each in data.files["train"]:
        each.path = [each.path, each.path]  # the same name for both: "…/0.parquet and 1 more"
    data.setup("fit")
    [batch] = list(data.train_dataloader())
    assert {tuple(image[:, 0, 0].tolist()) for image in batch.images.groups[0]} == {(255, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize(
    ("per_step", "fits", "said"), [(2, 16 + 4 + 2 * 7, 33), (1, 16 + 7, 22), ("all", 21 + 3 * 7, 41)]
)
def test_a_still_image_needs_the_room_of_different_scales(make, sets, per_step, fits, said):
    """With time scales, its branches at one scale are one branch."""
    for budget, error in ((said, True), (fits, False)):
        data = make(["images.json"], times=[4, 2], tokens_per_batch=budget)
        data.inputs.scales_per_step = per_step
        needed = set()
        if error:
            with pytest.raises(RecordError, match=rf"{fits} tokens in a training batch"):
                data.setup("fit")
            continue
        data.setup("fit")
        for epoch in range(30):
            needed |= {len(batch.packed[0].input_ids) for batch in loader_of(data, epoch)}
        assert max(needed) == fits


def test_an_epoch_without_a_batch_is_refused(make):
    data = make([Subset("text.jsonl", epochs=0.05)])
    data.setup("fit")
    with pytest.raises(ValueError, match=r"epoch 0 has no batch: 4 records, used \[0\.05\] times per epoch"):
        data.train_dataloader()


def test_a_program_without_a_trainer_ends_at_once(sets):
    program = f"""
import time

from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.tokenizer import load_tokenizer
from tests.helpers.models import tiny_llm
inputs = ModelInputs(load_tokenizer(tiny_llm()), 16, [16, 4, 1], (0, 0, 0))
data = ImageDataModule(inputs, train="{sets}/text.jsonl", num_workers=1)
data.setup("fit")
next(iter(data.train_dataloader()))
print(time.time())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.time() - float(done.stdout) < 10
    assert "Traceback" not in done.stderr
