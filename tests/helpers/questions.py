"""Questions about two pictures, one text alone among them, and models that answer in either way."""

import torch

from lit_mm.model.batch import IMAGE, Question
from tests.helpers.batches import picture
from tests.helpers.models import packing_vlm64, tiny_vlm64

KINDS = {"packed": packing_vlm64, "by transformers": tiny_vlm64}


def questions():
    return [
        Question("a", "", torch.tensor([IMAGE, 5, 6]), [0]),
        Question("b", "", torch.tensor([9, IMAGE, 10, 12, IMAGE, 14, 15]), [1, 0]),
        Question("c", "", torch.tensor([20, 21]), []),
        Question("d", "", torch.tensor([9, 3, 4, IMAGE, 30]), [1]),
        Question("e", "", torch.tensor([9, 3, 4, IMAGE, 31, 32, 33]), [1]),
        Question("f", "", torch.tensor([7, IMAGE]), [0]),
    ]


def pictures():
    torch.manual_seed(3)
    return [picture(64, 64), picture(32, 128)]
