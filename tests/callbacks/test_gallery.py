"""The picture of a few validation images: read back from TensorBoard's file, it shows what the model answered."""

import io

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import to_rgb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from lit_mm import AnswerGallery
from lit_mm.callbacks.gallery import RIGHT, WRONG, Shown, draw, picture_of, plain
from lit_mm.data.collate import group_by_size
from tests.helpers.runs import fit


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A fit with two validations: its folder, the callback, the module, and the pictures in TensorBoard's file."""
    from tests.helpers.records import write_instruction_set

    root = write_instruction_set(tmp_path_factory.mktemp("gallery"))
    gallery, logger = AnswerGallery(3), TensorBoardLogger(root / "runs", name="")
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": -1, "num_sanity_val_steps": 1}
    lit, trainer = fit(root, root, callbacks=[gallery], logger=logger, enable_checkpointing=False, **options)
    events = EventAccumulator(trainer.log_dir, {IMAGES: 0})
    events.Reload()
    return root, gallery, lit, events.Images("val/answers")


def test_what_is_shown_is_what_was_asked_and_answered(pictures):
    root, gallery, lit, _ = pictures
    assert [each.question for each in gallery.shown] == ["what color is the shape?"] * 3  # one for each image
    assert [tuple(each.references) for each in gallery.shown] == [("red",), ("green",), ("blue",)]
    for number, each in enumerate(gallery.shown):
        assert np.array_equal(each.picture, np.array(Image.open(root / f"images/{number}.png").convert("RGB")))
    with torch.no_grad():
        batches = list(lit.eval().trainer.datamodule.val_dataloader())
        answers = {
            q.record: own for batch in batches for q, own in zip(batch.questions, lit.answers(batch), strict=True)
        }
    for number, each in enumerate(gallery.shown):
        assert each.answers == [answer.text for answer in answers[f"{number}#1"]]
        assert each.right == [answer.strip() == each.references[0] for answer in each.answers]


def test_tensorboard_has_a_picture_for_every_validation(pictures):
    _, gallery, _, found = pictures
    assert [each.step for each in found] == [1, 3]
    stored = np.array(Image.open(io.BytesIO(found[1].encoded_image_string)).convert("RGB"))
    assert np.array_equal(stored, rendered(gallery.shown, ["16", "4", "1"]))


def rendered(shown, scales):
    figure = draw(shown, scales)
    file = io.BytesIO()
    figure.savefig(file, format="rgba", dpi="figure")
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    return np.frombuffer(file.getvalue(), np.uint8).reshape(height, width, 4)[..., :3]


def has(pixels, color) -> bool:
    return bool((pixels == np.array(to_rgb(color)) * 255).all(-1).any())


def test_right_and_wrong_answers_have_their_colors():
    gray = np.full((64, 64, 3), 128, np.uint8)
    for right in (True, False):
        pixels = rendered([Shown(gray, "is it?", ["yes"], ["yes", "no"], [right, right])], ["16", "4"])
        assert (has(pixels, RIGHT), has(pixels, WRONG)) == (right, not right)


def test_any_text_can_be_drawn():
    odd = "costs $5 or $x^{$ \ud83d \0 \n 日本 " * 20
    assert rendered([Shown(np.zeros((8, 8, 3), np.uint8), odd, [odd], [odd], [True])], ["1"]).any()
    assert plain("a\n b\tc", 10) == "a b c" and plain("abcdef", 4) == "abc…"


def test_frames_stand_side_by_side():
    frames = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 4, 2)
    picture = picture_of(group_by_size([torch.full((1, 3, 8, 8), 9, dtype=torch.uint8), frames]), range(1, 7))
    assert picture.shape == (4, 8, 3) and picture[0, :, 0].tolist() == [0, 0, 2, 2, 3, 3, 5, 5]


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match=r"AnswerGallery\.questions: expected a positive number, found 0"):
        AnswerGallery(0)
