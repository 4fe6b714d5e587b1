"""Rendered images alone, boards of digits, documents or sheets of random text: sets to learn to read from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_mm.data.boards import BOARDS
from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.documents import DOCUMENTS
from lit_mm.data.images import ImageOptions
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.sheets import HEIGHT, SHEETS, WIDTH
from lit_mm.data.writing import write_records

SETS = {"boards": BOARDS, "documents": DOCUMENTS, "sheets": SHEETS}
SIZES: dict[str, int | tuple[int, int]] = {"boards": 64, "documents": 256, "sheets": (HEIGHT, WIDTH)}


class RenderedDataModule(ImageDataModule):
    """Boards of digits (lit_mm.data.boards), documents (lit_mm.data.documents) or sheets of random text
    (lit_mm.data.sheets), first with captions: an image's whole text, which teaches the model to read. Every question
    has a type."""

    def __init__(
        self,
        inputs: ModelInputs,
        content: Literal["boards", "documents", "sheets"],
        root: str = "data/rendered",
        train_images: int = 4000,
        val_images: int = 100,
        test_images: int = 300,
        caption_epochs: int = 2,
        asked: Literal["questions", "captions"] = "questions",
        image: ImageOptions | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Set where the records are written and how batches are made.

        Args:
            inputs: The model's properties that the data depends on; on the command line the model sets them.
            content: What the images show.
            root: Folder of the records and images, which are in a folder named after the content.
            train_images: Images to train on.
            val_images: Images for validation.
            test_images: Images for the final test.
            caption_epochs: Epochs of captions before the conversations. Needs
                trainer.reload_dataloaders_every_n_epochs: 1.
            asked: What validation and test ask for: questions of all types, or captions, the whole text.
            image: How images are resized; null: as they are, 64×64 (boards), 256×256 (documents) or 1152×576 pixels
                (sheets).
            batch_size: Conversations per batch and device in training.
            eval_batch_size: Conversations per batch and device outside training; null: as batch_size.
            num_workers: Processes that load batches, and that draw images; 0 does both in the main process.
            seed: Seed of the records' order; the images are always the same.
        """
        self.content, self.root = content, Path(root) / content
        own = "_captions" if asked == "captions" else ""
        super().__init__(
            inputs,
            train=f"{self.root}/train.json",
            val=f"{self.root}/val{own}.json",
            test=f"{self.root}/test{own}.json",
            image_root=str(self.root),
            image=image or ImageOptions(mode="squash", size=SIZES[content]),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.files["captions"], self.caption_epochs = f"{self.root}/captions.json", caption_epochs
        self.counts = {"train": train_images, "val": val_images, "test": test_images}

    def prepare_data(self) -> None:
        """Write the records, and the images that do not exist yet."""
        SETS[self.content].write(self.root, **self.counts, workers=self.num_workers)
        for split in ("val", "test"):
            items = [SETS[self.content].caption(split, number) for number in range(self.counts[split])]
            write_records(self.root / f"{split}_captions.json", items)
