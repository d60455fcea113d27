"""Block-sparse attention against dense attention under the same mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.attention import reference
from longctx.kernels.attention.block_mask import BlockMask, tile_lists
from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.compat.block_sparse import (
    FlashBlocksparseAttention,
    block_sparse_attention,
    convert_blockmask,
    flash_blocksparse_attn_func,
)
from thorough import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dense(q, k, v, layout, block_q, block_k, causal, scale):
    """float64, the whole matrix."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = reference.repeat_heads(k, q.shape[2]), reference.repeat_heads(v, q.shape[2])
    layout = layout if layout.ndim == 3 else layout[None]
    seen = (layout != 0).repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)[:, : q.shape[1], : k.shape[1]]
    if causal:
        seen = seen & torch.ones_like(seen).tril(k.shape[1] - q.shape[1])
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1).nan_to_num(0), v), torch.logsumexp(scores, -1)


def compare(n_queries, n_keys, heads, kv_heads, layout, block_q, block_k, causal, **settings):
    q = torch.randn(2, n_queries, heads, 16, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(2, n_keys, kv_heads, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    out, lse = block_sparse_attention(q, k, v, layout, block_q, block_k, causal, 0.3, **settings)
    true, true_lse = dense(q, k, v, layout, block_q, block_k, causal, 0.3)
    has_keys = true_lse.isfinite()
    torch.testing.assert_close(out.double(), true, rtol=0, atol=4e-6)
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=4e-6)
    dlse = torch.randn_like(lse) * has_keys

    def gradients(out, lse):
        return torch.autograd.grad(out.square().sum() + (torch.where(has_keys, lse, 0) * dlse).sum(), (q, k, v))

    for mine, its in zip(gradients(out, lse), gradients(true, true_lse), strict=True):
        # dP and delta are up to 100 here, cancel where there is one key, and are summed over all rows
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("n_queries", "n_keys", "block_q", "block_k", "per_head"),
    [(50, 70, 16, 32, False), (64, 64, 8, 8, True), (40, 40, 64, 20, True), (33, 60, 16, 256, False)],
)
def test_against_dense(n_queries, n_keys, block_q, block_k, per_head, causal, implementation):
    torch.manual_seed(1)
    layout = torch.rand(4, -(-n_queries // block_q), -(-n_keys // block_k), device=DEVICE) < 0.5
    compare(
        n_queries, n_keys, 4, 2, layout if per_head else layout[0], block_q, block_k, causal,
        implementation=implementation, deterministic=per_head,
    )  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True])
def test_bounds_of_each_sequence(deterministic):
    """Tiles are listed once for the batch: those that any sequence sees a part of."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    start = torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)
    start[0, 40:], start[1, 8:] = 40, 8
    mask = BlockMask(flash_layout(4, 4, 0.8).view(1, 4, 4), 16, 16, KeyIntervals.documents(start))
    found = []
    for implementation in ("reference", "triton"):
        out, lse = attention(q, k, v, mask, implementation=implementation, deterministic=deterministic)
        found.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for expected, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("option", [{"alibi_slopes": [0.5, 0.25]}, {"dropout": 0.4}], ids=["alibi", "dropout"])
def test_rows_and_keys_keep_their_positions(option):
    """A part of a sequence is attended from as in the whole, in the kernel as in the reference."""
    torch.manual_seed(0)
    q = torch.randn(1, 16, 2, 16, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(1, 64, 2, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    intervals = KeyIntervals.full(64, 64).with_bounds(DEVICE).rows(torch.arange(16, 32, device=DEVICE))
    mask = BlockMask(torch.ones(1, 1, 4, dtype=torch.bool, device=DEVICE), 16, 16, intervals)
    options = {key: torch.tensor(x, device=DEVICE) if isinstance(x, list) else x for key, x in option.items()}
    options |= {"seed": torch.tensor([3], device=DEVICE)} if "dropout" in option else {}
    found = []
    for implementation in ("reference", "triton"):
        out, lse = attention(q, k, v, mask, implementation=implementation, **options)
        found.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for expected, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5)


def test_a_layout_that_is_written_to_in_inference_mode():
    """Its tensors count no writes, so nothing that was made from them is kept."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 64, 2, 16, device=DEVICE) for _ in range(3))
    with torch.inference_mode():
        kept = torch.ones(1, 4, 4, dtype=torch.bool, device=DEVICE)
        mask = BlockMask(kept, 16, 16, KeyIntervals.causal(64).with_bounds(DEVICE))
        for hidden in (4, 2):
            kept[0, :, hidden:] = False
            mine, expected = (attention(q, k, v, mask, implementation=i)[0] for i in ("triton", "reference"))
            torch.testing.assert_close(mine, expected, rtol=0, atol=4e-6)


def test_autocast_casts_what_differs():
    q, k, v = (torch.randn(1, 32, 2, 16, device=DEVICE) for _ in range(3))
    with torch.autocast(DEVICE, torch.bfloat16):
        out, _ = block_sparse_attention(q, k.bfloat16(), v.bfloat16(), flash_layout(2, 1, 1.0), 16, 256)
    assert out.dtype == torch.bfloat16


@settings(max_examples=examples(4), deadline=None)
@given(st.data())
def test_any_layout(data):
    torch.manual_seed(data.draw(st.integers(0, 100)))
    n_queries, n_keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block_q, block_k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    share = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    layout = torch.rand(-(-n_queries // block_q), -(-n_keys // block_k), device=DEVICE) < share
    compare(n_queries, n_keys, 2, 1, layout, block_q, block_k, data.draw(st.booleans()), implementation="triton")


def test_work_is_in_proportion_to_the_kept_blocks():
    """Tiles visited, forward and backward, where a quarter of 64 x 64 blocks is kept: a quarter, none masked."""
    torch.manual_seed(0)
    n = 64 * 64
    kept = torch.zeros(64 * 64, dtype=torch.bool)
    kept[torch.randperm(64 * 64)[: 64 * 16]] = True
    start, end = KeyIntervals.full(n, n).bounds("cpu")
    mask = BlockMask(kept.view(1, 64, 64), 64, 64, KeyIntervals(n, n, start=start, end=end))
    for of_keys in (False, True):
        edge, touched = tile_lists(mask, 64, 64, of_keys).counts[0].sum(0).tolist()
        assert (edge, touched) == (0, 64 * 16)


def flash_layout(rows, columns, share=0.5):
    generator = torch.Generator().manual_seed(4)
    return (torch.rand(rows, columns, generator=generator) < share).to(DEVICE)


@pytest.mark.parametrize("lengths", [(40, 40), (40, 0, 23)])
def test_flash_interface(lengths):
    """Sequences side by side, each under the layout's upper left part."""
    torch.manual_seed(0)
    total, layout = sum(lengths), flash_layout(16, 1, 0.7)
    qkv = torch.randn(total + 3 * (len(lengths) == 3), 3, 2, 16, device=DEVICE, requires_grad=True)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    out, _, lse = flash_blocksparse_attn_func(qkv, cu_seqlens, layout, 0.0, 40, causal=True, return_attn_probs=True)
    assert out.shape == qkv[:, 0].shape
    assert lse.shape == (2, qkv.shape[0])
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    true = torch.zeros_like(out, dtype=torch.float64)
    for first, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        q, k, v = qkv[first : first + length].unsqueeze(0).unbind(2)
        if length:
            part, part_lse = dense(q, k, v, layout, 16, 256, True, 0.25)
            true[first : first + length] = part[0]
            torch.testing.assert_close(lse[:, first : first + length].double(), part_lse[0], rtol=0, atol=4e-6)
    torch.testing.assert_close(out.double(), true, rtol=0, atol=4e-6)
    (its,) = torch.autograd.grad(true.square().sum(), qkv)
    torch.testing.assert_close(gradient, its, rtol=0, atol=2e-5)
    converted = convert_blockmask(layout, causal=False)
    again = flash_blocksparse_attn_func(qkv, cu_seqlens, converted, 0.0, 40, causal=True, convert_mask=False)
    assert torch.equal(again, out)


def test_converted_layout():
    """By hand: of each column the kept rows times 4, plus 1 where the row begins, plus 2 where it ends."""
    layout = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1]])
    assert convert_blockmask(layout, causal=False).tolist() == [[1, 9, -1], [2, 7, -1], [10, -1, -1]]


class Banded:
    """Keeps blocks near the diagonal."""

    def make_layout(self, max_seq_length: int) -> torch.Tensor:
        rows, columns = torch.arange(max_seq_length // 16)[:, None] // 16, torch.arange(max_seq_length // 256)
        return (rows - columns).abs() <= 1


def test_module():
    torch.manual_seed(0)
    module = FlashBlocksparseAttention(Banded(), max_seq_length=300, attention_dropout=0.5).to(DEVICE).eval()
    assert module.layout.shape == (32, 2)
    qkv = torch.randn(2, 30, 3, 2, 16, device=DEVICE)
    out, weights = module(qkv, causal=True)
    assert weights is None
    true, _ = dense(*qkv.unbind(2), module.layout, 16, 256, True, 0.25)
    torch.testing.assert_close(out.double(), true, rtol=0, atol=4e-6)
    there = torch.arange(30, device=DEVICE) < torch.tensor([[30], [17]], device=DEVICE)
    padded, _ = module(qkv, key_padding_mask=there, causal=True)
    torch.testing.assert_close(padded[1, :17], out[1, :17], rtol=0, atol=4e-6)  # causal: what follows does not matter
    assert bool((padded[1, 17:] == 0).all())
    assert not torch.equal(module.train()(qkv, causal=True)[0], out)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (torch.ones(2, 2), {}, r"layout \(2, 2\): 40 queries and 40 keys in blocks of 16 x 16 need \(3, 3\)"),
        (torch.ones(3, 3, 3), {}, r"or \(2, 3, 3\) for a layout a head"),
        (torch.ones(3, 3), {"dropout": 1.5}, "dropout 1.5: must be a probability below 1"),
        (torch.ones(3, 3), {"implementation": "sdpa"}, "'sdpa' cannot serve this call: torch's kernels skip no blocks"),
    ],
)
def test_bad_calls(layout, changes, message):
    q = torch.zeros(1, 40, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, q, q, layout.to(DEVICE), 16, 16, **changes)


def test_bad_sequences():
    qkv = torch.zeros(40, 3, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="no sequence may be longer than max_s"):
        flash_blocksparse_attn_func(qkv, torch.tensor([0, 40]), torch.ones(16, 1), 0.0, 30)


def test_compiled_whole():
    q = torch.randn(1, 40, 2, 16, device=DEVICE, requires_grad=True)
    layout = flash_layout(3, 3)

    def loss(q):
        return block_sparse_attention(q, q, q, layout, 16, 16, implementation="triton")[0].square().sum()

    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q), q)
    torch.testing.assert_close(compiled, torch.autograd.grad(loss(q), q)[0], rtol=0, atol=2e-6)


def test_empty_batches():
    qkv = torch.randn(5, 3, 2, 16, device=DEVICE)
    nobody = torch.tensor([0, 0], dtype=torch.int32)
    out, _, lse = flash_blocksparse_attn_func(qkv, nobody, flash_layout(1, 1), 0.0, 16, return_attn_probs=True)
    assert torch.equal(out, torch.zeros_like(qkv[:, 0]))
    assert bool((lse == -torch.inf).all())
    with pytest.raises(ValueError, match="must have 2 or more entries"):
        flash_blocksparse_attn_func(qkv, nobody[:1], flash_layout(1, 1), 0.0, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": -1.0}, "scale -1.0: must be finite, above 0"),
        ({"block_q": 0}, "blocks of 0 x 16: must have 1 or more"),
    ],
)
def test_bad_numbers(changes, message):
    q = torch.zeros(1, 40, 2, 16, device=DEVICE)
    arguments = {"layout": torch.ones(3, 3, device=DEVICE), "block_q": 16, "block_k": 16} | changes
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, q, q, **arguments)


def test_module_refuses_what_it_has_not():
    module = FlashBlocksparseAttention(Banded())
    with pytest.raises(ValueError, match="attn_mask and need_weights: block-sparse attention has neither"):
        module(torch.zeros(1, 30, 3, 2, 16), need_weights=True)
