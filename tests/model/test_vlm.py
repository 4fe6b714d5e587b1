"""The model without packing against a slow, obvious way: one sample at a time, the LLM's own loss and greedy loop."""

import pytest
import torch

from lit_mm.data.collate import group_by_size
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Images
from tests.helpers.batches import SCALES, batch_of, picture, samples, slow_loss
from tests.helpers.models import tiny_vlm, tiny_vlm64


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("GraniteConfig", {"logits_scaling": 8.0}),
        ("CohereConfig", {"logit_scale": 0.25}),
        ("Gemma2Config", {"final_logit_softcapping": 5.0, "head_dim": 8}),
    ],
)
def test_logits_scaled_or_capped_behind_the_head(source, sizes):
    vlm = tiny_vlm(source=source, **sizes)
    losses = vlm(batch_of(*samples())).per_scale
    expected = torch.stack([slow_loss(vlm, samples(), scale) for scale in SCALES])
    assert torch.allclose(losses, expected, rtol=1e-5)


def test_text_alone():
    vlm = tiny_vlm64()
    losses = vlm(batch_of(samples()[2])).per_scale
    assert torch.allclose(losses, slow_loss(vlm, samples()[2:], 1).expand(3), rtol=1e-12)


def test_logits_only_where_there_is_a_target():
    vlm, shapes = tiny_vlm(), []
    vlm.llm.get_output_embeddings().register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    vlm(batch_of(*samples()))
    assert shapes == [(7, 348)] * 3


def test_encoder_and_projector_run_once():
    vlm, calls = tiny_vlm(), []
    vlm.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    vlm.projector.layers.register_forward_hook(lambda *_: calls.append("projector"))
    one, two = samples()[0], samples()[0]
    vlm(batch_of(one, two))
    assert calls == ["encoder", "projector"]


def test_attention_that_plans_anew_for_each_length_is_off():
    """What it costs on a GPU: tests/test_gpu.py."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny_vlm()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_image_of_an_illegal_grid_is_refused():
    with pytest.raises(ValueError, match=r"\[16, 4\] do not divide a 3×5 grid, which allows \[15, 1\]"):
        tiny_vlm()(batch_of(([IMAGE, 5, 0], [IGNORE_INDEX, 5, 0], [picture(48, 80)])))


def test_images_come_back_in_order_from_groups():
    vlm = tiny_vlm64()
    images = [picture(64, 64), picture(32, 128), picture(64, 64), picture(60, 60)]
    together = vlm.encode(group_by_size([image[None] for image in images]))
    for number, image in enumerate(images):
        alone = vlm.encode(Images([image[None]], torch.tensor([0])))
        assert torch.allclose(together[number], alone[0], rtol=1e-12)
