"""Scaled, masked and causal softmax: the Triton kernels against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.compat.apex import scaled_masked_softmax, scaled_upper_triang_masked_softmax
from longctx.kernels.softmax import softmax
from precision import DEVICE, DTYPES, assert_precise, random
from thorough import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain_softmax(x, mask=None, scale=1.0, causal=False):
    score = x * scale
    if mask is not None:
        score = torch.where(mask, score, -torch.inf) if mask.dtype == torch.bool else score + mask.to(x.dtype)
    if causal:
        columns, rows = torch.arange(x.shape[-1], device=x.device), torch.arange(x.shape[-2], device=x.device)
        visible = columns <= rows.unsqueeze(1) + x.shape[-1] - x.shape[-2]
        score = torch.where(visible, score, -torch.inf)
    return torch.where((score > -torch.inf).any(-1, keepdim=True), score.softmax(-1), 0)


def kept(*shape: int) -> torch.Tensor:
    keep = random(*shape, seed=5) > -0.5
    keep[..., 0] = True
    return keep


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_shape", [None, (2, 1, 9, 70), (1, 1, 1, 70), (9, 70), (2, 3, 9, 1)])
@pytest.mark.parametrize("is_boolean", [True, False])
def test_masks(mask_shape, is_boolean, dtype):
    mask = None
    if mask_shape is not None:
        mask = kept(*mask_shape) if is_boolean else random(*mask_shape)
    assert_precise(
        lambda x: softmax(x, mask, scale=0.3, implementation="triton"),
        lambda x: plain_softmax(x, mask, 0.3),
        [random(2, 3, 9, 70, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(33, 33), (5, 40), (40, 7)])
def test_causal(rows, columns, dtype):
    """With more rows than columns the first rows see nothing, and are 0."""
    assert_precise(
        lambda x: softmax(x, scale=0.5, causal=True, implementation="triton"),
        lambda x: plain_softmax(x, None, 0.5, causal=True),
        [random(3, rows, columns, dtype=dtype)],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_rows_wider_than_a_tile(causal):
    x, mask = random(3, 33000), kept(33000)
    mask[:17000] = False  # the whole of the first tile
    assert_precise(
        lambda x: softmax(x, mask, causal=causal, implementation="triton"),
        lambda x: plain_softmax(x, mask, 1.0, causal),
        [x],
    )


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_rows_of_which_nothing_takes_part(implementation):
    x = random(2, 2, 3, 20).requires_grad_()
    mask = torch.ones(2, 1, 3, 20, dtype=torch.bool, device=DEVICE)
    mask[0, 0, 1] = False
    y = softmax(x, mask, implementation=implementation)
    (gradient,) = torch.autograd.grad(y, x, random(2, 2, 3, 20, seed=1))
    assert torch.equal(y[0, :, 1], torch.zeros(2, 20, device=DEVICE))
    assert torch.equal(gradient[0, :, 1], torch.zeros(2, 20, device=DEVICE))
    assert not gradient.isnan().any()


@settings(max_examples=examples(20), deadline=None)
@given(
    batch=st.integers(0, 2),
    rows=st.integers(1, 7),
    columns=st.integers(8, 90),
    dims=st.integers(2, 4),
    step=st.integers(1, 2),
)
def test_any_shape_and_strides(batch, rows, columns, dims, step):
    shape = {2: (rows,), 3: (batch, rows), 4: (batch, 2, rows)}[dims]
    x = random(*shape, columns * step)[..., ::step]
    assert_precise(lambda x: softmax(x, implementation="triton"), plain_softmax, [x], ulps=3)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_names_of_other_projects(implementation):
    """Megatron's mask says what is left out."""
    x, mask = random(2, 3, 5, 5), ~kept(2, 1, 5, 5)
    torch.testing.assert_close(scaled_masked_softmax(x, mask, 0.5, implementation), plain_softmax(x, ~mask, 0.5))
    torch.testing.assert_close(scaled_masked_softmax(x, None, 0.5, implementation), plain_softmax(x, None, 0.5))
    triangle = scaled_upper_triang_masked_softmax(x.flatten(0, 1), None, 0.5, implementation)
    torch.testing.assert_close(triangle, plain_softmax(x.flatten(0, 1), None, 0.5, causal=True))


def test_refusals():
    x = torch.ones(2, 3, 4)
    for call, message in (
        (lambda: softmax(x[0, 0]), r"x \(4,\) .*: must be \(..., rows, columns\) of 2 to 4 dims"),
        (lambda: softmax(x, torch.ones(5)), r"mask \(5,\): must broadcast to x, \(2, 3, 4\)"),
        (lambda: softmax(x, torch.ones(4, dtype=torch.int32)), "mask torch.int32: must be boolean, or floating"),
        (lambda: softmax(x, torch.ones(4, requires_grad=True)), "mask: gets no gradient"),
        (lambda: softmax(x, scale=torch.ones(())), "scale: must be a number; multiply a learned one into x"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
