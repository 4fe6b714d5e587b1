"""Learning rate over the steps of a run."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Linear warm-up from zero, then a cosine to zero: the schedule of ConvLLaVA and M3.

    Without a floor every step has the rate of Hugging Face's `get_cosine_schedule_with_warmup`, with the number
    of warm-up steps that its Trainer makes of a ratio: rounded up, and the first step at rate 0.
    """

    def __init__(self, optimizer: Optimizer, steps: int, warmup: float = 0.03, floor: float = 0.0) -> None:
        """Set up the schedule.

        Args:
            optimizer: Whose learning rates to scale.
            steps: Optimizer steps of the whole run.
            warmup: Share of the steps in which the rate rises; 3 % in both papers.
            floor: Share of the peak rate at the end.
        """
        rising = math.ceil(steps * warmup)

        def factor(step: int) -> float:
            if step < rising:
                return step / rising
            done = min(1.0, (step - rising) / max(1, steps - rising))
            return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor)
