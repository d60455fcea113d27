"""SwiGLU: the Triton kernels against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.swiglu import swiglu
from precision import DTYPES, assert_precise, random
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


def test_large_gates():
    """silu(-100) is 0 and silu(100) is 100, forward and backward."""
    gate = torch.tensor([[-1000.0, -100.0, 0.0, 100.0, 1000.0]], device=random(1).device)
    assert_precise(
        lambda g, u: swiglu(g, u, implementation="triton"),
        lambda g, u: torch.nn.functional.silu(g) * u,
        [gate, random(1, 5)],
    )


def test_refusals():
    x = torch.ones(2, 5)
    with pytest.raises(ValueError, match="packed with up, its last dim must be even"):
        swiglu(x)
    with pytest.raises(ValueError, match=r"gate \(2, 5\) torch.float32, up \(2, 4\) torch.float32: must be alike"):
        swiglu(x, x[:, :4])
