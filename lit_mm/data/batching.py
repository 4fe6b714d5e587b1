"""Records -> batches: which stand together, and how they become one Batch.

epoch_order    (seed, epoch) -> the records of all sets in a random order
fill           order + costs + budget -> batches, step by step for all ranks
BatchPlans     one rank's share, from any step on: nothing else is needed to resume
Batches        plan -> samples -> Batch, packed
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from multiprocessing.util import get_temp_dir
from typing import Any, Literal, cast
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from lit_mm.costs.counts import counts_of
from lit_mm.data.records import RecordError
from lit_mm.model.attention import Attention
from lit_mm.model.batch import Batch, FrameSets, Images, Question
from lit_mm.model.packing import Packing, pack
from lit_mm.model.scales import set_starts

GRACE = 3
"""Seconds that a loader's process outlives SIGTERM."""
NO_LIMIT = np.iinfo(np.int64).max


@dataclass
class Visual:
    """A still image or the frames of a video.

    Args:
        key: Equal for what is the same.
        pixels: uint8 [frames, 3, H, W]; one frame for an image.
        video: Which of both.
    """

    key: Hashable
    pixels: Tensor
    video: bool = False


@dataclass
class Sample:
    """One record, encoded.

    Args:
        visuals: What it shows.
        input_ids: [T], IMAGE once for each frame; None where there is nothing to train on.
        labels: [T], IGNORE_INDEX where nothing is supervised.
        time_scale: [T] index of the coarsest time scale at which a position still stands.
        questions: What is to be asked about it; their image_index counts this sample's frames.
        skipped: Why there is nothing in it, if its record could not be read.
        where: Its file and record.
    """

    visuals: list[Visual] = field(default_factory=list)
    input_ids: Tensor | None = None
    labels: Tensor | None = None
    time_scale: Tensor | None = None
    questions: list[Question] = field(default_factory=list)
    skipped: list[RecordError] = field(default_factory=list)
    where: str = ""


@dataclass
class LoadedBatch(Batch):
    """A batch and where it came from.

    Args:
        records: How many records were asked for.
        skipped: What was left out of this batch: (reason, message) of every bad record.
        where: File and record of every sample.
    """

    records: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)


@dataclass
class BatchPlan:
    """What one batch is made of.

    Args:
        records: Their numbers in the set.
        epoch: Of the run.
        step: The batch's number in its epoch, the same on every rank.
    """

    records: list[int]
    epoch: int
    step: int


@dataclass
class ScaleDraw:
    """Which scales take part in a training step.

    Args:
        scales: How many scales the model has, time scales included.
        per_step: How many take part; `all`: every one in every step, as in M3.
        keep_finest: Whether the finest always takes part; otherwise it is drawn like the others.
        seed: Decides the draw, together with the epoch and the step.
    """

    scales: int
    per_step: int | Literal["all"] = "all"
    keep_finest: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_step != "all" and not 1 <= self.per_step <= self.scales:
            raise ValueError(f"scales_per_step: expected all or 1 to {self.scales}, found {self.per_step}")
        if self.keep_finest and self.per_step == 1 < self.scales:
            raise ValueError("scales_per_step 1 with keep_finest would train the finest scale alone")

    def __call__(self, epoch: int, step: int) -> list[float]:
        """Weight of every scale's loss in the step, 0 for those left out; in the mean over steps M3's 1 / scales."""
        if self.per_step in ("all", self.scales):
            return [1 / self.scales] * self.scales
        kept = 1 if self.keep_finest else 0
        others = int(self.per_step) - kept
        drawn = random.Random(f"{self.seed} {epoch} {step} scales").sample(range(kept, self.scales), others)
        chance = others / (self.scales - kept)
        weights = dict.fromkeys(drawn, 1 / (self.scales * chance)) | ({0: 1 / self.scales} if self.keep_finest else {})
        return [weights.get(number, 0.0) for number in range(self.scales)]


@dataclass
class RecordSizes:
    """What n records cost, with T time scales (one without video).

    Args:
        before: [n] positions before the first image; all of them in a text alone.
        words: [n, T] the other positions but those of images, at each time scale.
        frames: [n, T] images and sets of frames at each time scale.
        pixels: [n] of all images and frames, padded to the stride.
    """

    before: np.ndarray
    words: np.ndarray
    frames: np.ndarray
    pixels: np.ndarray

    def video(self, records: np.ndarray) -> np.ndarray:
        """[m] whether time scales make a difference to the records."""
        words, frames = self.words[records], self.frames[records]
        return (frames[:, :1] != frames).any(1) | (words[:, :1] != words).any(1)

    def tokens(self, records: np.ndarray, drawn: Iterable[int], scales: Sequence[int]) -> np.ndarray:
        """[m] positions of a packed sequence that m of the records fill at the drawn scales, given by index."""
        words, frames, video, seen = self.words[records], self.frames[records], self.video(records), set()
        total = self.before[records].astype(np.int64)
        for number in drawn:
            time, scale = divmod(number, len(scales))
            branch = words[:, time] + frames[:, time] * scales[scale]
            total += np.where(video, branch, 0) if scale in seen else branch
            seen.add(scale)
        return total


@dataclass(frozen=True)
class Budget:
    """When a batch is full.

    Args:
        records: Most records; None: any number.
        tokens: Most positions of the packed row; None: any number.
        pixels: Most pixels of all images; None: any number.
    """

    records: int | None = None
    tokens: int | None = None
    pixels: int | None = None

    @property
    def fixed(self) -> bool:
        """Whether every batch has as many records as every other."""
        return self.tokens is None and self.pixels is None

    def room(self) -> np.ndarray:
        """[3] how many records, tokens and pixels an empty batch takes."""
        return np.array([NO_LIMIT if limit is None else limit for limit in (self.records, self.tokens, self.pixels)])


def epoch_order(counts: Sequence[int], shares: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The records of one epoch, numbered over all sets, in random order.

    A set's records come in one random order after another, so that none comes again before all others
    of its set have come, in whatever epochs that is.

    Args:
        counts: Records of each set.
        shares: How often each set is gone through in an epoch: 2 twice, 0.5 one half in each.
        seed: Decides the order, together with the epoch.
        epoch: Of the run.
    """
    picked, first = [], 0
    for number, (count, share) in enumerate(zip(counts, shares, strict=True)):
        begin, end = (int((epoch + more) * share * count + 1e-6) for more in (0, 1))
        rounds = range(begin // count, -(-end // count))
        orders = [np.random.default_rng([seed, number, again]).permutation(count) for again in rounds]
        if orders:
            skipped = rounds[0] * count
            picked.append(first + np.concatenate(orders)[begin - skipped : end - skipped])
        first += count
    order = np.concatenate([*picked, np.zeros(0, np.int64)])
    return np.random.default_rng([seed, len(counts), epoch]).permutation(order)


Sizes = Callable[[int, np.ndarray], np.ndarray]
"""(step, [m] records) -> [m, 3] what each is of the budget: 1 record, its tokens, its pixels."""


Choice = Literal["next", "largest", "alike"]
"""Which waiting record a batch takes next."""


def fill(order: np.ndarray, sizes: Sizes, budget: Budget, ranks: int, choice: Choice, window: int) -> Iterator[list]:
    """Cut an order into steps, each a list of as many batches [m] as there are ranks.

    A batch begins with the record that waits longest. Of those within the window it then takes the
    largest that still fits, again and again, which leaves least of the budget unused; or the one
    nearest in length to the first, for padded batches; or it keeps the order. In the last step some
    ranks may get nothing.

    Args:
        order: [n] records.
        sizes: What each costs.
        budget: When a batch is full.
        ranks: Batches per step.
        choice: Which record a batch takes next.
        window: How many records are looked at ahead.
    """
    waiting, ahead, step = order[:window], window, 0
    while len(waiting):
        batches = []
        for _ in range(ranks):
            taken = _taken(sizes(step, waiting), budget.room(), choice) if len(waiting) else []
            batches.append(waiting[taken])
            waiting = np.concatenate([np.delete(waiting, taken), order[ahead : ahead + len(taken)]])
            ahead += len(taken)
        yield batches
        step += 1


def _taken(sizes: np.ndarray, room: np.ndarray, choice: Choice) -> list[int]:
    """Which of the waiting records [m, 3] go into a batch with room [3], the first one in any case."""
    if choice == "next":
        over: Any = (sizes.cumsum(0) > room).any(1)
        return list(range(max(1, int(over.argmax()) if over.any() else len(over))))
    wanted = -abs(sizes[:, 1] - sizes[0, 1]).astype(float) if choice == "alike" else (sizes / room).max(1)
    # column by column: this loop decides how soon an epoch of a million records can begin
    limited = [(column, limit) for column, limit in zip(sizes.T, room.tolist(), strict=True) if limit < NO_LIMIT]
    left, taken = [limit for _, limit in limited], [0]
    wanted[0] = -np.inf
    while True:
        for number, (column, _) in enumerate(limited):
            left[number] -= int(column[taken[-1]])
            wanted[column > left[number]] = -np.inf
        best = int(wanted.argmax())
        if wanted[best] == -np.inf:
            return taken
        taken.append(best)
        wanted[best] = -np.inf


def shared_out(batches: list[np.ndarray], ranks: int) -> list[np.ndarray]:
    """A step's batches [m], dealt out anew if some rank has none and there are records enough."""
    records = np.concatenate(batches)
    if all(len(batch) for batch in batches) or len(records) < ranks:
        return batches
    return [records[rank::ranks] for rank in range(ranks)]


class BatchPlans(Sampler[BatchPlan]):
    """One rank's batches of an epoch, from a step on.

    (seed, epoch, rank, step) alone decide a batch. Every rank gets as many as the others. In training
    the fewer than `ranks` records that may be left at the end are left out of the epoch, which is why
    another epoch has another order; elsewhere they make batches that some ranks have empty.

    Args:
        order: epoch -> its records.
        sizes: epoch -> what each costs at a step.
        budget: When a batch is full.
        training: Whether a rank must never get nothing.
        choice: As in `fill`.
        rank: This process.
        ranks: Number of processes.
        epoch: The one to begin with.
        window: As in `fill`; at least as many records as a batch can hold.
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        sizes: Callable[[int], Sizes],
        budget: Budget,
        training: bool,
        choice: Choice = "next",
        rank: int = 0,
        ranks: int = 1,
        epoch: int = 0,
        window: int = 512,
    ) -> None:
        self.order, self.sizes, self.budget = order, sizes, budget
        self.training, self.choice, self.window = training, choice, max(window, budget.records or 0)
        self.rank, self.ranks = rank, ranks
        self.epoch, self.start = epoch, 0
        self._made: tuple[int, list[np.ndarray]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch; the one that a run resumes in goes on where it was."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Batches of the whole epoch, wherever it begins."""
        return len(self.batches())

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, start = self.epoch, self.start
        for step, records in enumerate(self.batches()[start:], start):
            yield BatchPlan(records.tolist(), epoch, step)

    def batches(self) -> list[np.ndarray]:
        """The epoch's batches of this rank."""
        if self._made is None or self._made[0] != self.epoch:
            self._made = self.epoch, list(self._fill())
        return self._made[1]

    def _fill(self) -> Iterator[np.ndarray]:
        order, sizes = self.order(self.epoch), self.sizes(self.epoch)
        for batches in fill(order, sizes, self.budget, self.ranks, self.choice, self.window):
            step = shared_out(batches, self.ranks)
            if not self.training or all(len(batch) for batch in step):
                yield step[self.rank]


OPEN: WeakSet[ResumableLoader] = WeakSet()
"""Loaders that may have processes."""


@atexit.register
def close_loaders() -> None:
    """Python's own end of a program would send SIGTERM and wait, which `leave_signals_to_the_trainer` delays."""
    for loader in OPEN:
        loader.close()


class ResumableLoader(DataLoader):
    """A loader whose place is (epoch, batches trained): Lightning restores it before the first batch.

    Attributes:
        waited: Seconds that this process has spent waiting for batches, or making them itself.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waited, self.owner = 0.0, os.getpid()
        OPEN.add(self)

    def __iter__(self) -> Any:
        if self.num_workers:
            get_temp_dir()  # processes that inherit it make none of their own, which a kill would leave behind
        return self._timed(super().__iter__())  # which starts the processes now, not with the first batch

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """End the processes, which otherwise live as long as anything remembers the loader. A process that was
        forked has inherited the loader, not its processes."""
        if getattr(self, "owner", None) != os.getpid():
            return
        iterator: Any = getattr(self, "_iterator", None)
        if hasattr(iterator, "_shutdown_workers"):
            if iterator._worker_pids_set:  # or torch takes their end for an accident
                _remove_worker_pids(id(iterator))
                iterator._worker_pids_set = False
            for process in iterator._workers:
                process.kill()  # they only read, and asking costs seconds each
            iterator._shutdown_workers()
        self._iterator = None

    def __del__(self) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch began; `LitMatryoshka.on_save_checkpoint` writes the place that training reached,
        as workers have fetched more than that."""
        plans = self._plans()
        return {"epoch": plans.epoch, "batches": plans.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a place."""
        plans = self._plans()
        plans.epoch, plans.start = state["epoch"], state["batches"]

    def _plans(self) -> BatchPlans:
        assert isinstance(self.sampler, BatchPlans)
        return self.sampler


def leave_signals_to_the_trainer(worker: int) -> None:
    """In a loader's process: a signal to the whole group must not end it under a running step.

    The trainer ends it when it stops; if that never comes, it goes by itself, as SIGTERM asked.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class Batches(Dataset):
    """A set of samples, by batches instead of one by one, packed.

    Args:
        samples: Set of `Sample`s.
        draw: Which scales are laid out.
        scales: Visual tokens per image, finest first.
        time_scales: Sets of frames per video, finest first, if any.
        packing: How.
        attention: How a packed sequence attends.
        training: Whether a batch needs something to train on: where none of its records can be read,
            the next readable one of the set takes their place.
    """

    def __init__(
        self,
        samples: Dataset[Sample],
        draw: ScaleDraw,
        scales: Sequence[int],
        time_scales: Sequence[int],
        packing: Packing,
        attention: Attention,
        training: bool,
    ) -> None:
        self.samples, self.draw, self.training = samples, draw, training
        self.packing, self.attention = packing, attention
        self.scales, self.time_scales = list(scales), list(time_scales)

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch:
        samples = [self.samples[record] for record in plan.records]
        if self.training and all(sample.input_ids is None for sample in samples):
            samples += self._stand_in(plan.records[-1])
        batch = collate(samples, self.time_scales)
        batch.scale_weights = self.draw(plan.epoch, plan.step)
        batch.packed = pack(batch, self.scales, self.packing, self.attention)
        batch.counts = counts_of(batch, self.scales)
        return batch

    def _stand_in(self, record: int) -> list[Sample]:
        """What follows a record, up to the first that can be read."""
        found: list[Sample] = []
        count = len(cast(Sized, self.samples))
        for further in range(1, count):
            found.append(self.samples[(record + further) % count])
            if found[-1].input_ids is not None:
                return found
        raise RecordError("data.train", "not one readable record", f"tried all {count}")


def collate(samples: Sequence[Sample], time_scales: Sequence[int] = ()) -> LoadedBatch:
    """Samples -> a batch that is not packed yet; what is shown twice is encoded once. Records that could not
    be read are named in `skipped`."""
    visuals: dict[Hashable, Visual] = {}
    for sample in samples:
        visuals |= {visual.key: visual for visual in sample.visuals}
    firsts = np.cumsum([0] + [len(visual.pixels) for visual in visuals.values()])
    places = dict(zip(visuals, firsts.tolist(), strict=False))
    index: list[int] = []
    questions: list[Question] = []
    for sample in samples:
        own = [places[v.key] + frame for v in sample.visuals for frame in range(len(v.pixels))]
        index += own if sample.input_ids is not None else []
        questions += [replace(q, image_index=[own[i] for i in q.image_index]) for q in sample.questions]
    images = group_by_size([visual.pixels for visual in visuals.values()], time_scales)
    images.frames = sum(len(visual.pixels) for visual in visuals.values() if visual.video)
    return LoadedBatch(
        images=images,
        input_ids=[sample.input_ids for sample in samples if sample.input_ids is not None],
        labels=[sample.labels for sample in samples if sample.labels is not None],
        image_index=torch.tensor(index, dtype=torch.long),
        questions=questions,
        records=len(samples),
        skipped=[(error.reason, str(error)) for sample in samples for error in sample.skipped],
        time_scale=[sample.time_scale for sample in samples if sample.time_scale is not None],
        where=[sample.where for sample in samples if not sample.skipped],
    )


def group_by_size(visuals: Sequence[Tensor], time_scales: Sequence[int] = ()) -> Images:
    """Frames uint8 [n, 3, H, W] of images and videos -> one tensor a size, where each frame went, and
    the sets of frames at every time scale."""
    groups: dict[torch.Size, list[int]] = {}
    for number, pixels in enumerate(visuals):
        groups.setdefault(pixels.shape[1:], []).append(number)
    firsts = np.cumsum([0] + [len(pixels) for pixels in visuals])
    went = [np.arange(firsts[n], firsts[n + 1]) for members in groups.values() for n in members]
    places = torch.from_numpy(np.concatenate([*went, np.zeros(0, np.int64)]))
    tensors = [torch.cat([visuals[n] for n in members]) for members in groups.values()]
    return Images(tensors, places.argsort(), [frames_in_sets([len(v) for v in visuals], most) for most in time_scales])


def frames_in_sets(frames: Sequence[int], most: int) -> FrameSets:
    """The sets of frames of images and videos of so many frames at one time scale."""
    sizes = [np.diff([*set_starts(count, most), count]) for count in frames]
    flat = torch.from_numpy(np.concatenate([*sizes, np.zeros(0, np.int64)]))
    return FrameSets(torch.arange(len(flat)).repeat_interleave(flat), flat)
