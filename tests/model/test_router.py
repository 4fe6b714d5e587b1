"""The router's losses against the formulas, its scores in training against those of one question alone, and that only
it gets a gradient."""

import torch

from lit_mm.data.collate import group_by_size
from lit_mm.inference.decoding import settings
from lit_mm.inference.generation import generate
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Images, Question
from lit_mm.model.packing import pack
from lit_mm.model.router import Router, RouterOptions
from tests.helpers.batches import SCALES, batch_of, picture, random_samples, slow_sequence
from tests.helpers.models import packing_vlm64

OPTIONS = [RouterOptions("ranking", hidden=8), RouterOptions("sufficient", hidden=8, tolerance=0.3)]


def routing_vlm(options: RouterOptions = OPTIONS[0]):
    vlm = packing_vlm64()
    vlm.router = Router(32, len(SCALES), options).double()
    return vlm


def routed_batch(samples):
    batch = batch_of(*samples)
    batch.packed = pack(batch, SCALES, answers=True)
    return batch


def runs_of(labels):
    """The beginning and end of each answer."""
    marks = [label != IGNORE_INDEX for label in labels]
    begins = [n for n, own in enumerate(marks) if own and not marks[n - 1]]
    return [(n, next((m for m in range(n, len(marks)) if not marks[m]), len(marks))) for n in begins]


def answers_alone(vlm, samples):
    """(losses by scale, mean visual token, last state of the prompt) of each answer after an image: every sample run
    alone at every scale, every prompt cut before its answer."""
    found = []
    for ids, labels, images in samples:
        for begin, end in runs_of(labels):
            shown = ids[:begin].count(IMAGE)
            if not shown:
                continue
            losses = []
            for scale in SCALES:
                states = slow_sequence(vlm, ids[:end], images[: ids[:end].count(IMAGE)], scale)
                logits = vlm.llm(inputs_embeds=states[None]).logits[0].log_softmax(-1)
                later = torch.tensor(ids[begin:end])
                losses.append(-logits[-len(later) - 1 : -1].gather(1, later[:, None]).mean())
            prompt = slow_sequence(vlm, ids[:begin], images[:shown], 1)
            places = [n for n, token in enumerate(ids[:begin]) if token == IMAGE]  # one token each at scale 1
            last = vlm.llm.base_model(inputs_embeds=prompt[None]).last_hidden_state[0, -1]
            found.append((torch.stack(losses), prompt[places].mean(0), last))
    return [torch.stack(own) for own in zip(*found, strict=True)]


def ranking_by_hand(scores, losses, margin):
    order = sorted(range(len(losses)), key=lambda n: losses[n])
    s, loss = [scores[n] for n in order], [losses[n] for n in order]
    total = -0.1 * s[0]
    for i in range(len(s)):
        for j in range(i + 1, len(s)):
            total += max(0.0, s[j] - s[i] + margin * (j - i) * (loss[j] - loss[i]))
    return total


def sufficient_by_hand(scores, losses, tolerance):
    label = max(n for n, loss in enumerate(losses) if loss <= min(losses) + tolerance)
    return -scores[label]


def test_both_losses_follow_their_formulas():
    torch.manual_seed(0)
    found, losses = torch.randn(50, 5).double().log_softmax(-1), torch.rand(50, 5).double()
    losses[:10, 1] = losses[:10, 0]  # equal losses
    for options in (RouterOptions(margin=0.7), RouterOptions("sufficient", tolerance=0.25)):
        by_hand, last = (ranking_by_hand, 0.7) if options.loss == "ranking" else (sufficient_by_hand, 0.25)
        expected = [by_hand(*pair, last) for pair in zip(found.tolist(), losses.tolist(), strict=True)]
        torch.testing.assert_close(Router(4, 5, options).loss(found, losses), torch.tensor(expected).double())


def test_the_score_of_a_sufficient_scale_is_a_probability_that_grows_with_the_tokens():
    router = Router(4, 3, RouterOptions("sufficient", hidden=8))
    states = torch.randn(6, 4), torch.randn(6, 4)
    shares, found = router(*states).exp(), router.scores(*states).exp()
    expected = torch.stack([shares[:, n:].sum(1) for n in range(3)], 1)
    torch.testing.assert_close(found, expected)
    assert (found[:, 0] - 1).abs().max() < 1e-6 and (found.diff(dim=1) < 0).all()
    ranked = Router(4, 3, RouterOptions(hidden=8))
    assert torch.equal(ranked.scores(*states), ranked(*states))


def test_one_packed_forward_gives_each_answers_losses_and_states():
    """Against every answer alone; also answers before the first image, between images, and texts without any."""
    for seed, options in enumerate(OPTIONS):
        vlm, samples = routing_vlm(options), random_samples(seed, 6)
        losses, visual, last = answers_alone(vlm, samples)
        found = vlm(routed_batch(samples))
        own = vlm.router(visual, last)
        torch.testing.assert_close(found.loss, vlm.router.loss(own, losses).mean(), rtol=1e-9, atol=1e-9)
        plain = batch_of(*samples)
        plain.packed = pack(plain, SCALES)
        torch.testing.assert_close(found.per_scale, vlm(plain).per_scale)


def test_a_batch_without_images_has_a_loss_of_zero():
    vlm = routing_vlm()
    loss = vlm(routed_batch([([20, 21, 22, 0], [IGNORE_INDEX, IGNORE_INDEX, 22, 0], [])])).loss
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in vlm.router.parameters())


def test_only_the_router_gets_a_gradient():
    vlm = routing_vlm()
    vlm(routed_batch(random_samples(0))).loss.backward()
    moved = {name.split(".")[0] for name, parameter in vlm.named_parameters() if parameter.grad is not None}
    assert moved == {"router"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in vlm.router.parameters())


def first_answers():
    """Samples of one answer, and the questions that ask for it."""
    torch.manual_seed(2)
    shown = [picture(64, 64), picture(32, 128), picture(64, 64)]
    prompts = [([IMAGE, 5, 6], shown[:1]), ([9, 3, IMAGE, 4, IMAGE, 8], shown[1:]), ([9, IMAGE, 11], shown[1:2])]
    samples = [([*ids, 7, 0], [*[IGNORE_INDEX] * len(ids), 7, 0], images) for ids, images in prompts]
    images = group_by_size([image[None] for image in shown])
    places = [[0], [1, 2], [1]]
    questions = [Question(n, "", torch.tensor(ids), places[n]) for n, (ids, _) in enumerate(prompts)]
    return samples, images, questions


def scores_in_training(vlm, samples):
    found = []
    handle = vlm.router.register_forward_hook(lambda module, states, _: found.append(states))
    vlm(routed_batch(samples))
    handle.remove()
    return vlm.router.scores(*found[0])


def answered(vlm, images: Images, questions, scales=SCALES, **options):
    return generate(vlm, images, questions, scales, settings(vlm.llm, max_new_tokens=2, **options), [0])


def test_scores_in_training_are_those_at_answering_time():
    samples, images, questions = first_answers()
    for options in OPTIONS:
        vlm = routing_vlm(options)
        expected = scores_in_training(vlm, samples)
        for further in ({}, {"num_beams": 2}):  # beams go through transformers
            for scales in (SCALES, [1]):
                for own, wanted in zip(answered(vlm, images, questions, scales, **further), expected, strict=True):
                    torch.testing.assert_close(torch.tensor(list(own[-1].router.values())), wanted.float())
                    assert list(own[-1].router) == SCALES and not any(each.router for each in own[:-1])


def test_a_text_has_no_scores():
    [[answer]] = answered(routing_vlm(), Images([], torch.arange(0)), [Question(0, "", torch.tensor([3, 4]), [])], [1])
    assert answer.router == {}


def test_without_the_question_the_scores_depend_on_the_image_alone():
    """Wherever the image stands in the text."""
    _, images, _ = first_answers()
    asked = [[IMAGE, 5, 6], [IMAGE, 40, 41, 42], [7, 8, 9, IMAGE]]
    for seen in (False, True):
        vlm = routing_vlm(RouterOptions(question=seen, hidden=8))
        for image in (0, 1):
            questions = [Question(n, "", torch.tensor(ids), [image]) for n, ids in enumerate(asked)]
            found = {tuple(own[0].router.values()) for own in answered(vlm, images, questions, [1])}
            assert len(found) == (len(asked) if seen else 1)
        others = [Question(n, "", torch.tensor(asked[0]), [n]) for n in (0, 1)]
        assert len({tuple(own[0].router.values()) for own in answered(vlm, images, others, [1])}) == 2
