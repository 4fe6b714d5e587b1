"""A clock that is set by hand, so that tests of times do not depend on how busy the machine is."""

from types import SimpleNamespace

import pytest

from lit_mm.callbacks import meter
from lit_mm.costs import timing
from lit_mm.data import loader


@pytest.fixture
def hands(monkeypatch):
    """[seconds] of the clock by which training, parts, answers and waits for data are timed."""
    now = [100.0]
    for watching in (meter, timing, loader):
        monkeypatch.setattr(watching, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def forward_by(hands, seconds):
    """A hook that puts the clock forward."""

    def hook(*_, **__):
        hands[0] += seconds

    return hook
