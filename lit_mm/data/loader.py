"""A data loader that can resume, measures how long training waits for it, and ends its worker processes."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.util import get_temp_dir
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from lit_mm.data.sampler import BatchPlans
from lit_mm.model.batch import Batch

GRACE = 3
"""Seconds that a worker process outlives SIGTERM."""


OPEN: WeakSet[ResumableLoader] = WeakSet()
"""Loaders that may have worker processes."""


@atexit.register
def close_loaders() -> None:
    """Without this a program takes 3 seconds longer to end and may print torch's traceback, because torch sends SIGTERM
    and waits, and `leave_signals_to_the_trainer` delays the effect of SIGTERM."""
    for loader in OPEN:
        loader.close()


class ResumableLoader(DataLoader):
    """A loader whose state is (epoch, batches trained), which Lightning restores before the first batch.

    Attributes:
        waited: Seconds that this process has spent waiting for batches, or making them.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waited, self.owner = 0.0, os.getpid()
        OPEN.add(self)

    def __iter__(self) -> Any:
        if self.num_workers:
            get_temp_dir()  # otherwise each worker makes its own, which stays behind when it is killed
        return self._timed(super().__iter__())  # starts the workers now, not with the first batch

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """End the worker processes, which otherwise live as long as anything refers to the loader. Does nothing in
        a forked process, which has inherited the loader but not its workers."""
        if getattr(self, "owner", None) != os.getpid():
            return
        iterator: Any = getattr(self, "_iterator", None)
        if hasattr(iterator, "_shutdown_workers"):
            if iterator._worker_pids_set:  # or torch reports their end as a crash
                _remove_worker_pids(id(iterator))
                iterator._worker_pids_set = False
            for process in iterator._workers:
                process.kill()  # they only read, and ending them gently takes seconds each
            iterator._shutdown_workers()
        self._iterator = None

    def __del__(self) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The batch at which the epoch began. Workers have fetched more than was trained, so
        `LitMatryoshka.on_save_checkpoint` writes how far training got."""
        plans = self._plans()
        return {"epoch": plans.epoch, "batches": plans.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at an epoch and batch."""
        plans = self._plans()
        plans.epoch, plans.start = state["epoch"], state["batches"]

    def _plans(self) -> BatchPlans:
        assert isinstance(self.sampler, BatchPlans)
        return self.sampler


def leave_signals_to_the_trainer(worker: int) -> None:
    """In a worker process: a signal to the process group must not end the worker during a step.

    The trainer ends it when it stops; if that does not happen, SIGTERM ends it after GRACE seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
