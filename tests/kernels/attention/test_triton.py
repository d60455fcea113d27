"""The Triton attention kernels: in the interpreter on a CPU, compiled on a GPU, the same bodies.

Truth and allowed errors: attention_checks.py. Memory that nobody has written is NaN.
"""

from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_checks import MASKS, check
from longctx.kernels import addressing
from longctx.kernels.attention import (
    kernel_mask,
    mask_cache,
    passes,
    reference,
    tiles,
    triton_backward,
    triton_forward,
)
from longctx.kernels.attention.interface import attention, explain
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from precision import DEVICE, DTYPES
from thorough import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 8), (6, 2, 24), (4, 1, 40), (1, 1, 64), (2, 1, 80), (1, 1, 256)]
)
def test_heads(heads, kv_heads, head_dim, dtype):
    check(MASKS["causal, more keys"], dtype, heads, kv_heads, head_dim, batch=1)


def slopes(*shape):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.3).to(DEVICE)


OPTIONS = {
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": slopes(4)},
    "alibi of a batch": {"alibi_slopes": slopes(2, 4)},
    "sink": {"sink": torch.tensor([-1.0, 0.0, 2.0, 5.0]).to(DEVICE)},
    "dropout": {"dropout": 0.3, "seed": torch.tensor([(77 << 32) + 5], device=DEVICE)},
    "deterministic": {"deterministic": True},
}
OPTIONS["all"] = {
    name: value
    for part in ("softcap", "alibi", "sink", "dropout", "deterministic")
    for name, value in OPTIONS[part].items()
}


def option_marks(option: str, mask: str, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """All at once with each mask, each alone with one, and in 16 bits one call: the rest tells nothing new."""
    is_once = mask == "sequences, causal"
    is_needed = option == "all" or is_once if dtype == torch.float32 else option == "all" and is_once
    return [] if is_needed else [pytest.mark.slow]


OPTION_CASES = [
    pytest.param(option, mask, dtype, marks=option_marks(option, mask, dtype))
    for option in OPTIONS for mask in ("causal, more keys", "zigzag hop", "sequences, causal") for dtype in DTYPES
]  # fmt: skip


@pytest.mark.parametrize(("option", "mask", "dtype"), OPTION_CASES, ids=str)
def test_options(option, mask, dtype):
    check(MASKS[mask], dtype, **OPTIONS[option])


@settings(max_examples=examples(20), deadline=None)
@given(st.data())
def test_any_intervals_shapes_and_strides(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    n_queries, n_keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    batch, kv_heads, group = (data.draw(st.integers(1, 2)) for _ in range(3))
    head_dim = data.draw(st.sampled_from([1, 4, 7, 16, 33]))
    bounds = st.lists(st.integers(0, n_keys), min_size=n_queries, max_size=n_queries).map(sorted)
    rows = data.draw(st.sampled_from([1, batch]))
    start, end = (torch.tensor([data.draw(bounds) for _ in range(rows)]) for _ in range(2))
    mask = KeyIntervals.intervals(start, end, n_keys).to(DEVICE)

    def strided(n, heads):
        order = data.draw(st.permutations([0, 1, 2]))
        pad = data.draw(st.integers(0, 3))
        shape = [(batch, n, heads)[i] for i in order]
        x = torch.randn(*shape, head_dim + pad, device=DEVICE)[..., :head_dim]
        return x.permute(*(order.index(i) for i in range(3)), 3)

    inputs = strided(n_queries, kv_heads * group), strided(n_keys, kv_heads), strided(n_keys, kv_heads)
    # a result may be one number, in which large terms cancel
    check(mask, torch.float32, inputs=inputs, floor=32, deterministic=data.draw(st.booleans()))


# tiles ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_tiles_are_what_the_mask_touches(data):
    n_queries, n_keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    bounds = st.lists(st.integers(0, n_keys), min_size=n_queries, max_size=n_queries).map(sorted)
    start, end = (torch.tensor([data.draw(bounds)]) for _ in range(2))
    mask = KeyIntervals.intervals(start, end, n_keys)
    block_q, block_k = data.draw(st.sampled_from([(4, 4), (8, 4), (4, 8), (3, 5)]))
    row_blocks, key_blocks = -(-n_queries // block_q), -(-n_keys // block_k)
    of_rows = tiles.key_tiles(mask, block_q, block_k)[0].tolist()
    of_keys = tiles.row_tiles(mask, block_q, block_k)[0].tolist()
    assert (len(of_rows), len(of_keys)) == (row_blocks, key_blocks)
    seen = mask.dense("cpu")[0, 0]
    for i, (first, full_first, full_last, last) in enumerate(of_rows):
        assert 0 <= first <= full_first <= full_last <= last <= key_blocks
        for j in range(key_blocks):
            tile = seen[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            if tile.any():
                assert first <= j < last
            if full_first <= j < full_last:
                assert tile.all()
                assert tile.shape[1] == block_k
            if tile.all() and tile.shape == (block_q, block_k):  # no tile is masked in vain
                assert full_first <= j < full_last
            low, high = of_keys[j][0], of_keys[j][3]
            assert (first <= j < last) == (low <= i < high)  # forward and backward visit the same tiles
            if of_keys[j][1] <= i < of_keys[j][2]:
                assert tile.all()
                assert tile.shape == (block_q, block_k)


@settings(max_examples=examples(100), deadline=None)
@given(st.data())
def test_merge_flags_of_rows_in_parts_of_the_keys(data):
    """Whoever sees keys of a part takes part, knows of those before and after, and writes once, with the last."""
    n_queries, n_keys, block = data.draw(st.integers(1, 30)), data.draw(st.integers(3, 30)), 4
    bounds = st.lists(st.integers(0, n_keys), min_size=n_queries, max_size=n_queries).map(sorted)
    start, end = (torch.tensor([data.draw(bounds)]) for _ in range(2))
    mask = KeyIntervals.intervals(start, end, n_keys)
    parts = torch.arange(n_keys).tensor_split(3)
    flags = torch.cat(tiles.merge_flags([mask.keys(part) for part in parts], block))
    seen = mask.dense("cpu")[0, 0]
    for rows, of_rows in zip(seen.split(block), flags.T.tolist(), strict=True):
        sees = [bool(rows[:, part].any()) for part in parts]
        sees[0] |= not any(sees)
        for number, flag in enumerate(of_rows):
            before, after = any(sees[:number]), any(sees[number + 1 :])
            expected = tiles.TAKES_PART + before * tiles.HAS_BEFORE + after * tiles.HAS_AFTER
            assert flag == (expected if sees[number] else 0)


def test_tiles_are_computed_once_a_mask(monkeypatch):
    calls = []
    original = tiles._ordered
    monkeypatch.setattr(tiles, "_ordered", lambda *a: calls.append(1) or original(*a))
    mask = KeyIntervals.causal(40).window(7, DEVICE)
    for _layer in range(3):
        q, k, v = (torch.randn(1, 40, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
        attention(q, k, v, mask, implementation="triton")[0].sum().backward()
    assert len(calls) == 2  # one of the forward pass, one of the backward pass


@pytest.mark.parametrize(("length", "window"), [(4096, 256), (8192, 512)])
def test_a_window_visits_tiles_in_proportion_to_it(length, window):
    mask = KeyIntervals.causal(length).window(window, "cpu")
    first, _, _, last = tiles.key_tiles(mask, 64, 64)[0].unbind(-1)
    assert int((last - first).max()) == window // 64 + 1


# merge and accumulate -------------------------------------------------------------------------------------------------


def test_memory_holds_no_matrix(monkeypatch):
    """What the op allocates: out and lse, then delta, a float32 dq, dk and dv; and once a mask, its tiles."""
    q, k, v = (torch.randn(1, 64, 2, 16, device=DEVICE) for _ in range(3))

    def call():
        out, lse = triton_forward.forward_in_triton(q, k, v, KeyIntervals.causal(64), Options(0.25))
        triton_backward.backward_in_triton(q, None, Saved(q, k, v, out, lse), KeyIntervals.causal(64), Options(0.25))
        return lse

    call()
    sizes = []
    for name in ("empty", "zeros", "empty_like"):
        original = getattr(torch, name)

        def counted(*args, original=original, **kwargs):
            x = original(*args, **kwargs)
            sizes.append(x.numel())
            return x

        monkeypatch.setattr(torch, name, counted)
    lse = call()
    assert sum(sizes) == 4 * q.numel() + 2 * lse.numel()


# determinism, dropout, large indices ----------------------------------------------------------------------------------


def test_dropout_drops_its_share_and_follows_the_seed():
    options = Options(1.0, dropout=0.3, seed=torch.tensor([9]))
    weight = reference.dropout_weight(KeyIntervals.full(200, 300), options, 1, 2)
    assert float((weight == 0).double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / weight.numel()))
    assert set(weight.unique().tolist()) == {0.0, 1 / 0.7}
    other = reference.dropout_weight(
        KeyIntervals.full(200, 300), Options(1.0, dropout=0.3, seed=torch.tensor([10])), 1, 2
    )
    assert float(((weight == 0) == (other == 0)).double().mean()) == pytest.approx(0.58, abs=0.01)
    assert not torch.equal(weight[:, 0], weight[:, 1])


def test_dropout_of_a_shard_is_that_of_the_sequence():
    """Rows 20 to 39 alone drop what they drop in the whole."""
    mask, rows = KeyIntervals.causal(40), torch.arange(20, 40, device=DEVICE)
    q, k, v = (torch.randn(1, 40, 2, 16, device=DEVICE) for _ in range(3))
    seed = torch.tensor([4], device=DEVICE)
    whole, _ = attention(q, k, v, mask, implementation="triton", dropout=0.4, seed=seed)
    part, _ = attention(q[:, rows], k, v, mask.rows(rows), implementation="triton", dropout=0.4, seed=seed)
    torch.testing.assert_close(part, whole[:, rows], rtol=0, atol=1e-6)


def test_philox_gives_the_published_words():
    """Of Random123's known answers, Philox-4x32 with ten rounds: counter and key 0 give 0x6627e8d5 first."""
    at_zero = torch.zeros(1, dtype=torch.int32)
    mask = KeyIntervals(1, 1, query_position=at_zero.unsqueeze(0), key_position=at_zero)
    for threshold, is_kept in ((0x6627E8D5, True), (0x6627E8D6, False)):
        options = Options(1.0, dropout=threshold / 2**32, seed=torch.tensor([0]))
        assert bool(reference.dropout_weight(mask, options, 1, 1) > 0) == is_kept


def test_offsets_pass_two_to_the_31():
    """Rows 2^27 elements apart: the last one starts past 2^31."""
    rows, stride = 18, 2**27
    torch.use_deterministic_algorithms(False)  # 4.6 GB that are never touched, so never filled
    storage = torch.empty((rows - 1) * stride + 16, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((1, rows, 1, 16), (0, stride, 16, 1))
    near = torch.randn(1, rows, 1, 16).to(DEVICE, torch.float16)
    far.copy_(near)
    mask = KeyIntervals.causal(rows)
    for a, b in zip(
        triton_forward.forward_in_triton(far, far, far, mask, Options(0.25)),
        triton_forward.forward_in_triton(near, near, near, mask, Options(0.25)),
        strict=True,
    ):
        assert torch.equal(a, b)


# what is kept, and what is empty --------------------------------------------------------------------------------------


def remembered() -> int:
    gc.collect()
    return len(mask_cache._by_tensor)


def test_masks_that_are_gone_are_forgotten():
    before = remembered()
    for step in range(3):
        mask = KeyIntervals.documents(torch.arange(40).div(10 + step, rounding_mode="floor").mul(10 + step)[None])
        mask = mask.to(DEVICE)
        q = torch.randn(1, 40, 2, 16, device=DEVICE, requires_grad=True)
        attention(q, q, q, mask, implementation="triton", deterministic=True)[0].sum().backward()
    del mask
    assert remembered() == before


def test_bounds_are_the_masks_own():
    """Writing to the tensors a mask was made of changes nothing; a new mask sees what was written."""
    start, end = torch.zeros(1, 40, dtype=torch.int32, device=DEVICE), torch.full((1, 40), 8, device=DEVICE)
    end = end.to(torch.int32)
    q, k, v = (torch.randn(1, 40, 2, 16, device=DEVICE) for _ in range(3))
    few = KeyIntervals.intervals(start, end, 40)
    first, _ = attention(q, k, v, few, implementation="triton")
    end.fill_(40)
    assert torch.equal(attention(q, k, v, few, implementation="triton")[0], first)
    all_keys, _ = attention(q, k, v, KeyIntervals.intervals(start, end, 40), implementation="triton")
    true, _ = attention(q, k, v, KeyIntervals.full(40, 40), implementation="reference")
    torch.testing.assert_close(all_keys, true, rtol=0, atol=2e-6)


def test_a_sink_reaches_rows_without_keys_when_merging():
    mask = KeyIntervals.causal(32, 8)  # 24 rows come before the first key
    q, k = torch.randn(1, 32, 2, 16, device=DEVICE), torch.randn(1, 8, 2, 16, device=DEVICE)
    scores = torch.randn(2, 3, device=DEVICE)
    sink = scores[:, 0]  # not contiguous
    out, lse = torch.zeros(q.shape, device=DEVICE), torch.full((1, 2, 32), -torch.inf, device=DEVICE)
    triton_forward.forward_in_triton(q, k, k, mask, Options(0.25), sink, into=(out, lse))
    true_out, true_lse = passes.attention_forward(q, k, k, mask, Options(0.25), "reference", sink)
    torch.testing.assert_close(out, true_out, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, true_lse, rtol=0, atol=2e-6)


def test_accumulating_over_no_rows_keeps_what_is_there():
    q, k = torch.randn(1, 0, 2, 16, device=DEVICE), torch.randn(1, 8, 2, 16, device=DEVICE)
    into = torch.ones(q.shape, device=DEVICE), torch.ones(k.shape, device=DEVICE), torch.ones(k.shape, device=DEVICE)
    lse = torch.zeros(1, 2, 0, device=DEVICE)
    mask = KeyIntervals.full(0, 8)
    result = passes.attention_backward(q, None, Saved(q, k, k, q, lse), mask, Options(0.25), "triton", into)
    assert all(torch.equal(a, torch.ones_like(a)) for a in result)


# bad calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float64, 16, "Triton kernels take float16, bfloat16 and float32, not torch.float64"),
        (torch.float32, 257, "head_dim 257: must be 1 to 256"),
    ],
)
def test_inputs_beyond_the_kernels(dtype, head_dim, message):
    q = torch.zeros(1, 8, 1, head_dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, KeyIntervals.causal(8), implementation="triton")


@pytest.mark.interpreter
def test_the_interpreter_refuses_bfloat16():
    q = torch.zeros(1, 8, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrong"):
        attention(q, q, q, KeyIntervals.causal(8), implementation="triton")


# the choice -----------------------------------------------------------------------------------------------------------


def test_the_choice_is_explained():
    q = torch.zeros(1, 8, 4, 16)
    said = explain(q, KeyIntervals.causal(8), softcap=2.0)
    assert "sdpa: cannot: torch's kernels are not used with softcap" in said
    assert "reference: chosen: the first that can, for a causal mask in torch.float32 with head_dim 16" in said
    assert "sdpa: chosen: the first that can" in explain(q, KeyIntervals.causal(8), scale=1.0)
    state = torch.get_rng_state()
    assert "dropout" in explain(q, KeyIntervals.causal(8), dropout=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="dropout"):
        explain(q, KeyIntervals.causal(8), dropout=1.5)
    with pytest.raises(TypeError, match="mask is a Tensor"):
        explain(q, q)
    with torch.autocast(DEVICE, torch.float16):
        assert "a causal mask in torch.float16 with" in explain(q.to(DEVICE), KeyIntervals.causal(8))


def test_kernel_masks_carry_positions_only_where_needed():
    mask = MASKS["zigzag hop"]
    assert kernel_mask.kernel_mask(mask, Options(1.0), mask.start.device, 16, 16).query_position is None
    with_slopes = kernel_mask.kernel_mask(mask, Options(1.0, alibi_slopes=slopes(4)), mask.start.device, 16, 16)
    assert with_slopes.query_position is mask.query_position
    assert addressing.padded(1) == 16
    assert addressing.padded(33) == 64
