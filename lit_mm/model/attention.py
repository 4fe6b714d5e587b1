"""Who sees whom in a packed row: attention branch by branch, without a mask over the row.

A row is cut into segments. The queries of a segment, a prefix, a branch or a text alone, see the
prefix before it, if any, and themselves, causally; nothing else of the row. `layout_of` turns the
segments into index tensors on the CPU, in the collator; `attend` is registered with transformers'
AttentionInterface and finds its layout among the LLM's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lit_mm_rows"
"""Under which name transformers knows the attention of packed rows."""

Segment = tuple[int, int, int, int]
"""Start and length of the prefix, start and length of the queries, in positions of the row."""


class Layout:
    """How the segments of a row attend, by one mechanism."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        """Queries [1, heads, L, d], keys and values [1, kv heads, L, d] -> [1, L, heads, d]."""
        raise NotImplementedError


@dataclass
class Group:
    """Segments attended together.

    Args:
        count: Number of segments.
        queries: Query slots of each.
        keys: Key slots of each.
        mask: [count, 1, queries, keys] what is seen; None: plain causal, keys and queries are the
            same positions.
    """

    count: int
    queries: int
    keys: int
    mask: Tensor | None


@dataclass
class BranchLayout(Layout):
    """One plain causal attention per group of segments of similar length, on any device.

    Each segment's slots are its prefix and its own positions, filled up at the end (no causal query
    sees the filling). Where the prefix is longer than the rest, only the rest asks, with a mask.

    Args:
        groups: The groups.
        query_slots: [slots] row positions.
        query_home: [L] the slot that answers for a position.
        key_slots: [slots] row positions.
        key_home: [L] the first slot that holds a position.
        again_slots: [R] further slots that hold a position of a prefix.
        again_positions: [R] which.
    """

    groups: list[Group]
    query_slots: Tensor
    query_home: Tensor
    key_slots: Tensor
    key_home: Tensor
    again_slots: Tensor
    again_positions: Tensor

    @torch.compiler.disable  # groups differ in number and size from batch to batch: each would be compiled anew
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        queries = _Gather.apply(query[0].transpose(0, 1), self.query_slots, self.query_home, None, None)
        keys, values = (
            _Gather.apply(x[0].transpose(0, 1), self.key_slots, self.key_home, self.again_slots, self.again_positions)
            for x in (key, value)
        )
        sizes = [[g.count * g.queries for g in self.groups], [g.count * g.keys for g in self.groups]]
        pieces = zip(self.groups, queries.split(sizes[0]), keys.split(sizes[1]), values.split(sizes[1]), strict=True)
        outputs = [_of_group(*piece, scaling, dropout) for piece in pieces]
        return _Home.apply(torch.cat(outputs), self.query_home)[None]


@dataclass
class VarlenLayout(Layout):
    """Variable-length flash attention: prefix and branch gathered as keys. GPU, half precision.

    Args:
        query_ends: int32 [n + 1] cumulative query lengths of the segments, in row order.
        key_ends: int32 [n + 1] likewise of the gathered keys.
        longest: The most queries and keys of a segment.
        key_slots, key_home, again_slots, again_positions: As in BranchLayout.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]
    key_slots: Tensor
    key_home: Tensor
    again_slots: Tensor
    again_positions: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        if dropout or not query.is_cuda:
            raise ValueError("model.attention varlen runs on a GPU and knows no attention dropout; choose branch")
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
        keys, values = (
            _Gather.apply(x[0].transpose(0, 1), self.key_slots, self.key_home, self.again_slots, self.again_positions)
            for x in (key, value)
        )
        return _varlen(query[0].transpose(0, 1), keys, values, self, scaling)[None]


@dataclass
class FlexLayout(Layout):
    """FlexAttention with a block mask over the row.

    Args:
        segment: [L] the segment of each position.
        prefix: [L] the segment of the prefix that it sees; its own without one.
        mask: The block mask, once `prepare` has made it.
    """

    segment: Tensor
    prefix: Tensor
    mask: BlockMask | None = None

    def prepare(self) -> None:
        """Make the block mask, once a batch, on the device."""
        length, segment, prefix = len(self.segment), self.segment, self.prefix

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & ((segment[key] == segment[query]) | (segment[key] == prefix[query]))

        device = self.segment.device
        self.mask = create_block_mask(sees, None, None, length, length, device=device, _compile=device.type == "cuda")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        if dropout or (torch.is_grad_enabled() and not query.is_cuda):
            raise ValueError("model.attention flex trains on a GPU and knows no attention dropout; choose branch")
        grouped = query.shape[1] != key.shape[1]
        flex = _compiled_flex() if query.is_cuda else flex_attention
        return flex(query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=grouped).transpose(1, 2)


def causal_pairs(queries: int, before: int = 0) -> int:
    """Pairs that causal attention of `queries` tokens needs with `before` tokens in the KV cache."""
    return queries * before + queries * (queries + 1) // 2


def attended_pairs(segments: Sequence[Segment]) -> int:
    """How many pairs of a query and a key that it sees the segments have: what attention must compute."""
    return sum(causal_pairs(length, prefix) for _, prefix, _, length in segments)


def layout_of(segments: Sequence[Segment], mechanism: str) -> Layout:
    """The index tensors of a mechanism, `flex`, `varlen` or `branch`."""
    if mechanism == "flex":
        return _flex_layout(segments)
    return _varlen_layout(segments) if mechanism == "varlen" else _branch_layout(segments)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rows_layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers; plain SDPA where no layout is given (generation).

    Raises:
        ValueError: The model asks for what packed rows would silently leave out.
    """
    if rows_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    unknown = ("sliding_window", "softcap", "s_aux", "position_bias")
    if asked := [name for name in unknown if others.get(name) is not None]:
        raise ValueError(f"packed rows do not know {asked} of {type(module).__name__}: set model.attention to loop")
    return rows_layout.attend(query, key, value, scaling, dropout), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it a padding mask would be dropped


def _of_group(
    group: Group, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """Slots [n, heads, d] -> [n, heads, d]."""
    query, key, value = (x.unflatten(0, (group.count, -1)).transpose(1, 2) for x in (queries, keys, values))
    grouped = query.shape[1] // key.shape[1]
    if grouped > 1 and query.is_cuda and (group.mask is not None or query.dtype == torch.float32):
        # no fused CUDA kernel takes grouped heads then: all scores would exist at once
        key, value = (x.repeat_interleave(grouped, dim=1) for x in (key, value))
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
    """x [L, …] -> x[slots]. The backward pass takes each position's gradient from its home slot and
    adds the few repetitions: a general scatter-add over all slots is many times slower on a CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, slots: Tensor, home: Tensor, again: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(home, again, positions)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,), (home, again, positions) = gradients, ctx.saved_tensors
        total = gradient.index_select(0, home)
        if again is not None:
            total.index_add_(0, positions, gradient.index_select(0, again))
        return total, None, None, None, None


class _Home(torch.autograd.Function):
    """slots [n, …] -> the slot of each row position [L, …]; the others get no gradient."""

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


def _flex_layout(segments: Sequence[Segment]) -> FlexLayout:
    number_at = {start: number for number, (_, _, start, _) in enumerate(segments)}
    lengths = [length for *_, length in segments]
    prefixes = [number_at[begin] if size else own for own, (begin, size, *_) in enumerate(segments)]
    return FlexLayout(
        torch.from_numpy(np.repeat(np.arange(len(segments)), lengths)), torch.from_numpy(np.repeat(prefixes, lengths))
    )


def _varlen_layout(segments: Sequence[Segment]) -> VarlenLayout:
    keys = [_positions(segment) for segment in segments]
    lengths = [length for *_, length in segments], [len(positions) for positions in keys]
    ends = [torch.from_numpy(np.cumsum([0, *each], dtype=np.int32)) for each in lengths]
    longest = max(lengths[0]), max(lengths[1])
    return VarlenLayout(ends[0], ends[1], longest, *_homes([(positions, len(positions)) for positions in keys]))


def _branch_layout(segments: Sequence[Segment]) -> BranchLayout:
    groups, queries, keys = [], [], []
    for members in _grouped(_without_answered(segments)):
        positions = [_positions(segment) for segment in members]
        hidden = _asks_with_mask(members[0])
        first = [segment[1] if hidden else 0 for segment in members]
        longest = max(len(own) for own in positions)
        widest = max(len(own) - skip for own, skip in zip(positions, first, strict=True))
        keys += [(own, longest) for own in positions]
        queries += [(own[skip:], widest) for own, skip in zip(positions, first, strict=True)]
        seen = np.arange(longest) <= np.arange(widest)[None, :, None] + np.array(first)[:, None, None]
        groups.append(Group(len(members), widest, longest, torch.from_numpy(seen[:, None]) if hidden else None))
    query_slots, query_home, *_ = _homes(queries)
    return BranchLayout(groups, query_slots, query_home, *_homes(keys))


def _asks_with_mask(segment: Segment) -> bool:
    """Plain causal attention over prefix and branch costs (P + B)² / 2, the branch's queries alone,
    with a mask that a kernel can not skip, B (P + B): less where the prefix is the longer part."""
    _, size, _, length = segment
    return size > length


def _without_answered(segments: Sequence[Segment]) -> list[Segment]:
    """Leave out the prefixes whose queries a branch's plain causal attention answers anyway."""
    answered = {segment[0] for segment in segments if segment[1] and not _asks_with_mask(segment)}
    return [segment for segment in segments if segment[1] or segment[2] not in answered]


def _grouped(segments: list[Segment], apart: float = 0.85) -> list[list[Segment]]:
    """Segments of one kind of which the shortest has at least `apart` of the longest's positions."""
    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (_asks_with_mask(s), s[1] + s[3]), reverse=True):
        longest = groups[-1][0] if groups else None
        alike = longest is not None and _asks_with_mask(longest) == _asks_with_mask(segment)
        if longest is not None and alike and segment[1] + segment[3] >= apart * (longest[1] + longest[3]):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _positions(segment: Segment) -> np.ndarray:
    """Row positions of a segment's prefix and of the segment."""
    begin, size, start, length = segment
    return np.concatenate([np.arange(begin, begin + size), np.arange(start, start + length)])


def _homes(pieces: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, each piece filled up to a width -> slots, the first slot that really holds each
    position, and the further ones with their positions."""
    slots = np.concatenate([np.pad(own, (0, width - len(own))) for own, width in pieces])
    real = np.flatnonzero(np.concatenate([np.arange(width) < len(own) for own, width in pieces]))
    _, first = np.unique(slots[real], return_index=True)
    home = real[first]
    again = np.setdiff1d(real, home, assume_unique=True)
    return tuple(torch.from_numpy(x) for x in (slots, home, again, slots[again]))  # type: ignore[return-value]


def _varlen(query: Tensor, keys: Tensor, values: Tensor, layout: VarlenLayout, scaling: float | None) -> Tensor:
    """[Q, heads, d], [K, kv heads, d] -> [Q, heads, d]; each segment's queries end where its keys end."""
    from torch.nn.attention.varlen import varlen_attn

    repeat = query.shape[1] // keys.shape[1]
    if repeat > 1:
        keys, values = (x.repeat_interleave(repeat, dim=1) for x in (keys, values))
    options: dict[str, Any] = {"window_size": (-1, 0), "scale": scaling}
    ends = layout.query_ends, layout.key_ends, *layout.longest
    return cast(Tensor, varlen_attn(query, keys, values, *ends, **options))


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)
