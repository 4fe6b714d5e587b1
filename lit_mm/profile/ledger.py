"""Tensors without data, and the bytes that they would take: what `memory.py` plans with.

PyTorch's fake tensors have shapes, types and strides, and every operation on them gives fake tensors of
the right kind. They pretend to be on the CPU, where everything can pretend without a GPU; what CUDA does
otherwise, as far as memory goes, is in `as_on`.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal, TypeVar, get_args

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
"""What memory is taken by."""
Model = TypeVar("Model", bound=nn.Module)


class Ledger(TorchDispatchMode):
    """Within this context whatever depends on weights or pixels runs on fake tensors, and every tensor
    is counted from its making to its end.

    What depends on token ids alone, indices and masks, is computed in earnest: shapes follow from it.

    Attributes:
        fake: The mode of the fake tensors.
        alive: Bytes of every kind.
        most: The same at the moment of the greatest sum.
        moment: The phase of that moment.
        phase: What is going on, by name.
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
        """Count a tensor's storage as of a kind until it is gone; with another size, if one is given."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if size is None else size
        self._entries[key] = weakref.ref(storage, lambda _: self._strike(key)), kind, size
        self.change(kind, size)

    def change(self, kind: Kind, size: int) -> None:
        """So many bytes of a kind more, or less."""
        self.alive[kind] += size
        if self.alive.total() > self.most.total():
            self.most, self.moment = self.alive.copy(), self.phase

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """Within this context tensors are of a kind, outside they are activations."""
        self._kind = kind
        yield
        self._kind = "activations"

    def _strike(self, key: int) -> None:
        _, kind, size = self._entries.pop(key)
        self.alive[kind] -= size


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices, of masks the positions that they mark: a fake mask could not tell how many."""
    found = ([x] if x is None or x.dtype != torch.bool else x.nonzero().unbind(1) for x in indices)
    return list(chain.from_iterable(found))


def copied(model: Model, of: Callable[[Tensor], Tensor]) -> tuple[Model, dict[int, Any]]:
    """A model with other parameters and buffers, and id -> copy of each part of the original."""
    copies: dict[int, Any] = {id(tensor): of(tensor) for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, copies), copies


def fake_like(
    tensor: Tensor, fake: FakeTensorMode, dtype: torch.dtype | None = None, among: int | None = None
) -> Tensor:
    """A fake tensor or parameter.

    Args:
        tensor: What it is like.
        fake: Its mode.
        dtype: Of floating point numbers; None: as they are.
        among: A parameter is shared out among so many by its first dimension, the first one's share is
            wanted, contiguous; None: whole, with the strides it has.
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
    """`total.backward()`, which would suspend function modes such as `CudaWays` while it runs: a layer
    that is computed anew would not go the ways that it went before."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((total,), (torch.ones_like(total),), False, False, (), True, True)


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Within this context fake CPU tensors go the ways of a type of device."""
    own, loss.CHUNK["cpu"] = loss.CHUNK["cpu"], loss.CHUNK.get(device, loss.CHUNK["cuda"])
    ways: AbstractContextManager = CudaWays() if device == "cuda" else nullcontext()
    try:
        with ways:
            yield
    finally:
        loss.CHUNK["cpu"] = own


FLOAT32 = {F.layer_norm, F.rms_norm, F.group_norm, F.softmax, Tensor.softmax, Tensor.norm}
"""What autocast computes in float32 on CUDA but not on a CPU, of what models call."""


class CudaWays(TorchFunctionMode):
    """What CUDA does otherwise than a CPU."""

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
    """Queries, keys and values, grouped heads repeated where `attention.py` does so on CUDA."""
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and (attn_mask is not None or query.dtype == torch.float32):
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    return query, key, value
