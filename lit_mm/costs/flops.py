"""What a model costs, from shapes alone: FLOPs, parameters, bytes of weights and of the KV cache.

A multiply-add is 2 FLOPs. Convolutions, linear maps and attention's two matrix products are counted.
Norms, activations, softmax, rotary embeddings, embeddings and pooling are not: they are no matrix
products and take far less than 1 % of any model that this package builds.

**Attention** is counted by the number of (query, key) pairs, (n² + n) / 2 for n causal tokens: what is
needed, and what a good kernel computes. `torch.utils.flop_counter.FlopCounterMode` counts all n²,
whatever the mask. Functions that take `pairs` support both: pass `causal_pairs(n)` for what is needed,
or n² for what the counter reports. A ViT's attention needs all pairs.

**Training.** The backward pass of a linear map costs its forward FLOPs once if its weight trains, and
once more if a gradient must flow through it to something that trains. Attention multiplies activations
with activations, so its backward pass costs twice its forward FLOPs; flash attention also recomputes its
scores there (half of the forward FLOPs), which is not counted. Recomputation by activation checkpointing
is given separately as `recompute` and is not part of `training`.

All figures are Python ints that need no device, so `Costs.step` can be called in every training step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from operator import add
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_mm.costs.counts import counts_of
from lit_mm.model.attention import Segment, causal_pairs
from lit_mm.model.batch import Batch
from lit_mm.model.encoder import ConvNeXtEncoder, Encoder
from lit_mm.model.llm import packing_of
from lit_mm.model.vlm import MatryoshkaVLM

Size = tuple[int, int]
"""Height and width."""


class Summed:
    """Dataclasses that are added, and multiplied by a number, field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(add, vars(self).values(), vars(other).values()))

    def __mul__(self, count: int) -> Self:
        return type(self)(*(value * count for value in vars(self).values()))


@dataclass(frozen=True)
class Flops(Summed):
    """FLOPs of some computation.

    Args:
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass, without recomputation.
        recompute: FLOPs of the recomputation by activation checkpointing.
    """

    forward: int = 0
    backward: int = 0
    recompute: int = 0

    @property
    def training(self) -> int:
        """Forward and backward, without recomputation."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ModelFlops(Summed):
    """FLOPs by part of the model; `head` is the LLM's output head, which runs on positions with a label."""

    encoder: Flops = Flops()
    projector: Flops = Flops()
    llm: Flops = Flops()
    head: Flops = Flops()

    @property
    def total(self) -> Flops:
        """The sum over all parts."""
        return self.encoder + self.projector + self.llm + self.head


@dataclass(frozen=True)
class AnswerCost:
    """Cost of one answer at a scale, with greedy decoding and a KV cache.

    Args:
        visual_tokens: Tokens of the images.
        prompt_tokens: Tokens of images and text.
        prefill: FLOPs until the first new token; the head runs at the last position only.
        decode: FLOPs of all further new tokens together.
        further: Number of further new tokens.
        cache: Bytes of the KV cache after the prompt.
    """

    visual_tokens: int
    prompt_tokens: int
    prefill: ModelFlops
    decode: int
    further: int
    cache: int

    @property
    def total(self) -> int:
        """FLOPs of the whole answer."""
        return self.prefill.total.forward + self.decode

    @property
    def decode_per_token(self) -> float:
        """Mean FLOPs of a further token; 0 if there are none."""
        return self.decode / self.further if self.further else 0.0


def nested_segments(prefix: int, text: int, scales: Sequence[int]) -> list[Segment]:
    """Segments of a packed sequence with one sample and one image: `prefix` tokens, then for each scale the
    image's tokens and `text` tokens."""
    segments, end = ([Segment(0, 0, 0, prefix)] if prefix else []), prefix
    for scale in scales:
        segments.append(Segment(0, prefix, end, scale + text))
        end += scale + text
    return segments


class Costs:
    """Costs of one model. Nothing runs on real data, and each image size is worked out once."""

    def __init__(self, vlm: MatryoshkaVLM, checkpointed: Collection[Literal["encoder", "llm"]] = ()) -> None:
        """Read the model's structure; its weights are neither read nor kept.

        Args:
            vlm: The model, on any device including `meta`. Frozen parts must already be frozen
                (`requires_grad`), and nothing may be sharded yet.
            checkpointed: Parts with activation checkpointing (non-reentrant, the default of timm and
                transformers).

        Raises:
            ValueError: This package cannot pack the LLM: it may have attention windows, experts or
                recurrent states, whose costs are not known here.
        """
        self.language = LanguageCosts(vlm.llm, "llm" in checkpointed)
        self.encoding = EncoderCosts(vlm.encoder, "encoder" in checkpointed)
        self.encoder, self.scales = self.encoding.encoder, vlm.projector.scales
        self.parameters = {part: count_parameters(getattr(vlm, part)) for part in ("encoder", "projector", "llm")}
        encoder, projector = (count_parameters(part, trained=True) > 0 for part in (vlm.encoder, vlm.projector))
        self.visual_trains = encoder or projector
        layers = on_meta(vlm.projector.layers)
        self.projector = counted(layers, 1, vlm.encoder.num_features, gradient=encoder).linear

    @classmethod
    def if_known(cls, vlm: MatryoshkaVLM, checkpointed: Collection[Literal["encoder", "llm"]] = ()) -> Costs | None:
        """The model's costs, or None if its LLM's costs are not known."""
        try:
            return cls(vlm, checkpointed)
        except ValueError:
            return None

    def image(self, size: Size) -> ModelFlops:
        """Encoder and projector on one image, with its sides padded to a multiple of the stride.

        Raises:
            ValueError: The backbone takes only images of one other size.
        """
        fixed, cell = tuple(self.encoder.smallest), (self.encoder.stride, self.encoder.stride)
        if fixed not in (cell, size):
            raise ValueError(f"the encoder takes images of {fixed[0]}×{fixed[1]} only, found {size[0]}×{size[1]}")
        return ModelFlops(self.encoding.image(size), self.projector * prod(self.encoder.grid(*size)))

    def images(self, groups: Iterable[tuple[int, Size]]) -> ModelFlops:
        """Encoder and projector on groups of images, given as (number, size)."""
        return sum((self.image(size) * count for count, size in groups), ModelFlops())

    def text(self, tokens: int, pairs: int, labels: int, visual: bool = True) -> ModelFlops:
        """The LLM and its head.

        Args:
            tokens: Positions, including visual ones.
            pairs: (query, key) pairs of attention; see the top of this file.
            labels: Positions at which logits are computed.
            visual: Whether some tokens are visual. If so, and if the encoder or projector trains, a gradient
                flows through the whole LLM even if it is frozen.
        """
        return self.language.flops(tokens, pairs, labels, visual and self.visual_trains)

    def sequence(self, segments: Sequence[Segment], labels: int) -> ModelFlops:
        """The LLM on a packed sequence, without encoding its images."""
        return self.text(sum(s.length for s in segments), sum(s.pairs for s in segments), labels)

    def step(self, batch: Batch) -> ModelFlops:
        """Forward and backward pass of one training step on one rank, without the optimizer.

        Reads shapes and `Batch.counts` only, so it never waits for a device. Padding is not counted.

        Args:
            batch: The batch. With `model.packing: padded` it must have counts or be on the CPU.
        """
        groups = [(len(group), cast(Size, tuple(group.shape[-2:]))) for group in batch.images.groups]
        runs = [(len(own.input_ids), own.counts.pairs, len(own.labels)) for own in batch.packed]
        if not runs:
            counts = batch.counts or counts_of(batch, self.scales)
            runs = [(counts.text + counts.visual, counts.pairs, counts.labels)]
        texts = sum((self.text(*run, visual=len(groups) > 0) for run in runs), ModelFlops())
        if len(batch.packed) > 1 and texts.llm.backward:  # then MatryoshkaVLM checkpoints the LLM, sequence by sequence
            texts = replace(texts, llm=replace(texts.llm, recompute=texts.llm.recompute + texts.llm.forward))
        return texts + self.images(groups)

    def answer(
        self,
        size: Size,
        visual: int,
        text: int,
        new_tokens: int = 1,
        images: int = 1,
        width: int = 2,
    ) -> AnswerCost:
        """One answer of `new_tokens` tokens to a prompt of `text` tokens with images.

        Args:
            size: Height and width of the images.
            visual: Visual tokens of all images together.
            text: Text tokens of the prompt.
            new_tokens: Tokens of the answer, at least 1.
            images: Number of images or video frames to encode; 0 for a prompt without.
            width: Bytes per number in the KV cache.
        """
        prompt, further = visual + text, new_tokens - 1
        decode = self.text(further, causal_pairs(further, before=prompt), further).total.forward
        prefill = self.images([(images, size)]) + self.text(prompt, causal_pairs(prompt), 1)
        return AnswerCost(visual, prompt, prefill, decode, further, prompt * self.language.cached * width)


class EncoderCosts:
    """The encoder's FLOPs by image size.

    torch counts the operators of a run on `meta`. A ConvNeXt does the same work for every grid cell, so it
    runs on one cell only; any other backbone runs once per size.
    """

    def __init__(self, encoder: Encoder, checkpointed: bool) -> None:
        self.encoder, self.checkpointed = on_meta(encoder), checkpointed
        if checkpointed:
            self.encoder.set_grad_checkpointing(False)
        self.known: dict[Size, Flops] = {}

    def image(self, size: Size) -> Flops:
        """FLOPs of one image, with its sides padded to a multiple of the stride."""
        rows, columns = self.encoder.grid(*size)
        if isinstance(self.encoder, ConvNeXtEncoder):
            return self._counted(1, 1) * (rows * columns)
        return self._counted(rows, columns)

    def _counted(self, rows: int, columns: int) -> Flops:
        if (rows, columns) not in self.known:
            shape = 1, 3, rows * self.encoder.stride, columns * self.encoder.stride
            plain, again = sum(counted(self.encoder, *shape), Flops()), Flops()
            if self.checkpointed:
                self.encoder.set_grad_checkpointing()
                again = sum(counted(self.encoder, *shape), Flops())
                self.encoder.set_grad_checkpointing(False)
            self.known[rows, columns] = with_recompute(plain, again)
        return self.known[rows, columns]


class LanguageCosts:
    """The LLM's FLOPs per token, per attention pair and per position with logits.

    Attributes:
        cached: Numbers per token in the KV cache.
    """

    def __init__(self, llm: Any, checkpointed: bool) -> None:
        """Read a causal LM of transformers. Adapters in its layers, such as LoRA's, are included.

        Raises:
            ValueError: This package cannot pack the LLM.
        """
        config = llm.config.get_text_config(decoder=True)
        if packing_of(config, "auto") == "padded":
            raise ValueError(
                f"costs of {config.model_type} with these layers are not known: expected an LLM that can be packed, "
                "in which every layer attends to all previous tokens"
            )
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.cached = 2 * config.num_hidden_layers * kv_heads * head_size
        self.llm, self.checkpointed = on_meta(llm), checkpointed
        if checkpointed:
            enable = getattr(self.llm, "activation_checkpointing_enable", self.llm.gradient_checkpointing_enable)
            enable({"use_reentrant": False})  # the first is transformers' newer name
        self.rates: dict[bool, tuple[Flops, Flops, Flops]] = {}

    def flops(self, tokens: int, pairs: int, labels: int, gradient: bool) -> ModelFlops:
        """As `Costs.text`; `gradient`: whether the input embeddings need one because of visual tokens."""
        if gradient not in self.rates:
            self.rates[gradient] = self._rates(gradient)
        token, pair, label = self.rates[gradient]
        return ModelFlops(llm=token * tokens + pair * pairs, head=label * labels)

    def _rates(self, gradient: bool) -> tuple[Flops, Flops, Flops]:
        """FLOPs per token, per pair and per position with logits."""
        embeddings, head = self.llm.get_input_embeddings(), self.llm.get_output_embeddings()
        width, gradient = embeddings.embedding_dim, gradient or embeddings.weight.requires_grad

        def hidden(inputs: Tensor, recompute: bool = False) -> Tensor:
            for layer in self.llm.base_model.layers:
                layer.training = recompute  # transformers recomputes in training mode only
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta")  # 4-D masks are used as they are
            return self.llm.base_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state

        plain, again = counted(hidden, 1, 1, width, gradient=gradient), Counted()
        if self.checkpointed:
            again = counted(partial(hidden, recompute=True), 1, 1, width, gradient=gradient)
        token, pair = (with_recompute(*each) for each in zip(plain, again, strict=True))
        trains = gradient or any(p.requires_grad for p in self.llm.base_model.parameters())
        return token, pair, counted(head, 1, 1, width, gradient=trains).linear


def count_parameters(module: nn.Module, trained: bool = False) -> int:
    """Number of parameters, or of those that train, over all ranks if sharded. A tied head counts once, and a
    quantized weight as the numbers it stands for: bitsandbytes packs two into a byte."""
    counted = [parameter for parameter in module.parameters() if parameter.requires_grad or not trained]
    shapes = [getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape) for parameter in counted]
    return sum(shape.numel() for shape in shapes)


@torch.inference_mode(False)
def on_meta(module: Any) -> Any:
    """A copy without weights: the same structure in float32, every parameter and buffer on `meta`."""

    def empty(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        made = torch.empty_like(tensor, device="meta", dtype=dtype, requires_grad=False)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    plain = {}
    for each in module.modules():
        if isinstance(each, nn.Linear) and not each.weight.is_floating_point():  # quantized: its weight may be packed
            layer = nn.Linear(each.in_features, each.out_features, each.bias is not None, device="meta")
            plain[id(each)] = layer.requires_grad_(False)
    return copied(module, empty, plain)[0]


def copied(module: Any, of: Callable[[Tensor], Tensor], modules: Mapping[int, Any] | None = None) -> tuple[Any, dict]:
    """A deep copy with other parameters and buffers.

    Args:
        module: The original.
        of: Makes the copy of a parameter or buffer.
        modules: id of a submodule -> what replaces it.

    Returns:
        The copy, and id -> copy of everything in the original.
    """
    copies: dict[int, Any] = {id(tensor): of(tensor) for tensor in chain(module.parameters(), module.buffers())}
    copies |= modules or {}
    return copy.deepcopy(module, copies), copies


class Counted(NamedTuple):
    """FLOPs of linear maps and convolutions, and FLOPs of attention."""

    linear: Flops = Flops()
    attention: Flops = Flops()


@torch.inference_mode(False)  # also when called in validation: results are cached and reused in training
@torch.enable_grad()
def counted(run: Callable[[Tensor], Tensor], *shape: int, gradient: bool = False) -> Counted:
    """FLOPs of running something on an input on `meta` and of its backward pass, as torch counts operators.
    `gradient`: whether the input needs one."""
    inputs = torch.empty(*shape, device="meta", requires_grad=gradient)
    with FlopCounterMode(display=False) as forward:
        result = run(inputs)
    backward = FlopCounterMode(display=False, custom_mapping=GROUPED)
    if result.requires_grad:
        with backward:
            result.sum().backward()
    totals = [_of_operators(counter) for counter in (forward, backward)]
    linear = [sum(flops for operator, flops in total.items() if operator in LINEAR) for total in totals]
    return Counted(Flops(*linear), Flops(*(sum(t.values()) - own for t, own in zip(totals, linear, strict=True))))


def _of_operators(counter: FlopCounterMode) -> dict[Any, int]:
    """Operator -> FLOPs, without the products of positions and frequencies that some versions of transformers count
    among them: they are neither layers nor pairs of attention."""
    counts = counter.get_flop_counts()
    rotary = [own for module, own in counts.items() if module.endswith("rotary_emb")]
    total = counts.get("Global", {})
    return {operator: flops - sum(own.get(operator, 0) for own in rotary) for operator, flops in total.items()}


def with_recompute(plain: Flops, checkpointed: Flops) -> Flops:
    """`plain`, with the FLOPs that checkpointing adds to the backward pass as `recompute`."""
    return replace(plain, recompute=max(0, checkpointed.backward - plain.backward))


ATEN = torch.ops.aten
LINEAR = {ATEN.mm, ATEN.addmm, ATEN.convolution, ATEN.convolution_backward}


def convolution_backward(
    output: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Any
) -> int:
    """FLOPs of a convolution's backward pass: as many as forward for each gradient that is needed.

    Replaces FlopCounterMode's own formula, which (in torch 2.15) counts the weight gradient of a depthwise
    convolution as if it were dense over channels.
    """
    transposed, wanted = others[4], others[7]
    cells = inputs[2:] if transposed else output[2:]
    return 2 * output[0] * prod(cells) * prod(weight) * sum(wanted[:2])


GROUPED = {ATEN.convolution_backward: convolution_backward}
