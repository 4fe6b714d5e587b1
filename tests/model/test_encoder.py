"""The encoders against the papers' figures, timm's own forward and Hugging Face's ConvNext."""

import pytest
import timm
import torch
from transformers import ConvNextConfig, ConvNextModel

from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage, TimmEncoder
from tests.helpers.models import tiny_encoder


def millions(module: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2)


def test_the_papers_encoder():
    """ConvLLaVA, section 3.2: parameters, grids and CLIP's mean of the 1536-pixel encoder."""
    with torch.device("meta"):
        encoder = ConvNeXtEncoder(extra_stages=[ExtraStage()])
    assert millions(encoder) == 669.16
    assert millions(encoder.trunk.stages[4]) == 472.93
    assert (encoder.stride, encoder.num_features) == (64, 3072)
    for (height, width), grid in {
        (768, 768): (12, 12),
        (1024, 1024): (16, 16),
        (1536, 1536): (24, 24),
        (768, 1024): (12, 16),
    }.items():
        assert encoder.grid(height, width) == grid
        assert encoder(torch.empty(1, 3, height, width, device="meta")).shape == (1, 3072, *grid)
    assert encoder.mean == (0.48145466, 0.4578275, 0.40821073)
    assert [info["reduction"] for info in encoder.trunk.feature_info] == [4, 8, 16, 32, 64]


def test_four_stages_are_timms():
    torch.manual_seed(0)
    encoder = ConvNeXtEncoder("convnext_atto").double().eval()
    torch.manual_seed(0)
    timms = timm.create_model("convnext_atto", num_classes=0).double().eval()
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert torch.allclose(encoder(pixels), timms.forward_features(pixels), rtol=1e-12, atol=1e-14)


def test_five_stages_equal_hugging_faces():
    """Another library's five-stage ConvNeXt with the same weights gives the same grid."""
    config = ConvNextConfig(
        num_stages=5, depths=[1, 2, 1, 1, 2], hidden_sizes=[8, 16, 24, 32, 48], layer_scale_init_value=0.5
    )
    torch.manual_seed(0)
    reference = ConvNextModel(config).double().eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    overrides = {"depths": [1, 2, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": False}
    encoder = ConvNeXtEncoder("convnext_atto", [ExtraStage(2, 48)], overrides=overrides).double().eval()
    renamed = {
        to_timm(name): value for name, value in reference.state_dict().items() if not name.startswith("layernorm.")
    }
    encoder.trunk.load_state_dict(renamed)
    pixels = torch.randn(2, 3, 128, 192, dtype=torch.float64)
    expected = reference(pixels).last_hidden_state
    assert torch.allclose(encoder(pixels), expected, rtol=1e-10, atol=1e-10)


def to_timm(name: str) -> str:
    for old, new in {
        "layer_scale_parameter": "gamma",
        "embeddings.patch_embeddings.": "stem.0.",
        "embeddings.layernorm.": "stem.1.",
        "encoder.stages.": "stages.",
        "downsampling_layer": "downsample",
        ".layers.": ".blocks.",
        "dwconv": "conv_dw",
        ".layernorm.": ".norm.",
        "pwconv1": "mlp.fc1",
        "pwconv2": "mlp.fc2",
    }.items():
        name = name.replace(old, new)
    return name


def test_sides_are_padded_up_to_the_stride():
    encoder = tiny_encoder().eval()
    pixels = torch.randn(1, 3, 50, 70)
    by_hand = torch.zeros(1, 3, 64, 80)
    by_hand[..., :50, :70] = pixels
    assert encoder.grid(50, 70) == (4, 5)
    assert torch.equal(encoder(pixels), encoder(by_hand))


def test_normalised_mean_colour_is_zero():
    encoder = tiny_encoder()
    mean = torch.tensor(encoder.mean).view(1, 3, 1, 1)
    pixels = torch.stack([torch.full((4, 4), round(255 * value)) for value in encoder.mean])[None].to(torch.uint8)
    assert encoder.normalize(pixels).abs().max() < 0.5 / 255 / min(encoder.std)
    white = encoder.normalize(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8))
    assert torch.allclose(white[..., :1, :1], (1 - mean) / torch.tensor(encoder.std).view(1, 3, 1, 1))


def test_checkpointing_covers_the_extra_stage_and_keeps_gradients():
    encoder, pixels = tiny_encoder(), torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        assert encoder.trunk.stages[4].grad_checkpointing is enable
        encoder.zero_grad()
        encoder(pixels).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_extra_stage_follows_convnext_v2():
    encoder = ConvNeXtEncoder("convnextv2_atto", [ExtraStage(1, 64)])
    assert hasattr(encoder.trunk.stages[4].blocks[0].mlp, "grn")
    assert encoder.trunk.stages[4].blocks[0].gamma is None


def test_vit_grid_is_the_last_but_one_blocks():
    """LLaVA's choice of layer, compared with the block's output caught by a hook."""
    encoder = TimmEncoder("vit_tiny_patch16_224", overrides={"img_size": 64}).eval()
    whole, caught = timm.create_model("vit_tiny_patch16_224", img_size=64).eval(), []
    left_out = encoder.trunk.load_state_dict(whole.state_dict(), strict=False).unexpected_keys
    assert all(name.startswith(("blocks.11.", "norm.", "head.")) for name in left_out)  # nothing waits for gradients
    whole.blocks[-2].register_forward_hook(lambda module, inputs, output: caught.append(output))
    pixels = torch.randn(2, 3, 64, 64)
    whole(pixels)
    grid = encoder(pixels)
    assert (encoder.stride, encoder.num_features, tuple(grid.shape)) == (16, 192, (2, 192, 4, 4))
    assert torch.equal(grid.flatten(2).transpose(1, 2), caught[0][:, 1:])  # without the class token


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224"])
def test_another_backbone_is_refused_by_name(backbone):
    with pytest.raises(ValueError, match=f"{backbone} is a .*not a ConvNeXt: use TimmEncoder"):
        ConvNeXtEncoder(backbone)
