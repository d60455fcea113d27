"""How kernels address tensors: strides, rows, and tile widths that are powers of two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def power_of_two(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def padded(width: int) -> int:
    """The next tile width: a power of two, 16 or more."""
    return max(16, power_of_two(width))


def readable(x: Tensor) -> Tensor:
    """`x` (..., width) as kernels address it: elements of the last dim beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def addressable(x: Tensor) -> Tensor:
    """`x` (..., width) if the TMA unit, and loads of 16 bytes, can address it, or a copy that they can."""
    steps = [x.stride(dim) * x.element_size() for dim in range(x.ndim - 1) if x.shape[dim] > 1]
    is_fit = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step and step % 16 == 0 for step in steps)
    return x if is_fit else x.clone(memory_format=torch.contiguous_format)


def rows(x: Tensor) -> Tensor:
    """`x` (..., width) as a matrix that is `readable`."""
    return readable(matrix(x))


def matrix(x: Tensor) -> Tensor:
    """`x` (..., width) with its rows one below the other; of width 0, too."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of a tensor that may be absent."""
    return (0,) * dims if x is None else x.stride()


def shared_stride(x: Tensor | None) -> int:
    """The first stride of a tensor that may be shared along that dim (size 1), or absent."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


class RowBlocks(NamedTuple):
    """Rows and columns of a tile, warps of a program; stages of its loop over tiles, if it has one."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
