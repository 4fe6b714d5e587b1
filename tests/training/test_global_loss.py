"""The loss is a mean over all labels of a step, however unevenly the accumulated batches hold them: one SGD step from
the same weights must end at the same weights. Of several ranks test_strategies says the same."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from lit_mm.model.loss import Consistency
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.parts import LLMPart, Part, Parts
from tests.helpers.batches import SCALES
from tests.helpers.models import tiny_encoder, tiny_llm
from tests.helpers.sharded import QUIET, packed_of, unchanged


def weights_after_a_step(batches, consistency=None) -> dict[str, torch.Tensor]:
    lightning.seed_everything(5, verbose=False)
    options = {"optimizer": torch.optim.SGD, "scheduler": unchanged, "init_gain": 1.0, "consistency": consistency}
    parts = Parts(Part(0.1), Part(0.1), LLMPart(0.1))
    lit = LitMatryoshka(tiny_encoder, tiny_llm(), SCALES, parts=parts, **options)
    data = DataLoader([packed_of(numbers, "packed") for numbers in batches], batch_size=None)
    own = {"max_steps": 1, "accumulate_grad_batches": 3 if len(batches) > 1 else 1}
    lightning.Trainer(accelerator="cpu", **QUIET | own).fit(lit, data)
    return lit.state_dict()


@pytest.mark.parametrize("parts", [[[0], [1, 2, 3], [4, 5]], [[0], [1, 2, 3, 4, 5]]], ids=["unequal", "a short last"])
@pytest.mark.parametrize("consistency", [None, Consistency(3.0)], ids=["", "consistency"])
def test_accumulated_parts_give_the_gradient_of_one_batch(parts, consistency):
    whole, found = (weights_after_a_step(each, consistency) for each in ([[0, 1, 2, 3, 4, 5]], parts))
    for name, tensor in whole.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6), name
