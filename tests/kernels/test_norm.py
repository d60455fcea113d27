"""RMSNorm, LayerNorm and their forms with residual and dropout: the Triton kernels against float64, and the modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.compat.norms import (
    CohereLayerNorm,
    DropoutAddLayerNorm,
    Fp32LayerNorm,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
)
from longctx.kernels.dropout import dropout_threshold, kept_of_rows
from longctx.kernels.norm.layer_norm import LayerNorm, add_layer_norm, layer_norm
from longctx.kernels.norm.rms_norm import RMSNorm, add_rms_norm, rms_norm
from precision import DEVICE, DTYPES, assert_precise, random
from thorough import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(4, 3, 64), (1, 33), (37, 130), (5, 1), (3, 1000)]


def plain_norm(x, weight, bias, eps, subtract_mean, offset=0.0):
    """In plain torch operators, in the dtype of x."""
    if subtract_mean:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * (weight + offset)
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    inputs = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    assert_precise(
        lambda x, w: rms_norm(x, w, 1e-5, implementation="triton"),
        lambda x, w: plain_norm(x, w, None, 1e-5, False),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape, with_bias, dtype):
    weight, bias = (random(shape[-1], dtype=dtype, seed=seed) for seed in (1, 2))
    assert_precise(
        lambda x, w, b: layer_norm(x, w, b, 1e-5, implementation="triton"),
        lambda x, w, b: plain_norm(x, w, b, 1e-5, True),
        (random(*shape, dtype=dtype) + 3, weight, bias if with_bias else None),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_and_offset(dtype):
    inputs = [random(4, 9, 72, dtype=dtype, seed=seed) for seed in (0, 1)] + [random(72, dtype=dtype)]

    def plain(x, residual, weight):
        total = x + residual
        return plain_norm(total, weight, None, 1e-6, False, 1.0), total

    assert_precise(lambda *t: add_rms_norm(*t, weight_offset=1.0, implementation="triton"), plain, inputs)

    def plain_layer_norm(x, residual, weight):
        return plain_norm(x + residual, weight, None, 1e-5, True), x + residual

    assert_precise(lambda *t: add_layer_norm(*t, implementation="triton"), plain_layer_norm, inputs)


def test_a_float32_residual_stays_float32():
    """The stream's dtype is its own; x, y and their gradients have another."""
    x, residual = random(6, 40, dtype=torch.float16), random(6, 40, seed=1)
    assert_precise(
        lambda x, r, w: add_rms_norm(x, r, w, implementation="triton"),
        lambda x, r, w: (plain_norm(x + r, w, None, 1e-6, False).to(x.dtype), x + r),
        (x, residual, random(40)),
    )
    y, total = add_rms_norm(x, residual, random(40), implementation="triton")
    assert (y.dtype, total.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("subtract_mean", [True, False])
def test_a_weight_a_head(subtract_mean):
    x, weight, bias = random(2, 5, 6, 24), random(6, 24, seed=1), random(6, 24, seed=2)
    if subtract_mean:
        assert_precise(
            lambda x, w, b: layer_norm(x, w, b, implementation="triton"),
            lambda x, w, b: plain_norm(x, w, b, 1e-5, True),
            (x, weight, bias),
        )
    else:
        assert_precise(
            lambda x, w: rms_norm(x, w, implementation="triton"),
            lambda x, w: plain_norm(x, w, None, 1e-6, False),
            (x, weight),
        )


@pytest.mark.parametrize("subtract_mean", [True, False])
def test_rows_wider_than_a_tile(subtract_mean):
    """33000 columns are read in three parts; the mean is far from 0."""
    x, weight, residual = random(3, 33000) + 10, random(33000), random(3, 33000, seed=1)
    if subtract_mean:
        assert_precise(
            lambda x, r, w: add_layer_norm(x, r, w, implementation="triton"),
            lambda x, r, w: (plain_norm(x + r, w, None, 1e-5, True), x + r),
            (x, residual, weight),
        )
    else:
        assert_precise(
            lambda x, r, w: add_rms_norm(x, r, w, implementation="triton"),
            lambda x, r, w: (plain_norm(x + r, w, None, 1e-6, False), x + r),
            (x, residual, weight),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [dropout_add_layer_norm, dropout_add_rms_norm])
def test_dropout(function, dtype):
    """The kernel drops what the reference drops, and gives gradients to what it keeps."""
    x, residual, weight = random(7, 96, dtype=dtype), random(7, 96, dtype=dtype, seed=1), random(96, dtype=dtype)
    seed = torch.tensor([2**40 + 5], device=x.device)
    rows, columns = torch.arange(7, device=x.device).unsqueeze(1), torch.arange(96, device=x.device)
    keeps = kept_of_rows(seed, dropout_threshold(0.4), rows, columns)
    assert 0.5 < float(keeps.double().mean()) < 0.7
    subtract_mean = function is dropout_add_layer_norm

    def mine(x, residual, weight):
        return function(x, residual, weight, None, 0.4, 1e-5, prenorm=True, seed=seed, implementation="triton")

    def plain(x, residual, weight):
        total = torch.where(keeps, x / 0.6, 0) + residual
        return plain_norm(total, weight, None, 1e-5, subtract_mean), total

    assert_precise(mine, plain, (x, residual, weight))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_dropout_depends_on_the_rows_numbers(implementation):
    """Rows 4 to 7 of 8 alone, by their numbers, are as they are among the 8: so a mask is the same on any layout."""
    x, weight, seed = random(8, 50), random(50), torch.tensor([3], device=random(1).device)
    call = {"implementation": implementation, "seed": seed}
    whole = dropout_add_layer_norm(x, None, weight, None, 0.5, 1e-5, **call)
    numbers = torch.arange(4, 8, device=x.device)
    part = dropout_add_layer_norm(x[4:], None, weight, None, 0.5, 1e-5, row_ids=numbers, **call)
    assert torch.equal(whole[4:], part)
    strided = torch.arange(8, 16, device=x.device)[::2] // 2  # the same numbers, not beside each other
    assert torch.equal(whole[4:], dropout_add_layer_norm(x[4:], None, weight, None, 0.5, 1e-5, row_ids=strided, **call))
    without = dropout_add_layer_norm(x[4:], None, weight, None, 0.5, 1e-5, **call)
    assert not torch.equal(without, part)


@settings(max_examples=examples(25), deadline=None)
@given(
    rows=st.integers(0, 9), width=st.integers(8, 300), step=st.integers(1, 3), skip=st.integers(0, 5),
    subtract_mean=st.booleans(),
)  # fmt: skip
def test_any_strides_and_no_rows(rows, width, step, skip, subtract_mean):
    x = random(rows, 2, (width + skip) * step)[:, :, skip * step :: step]
    weight = random(2 * width)[::2]
    if subtract_mean:
        assert_precise(
            lambda x, w: layer_norm(x, w, implementation="triton"),
            lambda x, w: plain_norm(x, w, None, 1e-5, True),
            (x, weight),
            ulps=4,  # the errors of few elements do not average
        )
    else:
        assert_precise(
            lambda x, w: rms_norm(x, w, implementation="triton"),
            lambda x, w: plain_norm(x, w, None, 1e-6, False),
            (x, weight),
            ulps=4,
        )


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_modules(implementation):
    x = random(2, 5, 4, 24)
    torch.testing.assert_close(RMSNorm(24, implementation=implementation).to(x)(x), F.rms_norm(x, (24,), eps=1e-6))
    norm = LayerNorm((4, 24), implementation=implementation).to(x)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (24,)))
    y, total = norm(x, residual=x)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(y, F.layer_norm(2 * x, (24,)))


def test_modules_of_other_projects():
    x = random(2, 5, 4, 24).to(torch.bfloat16)
    fp32 = Fp32LayerNorm((4, 24)).to(x)
    assert torch.equal(fp32(x), F.layer_norm(x.float(), (4, 24)).to(torch.bfloat16))  # over both dims, as nn.LayerNorm
    assert Fp32LayerNorm(24, elementwise_affine=False)(x).dtype == torch.bfloat16
    cohere = CohereLayerNorm((4, 24)).to(x.device)
    weight = random(4, 24)
    cohere.weight.data.copy_(weight)
    by_hand = (plain_norm(x.float(), weight, None, 1e-5, True)).to(torch.bfloat16)
    assert torch.equal(cohere(x), by_hand)
    drop = DropoutAddLayerNorm(24, prenorm=True, p=0.5, residual_in_fp32=True).to(x.device)
    y, total = drop(x, x)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    zeros = float((total == x.float()).double().mean())
    assert 0.35 < zeros < 0.65
    assert torch.equal(drop.eval()(x, x)[1], 2 * x.float())


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_gradients_of_weights_are_summed_in_float32(implementation):
    """Of rows that are all alike: a sum in 16 bits would stop growing at 2048 of them."""
    dtype = torch.float16  # which the interpreter computes too
    module = LayerNorm(16, implementation=implementation).to(DEVICE, dtype)
    module(torch.randn(16, device=DEVICE, dtype=dtype).expand(1 << 13, 16)).sum().backward()
    assert module.bias.grad is not None
    assert torch.equal(module.bias.grad, torch.full_like(module.bias.grad, 1 << 13))


def test_a_float32_weight_is_not_rounded():
    """Nor a float32 sum of 16-bit tensors, in the reference as in the kernels."""
    x, weight = random(64, 96, dtype=torch.bfloat16), random(96)
    exact = (plain_norm(x.double(), weight.double(), None, 1e-5, True)).to(torch.bfloat16)
    assert float((layer_norm(x, weight, implementation="reference") != exact).double().mean()) < 0.01
    half, residual = random(6, 40, dtype=torch.float16), random(6, 40, dtype=torch.float16, seed=1)
    _, total = dropout_add_layer_norm(
        half, residual, None, None, 0.0, 1e-5, prenorm=True, residual_in_fp32=True, implementation="reference"
    )
    assert torch.equal(total, half.float() + residual.float())


def test_one_graph_for_all_lengths():
    graphs = []
    counted = torch.compile(rms_norm, dynamic=True, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph)
    for length in (3, 5, 7, 9):
        counted(torch.ones(2, length, 8), torch.ones(8))
    assert len(graphs) == 1


def test_refusals():
    x = torch.ones(4, 8)
    for call, message in (
        (lambda: rms_norm(x, torch.ones(7)), r"weight \(7,\): must be \(8,\) or \(4, 8\)"),
        (lambda: add_rms_norm(x, x[:3], None), r"residual \(3, 8\): must have the shape of x, \(4, 8\)"),
        (lambda: rms_norm(torch.ones(1, 65537), None), "its last dim must be 1 to 65536"),
        (lambda: rms_norm(x.long(), None), "must be .* of a floating type"),
        (lambda: rms_norm(x, None, implementation="cuda"), "must be auto, triton or reference"),
        (lambda: rms_norm(x.double(), None, implementation="triton"), "float16, bfloat16 and float32"),
        (lambda: layer_norm(x, None, torch.ones(8)), "bias: needs a weight"),
        (lambda: dropout_add_layer_norm(x, None, None, None, 1.0, 1e-5), "dropout=1.0: must be at least 0 and below 1"),
        (lambda: dropout_add_layer_norm(x, x, None, None, 0.5, 1e-5, seed=torch.ones(1)), "must be one torch.int64"),
        (lambda: dropout_add_layer_norm(x, x, None, None, 0.0, 1e-5, torch.ones(4)), "rowscale: not supported here"),  # pyright: ignore[reportArgumentType]
        (lambda: dropout_add_rms_norm(x, x, None, x[0], 0.0, 1e-5, None, x[0]), "bias, layerscale: not supported here"),  # pyright: ignore[reportArgumentType]
        (lambda: Fp32LayerNorm((3, 8))(x), r"its last dims must be \(3, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
