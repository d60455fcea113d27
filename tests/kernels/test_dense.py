"""FusedDense and FusedMLP against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longctx.kernels.dense import FusedDense, FusedMLP, fused_dense, fused_mlp
from precision import DEVICE, DTYPES, assert_precise, random

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_dense(with_residual, with_bias, dtype):
    x, weight = random(2, 7, 24, dtype=dtype), random(40, 24, dtype=dtype)
    bias = random(40, dtype=dtype) if with_bias else None
    residual = random(2, 7, 40, dtype=dtype) if with_residual else None

    def plain(x, weight, bias, residual):
        y = F.linear(x, weight, bias)
        return y if residual is None else y + residual

    assert_precise(fused_dense, plain, [x, weight, bias, residual], ulps=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_skip_connection_around_a_layer(dtype):
    """x goes on beside y; its gradient starts the product that makes x's."""
    inputs = [random(2, 7, 24, dtype=dtype), random(24, 24, dtype=dtype), random(24, dtype=dtype)]
    assert_precise(
        lambda *t: fused_dense(*t, return_residual=True), lambda x, w, b: (F.linear(x, w, b), x * 1), inputs, ulps=2
    )


def plain_mlp(x, weight1, weight2, bias1, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("return_residual", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
def test_mlp(with_bias, return_residual, recompute, dtype):
    inputs = [random(2, 19, 24, dtype=dtype), random(150, 24, dtype=dtype) / 5, random(24, 150, dtype=dtype) / 5]
    inputs += [random(150, dtype=dtype), random(24, dtype=dtype)] if with_bias else [None, None]
    options = {"return_residual": return_residual, "recompute": recompute, "implementation": "triton"}

    def plain(x, *parameters):
        return (plain_mlp(x, *parameters), x * 1) if return_residual else plain_mlp(x, *parameters)

    assert_precise(lambda *t: fused_mlp(*t, **options), plain, inputs, ulps=3)


def test_no_rows():
    x = random(0, 24).requires_grad_()
    weight1, weight2 = random(50, 24).requires_grad_(), random(24, 50)
    fused_mlp(x, weight1, weight2, implementation="triton").sum().backward()
    assert torch.equal(weight1.grad, torch.zeros_like(weight1))


def test_what_is_kept_for_the_backward_pass():
    """The GELU's input and x; with `recompute` x alone. Never the GELU."""
    x, weight1, weight2 = random(5, 24).requires_grad_(), random(50, 24), random(24, 50)
    for recompute, expected in ((False, [(5, 24), (5, 50)]), (True, [(5, 24)])):
        kept: list[tuple[int, ...]] = []

        def note(t: torch.Tensor, kept=kept) -> torch.Tensor:
            if t is not weight1 and t is not weight2:
                kept.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            fused_mlp(x, weight1, weight2, recompute=recompute)
        assert kept == expected


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("implementation", "dtype"), [("reference", torch.float64), ("triton", torch.float32)])
def test_second_derivatives(recompute, implementation, dtype):
    """Of a gradient penalty, whose terms go through the GELU's input too."""
    shapes = (5, 8), (12, 8), (6, 12), (12,)
    inputs, tolerance = [random(*shape).to(dtype) for shape in shapes], 1e-9 if dtype == torch.float64 else 1e-4

    def penalty(mlp):
        given = [t.detach().clone().requires_grad_() for t in inputs]
        (slope,) = torch.autograd.grad(mlp(*given).pow(2).sum(), given[0], create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), given)

    def plain(x, weight1, weight2, bias1):
        return F.gelu(x @ weight1.T + bias1, approximate="tanh") @ weight2.T

    ours = penalty(lambda *t: fused_mlp(*t, recompute=recompute, implementation=implementation))
    for mine, true in zip(ours, penalty(plain), strict=True):
        assert float((mine - true).norm() / true.norm()) < tolerance


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_layers(implementation):
    torch.manual_seed(0)
    x = random(3, 24)
    dense = FusedDense(24, 40, return_residual=True).to(DEVICE)
    y, same = dense(x, random(3, 40))
    torch.testing.assert_close(y, F.linear(x, dense.weight, dense.bias) + random(3, 40))
    assert torch.equal(same, x)
    mlp = FusedMLP(24, implementation=implementation).to(DEVICE)
    assert mlp.fc1.weight.shape == (96, 24)
    expected = plain_mlp(x, mlp.fc1.weight, mlp.fc2.weight, mlp.fc1.bias, mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), expected)


def test_autocast():
    """As torch's linear layers: the product in the dtype of autocast, gradients in that of the parameters."""
    layers = torch.nn.Sequential(FusedDense(24, 24), FusedMLP(24)).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layers(random(3, 24))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layers.parameters())


@pytest.mark.parametrize("layer", [FusedDense(24, 24, return_residual=True), FusedMLP(24, return_residual=True)])
def test_under_autocast_x_comes_back_as_it_was(layer):
    x = random(3, 24).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, back = layer.to(DEVICE)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(back, x)
    back.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_one_tensor_in_two_places_is_one_graph():
    """A skip connection around a layer; tied weights."""
    x, weight, bias = random(3, 24), random(24, 24), random(24)
    for call in (
        lambda x, w, b: fused_dense(x, w, b, residual=x),
        lambda x, w, b: fused_mlp(x, w, w, b, b, implementation="reference"),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
        expected = call(*leaves)
        torch.testing.assert_close(compiled, expected)
        for mine, its in zip(
            *(torch.autograd.grad(y.square().sum(), leaves) for y in (compiled, expected)), strict=True
        ):
            torch.testing.assert_close(mine, its)


def test_refusals():
    x, weight = torch.ones(3, 24), torch.ones(40, 24)
    for call, message in (
        (lambda: fused_dense(x, weight.T), r"weight \(24, 40\) .*: must be \(out_features, 24\) torch.float32"),
        (lambda: fused_dense(x, weight, weight[0]), r"bias of weight \(24,\) .*: must be \(40,\)"),
        (lambda: fused_dense(x, weight, residual=x), r"residual \(3, 24\) .*: must be \(3, 40\)"),
        (lambda: fused_dense(x, weight, residual=x.new_zeros(3, 40).half()), r"residual .* torch.float16: must be"),
        (lambda: fused_mlp(x, weight, weight), r"weight2 \(40, 24\) .*: must be \(out_features, 40\)"),
        (lambda: fused_mlp(x, weight.double(), weight.T), r"weight1 \(40, 24\) torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
