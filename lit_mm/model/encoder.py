"""Image -> grid: the five-stage ConvNeXt of ConvLLaVA, or any other timm backbone.

    pixels [B, 3, H, W], normalized  ->  grid [B, num_features, ceil(H / stride), ceil(W / stride)]

An encoder knows its stride, so the data side can count an image's tokens before any weights exist.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNorm2d
from timm.models.convnext import ConvNeXt, ConvNeXtStage, _init_weights
from torch import Tensor, nn

READS = re.compile(r"pretrained|checkpoint_path$|cache_dir$")
"""timm's keywords that name files or addresses. Those of pretrained_cfg_overlay count only with `pretrained`."""


@dataclass
class ExtraStage:
    """One stage appended to a ConvNeXt trunk: LayerNorm2d, stride-2 convolution, blocks.

    Args:
        depth: Number of ConvNeXt blocks. The paper's stage 5 has 6; it beats 3 and 9.
        width: Channels of the stage, and of the grid if it is the last one.
        layer_scale: Initial value of the residual branches' scale. 1e-6 suits a new stage on a
            pretrained trunk (ConvLLaVA); from scratch, 0.1 to 1 learns faster.
    """

    depth: int = 6
    width: int = 3072
    layer_scale: float = 1e-6


class Encoder(nn.Module):
    """Base class of encoders: a subclass sets the attributes and implements `forward`.

    Attributes:
        stride: Pixels per grid cell along a side.
        num_features: Channels of the grid.
        mean: Per-channel mean that the backbone was trained with, for values in 0..1.
        std: Per-channel standard deviation, likewise.
        pretrained: Whether the backbone was loaded with timm's weights.
        arguments: What describes it: keywords with which its class builds it again, without weights.
    """

    stride: int
    num_features: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pretrained: bool
    arguments: dict[str, Any]
    trunk: Any

    @property
    def stages(self) -> list[nn.Module]:
        """The trunk's stages (ConvNet) or blocks (ViT), input first; an encoder without a trunk is one stage."""
        if not hasattr(self, "trunk"):
            return [self]
        modules = dict(self.trunk.named_modules())
        listed = (modules.get(info["module"]) for info in self.trunk.feature_info)
        return [module for module in listed if module is not None and any(True for _ in module.parameters())]

    @property
    def smallest(self) -> tuple[int, ...]:
        """Height and width of the smallest image: one grid cell, or the only size that the backbone accepts."""
        patches: Any = getattr(getattr(self, "trunk", None), "patch_embed", None)
        return tuple(patches.img_size) if getattr(patches, "strict_img_size", False) else (self.stride, self.stride)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid of a height × width image, whose sides are padded up to the stride."""
        return math.ceil(height / self.stride), math.ceil(width / self.stride)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [B, 3, H, W] in 0..255 -> floats of the encoder's dtype, mean 0, deviation 1."""
        dtype = next(self.parameters()).dtype
        exact = torch.promote_types(dtype, torch.float32)  # bf16 cannot represent all 256 levels
        mean, std = (
            torch.tensor(values, dtype=exact, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std)
        )
        return ((pixels.to(exact) / 255 - mean) / std).to(dtype)

    def pad(self, pixels: Tensor) -> Tensor:
        """Pad normalized pixels on the right and at the bottom with the mean color, up to the stride."""
        height, width = pixels.shape[-2:]
        return F.pad(pixels, (0, -width % self.stride, 0, -height % self.stride))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them.

        Raises:
            ValueError: The encoder has no timm trunk and does not override this method.
        """
        if not hasattr(self, "trunk"):
            raise ValueError(f"model.activation_checkpointing: {type(self).__name__} has no set_grad_checkpointing")
        self.trunk.set_grad_checkpointing(enable)

    def _set_trunk(self, trunk: Any, pretrained: bool) -> None:
        self.trunk, self.pretrained = trunk, pretrained
        self.mean, self.std = tuple(trunk.pretrained_cfg["mean"]), tuple(trunk.pretrained_cfg["std"])


class ConvNeXtEncoder(Encoder):
    """A timm ConvNeXt with extra stages as one trunk (ConvLLaVA, section 3.2).

    The output is the last stage's feature map without a final norm, as in the paper. `trunk.stages`,
    `trunk.feature_info` and `trunk.num_features` include the extra stages.
    """

    def __init__(
        self,
        backbone: str = "convnext_large_mlp.clip_laion2b_ft_soup_320",
        extra_stages: list[ExtraStage] | None = None,
        pretrained: bool = False,
        drop_path: float = 0.0,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """Build the trunk; the paper's is the default backbone with one `ExtraStage()`.

        Args:
            backbone: Name of a timm ConvNeXt or ConvNeXt-V2, with or without its pretrained tag.
            extra_stages: Stages after the backbone's four; each doubles the stride. [] or null: none.
            pretrained: Load timm's weights of the backbone; extra stages start at random.
            drop_path: Stochastic depth of the backbone's blocks; extra stages have none.
            overrides: Further keywords of timm's ConvNeXt, such as depths, dims, patch_size.

        Raises:
            ValueError: The backbone is not a ConvNeXt of timm.
        """
        super().__init__()
        stages = extra_stages or []
        self.arguments = {"backbone": backbone, "extra_stages": [*map(asdict, stages)], "overrides": overrides or {}}
        trunk = create_trunk(backbone, pretrained, {"drop_path_rate": drop_path, **(overrides or {})})
        if not isinstance(trunk, ConvNeXt):
            raise ValueError(f"{backbone} is a {type(trunk).__name__}, not a ConvNeXt: use TimmEncoder for it")
        trunk.norm_pre, trunk.head = nn.Identity(), cast(Any, nn.Identity())
        for stage in stages:
            append_stage(trunk, stage)
        # depthwise convolutions and the blocks' linear layers are both fastest with channels last
        self._set_trunk(trunk.to(memory_format=torch.channels_last), pretrained)
        self.stride = cast(int, trunk.feature_info[-1]["reduction"])
        self.num_features = trunk.num_features

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [B, 3, H, W] -> grid [B, num_features, ceil(H / stride), ceil(W / stride)]."""
        pixels = self.pad(pixels).contiguous(memory_format=torch.channels_last)
        return self.trunk.stages(self.trunk.stem(pixels))


def create_trunk(backbone: str, pretrained: bool, keywords: dict[str, Any]) -> Any:
    """A timm model without its classifier; on the meta device no weights are downloaded.

    Raises:
        ValueError: timm does not know the backbone or a keyword.
    """
    weights = pretrained and torch.get_default_device().type != "meta"
    try:
        return timm.create_model(backbone, pretrained=weights, num_classes=0, **keywords)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"encoder.backbone {backbone} with {keywords}: {error}") from error


def check_described(backbone: str, overrides: dict[str, Any]) -> None:
    """Check an encoder that a file of others describes.

    Raises:
        ValueError: timm would read further files.
    """
    if not re.fullmatch(r"[\w.-]+", str(backbone)):  # `hf-hub:owner/name`, `local-dir:folder`
        raise ValueError(f"encoder.backbone {backbone}: expected a name of timm's own models")
    if elsewhere := [key for key in overrides if READS.match(key) and key != "pretrained_cfg_overlay"]:
        raise ValueError(f"encoder.overrides: {elsewhere[0]} names files; expected sizes and the like")


def append_stage(trunk: ConvNeXt, stage: ExtraStage) -> None:
    """Append one stage to a timm ConvNeXt in place (timm itself only builds four)."""
    block = cast(Any, trunk.stages[-1]).blocks[0]
    uses_grn = hasattr(block.mlp, "grn")  # ConvNeXt-V2: response norm instead of layer scale
    added = ConvNeXtStage(
        trunk.num_features,
        stage.width,
        kernel_size=block.conv_dw.kernel_size[0],
        stride=2,
        depth=stage.depth,
        ls_init_value=cast(float, None) if uses_grn else stage.layer_scale,
        conv_mlp=block.use_conv_mlp,
        use_grn=uses_grn,
        norm_layer=LayerNorm2d,
        norm_layer_cl=LayerNorm,
    )
    for name, module in added.named_modules():
        _init_weights(module, name)
    reduction, place = cast(int, trunk.feature_info[-1]["reduction"]) * 2, f"stages.{len(trunk.stages)}"
    trunk.feature_info.append({"num_chs": stage.width, "reduction": reduction, "module": place})
    trunk.stages.append(added)
    trunk.num_features = stage.width


class TimmEncoder(Encoder):
    """Any other timm backbone with a spatial feature map, such as the ViT that ConvLLaVA replaces."""

    def __init__(
        self,
        backbone: str = "vit_large_patch14_clip_quickgelu_336.openai",
        layer: int = -2,
        pretrained: bool = False,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """Build the backbone.

        Args:
            backbone: Name of a timm model that offers `forward_intermediates`.
            layer: Index of the block (ViT) or stage (ConvNet) whose output is the grid; negative indices
                count from the end. LLaVA takes -2, the second-to-last block of CLIP's ViT.
            pretrained: Load timm's weights.
            overrides: Further keywords of the timm model, such as img_size or dynamic_img_size.

        Raises:
            ValueError: timm offers no intermediate feature maps for this backbone.
        """
        super().__init__()
        self.arguments = {"backbone": backbone, "layer": layer, "overrides": overrides or {}}
        trunk = create_trunk(backbone, pretrained, overrides or {})
        if not hasattr(trunk, "forward_intermediates"):
            raise ValueError(f"{backbone}: timm's {type(trunk).__name__} offers no forward_intermediates")
        self._set_trunk(trunk, pretrained)
        self.layer = range(len(trunk.feature_info))[layer]
        info = trunk.feature_info[layer]
        if hasattr(trunk, "prune_intermediate_layers"):  # later blocks would never get gradients
            trunk.prune_intermediate_layers([self.layer], prune_norm=True, prune_head=True)
        self.stride, self.num_features = info["reduction"], info["num_chs"]

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [B, 3, H, W] -> grid [B, num_features, ceil(H / stride), ceil(W / stride)]."""
        maps = self.trunk.forward_intermediates(
            self.pad(pixels), indices=[self.layer], output_fmt="NCHW", intermediates_only=True
        )
        return maps[0]
