"""Log-likelihoods from one packed run, compared with every prompt and answer run alone."""

import pytest
import torch

from lit_mm.data.collate import group_by_size
from lit_mm.inference.scoring import score
from tests.helpers.batches import SCALES, slow_sequence
from tests.helpers.questions import KINDS, pictures, questions

ANSWERS = [[[7], [8, 9, 10]], [[1, 2]], [[3, 4, 5], [3, 4], [6]], [[11]], [[12, 13], [14]], [[0], [347, 1]]]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_each_answer_alone(kind):
    vlm, images = KINDS[kind](), pictures()
    groups = group_by_size([image[None] for image in images])
    found = score(vlm, groups, questions(), ANSWERS, SCALES)
    for question, given, by_scale in zip(questions(), ANSWERS, found, strict=True):
        shown = [images[i] for i in question.image_index]
        for scale, scores in zip(SCALES, by_scale, strict=True):
            prompt = slow_sequence(vlm, question.input_ids.tolist(), shown, scale)
            for ids, logprobs in zip(given, scores, strict=True):
                whole = torch.cat([prompt, vlm.llm.get_input_embeddings()(torch.tensor(ids))])
                logarithms = vlm.llm(inputs_embeds=whole[None]).logits[0].log_softmax(-1)
                expected = [logarithms[len(prompt) - 1 + place, token] for place, token in enumerate(ids)]
                assert torch.allclose(logprobs, torch.stack(expected), atol=1e-10 if kind == "packed" else 1e-4)


def test_a_question_is_computed_once_for_its_answers():
    vlm, lengths = KINDS["packed"](), []
    groups = group_by_size([image[None] for image in pictures()])
    vlm.llm.base_model.register_forward_pre_hook(
        lambda _, __, named: lengths.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    score(vlm, groups, questions()[:1], [[[n, n + 1] for n in range(10)]], [16])
    assert lengths == [16 + 2 + 10 * 2]


def test_an_empty_answer_is_refused():
    vlm = KINDS["packed"]()
    with pytest.raises(ValueError, match="without tokens"):
        score(vlm, group_by_size([image[None] for image in pictures()]), questions()[:1], [[[]]], [4])
