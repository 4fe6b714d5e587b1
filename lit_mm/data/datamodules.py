"""DataModules: instruction sets -> batches for fit, validate, test and predict.

    file --sources--> item --records--> Record --conversation--> ids, targets --\\
    image and video files --media--> uint8 pixels ------------------------------> Sample --batching--> Batch

A table beside each file (`index`) tells which records are usable and what each costs; records are
parsed, encoded and decoded when their turn comes.
"""

from __future__ import annotations

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_mm.data.batching import (
    Batches,
    BatchPlans,
    Budget,
    Choice,
    Costs,
    ResumableLoader,
    Sample,
    ScaleDraw,
    Sizes,
    epoch_order,
    leave_signals_to_the_trainer,
)
from lit_mm.data.conversation import Conversation, Encoded
from lit_mm.data.images import ImageOptions
from lit_mm.data.index import Index, index_of
from lit_mm.data.media import MediaFolder, Shown
from lit_mm.data.records import MARKERS, BadRecords, ItemFormat, Record, RecordError, parse
from lit_mm.data.sources import FileFormat, Source, open_source
from lit_mm.data.video import VideoOptions
from lit_mm.model.projector import Pooling, Sampling, all_levels, nested_shapes
from lit_mm.model.rows import IMAGE, Batch, Drawn, Packing, Question

Split = Literal["train", "val", "test", "predict"]


class ModelInputs:
    """All that the data side knows of a model.

    Args:
        tokenizer: The LLM's, chat template set.
        stride: Pixels per grid cell along a side.
        scales: Visual tokens per image, finest first.
        colour: The encoder's mean colour in 0..255, for padding.
        sampling: How coarser tokens come from finer ones.
        pooling: Whether any grid will do.
        time_scales: Sets of frames per video, finest first, if any.
        packing: How batches are laid out for the model.
        scales_per_step: How many levels take part in a training step.
        keep_finest: Whether the finest always does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stride: int,
        scales: list[int],
        colour: tuple[int, int, int],
        sampling: Sampling = "mean",
        pooling: Pooling = "exact",
        time_scales: Sequence[int] = (),
        packing: Packing = "branch",
        scales_per_step: int | Literal["all"] = "all",
        keep_finest: bool = False,
    ) -> None:
        self.tokenizer, self.stride, self.scales, self.colour = tokenizer, stride, scales, colour
        self.sampling, self.pooling, self.time_scales = sampling, pooling, list(time_scales)
        self.packing, self.scales_per_step, self.keep_finest = packing, scales_per_step, keep_finest

    def draw(self, training: bool, seed: int = 0) -> ScaleDraw:
        """Which levels take part in a step."""
        levels = len(all_levels(self.scales, self.time_scales))
        return ScaleDraw(levels, self.scales_per_step if training else "all", self.keep_finest, seed)

    def settings(self) -> dict[str, Any]:
        """What of it decides the length of a record."""
        return {name: value for name, value in vars(self).items() if name not in ("tokenizer", "colour", "packing")} | {
            "tokenizer": _identity(self.tokenizer)
        }


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(f"{told} {tokenizer.chat_template}".encode(), digest_size=16).hexdigest()


@dataclass
class Subset:
    """One set of a mixture.

    Args:
        path: File, files or data set, in any format that `docs/data.md` describes.
        root: The folder that image and video paths are relative to; null: the DataModule's.
        epochs: How often the set is gone through in an epoch: 2 twice, 0.5 one half, the other half in
            the next.
        weight: Instead of epochs: the set's share of an epoch's records, relative to the other sets'
            weights. An epoch then has as many records as all sets together.
        format: What the files hold; null looks.
        items: What a record looks like; null looks at each.
    """

    path: str | list[str]
    root: str | None = None
    epochs: float = 1.0
    weight: float | None = None
    format: FileFormat | None = None
    items: ItemFormat | None = None


class Reader:
    """Records of one file, by their numbers in it.

    Args:
        source: Raw items.
        items: Their format; None looks at each.
        conversation: Encodes text.
        media: Opens images and videos.
        split: train supervises; val asks as well; test and predict only ask.
        inputs: What the model tells.
        max_length: Most tokens of a record at the finest level.
        budget: Of a training batch.
    """

    def __init__(
        self,
        source: Source,
        items: ItemFormat | None,
        conversation: Conversation,
        media: MediaFolder,
        split: Split,
        inputs: ModelInputs,
        max_length: int,
        budget: Budget,
    ) -> None:
        self.source, self.items, self.conversation, self.media = source, items, conversation, media
        self.split, self.inputs, self.max_length, self.budget = split, inputs, max_length, budget

    def __len__(self) -> int:
        return len(self.source)

    def record(self, number: int) -> Record:
        """One record.

        Raises:
            RecordError: Anything in it that is not as it should be.
        """
        where, item = self.source[number]
        return parse(where, item, self.items)

    def sample(self, number: int) -> Sample:
        """One record, encoded and decoded.

        Raises:
            RecordError: As `record`, and what is found out by reading images and videos.
        """
        record = self.record(number)
        visuals, frames = self.media.load(record)
        sample = Sample(visuals)
        if self.split in ("train", "val"):
            encoded = self.conversation.encode(record, frames)
            sample.token_ids, sample.targets, sample.kept = encoded.tensors(bool(self.inputs.time_scales))
        if self.split != "train":
            sample.questions = [self._question(record, *exchange, frames) for exchange in record.exchanges]
        return sample

    def _question(self, record: Record, text: str, answer: str | None, frames: list[list[str]]) -> Question:
        """One exchange on its own: every question is asked with all media and without history."""
        markers = [MARKERS[medium.kind] for medium in record.media]
        asked = text if any(marker in text for marker in markers) else "".join(f"{m}\n" for m in markers) + text
        if sum(asked.count(marker) for marker in MARKERS.values()) != len(markers):
            reason = "images in several questions"
            raise RecordError(record.where, reason, "expected all images in the first, as each question is asked alone")
        encoded = self.conversation.prompt(asked, record.where, frames, record.system)
        ids, _, kept = encoded.tensors(bool(self.inputs.time_scales))
        plain = text
        for marker in MARKERS.values():
            plain = plain.replace(marker, "")
        return Question(record.id, plain.strip(), ids, list(range(sum(map(len, frames)))), answer, kept)

    def cost(self, number: int) -> list[int]:
        """Find out before training what can be known without decoding an image; the record's costs."""
        record = self.record(number)
        if self.split != "predict" and record.turns[-1].role == "user":
            detail = f"{self.split} needs conversations, found a question alone"
            raise RecordError(record.where, "no answer", detail)
        shown = self.media.shown(record)
        pixels = sum(self._pixels(record, each) for each in shown)
        frames, times = [each.frames for each in shown], max(1, len(self.inputs.time_scales))
        if self.split != "train":
            for exchange in record.exchanges:
                self._question(record, *exchange, frames)
        if self.split in ("test", "predict"):
            return [0, pixels, *[0] * times, *[0] * times]
        before, words, sets = positions(self.conversation.encode(record, frames), times)
        row = [before, pixels, *words, *sets]
        self._fits(record, row, before + words[0] + sets[0] * self.inputs.scales[0])
        return row

    def _pixels(self, record: Record, shown: Shown) -> int:
        """Of an image or a video, padded to the stride."""
        stride = self.inputs.stride
        grid = math.ceil(shown.height / stride), math.ceil(shown.width / stride)
        try:
            nested_shapes(*grid, tuple(self.inputs.scales), self.inputs.sampling, self.inputs.pooling)
        except ValueError as error:
            detail = f"an image of {shown.width}×{shown.height} pixels: {error}"
            raise RecordError(record.where, "scales", detail) from None
        return math.prod(grid) * stride**2 * len(shown.frames)

    def _fits(self, record: Record, row: list[int], length: int) -> None:
        if length > self.max_length:
            detail = f"{length} tokens with the images at scale {self.inputs.scales[0]}, allowed are {self.max_length}"
            raise RecordError(record.where, "too long", detail)
        if self.split == "train":
            found = {"tokens": self._most_tokens(row), "pixels": row[1]}
            for name, limit in (("tokens", self.budget.tokens), ("pixels", self.budget.pixels)):
                if limit is not None and found[name] > limit:
                    detail = f"{found[name]} {name} in a training batch, data.{name}_per_batch allows {limit}"
                    raise RecordError(record.where, f"more {name} than a batch holds", detail)

    def _most_tokens(self, row: list[int]) -> int:
        """Positions of the record at the levels that need most of all that can be drawn together."""
        draw, scales = self.inputs.draw(training=True), self.inputs.scales
        costs, one = Index(np.array([[0, *row]]), BadRecords("skip"), 1).costs, np.zeros(1, np.int64)
        levels = [Drawn(number, 1.0) for number in range(draw.levels)]
        levels.sort(key=lambda level: -int(costs.tokens(one, [level], scales)[0]))
        drawn = levels if draw.per_step == "all" else levels[: draw.per_step]
        return int(costs.tokens(one, drawn, scales)[0])


def positions(encoded: Encoded, times: int) -> tuple[int, list[int], list[int]]:
    """Positions before the first image, and behind it the words and frames at each time scale."""
    ids, kept = np.array(encoded.ids), np.array(encoded.kept)
    image = ids == IMAGE
    first = int(image.argmax()) if image.any() else len(ids)
    stays = [kept[first:] >= time for time in range(times)] if kept.max() >= 0 else [np.ones(len(ids) - first, bool)]
    frames = [int(image[first:][each].sum()) for each in stays]
    return first, [int(each.sum()) - count for each, count in zip(stays, frames, strict=True)], frames


class InstructionSet(Dataset):
    """The usable records of one file.

    Args:
        reader: The file.
        index: Which of its records are usable, and what they cost.
        skip: Whether a record that cannot be read is named in its sample instead of raised.
    """

    def __init__(self, reader: Reader, index: Index, skip: bool) -> None:
        self.reader, self.index, self.skip = reader, index, skip

    def __len__(self) -> int:
        return len(self.index.table)

    def __getitem__(self, number: int) -> Sample:
        try:
            return self.reader.sample(int(self.index.items[number]))
        except RecordError as error:
            if not self.skip:
                raise
            return Sample(skipped=[error])


class Mixture(Dataset):
    """Several sets, their records numbered one set after another.

    Args:
        sets: The sets.
        shares: How often each is gone through in an epoch.
    """

    def __init__(self, sets: list[InstructionSet], shares: list[float]) -> None:
        self.sets, self.shares = sets, shares
        self.firsts = [0, *accumulate(len(each) for each in sets)]
        columns = zip(
            *((c.before, c.words, c.frames, c.pixels) for c in (each.index.costs for each in sets)), strict=True
        )
        self.costs = Costs(*(arrays[0] if len(sets) == 1 else np.concatenate(arrays) for arrays in columns))

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, record: int) -> Sample:
        number = bisect_right(self.firsts, record) - 1
        return self.sets[number][record - self.firsts[number]]

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """The records of an epoch, in random order."""
        return epoch_order([len(each) for each in self.sets], self.shares, seed, epoch)


def shares_of(subsets: Sequence[Subset], counts: Sequence[int]) -> list[float]:
    """How often each set is gone through in an epoch.

    Raises:
        ValueError: Some sets have weights and others none, or a number is not positive.
    """
    weights = [subset.weight for subset in subsets]
    numbers = [subset.epochs if subset.weight is None else subset.weight for subset in subsets]
    if any(not number > 0 for number in numbers):
        raise ValueError(f"data.train: epochs and weights must be positive, found {numbers}")
    if weights.count(None) == len(weights):
        return numbers
    if None in weights:
        raise ValueError(f"data.train: give all sets a weight or none, found {weights}")
    total = sum(counts)
    return [number / sum(numbers) * total / count for number, count in zip(numbers, counts, strict=True)]


def cache_folder() -> Path:
    """Where tables of records are kept unless the config says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_mm"


class ImageInstructions(LightningDataModule):
    """Instruction sets of images and text, one or a mixture, in any format that docs/data.md describes.

    Validation and test ask every question of a conversation on its own, with the images and without
    the turns before it, and compare the generated answer with the one in the file.
    """

    video: VideoOptions | None = None
    frame: ImageOptions | None = None
    caption_epochs = 0
    """How many epochs train on the file of captions first, for the sets of this package that have one."""

    def __init__(
        self,
        inputs: ModelInputs,
        train: str | list[Subset] | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        image_root: str = ".",
        image: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
        batch_size: int | None = 16,
        tokens_per_batch: int | None = None,
        pixels_per_batch: int | None = None,
        eval_batch_size: int | None = None,
        max_length: int = 2048,
        on_bad_record: Literal["error", "skip"] = "error",
        num_workers: int = 0,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        """Where the records are and how they are fed.

        Args:
            inputs: What the data must know of the model; on the command line it comes from there.
            train: File of conversations, or a mixture: a list of sets with epochs or weights.
            val: File of conversations, for validation.
            test: Likewise, for the last look.
            predict: Questions to answer: {"question_id", "image", "text"} a line, or conversations.
            image_root: The folder that image and video paths are relative to. Nothing outside it is
                opened.
            image: How images are brought to size.
            batch_size: Most records per batch and device in training; null: as many as the budgets
                allow.
            tokens_per_batch: Most positions of a training batch's packed row, all levels included.
            pixels_per_batch: Most pixels of a training batch's images and frames.
            eval_batch_size: Records per batch and device elsewhere; null: as batch_size, or 16.
            max_length: The longest sample in tokens, images at the finest scale included. A longer
                one is a bad record; nothing is ever cut.
            on_bad_record: `error` stops at the first bad record, before training where it can be
                known; `skip` leaves bad records out, counts them and reports why.
            num_workers: Processes that load batches; 0 loads in the main process.
            cache: Folder for the tables that make a second start fast; null: lit_mm in the user's
                cache folder.
            seed: Decides the order of the records, together with the epoch.
        """
        super().__init__()
        limits = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "pixels_per_batch": pixels_per_batch}
        for name, value in (limits | {"eval_batch_size": eval_batch_size}).items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: expected a positive number, found {value}")
        if not any(limits.values()):
            raise ValueError(f"data: set one of {', '.join(limits)}, or nothing ends a batch")
        self.inputs, self.budget = inputs, Budget(*limits.values())
        self.files: dict[str, str | list[Subset] | None] = {
            "train": train,
            "val": val,
            "test": test,
            "predict": predict,
        }
        self.image_root, self.image = image_root, image
        self.eval_batch_size = eval_batch_size or batch_size or 16
        self.max_length, self.on_bad_record = max_length, on_bad_record
        self.num_workers, self.seed = num_workers, seed
        self.cache = Path(cache).expanduser() if cache else cache_folder()
        self.sets: dict[str, Mixture] = {}
        self.loaders: dict[str, ResumableLoader] = {}
        self.skipped, self.seen = BadRecords("skip"), 0

    def setup(self, stage: str) -> None:
        """Read and check the files that a stage (fit, validate, test or predict) needs.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The stage needs a file that the config does not name, or a file is malformed.
            RecordError: A bad record, if on_bad_record is `error`.
        """
        if stage == "fit" and self.caption_epochs:
            self.sets["captions"] = self._read("captions", "train")
        needed: dict[str, list[Split]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}
        for split in needed.get(str(getattr(stage, "value", stage)), ["predict"]):
            if self.files[split]:
                self.sets[split] = self.sets.get(split) or self._read(split, split)
            elif stage != "fit" or split == "train":
                raise ValueError(f"data.{split}: no file of records is named")

    def _read(self, name: str, split: Split) -> Mixture:
        """The sets of a split; the first process of each machine makes their tables."""
        named = self.files[name]
        subsets = named if isinstance(named, list) else [Subset(str(named))]
        trainer = self.trainer
        if trainer is not None and trainer.local_rank > 0:
            trainer.strategy.barrier()
        sets = [self._read_one(subset, split) for subset in subsets]
        if trainer is not None and trainer.local_rank == 0:
            trainer.strategy.barrier()
        return Mixture(sets, shares_of(subsets, [len(each) for each in sets]))

    def _read_one(self, subset: Subset, split: Split) -> InstructionSet:
        root = Path(subset.root or self.image_root)
        if not root.is_dir():
            raise FileNotFoundError(f"data.image_root: no folder {root}")
        source = open_source(subset.path, self.cache, subset.format)
        conversation = Conversation(self.inputs.tokenizer, self.inputs.time_scales)
        media = MediaFolder(root, self.image, self.inputs.colour, self.video, self.frame)
        reader = Reader(source, subset.items, conversation, media, split, self.inputs, self.max_length, self.budget)
        index = index_of(
            reader,
            self.cache,
            self._settings(source, subset, media, split),
            self.on_bad_record,
            max(1, len(self.inputs.time_scales)),
            self.num_workers,
        )
        if report := index.bad.report(source.name, index.total):
            rank_zero_warn(report)
        if not len(index.table):
            raise ValueError(f"{source.name}: not one usable record\n{report or ''}")
        return InstructionSet(reader, index, self.on_bad_record == "skip")

    def _settings(self, source: Source, subset: Subset, media: MediaFolder, split: Split) -> dict[str, Any]:
        return self.inputs.settings() | {
            "source": source.fingerprint,
            "items": subset.items,
            "root": media.root,
            "media": (media.image, media.video, media.frame),
            "split": split,
            "limits": (self.max_length, self.budget),
        }

    def train_set(self, epoch: int) -> str:
        """Which of the sets an epoch trains on."""
        return "captions" if epoch < self.caption_epochs else "train"

    def train_dataloader(self) -> ResumableLoader:
        """Batches of shuffled conversations.

        Raises:
            ValueError: Epochs have different numbers of batches, and the trainer would not notice.
        """
        trainer, plans = cast(Any, self.trainer), self.train_plans(self._epoch())
        name = self.train_set(plans.epoch)
        whole = self.budget.fixed and all(share == int(share) for share in self.sets[name].shares)
        differ = self.caption_epochs or not whole
        if trainer and differ and trainer.max_epochs != 1 and trainer.reload_dataloaders_every_n_epochs != 1:
            raise ValueError("epochs differ in length: set trainer.reload_dataloaders_every_n_epochs to 1")
        return self._loader(name, plans, training=True)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def train_plans(self, epoch: int) -> BatchPlans:
        """This rank's training batches of an epoch."""
        return self._plans(self.train_set(epoch), self.budget, epoch, training=True)

    def val_dataloader(self) -> ResumableLoader | list:
        """Batches of conversations and of their questions."""
        return self._eval_loader("val") if "val" in self.sets else []

    def test_dataloader(self) -> ResumableLoader:
        """Batches of questions with answers."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Batches of questions."""
        return self._eval_loader("predict")

    def _eval_loader(self, name: str) -> ResumableLoader:
        return self._loader(name, self._plans(name, Budget(self.eval_batch_size), 0, training=False), training=False)

    def _plans(self, name: str, budget: Budget, epoch: int, training: bool) -> BatchPlans:
        mixture, trainer = self.sets[name], self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        choice: Choice = "next" if budget.fixed or not training else "largest"
        if training and self.inputs.packing == "loop":
            choice = "alike"  # rows are padded
        order = self._order(mixture) if training else lambda _: np.arange(len(mixture))
        return BatchPlans(order, self._sizes(mixture, training), budget, training, choice, rank, ranks, epoch)

    def _order(self, mixture: Mixture) -> Callable[[int], np.ndarray]:
        return lambda epoch: mixture.order(epoch, self.seed)

    def _sizes(self, mixture: Mixture, training: bool) -> Callable[[int], Sizes]:
        draw, costs = self.inputs.draw(training, self.seed), mixture.costs

        def sizes(epoch: int, step: int, records: np.ndarray) -> np.ndarray:
            tokens = costs.tokens(records, draw(epoch, step), self.inputs.scales)
            return np.stack([np.ones_like(tokens), tokens, costs.pixels[records]], axis=1)

        return lambda epoch: partial(sizes, epoch)

    def _loader(self, name: str, plans: BatchPlans, training: bool) -> ResumableLoader:
        inputs = self.inputs
        draw = inputs.draw(training, self.seed)
        place = "train" if training else name
        if place in self.loaders:
            self.loaders[place].close()
        self.loaders[place] = ResumableLoader(
            Batches(self.sets[name], draw, inputs.scales, inputs.time_scales, inputs.packing, training),
            sampler=plans,
            batch_size=None,  # the sampler hands out whole batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # it draws a number: the run's own must not depend on that
            worker_init_fn=leave_signals_to_the_trainer,
        )
        return self.loaders[place]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count what the loader had to leave out."""
        self.seen += batch.records
        for reason, message in batch.skipped:
            self.skipped.count(reason, message)
            rank_zero_warn(f"skipped: {message}")
        return batch

    def on_exception(self, exception: BaseException) -> None:
        """End the loaders' processes."""
        for loader in self.loaders.values():
            loader.close()

    def teardown(self, stage: str) -> None:
        """Report what was skipped while loading."""
        if report := self.skipped.report("while loading", self.seen):
            rank_zero_warn(report)
        self.skipped, self.seen = BadRecords("skip"), 0


class VideoInstructions(ImageInstructions):
    """Instruction sets of videos, images and text, one or a mixture.

    A video becomes frames, and a scale is a number of tokens per frame. With the model's time_scales
    neighbouring frames are pooled too.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        video: VideoOptions = VideoOptions(),  # noqa: B008 (frozen)
        frame: ImageOptions | None = None,
        **options: Any,
    ) -> None:
        """Which frames are shown, and all that ImageInstructions has.

        Args:
            inputs: What the data must know of the model; on the command line it comes from there.
            video: Which frames of a video are shown.
            frame: How frames are brought to size; null: as images.
            options: As ImageInstructions.
        """
        super().__init__(inputs, **options)
        self.video, self.frame = video, frame
