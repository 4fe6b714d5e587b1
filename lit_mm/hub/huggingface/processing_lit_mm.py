"""Images and text -> what an exported model takes: pixels of the right size, and one `<image>` per visual token."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin

from lit_mm.data.pixels import ImageOptions, filled, to_pixels, upright_rgb


class LitMMImagesKwargs(ImagesKwargs, total=False):
    """Options of a call.

    Args:
        num_visual_tokens: One of the model's scales; None: the finest.
    """

    num_visual_tokens: int | None


class LitMMImageProcessor(BaseImageProcessor):
    """Brings images to size as in training.

    Args:
        scales: Visual tokens per image, finest first.
        image_options: Fields of `ImageOptions`.
        image_mean: Of each channel, for values in 0..1.
        image_std: Likewise.
        kwargs: transformers' own.
    """

    valid_kwargs = LitMMImagesKwargs
    model_input_names = ["pixel_values", "image_sizes", "visual_tokens"]  # noqa: RUF012

    def __init__(
        self,
        scales: Sequence[int] = (1,),
        image_options: dict[str, Any] | None = None,
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scales, self.image_options = list(scales), dict(image_options or {})
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def tokens(self, num_visual_tokens: int | None) -> int:
        """The visual tokens of an image.

        Raises:
            ValueError: The model has no such scale.
        """
        if num_visual_tokens is None:
            return self.scales[0]
        if num_visual_tokens not in self.scales:
            raise ValueError(f"num_visual_tokens {num_visual_tokens}: expected one of the model's {self.scales}")
        return num_visual_tokens

    def preprocess(
        self, images: Any, num_visual_tokens: int | None = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Images -> pixel_values [n, 3, H, W], normalized and padded to the largest of them; image_sizes [n, 2] without
        that; visual_tokens [n].

        Args:
            images: PIL images, or uint8 arrays or tensors, nested as transformers allows.
            num_visual_tokens: One of the model's scales; None: the finest.
            return_tensors: pt, or None for the same.
            kwargs: Not used.

        Raises:
            ValueError: The model has no such scale, or an image has too many pixels or values of unknown range (such as
                an array of another type than uint8).
        """
        tokens = self.tokens(num_visual_tokens)
        pixels = [self._pixels(image) for image in cast(Any, make_flat_list_of_images(images))]
        sizes = torch.tensor([each.shape[-2:] for each in pixels])
        height, width = sizes.amax(0).tolist()
        padded = [F.pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2])) for each in pixels]
        made = {"pixel_values": torch.stack(padded), "image_sizes": sizes}
        return BatchFeature(made | {"visual_tokens": torch.tensor([tokens] * len(pixels))}, return_tensors)

    def _pixels(self, image: Any) -> Tensor:
        """Normalized pixels [3, H, W] of an image."""
        upright, options = upright_rgb(_opened(image)), ImageOptions(**self.image_options)
        shape, pads = (upright.height, upright.width), options.mode == "pad"
        target = options.target(*shape)
        if max(prod(filled(*shape, target) if pads else shape), prod(target)) > options.max_pixels:
            raise ValueError(
                f"an image of {shape[0]}×{shape[1]} pixels: the limit is {options.max_pixels} once resized"
            )
        red, green, blue = (int(255 * value) for value in self.image_mean)
        pixels = to_pixels(upright, target, (red, green, blue) if pads else None)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (pixels.float() / 255 - mean) / std


def _opened(image: Any) -> Image.Image:
    """A PIL image, or a uint8 array or tensor as one.

    Raises:
        ValueError: It is an array of another type, which does not say whether white is 1 or 255.
    """
    if isinstance(image, Image.Image):
        return image
    if (found := str(image.dtype).removeprefix("torch.")) != "uint8":
        raise ValueError(f"an image is an array of {found}: expected uint8, in which white is 255")
    return to_pil_image(image, do_rescale=False)


class LitMMProcessor(ProcessorMixin):
    """Tokenizer and image processor: `<image>` in a text becomes as many as the image has visual tokens.

    Args:
        image_processor: Brings images to size.
        tokenizer: Knows `<image>` as a token of its own.
        chat_template: The tokenizer's.
    """

    image_token = "<image>"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """What stands for an image in the text."""
        return self.image_token * int(image_inputs["visual_tokens"][image_idx])

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Any] | None = None, num_visual_tokens: int | None = None, **kwargs: Any
    ) -> MultiModalData:
        """What vLLM asks before it has images: tokens and patches of each, by their sizes."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        tokens = [self.image_processor.tokens(num_visual_tokens)] * count
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * count)
