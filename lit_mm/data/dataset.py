"""Sets of records: encodes records as samples, works out what each costs, and joins sets to a mixture."""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lit_mm.data.chat import Conversation
from lit_mm.data.collate import Sample, Visual
from lit_mm.data.index import VERSION, usable_records
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.media import MediaFolder
from lit_mm.data.records import MARKERS, BadRecords, ItemFormat, Record, RecordError, image_first, parse
from lit_mm.data.sampler import Budget, RecordSizes, epoch_order
from lit_mm.data.sources import FileFormat
from lit_mm.data.sources.base import Source
from lit_mm.model.batch import IMAGE, Question
from lit_mm.model.scales import nested_shapes

Split = Literal["train", "val", "test", "predict"]


@dataclass
class Subset:
    """One set of a mixture.

    Args:
        path: File, files or data set, in any format that `docs/data.md` describes.
        root: The folder that image and video paths are relative to; null: the DataModule's.
        epochs: Passes over the set per epoch: 2 uses it twice; 0.5 uses one half, and the other half in the
            next epoch.
        weight: Instead of epochs: the set's share of an epoch's records, relative to the other sets'
            weights. An epoch then has as many records as all sets together.
        format: The files' format; null: detected.
        items: The records' format; null: detected for each record.
    """

    path: str | list[str]
    root: str | None = None
    epochs: float = 1.0
    weight: float | None = None
    format: FileFormat | None = None
    items: ItemFormat | None = None


class InstructionSet(Dataset):
    """The usable records of one file, numbered without gaps.

    Args:
        source: The raw items.
        items: Their format; None: detected for each item.
        media: Opens images and videos.
        split: train gives labels, val labels and questions, test and predict questions only.
        inputs: The model's properties.
        max_length: Maximum tokens of a record at the finest scale.
        budget: Limits of a training batch.
        image_first: Whether to move a record's only image before its turn's text.
        policy: `error` or `skip` bad records; samples of records that fail to load carry the error.
    """

    def __init__(
        self,
        source: Source,
        items: ItemFormat | None,
        media: MediaFolder,
        split: Split,
        inputs: ModelInputs,
        max_length: int,
        budget: Budget,
        image_first: bool = False,
        policy: Literal["error", "skip"] = "error",
    ) -> None:
        self.source, self.items, self.media, self.split, self.inputs = source, items, media, split, inputs
        self.max_length, self.budget, self.image_first, self.policy = max_length, budget, image_first, policy
        self.conversation = Conversation(inputs.tokenizer, inputs.time_scales)
        self.times = max(1, len(inputs.time_scales))
        self.table, self.bad = np.zeros((0, 3 + 2 * self.times), np.int64), BadRecords(policy)
        self.digest = ""

    def look(self, cache: Path, workers: int) -> None:
        """Find the usable records and what each costs, or take both from the cache.

        Sets `table` [n, 3 + 2 T]: the record's number in the file, positions before its first image, pixels,
        words at T time scales, frames at T time scales; and `digest`, which other records or settings change.

        Raises:
            RecordError: A record is bad and the policy is `error`.
        """
        train_limits = self.budget.tokens, self.budget.pixels
        settings = self.inputs.settings() | {
            "source": self.source.fingerprint,
            "items": self.items,
            "root": self.media.root,
            "media": (self.media.image, self.media.video, self.media.frame),
            "split": self.split,
            "image_first": self.image_first,
            "limits": (self.max_length, *(train_limits if self.split == "train" else (self.inputs.max_new_tokens,))),
            "version": VERSION,
            "policy": self.policy,
            "times": self.times,
        }
        self.digest = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=16).hexdigest()
        file = cache / f"index-{self.digest}.npy"
        self.table, self.bad = usable_records(
            self.cost, len(self.source), self.table.shape[1], file, self.policy, workers
        )

    @property
    def costs(self) -> RecordSizes:
        """What the usable records cost."""
        return RecordSizes.of(self.table[:, 1:])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Sample:
        try:
            record, *cost = self.table[number].tolist()
            return self.sample(record, cost)
        except RecordError as error:
            if self.policy == "error":
                raise
            return Sample(skipped=[error])

    def sample(self, number: int, cost: Sequence[int]) -> Sample:
        """Record `number` of the file, encoded and with decoded media; its costs must match the table.

        Raises:
            RecordError: As `cost`, or an image or video cannot be decoded.
        """
        sample, rows, lengths = self._encoded(self._record(number), decode=True)
        if (found := rows[lengths.argmax()]) != list(cost):
            detail = f"expected {list(cost)} (positions, pixels, words, frames), found {found}"
            detail += ": its images or videos have changed"
            raise RecordError(sample.where, "changed since the first start", detail)
        return sample

    def cost(self, number: int) -> list[int]:
        """The table row of record `number` of the file, without the number; nothing is decoded.

        Raises:
            RecordError: The record is unusable, as far as this is known without decoding images.
        """
        record = self._record(number)
        answered = len(record.turns) % 2 == 0 or (self.split == "test" and record.references)
        if self.split != "predict" and not answered:
            needed = "conversations or references" if self.split == "test" else "conversations"
            detail = f"{self.split} needs {needed}, found a question without an answer"
            raise RecordError(record.where, "no answer", detail)
        _, rows, lengths = self._encoded(record, decode=False)
        longest = rows[lengths.argmax()]
        self._check_limits(record, longest, lengths)
        return longest

    def _record(self, number: int) -> Record:
        where, item = self.source[number]
        record = parse(where, item, self.items)
        return image_first(record) if self.image_first else record

    def question_ids(self, number: int) -> list[str | int]:
        """The ids of the questions of usable record `number`; no image is read."""
        return ids_of(self._record(int(self.table[number, 0])))

    def _encoded(self, record: Record, decode: bool) -> tuple[Sample, list[list[int]], np.ndarray]:
        """A record's sample, and for each of its sequences (the conversation, then every question with its answer)
        the table row and the positions at the finest scale."""
        visuals = self.media.visuals(record, decode)
        labels = [visual.labels for visual in visuals]
        sample, timed = Sample(visuals, where=record.where), bool(self.inputs.time_scales)
        pixels = sum(self._pixels(record, visual) for visual in visuals)
        rows = []
        if self.split in ("train", "val"):
            encoded = self.conversation.encode(record, labels)
            sample.input_ids, sample.labels, sample.time_scale = encoded.tensors(timed)
            rows.append(self._row(pixels, sample.input_ids, sample.time_scale))
        if self.split != "train":
            sample.questions = self._questions(record, labels)
            new = self.inputs.max_new_tokens
            rows += [self._row(pixels, asked.input_ids, asked.time_scale, new) for asked in sample.questions]
        return sample, rows, self._tokens(rows, [0])

    def _questions(self, record: Record, labels: list[Sequence[str]]) -> list[Question]:
        """Every exchange of a record as a separate question, with all media and without history."""
        markers = [MARKERS[medium.kind] for medium in record.media]
        questions = []
        for id, (text, references) in zip(ids_of(record), record.exchanges, strict=True):
            asked = text if any(marker in text for marker in markers) else "".join(f"{m}\n" for m in markers) + text
            if sum(asked.count(marker) for marker in MARKERS.values()) != len(markers):
                detail = "expected all images in the first one, as each question is asked separately"
                raise RecordError(record.where, "images in several questions", detail)
            encoded = self.conversation.prompt(asked, record.where, labels, record.system)
            ids, _, time_scale = encoded.tensors(bool(self.inputs.time_scales))
            plain = re.sub("|".join(MARKERS.values()), "", text).strip()
            index, kinds = list(range(sum(map(len, labels)))), (record.type, record.group)
            questions.append(Question(id, plain, ids, index, references, *kinds, time_scale))
        return questions

    def _row(self, pixels: int, ids: Tensor, time_scale: Tensor | None, new_tokens: int = 0) -> list[int]:
        kept = np.array([-1]) if time_scale is None else time_scale.numpy()
        before, words, frames = positions(ids.numpy(), kept, self.times)
        return [before, pixels, *(count + new_tokens for count in words), *frames]

    def _tokens(self, rows: list[list[int]], drawn: list[int]) -> np.ndarray:
        return RecordSizes.of(np.array(rows)).tokens(np.arange(len(rows)), drawn, self.inputs.scales)

    def _pixels(self, record: Record, visual: Visual) -> int:
        """Pixels of an image or a video, with sides padded to the stride."""
        frames, _, height, width = visual.pixels.shape
        stride = self.inputs.stride
        grid = math.ceil(height / stride), math.ceil(width / stride)
        try:
            nested_shapes(*grid, tuple(self.inputs.scales), self.inputs.sampling, self.inputs.pooling)
        except ValueError as error:
            detail = f"an image of {height}×{width} pixels (height × width): {error}"
            raise RecordError(record.where, "scales", detail) from None
        return math.prod(grid) * stride**2 * frames

    def _check_limits(self, record: Record, longest: list[int], lengths: np.ndarray) -> None:
        images = f"with the images at scale {self.inputs.scales[0]}"
        if self.split in ("train", "val") and lengths[0] > self.max_length:
            raise RecordError(record.where, "too long", f"{lengths[0]} tokens {images}, the limit is {self.max_length}")
        known, length = self.inputs.positions, lengths.max()
        if known and known.table and length > known.most:
            new = "" if self.split == "train" else f" and max_new_tokens {self.inputs.max_new_tokens}"
            detail = f"{length} positions {images}{new}, the LLM has {known.most}"
            raise RecordError(record.where, "too long for the LLM", detail)
        if self.split == "train":
            budget = self.budget
            tokens = self._most_tokens(longest) if budget.tokens else 0
            for name, found, limit in ("tokens", tokens, budget.tokens), ("pixels", longest[1], budget.pixels):
                if limit is not None and found > limit:
                    detail = f"{found} {name} in a training batch, data.{name}_per_batch allows {limit}"
                    raise RecordError(record.where, f"more {name} than a batch allows", detail)

    def _most_tokens(self, row: list[int]) -> int:
        """The record's positions at the largest combination of scales that one step can draw."""
        draw, scales = self.inputs.draw(training=True), self.inputs.scales
        branches = list(range(draw.scales))
        if not RecordSizes.of(np.array([row])).video(np.zeros(1, np.int64))[0]:
            branches = branches[: len(scales)]  # other time scales repeat these
        branches.sort(key=lambda scale: -self._tokens([row], [scale])[0])
        return int(self._tokens([row], branches if draw.per_step == "all" else branches[: draw.per_step])[0])


def ids_of(record: Record) -> list[str | int]:
    """The id of each of a record's questions: the record's own, with a number if there are several."""
    count = len(list(record.exchanges))
    return [record.id] if count == 1 else [f"{record.id}#{number}" for number in range(1, count + 1)]


def positions(ids: np.ndarray, kept: np.ndarray, times: int) -> tuple[int, list[int], list[int]]:
    """Positions before the first image, and the words and frames after it at each time scale."""
    image = ids == IMAGE
    first = int(image.argmax()) if image.any() else len(ids)
    stays = [kept[first:] >= time for time in range(times)] if kept.max() >= 0 else [np.ones(len(ids) - first, bool)]
    frames = [int(image[first:][each].sum()) for each in stays]
    return first, [int(each.sum()) - count for each, count in zip(stays, frames, strict=True)], frames


class Mixture(Dataset):
    """Several sets, with their records numbered consecutively.

    Args:
        sets: The sets.
        shares: Passes over each set per epoch.

    Attributes:
        most: The number of questions to ask of a record, where these are not all.
    """

    def __init__(self, sets: list[InstructionSet], shares: list[float]) -> None:
        self.sets, self.shares, self.most = sets, shares, dict[int, int]()
        self.firsts = [0, *accumulate(len(each) for each in sets)]
        self.costs = sets[0].costs if len(sets) == 1 else RecordSizes.of(np.concatenate([s.table[:, 1:] for s in sets]))

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, record: int) -> Sample:
        number = bisect_right(self.firsts, record) - 1
        sample = self.sets[number][record - self.firsts[number]]
        sample.questions = sample.questions[: self.most.get(record)]
        return sample

    def question_ids(self, record: int) -> list[str | int]:
        """The ids of a record's questions; no image is read."""
        number = bisect_right(self.firsts, record) - 1
        return self.sets[number].question_ids(record - self.firsts[number])

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """The records of an epoch in random order."""
        return epoch_order([len(each) for each in self.sets], self.shares, seed, epoch)


def shares_of(subsets: Sequence[Subset], counts: Sequence[int]) -> list[float]:
    """Passes over each set per epoch.

    Raises:
        ValueError: Only some sets have a weight, or a number is not positive.
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
