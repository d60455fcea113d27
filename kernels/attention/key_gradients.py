"""Adds up the gradients of keys and values that several ranks have given to their owner.

One pass over memory: a sum for each run of tokens with the same givers took as long to launch as a short attention.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# a kernel is launched with arguments that its signature does not show, and its constants are no Python values

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.triton_math import wide

MOST_SLOTS = 63  # bits of an int64 that are no sign
ROWS, COLUMNS = 4, 512


@triton.jit(do_not_specialize=["n_slots"])
def attention_sum_key_gradients_triton(
    inbox, givers, dk, dv, slot_stride, n_slots, n_rows, n_tokens, width,
    IS_ADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows are the tokens of all sequences; of each the inbox has `width` numbers of dk, then as many of dv."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < n_rows, column < width
    inside = is_row[:, None] & is_column[None, :]
    of_value = tl.program_id(2)
    if of_value == 0:
        out = dk
    else:
        out = dv
    out += row.to(tl.int64)[:, None] * width + column[None, :]
    given = inbox + (row.to(tl.int64) * 2 + of_value)[:, None] * width + column[None, :]
    bits = tl.load(givers + row % n_tokens, mask=is_row, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if IS_ADDED:
        total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    for slot in range(n_slots):
        has_given = (bits >> slot) & 1
        total += tl.load(given + wide(slot) * slot_stride, mask=inside & (has_given[:, None] != 0), other=0.0)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


def add_up(inbox: Tensor, givers: Tensor, dk: Tensor, dv: Tensor, is_added: bool, implementation: str = "auto") -> None:
    """Writes, or adds, to dk and dv what the slots of an inbox hold, in the order of the slots.

    inbox (slots, batch, tokens, 2, kv_heads, head_dim) in the dtype of sums, dk and dv beside each other; at most 63
    slots. givers (tokens,) int64: bit s says whether slot s holds something of a token; what else is there does not
    matter. dk and dv contiguous (batch, tokens, kv_heads, head_dim), float32 or narrower.
    """
    if not dk.numel():
        return
    if hardware.triton_or_reference(implementation, inbox) == "triton":
        _launch(inbox, givers, dk, dv, is_added)
        return
    n_slots, _, n_tokens, *_ = inbox.shape
    slots = torch.arange(n_slots, device=givers.device)
    has_given = (givers >> slots[:, None] & 1).bool().view(n_slots, 1, n_tokens, 1, 1, 1)
    total = torch.where(has_given, inbox, 0).sum(0)
    for out, found in zip((dk, dv), total.unbind(2), strict=True):
        out.copy_(out + found if is_added else found)


def _launch(inbox: Tensor, givers: Tensor, dk: Tensor, dv: Tensor, is_added: bool) -> None:
    n_slots, batch, n_tokens, _, heads, head_dim = inbox.shape
    width, rows = heads * head_dim, batch * n_tokens
    with hardware.on_device(inbox):
        attention_sum_key_gradients_triton[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS), 2)](
            inbox, givers, dk, dv, inbox.stride(0), n_slots, rows, n_tokens, width,
            IS_ADDED=is_added, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
