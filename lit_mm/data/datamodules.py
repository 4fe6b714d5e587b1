"""DataModules that turn instruction sets into batches for fit, validate, test and predict.

    file --sources--> item --records--> Record --conversation--> ids, labels --\\
    image and video files --media--> uint8 pixels ------------------------------> Sample --collate--> Batch

A cached table per file (`index`) says which records are usable and what each costs; records are parsed,
encoded and decoded when they are needed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_mm.data.collate import Batches, LoadedBatch
from lit_mm.data.dataset import InstructionSet, Mixture, Split, Subset, shares_of
from lit_mm.data.images import ImageOptions
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.loader import ResumableLoader, leave_signals_to_the_trainer
from lit_mm.data.media import MediaFolder
from lit_mm.data.records import BadRecords
from lit_mm.data.sampler import BatchPlans, Budget, Choice
from lit_mm.data.sources import open_source
from lit_mm.data.sources.base import Source
from lit_mm.data.video import VideoOptions
from lit_mm.evaluation.benchmarks import Benchmark, split_name


def cache_folder() -> Path:
    """The default folder for cached tables."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_mm"


def names_of(files: Sequence[str], group: str = "test", option: str = "data.test") -> dict[str, str]:
    """`test/NAME` for each of several sets of questions: a benchmark's name, or that of a file.

    Args:
        files: Files, and benchmarks with their files.
        group: The part before the slash.
        option: What errors call the files.

    Raises:
        ValueError: Two have one name, or there is none.
    """
    named: dict[str, str] = {}
    for file in files:
        benchmark, path = split_name(file)
        own = benchmark.name if benchmark else Path(path).stem
        if f"{group}/{own}" in named:
            raise ValueError(f"{option}: {named[f'{group}/{own}']} and {file} would both be called {own}")
        named[f"{group}/{own}"] = file
    if not named:
        raise ValueError(f"{option}: expected a file, a benchmark or several, found an empty list")
    return named


class ImageDataModule(LightningDataModule):
    """Instruction sets of images and text, one or a mixture, in any format that docs/data.md describes.

    Validation and test ask every question of a conversation separately, with the images but without earlier
    turns, and compare the generated answer with the one in the file.
    """

    video: VideoOptions | None = None
    frame: ImageOptions | None = None
    caption_epochs = 0
    """Number of first epochs that train on captions, for the demo sets that have them."""
    answered: Callable[[], Collection[str | int]]
    """Called on every rank before the questions of predict are loaded: the ids of those that need no answer."""

    def __init__(
        self,
        inputs: ModelInputs,
        train: str | list[Subset] | None = None,
        val: str | None = None,
        test: str | list[str] | None = None,
        predict: str | None = None,
        image_root: str = ".",
        image: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
        batch_size: int | None = 16,
        tokens_per_batch: int | None = None,
        pixels_per_batch: int | None = None,
        eval_batch_size: int | None = None,
        val_questions: int | None = None,
        max_length: int = 2048,
        image_first: bool = False,
        on_bad_record: Literal["error", "skip"] = "error",
        num_workers: int = 0,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        """Set the record files and how batches are made.

        Args:
            inputs: The model's properties that the data depends on; on the command line the model sets them.
            train: File of conversations, or a mixture: a list of sets with epochs or weights.
            val: File of conversations for validation.
            test: File of conversations for the final test, a benchmark with its file, such as docvqa:PATH (see
                docs/evaluation.md), or a list of them.
            predict: Questions to answer: lines of {"question_id", "image", "text"}, conversations, or a benchmark with
                its file, with or without accepted answers.
            image_root: The folder that image and video paths are relative to. Nothing outside it is
                opened.
            image: How images are resized.
            batch_size: Maximum records per batch and device in training; null: as many as the other limits
                allow.
            tokens_per_batch: Maximum positions of a training batch's packed sequence, including all scales.
            pixels_per_batch: Maximum pixels of a training batch's images and frames.
            eval_batch_size: Records per batch and device outside training; null: as batch_size, or 16.
            val_questions: Number of questions that validation asks, to save time; null: all. They are drawn once
                with the seed, the same in every epoch and on any number of devices; the validation loss is that of
                their records.
            max_length: Maximum tokens of a conversation in training and validation, with images at the finest
                scale. Longer ones are bad records; nothing is truncated. In every file, a record with more
                positions than the LLM has is bad too, where a question counts with model.max_new_tokens. LLMs
                with rotary positions can go beyond the length they were trained on, with a warning.
            image_first: In records with one image, move it to a line of its own before its turn's text, as
                LLaVA, ConvLLaVA and M3 do.
            on_bad_record: `error` stops at the first bad record, before training if possible; `skip` leaves
                bad records out, counts them and reports why.
            num_workers: Processes that load batches; 0 loads in the main process.
            cache: Folder for the tables that make a second start fast; null: lit_mm in the user's
                cache folder.
            seed: Seed of the records' order.
        """
        super().__init__()
        limits = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "pixels_per_batch": pixels_per_batch}
        for name, value in (limits | {"eval_batch_size": eval_batch_size, "val_questions": val_questions}).items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: expected a positive number, found {value}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers: expected 0 or more, found {num_workers}")
        if not any(limits.values()):
            raise ValueError(f"data: set one of {', '.join(limits)}, or nothing ends a batch")
        self.inputs, self.budget = inputs, Budget(*limits.values())
        tests = {"test": test} if test is None or isinstance(test, str) else names_of(test)
        self.tests = list(tests)
        self.files: dict[str, str | list[Subset] | None] = {"train": train, "val": val, "predict": predict, **tests}
        self.image_root, self.image = image_root, image
        self.eval_batch_size = eval_batch_size or batch_size or 16
        self.val_questions = val_questions
        self.max_length, self.on_bad_record, self.image_first = max_length, on_bad_record, image_first
        self.num_workers, self.seed = num_workers, seed
        self.cache = Path(cache).expanduser() if cache else cache_folder()
        self.sets: dict[str, Mixture] = {}
        self.chosen: dict[str, np.ndarray] = {}
        self.answered: Callable[[], Collection[str | int]] = tuple
        self.loaders: dict[str, ResumableLoader] = {}
        self.skipped, self.seen = BadRecords("skip"), 0

    def setup(self, stage: str) -> None:
        """Read and check the files that a stage (fit, validate, test or predict) needs.

        Raises:
            FileNotFoundError: A file does not exist.
            ValueError: The config does not name a file that the stage needs, or a file is malformed.
            RecordError: A record is bad and on_bad_record is `error`.
        """
        if stage == "fit" and self.caption_epochs:
            self.sets["captions"] = self._read("captions", "train")
        stage = str(getattr(stage, "value", stage))
        needed = {"fit": ["train", "val"], "validate": ["val"], "test": self.tests}
        for name in needed.get(stage, ["predict"]):
            split = cast(Split, "test" if name in self.tests else name)
            if self.files[name]:
                self.sets[name] = self.sets.get(name) or self._read(name, split)
            elif stage != "fit" or name == "train":
                raise ValueError(f"data.{name}: no file of records is set")
        if self.val_questions and "val" in self.sets and "val" not in self.chosen:
            self.chosen["val"] = self._drawn("val", self.val_questions, self.seed, "data.val_questions")

    def add_questions(self, name: str, file: str, most: int | None = None, seed: int = 0) -> None:
        """Read one more set of questions with answers, for `question_loader`; its errors are those of `setup`.

        Args:
            name: Its name, such as bench/docvqa; `benchmark` knows it then, too.
            file: A file, or a benchmark with its file, as for `test`.
            most: Number of questions to ask, drawn as for val_questions; None: all.
            seed: Of the draw.
        """
        self.files[name] = file
        self.sets[name] = self._read(name, "test")
        if most:
            self.chosen[name] = self._drawn(name, most, seed, name)

    def _drawn(self, name: str, most: int, seed: int, told: str) -> np.ndarray:
        """Records in a fixed random order until they have `most` questions; the last one may ask only some."""
        mixture, drawn, left = self.sets[name], list[int](), most
        for record in np.random.default_rng([seed, most]).permutation(len(mixture)).tolist():
            if not left:
                break
            drawn.append(record)
            mixture.most[record] = left
            left -= min(left, len(mixture.question_ids(record)))
        asked = (
            f"all {most - left} questions are asked" if left else f"{most} questions of {len(drawn)} records are asked"
        )
        rank_zero_info(f"{told} {most}: {asked}")
        return np.sort(np.array(drawn, np.int64))

    def _read(self, name: str, split: Split) -> Mixture:
        """The sets of a split; the first process of each machine builds their tables."""
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
        benchmark, path = split_name(subset.path) if isinstance(subset.path, str) else (None, "")
        own_root = benchmark.image_root(path) if benchmark else self.image_root
        root = Path(subset.root or own_root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"data.image_root: no folder {root}")
        source, inputs = self._source(subset, benchmark, path), self.inputs
        if benchmark and benchmark.max_new_tokens:
            inputs = copy(inputs)
            inputs.max_new_tokens = benchmark.max_new_tokens
        media = MediaFolder(root, self.image, self.inputs.color, self.video, self.frame, source.fingerprint)
        limits = self.max_length, self.budget, self.image_first, self.on_bad_record
        made = InstructionSet(source, subset.items, media, split, inputs, *limits)
        made.look(self.cache, self.num_workers)
        if report := made.bad.report(source.name, len(source)):
            rank_zero_warn(report)
        if not len(made):
            raise ValueError(f"{source.name}: no usable record\n{report or ''}")
        self._warn_of_length(source.name, made)
        return made

    def _source(self, subset: Subset, benchmark: Benchmark | None, path: str) -> Source:
        """The raw items of a set: of a benchmark with its path, or of files."""
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"data.cache: expected a writable folder, found {error}") from None
        if benchmark is None:
            return open_source(subset.path, self.cache, subset.format)
        source = benchmark.source(path, self.cache)
        if source.layout.compute == "padded_box" and self.image.mode != "pad":
            found = f"found data.image.mode {self.image.mode}, expected pad"
            raise ValueError(f"{source.name}: its boxes are in parts of the padded image, {found}")
        return source

    def _warn_of_length(self, name: str, records: InstructionSet) -> None:
        """Warn of records longer than the LLM was trained on."""
        lengths = records.costs.tokens(np.arange(len(records)), [0], self.inputs.scales)
        known = self.inputs.positions
        if known and (longer := int((lengths > known.most).sum())):
            rank_zero_warn(
                f"{name}: {longer} of {len(lengths)} records are longer than the {known.most} positions that the LLM "
                f"was trained on: up to {lengths.max()}, with the images at scale {self.inputs.scales[0]} and, where "
                "answers are generated, max_new_tokens"
            )

    def train_set(self, epoch: int) -> str:
        """The set that an epoch trains on."""
        return "captions" if epoch < self.caption_epochs else "train"

    def train_dataloader(self) -> ResumableLoader:
        """Batches of shuffled conversations.

        Raises:
            ValueError: An epoch has no batch, or epochs differ in length and the trainer would not notice.
        """
        trainer, plans = cast(Any, self.trainer), self.train_plans(self.trainer.current_epoch if self.trainer else 0)
        name = self.train_set(plans.epoch)
        if not len(plans):
            mix = self.sets[name]
            raise ValueError(
                f"data.train: epoch {plans.epoch} has no batch: {len(mix)} records, used {mix.shares} times "
                f"per epoch, on {plans.ranks} ranks"
            )
        whole = self.budget.fixed and all(share == int(share) for share in self.sets[name].shares)
        differ = name != "train" or not whole
        if trainer and differ and trainer.max_epochs != 1 and trainer.reload_dataloaders_every_n_epochs != 1:
            raise ValueError("epochs differ in length: set trainer.reload_dataloaders_every_n_epochs to 1")
        return self._loader(name, plans, training=True)

    def order(self) -> dict[str, Any]:
        """Everything that decides which records go into which batch."""
        inputs, trainer = self.inputs, self.trainer
        sets = {name: ([len(each) for each in mix.sets], mix.shares) for name, mix in self.sets.items()}
        return {
            "batch_size": self.budget.records,
            "tokens_per_batch": self.budget.tokens,
            "pixels_per_batch": self.budget.pixels,
            "data.seed": self.seed,
            "records and shares": {name: sets[name] for name in ("captions", "train") if name in sets},
            "caption_epochs": self.caption_epochs,
            "scales": [inputs.scales, inputs.time_scales, inputs.scales_per_step, inputs.keep_finest],
            "ranks": trainer.world_size if trainer else 1,
            "the same batches in every epoch": bool(trainer and cast(Any, trainer).overfit_batches),
        }

    def train_plans(self, epoch: int) -> BatchPlans:
        """This rank's training batches of an epoch."""
        return self._plans(self.train_set(epoch), self.budget, epoch, training=True)

    def val_dataloader(self) -> ResumableLoader | list:
        """Batches of conversations and of their questions."""
        return self.question_loader("val") if "val" in self.sets else []

    def test_dataloader(self) -> list[ResumableLoader]:
        """Batches of questions with answers, a loader for each set of `tests`."""
        return [self.question_loader(name) for name in self.tests]

    def benchmark(self, name: str) -> Benchmark | None:
        """The benchmark that a set is; None for a plain file."""
        file = self.files.get(name)
        return split_name(file)[0] if isinstance(file, str) else None

    def predict_dataloader(self) -> ResumableLoader:
        """Batches of questions, without records whose questions are all answered."""
        self.chosen.pop("predict", None)
        if answered := {*self.answered()}:
            left = [n for n, ids in enumerate(self._question_ids("predict")) if not {*ids} <= answered]
            self.chosen["predict"] = np.array(left, np.int64)
        return self.question_loader("predict")

    def repeated_id(self, split: Split) -> str | int | None:
        """An id that several questions have, if there is one."""
        counts = Counter(id for own in self._question_ids(split) for id in own)
        return next((id for id, count in counts.items() if count > 1), None)

    def _question_ids(self, split: Split) -> list[list[str | int]]:
        return [self.sets[split].question_ids(record) for record in range(len(self.sets[split]))]

    def question_loader(self, name: str) -> ResumableLoader:
        """This rank's batches of the questions of a set that was read, as many as every other rank's."""
        return self._loader(name, self._plans(name, Budget(self.eval_batch_size), 0, training=False), training=False)

    def _plans(self, name: str, budget: Budget, epoch: int, training: bool) -> BatchPlans:
        mixture, trainer = self.sets[name], self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        choice: Choice = "next" if budget.fixed or not training else "largest"
        if training and self.inputs.packing == "padded":
            choice = "alike"  # in length, as rows are padded
        draw, costs = self.inputs.draw(training, self.seed), mixture.costs
        same = trainer is not None and bool(cast(Any, trainer).overfit_batches)  # one order for all epochs

        def order(epoch: int) -> np.ndarray:
            if training:
                return mixture.order(0 if same else epoch, self.seed)
            return self.chosen.get(name, np.arange(len(mixture)))

        def sizes(epoch: int, step: int, records: np.ndarray) -> np.ndarray:
            drawn = np.flatnonzero(draw(0 if same else epoch, step))
            tokens = costs.tokens(records, drawn, self.inputs.scales)
            return np.stack([np.ones_like(tokens), tokens, costs.pixels[records]], axis=1)

        return BatchPlans(order, sizes, budget, training, choice, rank, ranks, epoch)

    def _loader(self, name: str, plans: BatchPlans, training: bool) -> ResumableLoader:
        place = "train" if training else name
        if place in self.loaders:
            self.loaders[place].close()
        self.loaders[place] = ResumableLoader(
            Batches(self.sets[name], self.inputs, training, self.seed),
            sampler=plans,
            batch_size=None,  # the sampler yields whole batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # a loader draws a random number, which must not change the run's own
            worker_init_fn=leave_signals_to_the_trainer,
        )
        return self.loaders[place]

    def on_after_batch_transfer(self, batch: LoadedBatch, dataloader_idx: int) -> LoadedBatch:
        """Count the records that the loader had to leave out."""
        self.seen += batch.records
        for reason, message in batch.skipped:
            self.skipped.count(reason, message)
            rank_zero_warn(f"skipped: {message}")
        return batch

    def on_exception(self, exception: BaseException) -> None:
        """End the loaders' worker processes."""
        for loader in self.loaders.values():
            loader.close()

    def teardown(self, stage: str) -> None:
        """Report what was skipped while loading."""
        if report := self.skipped.report("while loading", self.seen):
            rank_zero_warn(report)
        self.skipped, self.seen = BadRecords("skip"), 0


class VideoDataModule(ImageDataModule):
    """Instruction sets of videos, images and text, one or a mixture.

    A video becomes frames, and a scale is a number of tokens per frame. With the model's time_scales,
    neighboring frames are pooled too.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        video: VideoOptions = VideoOptions(),  # noqa: B008 (frozen)
        frame: ImageOptions | None = None,
        **options: Any,
    ) -> None:
        """Set which frames are shown, and all options of ImageDataModule.

        Args:
            inputs: The model's properties that the data depends on; on the command line the model sets them.
            video: Which frames of a video are shown.
            frame: How frames are resized; null: as images.
            options: As ImageDataModule.
        """
        super().__init__(inputs, **options)
        self.video, self.frame = video, frame
