"""Attention side by side with its peers, in one run: each contender is checked against float64, then timed.

    python tools/bench_attention.py                                  # all cases on the GPU: minutes
    python tools/bench_attention.py --cases 32k --contenders triton,cudnn --output runs/bench

A contender of ours whose error is too large ends the run without a figure; a peer that is absent or fails is listed
with the reason. TFLOP/s count the pairs of a query and a key it sees: 4 x head_dim a pair and head forward, 2.5 x that
backward. Peers: torch's SDPA on cuDNN and FlashAttention-2, FlexAttention, FlashAttention-4 (`flash_attn.cute`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longctx.kernels.attention import passes
from longctx.kernels.attention.choice import choose_implementation
from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.attention.tiles import MERGED_ROWS, merge_flags
from longctx.tools import benchmarking
from longctx.tools.benchmarking import Row, UnservedError


@dataclass(frozen=True)
class Case:
    """One attention: bfloat16 on a GPU, float32 on a CPU."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    kind: str = "causal"  # or full, window, documents
    size: int = 0  # keys of a window, or the median length of the documents

    def lengths(self) -> list[int]:
        """Of the documents of a sequence."""
        return benchmarking.document_lengths(self.length, self.size)

    def mask(self, device: torch.device) -> KeyIntervals:
        if self.kind == "full":
            return KeyIntervals.full(self.length, self.length)
        if self.kind == "window":
            return KeyIntervals.causal(self.length).window(self.size, device)
        if self.kind == "documents":
            starts = benchmarking.document_starts(self.lengths()).expand(self.batch, -1)
            return KeyIntervals.documents(starts).to(device)
        return KeyIntervals.causal(self.length)

    def flops(self, device: torch.device) -> float:
        """Of the forward pass."""
        start, end = self.mask(device).bounds(device)
        pairs = (end - start).clamp(min=0).sum(dtype=torch.float64) * self.batch / start.shape[0]
        return 4.0 * self.head_dim * self.heads * float(pairs)


CASES = [
    Case("4k causal b4 d128 16/16", 4, 4096, 16, 16, 128),
    Case("8k causal b2 d128 32/8", 2, 8192, 32, 8, 128),
    Case("32k causal d128 32/8", 1, 32768, 32, 8, 128),
    Case("32k full d128 32/8", 1, 32768, 32, 8, 128, "full"),
    Case("128k causal d128 32/8", 1, 131072, 32, 8, 128),
    Case("32k causal d64 32/32", 1, 32768, 32, 32, 64),
    Case("16k causal d256 16/16", 1, 16384, 16, 16, 256),
    Case("128k documents 2k d128 32/8", 1, 131072, 32, 8, 128, "documents", 2048),
    Case("128k documents 16k d128 32/8", 1, 131072, 32, 8, 128, "documents", 16384),
    Case("128k window 4k d128 32/8", 1, 131072, 32, 8, 128, "window", 4096),
]

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


# contenders: (case, device) -> out of q, k, v (batch, sequence, heads, head_dim) --------------------------------------


def ours(implementation: str, deterministic: bool = False) -> Callable[[Case, torch.device], Call]:
    def prepare(case: Case, device: torch.device) -> Call:
        mask = case.mask(device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, mask, implementation=implementation, deterministic=deterministic)[0]

        return call

    return prepare


def torch_sdpa(backend: SDPBackend) -> Callable[[Case, torch.device], Call]:
    def prepare(case: Case, _device: torch.device) -> Call:
        if case.kind not in ("full", "causal"):
            raise UnservedError("knows full and causal masks")

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=case.kind == "causal", enable_gqa=True)
            return out.transpose(1, 2)

        return call

    return prepare


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(case: Case, device: torch.device) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    if device.type != "cuda":
        raise UnservedError("timed on GPUs alone")
    torch._dynamo.reset()  # or its limit of recompilations ends in eager mode
    start, end = (bound[0] for bound in case.mask(device).bounds(device))
    if case.batch > 1 and case.kind == "documents":
        raise UnservedError("documents of a batch")

    def sees(_batch, _head, row, key):
        return (key >= start[row]) & (key < end[row])

    def causal(_batch, _head, row, key):
        return row >= key

    block_mask = None
    if case.kind != "full":
        block_mask = create_block_mask(
            causal if case.kind == "causal" else sees,
            None,
            None,
            case.length,
            case.length,
            device=device,
            _compile=True,
        )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

    return call


def flash_attention_4(case: Case, device: torch.device) -> Call:
    try:
        from flash_attn.cute import (  # pyright: ignore[reportMissingImports]
            flash_attn_func,
            flash_attn_varlen_func,
        )
    except Exception as error:
        raise UnservedError(f"{type(error).__name__}: {error}") from error
    first = lambda result: result[0] if isinstance(result, tuple) else result  # noqa: E731
    if case.kind == "documents":
        lengths = case.lengths()
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_varlen_func(
                q[0], k[0], v[0], cu_seqlens_q=offsets, cu_seqlens_k=offsets,
                max_seqlen_q=max(lengths), max_seqlen_k=max(lengths), causal=True,
            )  # fmt: skip
            return first(out).unsqueeze(0)

        return packed
    window = {"window_size": (case.size - 1, 0)} if case.kind == "window" else {}
    return lambda q, k, v: first(flash_attn_func(q, k, v, causal=case.kind != "full", **window))


class _Into(torch.autograd.Function):
    """The forms of a ring's step: the last of several blocks of keys, merged with what was before; dq, dk and dv are
    added to float32 tensors that are zeroed each time."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals, implementation: str) -> Tensor:
        options = Options(q.shape[-1] ** -0.5)
        implementation = choose_implementation(implementation, q, mask, options)
        mask = mask.with_bounds(q.device)
        _, last = merge_flags([mask, mask], MERGED_ROWS)
        forward = passes.PartialForward(q, options, implementation)
        forward.sums.zero_()
        forward.lse.fill_(-torch.inf)
        forward.add(k, v, mask, last)
        out, lse = forward.results()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = mask, options, implementation
        return out

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        saved = Saved(*ctx.saved_tensors)
        dq, dk, dv = into = tuple(torch.zeros(x.shape, device=x.device) for x in saved[:3])
        passes.attention_backward(gradients[0], None, saved, *ctx.call, into=(dq, dk, dv))
        return *(x.to(saved.q.dtype) for x in into), None, None


def into(implementation: str) -> Callable[[Case, torch.device], Call]:
    def prepare(case: Case, device: torch.device) -> Call:
        mask = case.mask(device)
        return lambda q, k, v: _Into.apply(q, k, v, mask, implementation)

    return prepare


CONTENDERS = {
    "hopper": ours("hopper"),
    "hopper-deterministic": ours("hopper", deterministic=True),
    "hopper-into": into("hopper"),
    "triton": ours("triton"),
    "triton-deterministic": ours("triton", deterministic=True),
    "sdpa": ours("sdpa"),
    "cudnn": torch_sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa2": torch_sdpa(SDPBackend.FLASH_ATTENTION),
    "flex": flex,
    "fa4": flash_attention_4,
}
OURS = ("hopper", "hopper-deterministic", "hopper-into", "triton", "triton-deterministic", "sdpa")


# measuring ------------------------------------------------------------------------------------------------------------


def random_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v with gradients, and the gradient of out."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [
        (case.batch, case.length, h, case.head_dim) for h in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes)
    return [*(x.requires_grad_() for x in (q, k, v)), dout]


def largest_error(call: Call, case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """Relative to float64, of out, dq, dk and dv the largest."""
    q, k, v, dout = random_inputs(case, device, dtype)
    out = call(q, k, v)
    results = out, *torch.autograd.grad(out, (q, k, v), dout)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    true_q, true_k, true_v = exact
    true_out = attention(true_q, true_k, true_v, case.mask(device), implementation="reference")[0]
    truth = true_out, *torch.autograd.grad(true_out, exact, dout.double())
    return max(float((x.detach().double() - t).norm() / t.norm()) for x, t in zip(results, truth, strict=True))


def small(case: Case) -> Case:
    """The same attention on few tokens, for float64 to hold."""
    length = min(case.length, 640)
    return replace(
        case,
        batch=min(case.batch, 2),
        length=length,
        size=min(case.size, length // 4),
        heads=4,
        kv_heads=4 * case.kv_heads // case.heads,
    )


def measure(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Row:
    row: Row = {}
    try:
        few = small(case)
        row["error_to_float64"] = largest_error(CONTENDERS[name](few, device), few, device, dtype)
        limit = 2e-5 if dtype == torch.float32 else 1.5e-2
        if row["error_to_float64"] > limit:
            raise AssertionError(f"error {row['error_to_float64']:.1e} to float64, may be {limit:.1e}")
        call = CONTENDERS[name](case, device)
        q, k, v, dout = random_inputs(case, device, dtype)
        flops = case.flops(device)
        with torch.no_grad():
            row["forward_ms"] = benchmarking.median_ms(lambda: call(q, k, v), device, benchmarking.ROUND_S)
        out = call(q, k, v)

        def backward() -> None:
            torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

        row["backward_ms"] = benchmarking.median_ms(backward, device, benchmarking.ROUND_S)
        row["peak_gib"] = benchmarking.peak_gib(lambda: torch.autograd.grad(call(q, k, v), (q, k, v), dout), device)
        row["forward_tflops"] = flops / row["forward_ms"] / 1e9
        row["backward_tflops"] = 2.5 * flops / row["backward_ms"] / 1e9
    except UnservedError as reason:
        row["error"] = str(reason)
    except Exception as error:
        if name in OURS and not isinstance(error, ValueError):  # a ValueError says what a kernel does not take
            raise
        row["error"] = f"{type(error).__name__}: {str(error)[:160]}"
    return row


def divided(case: Case, n: int) -> Case:
    return replace(case, length=case.length // n, size=case.size // n)


if __name__ == "__main__":
    columns = ["forward_tflops", "backward_tflops", "forward_ms", "backward_ms", "peak_gib", "error_to_float64"]
    report = benchmarking.Report("attention", columns, ["forward_tflops", "backward_tflops"], "TFLOP/s")
    benchmarking.run(__doc__, CASES, CONTENDERS, divided, measure, report)
