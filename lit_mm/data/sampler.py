"""Which records stand together in a batch, decided by (seed, epoch, rank, step) alone.

epoch_order    (seed, epoch) -> the records of all sets in a random order
fill           order + sizes + budget -> batches, step by step for all ranks
BatchPlans     one rank's share, from any step on: nothing else is needed to resume
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

    @classmethod
    def of(cls, table: np.ndarray) -> RecordSizes:
        """Of a table [n, 2 + 2 T]: before, pixels, words at T time scales, frames at T time scales."""
        times = (table.shape[1] - 2) // 2
        return cls(table[:, 0], table[:, 2 : 2 + times], table[:, 2 + times :], table[:, 1])

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


Choice = Literal["next", "largest", "alike"]
"""Which waiting record a batch takes next."""


def fill(
    order: np.ndarray,
    sizes: Callable[[int, np.ndarray], np.ndarray],
    budget: Budget,
    ranks: int,
    choice: Choice,
    window: int,
) -> Iterator[list]:
    """Cut an order into steps, each a list of as many batches [m] as there are ranks.

    A batch begins with the record that waits longest. Of those within the window it then takes the
    largest that still fits, again and again, which leaves least of the budget unused; or the one
    nearest in length to the first, for padded batches; or it keeps the order. In the last step some
    ranks may get nothing.

    Args:
        order: [n] records.
        sizes: (step, [m] records) -> [m, 3] what each costs of the budget: 1 record, its tokens, its pixels.
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


class BatchPlans(SequentialSampler):
    """One rank's batches of an epoch, from a step on.

    (seed, epoch, rank, step) alone decide a batch. Every rank gets as many as the others. In training
    the fewer than `ranks` records that may be left at the end are left out of the epoch, which is why
    another epoch has another order; elsewhere they make batches that some ranks have empty.
    A SequentialSampler by name, or Lightning would put one in its place for `overfit_batches`.

    Args:
        order: epoch -> its records.
        sizes: (epoch, step, [m] records) -> [m, 3] what each costs.
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
        """Called by Lightning before every epoch; the one that a run resumes in goes on where it was."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Batches of the whole epoch, wherever it begins."""
        return len(self.batches())

    def __iter__(self) -> Iterator[BatchPlan]:  # type: ignore[override]
        epoch, start = self.epoch, self.start
        for step, records in enumerate(self.batches()[start:], start):
            yield BatchPlan(records.tolist(), epoch, step)

    def batches(self) -> list[np.ndarray]:
        """The epoch's batches of this rank."""
        if self._made is None or self._made[0] != self.epoch:
            self._made = self.epoch, list(self._fill())
        return self._made[1]

    def _fill(self) -> Iterator[np.ndarray]:
        order, sizes = self.order(self.epoch), partial(self.sizes, self.epoch)
        for batches in fill(order, sizes, self.budget, self.ranks, self.choice, self.window):
            step = shared_out(batches, self.ranks)
            if not self.training or all(len(batch) for batch in step):
                yield step[self.rank]
