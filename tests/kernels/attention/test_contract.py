"""What every implementation of attention must do; a new one adds a line to `IMPLEMENTATIONS`.

Truth and allowed errors: attention_checks.py. Memory that nobody has written is NaN.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_checks import LARGE_MASKS, MASKS, check
from longctx.kernels.attention import choice, passes
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.custom_op import Call
from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.attention.tiles import MERGED_ROWS, merge_flags
from precision import DEVICE, DTYPES, relative_error
from thorough import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = ["reference", "sdpa", "triton", pytest.param("hopper", marks=pytest.mark.hopper)]
ON_CPU = DEVICE == "cpu"


def dtypes(implementation: str) -> list[torch.dtype]:
    """Those that it takes on this device."""
    if implementation in ("reference", "sdpa"):
        return [torch.float32] if ON_CPU or implementation == "reference" else [torch.bfloat16]
    return DTYPES if implementation == "triton" else [torch.float16, torch.bfloat16]


def random(implementation: str, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtypes(implementation)[-1])


def marks(implementation: str, dtype: torch.dtype, name: str) -> list[pytest.MarkDecorator]:
    """In the interpreter 16 bits are seconds a mask, which they do not depend on: two show what they do."""
    if implementation == "hopper":
        return [pytest.mark.hopper]
    is_told_by_others = implementation == "triton" and dtype != torch.float32 and name not in TWO_MASKS
    return [pytest.mark.slow] if is_told_by_others else []


TWO_MASKS = ("causal", "sequences, causal")
CASES = [
    pytest.param(name, implementation, dtype, marks=marks(implementation, dtype, name))
    for implementation in ("sdpa", "triton", "hopper") for dtype in dtypes(implementation) for name in MASKS
]  # fmt: skip


@pytest.mark.parametrize(("name", "implementation", "dtype"), CASES, ids=str)
def test_values_and_gradients(name, implementation, dtype):
    """Of torch's kernels plain torch is no measure: a 16-bit one rounds the probabilities too."""
    check(MASKS[name], dtype, implementation=implementation, factor=3 if implementation == "sdpa" else 1.5)


@settings(max_examples=examples(30), deadline=None)
@given(st.data())
def test_any_monotone_intervals(data):
    """With torch's kernels, which cut the mask into runs of rows."""
    n_queries, n_keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    bounds = st.lists(st.integers(0, n_keys), min_size=n_queries, max_size=n_queries).map(sorted)
    start, end = (torch.tensor([data.draw(bounds)], dtype=torch.int32) for _ in range(2))
    mask = KeyIntervals(n_queries, n_keys, start=start, end=end).to(DEVICE)
    check(mask, dtypes("sdpa")[0], 2, 1, 8, batch=1, implementation="sdpa", factor=3, floor=32)


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_gradcheck(implementation):
    if not ON_CPU:
        implementation = "reference"
    q, k, v = (torch.randn(1, 10, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = KeyIntervals.documents(torch.tensor([[0] * 4 + [4] * 6])).window(3, "cpu")
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask, implementation=implementation), (q, k, v))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_keys(implementation):
    mask = KeyIntervals.causal(8, 3)  # the first five queries come before the first key
    q, k, v = (random(implementation, 1, n, 2, 16).requires_grad_() for n in (8, 3, 3))
    out, lse = attention(q, k, v, mask, implementation=implementation)
    out.sum().backward()
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    assert torch.equal(lse[:, :, :5], torch.full_like(lse[:, :, :5], -torch.inf))
    assert torch.equal(q.grad[:, :5], torch.zeros_like(q[:, :5]))
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(n_queries, n_keys, implementation):
    q, k, v = (random(implementation, 2, n, 2, 16).requires_grad_() for n in (n_queries, n_keys, n_keys))
    sink = torch.tensor([0.5, 2.0], device=DEVICE)
    out, lse = attention(q, k, v, KeyIntervals.full(n_queries, n_keys), implementation=implementation, sink=sink)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, sink.view(1, 2, 1).expand(2, 2, n_queries))
    for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_halves_of_the_keys_are_the_whole(implementation):
    """Forward and backward, block by block; what the sums of gradients hold already stays in them."""
    mask = (LARGE_MASKS if implementation == "hopper" else MASKS)["documents"]
    n, options = mask.n_keys, Options(0.25)
    halves = torch.arange(0, n // 2, device=DEVICE), torch.arange(n // 2, n, device=DEVICE)
    q, dout = (random(implementation, 2, n, 4, 64, seed=seed) for seed in (0, 1))
    k, v = (random(implementation, 2, n, 2, 64, seed=seed) for seed in (2, 3))
    whole, whole_lse = passes.attention_forward(q, k, v, mask, options, implementation)
    masks = [mask.keys(half) for half in halves]
    in_parts = passes.PartialForward(q, options, implementation)
    for half, of_half, flags in zip(halves, masks, merge_flags(masks, MERGED_ROWS), strict=True):
        in_parts.add(k[:, half], v[:, half], of_half, flags)
    out, lse = in_parts.results()
    unit = torch.finfo(q.dtype).eps
    assert relative_error(out, whole.double()) < 2 * unit
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-5)

    saved = Saved(q, k, v, whole, whole_lse)
    gradients = passes.attention_backward(dout, None, saved, mask, options, implementation)
    backward = passes.PartialBackward(dout, None, q, whole, whole_lse, options, implementation)
    dk, dv = (torch.ones(k.shape, device=DEVICE) for _ in range(2))
    for half, of_half in zip(halves, masks, strict=True):
        parts = dk[:, half], dv[:, half]
        backward.add(k[:, half], v[:, half], of_half, parts)
        dk[:, half], dv[:, half] = parts
    for mine, true in zip((backward.dq(), dk - 1, dv - 1), gradients, strict=True):
        assert relative_error(mine, true.double()) < 2 * unit


@pytest.mark.parametrize("implementation", ["triton", pytest.param("hopper", marks=pytest.mark.hopper)])
@pytest.mark.parametrize("head_dim", [64, *(pytest.param(d, marks=pytest.mark.slow) for d in (128, 256))])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_deterministic_gradients_are_the_same_bits(implementation, head_dim, kv_heads):
    mask, n = MASKS["documents"], 45
    if not ON_CPU:
        n = 3000
        mask = KeyIntervals.documents(torch.tensor([[0] * 900 + [900] * 2100], device=DEVICE))
    shapes = [(2 if ON_CPU else 1, n, heads, head_dim) for heads in (4, kv_heads, kv_heads)]
    inputs = [random(implementation, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]

    def results():
        out, lse = attention(*inputs, mask, implementation=implementation, deterministic=True)
        return out, lse, *torch.autograd.grad(out.float().square().sum(), inputs)

    first = results()
    for _ in range(2 if ON_CPU else 20):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_results_are_contiguous_as_the_op_promises(implementation):
    q = torch.randn(1, 2, 12, 8).transpose(1, 2).requires_grad_()
    mask = KeyIntervals.causal(12).window(5, "cpu")
    call = Call(mask, Options(0.3), "reference" if not ON_CPU else implementation)
    torch.library.opcheck(torch.ops.longctx.attention.default, (q, q, q, None, *call.flat()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_graph(implementation):
    """torch.compile breaks nothing, with every option that it has; gradients are those without."""
    mask = MASKS["sequences, causal"]
    options: dict = {"deterministic": implementation == "hopper"}
    if implementation in ("triton", "reference"):
        slopes, seed = torch.tensor([0.1, 0.2, 0.05, 0.3]).to(DEVICE), torch.tensor([77 << 32], device=DEVICE)
        options = {"softcap": 1.5, "alibi_slopes": slopes, "dropout": 0.3, "seed": seed, "deterministic": True}
    sink = torch.tensor([-1.0, 0.0, 2.0, 5.0]).to(DEVICE).requires_grad_()
    inputs = [random(implementation, 1, n, heads, 16).requires_grad_() for n, heads in ((40, 4), (52, 2), (52, 2))]

    def loss(*inputs):
        out, lse = attention(*inputs[:3], mask, implementation=implementation, sink=inputs[3], **options)
        return out.float().square().sum() + torch.where(lse.isfinite(), lse, 0).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(loss(*inputs, sink), (*inputs, sink)),
        torch.autograd.grad(compiled(*inputs, sink), (*inputs, sink)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_validation_makes_training_may_use():
    mask = KeyIntervals.causal(33)
    q = torch.randn(1, 33, 2, 16, device=DEVICE)
    with torch.inference_mode():
        attention(q, q, q, mask, implementation="triton")
    q.requires_grad_()
    attention(q, q, q, mask, implementation="triton")[0].sum().backward()
    assert bool(q.grad.isfinite().all())


def test_autocast():
    """As of torch's attention: whatever q, k and v are, they are in the dtype of autocast, but for float64."""
    q = torch.randn(1, 8, 2, 16, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, _ = attention(q, q.bfloat16(), q.bfloat16(), KeyIntervals.causal(8))
        exact, _ = attention(*[q.double()] * 3, KeyIntervals.causal(8), implementation="reference")
    assert (out.dtype, exact.dtype) == (torch.bfloat16, torch.float64)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_ends_at_the_op(options, dtype):
    """Inside, products are of the dtypes that the op chooses: results are those of inputs that were cast before."""
    q, k, v, dout = (torch.randn(1, 64, 2, 16, device=DEVICE, dtype=dtype) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    found = []
    for is_on in (False, True):
        with torch.autocast(DEVICE, dtype, enabled=is_on):
            out, lse = attention(q, k, v, KeyIntervals.causal(64), implementation="reference", **options)
            gradients = torch.autograd.grad(out, (q, k, v), dout)
        found.append((out, lse, *gradients))
    assert found[1][1].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_mask_of_blocks_that_does_not_fit_is_refused():
    q = torch.zeros(1, 64, 2, 16, device=DEVICE)
    intervals = KeyIntervals.causal(64).with_bounds(DEVICE)
    kept = torch.ones(1, 4, 4, dtype=torch.bool, device=DEVICE)
    for wrong, message in (
        (kept.int(), r"kept \(1, 4, 4\) torch.int32: must be torch.bool, \(1 or 2, 4, 4\)"),
        (kept.expand(3, 4, 4), r"kept \(3, 4, 4\)"),
        (kept[:, :3], r"kept \(1, 3, 4\)"),
        (torch.ones(1, 4, 6, dtype=torch.bool, device=DEVICE), r"kept \(1, 4, 6\)"),
        (kept.tril().transpose(1, 2), "kept is to be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, BlockMask(wrong, 16, 16, intervals))
    with pytest.raises(ValueError, match="its intervals have no bounds: give intervals.with_bounds"):
        attention(q, q, q, BlockMask(kept, 16, 16, KeyIntervals.causal(64)))


@pytest.mark.parametrize("implementation", ["triton", "sdpa"] if ON_CPU else ["triton"])
def test_tensors_of_compiled_code_are_not_known_by_their_identity(implementation):
    """There one mask takes the tensor object of another that is done with, and no version counts what is written."""
    q, k, v = (random("reference", 1, 64, 2, 16, seed=i) for i in range(3))
    wide, narrow = (KeyIntervals.causal(64).window(size, DEVICE) for size in (40, 8))
    options = Options(0.25)
    flat = Call(wide, options, implementation).flat()
    flat = [x.clone() if isinstance(x, torch.Tensor) else x for x in flat]  # not made as parts of a mask
    for mask in (wide, narrow):
        for tensor, wanted in zip(flat, Call(mask, options, implementation).flat(), strict=True):
            if isinstance(tensor, torch.Tensor):
                version = tensor._version
                tensor.data.copy_(wanted)
                assert tensor._version == version
        out, _ = torch.ops.longctx.attention(q, k, v, None, *flat)
        expected, _ = attention(q, k, v, mask, 0.25, "reference")
        assert relative_error(out, expected) < 1e-5


def test_masks_made_in_a_compiled_function():
    q, k, v = (random("reference", 1, 64, 2, 16, seed=i) for i in range(3))

    def windows(q, k, v):
        for size in (16, 40, 8):
            q = attention(q, k, v, KeyIntervals.causal(64).window(size, q.device), implementation="reference")[0]
        return q

    compiled = torch.compile(windows, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), windows(q, k, v))


def test_a_batch_larger_than_a_grid_is_refused():
    q = torch.empty(65536, 1, 1, 8, device="meta")
    reasons = choice.unsupported(q, KeyIntervals.causal(1), Options(1.0))
    assert reasons.pop("reference") is None
    assert set(reasons.values()) == {"a batch of 65536, where a grid has at most 65535: split it"}


def test_a_seed_is_a_tensor():
    x = torch.zeros(2, 8, 4, 4)
    with pytest.raises(ValueError, match=r"seed 1: must be a tensor, such as torch.tensor\(1, device=q.device\)"):
        attention(x, x, x, KeyIntervals.causal(8), dropout=0.1, seed=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sink": 1.0}, r"sink 1.0: must be a tensor \(4,\)"),
        ({"sink": torch.zeros(4, dtype=torch.int64)}, r"sink \(4,\) on cpu, torch.int64"),
        ({"scale": "auto"}, "scale auto: must be finite"),
    ],
    ids=str,
)
def test_options_of_other_kinds_are_named(options, said):
    x = torch.zeros(2, 8, 4, 4)
    with pytest.raises(ValueError, match=said):
        attention(x, x, x, KeyIntervals.causal(8), **options)


def test_no_softcap_is_none_or_0():
    x = torch.randn(2, 8, 4, 4)
    given = [attention(x, x, x, KeyIntervals.causal(8), softcap=softcap)[0] for softcap in (None, 0.0)]
    assert torch.equal(*given)


@pytest.mark.parametrize("size", [-1, 8.0, True])
def test_numbers_of_rows_and_keys_are_numbers(size):
    for make in (KeyIntervals.causal, KeyIntervals.full):
        with pytest.raises(ValueError, match=f"a mask over {size!r} rows or keys: give their number, 0 or more"):
            make(8, size)


def test_a_mask_is_an_object_of_its_own():
    x = torch.zeros(2, 8, 4, 4)
    with pytest.raises(TypeError, match="mask is a Tensor, must be a KeyIntervals or BlockMask"):
        attention(x, x, x, torch.ones(8, 8, dtype=torch.bool))


@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
def test_heads_whose_numbers_are_apart(implementation):
    """As slices of projections that end in something else; gradients may come like that too."""
    if DEVICE != "cpu" and implementation == "sdpa":
        dtype, most = torch.bfloat16, 2e-2
    else:
        dtype, most = torch.float32, 1e-5
    x = torch.randn(1, 16, 4, 8, 4, device=DEVICE, dtype=dtype)
    for mask in (KeyIntervals.causal(16), KeyIntervals.documents(torch.tensor([[0] * 5 + [5] * 11])).to(DEVICE)):

        def gradients(implementation, mask=mask):
            inputs = [part.detach().requires_grad_() for part in x.unbind(-1)[:3]]
            out, _ = attention(*inputs, mask, implementation=implementation)
            return out, *torch.autograd.grad(out, inputs, x.unbind(-1)[3])

        for mine, true in zip(gradients(implementation), gradients("reference"), strict=True):
            assert relative_error(mine, true.double()) < most


def test_gradients_of_many_runs_are_summed_in_float32():
    """On a CPU each row that sees two keys more than the one before is a call of its own."""
    start, end = torch.zeros(512, dtype=torch.int32), torch.arange(2, 1026, 2, dtype=torch.int32)
    mask = KeyIntervals.intervals(start, end, 1024).to(DEVICE)
    q, k, v, dout = (torch.randn(1, n, 1, 16, device=DEVICE) for n in (512, 1024, 1024, 512))

    def gradients(dtype, implementation):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = attention(*inputs, mask, implementation=implementation)
        return torch.autograd.grad(out, inputs, dout.to(dtype))

    for mine, true in zip(gradients(torch.bfloat16, "auto"), gradients(torch.float64, "reference"), strict=True):
        assert relative_error(mine, true) < 8e-3


def test_a_sink_of_no_weight_beside_no_key():
    """A row that sees nothing has out 0 and zero gradients, whatever the sink is."""
    mask, sink = KeyIntervals.causal(8, 4), torch.full((2,), -torch.inf, device=DEVICE, requires_grad=True)
    q, kv = (torch.randn(1, n, 2, 8, device=DEVICE, requires_grad=True) for n in (8, 4))
    out, lse = attention(q, kv, kv, mask, sink=sink)
    assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
    assert torch.equal(lse[..., :4], torch.full_like(lse[..., :4], -torch.inf))
    for gradient in torch.autograd.grad(out.sum(), (q, kv, sink)):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": KeyIntervals.causal(9)}, "the mask is for 9 queries and 9 keys, the call has 8 and 8"),
        ({"k": torch.zeros(2, 8, 3, 4), "v": torch.zeros(2, 8, 3, 4)}, "4 query heads are no multiple of 3"),
        ({"q": torch.zeros(2, 8, 4, 4).double()}, "must be of one floating dtype"),
        ({"implementation": "flash"}, "'flash' is none of auto, hopper, triton, sdpa, reference"),
        ({"scale": -1.0}, "scale -1.0: must be finite, above 0"),
        ({"scale": torch.ones((), requires_grad=True)}, "no tensor: multiply a learned one into q"),
        ({"scale": math.inf}, "scale inf: must be finite, above 0"),
        ({"softcap": -2.0}, "softcap -2.0: must be finite and above 0, or 0 for none"),
        ({"softcap": math.nan}, "softcap nan: must be finite and above 0, or 0 for none"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes get no gradient here"),
        ({"dropout": 1.0}, "dropout 1.0: must be a probability below 1"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes \(3,\) torch.float32: must be torch.float32"),
        ({"sink": torch.ones(3)}, r"sink \(3,\) on .*: must be \(4,\), a score a query head"),
        ({"dropout": 0.1, "seed": torch.ones(2, dtype=torch.int64)}, "must be one torch.int64"),
    ],
)
def test_bad_calls(change, message):
    """The same words, whatever would serve the call."""
    q, kv = torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 4)
    arguments = {"q": q, "k": kv, "v": kv, "mask": KeyIntervals.causal(8), "implementation": "auto"} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
