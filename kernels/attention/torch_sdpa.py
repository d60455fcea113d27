"""Attention on the kernels that torch carries: its CPU flash kernel, and cuDNN and FlashAttention-2 on NVIDIA GPUs.

These are the kernels behind `torch.nn.functional.scaled_dot_product_attention`, called one level lower because that
function does not return the log-sum-exp. Any key intervals are served by cutting the rows into runs whose bounds move
alike (`find_runs`): one call a run on the CPU, and on the GPU one variable-length call a kind of edge (`segments`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels import addressing
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.mask_cache import cached_per_mask
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.attention.reference import repeat_heads, sum_repeated_heads
from longctx.kernels.precision import accumulation_dtype

aten = torch.ops.aten


def unsupported(q: Tensor, options: Options) -> str | None:
    """Why a call like this cannot be served here, or None if it can."""
    for name, is_asked in (
        ("softcap", options.softcap),
        ("alibi_slopes", options.alibi_slopes is not None),
        ("dropout", options.dropout),
        ("deterministic", options.deterministic and q.device.type != "cpu"),
    ):
        if is_asked:
            return f"torch's kernels are not used with {name}"
    if q.device.type == "cpu":
        return None
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"torch's GPU kernels take float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] > 248 or q.shape[-1] % 8:
        return f"torch's GPU kernels take head dims that are multiples of 8 up to 248, not {q.shape[-1]}"
    return None


def forward_by_torch(q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals, scale: float) -> tuple[Tensor, Tensor]:
    """Out (batch, n_queries, heads, head_dim) and lse (batch, heads, n_queries) float32; see `reference`."""
    q, k, v = _with_heads_in_one_piece(q, k, v)
    if q.device.type == "cpu":
        return _cpu_forward(q, k, v, mask, scale)
    if uses_cudnn(q, mask):
        return _cudnn_forward(q, k, v, mask, scale)
    return _varlen_forward(q, k, v, mask, scale)


def backward_by_torch(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    mask: KeyIntervals,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, in the inputs' dtype."""
    if dlse is not None:
        return _backward_with_dlse(dout, dlse, saved, mask, scale)
    dout, q, k, v = _with_heads_in_one_piece(dout, saved.q, saved.k, saved.v)
    saved = saved._replace(q=q, k=k, v=v)
    if dout.device.type == "cpu":
        return _cpu_backward(dout, saved, mask, scale)
    if uses_cudnn(saved.q, mask):
        return _cudnn_backward(dout, saved, mask, scale)
    return _varlen_backward(dout, saved, mask, scale)


def _with_heads_in_one_piece(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where the numbers of a head do not stand beside each other: torch's kernels read on as if.

    On a GPU also where 16 bytes do not lie at a multiple of 16: cuDNN gives wrong numbers then, FlashAttention-2 none.
    """
    readable = addressing.readable if tensors[0].device.type == "cpu" else addressing.addressable
    return [readable(x) for x in tensors]


def _backward_with_dlse(
    dout: Tensor, dlse: Tensor, saved: Saved, mask: KeyIntervals, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient through lse with kernels that know none.

    A kernel forms dS = P * (dP - rowsum(dout * out)); the gradient of lse adds P * dlse. One more head dim in which
    out is -1, dout is dlse and q, k and v are 0 changes the row sum by -dlse and nothing else.
    """
    head_dim, extra = dout.shape[-1], 8
    *inputs, lse = saved
    q, k, v, out, dout = (F.pad(x, (0, extra)) for x in (*inputs, dout))
    out[..., head_dim] = -1
    dout[..., head_dim] = dlse.transpose(1, 2)
    gradients = backward_by_torch(dout, None, Saved(q, k, v, out, lse), mask, scale)
    dq, dk, dv = (gradient[..., :head_dim] for gradient in gradients)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


# runs of rows whose bounds move alike --------------------------------------------------------------------------------


class RowRun(NamedTuple):
    """Rows first..last-1 of sequence `sequence`, which see the keys first_key..last_key-1 but for an edge.

    `start_step` and `end_step` (0 or 1) say how the bounds move from row to row: (0, 0) no edge, (0, 1) causal and
    bottom-right aligned, (1, 1) a sliding window, (1, 0) a window's far edge.
    """

    sequence: int
    first: int
    last: int
    first_key: int
    last_key: int
    start_step: int
    end_step: int


@cached_per_mask
def find_runs(mask: KeyIntervals, batch: int, device: torch.device) -> list[RowRun]:
    """Cuts the rows of every sequence into runs. Rows without keys are in none."""
    starts, ends = (bound.expand(batch, -1).cpu().numpy() for bound in mask.bounds(device))
    return [
        RowRun(sequence, first, last, int(start[first]), int(end[last - 1]), start_step, end_step)
        for sequence, (start, end) in enumerate(zip(starts, ends, strict=True))
        for first, last, start_step, end_step in _runs_of_sequence(start, end)
    ]


def _runs_of_sequence(start: np.ndarray, end: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(first row, last row + 1, start_step, end_step); rows whose bounds jump by more than one stand alone."""
    some = end > start
    start_step, end_step = np.diff(start), np.diff(end)
    steady = (start_step >= 0) & (start_step <= 1) & (end_step >= 0) & (end_step <= 1) & some[1:] & some[:-1]
    kind = np.where(steady, start_step * 2 + end_step, -1)
    changes = np.flatnonzero(np.diff(kind)) + 1
    runs, free = [], 0  # free: the first row that is in no run yet
    for first, last in zip([0, *changes], [*changes, len(kind)], strict=True):
        if first == last or kind[first] < 0:
            continue
        runs += [(row, row + 1, 0, 0) for row in range(free, first) if some[row]]
        begin = max(free, int(first))
        if begin <= last:
            runs.append((begin, int(last) + 1, int(kind[first]) // 2, int(kind[first]) % 2))
            free = int(last) + 1
    return runs + [(row, row + 1, 0, 0) for row in range(free, len(start)) if some[row]]


# CPU: one call a run -------------------------------------------------------------------------------------------------


class _CpuCall(NamedTuple):
    sequences: slice
    rows: slice
    keys: slice
    arguments: dict


@cached_per_mask
def _cpu_calls(mask: KeyIntervals, batch: int, dtype: torch.dtype) -> list[_CpuCall]:
    """What to call the kernel with: once for the compile-time masks, else once a run."""
    everything = slice(0, batch), slice(0, mask.n_queries), slice(0, mask.n_keys)
    if mask.start is None and not mask.is_causal:
        return [_CpuCall(*everything, {"is_causal": False})]
    if mask.start is None and mask.n_queries == mask.n_keys:
        return [_CpuCall(*everything, {"is_causal": True})]
    calls = []
    for run in find_runs(mask, batch, torch.device("cpu")):
        n_rows, n_keys = run.last - run.first, run.last_key - run.first_key
        arguments: dict = {"is_causal": False}
        if (run.start_step, run.end_step) == (0, 1) and n_rows == n_keys:
            arguments = {"is_causal": True}
        elif run.start_step or run.end_step:
            arguments["attn_mask"] = _edge_mask(run, n_rows, n_keys, dtype)
        sequence = slice(run.sequence, run.sequence + 1)
        calls.append(_CpuCall(sequence, slice(run.first, run.last), slice(run.first_key, run.last_key), arguments))
    return calls


def _edge_mask(run: RowRun, n_rows: int, n_keys: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, rows, keys) to add to the scores of a run: 0 where a row sees a key, else -inf."""
    row, key = torch.arange(n_rows).unsqueeze(1), torch.arange(n_keys)
    hidden = (key < row * run.start_step) | (key >= n_keys - (n_rows - 1 - row) * run.end_step)
    return torch.zeros(1, 1, n_rows, n_keys, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals, scale: float) -> tuple[Tensor, Tensor]:
    batch, n_queries, heads, _ = q.shape
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, n_queries), -torch.inf, dtype=accumulation_dtype(q.dtype))
    for sequences, rows, keys, arguments in _cpu_calls(mask, batch, q.dtype):
        inputs = _heads_first(q[sequences, rows], k[sequences, keys], v[sequences, keys])
        part, part_lse = aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, **arguments, scale=scale)
        out[sequences, rows], lse[sequences, :, rows] = part.transpose(1, 2), part_lse
    return out, lse


def _cpu_backward(dout: Tensor, saved: Saved, mask: KeyIntervals, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    batch, _, heads, _ = q.shape
    kv_heads, repeated_k, repeated_v = k.shape[2], repeat_heads(k, heads), repeat_heads(v, heads)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    sums = accumulation_dtype(q.dtype)  # of the runs, which may be as many as rows
    dk, dv = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in (repeated_k, repeated_v))
    for sequences, rows, keys, arguments in _cpu_calls(mask, batch, q.dtype):
        inputs = _heads_first(
            dout[sequences, rows], q[sequences, rows], repeated_k[sequences, keys], repeated_v[sequences, keys],
            out[sequences, rows],
        )  # fmt: skip
        settings = {name: value for name, value in arguments.items() if name != "is_causal"}
        part_dq, part_dk, part_dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, lse[sequences, :, rows].contiguous(), 0.0, arguments["is_causal"], **settings, scale=scale
        )
        dq[sequences, rows] = part_dq.transpose(1, 2)
        dk[sequences, keys] += part_dk.transpose(1, 2)
        dv[sequences, keys] += part_dv.transpose(1, 2)
    dk, dv = (sum_repeated_heads(x, kv_heads).to(q.dtype).contiguous() for x in (dk, dv))
    return dq, dk, dv


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


# GPU, full and causal: cuDNN -----------------------------------------------------------------------------------------


def uses_cudnn(q: Tensor, mask: KeyIntervals) -> bool:
    """Whether cuDNN serves a call rather than FlashAttention-2."""
    is_one = mask.n_queries == mask.n_keys == 1  # which cuDNN refuses
    return _cudnn_knows(mask) and not is_one and q.shape[-1] <= 128 and torch.version.hip is None


def _cudnn_knows(mask: KeyIntervals) -> bool:
    """Full, or causal and square, since it aligns a causal mask to the top left."""
    return mask.start is None and (mask.n_queries == mask.n_keys or not mask.is_causal)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, k, v), None, True, 0.0, mask.is_causal, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.view(lse.shape[:3]).contiguous()


def _cudnn_backward(dout: Tensor, saved: Saved, mask: KeyIntervals, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        *_heads_first(dout, q, k, v, out), lse.unsqueeze(-1), seed, seed, None, None, None,
        q.shape[1], k.shape[1], 0.0, mask.is_causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = _heads_first(*gradients)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


# GPU, key intervals: FlashAttention-2 over variable-length batches ---------------------------------------------------


@dataclass(frozen=True)
class SegmentBatch:
    """Runs of query rows whose bounds move alike, as one variable-length call.

    `rows` and `keys` index the flattened (batch * n) queries and keys, a segment's rows beside each other and its keys
    beside each other; None means all of them in order. Row i of a segment with m rows and n keys sees the keys from
    `i + n - m - left` (from 0 where left is -1) up to `i + n - m` if causal, else to n.
    """

    is_causal: bool
    left: int
    rows: Tensor | None
    keys: Tensor | None
    row_offsets: Tensor
    key_offsets: Tensor
    max_rows: int
    max_keys: int

    def window(self) -> dict[str, int | None]:
        if self.left < 0:
            return {"window_size_left": None, "window_size_right": None}
        return {"window_size_left": self.left, "window_size_right": 0 if self.is_causal else -1}


@cached_per_mask
def segments(mask: KeyIntervals, batch: int, device: torch.device) -> list[SegmentBatch]:
    """The variable-length batches that together are `mask` over a batch of sequences."""
    groups: dict[tuple[bool, int], list[tuple[int, int, int, int]]] = {}
    for run in find_runs(mask, batch, device):
        n_rows, n_keys = run.last - run.first, run.last_key - run.first_key
        left = n_keys - n_rows if run.start_step else -1
        row, key = run.sequence * mask.n_queries + run.first, run.sequence * mask.n_keys + run.first_key
        groups.setdefault((bool(run.end_step), left), []).append((row, n_rows, key, n_keys))

    def index(ranges: list[tuple[int, int]], total: int) -> Tensor | None:
        flat = np.concatenate([np.arange(first, first + count) for first, count in ranges])
        if len(flat) == total and np.array_equal(flat, np.arange(total)):
            return None
        return torch.from_numpy(flat).to(device)

    def offsets(counts: list[int]) -> Tensor:
        return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=device)

    batches = []
    for (is_causal, left), members in groups.items():
        row_counts, key_counts = [m[1] for m in members], [m[3] for m in members]
        batches.append(
            SegmentBatch(
                is_causal,
                left,
                index([(m[0], m[1]) for m in members], batch * mask.n_queries),
                index([(m[2], m[3]) for m in members], batch * mask.n_keys),
                offsets(row_counts),
                offsets(key_counts),
                max(row_counts),
                max(key_counts),
            )
        )
    return batches


def _pick(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals, scale: float) -> tuple[Tensor, Tensor]:
    batch, n_queries, heads, _ = q.shape
    rows, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    out = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
    lse = torch.full((heads, batch * n_queries), -torch.inf, dtype=torch.float32, device=q.device)
    for s in segments(mask, batch, q.device):
        part, part_lse, *_ = aten._flash_attention_forward(
            _pick(rows, s.rows), _pick(keys, s.keys), _pick(values, s.keys), s.row_offsets, s.key_offsets,
            s.max_rows, s.max_keys, 0.0, s.is_causal, False, scale=scale, **s.window(),
        )  # fmt: skip
        if s.rows is None:
            out, lse = part, part_lse
        else:
            out[s.rows], lse[:, s.rows] = part, part_lse
    return out.view(q.shape), lse.view(heads, batch, n_queries).transpose(0, 1).contiguous()


def _varlen_backward(dout: Tensor, saved: Saved, mask: KeyIntervals, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    batch, n_queries, heads, _ = q.shape
    rows, keys, values, drows, outs = (x.flatten(0, 1).contiguous() for x in (q, k, v, dout, out))
    flat_lse = lse.transpose(0, 1).reshape(heads, batch * n_queries)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq = torch.zeros_like(rows)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (keys, values))
    for s in segments(mask, batch, q.device):
        part_dq, part_dk, part_dv = aten._flash_attention_backward(
            _pick(drows, s.rows), _pick(rows, s.rows), _pick(keys, s.keys), _pick(values, s.keys), _pick(outs, s.rows),
            (flat_lse if s.rows is None else flat_lse[:, s.rows]).contiguous(), s.row_offsets, s.key_offsets,
            s.max_rows, s.max_keys, 0.0, s.is_causal, seed, seed, scale=scale, **s.window(),
        )  # fmt: skip
        if s.rows is None:
            dq = part_dq
        else:
            dq[s.rows] = part_dq
        if s.keys is None:
            dk, dv = dk + part_dk, dv + part_dv
        else:
            dk.index_add_(0, s.keys, part_dk.float())
            dv.index_add_(0, s.keys, part_dv.float())
    return dq.view(q.shape), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)
