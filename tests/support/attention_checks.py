"""What the tests of the attention kernels share: their truth, the comparison with it, and masks.

Truth is plain torch in float64 with its own autograd; the error may be 1.5 x that of the reference in float32, or of
plain torch in a 16-bit dtype. Where rows may see two or three keys (`may_cancel`), dq and dk are differences of large
terms, and plain torch may be right by luck: the error may be 1.5 x what rounding these explains, if that is more.
"""

from __future__ import annotations

import torch

from longctx.kernels.attention import reference
from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options
from precision import DEVICE, relative_error

NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")


def plain_attention(q, k, v, mask, options, sink):
    """Every step in q's dtype, gradients by torch."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        rows, keys = mask.positions(q.device)
        slopes = options.slopes(*q.shape[:3]).transpose(1, 2).unsqueeze(-1)
        scores = (scores - slopes * (rows[:, None, :, None] - keys).abs()).to(q.dtype)
    scores = scores.masked_fill(~mask.dense(q.device), -torch.inf)
    if sink is not None:
        scores = torch.cat((scores, sink.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    has_keys = (scores > -torch.inf).any(-1, keepdim=True)
    scores = torch.where(has_keys, scores, 0)
    lse = torch.where(has_keys.squeeze(-1), torch.logsumexp(scores, -1), -torch.inf)
    weights = torch.where(has_keys, torch.softmax(scores, -1), 0)[..., : k.shape[1]]
    if options.seed is not None:
        weights = weights * reference.dropout_weight(mask, options, q.shape[0], q.shape[2]).to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def results(function, inputs, sink, gradients):
    """Results and gradients of `function(q, k, v, sink)`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    leaves = [*inputs] if sink is None else [*inputs, (sink := sink.detach().requires_grad_())]
    out, lse = function(*inputs, sink)
    dout, dlse = gradients
    dlse = dlse.to(lse.dtype).masked_fill(~lse.detach().isfinite(), torch.nan)  # of rows without keys it is not used
    return out, lse, *torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse))


def rounding_of_gradients(q, k, v, mask, options, truth, gradients) -> dict[str, float]:
    """Of dq and dk, relative to their norms and in units of rounding: what comes of rounding `out`, by rowsum(dout *
    out), and the gradients of the scores. All in float64."""
    (out, lse, dq, dk, *_), (dout, dlse) = (x.detach() for x in truth), gradients
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * options.scale
    exponent = torch.where(lse == -torch.inf, torch.inf, lse).unsqueeze(-1)
    weights = torch.where(mask.dense(q.device), torch.exp(scores - exponent), 0) * options.scale
    delta = ((dout * out).sum(-1).transpose(1, 2) - dlse).unsqueeze(-1)
    dscores = weights * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta)
    of_delta = weights * (dout * out).norm(dim=-1).transpose(1, 2).unsqueeze(-1)
    of_dq = torch.einsum("bhij,bjhd->bihd", of_delta, k).square().sum()
    of_dq += torch.einsum("bhij,bjhd->", dscores.square(), k.square())
    of_dk = torch.einsum("bhij,bihd->", of_delta.square() + dscores.square(), q.square())
    return {
        name: float(total.sqrt() / x.norm().clamp(min=1e-30))
        for name, total, x in (("dq", of_dq, dq), ("dk", of_dk, dk))
    }


def check(
    mask, dtype, heads=4, kv_heads=2, head_dim=16, batch=2, sink=None, inputs=None, floor=4, implementation="triton",
    may_cancel=False, factor=1.5, **changes,
):  # fmt: skip
    """An implementation against float64, forward and backward, through lse too.

    `factor`: how many times the error of plain torch at the same precision it may have.
    """
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    q, k, v = inputs or (
        random(batch, n, h, head_dim)
        for n, h in ((mask.n_queries, heads), (mask.n_keys, kv_heads), (mask.n_keys, kv_heads))
    )
    gradients = random(*q.shape), random(q.shape[0], q.shape[2], q.shape[1])
    options = Options(**{"scale": q.shape[-1] ** -0.5} | changes)

    def kernel(q, k, v, sink):
        return attention(q, k, v, mask, implementation=implementation, sink=sink, **changes)

    def plain(q, k, v, sink):
        return plain_attention(q, k, v, mask, options, sink)

    def in_float32(q, k, v, sink):  # as the kernels, it keeps the rounded lse for the backward pass
        return attention(q, k, v, mask, implementation="reference", sink=sink, **changes)

    exact = [x.double() for x in (q, k, v)], None if sink is None else sink.double()
    truth = results(plain, *exact, [g.double() for g in gradients])
    same_precision = results(in_float32 if dtype == torch.float32 else plain, (q, k, v), sink, gradients)
    # the kernels sum the terms of a float32 product one after the other, torch does not
    least = torch.finfo(dtype).eps * (floor if dtype == torch.float32 else 0.5)
    explained = {}
    if may_cancel:
        assert sink is None
        assert changes.keys() <= {"scale", "deterministic"}
        explained = rounding_of_gradients(*exact[0], mask, options, truth, [g.double() for g in gradients])
    for name, mine, theirs, true in zip(
        NAMES, results(kernel, (q, k, v), sink, gradients), same_precision, truth, strict=False
    ):
        allowed = factor * max(relative_error(theirs, true), least, least * explained.get(name, 0.0))
        assert relative_error(mine, true) <= allowed, name


def masks() -> dict[str, KeyIntervals]:
    starts = torch.zeros(2, 45, dtype=torch.int64)
    starts[0, 7:], starts[0, 21:] = 7, 21
    starts[1, 30:], starts[1, 44:] = 30, 44
    documents = KeyIntervals.documents(starts)
    outer = torch.cat((torch.arange(11), torch.arange(33, 44)))
    q_offsets, k_offsets = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 21, 38], [0, 9, 9, 20, 50]))
    made = {
        "full": KeyIntervals.full(40, 50),
        "full, one tile": KeyIntervals.full(16, 32),
        "causal": KeyIntervals.causal(50),
        "causal, more keys": KeyIntervals.causal(37, 61),
        "causal, fewer keys": KeyIntervals.causal(61, 37),
        "window": KeyIntervals.causal(50).window(9, "cpu"),
        "window of one": KeyIntervals.causal(33).window(1, "cpu"),
        "band": KeyIntervals.full(40, 30).band(5, 3, "cpu"),
        "documents": documents,
        "documents and window": documents.window(6, "cpu"),
        "zigzag rows": documents.rows(outer),
        "zigzag hop": documents.rows(outer).keys(torch.arange(11, 33)),
        "sequences": KeyIntervals.sequences(q_offsets, k_offsets, 40, 52),
        "sequences, causal": KeyIntervals.sequences(q_offsets, k_offsets, 40, 52, is_causal=True),
        "one row": KeyIntervals.causal(1, 20),
        "one key": KeyIntervals.full(20, 1),
    }
    return {name: mask.to(DEVICE) for name, mask in made.items()}


def large_masks() -> dict[str, KeyIntervals]:
    """Of several tiles in each direction, and no whole number of them."""
    starts = torch.zeros(2, 700, dtype=torch.int64)
    starts[0, 100:], starts[0, 384:] = 100, 384
    starts[1, 1:], starts[1, 699:] = 1, 699
    outer = torch.cat((torch.arange(175), torch.arange(525, 700)))
    documents = KeyIntervals.documents(starts)
    made = {
        "full": KeyIntervals.full(300, 520),
        "causal": KeyIntervals.causal(777),
        "causal, whole tiles": KeyIntervals.causal(512),
        "causal, more keys": KeyIntervals.causal(130, 901),
        "causal, fewer keys": KeyIntervals.causal(901, 130),
        "window": KeyIntervals.causal(900).window(200, "cpu"),
        "documents": documents,
        "zigzag rows": documents.rows(outer),
        "zigzag hop": documents.rows(outer).keys(torch.arange(175, 525)),
        "rows that see nothing": KeyIntervals.causal(600, 600).band(-1, 0, "cpu"),
    }
    return {name: mask.to(DEVICE) for name, mask in made.items()}


MASKS, LARGE_MASKS = masks(), large_masks()
