"""SwiGLU: the Triton kernels against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.swiglu import swiglu, swiglu_linear
from precision import DEVICE, DTYPES, assert_precise, random
from thorough import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain_swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def plain_packed(x):
    return plain_swiglu(*x.chunk(2, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 1), (7, 1500)])
def test_swiglu(shape, dtype):
    gate, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    assert_precise(lambda g, u: swiglu(g, u, implementation="triton"), plain_swiglu, [gate, up])
    packed = torch.cat((gate, up), -1)
    assert_precise(lambda x: swiglu(x, implementation="triton"), plain_packed, [packed])


@settings(max_examples=examples(15), deadline=None)
@given(rows=st.integers(0, 5), columns=st.integers(1, 40), skip=st.integers(0, 3), step=st.integers(1, 2))
def test_any_strides(rows, columns, skip, step):
    gate, up = (random(rows, (columns + skip) * step, seed=seed)[:, skip * step :: step] for seed in (0, 1))
    assert_precise(lambda g, u: swiglu(g, u, implementation="triton"), plain_swiglu, [gate, up], ulps=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_rounds_once(dtype):
    """It is computed in float32, as the kernel is."""
    gate, up = random(64, 64, dtype=dtype), random(64, 64, dtype=dtype, seed=1)
    true = plain_swiglu(gate.double(), up.double()).float().to(dtype)
    is_off = swiglu(gate, up, implementation="reference") != true
    assert is_off.double().mean() < 0.001


def test_large_gates():
    """silu(-100) is 0 and silu(100) is 100, forward and backward."""
    gate = torch.tensor([[-1000.0, -100.0, 0.0, 100.0, 1000.0]], device=random(1).device)
    assert_precise(
        lambda g, u: swiglu(g, u, implementation="triton"),
        lambda g, u: torch.nn.functional.silu(g) * u,
        [gate, random(1, 5)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [(2, 7), ()], ids=str)
def test_with_the_product_that_follows(rows, with_bias, dtype):
    inputs = [random(*rows, 40, dtype=dtype, seed=seed) for seed in (0, 1)] + [random(24, 40, dtype=dtype)]
    inputs += [random(24, dtype=dtype)] if with_bias else []
    assert_precise(
        lambda *t: swiglu_linear(*t, implementation="triton"),
        lambda gate, up, *layer: F.linear(plain_swiglu(gate, up), *layer),
        inputs,
        ulps=2,
    )


def test_what_is_kept_for_the_product():
    """Gate, up and the weight, and not what the product is made of."""
    kept = []
    gate, up, weight = (random(*shape).requires_grad_() for shape in ((6, 40), (6, 40), (24, 40)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu_linear(gate, up, weight, implementation="triton")
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (gate, up, weight)]


def test_autocast_of_the_product():
    inputs = [random(*shape, dtype=torch.float32).requires_grad_() for shape in ((6, 40), (6, 40), (24, 40))]
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    with torch.autocast(DEVICE, dtype):
        y = swiglu_linear(*inputs, implementation="triton")
    assert y.dtype == dtype
    assert [x.dtype for x in torch.autograd.grad(y.sum(), inputs)] == [torch.float32] * 3


def test_refusals():
    x = torch.ones(2, 5)
    with pytest.raises(ValueError, match="packed with up, its last dim must be even"):
        swiglu(x)
    for function in (lambda: swiglu(x, x[:, :4]), lambda: swiglu_linear(x, x[:, :4], x)):
        with pytest.raises(ValueError, match=r"gate \(2, 5\) torch.float32, up \(2, 4\) torch.float32: must be alike"):
            function()
    with pytest.raises(ValueError, match=r"weight \(5, 2\) torch.float32: must be \(out_features, 5\) torch.float32"):
        swiglu_linear(x, x, x.T)
    with pytest.raises(ValueError, match=r"bias of weight \(5,\) torch.float32: must be \(2,\) torch.float32"):
        swiglu_linear(x, x, x, x[0])
