"""Who sees whom in a packed sequence: attention branch by branch, without an L×L mask.

A packed sequence is cut into segments. A query attends causally to its own segment, and to all of the prefix
that its segment belongs to. Two samples, the first with an image at two scales:

                 prefix 1   branch 1a      branch 1b   text 2
    prefix 1     causal
    branch 1a    all        causal
    branch 1b    all                       causal
    text 2                                             causal

`layout_of` turns the segments into index tensors on the CPU, in the collator. `attend` is registered with
transformers' AttentionInterface and gets the layout as a keyword argument of the LLM's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lit_mm_packed"
"""Name of this attention in transformers' AttentionInterface."""

Attention = Literal["branch", "flex"]
"""How a packed sequence attends."""


class Segment(NamedTuple):
    """A prefix, a branch or a text alone, in positions of the packed sequence."""

    prefix_start: int
    prefix_length: int
    start: int
    length: int

    @property
    def pairs(self) -> int:
        """Query-key pairs that attention must compute for this segment."""
        return causal_pairs(self.length, self.prefix_length)


def causal_pairs(queries: int, before: int = 0) -> int:
    """Query-key pairs of causal attention for `queries` tokens after `before` tokens in the KV cache."""
    return queries * before + queries * (queries + 1) // 2


class Layout:
    """Which positions of a packed sequence attend to which, in the form that one mechanism needs."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        """Queries [1, heads, L, d], keys and values [1, kv heads, L, d] -> [1, L, heads, d]."""
        raise NotImplementedError


def layout_of(segments: Sequence[Segment], attention: Attention) -> Layout:
    """The index tensors of a mechanism."""
    return _flex_layout(segments) if attention == "flex" else _branch_layout(segments)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers; plain SDPA without a layout (generation).

    Raises:
        ValueError: The LLM needs a kind of attention that packed sequences do not implement.
    """
    if packed_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    unknown = ("sliding_window", "softcap", "s_aux", "position_bias")
    if asked := [name for name in unknown if others.get(name) is not None]:
        raise ValueError(
            f"packed sequences do not support {asked} of {type(module).__name__}: set model.packing to padded"
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves those that were rotated in float32
    return packed_layout.attend(query, key, value, scaling, dropout), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it a padding mask would be dropped


@dataclass
class Group:
    """Segments of similar length that share one attention call.

    Args:
        count: Number of segments.
        queries: Query slots per segment.
        keys: Key slots per segment.
        mask: [count, 1, queries, keys] True where a query attends to a key; None: plain causal
            attention, and keys and queries are the same positions.
    """

    count: int
    queries: int
    keys: int
    mask: Tensor | None


@dataclass
class Slots:
    """Positions of the packed sequence, copied into the slots of all groups' segments.

    A segment's slots hold its prefix, its own positions, and padding at the end, which causal attention
    never reaches. With prefix 0 1 and the branches 2 3 4 and 5:

        slots   0 1 2 3 4 | 0 1 5 .       home of 0 1 2 3 4 5: slots 0 1 2 3 4 7; copies: slots 5 6

    Args:
        positions: [slots] the position that each slot holds.
        home: [L] the first slot that holds each position.
        copies: [R] the other slots that hold a position of a prefix.
        copied: [R] the positions that these hold.
    """

    positions: Tensor
    home: Tensor
    copies: Tensor
    copied: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """x [1, heads, L, d] -> [slots, heads, d]."""
        return _Gather.apply(x[0].transpose(0, 1), self.positions, self.home, self.copies, self.copied)


@dataclass
class BranchLayout(Layout):
    """One plain causal attention per group of segments of similar length, on any device.

    Where the prefix is longer than the branch, only the branch's positions are queries, with a mask.

    Args:
        groups: The groups.
        queries: Slots of the queries; the output of a position is read at its home.
        keys: Slots of keys and values.
    """

    groups: list[Group]
    queries: Slots
    keys: Slots

    @torch.compiler.disable  # groups differ in number and size in every batch, and each would be compiled
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        sizes = [[g.count * g.queries for g in self.groups], [g.count * g.keys for g in self.groups]]
        queries = self.queries.gather(query).split(sizes[0])
        keys, values = (self.keys.gather(x).split(sizes[1]) for x in (key, value))
        pieces = zip(self.groups, queries, keys, values, strict=True)
        outputs = torch.cat([_attend_group(*piece, scaling, dropout) for piece in pieces])
        return _Home.apply(outputs, self.queries.home)[None]


def _attend_group(
    group: Group, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """Slots [n, heads, d] -> [n, heads, d]."""
    query, key, value = (x.unflatten(0, (group.count, -1)).transpose(1, 2) for x in (queries, keys, values))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and query.is_cuda and (group.mask is not None or query.dtype == torch.float32):
        # no fused CUDA kernel takes grouped heads in these cases: the full score matrix would be built
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=group.mask,
        is_causal=group.mask is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)


class _Gather(torch.autograd.Function):
    """x [L, …] -> x[slots]. The backward pass reads each position's gradient at its home slot and adds
    the few copies: a general scatter-add over all slots is many times slower on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, home: Tensor, copies: Tensor, copied: Tensor) -> Tensor:
        ctx.save_for_backward(home, copies, copied)
        return x.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,), (home, copies, copied) = gradients, ctx.saved_tensors
        total = gradient.index_select(0, home)
        if len(copies):
            total.index_add_(0, copied, gradient.index_select(0, copies))
        return total, None, None, None, None


class _Home(torch.autograd.Function):
    """slots [n, …] -> the home slot of each position [L, …]; the other slots get no gradient."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, home: Tensor) -> Tensor:
        ctx.save_for_backward(home)
        ctx.slots = len(slots)
        return slots.index_select(0, home)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (home,) = gradients, ctx.saved_tensors
        total = gradient.new_zeros(ctx.slots, *gradient.shape[1:])
        return total.index_copy_(0, home, gradient), None


def _branch_layout(segments: Sequence[Segment]) -> BranchLayout:
    groups, queries, keys = [], [], []
    for members in _grouped(segments):
        masked = _needs_mask(members[0])
        spans = [((s.prefix_start, s.prefix_length), (s.start, s.length)) for s in members]
        positions = [np.concatenate([np.arange(start, start + n) for start, n in span]) for span in spans]
        skipped = [s.prefix_length if masked else 0 for s in members]  # positions that are keys only
        own = [p[skip:] for p, skip in zip(positions, skipped, strict=True)]
        longest, widest = max(map(len, positions)), max(map(len, own))
        keys += [(p, longest) for p in positions]
        queries += [(p, widest) for p in own]
        # a query sees the whole prefix and its own segment up to itself: [count, 1, widest, longest]
        seen = np.arange(longest) <= np.arange(widest)[None, None, :, None] + np.array(skipped)[:, None, None, None]
        groups.append(Group(len(members), widest, longest, torch.from_numpy(seen) if masked else None))
    return BranchLayout(groups, _slots(queries), _slots(keys))


def _needs_mask(segment: Segment) -> bool:
    """Whether masked attention is cheaper. Plain causal attention over prefix P and branch B computes
    (P + B)² / 2 pairs; the branch's queries alone, with a mask, B (P + B): less where P > B."""
    return segment.prefix_length > segment.length


def _grouped(segments: Sequence[Segment], apart: float = 0.85) -> list[list[Segment]]:
    """Segments in groups; the shortest of a group is at least `apart` times as long as its longest.

    A prefix gets no call of its own where a branch's plain causal attention computes its output anyway.
    """
    answered = {s.prefix_start for s in segments if s.prefix_length and not _needs_mask(s)}
    asking = [s for s in segments if s.prefix_length or s.start not in answered]
    groups: list[list[Segment]] = []
    for segment in sorted(asking, key=lambda s: (_needs_mask(s), s.prefix_length + s.length), reverse=True):
        longest = groups[-1][0] if groups else segment
        alike = _needs_mask(longest) == _needs_mask(segment)
        length = segment.prefix_length + segment.length
        if groups and alike and length >= apart * (longest.prefix_length + longest.length):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _slots(pieces: Sequence[tuple[np.ndarray, int]]) -> Slots:
    """Each piece of positions, padded to its width."""
    positions = np.concatenate([np.pad(own, (0, width - len(own)), mode="edge") for own, width in pieces])
    real = np.flatnonzero(np.concatenate([np.arange(width) < len(own) for own, width in pieces]))
    home = real[np.unique(positions[real], return_index=True)[1]]
    copies = np.setdiff1d(real, home, assume_unique=True)
    return Slots(*map(torch.from_numpy, (positions, home, copies, positions[copies])))


@dataclass
class FlexLayout(Layout):
    """FlexAttention with a block mask over the packed sequence.

    Args:
        segment: [L] the segment of each position.
        prefix: [L] the segment of its prefix; its own segment without one.
        mask: The block mask, made by `prepare`.
    """

    segment: Tensor
    prefix: Tensor
    mask: BlockMask | None = None

    def prepare(self) -> None:
        """Make the block mask on the device, once per batch."""
        if self.mask is not None:
            return
        length, segment, prefix = len(self.segment), self.segment, self.prefix

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & ((segment[key] == segment[query]) | (segment[key] == prefix[query]))

        device = self.segment.device
        self.mask = create_block_mask(sees, None, None, length, length, device=device, _compile=device.type == "cuda")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        if dropout or (torch.is_grad_enabled() and not query.is_cuda):
            raise ValueError(
                "model.attention flex trains on a GPU and does not support attention dropout; choose branch"
            )
        grouped = query.shape[1] != key.shape[1]
        flex = _compiled_flex() if query.is_cuda else flex_attention
        options: Any = {"BACKEND": "TRITON"}  # for short sequences torch would take another kernel, which fails
        output = flex(
            query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=grouped, kernel_options=options
        )
        return output.transpose(1, 2)


def _flex_layout(segments: Sequence[Segment]) -> FlexLayout:
    number_at = {segment.start: number for number, segment in enumerate(segments)}
    lengths = [segment.length for segment in segments]
    prefixes = [number_at[s.prefix_start] if s.prefix_length else own for own, s in enumerate(segments)]
    own, seen = (np.repeat(numbers, lengths) for numbers in (np.arange(len(segments)), prefixes))
    return FlexLayout(torch.from_numpy(own), torch.from_numpy(seen))


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)
