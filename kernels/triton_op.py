"""Custom ops into which torch.compile looks: compiled code launches their Triton kernels itself.

The way through an op's Python costs the CPU ten times as much as such a launch, and the step of a small model waits for
its CPU. Outside torch.compile nothing changes, and of DTensors the op's sharding rule is asked first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import library
from torch.library import CustomOpDef

from longctx.kernels import hardware


def triton_op(name: str, implementation: Callable[..., Any]) -> CustomOpDef:
    """The op `longctx::<name>`, which changes no argument, with the schema of the annotations.

    `implementation` consists of torch's ops and of kernels that are launched as `launchable(kernel)[grid](...)`.
    """
    register: Any = library.custom_op if hardware.INTERPRETED else library.triton_op  # the interpreter needs values
    return register(f"longctx::{name}", implementation, mutates_args=())


def launchable(kernel: Any) -> Any:
    """The kernel, or inside torch.compile what stands for it there."""
    return kernel if hardware.INTERPRETED else library.wrap_triton(kernel)
