"""Numbers against float64: the error may be 1.5 x that of the same op in plain torch at the same precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def relative_error(x: Tensor, true: Tensor) -> float:
    """Of the finite entries; infinities must be in the same places, and nothing may be NaN."""
    finite = true.isfinite()
    x, true = x.detach().double().to(true.device), true.detach()
    assert torch.equal(x[~finite], true[~finite])
    return float((x[finite] - true[finite]).norm() / true[finite].norm().clamp(min=1e-30))


def results(function: Callable, inputs: Sequence[Tensor | None], dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """What `function(*inputs)` returns, then its gradients to the floating inputs, for random gradients in `dtype`."""
    inputs = [x if x is None or not x.is_floating_point() else x.detach().requires_grad_() for x in inputs]
    returned = function(*inputs)
    returned = [y for y in (returned if isinstance(returned, tuple) else (returned,)) if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    gradients = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, dtype).to(y.dtype) for y in returned
    ]
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    return [*returned, *torch.autograd.grad(returned, leaves, gradients)]


def assert_precise(
    mine: Callable,
    plain: Callable,
    inputs: Sequence[Tensor | None],
    same_precision: Callable | None = None,
    ulps: float = 1,
) -> None:
    """`mine` against `plain` in float64, forward and backward.

    The allowed error is 1.5 x that of `same_precision` (by default `plain`) on the inputs as they are, and never less
    than 1.5 x half a unit in the last place of the result's norm, in float32 `ulps` units.
    """
    exact = [x if x is None or not x.is_floating_point() else x.double() for x in inputs]
    dtype = next(x.dtype for x in inputs if x is not None and x.is_floating_point())
    truth = results(plain, exact, dtype)
    compared = zip(results(mine, inputs, dtype), results(same_precision or plain, inputs, dtype), truth, strict=True)
    for index, (ours, theirs, true) in enumerate(compared):
        assert ours.dtype == theirs.dtype, (index, ours.dtype, theirs.dtype)
        least = torch.finfo(ours.dtype).eps * (ulps if ours.dtype == torch.float32 else 0.5)
        allowed = 1.5 * max(least, relative_error(theirs, true))  # NaN of theirs: the least
        error = relative_error(ours, true)
        assert error <= allowed, f"result {index}: error {error:.2e}, allowed {allowed:.2e}"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
