"""DataModules: instruction sets -> batches for fit, validate, test and predict.

    file --records--> Record --conversation--> ids, targets --\\
    image files --images--> uint8 pixels ----------------------> Sample --batching--> Batch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lit_mm.data.batching import Batches, LengthGroupedBatches, Sample, ScaleDraw
from lit_mm.data.conversation import Conversation
from lit_mm.data.images import ImageFolder, ImageOptions
from lit_mm.data.records import MARKER, BadRecords, Record, RecordError, parse, read_items
from lit_mm.model.projector import Sampling, nested_windows
from lit_mm.model.rows import Batch, Packing, Question

Split = Literal["train", "val", "test", "predict"]


class ModelInputs:
    """All that the data side knows of a model.

    Args:
        tokenizer: The LLM's, chat template set.
        stride: Pixels per grid cell along a side.
        scales: Visual tokens per image, finest first.
        colour: The encoder's mean colour in 0..255, for padding.
        sampling: How coarser tokens come from finer ones.
        packing: How batches are laid out for the model.
        scales_per_step: How many scales take part in a training step.
        keep_finest: Whether the finest always does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stride: int,
        scales: list[int],
        colour: tuple[int, int, int],
        sampling: Sampling = "mean",
        packing: Packing = "branch",
        scales_per_step: int | Literal["all"] = "all",
        keep_finest: bool = False,
    ) -> None:
        self.tokenizer, self.stride, self.scales, self.colour = tokenizer, stride, scales, colour
        self.sampling, self.packing = sampling, packing
        self.scales_per_step, self.keep_finest = scales_per_step, keep_finest


class InstructionSet(Dataset):
    """Records of one file, checked at once, encoded and decoded when asked for.

    Args:
        records: Parsed records.
        conversation: Encodes text.
        folder: Opens images.
        split: train supervises; val asks as well; test and predict only ask.
        skip: Do not raise a RecordError but name it in the sample: in training the next readable
            record takes the place, elsewhere the sample asks nothing.

    Attributes:
        lengths: Tokens of every record, images at the finest scale; 0 where nothing is supervised.
    """

    def __init__(
        self, records: Sequence[Record], conversation: Conversation, folder: ImageFolder, split: Split, skip: bool
    ) -> None:
        self.records, self.conversation, self.folder = records, conversation, folder
        self.split, self.skip = split, skip
        self.lengths: list[int] = [0] * len(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        skipped = []
        for step in range(len(self)):
            try:
                sample = self._sample(self.records[(index + step) % len(self)])
            except RecordError as error:
                if not self.skip:
                    raise
                skipped.append(error)
                if self.split == "train":
                    continue
                sample = Sample([])
            sample.skipped = skipped
            return sample
        raise skipped[0]

    def _sample(self, record: Record) -> Sample:
        sample = Sample(self.folder.load(record))
        if self.split in ("train", "val"):
            sample.token_ids, sample.targets = self.conversation.encode(record)
        if self.split != "train":
            sample.questions = [self._question(record, *exchange) for exchange in record.exchanges]
        return sample

    def _question(self, record: Record, text: str, answer: str | None) -> Question:
        """One exchange on its own: every question is asked with all images and without history."""
        asked = text if MARKER in text else f"{MARKER}\n" * len(record.images) + text
        images = range(len(record.images))
        if asked.count(MARKER) != len(images):
            reason = "images in several questions"
            raise RecordError(record.where, reason, "expected all images in the first, as each question is asked alone")
        plain = text.replace(MARKER, "").strip()
        return Question(record.id, plain, self.conversation.prompt(asked, record.where), list(images), answer)


class ImageInstructions(LightningDataModule):
    """Instruction sets of images and text in LLaVA's format.

    Validation and test ask every question of a conversation on its own, with the images and without
    the turns before it, and compare the generated answer with the one in the file.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        image_root: str = ".",
        image: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        max_length: int = 2048,
        on_bad_record: Literal["error", "skip"] = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Where the records are and how they are fed.

        Args:
            inputs: What the data must know of the model; on the command line it comes from there.
            train: JSON list or JSON-lines of conversations.
            val: Likewise, for validation.
            test: Likewise, for the last look.
            predict: Questions to answer: {"question_id", "image", "text"} a line, or conversations.
            image_root: The folder that image paths are relative to. Nothing outside it is opened.
            image: How images are brought to size.
            batch_size: Records per batch and device in training.
            eval_batch_size: Records per batch and device elsewhere; null: as batch_size.
            max_length: The longest sample in tokens, images at the finest scale included. A longer
                one is a bad record; nothing is ever cut.
            on_bad_record: `error` stops at the first bad record, before training where it can be
                known; `skip` leaves bad records out, counts them and reports why.
            num_workers: Processes that load batches; 0 loads in the main process.
            seed: Decides the order of the records, together with the epoch.
        """
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: expected a positive number, found {value}")
        self.inputs = inputs
        self.files: dict[str, str | None] = {"train": train, "val": val, "test": test, "predict": predict}
        self.image_root, self.image = image_root, image
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.max_length, self.on_bad_record = max_length, on_bad_record
        self.num_workers, self.seed = num_workers, seed
        self.sets: dict[str, InstructionSet] = {}
        self.skipped = BadRecords("skip")
        self.seen = 0

    def setup(self, stage: str) -> None:
        """Read and check the files that a stage (fit, validate, test or predict) needs.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The stage needs a file that the config does not name, or a file is malformed.
            RecordError: A bad record, if on_bad_record is `error`.
        """
        needed: dict[str, list[Split]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}
        for split in needed.get(str(getattr(stage, "value", stage)), ["predict"]):
            if self.files[split]:
                self.sets[split] = self.sets.get(split) or self._read(split, split)
            elif stage != "fit" or split == "train":
                raise ValueError(f"data.{split}: no file of records is named")

    def _read(self, name: str, split: Split) -> InstructionSet:
        path = str(self.files[name])
        bad = BadRecords(self.on_bad_record)
        root = Path(self.image_root)
        if not root.is_dir():
            raise FileNotFoundError(f"data.image_root: no folder {root}")
        conversation = Conversation(self.inputs.tokenizer)
        made = InstructionSet(
            [], conversation, ImageFolder(root, self.image, self.inputs.colour), split, bad.policy == "skip"
        )
        items = read_items(path)
        checked = bad.keep(items, lambda item: self._check(parse(*item), made))
        made.records, made.lengths = [record for record, _ in checked], [length for _, length in checked]
        if report := bad.report(path, len(items)):
            rank_zero_warn(report)
        if not made.records:
            raise ValueError(f"{path}: not one usable record\n{report}")
        return made

    def _check(self, record: Record, made: InstructionSet) -> tuple[Record, int]:
        """Find out before training what can be known without decoding an image; the length in tokens."""
        length = 0
        if made.split != "predict" and record.turns[-1].role == "user":
            raise RecordError(record.where, "no answer", f"{made.split} needs conversations, found a question alone")
        for width, height in made.folder.sizes(record):
            grid = math.ceil(height / self.inputs.stride), math.ceil(width / self.inputs.stride)
            try:
                nested_windows(*grid, self.inputs.scales, self.inputs.sampling)
            except ValueError as error:
                raise RecordError(record.where, "scales", f"an image of {width}×{height} pixels: {error}") from None
        if made.split in ("train", "val"):
            length = len(made.conversation.encode(record)[0]) + len(record.images) * (self.inputs.scales[0] - 1)
            if length > self.max_length:
                detail = (
                    f"{length} tokens with the images at scale {self.inputs.scales[0]}, allowed are {self.max_length}"
                )
                raise RecordError(record.where, "too long", detail)
        if made.split != "train":
            for exchange in record.exchanges:
                made._question(record, *exchange)
        return record, length

    def train_dataloader(self) -> DataLoader:
        """Batches of shuffled conversations."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        """Batches of conversations and of their questions."""
        return self._loader("val", self.eval_batch_size) if "val" in self.sets else []

    def test_dataloader(self) -> DataLoader:
        """Batches of questions with answers."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """Batches of questions."""
        return self._loader("predict", self.eval_batch_size)

    def _loader(self, name: str, batch_size: int, shuffle: bool = False) -> DataLoader:
        trainer = self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        batches = LengthGroupedBatches(self.sets[name].lengths, batch_size, shuffle, self.seed, rank, ranks)
        per_step = self.inputs.scales_per_step if shuffle else "all"
        draw = ScaleDraw(self.inputs.scales, per_step, self.inputs.keep_finest, self.seed)
        return DataLoader(
            Batches(self.sets[name], draw, self.inputs.packing),
            sampler=batches,
            batch_size=None,  # the sampler hands out whole batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count what the loader had to leave out."""
        self.seen += batch.records
        for reason, message in batch.skipped:
            self.skipped.count(reason, message)
            rank_zero_warn(f"skipped: {message}")
        return batch

    def teardown(self, stage: str) -> None:
        """Report what was skipped while loading."""
        if report := self.skipped.report("while loading", self.seen):
            rank_zero_warn(report)
        self.skipped, self.seen = BadRecords("skip"), 0
