"""easy-VQA: a small visual question answering set that comes as a Python package.

Victor Zhou's easy-VQA (package `easy-vqa`): 4,000 training and 1,000 test images of 64×64 pixels,
each with one shape of one color, and 38,575 and 9,673 questions with 13 answers.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.images import ImageOptions
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.writing import conversation, write_records

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
Questions = dict[int, list[tuple[str, str]]]


class EasyVQADataModule(ImageDataModule):
    """easy-VQA as LLaVA records, with all questions of an image in one conversation.

    The last `val_images` training images are held out for validation. As in ConvLLaVA's three stages, a run
    can begin with some epochs of captions: a record asks for a short description, and the answer ("a red
    triangle") follows from the image's own questions and answers. Most questions can be guessed without
    the image but a caption cannot, so captions teach the model to look.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        root: str = "data/easy_vqa",
        val_images: int = 200,
        caption_epochs: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        val_questions: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Set where the records are written and how batches are made.

        Args:
            inputs: The model's properties that the data depends on; on the command line the model sets them.
            root: Folder for captions.json, train.json, val.json and test.json in LLaVA's format.
            val_images: Training images held out for validation, with all their questions.
            caption_epochs: Epochs of captions before the conversations, with one record for every
                training image whose questions give its shape and color. Needs
                trainer.reload_dataloaders_every_n_epochs: 1.
            batch_size: Conversations per batch and device in training.
            eval_batch_size: Conversations per batch and device outside training; null: as batch_size.
            val_questions: Number of questions that validation asks; null: all. As in ImageDataModule.
            num_workers: Processes that load batches; 0 loads in the main process.
        """
        super().__init__(
            inputs,
            train=f"{root}/train.json",
            val=f"{root}/val.json",
            test=f"{root}/test.json",
            image_root=str(package_data()),
            image=ImageOptions(mode="squash", size=64),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_questions=val_questions,
            num_workers=num_workers,
        )
        self.files["captions"] = f"{root}/captions.json"
        self.root, self.val_images, self.caption_epochs = Path(root), val_images, caption_epochs

    def prepare_data(self) -> None:
        """Write the record files."""
        train, test = read_questions("train"), read_questions("test")
        first_val = len(train) - self.val_images
        kept = dict(list(train.items())[:first_val])
        splits = {
            "captions": captions("train", kept),
            "train": records("train", shuffled(kept)),
            "val": records("train", dict(list(train.items())[first_val:])),
            "test": records("test", test),
        }
        for split, items in splits.items():
            write_records(self.root / f"{split}.json", items)


def package_data() -> Path:
    """The data folder of the installed package easy-vqa; the package itself is not imported.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("easy-VQA comes with the package easy-vqa: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"


def read_questions(split: str) -> Questions:
    """Image number -> (question, answer) pairs, for `train` or `test`."""
    by_image: Questions = defaultdict(list)
    for question, answer, image in json.loads((package_data() / split / "questions.json").read_text()):
        by_image[image].append((question, answer))
    return dict(sorted(by_image.items()))


def shuffled(by_image: Questions) -> Questions:
    """The questions of every image in a fixed random order.

    easy-VQA lists "what …" questions first, but a test asks every question alone, as the first one.
    """
    return {image: random.Random(image).sample(pairs, len(pairs)) for image, pairs in by_image.items()}


def records(split: str, by_image: Questions) -> list[dict[str, Any]]:
    """LLaVA records, one conversation per image."""
    return [_record(f"{split}_{image}", split, image, pairs) for image, pairs in by_image.items()]


def captions(split: str, by_image: Questions) -> list[dict[str, Any]]:
    """LLaVA records with a short description of every image whose questions give its shape and color."""
    told = {image: caption(pairs) for image, pairs in by_image.items()}
    return [
        _record(f"{split}_{image}_caption", split, image, [("what is in the image?", text)])
        for image, text in told.items()
        if text
    ]


def _record(name: str, split: str, image: int, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    return conversation(name, "image", f"{split}/images/{image}.png", pairs) | {"type": "easy-VQA"}


def caption(pairs: list[tuple[str, str]]) -> str | None:
    """ "a red triangle", if the image's questions and answers give both; None otherwise."""
    shape, color = _told(pairs, SHAPES), _told(pairs, COLORS)
    return f"a {color} {shape}" if shape and color else None


def _told(pairs: list[tuple[str, str]], names: tuple[str, ...]) -> str | None:
    """The name that an answer gives, or that a question presupposes or its answer confirms."""
    for question, answer in pairs:
        words = question.rstrip("?").split()
        if answer in names:
            return answer
        affirmed = answer == "yes" and not {"no", "not"} & set(words)
        denied_absence = answer == "no" and bool({"no", "not"} & set(words))
        if affirmed or denied_absence or words[0] == "what":
            for name in names:
                if name in words:
                    return name
    return None
