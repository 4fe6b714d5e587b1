"""Consistency against a slow, obvious way: every sample alone at every scale, all its logits, torch's kl_div."""

import math
import random
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from lit_mm.model import loss
from lit_mm.model.batch import IGNORE_INDEX, IMAGE
from lit_mm.model.loss import Consistency, Teaching, weighted_loss
from lit_mm.model.scales import VideoScale
from tests.helpers.batches import SCALES, batch_of, packed, random_samples, samples, slow_sequence
from tests.helpers.models import gradients, packing_vlm, packing_vlm64, tiny_vlm64
from tests.helpers.videos import ALL_SCALES, TIMES, encoded, random_videos, slow_video, video_batch_of

PACKINGS = ["packed", "sequential", "padded"]


def logits_of(vlm, sequence, labels):
    """Logits [S, vocabulary] and labels [S] of one sample from its embeddings [T, D]."""
    places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX and place]
    logits = vlm.llm(inputs_embeds=sequence[None]).logits[0]
    return logits[[place - 1 for place in places]], torch.tensor([labels[place] for place in places])


def slow_terms(answers, scales, weights, teacher_of, config):
    """Cross-entropy and divergence [scales], summed over the labels of one sample; `answers` gives logits, labels."""
    entropies, divergences = {}, {}
    for scale in (scale for scale, weight in zip(scales, weights, strict=True) if weight):
        logits, labels = answers(scale)
        entropies[scale] = F.cross_entropy(logits, labels, reduction="sum")
        teacher = teacher_of(scale)
        targets = (answers(teacher)[0] if teacher else logits).detach() / config.temperature
        softened = (logits / config.temperature).log_softmax(-1)
        kl = F.kl_div(softened, targets.softmax(-1), reduction="sum")
        divergences[scale] = config.weight * config.temperature**2 * kl
    nothing = torch.zeros((), dtype=torch.float64)
    return [torch.stack([found.get(scale, nothing) for scale in scales]) for found in (entropies, divergences)]


def check(vlm, batch, config, expected):
    """`expected`: cross-entropies and divergences [scales] of each sample."""
    weights = torch.tensor(batch.scale_weights, dtype=torch.float64)
    entropies, divergences = (torch.stack(own).sum(0) / batch.num_labels for own in zip(*expected, strict=True))
    total = ((entropies + divergences) * weights).sum()
    losses = vlm(batch, consistency=config)
    drawn = weights > 0
    assert torch.allclose(losses.per_scale[drawn], entropies[drawn], rtol=1e-10)
    assert torch.allclose(losses.consistency[drawn], divergences[drawn], rtol=1e-9, atol=1e-14)
    assert torch.allclose(losses.loss, total, rtol=1e-10)
    for fast, slow in zip(gradients(losses.loss, vlm), gradients(total, vlm), strict=True):
        assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-12)


CONFIGS = [
    Consistency(0.5),
    Consistency(2.0, "finest", 3.0),
    Consistency(0.7, "next_finer"),
    Consistency(1.5, "next_finer", 0.5),
]
WEIGHTS = [[1 / 3] * 3, [0.2, 0.0, 0.8], [0.0, 0.7, 0.1]]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("config", "weights"), list(product(CONFIGS, WEIGHTS)))
def test_images_equal_the_slow_way(config, weights, packing, monkeypatch):
    """In chunks of four labels, so that teachers are in the chunk before, too."""
    monkeypatch.setitem(loss.CHUNK, "cpu", 348 * 4)
    vlm, mixed = packing_vlm64(), random_samples(2)
    drawn = [scale for scale, weight in zip(SCALES, weights, strict=True) if weight]

    def teacher_of(scale):
        finer = [other for other in drawn if other > scale]
        return (max if config.teacher == "finest" else min)(finer, default=None)

    expected = []
    for ids, labels, images in mixed:

        @cache
        def answers(scale, ids=ids, labels=labels, images=images):
            repeats = torch.tensor([scale if token == IMAGE else 1 for token in ids])
            own = torch.tensor(labels).repeat_interleave(repeats).tolist()
            return logits_of(vlm, slow_sequence(vlm, ids, images, scale), own)

        expected.append(slow_terms(answers, SCALES, weights, teacher_of, config))
    assert any(not images for *_, images in mixed)
    assert any((terms[1] > 1e-3).any() for terms in expected)
    check(vlm, packed(batch_of(*mixed), packing, weights), config, expected)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("teacher", ["finest", "next_finer"])
@pytest.mark.parametrize("drawn", [range(9), [1, 3, 5, 8], [2, 3]])
def test_videos_equal_the_slow_way(drawn, teacher, packing, monkeypatch):
    """Three sets of frames by three numbers of tokens; 8x1 and 4x576 teach neither the other."""
    monkeypatch.setitem(loss.CHUNK, "cpu", 348 * 5)
    vlm, mixed = packing_vlm64(time_scales=TIMES), random_videos(3)
    config = Consistency(0.6, teacher, 1.0 if teacher == "finest" else 2.0)
    weights = [(1 + number) / 50 if number in drawn else 0.0 for number in range(len(ALL_SCALES))]
    shown, rng, expected = [ALL_SCALES[number] for number in drawn], random.Random(0), []

    def of_video(scale):
        finer = [own for own in shown if own.frames >= scale.frames and own.tokens >= scale.tokens and own != scale]
        return (max if teacher == "finest" else min)(finer, key=lambda own: (own.frames, own.tokens), default=None)

    def of_image(scale):
        finer = [own.tokens for own in shown if own.tokens > scale.tokens]
        return VideoScale(scale.frames, (max if teacher == "finest" else min)(finer)) if finer else None

    for pieces in mixed:
        labels = encoded(pieces, TIMES, rng)[1].tolist()
        is_video = any(len(piece) > 1 for piece in pieces if not isinstance(piece, list))

        @cache
        def answers(scale, pieces=pieces, labels=labels):
            return logits_of(vlm, *slow_video(vlm, pieces, labels, *scale))

        expected.append(slow_terms(answers, ALL_SCALES, weights, of_video if is_video else of_image, config))
    assert any((terms[1] > 1e-3).any() for terms in expected)
    check(vlm, video_batch_of(mixed, packing=packing, weights=weights), config, expected)


def test_teachers_of_video_scales_by_hand():
    """Of 8x4, 8x1, 2x4 and 2x1 in the two labels 7 and 5."""
    label, scale = torch.tensor([7, 7, 7, 7, 5, 5]), torch.tensor([0, 1, 2, 3, 1, 2])
    order, finest = loss.teaching_of(Consistency(), label, scale, 4, 2)
    assert order.tolist() == [4, 5, 0, 1, 2, 3]
    assert finest.back.tolist() == [0, 0, 0, 1, 2, 3]
    assert loss.teaching_of(Consistency(1.0, "next_finer"), label, scale, 4, 2)[1].back.tolist() == [0, 0, 0, 1, 2, 1]


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [1 / 3] * 3])
def test_without_a_second_scale_or_an_image_the_term_is_absent(weights):
    vlm, mixed = packing_vlm64(), samples() if weights[0] == 1 else samples()[2:]
    batch = packed(batch_of(*mixed), "packed", weights)
    with_term, without = vlm(batch, consistency=Consistency()), vlm(batch)
    assert torch.equal(with_term.loss, without.loss)
    assert with_term.consistency is None if weights[0] == 1 else not with_term.consistency.any()


class OwnHead(torch.nn.Linear):
    """Not a plain nn.Linear, as with an adapter: its logits are kept."""


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("source", ["LlamaConfig", "GraniteConfig"])
def test_a_head_of_ones_own_gives_the_same(source, temperature, monkeypatch):
    """Chunks of two rows, whose teachers are up to three rows before."""
    monkeypatch.setitem(loss.CHUNK, "cpu", 348 * 2)
    sizes = {"logits_scaling": 8.0} if source == "GraniteConfig" else {}
    llm = tiny_vlm64(source=source, **sizes).llm
    torch.manual_seed(0)
    hidden, weights = torch.randn(11, 32, dtype=torch.float64, requires_grad=True), torch.rand(11, dtype=torch.float64)
    labels = torch.randint(348, (3,)).repeat_interleave(4)[:11]
    teaching = Teaching(torch.arange(11) % 4, 3, 0.8, temperature)
    head, found = llm.get_output_embeddings(), []
    head.bias = torch.nn.Parameter(torch.randn(348, dtype=torch.float64))
    for kind in (torch.nn.Linear, OwnHead):
        head.__class__ = kind
        total, losses, terms = weighted_loss(llm, hidden, labels, weights, teaching)
        found.append([total, losses, terms, *torch.autograd.grad(total, [hidden, head.weight, head.bias])])
    assert (found[0][2][torch.arange(11) % 4 == 0] == 0).all()
    assert (found[0][2][torch.arange(11) % 4 > 0] > 0).all()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_bf16_stays_near_float32():
    vlm, mixed = packing_vlm(), random_samples(1)
    exact = vlm(packed(batch_of(*mixed)), consistency=Consistency())
    with torch.autocast("cpu", torch.bfloat16):
        rough = vlm(packed(batch_of(*mixed)), consistency=Consistency())
    assert rough.consistency.dtype == torch.float32
    assert torch.allclose(rough.consistency, exact.consistency, rtol=5e-2)
    rough.loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "consistency.temperature: expected a positive number, found 0.0"),
        ({"temperature": math.nan}, "consistency.temperature: expected a positive number, found nan"),
        ({"weight": -0.1}, "consistency.weight: expected a number of at least 0, found -0.1"),
        ({"weight": math.inf}, "consistency.weight: expected a number of at least 0, found inf"),
        ({"start": -1}, "consistency.start: expected a step of at least 0, found -1"),
        ({"teacher": "best"}, "consistency.teacher: expected finest or next_finer, found best"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Consistency(**options)
