"""Dtypes under torch.autocast."""

import pytest
import torch

from longctx.kernels import precision


def test_tensors_take_the_dtype_of_autocast_where_it_is_on():
    half, single, double, integer = (
        torch.zeros(2, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64, torch.int64)
    )
    inputs = half, single, double, integer, None
    assert all(a is b for a, b in zip(precision.autocast(*inputs), inputs, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [None if x is None else x.dtype for x in precision.autocast(*inputs)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float64, torch.int64, None]


def test_tensors_without_values_are_left_as_they_are():
    x = torch.zeros(2, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = precision.autocast(x)
    assert y is x


def test_it_asks_nothing_that_torch_2_11_cannot_trace(monkeypatch):
    """With torch 2.11 such a question breaks the graph of each block, and where a block has to be one, ends the run."""

    def untraceable(_device):
        pytest.fail("torch._C._is_autocast_available has no place in a graph of torch 2.11")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    precision.autocast(torch.zeros(2), torch.zeros(2))
