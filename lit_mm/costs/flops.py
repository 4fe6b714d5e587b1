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
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from operator import add
from typing import Any, Literal, NamedTuple, cast

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
        return Flops(*map(add, vars(self).values(), vars(other).values()))

    def __mul__(self, count: int) -> Flops:
        return Flops(*(flops * count for flops in vars(self).values()))


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
        return ModelFlops(*map(add, vars(self).values(), vars(other).values()))

    def __mul__(self, count: int) -> ModelFlops:
        return ModelFlops(*(flops * count for flops in vars(self).values()))


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
        self.language = LanguageCosts(vlm.llm, "llm" in checkpointed)
        self.encoding = EncoderCosts(vlm.encoder, "encoder" in checkpointed)
        self.encoder, self.scales = self.encoding.encoder, vlm.projector.scales
        self.parameters = {part: Parameters.of(getattr(vlm, part)) for part in ("encoder", "projector", "llm")}
        layers, trains = on_meta(vlm.projector.layers), self.parameters["encoder"].training > 0
        self.projector = counted(layers, 1, vlm.encoder.num_features, gradient=trains).linear

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
        fixed, cell = tuple(self.encoder.smallest), (self.encoder.stride, self.encoder.stride)
        if fixed not in (cell, size):
            raise ValueError(f"the encoder takes images of {fixed[0]}×{fixed[1]} only, found {size[0]}×{size[1]}")
        return ModelFlops(self.encoding.image(size), self.projector * prod(self.encoder.grid(*size)))

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


class EncoderCosts:
    """The encoder's FLOPs by the size of an image.

    torch counts its operators on `meta`: of a ConvNeXt on one grid cell, as it computes every cell alike,
    of any other backbone on each size once.
    """

    def __init__(self, encoder: Encoder, checkpointed: bool) -> None:
        self.encoder, self.checkpointed = on_meta(encoder), checkpointed
        if checkpointed:
            self.encoder.set_grad_checkpointing(False)
        self.known: dict[Size, Flops] = {}

    def image(self, size: Size) -> Flops:
        """One image, whose sides are padded up to the stride."""
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
        self.llm, self.checkpointed = on_meta(llm), checkpointed
        if checkpointed:
            enable = getattr(self.llm, "activation_checkpointing_enable", self.llm.gradient_checkpointing_enable)
            enable({"use_reentrant": False})  # the first is transformers' newer name
        self.rates: dict[bool, tuple[Flops, Flops, Flops]] = {}

    def flops(self, tokens: int, pairs: int, labels: int, gradient: bool) -> ModelFlops:
        """As `Costs.text`; `gradient`: whether the embeddings have one, because of visual tokens."""
        if gradient not in self.rates:
            self.rates[gradient] = self._rates(gradient)
        token, pair, label = self.rates[gradient]
        return ModelFlops(llm=token * tokens + pair * pairs, head=label * labels)

    def _rates(self, gradient: bool) -> tuple[Flops, Flops, Flops]:
        """FLOPs of a token, a pair and a position with logits."""
        embeddings, head = self.llm.get_input_embeddings(), self.llm.get_output_embeddings()
        width, gradient = embeddings.embedding_dim, gradient or embeddings.weight.requires_grad

        def hidden(inputs: Tensor, recompute: bool = False) -> Tensor:
            for layer in self.llm.base_model.layers:
                layer.training = recompute  # transformers recomputes in training mode only
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta")  # of 4 dimensions: taken as it is
            return self.llm.base_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state

        plain, again = counted(hidden, 1, 1, width, gradient=gradient), Counted()
        if self.checkpointed:
            again = counted(partial(hidden, recompute=True), 1, 1, width, gradient=gradient)
        token, pair = (with_recompute(*each) for each in zip(plain, again, strict=True))
        trains = gradient or any(p.requires_grad for p in self.llm.base_model.parameters())
        return token, pair, counted(head, 1, 1, width, gradient=trains).linear


@torch.inference_mode(False)
def on_meta(module: Any) -> Any:
    """A copy without weights: the same structure in float32, every parameter and buffer on `meta`."""

    def empty(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=dtype, requires_grad=False)

    copies: dict[int, Any] = {id(p): nn.Parameter(empty(p), p.requires_grad) for p in module.parameters()}
    copies |= {id(buffer): empty(buffer) for buffer in module.buffers()}
    for each in module.modules():
        if isinstance(each, nn.Linear) and not each.weight.is_floating_point():  # quantized, perhaps packed
            plain = nn.Linear(each.in_features, each.out_features, each.bias is not None, device="meta")
            copies[id(each)] = plain.requires_grad_(False)
    return copy.deepcopy(module, copies)


class Counted(NamedTuple):
    """FLOPs of linear maps and convolutions, and of attention."""

    linear: Flops = Flops()
    attention: Flops = Flops()


@torch.inference_mode(False)  # whoever asks: what is found once is kept for training
@torch.enable_grad()
def counted(run: Callable[[Tensor], Tensor], *shape: int, gradient: bool = False) -> Counted:
    """What is run on an input on `meta`, and its backward pass, as torch counts operators; `gradient`: whether the
    input needs one."""
    inputs = torch.empty(*shape, device="meta", requires_grad=gradient)
    with FlopCounterMode(display=False) as forward:
        result = run(inputs)
    backward = FlopCounterMode(display=False, custom_mapping=GROUPED)
    if result.requires_grad:
        with backward:
            result.sum().backward()
    totals = [counter.get_flop_counts().get("Global", {}) for counter in (forward, backward)]
    linear = [sum(flops for operator, flops in total.items() if operator in LINEAR) for total in totals]
    return Counted(Flops(*linear), Flops(*(sum(t.values()) - own for t, own in zip(totals, linear, strict=True))))


def with_recompute(plain: Flops, checkpointed: Flops) -> Flops:
    """What is computed, and what checkpointing adds to it in the backward pass."""
    return replace(plain, recompute=max(0, checkpointed.backward - plain.backward))


ATEN = torch.ops.aten
LINEAR = {ATEN.mm, ATEN.addmm, ATEN.convolution, ATEN.convolution_backward}


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


GROUPED = {ATEN.convolution_backward: convolution_backward}
