"""Decides which records go into which batch, as a function of (seed, epoch, rank, step) only.

epoch_order    (seed, epoch) -> the records of all sets in random order
fill           order, sizes and budget -> batches of all ranks, step by step
BatchPlans     one rank's batches from any step on; resuming needs nothing else
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from torch.utils.data import SequentialSampler

NO_LIMIT = np.iinfo(np.int64).max


@dataclass
class BatchPlan:
    """The records of one batch.

    Args:
        records: Their numbers in the set.
        epoch: The run's epoch.
        step: The batch's number in the epoch, the same on every rank.
    """

    records: list[int]
    epoch: int
    step: int


@dataclass
class ScaleDraw:
    """Draws the scales of each training step.

    Args:
        scales: Number of the model's scales, including time scales.
        per_step: Number of scales per step; `all`: every scale in every step, as in M3.
        keep_finest: Whether every step includes the finest scale; otherwise it is drawn like the others.
        seed: Seed of the draw, together with epoch and step.
    """

    scales: int
    per_step: int | Literal["all"] = "all"
    keep_finest: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_step != "all" and not 1 <= self.per_step <= self.scales:
            raise ValueError(f"scales_per_step: expected all or 1 to {self.scales}, found {self.per_step}")
        if self.keep_finest and self.per_step == 1 < self.scales:
            raise ValueError("scales_per_step 1 with keep_finest would train the finest scale only")

    def __call__(self, epoch: int, step: int) -> list[float]:
        """Coefficient of every scale's loss, 0 for scales not drawn; its mean over steps is 1 / scales, as in M3."""
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
    """The costs of n records at T time scales (1 without video).

    Args:
        before: [n] positions before the first image; all positions if there is no image.
        words: [n, T] text positions after that, at each time scale.
        frames: [n, T] images and sets of frames at each time scale.
        pixels: [n] pixels of all images and frames, padded to the stride.
    """

    before: np.ndarray
    words: np.ndarray
    frames: np.ndarray
    pixels: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray) -> RecordSizes:
        """From a table [n, 2 + 2 T]: before, pixels, words at T time scales, frames at T time scales."""
        times = (table.shape[1] - 2) // 2
        return cls(table[:, 0], table[:, 2 : 2 + times], table[:, 2 + times :], table[:, 1])

    def video(self, records: np.ndarray) -> np.ndarray:
        """[m] whether the records differ between time scales."""
        words, frames = self.words[records], self.frames[records]
        return (frames[:, :1] != frames).any(1) | (words[:, :1] != words).any(1)

    def tokens(self, records: np.ndarray, drawn: Iterable[int], scales: Sequence[int]) -> np.ndarray:
        """[m] positions that m of the records take in a packed sequence at the drawn scales (indices)."""
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
    """The limits of a batch; None: no limit.

    Args:
        records: Maximum records.
        tokens: Maximum positions of the packed sequence.
        pixels: Maximum pixels of all images.
    """

    records: int | None = None
    tokens: int | None = None
    pixels: int | None = None

    @property
    def fixed(self) -> bool:
        """Whether all batches have the same number of records."""
        return self.tokens is None and self.pixels is None

    def room(self) -> np.ndarray:
        """[3] limits of records, tokens and pixels."""
        return np.array([NO_LIMIT if limit is None else limit for limit in (self.records, self.tokens, self.pixels)])


def epoch_order(counts: Sequence[int], shares: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The records of one epoch, numbered over all sets, in random order.

    Each set is used in one random permutation after another, across epochs, so no record is repeated before
    all others of its set have been used.

    Args:
        counts: Number of records in each set.
        shares: Passes over each set per epoch: 2 uses it twice, 0.5 uses one half per epoch.
        seed: Seed of the order.
        epoch: The run's epoch.
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


Choice = Literal["next", "largest", "alike"]
"""The rule by which a batch takes its next record."""


def fill(
    order: np.ndarray,
    sizes: Callable[[int, np.ndarray], np.ndarray],
    budget: Budget,
    ranks: int,
    choice: Choice,
    window: int,
) -> Iterator[list]:
    """Cut an order into steps, each a list with a batch [m] for every rank.

    A batch begins with the record that has waited longest. It then repeatedly takes, out of the window, the
    largest record that still fits (`largest`, which leaves little of the budget unused) or the one closest in
    length to the first (`alike`, for padded batches), or keeps the order (`next`). In the last step, some
    ranks may get nothing.

    Args:
        order: [n] records.
        sizes: (step, [m] records) -> [m, 3] their costs: 1 record, its tokens, its pixels.
        budget: Limits of a batch.
        ranks: Batches per step.
        choice: How a batch takes its next record.
        window: Number of waiting records to choose from.
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
    """Indices of the waiting records [m, 3] that go into a batch with limits [3]; the first always does."""
    if choice == "next":
        over: Any = (sizes.cumsum(0) > room).any(1)
        return list(range(max(1, int(over.argmax()) if over.any() else len(over))))
    wanted = -abs(sizes[:, 1] - sizes[0, 1]).astype(float) if choice == "alike" else (sizes / room).max(1)
    # column by column for speed: with a million records, an epoch cannot begin before this loop is done
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
    """A step's batches [m]. If some rank has none but there are enough records, they are redistributed."""
    records = np.concatenate(batches)
    if all(len(batch) for batch in batches) or len(records) < ranks:
        return batches
    return [records[rank::ranks] for rank in range(ranks)]


class BatchPlans(SequentialSampler):
    """One rank's batches of an epoch, from a given step on.

    A batch depends only on (seed, epoch, rank, step), and every rank gets equally many. In training, up to
    `ranks` - 1 records may be left over at the end of an epoch and are dropped (other ones in each epoch, as
    the order changes); otherwise they form batches that are empty on some ranks. This is a SequentialSampler
    because Lightning would replace any other sampler for `overfit_batches`.

    Args:
        order: epoch -> its records.
        sizes: (epoch, step, [m] records) -> [m, 3] their costs.
        budget: Limits of a batch.
        training: Whether no rank may get an empty batch.
        choice: As in `fill`.
        rank: Rank of this process.
        ranks: Number of ranks.
        epoch: The first epoch.
        window: As in `fill`; at least as many records as a batch can have.
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        sizes: Callable[[int, int, np.ndarray], np.ndarray],
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
        """Called by Lightning before every epoch. Keeps `start` if a run resumes within this epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Number of batches in the whole epoch, even if it is resumed in the middle."""
        return len(self.batches())

    def __iter__(self) -> Iterator[BatchPlan]:  # type: ignore[override]
        epoch, start = self.epoch, self.start
        for step, records in enumerate(self.batches()[start:], start):
            yield BatchPlan(records.tolist(), epoch, step)

    def batches(self) -> list[np.ndarray]:
        """This rank's batches of the epoch."""
        if self._made is None or self._made[0] != self.epoch:
            self._made = self.epoch, list(self._fill())
        return self._made[1]

    def _fill(self) -> Iterator[np.ndarray]:
        order, sizes = self.order(self.epoch), partial(self.sizes, self.epoch)
        for batches in fill(order, sizes, self.budget, self.ranks, self.choice, self.window):
            step = shared_out(batches, self.ranks)
            if not self.training or all(len(batch) for batch in step):
                yield step[self.rank]
