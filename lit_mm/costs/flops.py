"""What a model costs, from shapes alone: FLOPs, parameters, bytes of weights and of the KV cache.

A multiply-add is 2 FLOPs. Counted are convolutions, linear maps and the two products of attention;
not counted are norms, activations, softmax, rotations, embeddings and pooling, which are no matrix
products and far below 1 % of any model that this package builds.

**Attention** is counted by the pairs of a query and a key that it sees, (n² + n) / 2 for n causal
tokens: what is needed, and what a good kernel computes. `torch.utils.flop_counter.FlopCounterMode`
counts all n² whatever the mask is. Functions that take `pairs` give either: pass `causal_pairs(n)`
for what is needed and n² for what the counter says. A ViT's attention needs all pairs.

**Training.** A linear map costs its forward FLOPs once more where its weight trains, and once more
where something before it trains, so that a gradient must flow on through it; attention, having two
products of two activations each, costs twice its forward FLOPs in the backward pass. Flash attention
computes its scores again there, half of its forward FLOPs, which is not counted. What activation
checkpointing computes again is given apart, as `recompute`; it is no part of `training`.

All figures are Python ints that need no device: `Costs.step` may be asked in every training step.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, cast

import torch
from timm.layers import Attention, Conv2dSame
from timm.models.vision_transformer import Block as ViTBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_mm.costs.counts import counts_of
from lit_mm.model.attention import Segment, causal_pairs
from lit_mm.model.batch import Batch
from lit_mm.model.encoder import ConvNeXtEncoder, Encoder, TimmEncoder
from lit_mm.model.llm import packing_of
from lit_mm.model.vlm import MatryoshkaVLM

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one thing.

    Args:
        forward: Of the forward pass.
        backward: Of the backward pass.
        recompute: Of what checkpointing computes again in the backward pass.
    """

    forward: int = 0
    backward: int = 0
    recompute: int = 0

    @property
    def training(self) -> int:
        """Forward and backward, without what is computed again."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    def __mul__(self, count: int) -> Flops:
        return Flops(self.forward * count, self.backward * count, self.recompute * count)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs by part of the model; the head is the LLM's output head, on the positions with a label."""

    encoder: Flops = Flops()
    projector: Flops = Flops()
    llm: Flops = Flops()
    head: Flops = Flops()

    @property
    def total(self) -> Flops:
        """Of all parts."""
        return self.encoder + self.projector + self.llm + self.head

    def __add__(self, other: ModelFlops) -> ModelFlops:
        return ModelFlops(
            self.encoder + other.encoder,
            self.projector + other.projector,
            self.llm + other.llm,
            self.head + other.head,
        )

    def __mul__(self, count: int) -> ModelFlops:
        return ModelFlops(self.encoder * count, self.projector * count, self.llm * count, self.head * count)


@dataclass(frozen=True)
class Parameters:
    """Distinct parameters of a part, a tied head counted once.

    Args:
        total: All.
        training: Those that train.
    """

    total: int
    training: int

    @classmethod
    def of(cls, *modules: nn.Module) -> Parameters:
        """Of some modules together."""
        distinct = {id(p): p for module in modules for p in module.parameters()}.values()
        return cls(sum(p.numel() for p in distinct), sum(p.numel() for p in distinct if p.requires_grad))


@dataclass(frozen=True)
class Answer:
    """What one answer costs at a scale, by greedy generation with a KV cache.

    Args:
        visual_tokens: The images' tokens.
        prompt_tokens: Those and the text's.
        prefill: Forward FLOPs until the first new token; the head runs at the last position only.
        decode: FLOPs of all further new tokens together.
        further: How many these are.
        cache: Bytes of keys and values after the prompt.
    """

    visual_tokens: int
    prompt_tokens: int
    prefill: ModelFlops
    decode: int
    further: int
    cache: int

    @property
    def total(self) -> int:
        """FLOPs of the answer."""
        return self.prefill.total.forward + self.decode

    @property
    def decode_per_token(self) -> float:
        """Mean over the further tokens, 0 without any."""
        return self.decode / self.further if self.further else 0.0


def nested_segments(prefix: int, text: int, scales: Sequence[int]) -> list[Segment]:
    """The segments of a packed sequence of one sample with one image: `prefix` tokens, then per scale the
    image's tokens and `text` tokens."""
    segments, end = ([Segment(0, 0, 0, prefix)] if prefix else []), prefix
    for scale in scales:
        segments.append(Segment(0, prefix, end, scale + text))
        end += scale + text
    return segments


class Costs:
    """Costs of one model. Nothing is run, and what an image of one size costs is worked out once."""

    def __init__(self, vlm: MatryoshkaVLM, checkpointed: Collection[Literal["encoder", "llm"]] = ()) -> None:
        """Look at the model's structure; its weights are neither read nor kept.

        Args:
            vlm: The model, on any device, `meta` included; what does not train is frozen already
                (`requires_grad`), and nothing is sharded yet.
            checkpointed: Parts whose blocks are computed again in the backward pass (without
                reentrance, as timm and transformers do by default).

        Raises:
            ValueError: The LLM is none of those that this package packs: it may have windows,
                experts or states, whose costs are not known here.
        """
        self.encoder = on_meta(vlm.encoder)  # asked again for every new size of images
        self.scales, self.checkpointed = vlm.projector.scales, frozenset(checkpointed)
        self.projector = [_walked([layer], (1, 1))[0] for layer in vlm.projector.layers]
        self.language = LanguageCosts(vlm.llm, "llm" in self.checkpointed)
        self.parameters = {part: Parameters.of(getattr(vlm, part)) for part in ("encoder", "projector", "llm")}
        self.known: dict[Size, ModelFlops] = {}

    @classmethod
    def if_known(cls, vlm: MatryoshkaVLM, checkpointed: Collection[Literal["encoder", "llm"]] = ()) -> Costs | None:
        """Of a model, or None for an LLM whose costs are not known here."""
        try:
            return cls(vlm, checkpointed)
        except ValueError:
            return None

    def image(self, size: Size) -> ModelFlops:
        """Encoder and projector on one image, whose sides are padded up to the stride.

        Raises:
            ValueError: The backbone takes images of another size only.
        """
        if size not in self.known:
            fixed, cell = tuple(self.encoder.smallest), (self.encoder.stride, self.encoder.stride)
            if fixed not in (cell, size):
                raise ValueError(f"the encoder takes images of {fixed[0]}×{fixed[1]} only, found {size[0]}×{size[1]}")
            rows, columns = self.encoder.grid(*size)
            projector = total_of(self.projector, self.parameters["encoder"].training > 0) * (rows * columns)
            flops = encoder_flops(self.encoder, size, "encoder" in self.checkpointed)
            self.known[size] = ModelFlops(flops, projector)
        return self.known[size]

    def images(self, groups: Iterable[tuple[int, Size]]) -> ModelFlops:
        """Encoder and projector on groups of images: how many of which size."""
        return sum((self.image(size) * count for count, size in groups), ModelFlops())

    def text(self, tokens: int, pairs: int, labels: int, visual: bool = True) -> ModelFlops:
        """The LLM on so many tokens, and its head on so many of them.

        Args:
            tokens: Positions, visual ones included.
            pairs: Pairs of a query and a key that it sees: see above.
            labels: Positions at which logits are computed.
            visual: Whether some tokens are visual. If the encoder or the projector trains, a gradient
                then flows through the whole LLM, frozen or not.
        """
        trains = self.parameters["encoder"].training + self.parameters["projector"].training
        return self.language.flops(tokens, pairs, labels, visual and trains > 0)

    def row(self, segments: Sequence[Segment], labels: int) -> ModelFlops:
        """A packed sequence, without its images."""
        return self.text(sum(s.length for s in segments), sum(s.pairs for s in segments), labels)

    def step(self, batch: Batch, encodings: int = 0) -> ModelFlops:
        """Forward and backward pass of a training step on one rank, without the optimizer's.

        Only shapes and `Batch.counts` are read, no device is asked. Padding is not counted.

        Args:
            batch: The batch; one that is not packed (`model.packing: padded`) must be counted, or on the CPU.
            encodings: As in `MatryoshkaVLM.forward`: how often the encoder runs at least.
        """
        groups = [(len(group), cast(Size, tuple(group.shape[-2:]))) for group in batch.images.groups]
        blank = cast(Size, tuple(self.encoder.smallest))
        runs = [(len(own.input_ids), own.counts.pairs, len(own.labels)) for own in batch.packed]
        if not runs:
            counts = batch.counts or counts_of(batch, self.scales)
            runs = [(counts.text + counts.visual, counts.pairs, counts.labels)]
        texts = sum((self.text(*run, visual=len(groups) > 0) for run in runs), ModelFlops())
        if len(batch.packed) > 1 and texts.llm.backward:  # the vlm computes the LLM's activations anew, row after row
            texts = replace(texts, llm=replace(texts.llm, recompute=texts.llm.recompute + texts.llm.forward))
        return texts + self.images([*groups, (max(0, encodings - len(groups)), blank)])

    def answer(
        self,
        size: Size,
        visual: int,
        text: int,
        new_tokens: int = 1,
        images: int = 1,
        width: int = 2,
    ) -> Answer:
        """One answer of `new_tokens` tokens to a prompt of `text` tokens with images.

        Args:
            size: The images'.
            visual: Tokens of all images together.
            text: Tokens of the prompt beside those.
            new_tokens: Tokens of the answer, at least 1.
            images: How many images, or frames of a video, are encoded; 0: the prompt without.
            width: Bytes of a number in the KV cache.
        """
        prompt, further = visual + text, new_tokens - 1
        decode = self.text(further, causal_pairs(further, before=prompt), further).total.forward
        prefill = self.images([(images, size)]) + self.text(prompt, causal_pairs(prompt), 1)
        return Answer(visual, prompt, prefill, decode, further, prompt * self.language.cached * width)


class LanguageCosts:
    """The LLM's FLOPs: so many per token, per pair of attention, per position with logits.

    Attributes:
        cached: Numbers that a token leaves in the KV cache.
    """

    def __init__(self, llm: Any, checkpointed: bool) -> None:
        """Read a causal LM of transformers. Adapters inside its layers, such as LoRA's, count too.

        Raises:
            ValueError: It is none of those that are packed.
        """
        config = llm.config.get_text_config(decoder=True)
        if packing_of(config, "auto") == "padded":
            raise ValueError(
                f"costs of {config.model_type} with these layers are not known: expected an LLM that can be packed, "
                "each layer of which attends to all that precedes"
            )
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.cached = 2 * config.num_hidden_layers * kv_heads * head_size
        layers = [_decoder_layer(layer, checkpointed) for layer in llm.base_model.layers]
        pairs = [Block(attention=4 * heads * head_size, trains=b.trains, checkpointed=checkpointed) for b in layers]
        head, _ = _walked([llm.get_output_embeddings()], (1, 1))
        embeddings_train, trains = _trains(llm.get_input_embeddings()), _trains(llm.base_model)
        self.rates = {
            gradient: (
                total_of(layers, gradient or embeddings_train),
                total_of(pairs, gradient or embeddings_train),
                total_of([head], gradient or trains),
            )
            for gradient in (False, True)
        }

    def flops(self, tokens: int, pairs: int, labels: int, gradient: bool) -> ModelFlops:
        """As `Costs.text`; `gradient`: whether the embeddings have one, because of visual tokens."""
        token, pair, label = self.rates[gradient]
        return ModelFlops(llm=token * tokens + pair * pairs, head=label * labels)


@dataclass(frozen=True)
class Block:
    """What checkpointing computes again as a whole, or any other piece of a network.

    Args:
        linear: Forward FLOPs of convolutions and linear maps.
        trained: Of those, whose weights train.
        enters: Of those, what only passes a gradient on if one is needed before the block: all
            until the first parameter that trains.
        last: Of those, the last map, if nothing behind it in the block needs what it computes:
            checkpointing stops before it.
        attention: Forward FLOPs of attention.
        trains: Whether any of its parameters trains.
        checkpointed: Whether it is computed again in the backward pass.
    """

    linear: int = 0
    trained: int = 0
    enters: int = 0
    last: int = 0
    attention: int = 0
    trains: bool = False
    checkpointed: bool = False

    def flops(self, gradient: bool) -> Flops:
        """Its FLOPs; `gradient`: whether something before it trains."""
        forward = self.linear + self.attention
        if not (gradient or self.trains):
            return Flops(forward)
        passed = self.linear + 2 * self.attention - (0 if gradient else self.enters)
        return Flops(forward, self.trained + passed, (forward - self.last) * self.checkpointed)


def total_of(blocks: Iterable[Block], gradient: bool = False) -> Flops:
    """FLOPs of blocks one after another; `gradient`: whether something before them trains."""
    total = Flops()
    for block in blocks:
        total += block.flops(gradient)
        gradient = gradient or block.trains
    return total


def on_meta(module: Any) -> Any:
    """A copy without weights: the same structure, every parameter and buffer on `meta`."""
    copies: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    copies |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, copies)


def encoder_flops(encoder: Encoder, size: Size, checkpointed: bool = False) -> Flops:
    """An encoder on one image, whose sides are padded up to the stride.

    ConvNeXt and plain ViT are worked out from their layers. Any other backbone must be on `meta`:
    torch counts its operators there.
    """
    height, width = (side + -side % encoder.stride for side in size)
    if isinstance(encoder, ConvNeXtEncoder):
        return total_of(_convnext(encoder.trunk, (height, width), checkpointed))
    if isinstance(encoder, TimmEncoder) and _is_plain_vit(encoder.trunk):
        depth = range(len(encoder.trunk.blocks))[encoder.layer] + 1
        return total_of(_vit(encoder.trunk, depth, (height, width), checkpointed))
    flops = counted(encoder, (height, width))
    if checkpointed:
        encoder.set_grad_checkpointing()
        again = counted(encoder, (height, width))
        encoder.set_grad_checkpointing(False)
        flops = replace(flops, recompute=again.backward - flops.backward)
    return flops


@torch.inference_mode(False)  # whoever asks: what is found once is kept for training
@torch.enable_grad()
def counted(encoder: Encoder, size: Size) -> Flops:
    """An encoder on `meta` on one image, as torch counts its operators."""
    pixels = torch.empty(1, 3, *size, device="meta", dtype=next(encoder.parameters()).dtype)
    with FlopCounterMode(display=False) as forward:
        grid = encoder(pixels)
    if not grid.requires_grad:
        return Flops(forward.get_total_flops())
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as backward:
        grid.sum().backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def convolution_backward(
    output: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Any
) -> int:
    """FLOPs of a convolution's backward pass: for each gradient wanted as many as forward.

    For FlopCounterMode, whose own formula (torch 2.15) counts a depthwise convolution's gradient of
    the weights as if every channel met every other one.
    """
    transposed, wanted = others[4], others[7]
    cells = inputs[2:] if transposed else output[2:]
    return 2 * output[0] * prod(cells) * prod(weight) * sum(wanted[:2])


GROUPED = {torch.ops.aten.convolution_backward: convolution_backward}


def _convnext(trunk: Any, size: Size, checkpointed: bool) -> Iterator[Block]:
    """The stem, then each stage's downsampling and blocks."""
    stem, size = _walked(_inside(trunk.stem), size)
    yield stem
    for stage in trunk.stages:
        downsample, size = _walked(_inside(stage.downsample), size)
        yield downsample
        for layer in stage.blocks:
            block, size = _walked(_inside(layer), size)
            scaled = layer.gamma is not None or not isinstance(layer.drop_path, nn.Identity)
            yield replace(block, last=0 if scaled else block.last, checkpointed=checkpointed)


def _is_plain_vit(trunk: Any) -> bool:
    return type(trunk) is VisionTransformer and all(
        type(block) is ViTBlock and type(block.attn) is Attention for block in trunk.blocks
    )


def _vit(trunk: Any, depth: int, size: Size, checkpointed: bool) -> Iterator[Block]:
    """The patch embedding, then the blocks that run; every token attends to all."""
    stem, (rows, columns) = _walked(_inside(trunk.patch_embed), size)
    tokens = rows * columns + trunk.num_prefix_tokens
    added = [trunk.cls_token, trunk.reg_token, trunk.pos_embed, *trunk.norm_pre.parameters()]
    yield replace(stem, trains=stem.trains or any(p is not None and p.requires_grad for p in added))
    for layer in trunk.blocks[:depth]:
        block, _ = _walked(_inside(layer), (tokens, 1))
        scaled = any(not isinstance(behind, nn.Identity) for behind in (layer.ls2, layer.drop_path2))
        attention = 4 * tokens**2 * layer.attn.attn_dim
        yield replace(block, attention=attention, last=0 if scaled else block.last, checkpointed=checkpointed)


READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
"""What reads a decoder layer's input, behind its norm if there is one."""


def _decoder_layer(layer: nn.Module, checkpointed: bool) -> Block:
    """A layer of the LLM on one token, without attention."""
    block, _ = _walked(_inside(layer), (1, 1))
    norms = [norm for name, norm in layer.named_children() if name == "input_layernorm"]
    if any(_trains(norm) for norm in norms):
        enters = 0
    else:
        readers = [module for name, module in layer.named_modules() if name.endswith(READERS)]
        enters = sum(_walked(_inside(module), (1, 1))[0].enters for module in readers)
    scaled = hasattr(layer, "post_feedforward_layernorm")
    return replace(block, enters=enters, last=0 if scaled else block.last, checkpointed=checkpointed)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _inside(module: nn.Module) -> list[nn.Module]:
    """All modules in order, the module's own parameters (ConvNeXt's layer scale) last."""
    return [*list(module.modules())[1:], module]


def _walked(modules: Iterable[nn.Module], size: Size) -> tuple[Block, Size]:
    """Convolutions, and linear maps of every cell, one after another on a map of this size; the size
    behind them."""
    linear = trained = enters = last = 0
    trains = False
    for module in modules:
        if isinstance(module, nn.Conv2d):
            size = _size_after(module, size)
        own = [p.requires_grad for p in module.parameters(recurse=False)]
        if isinstance(module, nn.Conv2d | nn.Linear):
            last = 2 * size[0] * size[1] * _weights_of(module)
            linear, trained = linear + last, trained + last * module.weight.requires_grad
            enters += last * (not trains)
        trains = trains or any(own)
    return Block(linear, trained, enters, last, trains=trains), size


def _weights_of(layer: nn.Conv2d | nn.Linear) -> int:
    """Those of a linear map by its widths: quantized weights are packed."""
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()


def _size_after(layer: nn.Conv2d, size: Size) -> Size:
    if isinstance(layer, Conv2dSame):
        return cast(Size, tuple(-(-side // step) for side, step in zip(size, layer.stride, strict=True)))
    each = zip(size, cast(Size, layer.padding), layer.dilation, layer.kernel_size, layer.stride, strict=True)
    return cast(Size, tuple((side + 2 * pad - far * (k - 1) - 1) // step + 1 for side, pad, far, k, step in each))
