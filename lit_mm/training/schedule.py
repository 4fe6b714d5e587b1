"""The learning rate schedule."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Linear warm-up from zero, then cosine decay to zero: the schedule of ConvLLaVA and M3.

    With floor 0 it equals Hugging Face's `get_cosine_schedule_with_warmup` at every step. As in its Trainer,
    the number of warm-up steps is rounded up, and the first step has rate 0.
    """

    def __init__(self, optimizer: Optimizer, steps: int, warmup: float = 0.03, floor: float = 0.0) -> None:
        """Create the schedule.

        Args:
            optimizer: The optimizer whose learning rates are scheduled.
            steps: Optimizer steps of the whole run.
            warmup: Fraction of the steps in which the rate rises; 3% in both papers.
            floor: Final rate as a fraction of the peak rate.
        """
        rising = math.ceil(steps * warmup)

        def factor(step: int) -> float:
            if step < rising:
                return step / rising
            done = min(1.0, (step - rising) / max(1, steps - rising))
            return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor)
