"""Fused ops inside torch.compile: what they give, and that compiled code launches their kernels without the ops."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compiled import kernels_of
from longctx.kernels import hardware
from longctx.kernels.norm.rms_norm import add_rms_norm, rms_norm
from longctx.kernels.rotary import apply_rotary_to_both
from longctx.kernels.swiglu import swiglu, swiglu_linear
from precision import DEVICE, random, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(2, 8, 64), (2, 8, 64), (64,), (64, 64), (2, 8, 8), (2, 8, 8)]


def layers(x: Tensor, residual: Tensor, weight: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every op that is a `triton_op`."""
    normed, total = add_rms_norm(x, residual, weight, implementation="triton")
    q, k = (t.view(2, 8, 4, 16) for t in (normed @ matrix, normed))
    q, k = apply_rotary_to_both(rms_norm(q, weight[:16], implementation="triton"), k, cos, sin, implementation="triton")
    q, k = q.flatten(2), k.flatten(2)
    hidden = swiglu(torch.cat((q, k), -1), implementation="triton") + swiglu(k, q, implementation="triton")
    return total + swiglu_linear(hidden, normed, matrix, implementation="triton")


def both_ways(function: Callable[..., Tensor]) -> list[Tensor]:
    inputs = [
        random(*shape, seed=seed).requires_grad_(len(shape) < 3 or shape[-1] > 8) for seed, shape in enumerate(SHAPES)
    ]
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.square().sum(), [x for x in inputs if x.requires_grad])]


def test_compiled_gives_what_eager_does():
    torch.compiler.reset()
    compiled = torch.compile(layers, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for ours, eager in zip(both_ways(compiled), both_ways(layers), strict=True):
        assert relative_error(ours, eager.double()) < 1e-5


def test_compiled_code_has_the_kernels_and_not_the_ops():
    """One a pass; and a second graph, for the second length, serves all lengths."""
    found = kernels_of("traced_ops.py")
    assert len(found) == 5
    for op in found:
        assert (op["kernels"], op["ops"], op["graphs"]) == (2, [], 2), op


def test_compiling_says_nothing_of_how_a_device_is_looked_up(monkeypatch):
    """torch.compile warns of each cache that it comes by: users would read it at every start."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + hardware.capability(x.device)[0], backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(torch.zeros(3)).tolist() == [9, 9, 9]
