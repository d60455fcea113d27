"""Tensors of more than 2^31 elements, as a million tokens of one GPU have: each part is as if it had come alone.

No other test's offsets leave 32 bits in more than one of an op's tensors. Each case takes up to 60 GB of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.loss.cross_entropy import cross_entropy
from longctx.kernels.loss.linear_cross_entropy import linear_cross_entropy
from longctx.kernels.norm.layer_norm import layer_norm
from longctx.kernels.norm.rms_norm import add_rms_norm, rms_norm
from longctx.kernels.rotary import apply_rotary_to_both
from longctx.kernels.softmax import softmax
from longctx.kernels.swiglu import swiglu
from precision import DEVICE

pytestmark = pytest.mark.gpu(1, gib=75)
DOCUMENT = 4096
TOKENS = 269 * DOCUMENT  # of 2048 elements: 2^31 is passed by 5 %


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=DEVICE)


def with_gradients(function: Callable, *inputs: Tensor, seed: int = 9) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the inputs. The gradient of a result's element depends on its place in a row alone."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    results = function(*inputs)
    results = list(results) if isinstance(results, tuple) else [results]
    of_results = [random(1, *y.shape[1:], seed=seed).to(y.dtype).expand(y.shape) for y in results]
    return [y.detach() for y in results], list(torch.autograd.grad(results, inputs, of_results))


def assert_near(whole: Tensor, alone: Tensor, what: str) -> None:
    """To half a unit in the last place of bfloat16: forward at head_dim 64 tiles of 192 rows begin elsewhere alone."""
    error = float((whole.float() - alone.float()).norm() / alone.float().norm())
    assert error <= 2e-3, f"{what}: {error:.1e}"


@pytest.mark.parametrize(
    ("function", "shapes", "n_weights"),
    [
        pytest.param(rms_norm, [(TOKENS // 2, 4096), (4096,)], 1, id="rms_norm"),
        pytest.param(rms_norm, [(TOKENS * 16, 128), (128,)], 1, id="rms_norm of heads"),
        pytest.param(add_rms_norm, [(TOKENS // 2, 4096), (TOKENS // 2, 4096), (4096,)], 1, id="add_rms_norm"),
        pytest.param(layer_norm, [(TOKENS // 2, 4096), (4096,), (4096,)], 2, id="layer_norm"),
        pytest.param(swiglu, [(TOKENS // 2, 4096), (TOKENS // 2, 4096)], 0, id="swiglu"),
        pytest.param(lambda x: swiglu(x, None), [(TOKENS // 4, 8192)], 0, id="swiglu, packed"),
        pytest.param(softmax, [(TOKENS // 2, 4096)], 0, id="softmax"),
    ],
)
def test_rows(function, shapes, n_weights):
    inputs = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    n_rows, of_rows, weights = len(inputs[0]), inputs[: len(inputs) - n_weights], inputs[len(inputs) - n_weights :]
    assert inputs[0].numel() > 2**31
    results, gradients = with_gradients(function, *inputs)
    of_weights = [torch.zeros(x.shape, device=DEVICE) for x in weights]
    for part in torch.arange(n_rows, device=DEVICE).split(-(-n_rows // 8)):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        alone, gradients_alone = with_gradients(function, *(x[rows] for x in of_rows), *weights)
        for index, (x, y) in enumerate(
            zip(results + gradients[: len(of_rows)], alone + gradients_alone[: len(of_rows)], strict=True)
        ):
            assert_near(x[rows], y, f"rows from {rows.start}, tensor {index}")
        for total, x in zip(of_weights, gradients_alone[len(of_rows) :], strict=True):
            total.add_(x)
    for x, total in zip(gradients[len(of_rows) :], of_weights, strict=True):
        assert float((x - total).norm() / total.norm()) <= 4e-3  # parts are rounded to bfloat16


def test_rotary():
    q, k = random(1, TOKENS, 16, 128), random(1, TOKENS, 16, 128, seed=1)
    angles = torch.arange(TOKENS, device=DEVICE).unsqueeze(1) * torch.linspace(1, 1e-6, 64, device=DEVICE)
    cos, sin = angles.cos().unsqueeze(0), angles.sin().unsqueeze(0)

    def turned(rows: slice) -> list[Tensor]:
        mine = [x[:, rows].transpose(0, 1) for x in (q, k)]

        def of(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            both = apply_rotary_to_both(q.transpose(0, 1), k.transpose(0, 1), cos[:, rows], sin[:, rows])
            return tuple(x.transpose(0, 1) for x in both)

        results, gradients = with_gradients(of, *mine)
        return results + gradients

    whole = turned(slice(None))
    for first in range(0, TOKENS, TOKENS // 8 + 1):
        rows = slice(first, min(first + TOKENS // 8 + 1, TOKENS))
        for x, y in zip(whole, turned(rows), strict=True):
            assert torch.equal(x[rows], y), rows


@pytest.mark.parametrize("inplace", [False, True])
def test_cross_entropy(inplace):
    logits = random(16384, 151936)
    targets = torch.arange(16384, device=DEVICE) * 7

    def losses_and_gradient(rows: slice) -> tuple[Tensor, Tensor]:
        x = logits[rows].clone().requires_grad_()
        loss = cross_entropy(x.clone() if inplace else x, targets[rows], reduction="sum", inplace=inplace)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    loss, gradient = losses_and_gradient(slice(None))
    parts = torch.zeros((), device=DEVICE)
    for first in range(0, len(logits), 4096):
        part, of_logits = losses_and_gradient(slice(first, first + 4096))
        parts += part
        assert torch.equal(gradient[first : first + 4096], of_logits), first
    torch.testing.assert_close(loss, parts, rtol=1e-6, atol=0)


def test_linear_cross_entropy():
    hidden, weight = random(TOKENS, 2048), random(1000, 2048, seed=1) / 64
    targets = torch.arange(TOKENS, device=DEVICE) % 1000

    def loss_and_gradients(rows: slice) -> tuple[Tensor, ...]:
        x, w = hidden[rows].detach().requires_grad_(), weight.detach().requires_grad_()
        loss = linear_cross_entropy(x, w, targets[rows], reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    loss, of_hidden, of_weight = loss_and_gradients(slice(None))
    losses, weights = torch.zeros((), device=DEVICE), torch.zeros(weight.shape, device=DEVICE)
    for first in range(0, TOKENS, TOKENS // 8 + 1):
        rows = slice(first, first + TOKENS // 8 + 1)
        part, of_rows, of_weights = loss_and_gradients(rows)
        losses, weights = losses + part, weights + of_weights
        assert_near(of_hidden[rows], of_rows, f"rows from {first}")
    torch.testing.assert_close(loss, losses, rtol=1e-5, atol=0)
    assert float((of_weight - weights).norm() / weights.norm()) <= 4e-3


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("implementation", ["auto", "triton"])
@pytest.mark.parametrize("batch", [1, 269])
def test_attention(batch, implementation, head_dim, deterministic):
    """Documents, of which the first, the last and those at offset 2^31 are as if they had come alone."""
    heads, tokens = 2048 // head_dim, TOKENS // batch
    q, k, v = (random(TOKENS, heads, head_dim, seed=seed) for seed in range(3))

    def attend(rows: slice, shape: tuple[int, int], mask: KeyIntervals) -> list[Tensor]:
        def of(*qkv: Tensor) -> Tensor:
            split = (x.view(*shape, heads, head_dim) for x in qkv)
            return attention(*split, mask, implementation=implementation, deterministic=deterministic)[0].flatten(0, 1)

        results, gradients = with_gradients(of, q[rows], k[rows], v[rows])
        return results + gradients

    starts = torch.arange(tokens, device=DEVICE) // DOCUMENT * DOCUMENT
    whole = attend(slice(None), (batch, tokens), KeyIntervals.documents(starts.expand(batch, -1)))
    for document in (0, 255, 256, 268):
        rows = slice(document * DOCUMENT, (document + 1) * DOCUMENT)
        alone = attend(rows, (1, DOCUMENT), KeyIntervals.causal(DOCUMENT))
        for name, x, y in zip(("out", "dq", "dk", "dv"), whole, alone, strict=True):
            assert_near(x[rows], y, f"{name} of document {document}")
