"""Batches of still images and text, and the slow, obvious way to the loss: one sample and one scale at a time."""

import random

import torch

from lit_mm.data.collate import group_by_size
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch, Images
from lit_mm.model.packing import pack

SCALES = [16, 4, 1]

IMAGE_SIZES = [(64, 64), (32, 128), (60, 50), (128, 32)]


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def batch_of(*samples: tuple[list[int], list[int], list[torch.Tensor]]) -> Batch:
    images = [image for *_, own in samples for image in own]
    return Batch(
        group_by_size([image[None] for image in images]),
        [torch.tensor(ids) for ids, *_ in samples],
        [torch.tensor(labels) for _, labels, _ in samples],
        torch.arange(len(images)),
        [1 / len(SCALES)] * len(SCALES),
    )


def packed(batch: Batch, packing="packed", weights=None, attention="branch") -> Batch:
    batch.scale_weights = weights or [1 / len(SCALES)] * len(SCALES)
    batch.packed = pack(batch, SCALES, packing, attention)
    return batch


def samples():
    """One image; two of different shapes with text before and between; text alone."""
    torch.manual_seed(1)
    _ = IGNORE_INDEX
    return [
        ([IMAGE, 5, 6, 7, 8, 0], [_, _, _, _, 8, 0], [picture(64, 64)]),
        ([9, IMAGE, 10, IMAGE, 11, 12, 13, 14, 0], [_, _, _, _, _, 12, _, 14, 0], [picture(32, 128), picture(60, 50)]),
        ([20, 21, 22, 0], [_, _, 22, 0], []),
    ]


def random_samples(seed: int, count: int = 5, sizes=IMAGE_SIZES):
    """Text alone, one image or several, anywhere in short or long text, labels at random."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    made = []
    for _ in range(count):
        images = [picture(*rng.choice(sizes)) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
        ids = [rng.randrange(348) for _ in range(rng.randint(4, 60))]
        for _ in images:
            ids.insert(rng.choice([0, len(ids) // 2, len(ids) - 2]), IMAGE)
        labels = [i if i != IMAGE and rng.random() < 0.3 and n else IGNORE_INDEX for n, i in enumerate(ids)]
        labels[-1] = ids[-1]
        made.append((ids, labels, images))
    return made


def slow_sequence(vlm, ids, images, scale) -> torch.Tensor:
    """Embeddings [T, D] of one sample, put together piece by piece; each image encoded alone."""
    pieces, images = [], iter(images)
    for token in ids:
        if token == IMAGE:
            alone = Images([next(images)[None]], torch.tensor([0]))
            pieces.append(vlm.encode(alone).split(SCALES, dim=1)[vlm.all_scales.index(scale)][0])
        else:
            pieces.append(vlm.llm.get_input_embeddings()(torch.tensor([token])))
    return torch.cat(pieces)


def slow_loss(vlm, samples, scale) -> torch.Tensor:
    """Every label's loss from all the logits of each sample alone, averaged over all labels."""
    losses = []
    for ids, labels, images in samples:
        repeated = zip(labels, ids, strict=True)
        labels = [label for own, i in repeated for label in [own] * (scale if i == IMAGE else 1)]  # noqa: PLW2901
        logits = vlm.llm(inputs_embeds=slow_sequence(vlm, ids, images, scale)[None]).logits[0]
        logarithms = logits.log_softmax(-1)
        losses += [-logarithms[place - 1, label] for place, label in enumerate(labels) if label != IGNORE_INDEX]
    return torch.stack(losses).mean()
