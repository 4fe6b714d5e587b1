"""The time left follows from the steps done."""

import time
from types import SimpleNamespace

import pytest

from lit_mm.callbacks.progress import Progress


def test_time_left(monkeypatch):
    bar = Progress()
    monkeypatch.setattr("lightning.pytorch.callbacks.TQDMProgressBar.on_train_start", lambda *_: None)
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.TQDMProgressBar.get_metrics", lambda *_: {"v_num": 0, "train/loss@16": 1.5}
    )
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    trainer, module = SimpleNamespace(training=True, global_step=50), SimpleNamespace(total_steps=lambda: 140)
    bar.on_train_start(trainer, module)
    trainer.global_step = 80
    assert bar.get_metrics(trainer, module) == {"loss@16": 1.5, "left": "0:01:00"}  # 60 steps at 1 s


@pytest.mark.parametrize("seconds_a_step", [0.25, 1, 100])
def test_in_a_file_the_bar_comes_once_a_minute_and_at_its_end(monkeypatch, seconds_a_step):
    bar, now = Progress(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: False))
    written = []
    for step in range(1, 1001):
        now[0] += seconds_a_step
        if bar._should_update(step, 1000):
            written.append(step)
    apart = max(1, 60 / seconds_a_step)
    assert written == [*(n for n in range(1, 1000) if (n - 1) % apart == 0), 1000]
