"""Attention without autograd: over all keys at once, or over blocks of keys that come one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.attention import hopper_forward, reference, torch_sdpa, triton_backward, triton_forward
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.hopper_backward import GradientTargets, PartialBackwardOnHopper, backward_on_hopper
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.precision import accumulation_dtype


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyIntervals | BlockMask,
    options: Options,
    implementation: str,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Out like q and lse (batch, heads, n_queries) in the dtype of sums; arguments as of `interface.attention`.

    `implementation` is one that can serve the call, as `choice.choose_implementation` gives it.
    """
    if not q.numel() or not k.numel():
        out, lse = _without_keys(q)
    elif implementation == "triton":
        return triton_forward.forward_in_triton(q, k, v, mask, options, sink)
    elif implementation == "hopper" and isinstance(mask, KeyIntervals):
        out, lse = hopper_forward.forward_on_hopper(q, k, v, mask, options)
    elif implementation == "sdpa" and isinstance(mask, KeyIntervals):
        out, lse = torch_sdpa.forward_by_torch(q, k, v, mask, options.scale)
    else:
        out, lse = reference.attention_forward(q, k, v, mask, options)
    return (out, lse) if sink is None else reference.add_sink(out, lse, sink)


def _without_keys(q: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse of rows that see nothing."""
    lse_dtype = accumulation_dtype(q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=lse_dtype, device=q.device)
    return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    mask: KeyIntervals | BlockMask,
    options: Options,
    implementation: str,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; `dlse` (batch, heads, n_queries), or None where no gradient comes through lse.

    `into`: dq, dk and dv in the dtype of sums, their last dim contiguous, to which these are added in place, and which
    are returned. `implementation` as of `attention_forward`.
    """
    if not saved.q.numel() or not saved.k.numel():
        return into or (torch.zeros_like(saved.q), torch.zeros_like(saved.k), torch.zeros_like(saved.v))
    if implementation == "triton":
        return triton_backward.backward_in_triton(dout, dlse, saved, mask, options, into)
    if implementation == "hopper" and isinstance(mask, KeyIntervals):
        return backward_on_hopper(dout, dlse, saved, mask, options, into)
    if implementation == "sdpa" and isinstance(mask, KeyIntervals):
        gradients = torch_sdpa.backward_by_torch(dout, dlse, saved, mask, options.scale)
    else:
        gradients = reference.attention_backward(dout, dlse, saved, mask, options)
    return reference.added(gradients, into)


def delta(dout: Tensor, out: Tensor) -> Tensor:
    """rowsum(dout * out), (batch, heads, n_queries) in the dtype of sums."""
    if hardware.triton_or_reference("auto", dout) == "triton":
        return triton_backward.delta(dout, out)
    return reference.attention_delta(dout, None, out)


class PartialForward:
    """The forward pass over keys that come block by block: results are merged by their log-sum-exp.

    `implementation` as of `attention_forward`, for masks with bounds.
    """

    def __init__(self, q: Tensor, options: Options, implementation: str) -> None:
        self.q, self.options, self.implementation = q, options, implementation
        compute = accumulation_dtype(q.dtype)
        self.merges_by_flags = implementation == "hopper" and q.numel() > 0
        self.sums = torch.empty(q.shape, dtype=compute, device=q.device)
        self.lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=compute, device=q.device)
        if self.merges_by_flags:
            self.out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        else:
            self.sums.zero_()
            self.lse.fill_(-torch.inf)

    def add(self, k: Tensor, v: Tensor, mask: KeyIntervals, merge_flags: Tensor) -> None:
        """One block of keys and values, with at least one key.

        The Hopper kernel goes by the merge flags of each `MERGED_ROWS` rows (see `tiles.merge_flags`), and writes to
        `out` what later blocks do not change; the others merge all rows.
        """
        q, options, sums, lse = self.q, self.options, self.sums, self.lse
        if self.merges_by_flags:
            part = hopper_forward.PartialOutput(merge_flags, self.out, sums, lse)
            hopper_forward.forward_on_hopper(q, k, v, mask, options, part)
        elif self.implementation == "triton" and q.numel():
            triton_forward.forward_in_triton(q, k, v, mask, options, into=(sums, lse))
        else:
            out, out_lse = attention_forward(q, k, v, mask, options, self.implementation)
            merged, merged_lse = reference.merge(sums, lse, out.to(sums.dtype), out_lse)
            sums.copy_(merged)
            lse.copy_(merged_lse)

    def results(self) -> tuple[Tensor, Tensor]:
        """Out like q, and lse (batch, heads, n_queries) in the dtype of sums, once all blocks were added."""
        return self.out if self.merges_by_flags else self.sums.to(self.q.dtype), self.lse


class PartialBackward:
    """The backward pass over keys that come block by block: what rows need is computed once, dq is added up.

    Arguments as of `attention_backward`; `out` and `lse` are those of the softmax over all blocks. Gradients of keys
    and values are in the dtype of sums, those of queries in that of q.
    """

    def __init__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, out: Tensor, lse: Tensor, options: Options,
        implementation: str,
    ) -> None:  # fmt: skip
        self.dout, self.dlse, self.q, self.out, self.lse = dout, dlse, q, out, lse
        self.options, self.implementation = options, implementation
        self.writes_to_targets = implementation == "hopper"
        if self.writes_to_targets:
            self.on_hopper = PartialBackwardOnHopper(dout, dlse, q, out, lse, options)
        else:
            self.sum = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)

    def add(self, k: Tensor, v: Tensor, mask: KeyIntervals, into: tuple[Tensor, Tensor] | GradientTargets) -> None:
        """One block of keys and values, whose gradients are added to `into`, dk and dv; or written to these targets, if
        the pass `writes_to_targets`."""
        if not k.numel():
            return
        if self.writes_to_targets:
            self.on_hopper.add(k, v, mask, into)
            return
        assert not isinstance(into, GradientTargets)
        saved = Saved(self.q, k, v, self.out, self.lse)
        attention_backward(self.dout, self.dlse, saved, mask, self.options, self.implementation, (self.sum, *into))

    def dq(self) -> Tensor:
        return self.on_hopper.dq(torch.empty_like(self.q)) if self.writes_to_targets else self.sum.to(self.q.dtype)
