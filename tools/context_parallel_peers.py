"""Attention over a split sequence as other projects do it, for `bench_context_parallel.py`: causal, one document.

A rank holds a zigzag shard; for `ulysses-fa4` one run of tokens.

`ring-flash-attn`: that package's zigzag ring. `gather-fa4`: keys and values gathered by NCCL, their gradients
reduce-scattered, as Llama 3 does (arXiv 2407.21783). `ulysses-fa4`: heads for tokens by NCCL's all-to-all, as
DeepSpeed-Ulysses does (arXiv 2309.14509). All three compute with FlashAttention-4. `alone-fa4`: a rank's work on it
without communication, all of its keys at hand. `torch`: PyTorch's own `context_parallel` with all-gather over cuDNN,
which takes as many key as query heads.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[..., Tensor]  # of q, k, v and a mask that is causal


@contextmanager
def peer(name: str) -> Iterator[Attention]:
    """One of `PEERS`, on all ranks."""
    with PEERS[name]() as attend:
        yield lambda q, k, v, _mask: attend(q, k, v)


@contextmanager
def _alone() -> Iterator[Attention]:
    yield _whole(causal=False)


@contextmanager
def _ring_flash_attn() -> Iterator[Attention]:
    forward, backward = _flash_attention_4()
    interface: Any = types.ModuleType("flash_attn.flash_attn_interface")

    def forward_2(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        out, lse, *_ = forward(q, k, v, softmax_scale=softmax_scale, causal=causal, return_lse=True)
        return out, lse, None, None

    def backward_2(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None,
    ):  # fmt: skip
        scale = {"softmax_scale": softmax_scale, "causal": causal}
        tensors = (x.contiguous() for x in (q, k, v, out, dout, softmax_lse))
        for into, gradient in zip((dq, dk, dv), backward(*tensors, **scale), strict=False):
            into.copy_(gradient)

    # the package wants flash-attention 2's names, and its own start fails on an import from transformers
    interface._flash_attn_forward, interface._flash_attn_backward = forward_2, backward_2
    sys.modules[interface.__name__] = interface
    package: Any = types.ModuleType("ring_flash_attn")
    found = importlib.util.find_spec("ring_flash_attn")
    if found is None:
        raise ModuleNotFoundError("ring-flash-attn is not installed")
    package.__path__, package.__spec__ = found.submodule_search_locations, found
    sys.modules["ring_flash_attn"] = package
    from ring_flash_attn.zigzag_ring_flash_attn import (  # pyright: ignore[reportMissingImports]
        zigzag_ring_flash_attn_func,
    )

    yield lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=dist.group.WORLD)


@contextmanager
def _gather() -> Iterator[Attention]:
    _flash_attention_4()
    yield _Gather.apply


class _Gather(torch.autograd.Function):
    """Two calls, one for each of a rank's zigzag chunks, over the keys up to its end."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        forward, _ = _flash_attention_4()
        size, chunk = dist.get_world_size(), q.shape[1] // 2
        here = torch.stack([k, v])
        gathered = here.new_empty(2 * size, *here.shape[1:])
        dist.all_gather_into_tensor(gathered, here)
        chunks = gathered.unflatten(0, (size, 2)).unflatten(3, (2, chunk))[
            _chunk_owners(size)
        ]  # (chunk, k or v, batch, token, head, dim)
        keys, values = chunks.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
        ctx.ends = [(i + 1) * chunk for i in _chunks(dist.get_rank(), size)]
        parts = [
            forward(part.contiguous(), keys[:, :end], values[:, :end], causal=True, return_lse=True)[:2]
            for part, end in zip(q.chunk(2, 1), ctx.ends, strict=True)
        ]
        outs, lses = zip(*parts, strict=True)
        ctx.save_for_backward(q, keys, values, *outs, *lses)
        return torch.cat(outs, 1)

    @staticmethod
    def backward(ctx, *gradients: Any) -> Any:
        _, backward = _flash_attention_4()
        q, keys, values, *saved = ctx.saved_tensors
        size, chunk = dist.get_world_size(), q.shape[1] // 2
        sums, dqs = torch.zeros(2, *keys.shape, device=q.device), []
        of_rows = zip(q.chunk(2, 1), gradients[0].chunk(2, 1), saved[:2], saved[2:], ctx.ends, strict=True)
        for part, dout, out, lse, end in of_rows:
            tensors = part.contiguous(), keys[:, :end], values[:, :end], out, dout.contiguous(), lse
            dq, dk, dv, *_ = backward(*tensors, causal=True)
            dqs.append(dq)
            sums[0, :, :end] += dk
            sums[1, :, :end] += dv
        chunks = sums.to(q.dtype).unflatten(2, (2 * size, chunk))
        owned = torch.cat([chunks[:, :, list(_chunks(rank, size))] for rank in range(size)])
        mine = owned.new_empty(2, *owned.shape[1:])
        dist.reduce_scatter_tensor(mine, owned)
        return torch.cat(dqs, 1), *mine.flatten(2, 3)


def _chunks(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def _chunk_owners(size: int) -> tuple[list[int], slice, slice, list[int]]:
    """Index of (rank, k or v, batch, one of its two chunks) that puts chunks in order; they come first."""
    ranks = [min(i, 2 * size - 1 - i) for i in range(2 * size)]
    return ranks, slice(None), slice(None), [int(i >= size) for i in range(2 * size)]


@contextmanager
def _ulysses() -> Iterator[Attention]:
    attend = _whole(causal=True)
    yield lambda q, k, v: _Exchange.apply(attend(*(_Exchange.apply(x, True) for x in (q, k, v))), False)


class _Exchange(torch.autograd.Function):
    """(batch, sequence / size, heads, dim) to (batch, sequence, heads / size, dim), or back."""

    @staticmethod
    def forward(ctx, x: Tensor, to_heads: bool) -> Tensor:
        ctx.to_heads, size = to_heads, dist.get_world_size()
        cut, joined = (2, 1) if to_heads else (1, 2)
        here = x.unflatten(cut, (size, -1)).movedim(cut, 0).contiguous()
        there = torch.empty_like(here)
        dist.all_to_all_single(there, here)
        return there.movedim(0, joined).flatten(joined, joined + 1)

    @staticmethod
    def backward(ctx, *gradients: Any) -> Any:
        return _Exchange.apply(gradients[0], not ctx.to_heads), None


@contextmanager
def _torch() -> Iterator[Attention]:
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    size = dist.get_world_size()
    set_rotate_method("allgather")
    unused = torch.empty(2 * size, device="cuda")  # it would split buffers; here they are split already

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    mesh = init_device_mesh("cuda", (size,))
    buffers = {"buffers": [unused], "buffer_seq_dims": [0], "no_restore_buffers": {unused}}
    with context_parallel(mesh, **buffers), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield attend


def _whole(causal: bool) -> Attention:
    """FlashAttention-4 with its gradients."""
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(q, k, v, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    return attend


def _flash_attention_4() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its forward and its backward kernel."""
    from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
        _flash_attn_bwd,
        _flash_attn_fwd,
    )

    return _flash_attn_fwd, _flash_attn_bwd


PEERS = {
    "alone-fa4": _alone,
    "ring-flash-attn": _ring_flash_attn,
    "gather-fa4": _gather,
    "ulysses-fa4": _ulysses,
    "torch": _torch,
}
