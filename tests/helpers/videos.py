"""Batches with videos, whose frames form nested sets."""

import random

import torch

from lit_mm.data.collate import group_by_size
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch
from lit_mm.model.packing import pack
from lit_mm.model.scales import VideoScale, coarsest_time_scale, set_starts
from tests.helpers.batches import SCALES, picture

TIMES = [4, 2, 1]
ALL_SCALES = [VideoScale(frames, tokens) for frames in TIMES for tokens in SCALES]


def random_videos(seed: int, count: int = 4):
    """Each (text and visuals in turn): a visual is its frames, text a list of ids; labels at random."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    samples = []
    for _ in range(count):
        pieces = []
        for frames in rng.choice([[], [1], [3], [6], [1, 5], [9]]):
            pieces.append([rng.randrange(348) for _ in range(rng.choice([0, 2, 9]))])
            pieces.append(torch.stack([picture(64, 64) for _ in range(frames)]))
        samples.append([*pieces, [rng.randrange(348) for _ in range(rng.randint(3, 12))]])
    return samples


def encoded(pieces, times, rng):
    """ids, labels, kept; every frame but the first of a visual has an id of its own before it."""
    ids, kept = [], []
    for piece in pieces:
        if isinstance(piece, list):
            ids, kept = ids + piece, kept + [len(times) - 1] * len(piece)
        else:
            for frame, stays in enumerate(coarsest_time_scale(len(piece), times)):
                own = [IMAGE] if frame == 0 else [100 + frame, IMAGE]
                ids, kept = ids + own, kept + [stays] * len(own)
    always = [
        token < 100 and token != IMAGE and stays == len(times) - 1 for token, stays in zip(ids, kept, strict=True)
    ]
    labels = [token if keep and rng.random() < 0.4 else IGNORE_INDEX for token, keep in zip(ids, always, strict=True)]
    labels[0], labels[-1] = IGNORE_INDEX, ids[-1]
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(kept)


def video_batch_of(samples, times=TIMES, packing="packed", weights=None) -> Batch:
    rng = random.Random(0)
    ids, labels, kept = zip(*(encoded(pieces, times, rng) for pieces in samples), strict=True)
    visuals = [piece for pieces in samples for piece in pieces if not isinstance(piece, list)]
    images, index = group_by_size(visuals, times), torch.arange(sum(len(visual) for visual in visuals))
    count = len(SCALES) * len(times)
    batch = Batch(images, list(ids), list(labels), index, weights or [1 / count] * count, time_scale=list(kept))
    batch.packed = pack(batch, SCALES, packing)
    return batch


def slow_video(vlm, pieces, labels, frames, tokens):
    """Embeddings [T, D] and labels [T] of one sample with its visuals cut into sets by hand."""
    embed, found, own, given = vlm.llm.get_input_embeddings(), [], [], iter(labels)
    for piece in pieces:
        if isinstance(piece, list):
            found.append(embed(torch.tensor(piece, dtype=torch.long)))
            own += [next(given) for _ in piece]
            continue
        for _ in range(2 * len(piece) - 1):
            next(given)
        starts = set_starts(len(piece), frames)
        for number, (begin, end) in enumerate(zip(starts, [*starts[1:], len(piece)], strict=True)):
            if number:
                found.append(embed(torch.tensor([100 + begin])))
            alone = [vlm.projector(vlm.encoder(vlm.encoder.normalize(frame[None]))) for frame in piece[begin:end]]
            found.append(
                torch.stack([nested.split(SCALES, dim=1)[SCALES.index(tokens)][0] for nested in alone]).mean(0)
            )
            own += [IGNORE_INDEX] * (tokens + bool(number))
    return torch.cat(found), own
