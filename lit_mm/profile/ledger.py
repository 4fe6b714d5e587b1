"""Counts the bytes that tensors would take, without allocating them, for `memory_plan.py`.

PyTorch's fake tensors have a shape, dtype and strides but no data, and operations on them return fake
tensors. They claim to be on the CPU, as no GPU is needed for that; `as_on` adds what CUDA does differently
as far as memory is concerned.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lit_mm.model import loss

Kind = Literal["parameters", "gradients", "optimizer", "activations", "communication"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What memory is used for."""


class Ledger(TorchDispatchMode):
    """Within this context, operations on weights or pixels run on fake tensors, and every tensor is counted
    from its creation until it is freed.

    Indices and masks, which depend on token ids only, are really computed, as shapes depend on them.

    Attributes:
        fake: The mode of the fake tensors.
        alive: Current bytes of every kind.
        most: The same at the peak of their sum.
        moment: The phase in which the peak occurred.
        phase: The current phase's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.alive: Counter[Kind] = Counter()
        self.most: Counter[Kind] = Counter()
        self.phase = self.moment = ""
        self._kind: Kind = "activations"
        self._entries: dict[int, tuple[weakref.ref[Any], Kind, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and id(made.untyped_storage()) not in self._entries:
                self.book(made, self._kind)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if tensors and not any(isinstance(each, FakeTensor) for each in tensors):
            return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = args[0], _without_masks(args[1])
        with self.fake:
            made = func(*args, **kwargs)
        indices = not tensors and isinstance(made, Tensor) and not made.is_floating_point()
        return func(*args, **kwargs) if indices else made

    def book(self, tensor: Tensor, kind: Kind, size: int | None = None) -> None:
        """Count a tensor's storage under a kind until it is freed, as `size` bytes if given."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if size is None else size
        self._entries[key] = weakref.ref(storage, lambda _: self._strike(key)), kind, size
        self.change(kind, size)

    def change(self, kind: Kind, size: int) -> None:
        """Add bytes to a kind; negative to subtract."""
        self.alive[kind] += size
        if self.alive.total() > self.most.total():
            self.most, self.moment = self.alive.copy(), self.phase

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """Within this context, new tensors count under a kind; by default they are activations."""
        self._kind = kind
        yield
        self._kind = "activations"

    def _strike(self, key: int) -> None:
        _, kind, size = self._entries.pop(key)
        self.alive[kind] -= size


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks replaced by positions, as the number of positions in a fake mask is unknown."""
    found = ([x] if x is None or x.dtype != torch.bool else x.nonzero().unbind(1) for x in indices)
    return list(chain.from_iterable(found))


def fake_like(
    tensor: Tensor, fake: FakeTensorMode, dtype: torch.dtype | None = None, among: int | None = None
) -> Tensor:
    """A fake tensor or parameter.

    Args:
        tensor: Gives shape, strides and dtype.
        fake: The fake tensor mode.
        dtype: Replaces a floating-point dtype; None: unchanged.
        among: Return the first of this many shards of a parameter along its first dimension, contiguous;
            None: the whole, with its own strides.
    """
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    trained = isinstance(tensor, nn.Parameter)
    with fake:
        if among is None or not trained:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
        else:
            made = torch.empty(-(-len(tensor) // among), *tensor.shape[1:], dtype=dtype)
    return nn.Parameter(made, tensor.requires_grad) if trained else made


def backward(total: Tensor) -> None:
    """Like `total.backward()`, which suspends function modes such as `CudaWays` while it runs, so that a
    recomputed layer would not behave as in its first forward pass."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((total,), (torch.ones_like(total),), False, False, (), True, True)


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Within this context, fake CPU tensors behave as on this type of device."""
    own, loss.CHUNK["cpu"] = loss.CHUNK["cpu"], loss.CHUNK.get(device, loss.CHUNK["cuda"])
    ways: AbstractContextManager = CudaWays() if device == "cuda" else nullcontext()
    try:
        with ways:
            yield
    finally:
        loss.CHUNK["cpu"] = own


FLOAT32 = {F.layer_norm, F.rms_norm, F.group_norm, F.softmax, Tensor.softmax, Tensor.norm}
"""Functions that autocast runs in float32 on CUDA but not on a CPU (those that models call)."""


class CudaWays(TorchFunctionMode):
    """Makes CPU calls use as much memory as CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _in_float32, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            args = *_for_a_fused_kernel(*args, **kwargs), *args[3:]
        return func(*args, **kwargs)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _for_a_fused_kernel(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, with grouped heads repeated where `attention.py` repeats them on CUDA."""
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and (attn_mask is not None or query.dtype == torch.float32):
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    return query, key, value
