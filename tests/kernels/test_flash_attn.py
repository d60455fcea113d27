"""flash-attention's interface: layouts, alignment, windows, packed forms, dropout, old names and modules."""

from __future__ import annotations

import gc

import pytest
import torch

from longctx.kernels.attention import choice, key_intervals, mask_cache, reference
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.kernels.compat import flash_attn as fa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OFFSETS_Q, OFFSETS_K = [0, 5, 5, 19, 30], [0, 8, 8, 15, 36]


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    monkeypatch.setattr(choice, "by_speed", lambda *_call: ("triton", "sdpa", "reference"))
    torch.manual_seed(0)


def offsets(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def plain(q, k, v, seen, options=None):
    """float64 attention of q (batch, n, heads, d) under a bool matrix (n_queries, n_keys)."""
    options = options or Options(q.shape[-1] ** -0.5)
    q, k, v = (x.double() for x in (q, k, v))
    k, v = reference.repeat_heads(k, q.shape[2]), reference.repeat_heads(v, q.shape[2])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        rows, keys = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=q.device)
        distance = (rows[:, None] + k.shape[1] - q.shape[1] - keys).abs()
        scores = scores - options.slopes(q.shape[0], 1, q.shape[2]).transpose(1, 2).unsqueeze(-1).double() * distance
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1).nan_to_num(0), v), torch.logsumexp(scores, -1)


def seen_pairs(n_queries, n_keys, causal, left, right):
    """By the definition in flash-attention's documentation."""
    row = torch.arange(n_queries, device=DEVICE)[:, None] + n_keys - n_queries
    key = torch.arange(n_keys, device=DEVICE)
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=DEVICE)
    if causal:
        right = 0
    if left >= 0:
        seen &= key >= row - left
    if right >= 0:
        seen &= key <= row + right
    return seen


def assert_close(x, true, atol=3e-6):
    torch.testing.assert_close(x.double(), true.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (4, 2), (-1, 3), (6, -1), (0, 0), (100, 100)])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(20, 20), (9, 25), (25, 9)])
def test_masks(n_queries, n_keys, window, causal):
    q, k, v = random(1, n_queries, 2, 16), random(1, n_keys, 1, 16), random(1, n_keys, 1, 16)
    out, lse, probabilities = fa.flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
    true, true_lse = plain(q, k, v, seen_pairs(n_queries, n_keys, causal, *window))
    assert_close(out, true)
    assert_close(lse, true_lse)
    assert probabilities.numel() == 0


def test_every_option_in_the_packed_forms():
    """The packed forms equal the plain one, forward and backward, and that equals float64."""
    qkv = random(2, 21, 3, 2, 16)
    slopes = torch.tensor([[0.1, 0.2], [0.3, 0.05]], device=DEVICE)
    settings = {"softmax_scale": 0.3, "causal": True, "window_size": (7, -1), "softcap": 2.0, "alibi_slopes": slopes}
    out = fa.flash_attn_qkvpacked_func(qkv, **settings, deterministic=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    plain_out = fa.flash_attn_func(q, k, v, **settings, deterministic=True)
    gradients = torch.autograd.grad(plain_out.square().sum(), (q, k, v))
    assert torch.equal(out, plain_out)
    assert torch.equal(gradient, torch.stack(gradients, 2))
    assert torch.equal(fa.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **settings), plain_out)
    true, _ = plain(q, k, v, seen_pairs(21, 21, True, 7, -1), Options(0.3, 2.0, slopes))
    assert_close(out, true)
    for mine, its in zip(gradients, torch.autograd.grad(true.square().sum(), (q, k, v)), strict=True):
        assert_close(mine, its, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (3, 2)])
def test_sequences_side_by_side(window, causal):
    """Each sequence as if it were alone, with a slope of its own; tokens past the last sequence get 0."""
    total_q, total_k = OFFSETS_Q[-1] + 4, OFFSETS_K[-1]
    q, k, v = random(total_q, 4, 16), random(total_k, 2, 16), random(total_k, 2, 16)
    slopes = torch.rand(4, 4, device=DEVICE)
    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, v, offsets(OFFSETS_Q), offsets(OFFSETS_K), 14, 21, causal=causal, window_size=window,
        alibi_slopes=slopes, return_attn_probs=True,
    )  # fmt: skip
    assert lse.shape == (4, total_q)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    true = torch.zeros_like(out, dtype=torch.float64)
    for s in range(4):
        rows, keys = slice(OFFSETS_Q[s], OFFSETS_Q[s + 1]), slice(OFFSETS_K[s], OFFSETS_K[s + 1])
        n_queries, n_keys = rows.stop - rows.start, keys.stop - keys.start
        seen = seen_pairs(n_queries, n_keys, causal, *window)
        options = Options(0.25, alibi_slopes=slopes[s])
        part, part_lse = plain(q[None, rows], k[None, keys], v[None, keys], seen, options)
        true[rows] = part[0]
        assert_close(lse[:, rows], part_lse[0])
    assert_close(out, true)
    for mine, its in zip(gradients, torch.autograd.grad(true.square().sum(), (q, k, v)), strict=True):
        assert_close(mine, its, atol=2e-5)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_what_lies_past_the_last_sequence_may_be_anything(monkeypatch, implementation):
    """As in a buffer that is larger than what is in it: 0 * NaN would be NaN."""
    monkeypatch.setattr(choice, "by_speed", lambda *_call: (implementation,))
    q, k, v = (random(40, 2, 16) for _ in range(3))
    with torch.no_grad():
        for x in (q, k, v):
            x[27:] = torch.nan
    used = offsets([0, 9, 27])
    out, lse, _ = fa.flash_attn_varlen_func(q, k, v, used, used, 18, 18, causal=True, return_attn_probs=True)
    expected = fa.flash_attn_varlen_func(q[:27], k[:27], v[:27], used, used, 18, 18, causal=True)
    assert_close(out[:27], expected)
    assert not out[27:].any()
    assert lse[:, 27:].isneginf().all()
    for gradient, its in zip(
        torch.autograd.grad(out[:27].square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert_close(gradient, its)
        assert not gradient[27:].any()


def test_the_mask_of_offsets_is_made_once_until_they_are_written_to(monkeypatch):
    made = []
    original = KeyIntervals.sequences
    monkeypatch.setattr(
        key_intervals.KeyIntervals, "sequences", staticmethod(lambda *a: made.append(1) or original(*a))
    )
    q = random(30, 2, 16)
    cu_seqlens = offsets([0, 12, 30])
    first = fa.flash_attn_varlen_qkvpacked_func(torch.stack((q, q, q), 1), cu_seqlens, 18, causal=True)
    fa.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 18, 18, causal=True)
    assert len(made) == 1
    cu_seqlens[1] = 20
    second = fa.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 20, 20, causal=True)
    assert len(made) == 2
    assert not torch.equal(first, second)


def test_dropout_is_what_the_signs_say():
    q, k, v = random(2, 20, 2, 16), random(2, 24, 2, 16), random(2, 24, 2, 16)
    out, _, signed = fa.flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    assert signed.shape == (2, 2, 20, 24)
    assert_close(signed.abs().sum(-1), torch.ones(2, 2, 20, device=DEVICE))
    weights = torch.where(signed > 0, signed, 0) / 0.6
    assert_close(out, torch.einsum("bhij,bjhd->bihd", weights, v))
    assert 0.3 < float((signed < 0).sum() / (signed != 0).sum()) < 0.5
    again = fa.flash_attn_func(q, k, v, 0.4, causal=True)
    assert not torch.equal(again, out)


def test_dropout_of_sequences():
    q, k, v = random(OFFSETS_Q[-1], 2, 16), random(OFFSETS_K[-1], 2, 16), random(OFFSETS_K[-1], 2, 16)
    out, _, signed = fa.flash_attn_varlen_func(
        q, k, v, offsets(OFFSETS_Q), offsets(OFFSETS_K), 14, 21, 0.4, return_attn_probs=True
    )
    assert signed.shape == (4, 2, 14, 21)
    for s in range(4):
        rows, keys = slice(OFFSETS_Q[s], OFFSETS_Q[s + 1]), slice(OFFSETS_K[s], OFFSETS_K[s + 1])
        part = signed[s, :, : rows.stop - rows.start, : keys.stop - keys.start]
        assert_close(out[rows], torch.einsum("hij,jhd->ihd", part.clamp(min=0) / 0.6, v[keys]))


def test_names_of_the_first_version():
    qkv, cu_seqlens = random(30, 3, 2, 16), offsets([0, 12, 12, 30])
    new = fa.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 18, causal=True)
    q, k, v = qkv.unbind(1)
    out, lse, _ = fa.flash_attn_unpadded_qkvpacked_func(qkv, cu_seqlens, 18, 0.0, causal=True, return_attn_probs=True)
    assert torch.equal(out, new)
    assert lse.shape == (3, 2, 18)
    assert bool((lse[0, :, 12:] == -torch.inf).all())
    assert bool(lse[2].isfinite().all())
    kv = torch.stack((k, v), 1)
    for result in (
        fa.flash_attn_unpadded_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 18, 18, 0.0, causal=True),
        fa.flash_attn_unpadded_func(q, k, v, cu_seqlens, cu_seqlens, 18, 18, 0.0, causal=True),
        fa.flash_attn_unpadded_qkvpacked_split_func(qkv, cu_seqlens, 12, 18, 2, 0.0, causal=True),
    ):
        assert torch.equal(result, new)
    _, _, first, second = fa.flash_attn_unpadded_qkvpacked_split_func(
        qkv, cu_seqlens, 12, 18, 2, 0.5, causal=True, return_attn_probs=True
    )
    assert first.shape == (2, 2, 12, 12)
    assert second.shape == (1, 2, 18, 18)


def test_modules():
    qkv, cu_seqlens = random(2, 15, 3, 2, 16), offsets([0, 15, 30])
    module = fa.FlashSelfAttention(causal=True, attention_dropout=0.5, window_size=(4, -1)).eval()
    out = module(qkv)
    assert torch.equal(out, fa.flash_attn_qkvpacked_func(qkv, causal=True, window_size=(4, -1)))
    packed = module(qkv.flatten(0, 1), cu_seqlens=cu_seqlens, max_seqlen=15)
    assert_close(packed, out.flatten(0, 1))
    assert not torch.equal(module.train()(qkv), out)
    q, kv = random(2, 9, 2, 16), random(2, 15, 2, 2, 16)
    cross = fa.FlashCrossAttention(softmax_scale=0.5, alibi_slopes=torch.rand(2, device=DEVICE))
    assert torch.equal(
        cross(q, kv), fa.flash_attn_kvpacked_func(q, kv, softmax_scale=0.5, alibi_slopes=cross.alibi_slopes)
    )
    short = cross(
        q.flatten(0, 1), kv.flatten(0, 1), cu_seqlens=offsets([0, 9, 18]), max_seqlen=9, cu_seqlens_k=cu_seqlens,
        max_seqlen_k=15,
    )  # fmt: skip
    assert_close(short, cross(q, kv).flatten(0, 1))


def test_compiled_whole():
    """torch.compile sees one graph, with offsets that only the device knows."""

    def loss(q, k, v, cu_q, cu_k):
        return fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 14, 21, causal=True, window_size=(5, -1)).square().sum()

    inputs = random(OFFSETS_Q[-1], 2, 16), random(OFFSETS_K[-1], 1, 16), random(OFFSETS_K[-1], 1, 16)
    both = offsets(OFFSETS_Q), offsets(OFFSETS_K)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs, *both), inputs),
        torch.autograd.grad(loss(*inputs, *both), inputs),
        strict=True,
    ):
        assert_close(a, b)


def test_a_window_compiled_whole():
    q = random(1, 40, 2, 16)

    def loss(q):
        return fa.flash_attn_func(q, q, q, causal=True, window_size=(5, -1), softcap=2.0).square().sum()

    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q), q)
    assert_close(compiled, torch.autograd.grad(loss(q), q)[0])


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 12, 30], "cu_seqlens_q starts at 1, must start at 0"),
        ([0, 20, 12, 30], "cu_seqlens_q: 20 at 1 is followed by less, must never decrease"),
        ([0, 12, 31], r"cu_seqlens_q: values from 0 to 31, must lie in 0\.\.30"),
        ([0], r"cu_seqlens_q \(1,\) torch.int32: must be \(sequences \+ 1,\)"),
    ],
)
def test_bad_offsets(cu_seqlens, message):
    q = random(30, 2, 16)
    with pytest.raises(ValueError, match=message):
        fa.flash_attn_varlen_func(q, q, q, offsets(cu_seqlens), offsets(cu_seqlens), 18, 18)


def test_bad_calls():
    q, cu_seqlens = random(30, 2, 16), offsets([0, 12, 30])
    with pytest.raises(ValueError, match="cu_seqlens_q of 2 sequences on .* must be the same sequences"):
        fa.flash_attn_varlen_func(q, q, q, cu_seqlens, offsets([0, 30]), 18, 30)
    with pytest.raises(ValueError, match="must be .* torch.int32"):
        fa.flash_attn_varlen_func(q, q, q, cu_seqlens.long(), cu_seqlens, 18, 18)
    with pytest.raises(ValueError, match="block_table: a paged cache of keys is for inference"):
        fa.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 18, 18, block_table=cu_seqlens)
    with pytest.raises(ValueError, match=r"sequences side by side are \(total, heads, head_dim\)"):
        fa.flash_attn_varlen_func(q[None], q[None], q[None], cu_seqlens, cu_seqlens, 18, 18)
    with pytest.raises(ValueError, match="cu_seqlens without max_seqlen"):
        fa.FlashSelfAttention()(torch.stack((q, q, q), 1), cu_seqlens=cu_seqlens)


def test_the_cache_of_offsets_neither_leaks_nor_grows():
    gc.collect()
    before = len(mask_cache._by_tensor)
    qkv = random(30, 3, 2, 16)
    cu_seqlens = offsets([0, 12, 30])
    for middle in range(5, 10):
        cu_seqlens[1] = middle
        fa.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 25, causal=True)
    assert len(mask_cache._by_tensor[cu_seqlens]) == 1
    del cu_seqlens
    gc.collect()
    assert len(mask_cache._by_tensor) == before


def test_a_slope_for_each_sequence():
    q, cu_seqlens = random(30, 2, 16), offsets([0, 12, 30])
    for wrong in (3, 1):
        with pytest.raises(ValueError, match=rf"alibi_slopes \({wrong}, 2\) on .*: must be \(2,\) or \(2, 2\)"):
            fa.flash_attn_varlen_func(
                q, q, q, cu_seqlens, cu_seqlens, 18, 18, alibi_slopes=torch.ones(wrong, 2, device=DEVICE)
            )


def test_validation_before_training():
    qkv, cu_seqlens = random(30, 3, 2, 16), offsets([0, 12, 30])
    with torch.inference_mode():
        fa.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 18, causal=True)
        fa.flash_attn_qkvpacked_func(qkv[None], causal=True, window_size=(3, 0))
    fa.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 18, causal=True).sum().backward()
    fa.flash_attn_qkvpacked_func(qkv[None], causal=True, window_size=(3, 0)).sum().backward()
    assert bool(qkv.grad.isfinite().all())
