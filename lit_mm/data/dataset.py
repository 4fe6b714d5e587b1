"""A set of records: which file, how each record becomes a sample, what it costs; sets become a mixture."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_mm.data.chat import Conversation, Encoded
from lit_mm.data.collate import Sample
from lit_mm.data.index import Index, costs_of
from lit_mm.data.media import MediaFolder, Shown
from lit_mm.data.records import MARKERS, ItemFormat, Record, RecordError, image_first, parse
from lit_mm.data.sampler import Budget, RecordSizes, ScaleDraw, epoch_order
from lit_mm.data.sources import FileFormat, Source
from lit_mm.model.attention import Attention
from lit_mm.model.batch import IMAGE, Question
from lit_mm.model.llm import Positions
from lit_mm.model.packing import Packing
from lit_mm.model.scales import Pooling, Sampling, all_scales, nested_shapes

Split = Literal["train", "val", "test", "predict"]


class ModelInputs:
    """All that the data side knows of a model.

    Args:
        tokenizer: The LLM's, chat template set.
        stride: Pixels per grid cell along a side.
        scales: Visual tokens per image, finest first.
        color: The encoder's mean color in 0..255, for padding.
        sampling: How coarser tokens come from finer ones.
        pooling: Whether any grid will do.
        time_scales: Sets of frames per video, finest first, if any.
        packing: How batches are laid out for the model.
        attention: How a packed sequence attends.
        scales_per_step: How many scales take part in a training step.
        keep_finest: Whether the finest always does.
        positions: How long a sequence its LLM takes; None: any.
        max_new_tokens: Tokens of the longest answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stride: int,
        scales: list[int],
        color: tuple[int, int, int],
        sampling: Sampling = "mean",
        pooling: Pooling = "exact",
        time_scales: Sequence[int] = (),
        packing: Packing = "packed",
        scales_per_step: int | Literal["all"] = "all",
        keep_finest: bool = False,
        positions: Positions | None = None,
        max_new_tokens: int = 0,
        attention: Attention = "branch",
    ) -> None:
        self.tokenizer, self.stride, self.scales, self.color = tokenizer, stride, scales, color
        self.sampling, self.pooling, self.time_scales = sampling, pooling, list(time_scales)
        self.packing, self.attention = packing, attention
        self.scales_per_step, self.keep_finest = scales_per_step, keep_finest
        self.positions, self.max_new_tokens = positions, max_new_tokens

    def draw(self, training: bool, seed: int = 0) -> ScaleDraw:
        """Which scales take part in a step."""
        count = len(all_scales(self.scales, self.time_scales))
        return ScaleDraw(count, self.scales_per_step if training else "all", self.keep_finest, seed)

    def settings(self) -> dict[str, Any]:
        """What of it decides the length of a record in training, and whether it is too long."""
        others = ("tokenizer", "color", "packing", "attention", "max_new_tokens")
        told = {name: value for name, value in vars(self).items() if name not in others}
        return told | {"tokenizer": _identity(self.tokenizer)}


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
        max_length: Most tokens of a record at the finest scale.
        budget: Of a training batch.
        image_first: Whether the marker of a record's only image goes before its turn's text.
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
        image_first: bool = False,
    ) -> None:
        self.source, self.items, self.conversation, self.media = source, items, conversation, media
        self.split, self.inputs, self.max_length, self.budget = split, inputs, max_length, budget
        self.image_first = image_first

    def __len__(self) -> int:
        return len(self.source)

    def record(self, number: int) -> Record:
        """One record.

        Raises:
            RecordError: Anything in it that is not as it should be.
        """
        where, item = self.source[number]
        record = parse(where, item, self.items)
        return image_first(record) if self.image_first else record

    def sample(self, number: int, cost: Sequence[int]) -> Sample:
        """One record, encoded and decoded, that costs what the table says.

        Raises:
            RecordError: As `record`, and what is found out by reading images and videos.
        """
        record = self.record(number)
        visuals, frames = self.media.load(record)
        sizes = [(visual.pixels.shape[2], visual.pixels.shape[3]) for visual in visuals]
        shown = [Shown(*size, labels) for size, labels in zip(sizes, frames, strict=True)]
        sample, encoded = Sample(visuals, where=record.where), None
        if self.split in ("train", "val"):
            encoded = self.conversation.encode(record, frames)
            sample.input_ids, sample.labels, sample.time_scale = encoded.tensors(bool(self.inputs.time_scales))
        if self.split != "train":
            sample.questions = self._questions(record, frames)
        if (found := self._row(record, shown, encoded, sample.questions)) != list(cost):
            detail = f"expected {list(cost)} (positions, pixels, words, frames), found {found}: other images or videos"
            raise RecordError(record.where, "changed since the first start", detail)
        return sample

    def _questions(self, record: Record, frames: list[list[str]]) -> list[Question]:
        """Every question of a record, on its own; of several each has a number behind the record's id."""
        exchanges = list(record.exchanges)
        ids = [record.id] if len(exchanges) == 1 else [f"{record.id}#{number + 1}" for number in range(len(exchanges))]
        return [self._question(record, id, *own, frames) for id, own in zip(ids, exchanges, strict=True)]

    def _question(
        self, record: Record, id: str | int, text: str, answer: str | None, frames: list[list[str]]
    ) -> Question:
        """One exchange on its own: every question is asked with all media and without history."""
        markers = [MARKERS[medium.kind] for medium in record.media]
        asked = text if any(marker in text for marker in markers) else "".join(f"{m}\n" for m in markers) + text
        if sum(asked.count(marker) for marker in MARKERS.values()) != len(markers):
            reason = "images in several questions"
            raise RecordError(record.where, reason, "expected all images in the first, as each question is asked alone")
        encoded = self.conversation.prompt(asked, record.where, frames, record.system)
        ids, _, time_scale = encoded.tensors(bool(self.inputs.time_scales))
        plain = text
        for marker in MARKERS.values():
            plain = plain.replace(marker, "")
        return Question(id, plain.strip(), ids, list(range(sum(map(len, frames)))), answer, time_scale)

    def cost(self, number: int) -> list[int]:
        """Find out before training what can be known without decoding an image; the record's costs."""
        record = self.record(number)
        if self.split != "predict" and record.turns[-1].role == "user":
            detail = f"{self.split} needs conversations, found a question alone"
            raise RecordError(record.where, "no answer", detail)
        shown = self.media.shown(record)
        frames = [each.frames for each in shown]
        encoded, questions = None, []
        if self.split != "train":
            questions = self._questions(record, frames)
        if self.split in ("train", "val"):
            encoded = self.conversation.encode(record, frames)
        row = self._row(record, shown, encoded, questions)
        self._fits(record, row, encoded)
        return row

    def _row(
        self, record: Record, shown: list[Shown], encoded: Encoded | None, questions: Sequence[Question]
    ) -> list[int]:
        """Before, pixels, words and frames at each time scale, of the longest that the LLM gets of a record: the
        conversation, or a question with its answer."""
        pixels = sum(self._pixels(record, each) for each in shown)
        new = self.inputs.max_new_tokens
        rows = [self._use(pixels, encoded.ids, encoded.time_scale)] if encoded else []
        for question in questions:
            stays = None if question.time_scale is None else question.time_scale.tolist()
            rows.append(self._use(pixels, question.input_ids.tolist(), stays, new))
        return max(rows, key=self._length)

    def _use(self, pixels: int, ids: list[int], kept: list[int] | None, new_tokens: int = 0) -> list[int]:
        times = max(1, len(self.inputs.time_scales))
        before, words, frames = positions(np.array(ids), np.array(kept or [-1]), times)
        return [before, pixels, *(count + new_tokens for count in words), *frames]

    def _length(self, row: list[int]) -> int:
        """Positions at the finest scale."""
        return row[0] + row[2] + row[2 + max(1, len(self.inputs.time_scales))] * self.inputs.scales[0]

    def _pixels(self, record: Record, shown: Shown) -> int:
        """Of an image or a video, padded to the stride."""
        stride = self.inputs.stride
        grid = math.ceil(shown.height / stride), math.ceil(shown.width / stride)
        try:
            nested_shapes(*grid, tuple(self.inputs.scales), self.inputs.sampling, self.inputs.pooling)
        except ValueError as error:
            detail = f"an image of {shown.height}×{shown.width} pixels (height × width): {error}"
            raise RecordError(record.where, "scales", detail) from None
        return math.prod(grid) * stride**2 * len(shown.frames)

    def _fits(self, record: Record, row: list[int], encoded: Encoded | None) -> None:
        images = f"with the images at scale {self.inputs.scales[0]}"
        length = self._length(self._use(0, encoded.ids, encoded.time_scale)) if encoded else 0
        if length > self.max_length:
            raise RecordError(record.where, "too long", f"{length} tokens {images}, allowed are {self.max_length}")
        known, length = self.inputs.positions, self._length(row)
        if known and known.table and length > known.most:
            new = "" if self.split == "train" else f" and max_new_tokens {self.inputs.max_new_tokens}"
            detail = f"{length} positions {images}{new}, the LLM has {known.most}"
            raise RecordError(record.where, "too long for the LLM", detail)
        if self.split == "train":
            found = {"tokens": self._most_tokens(row), "pixels": row[1]}
            for name, limit in (("tokens", self.budget.tokens), ("pixels", self.budget.pixels)):
                if limit is not None and found[name] > limit:
                    detail = f"{found[name]} {name} in a training batch, data.{name}_per_batch allows {limit}"
                    raise RecordError(record.where, f"more {name} than a batch holds", detail)

    def _most_tokens(self, row: list[int]) -> int:
        """Positions of the record at the scales that need most of all that can be drawn together."""
        draw, scales = self.inputs.draw(training=True), self.inputs.scales
        costs, one = costs_of(np.array([[0, *row]])), np.zeros(1, np.int64)
        every = list(range(draw.scales))
        branches = every if costs.video(one)[0] else every[: len(scales)]  # the others are the same again
        branches.sort(key=lambda scale: -int(costs.tokens(one, [scale], scales)[0]))
        return int(costs.tokens(one, branches if draw.per_step == "all" else branches[: draw.per_step], scales)[0])


def positions(ids: np.ndarray, kept: np.ndarray, times: int) -> tuple[int, list[int], list[int]]:
    """Positions before the first image, and behind it the words and frames at each time scale."""
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
            record, *cost = self.index.table[number].tolist()
            return self.reader.sample(record, cost)
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
        self.costs = RecordSizes(*(arrays[0] if len(sets) == 1 else np.concatenate(arrays) for arrays in columns))

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
