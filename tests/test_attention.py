"""The attention op: every implementation against float64, forward and backward, through lse too."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import relative_error

from longctx.kernels.attention.interface import Call, attention
from longctx.kernels.attention.mask import KeyIntervals, windowed
from longctx.kernels.attention.options import Options

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(1))]


def make_masks(batch: int, n: int, device: str) -> dict[str, KeyIntervals]:
    starts = torch.zeros(batch, n, dtype=torch.int64)
    starts[0, n // 9 :], starts[0, n // 2 :] = n // 9, n // 2
    starts[-1, n // 3 :], starts[-1, n - 1 :] = n // 3, n - 1
    documents = KeyIntervals.documents(starts.to(device))
    quarter = n // 4
    inner = torch.cat((torch.arange(quarter, 2 * quarter), torch.arange(2 * quarter, 3 * quarter))).to(device)
    outer = torch.cat((torch.arange(quarter), torch.arange(3 * quarter, 4 * quarter))).to(device)
    return {
        "full": KeyIntervals.full(n, n),
        "causal": KeyIntervals.causal(n),
        "causal, more keys": KeyIntervals.causal(n, n + 7),
        "causal, fewer keys": KeyIntervals.causal(n, n - 5),
        "window": KeyIntervals.causal(n).window(7, device),
        "window of one": KeyIntervals.causal(n).window(1, device),
        "documents": documents,
        "documents and window": documents.window(6, device),
        "zigzag rows": documents.rows(outer),
        "zigzag hop": documents.rows(inner).keys(outer),
        "zigzag hop with window": documents.window(9, device).rows(outer).keys(inner),
    }


MASKS = list(make_masks(2, 96, "cpu"))


def run(implementation, dtype, device, mask, heads, kv_heads, head_dim, batch=2):
    """out, lse, dq, dk, dv under random gradients of both results."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (
        random(batch, n, h, head_dim).bfloat16().to(device, dtype).requires_grad_()  # the same values in every dtype
        for n, h in ((mask.n_queries, heads), (mask.n_keys, kv_heads), (mask.n_keys, kv_heads))
    )
    out, lse = attention(q, k, v, mask, implementation=implementation)
    dout = random(*out.shape).bfloat16().to(device, dtype)
    dlse = random(*lse.shape).bfloat16().to(device, lse.dtype) * lse.isfinite()
    torch.autograd.backward((out, lse), (dout, dlse))
    return out.detach(), lse.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MASKS)
def test_sdpa_against_float64(name, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    mask = make_masks(2, 96, device)[name]
    mask_cpu = make_masks(2, 96, "cpu")[name]
    true = run("reference", torch.float64, "cpu", mask_cpu, 4, 2, 16)
    same_precision = run("reference", dtype, device, mask, 4, 2, 16)
    results = run("sdpa", dtype, device, mask, 4, 2, 16)
    for what, result, plain, t in zip(("out", "lse", "dq", "dk", "dv"), results, same_precision, true, strict=True):
        # the reference computes in float32 and rounds once; a bf16 kernel rounds the probabilities too
        allowed = 3 * relative_error(plain, t) + (1e-6 if device == "cpu" else 4e-3)
        assert relative_error(result, t) < allowed, what


@pytest.mark.parametrize("device", DEVICES)
def test_without_gradient_of_lse(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    mask, mask_cpu = (make_masks(1, 64, d)["documents and window"] for d in (device, "cpu"))
    q, k, v = (torch.randn(1, 64, 2, 32).to(dtype) for _ in range(3))
    dout = torch.randn(1, 64, 2, 32).to(dtype)

    def gradients(dtype, device, mask, implementation):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out, _ = attention(*inputs, mask, implementation=implementation)
        return torch.autograd.grad(out, inputs, dout.to(device, dtype))

    true = gradients(torch.float64, "cpu", mask_cpu, "reference")
    for result, t in zip(gradients(dtype, device, mask, "sdpa"), true, strict=True):
        assert relative_error(result, t) < (2e-6 if device == "cpu" else 8e-3)


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_results_are_contiguous_as_the_op_promises(implementation):
    q = torch.randn(1, 2, 12, 8).transpose(1, 2).requires_grad_()
    mask = KeyIntervals.causal(12).window(5, "cpu")
    torch.library.opcheck(
        torch.ops.longctx.attention.default, (q, q, q, None, *Call.of(mask, Options(0.3), implementation))
    )


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_gradcheck(implementation):
    q, k, v = (torch.randn(1, 10, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = KeyIntervals.documents(torch.tensor([[0] * 4 + [4] * 6])).window(3, "cpu")
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask, implementation=implementation), (q, k, v))


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_rows_without_keys(implementation):
    mask = KeyIntervals.causal(8, 3)  # the first five queries come before the first key
    q, k, v = (torch.randn(1, n, 2, 4, requires_grad=True) for n in (8, 3, 3))
    out, lse = attention(q, k, v, mask, implementation=implementation)
    out.sum().backward()
    assert torch.equal(out[:, :5], torch.zeros(1, 5, 2, 4))
    assert torch.equal(lse[:, :, :5], torch.full((1, 2, 5), -torch.inf))
    assert torch.equal(q.grad[:, :5], torch.zeros(1, 5, 2, 4))
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_monotone_intervals(data):
    n_queries, n_keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    bounds = st.lists(st.integers(0, n_keys), min_size=n_queries, max_size=n_queries).map(sorted)
    start, end = (torch.tensor([data.draw(bounds)], dtype=torch.int32) for _ in range(2))
    mask = KeyIntervals(n_queries, n_keys, start=start, end=end)
    results = run("sdpa", torch.float32, "cpu", mask, 2, 1, 8, batch=1)
    for result, true in zip(results, run("reference", torch.float64, "cpu", mask, 2, 1, 8, batch=1), strict=True):
        assert relative_error(result, true) < 3e-6


def test_subset_of_keys_keeps_the_mask():
    mask = KeyIntervals.documents(torch.tensor([[0] * 11 + [11] * 20 + [31] * 9])).window(9, "cpu")
    rows, keys = torch.tensor([0, 3, 10, 11, 12, 30, 39]), torch.tensor([1, 2, 9, 10, 11, 25, 30, 31, 38])
    whole = mask.dense("cpu")
    part = mask.rows(rows).keys(keys).dense("cpu")
    assert torch.equal(part[0, 0], whole[0, 0][rows][:, keys])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": KeyIntervals.causal(9)}, "the mask is for 9 queries and 9 keys, the call has 8 and 8"),
        ({"k": torch.zeros(2, 8, 3, 4), "v": torch.zeros(2, 8, 3, 4)}, "4 query heads are no multiple of 3"),
        ({"q": torch.zeros(2, 8, 4, 4).double()}, "must be of one floating dtype"),
        ({"implementation": "flash"}, "'flash' is none of auto, hopper, triton, sdpa, reference"),
    ],
)
def test_bad_calls(change, message):
    q, kv = torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 4)
    arguments = {"q": q, "k": kv, "v": kv, "mask": KeyIntervals.causal(8), "implementation": "auto"} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_the_window_of_a_mask_is_made_once():
    mask = KeyIntervals.documents(torch.tensor([[0, 0, 0, 3, 3, 3]]))
    first = windowed(mask, 2, torch.device("cpu"))
    assert windowed(mask, 2, torch.device("cpu")) is first
    assert first.dense("cpu").equal(mask.window(2, "cpu").dense("cpu"))
    assert windowed(mask, 3, torch.device("cpu")) is not first
    last = weakref.ref(mask.start)
    del mask, first
    assert last() is None
