"""What torch.compile makes of the fused ops for a GPU that need not be there; prints a JSON line for each.

Runs in a process of its own: interpreted kernels are never traced. Nothing is computed, and a stand-in tells Triton
what to compile for.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import triton
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from longctx.kernels import hardware
from longctx.kernels.norm.rms_norm import add_rms_norm
from longctx.kernels.rotary import apply_rotary_to_both
from longctx.kernels.swiglu import swiglu, swiglu_linear

WIDTH, LENGTHS = 64, (32, 48, 64)


class Driver:
    """Of a GPU of compute capability 9.0, as far as it is asked."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def rotary(x: Tensor, _weight: Tensor) -> Tensor:
    heads, angles = x.unflatten(-1, (4, 16)), x[..., :8].float()
    return torch.cat(apply_rotary_to_both(heads, heads, angles.detach(), angles.detach()), 2)


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_rms_norm": lambda x, weight: torch.cat(add_rms_norm(x, x, weight[0])),
    "rotary": rotary,
    "swiglu": lambda x, _weight: swiglu(x, x),
    "swiglu, packed": lambda x, _weight: swiglu(x),
    "swiglu_linear": lambda x, weight: swiglu_linear(x, x, weight),
}


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    hardware.triton_or_reference = lambda *_: "triton"
    hardware.architecture = lambda _: "sm_90"
    for name, op in OPS.items():
        graphs: list[list[str]] = []

        def keep(graph: torch.fx.GraphModule, _inputs: object, graphs=graphs) -> Callable:
            graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
            [outputs] = [node.args[0] for node in graph.graph.nodes if node.op == "output"]
            return make_boxed_func(lambda *_: [None if node is None else like(node.meta["val"]) for node in outputs])

        torch.compiler.reset()
        compiled = torch.compile(op, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        compiled(*inputs_of(32)).sum().backward()
        targets = [target for graph in graphs for target in graph]
        graphs.clear()
        with torch.no_grad():
            for length in LENGTHS:
                compiled(*inputs_of(length))
        print(json.dumps({
            "op": name, "kernels": sum("triton_kernel_wrapper" in target for target in targets),
            "ops": [target for target in targets if "longctx" in target], "graphs": len(graphs),
        }), flush=True)  # fmt: skip


def inputs_of(length: int) -> list[Tensor]:
    return [torch.randn(*shape).requires_grad_() for shape in ((2, length, WIDTH), (WIDTH, WIDTH))]


def like(value: Tensor | torch.SymInt | int) -> Tensor | int:
    """Of the shape, or the value, that was given while the code was traced."""
    if isinstance(value, Tensor):
        return torch.zeros([as_given(size) for size in value.shape], dtype=value.dtype)
    return as_given(value)


def as_given(size: torch.SymInt | int) -> int:
    return size if isinstance(size, int) else size.node.hint


if __name__ == "__main__":
    main()
