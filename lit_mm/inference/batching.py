"""Requests that wait -> batches that one thread answers.

Whatever waits while a batch runs is in the next one, if its settings are equal; scales and seeds may differ. A request
that fails in a batch is tried again alone, so that it cannot harm the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lit_mm.inference.answering import Answer, Model, Prompt
from lit_mm.inference.generation import Generated
from lit_mm.model.scales import Scale

log = logging.getLogger(__name__)


class NotFiniteError(ValueError):
    """The model's logits for a request are not finite."""


class ClosedError(RuntimeError):
    """The server ends before the request was answered."""


@dataclass
class Piece:
    """How far an answer is.

    Args:
        number: The place of its scale in the prompt's scales; 0 if a chooser chose it.
        tried: The scales at which the question was answered so far, this one last.
        text: Of all tokens so far.
        answer: Its tokens; it grows, so only the first `tokens` of them count.
        tokens: Number of tokens so far, an end token included.
        is_all: Whether the answer has ended.
        seconds: From the request's arrival.
    """

    number: int
    tried: list[Scale]
    text: str
    answer: Generated
    tokens: int
    is_all: bool
    seconds: float


@dataclass(eq=False)
class Job:
    """One request.

    Args:
        prompt: Its question.
        settings: Of decoding. Jobs with equal settings are answered together.
        tell: Called by the thread of the batcher with every `Piece`, and in the end with the answers by scale, or an
            error.
        arrived: By `time.perf_counter`.
        pieces: Whether `tell` wants pieces.
        dropped: Nobody waits for it anymore.
        begun: A piece was told, so it cannot begin again.
    """

    prompt: Prompt
    settings: dict[str, Any]
    tell: Callable[[Piece | list[Answer] | Exception], None]
    arrived: float
    pieces: bool = False
    dropped: bool = False
    begun: bool = False


class Batcher:
    """Answers jobs in batches, in a thread of its own, which alone uses the model.

    Args:
        model: Answers.
        max_batch: The most answers in a batch; a job has one for each of its scales.
        watch: Called with the number of answers of every batch.
    """

    def __init__(self, model: Model, max_batch: int, watch: Callable[[int], None] = lambda answers: None) -> None:
        self.model, self.max_batch, self.watch = model, max_batch, watch
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def __enter__(self) -> Batcher:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.thread.join(10)  # longer only if an LLM's own `generate` runs, which cannot be interrupted

    def submit(self, job: Job) -> None:
        """Have a job answered; a closed batcher tells it a `ClosedError`."""
        with self.changed:
            if self.closed:
                job.tell(ClosedError())
                return
            self.waiting.append(job)
            self.changed.notify()

    def drop(self, job: Job) -> None:
        """Stop answering a job; if it is running, it leaves the batch at its next token."""
        with self.changed:
            job.dropped = True
            if job in self.waiting:
                self.waiting.remove(job)

    def close(self) -> None:
        """End what is running or waiting; take no more."""
        with self.changed:
            self.closed = True
            for job in [*self.waiting, *self.running]:
                if not job.dropped:
                    job.tell(ClosedError())
                job.dropped = True
            self.waiting.clear()
            self.changed.notify()

    def _work(self) -> None:
        while jobs := self._next():
            self.watch(sum(job.prompt.num_answers for job in jobs))
            self._answer(jobs)
            self.running = []

    def _next(self) -> list[Job]:
        """The job that waits longest, and others that fit in with it; empty if closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            room = self.max_batch
            for job in self.waiting:
                size = job.prompt.num_answers
                if not self.running or (size <= room and _fit(job, self.running[0])):
                    self.running.append(job)
                    room -= size
            self.waiting = [job for job in self.waiting if job not in self.running]
            return self.running

    def _answer(self, jobs: Sequence[Job]) -> None:
        began = time.perf_counter()
        try:
            found = self.model.answers_to([job.prompt for job in jobs], self._teller(jobs), **jobs[0].settings)
        except Exception as error:
            log.exception("a batch of %d failed", len(jobs))
            for job in jobs:
                self._failed(job, error, len(jobs) == 1)
            return
        for job, answers in zip(jobs, found, strict=True):
            if any(answer.finish == "error" for answer in answers.values()):
                self._failed(job, NotFiniteError(), len(jobs) == 1)
            elif not job.dropped:
                waited = began - job.arrived
                job.tell([_since_arrival(answer, waited) for answer in answers.values()])

    def _failed(self, job: Job, error: Exception, was_alone: bool) -> None:
        """Try again alone: in a batch, the fault may be another's."""
        if job.dropped:
            return
        if was_alone or job.begun:
            job.tell(error)
        else:
            self._answer([job])

    def _teller(self, jobs: Sequence[Job]) -> Callable[[int, Scale, Generated, bool], bool]:
        seen: list[dict[Scale, None]] = [{} for _ in jobs]

        def tell(number: int, scale: Scale, answer: Generated, is_all: bool) -> bool:
            job, chosen = jobs[number], jobs[number].prompt.chooser is not None
            seen[number][scale] = None
            if job.pieces and not job.dropped and answer.finish != "error" and answer.logprobs:
                job.begun = True
                place, seconds = 0 if chosen else job.prompt.scales.index(scale), time.perf_counter() - job.arrived
                tried = list(seen[number]) if chosen else [scale]
                job.tell(Piece(place, tried, answer.text, answer, len(answer.logprobs), is_all, seconds))
            return not job.dropped

        return tell


def _fit(job: Job, other: Job) -> bool:
    """Whether two jobs are answered in one batch. One at given scales does not wait until a chooser is done."""
    return job.settings == other.settings and job.prompt.chooser is other.prompt.chooser


def _since_arrival(answer: Answer, waited: float) -> Answer:
    answer.first_token_seconds += waited
    answer.seconds += waited
    return answer
