"""The loader and its processes: where it stands, how it is waited for, how it ends."""

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
"""Seconds that a loader's process outlives SIGTERM."""


OPEN: WeakSet[ResumableLoader] = WeakSet()
"""Loaders that may have processes."""


@atexit.register
def close_loaders() -> None:
    """Without this a program takes 3 seconds longer to end, and may end with torch's traceback: torch sends SIGTERM and
    waits, and `leave_signals_to_the_trainer` delays what SIGTERM does."""
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
