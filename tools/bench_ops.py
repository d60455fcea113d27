"""The fused ops side by side with their peers, in one run: each contender is checked against float64, then timed.

    python tools/bench_ops.py                                     # all cases on the GPU: minutes
    python tools/bench_ops.py --cases rms_norm --contenders triton,compile,liger --output runs/bench

An op of ours whose error is above 1.5 x torch's at the same precision ends the run; a peer that is absent or fails is
listed with the reason. TB/s count the bytes that must move, TFLOP/s the products that must be made; what the device's
copy and its 8192^3 product reach is printed first. Of losses and of what overwrites its inputs, only a whole step is
timed, less the copy of what it writes over. Peers: torch eager and compiled, Liger, quack, CCE (cut_cross_entropy).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.compat.norms import dropout_add_layer_norm
from longctx.kernels.dense import fused_mlp
from longctx.kernels.loss.cross_entropy import cross_entropy
from longctx.kernels.loss.linear_cross_entropy import linear_cross_entropy
from longctx.kernels.norm.layer_norm import layer_norm
from longctx.kernels.norm.rms_norm import add_rms_norm, rms_norm
from longctx.kernels.rotary import apply_rotary_to_both
from longctx.kernels.softmax import softmax
from longctx.kernels.swiglu import swiglu
from longctx.tools import benchmarking
from longctx.tools.benchmarking import Row, UnservedError

Call = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op on `rows` x `width`; `inner` is the width of hidden states before a vocabulary, or of an MLP's inside."""

    op: str
    rows: int
    width: int
    inner: int = 0

    @property
    def name(self) -> str:
        return f"{self.op} {self.rows}x{self.width}" + (f"x{self.inner}" if self.inner else "")


CASES = [
    Case("rms_norm", 32768, 4096),
    Case("rms_norm", 32768, 8192),
    Case("rms_norm", 131072, 128),
    Case("add_rms_norm", 32768, 4096),
    Case("layer_norm", 32768, 4096),
    Case("dropout_add_layer_norm", 32768, 4096),
    Case("rotary", 32768, 4096),
    Case("swiglu", 32768, 4096),
    Case("swiglu", 32768, 14336),
    Case("softmax", 32768, 4096),
    Case("mlp", 32768, 4096, 16384),
    Case("cross_entropy", 16384, 128256),
    Case("cross_entropy over logits", 16384, 128256),
    Case("linear_cross_entropy", 16384, 128256, 4096),
    Case("linear_cross_entropy", 65536, 128256, 4096),
]


# what is computed -----------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """An op: its inputs, itself in plain torch, and what it must move or multiply."""

    shapes: Callable[[Case], list[tuple[int, ...]]]  # of the inputs with gradients
    plain: Call
    passes: tuple[float, float]  # over rows x width, forward and backward; losses: both together
    constants: Callable[[Case, torch.device], list[Tensor]] = lambda _case, _device: []
    flops: Callable[[Case], float] = lambda _case: 0.0  # of forward and backward


def _plain_add_norm(x, residual, weight):
    total = x + residual
    return F.rms_norm(total, (x.shape[-1],), weight, 1e-6), total


def _plain_dropout_add_norm(x, residual, weight, bias):
    total = F.dropout(x, 0.1) + residual
    return F.layer_norm(total, (x.shape[-1],), weight, bias, 1e-5), total


def _plain_rotary(q, k, cos, sin):
    def turned(x):
        a, b = x.to(cos.dtype).chunk(2, -1)
        c, s = cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    return turned(q), turned(k)


def _plain_mlp(x, weight1, weight2, bias1, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def _plain_loss(logits, targets):
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def _plain_linear_loss(hidden, weight, targets):
    return _plain_loss(F.linear(hidden, weight), targets)


def _matrix(case: Case) -> list[tuple[int, ...]]:
    return [(case.rows, case.width)]


def _with_vectors(matrices: int, vectors: int) -> Callable[[Case], list[tuple[int, ...]]]:
    return lambda case: [(case.rows, case.width)] * matrices + [(case.width,)] * vectors


def _heads(case: Case) -> list[tuple[int, ...]]:
    return [(1, case.rows, case.width // 128, 128), (1, case.rows, max(1, case.width // 512), 128)]


def _angles(case: Case, device: torch.device) -> list[Tensor]:
    angle = torch.arange(case.rows, device=device).unsqueeze(1) * 1e4 ** (-torch.arange(64, device=device) / 64)
    return [angle.cos().unsqueeze(0), angle.sin().unsqueeze(0)]


def _targets(case: Case, device: torch.device) -> list[Tensor]:
    return [torch.randint(case.width, (case.rows,), generator=torch.Generator().manual_seed(0)).to(device)]


OPS = {
    "rms_norm": Op(_with_vectors(1, 1), lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6), (2, 3)),
    "add_rms_norm": Op(_with_vectors(2, 1), _plain_add_norm, (4, 4)),
    "layer_norm": Op(_with_vectors(1, 2), lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b, 1e-5), (2, 3)),
    "dropout_add_layer_norm": Op(_with_vectors(2, 2), _plain_dropout_add_norm, (4, 5)),
    "rotary": Op(_heads, _plain_rotary, (2.5, 2.5), _angles),  # a quarter as many key heads
    "swiglu": Op(_with_vectors(2, 0), lambda g, u: F.silu(g) * u, (3, 5)),
    "softmax": Op(_matrix, lambda x: torch.softmax(x, -1), (2, 3)),
    "mlp": Op(
        lambda c: [(c.rows, c.width), (c.inner, c.width), (c.width, c.inner), (c.inner,), (c.width,)],
        _plain_mlp,
        (0, 0),
        flops=lambda c: 12.0 * c.rows * c.width * c.inner,
    ),
    "cross_entropy": Op(_matrix, _plain_loss, (2, 0), _targets),
    "cross_entropy over logits": Op(_matrix, _plain_loss, (2, 0), _targets),
    "linear_cross_entropy": Op(
        lambda c: [(c.rows, c.inner), (c.width, c.inner)],
        _plain_linear_loss,
        (0, 0),
        _targets,
        lambda c: 6.0 * c.rows * c.width * c.inner,
    ),
}
LOSSES = ("cross_entropy", "cross_entropy over logits", "linear_cross_entropy")


# contenders: op -> call -----------------------------------------------------------------------------------------------


def triton(op: str) -> Call:
    calls = {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "layer_norm": layer_norm,
        "dropout_add_layer_norm": partial(dropout_add_layer_norm, dropout_p=0.1, epsilon=1e-5, prenorm=True),
        "rotary": apply_rotary_to_both,
        "swiglu": swiglu,
        "softmax": softmax,
        "mlp": fused_mlp,
        "cross_entropy": cross_entropy,
        "cross_entropy over logits": partial(cross_entropy, inplace=True),
        "linear_cross_entropy": linear_cross_entropy,
    }
    return partial(calls[op], implementation="triton")


def eager(op: str) -> Call:
    return OPS[op].plain


def compiled(op: str) -> Call:
    if not torch.cuda.is_available():
        raise UnservedError("timed on GPUs alone")
    torch._dynamo.reset()  # or its limit of recompilations ends in eager mode
    torch._functorch.config.donated_buffer = False  # which forbid to time a backward pass by itself
    return torch.compile(OPS[op].plain, dynamic=False)


def liger(op: str) -> Call:
    try:
        from liger_kernel import ops  # pyright: ignore[reportMissingImports]
    except Exception as error:
        raise UnservedError(f"{type(error).__name__}: {error}") from error

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    def rope(q, k, cos, sin):
        twice = (torch.cat((x, x), -1).to(q.dtype) for x in (cos, sin))
        turned = ops.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *twice)
        return tuple(x.transpose(1, 2) for x in turned)

    calls = {
        "rms_norm": lambda x, w: ops.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
        "add_rms_norm": lambda x, r, w: ops.LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6),
        "layer_norm": lambda x, w, b: ops.LigerLayerNormFunction.apply(x, w, b, 1e-5),
        "rotary": rope,
        "swiglu": ops.LigerSiLUMulFunction.apply,
        "softmax": ops.LigerSoftmaxFunction.apply,
        "cross_entropy over logits": lambda x, t: first(
            ops.LigerCrossEntropyFunction.apply(x, t, None, -100, 0.0, 0.0, "mean")
        ),
        "linear_cross_entropy": lambda h, w, t: first(ops.LigerFusedLinearCrossEntropyFunction.apply(h, w, t)),
    }
    return _served(calls, op)


def quack(op: str) -> Call:
    try:
        from quack.cross_entropy import cross_entropy as loss  # pyright: ignore[reportMissingImports]
        from quack.rmsnorm import rmsnorm  # pyright: ignore[reportMissingImports]
        from quack.softmax import softmax as rows  # pyright: ignore[reportMissingImports]
    except Exception as error:
        raise UnservedError(f"{type(error).__name__}: {error}") from error
    calls = {
        "rms_norm": partial(rmsnorm, eps=1e-6),
        "softmax": rows,
        "cross_entropy": partial(loss, reduction="mean"),
    }
    return _served(calls, op)


def cce(op: str) -> Call:
    try:
        from cut_cross_entropy import linear_cross_entropy as cut  # pyright: ignore[reportMissingImports]
    except Exception as error:
        raise UnservedError(f"{type(error).__name__}: {error}") from error
    return _served({"linear_cross_entropy": cut}, op)


def _served(calls: dict[str, Call], op: str) -> Call:
    if op not in calls:
        raise UnservedError("has no such op")
    return calls[op]


CONTENDERS = {"triton": triton, "eager": eager, "compile": compiled, "liger": liger, "quack": quack, "cce": cce}
OVERWRITES = (("liger", "cross_entropy over logits"), ("triton", "cross_entropy over logits"), ("liger", "swiglu"),
              ("liger", "rotary"))  # fmt: skip


# measuring ------------------------------------------------------------------------------------------------------------


def random_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Those with gradients, and the constants; matrices of weights are scaled down so that results are of order 1."""
    op = OPS[case.op]
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in op.shapes(case)]
    for x in inputs[1:]:
        if x.ndim == 2 and case.inner:
            x.mul_(x.shape[1] ** -0.5)
    return [x.requires_grad_() for x in inputs], op.constants(case, device)


def results(call: Call, inputs: list[Tensor], constants: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients for fixed random ones in `dtype` of the outputs; of copies, which may be overwritten."""
    outputs = call(*(x * 1 if x.requires_grad else x for x in inputs), *constants)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    of_outputs = [torch.randn(y.shape, generator=generator).to(y.device, dtype).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, of_outputs)]


def largest_error(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """To float64, on few rows; of each result and gradient it must be at most 1.5 x torch's at the same precision."""
    few = replace(case, rows=min(case.rows, 64))
    inputs, constants = random_inputs(few, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plain = OPS[case.op].plain
    truth = results(plain, exact, [c.double() if c.is_floating_point() else c for c in constants], dtype)

    def of_each(call: Call) -> Tensor:
        found = results(call, inputs, constants, dtype)
        pairs = zip(found, truth, strict=True)
        return torch.stack([(x.double() - t).norm() / t.norm() for x, t in pairs]).detach()

    least = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5)  # of float32 the order of sums decides
    mine, allowed = of_each(CONTENDERS[name](case.op)), 1.5 * of_each(plain).clamp(min=least)
    if name != "triton":
        allowed = allowed.clamp(min=2e-2)
    if not bool((mine <= allowed).all()):  # NaN too
        raise AssertionError(f"errors {mine.tolist()} to float64, may be {allowed.tolist()}")
    return float(mine.max())


def measure(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Row:
    row: Row = {}
    try:
        call = CONTENDERS[name](case.op)
        if "dropout" not in case.op:  # each contender drops others; the tests compare ours with the reference
            row["error_to_float64"] = largest_error(name, case, device, dtype)
        timed(row, name, call, case, device, dtype)
    except UnservedError as reason:
        row["error"] = str(reason)
    except Exception as error:
        if name == "triton":
            raise
        row["error"] = f"{type(error).__name__}: {str(error)[:160]}"
    return row


def timed(row: Row, name: str, call: Call, case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Puts times and memory into `row`, as they are known."""
    op = OPS[case.op]
    inputs, constants = random_inputs(case, device, dtype)
    overwrites = (name, case.op) in OVERWRITES
    bytes_of_pass = case.rows * case.width * inputs[0].element_size()

    def step() -> None:
        taken = [x.detach().clone().requires_grad_() for x in inputs] if overwrites else inputs
        outputs = call(*taken, *constants)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, taken, [torch.ones_like(y) for y in outputs])

    step()  # compiles
    median_ms = partial(benchmarking.median_ms, device=device, seconds=benchmarking.ROUND_S)
    peak_gib, step_ms = benchmarking.peak_gib(step, device), median_ms(step)
    if overwrites:  # the copy that a step writes over is not the op's
        step_ms -= median_ms(lambda: [x.detach().clone() for x in inputs])
        peak_gib = None if peak_gib is None else peak_gib - sum(x.nbytes for x in inputs) / 2**30
    row |= {"peak_gib": peak_gib, "step_ms": step_ms}
    if case.op not in LOSSES and not overwrites:
        with torch.no_grad():
            forward_ms = median_ms(lambda: call(*inputs, *constants))
        outputs = call(*inputs, *constants)
        of_outputs = [torch.ones_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
        backward_ms = median_ms(lambda: torch.autograd.grad(outputs, inputs, of_outputs, retain_graph=True))
        row |= {"forward_ms": forward_ms, "backward_ms": backward_ms}
        if op.passes[0]:
            row["forward_tb_per_s"] = op.passes[0] * bytes_of_pass / forward_ms / 1e9
            row["backward_tb_per_s"] = op.passes[1] * bytes_of_pass / backward_ms / 1e9
    elif op.passes[0]:
        row["step_tb_per_s"] = sum(op.passes) * bytes_of_pass / step_ms / 1e9
    if op.flops(case):
        row["tflops"] = op.flops(case) / step_ms / 1e9


def divided(case: Case, n: int) -> Case:
    return replace(case, rows=max(1, case.rows // n), width=max(128, case.width // n), inner=case.inner // n)


if __name__ == "__main__":
    columns = [
        "forward_ms", "backward_ms", "step_ms", "forward_tb_per_s", "backward_tb_per_s", "step_tb_per_s", "tflops",
        "peak_gib", "error_to_float64",
    ]  # fmt: skip
    report = benchmarking.Report("ops", columns, ["step_ms"], "")
    benchmarking.run(__doc__, CASES, CONTENDERS, divided, measure, report)
