"""The time left follows from the steps done."""

import time
from types import SimpleNamespace

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
