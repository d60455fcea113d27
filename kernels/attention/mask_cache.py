"""One cache for all that is computed from a mask: by the layers of a step it is asked for again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from longctx.kernels import hardware

T = TypeVar("T")
Tensors = tuple[Tensor | None, ...]

_MOST_RESULTS = 64  # kept for one tensor, and for masks without tensors together; the oldest goes first
_by_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()
_by_size: dict[Hashable, object] = {}
_of_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensors of masks that were made outside of compiled code


def remember(*tensors: Tensor | None) -> None:
    """These belong to a mask that is made here, which compiled code is not."""
    if hardware.is_recording():
        return
    for x in tensors:
        if x is not None:
            _of_masks[x] = True


def are_remembered(*tensors: Tensor | None) -> bool:
    """Whether these may be known by their identity.

    Compiled code writes one mask into the memory, and the tensor object, of another that it is through with, and no
    version counts that.
    """
    return all(x is None or x in _of_masks for x in tensors)


class Mask(Protocol):
    """What `cached_per_mask` needs to know of a mask."""

    @property
    def is_owned(self) -> bool:
        """Whether its tensors may be known by their identity, see `are_remembered`."""
        ...

    def identity(self) -> tuple[Tensors, Hashable]:
        """The tensors and the sizes that the mask consists of."""
        ...


class CachedPerMask(Generic[T]):
    """See `cached_per_mask`."""

    def __init__(self, compute: Callable[..., T]) -> None:
        self.compute = compute

    def __call__(self, mask: Mask | Tensors, *arguments: Hashable) -> T:
        return self._kept(mask, arguments, lambda: self.compute(mask, *arguments))

    def keep(self, mask: Mask, result: T) -> None:
        """Stores the result for `mask`, which is known without computing it."""
        self._kept(mask, (), lambda: result)

    def _kept(self, mask: Mask | Tensors, arguments: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
        if hardware.is_recording():  # a traced tensor has no identity, and a CUDA graph is replayed for other values
            return compute()
        tensors, sizes = (mask, None) if isinstance(mask, tuple) else mask.identity()
        is_owned = isinstance(mask, tuple) or mask.is_owned
        if not is_owned or any(_counts_no_writes(x) for x in tensors if x is not None):
            return compute()
        anchor = next((x for x in tensors if x is not None), None)
        devices = [anchor.device] if anchor is not None else [x for x in arguments if isinstance(x, torch.device)]
        key = self.compute, sizes, arguments, _stream_of(devices)
        return _of_size(key, compute) if anchor is None else _of_tensors(anchor, tensors, key, compute)


def _stream_of(devices: list[torch.device]) -> int:
    """The stream on which results are made: another one does not wait for them."""
    for device in devices:
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            return torch._C._cuda_getCurrentRawStream(index)  # `current_stream` makes an object of it
    return 0


def _counts_no_writes(x: Tensor) -> bool:
    """Of tensors of inference mode, and of those that a CUDA graph of torch.compile writes anew at each replay."""
    return x.is_inference() or torch._C._is_cached_tensor(x)


def cached_per_mask(compute: Callable[..., T]) -> CachedPerMask[T]:
    """Decorates `compute(mask, *arguments)` so that its result is kept as long as the tensors of the mask live.

    A mask is a `KeyIntervals`, a `BlockMask`, or a tuple of tensors that a caller owns. The result is computed again
    once somebody has written to one of the tensors, and each time while torch.compile traces. A mask without tensors is
    known by its sizes. The result must not hold the first tensor of the mask, which would then never be freed.
    """
    return CachedPerMask(compute)


def _of_tensors(anchor: Tensor, tensors: Tensors, key: Hashable, compute: Callable[[], T]) -> T:
    if anchor not in _by_tensor:
        _by_tensor[anchor] = {}
    of_anchor: dict = _by_tensor[anchor]
    full_key = (*map(id, tensors), key)
    writes = [0 if x is None else x._version for x in tensors]
    if full_key not in of_anchor or of_anchor[full_key][0] != writes:
        of_anchor.pop(full_key, None)
        if len(of_anchor) >= _MOST_RESULTS:
            del of_anchor[next(iter(of_anchor))]
        others = [None if x is anchor else x for x in tensors]  # kept, so that their ids stay theirs
        of_anchor[full_key] = writes, others, _computed(compute)
    return of_anchor[full_key][2]


def _of_size(key: Hashable, compute: Callable[[], T]) -> T:
    if key in _by_size:
        return _by_size[key]  # pyright: ignore[reportReturnType]: it is of the function that is part of the key
    result = _computed(compute)
    if type(torch.empty(0)) is Tensor:  # else made of tensors without values (FakeTensorMode), of no use to others
        if len(_by_size) >= _MOST_RESULTS:
            del _by_size[next(iter(_by_size))]
        _by_size[key] = result
    return result


def _computed(compute: Callable[[], T]) -> T:
    with torch.inference_mode(False):  # what validation makes, training may use
        return compute()
