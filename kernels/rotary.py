"""Rotary position embedding: each pair of dims is turned by its token's angle. (Su et al. 2021, RoFormer)

Half-split (Llama, GPT-NeoX): the pair of dim i is i + rotary_dim / 2; interleaved (GPT-J): dims 2i and 2i + 1. With
(a, b) a pair: (a cos - b sin, a sin + b cos). The gradient is turned back by the same kernel.

q (batch, sequence, heads, head_dim), k with its own number of heads, of any strides; cos and sin (batch or 1, sequence,
rotary_dim / 2) hold each token's own angle, whatever part of a sequence the tokens are; or they are tables
(n_positions, rotary_dim / 2) into which `positions` (batch or 1, sequence) points; what points outside becomes NaN.
Dims from rotary_dim on stay as they are.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# a kernel is launched with arguments that its signature does not show

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from longctx.kernels import addressing, hardware
from longctx.kernels.addressing import power_of_two
from longctx.kernels.forward_mode import refuse_tangents
from longctx.kernels.precision import accumulation_dtype
from longctx.kernels.triton_math import wide
from longctx.kernels.triton_op import launchable, triton_op


class RotaryBlocks(NamedTuple):
    """Tokens and heads of a tile, warps of a program."""

    tokens: int
    heads: int
    warps: int


def _blocks(heads: int, pairs: int) -> RotaryBlocks:
    """Tiles of some 4096 pairs: 16 a thread."""
    block_heads = min(power_of_two(heads), max(1, 4096 // power_of_two(pairs)))
    tokens = max(1, 4096 // (block_heads * power_of_two(pairs)))
    return RotaryBlocks(tokens, block_heads, 8)


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """Turns pairs of dims of x (batch, sequence, heads, head_dim); shapes and pairs as in `longctx.kernels.rotary`."""
    if positions is not None:
        is_inside = ((positions >= 0) & (positions < len(cos))).unsqueeze(-1)
        place = positions.clamp(0, len(cos) - 1).long()  # uint8 would be taken for a mask
        cos, sin = (torch.where(is_inside, table[place], torch.nan) for table in (cos, sin))
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary_dim].to(accumulation_dtype(x.dtype)), x[..., rotary_dim:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


@triton.jit
def _rotate(
    x, out, cosine, sine, token, is_token, head_block, n_heads, x_token, x_head, out_token, out_head,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Turns a block of tokens (T), heads (H) and all pairs (P); cosine and sine are (T, 1, P)."""
    head = wide(head_block) * HEADS + tl.arange(0, HEADS)
    is_row = is_token[:, None, None] & (head < n_heads)[None, :, None]
    x += token[:, None, None] * x_token + head[None, :, None] * x_head
    out += token[:, None, None] * out_token + head[None, :, None] * out_head
    pair = tl.arange(0, BLOCK_PAIRS)[None, None, :]
    if INTERLEAVED:
        dim = tl.arange(0, 2 * BLOCK_PAIRS)[None, None, :]
        inside = is_row & (dim < 2 * PAIRS)
        both = tl.load(x + dim, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (TOKENS, HEADS, BLOCK_PAIRS, 2)))
        both = tl.join(a * cosine - b * sine, b * cosine + a * sine)
        both = tl.reshape(both, (TOKENS, HEADS, 2 * BLOCK_PAIRS)).to(out.dtype.element_ty)
        tl.store(out + dim, both, mask=inside)
    else:
        inside = is_row & (pair < PAIRS)
        a = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + PAIRS + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + pair, (a * cosine - b * sine).to(out.dtype.element_ty), mask=inside)
        tl.store(out + PAIRS + pair, (b * cosine + a * sine).to(out.dtype.element_ty), mask=inside)
    if not IN_PLACE:
        for start in tl.static_range(2 * PAIRS, HEAD_DIM, BLOCK_PAIRS):
            dim = start + pair
            rest = is_row & (dim < HEAD_DIM)
            tl.store(out + dim, tl.load(x + dim, mask=rest), mask=rest)


@triton.jit
def rotary_triton(
    q, k, q_out, k_out, cos, sin, positions,
    q_batch, q_token, q_head, k_batch, k_token, k_head, q_out_batch, q_out_token, q_out_head,
    k_out_batch, k_out_token, k_out_head, angle_batch, angle_token, position_batch,
    n_tokens, n_positions, q_heads, k_heads,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    token_blocks = tl.cdiv(n_tokens, TOKENS)
    token = wide(tl.program_id(0) % token_blocks) * TOKENS + tl.arange(0, TOKENS)
    head_block, batch = tl.program_id(1), wide(tl.program_id(0) // token_blocks)
    is_token = token < n_tokens
    row = token
    if positions is not None:
        row = tl.load(positions + batch * position_batch + token, mask=is_token, other=0).to(tl.int64)
    pair = tl.arange(0, BLOCK_PAIRS)
    angle = batch * angle_batch + row[:, None] * angle_token + pair[None, :]
    inside = (is_token & (row >= 0) & (row < n_positions))[:, None] & (pair < PAIRS)[None, :]
    cosine = tl.load(cos + angle, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
    sine = tl.load(sin + angle, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
    if INVERSE:
        sine = -sine
    if head_block * HEADS < q_heads:
        _rotate(
            q + batch * q_batch, q_out + batch * q_out_batch, cosine, sine, token, is_token, head_block, q_heads,
            q_token, q_head, q_out_token, q_out_head, HEAD_DIM, PAIRS, BLOCK_PAIRS, TOKENS, HEADS, INTERLEAVED,
            IN_PLACE,
        )  # fmt: skip
    if k is not None:
        if head_block * HEADS < k_heads:
            _rotate(
                k + batch * k_batch, k_out + batch * k_out_batch, cosine, sine, token, is_token, head_block, k_heads,
                k_token, k_head, k_out_token, k_out_head, HEAD_DIM, PAIRS, BLOCK_PAIRS, TOKENS, HEADS, INTERLEAVED,
                IN_PLACE,
            )  # fmt: skip


def _launch(
    kernel: Any, q: Tensor, k: Tensor | None, q_out: Tensor, k_out: Tensor | None, cos: Tensor, sin: Tensor,
    positions: Tensor | None, interleaved: bool, inverse: bool,
) -> None:  # fmt: skip
    batch, n_tokens, heads, head_dim = q.shape
    if not q.numel():
        return
    cos, sin, positions = cos.contiguous(), sin.contiguous(), None if positions is None else positions.contiguous()
    pairs = cos.shape[-1]
    blocks = _blocks(max(heads, 0 if k is None else k.shape[2]), pairs)
    grid = (
        batch * triton.cdiv(n_tokens, blocks.tokens),
        triton.cdiv(max(heads, 0 if k is None else k.shape[2]), blocks.heads),
    )
    with hardware.on_device(q):
        kernel[grid](
            q, k, q_out, k_out, cos, sin, positions, *q.stride()[:3], *addressing.strides(k, 4)[:3],
            *q_out.stride()[:3],
            *addressing.strides(k_out, 4)[:3], 0 if positions is not None else addressing.shared_stride(cos), pairs,
            addressing.shared_stride(positions), n_tokens, cos.shape[-2], heads, 0 if k is None else k.shape[2],
            HEAD_DIM=head_dim, PAIRS=pairs, BLOCK_PAIRS=addressing.power_of_two(pairs), TOKENS=blocks.tokens,
            HEADS=blocks.heads, INTERLEAVED=interleaved, INVERSE=inverse, IN_PLACE=q_out is q, num_warps=blocks.warps,
        )  # fmt: skip


# custom ops -----------------------------------------------------------------------------------------------------------


def _out_of_place(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k = addressing.readable(q), None if k is None else addressing.readable(k)
    q_out, k_out = (None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    assert q_out is not None
    _launch(launchable(rotary_triton), q, k, q_out, k_out, cos, sin, positions, interleaved, inverse)
    return q_out, q.new_empty(0) if k_out is None else k_out


def _in_place(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    _launch(rotary_triton, q, k, q, k, cos, sin, positions, interleaved, inverse)


_rotary = triton_op("rotary", _out_of_place)
_rotary_in_place = custom_op("longctx::rotary_", _in_place, mutates_args=("q", "k"))


@_rotary.register_fake
def _(q, k, *_call):
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, k, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.has_k = k is not None
    if not ctx.has_k:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(cos, sin, positions)


def _autograd(ctx, dq: Tensor, dk: Tensor | None):
    dk = dk if ctx.has_k else None
    dq, dk = _rotary(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dq, dk if ctx.has_k else None, None, None, None, None, None


_rotary.register_autograd(_autograd, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved):
        _rotary_in_place(q, k, cos, sin, positions, interleaved, False)
        ctx.mark_dirty(*(x for x in (q, k) if x is not None))
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.has_k = interleaved, k is not None
        return q if k is None else (q, k)

    @staticmethod
    def backward(ctx, *gradients):
        dq, dk = _rotary(gradients[0], gradients[1] if ctx.has_k else None, *ctx.saved_tensors, ctx.interleaved, True)
        return dq, dk if ctx.has_k else None, None, None, None, None


# public ---------------------------------------------------------------------------------------------------------------


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """x with its first 2 * cos.shape[-1] dims turned, in its dtype; see `apply_rotary_to_both`."""
    return _apply(x, None, cos, sin, positions, interleaved, inplace, implementation)[0]


def apply_rotary_to_both(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """q and k turned in one launch, in their dtype. Views in place: in two launches.

    q (batch, sequence, heads, head_dim), k with its own number of heads; cos and sin (batch or 1, sequence, rotary_dim
    / 2), each token's own angle, or tables (n_positions, rotary_dim / 2) into which `positions` (batch or 1, sequence)
    points; what points outside becomes NaN. Pairs are dims i and i + rotary_dim / 2 (Llama), or, `interleaved`, 2i and
    2i + 1 (GPT-J); (a, b) becomes (a cos - b sin, a sin + b cos). Dims from rotary_dim on stay as they are.

    q and k float16, bfloat16, float32 or float64; cos and sin floating, best float32, without gradient. `inplace`: q
    and k themselves are turned and returned. Raises ValueError with all that is wrong.
    """
    q, k_turned = _apply(q, k, cos, sin, positions, interleaved, inplace, implementation)
    assert k_turned is not None
    return q, k_turned


def _apply(q, k, cos, sin, positions, interleaved, inplace, implementation) -> tuple[Tensor, Tensor | None]:
    _check(q, k, cos, sin, positions, inplace)
    if hardware.triton_or_reference(implementation, q) == "reference":
        turned_q = rotary_reference(q, cos, sin, positions, interleaved)
        turned_k = None if k is None else rotary_reference(k, cos, sin, positions, interleaved)
        if inplace:
            return q.copy_(turned_q), None if k is None or turned_k is None else k.copy_(turned_k)
        return turned_q, turned_k
    refuse_tangents(q, k)
    if not inplace:
        q, turned = _rotary(q, k, cos, sin, positions, interleaved, False)
        return q, None if k is None else turned
    if k is None:
        return _InPlace.apply(q, None, cos, sin, positions, interleaved), None
    has_graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if has_graph and not torch.compiler.is_compiling() and (q._is_view() or k._is_view()):
        # autograd lets an op write to one view, not to two
        return tuple(_InPlace.apply(x, None, cos, sin, positions, interleaved) for x in (q, k))
    return _InPlace.apply(q, k, cos, sin, positions, interleaved)


def _check(q, k, cos, sin, positions, inplace) -> None:
    problems = []
    for name, x in (("q", q), ("k", k)):
        if x is not None and (x.ndim != 4 or not x.is_floating_point()):
            problems.append(f"{name} {tuple(x.shape)} {x.dtype}: must be (batch, sequence, heads, head_dim), floating")
        elif x is not None and inplace and x.stride(-1) != 1:
            problems.append(f"{name}: to be turned in place, its last dim must have stride 1, not {x.stride(-1)}")
        elif x is not None and inplace and any(n > 1 and not s for n, s in zip(x.shape, x.stride(), strict=True)):
            problems.append(f"{name}: expanded, so its heads are in one place of memory: give {name}.contiguous()")
    if not problems:
        batch, sequence, _, head_dim = q.shape
        if k is not None and (k.shape[:2] != q.shape[:2] or k.shape[3] != head_dim or k.dtype != q.dtype):
            problems.append(f"k {tuple(k.shape)} {k.dtype}: must be {(batch, sequence, '*', head_dim)} {q.dtype}, as q")
        if cos.shape != sin.shape or cos.dtype != sin.dtype:
            problems.append(f"cos {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}: must be alike")
        if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
            problems.append("cos and sin get no gradient here: give them detached")
        if not 1 <= cos.shape[-1] <= head_dim // 2:
            problems.append(f"cos {tuple(cos.shape)}: its last dim must be 1 to head_dim / 2 = {head_dim // 2}")
        if positions is None and (cos.ndim != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != sequence):
            problems.append(f"cos {tuple(cos.shape)}: must be ({batch} or 1, {sequence}, rotary_dim / 2)")
        if positions is not None and (positions.is_floating_point() or positions.dtype == torch.bool):
            problems.append(f"positions {positions.dtype}: must be integers")
        if positions is not None and (
            cos.ndim != 2 or tuple(positions.shape) not in ((batch, sequence), (1, sequence))
        ):
            problems.append(
                f"cos {tuple(cos.shape)}, positions {tuple(positions.shape)}: must be a table (n_positions, "
                f"rotary_dim / 2) and ({batch} or 1, {sequence})"
            )
    if problems:
        raise ValueError("; ".join(problems))
