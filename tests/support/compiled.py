"""Compiles the kernels of a call for a GPU that need not be there, and reads what ptxas says of them.

A launch on `meta` tensors reaches `JITFunction.run` with all its arguments; instead of launching, the kernel is
compiled for the architecture asked for. Not in a process where TRITON_INTERPRET is set.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from longctx.kernels import hardware

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
            torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1"}  # fmt: skip
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # of a program

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "compiled"


def kernels_of(script: str, *arguments: str, packages: Path | None = None) -> list[dict]:
    """What a script of this folder prints: a JSON line for each kernel. It runs where nothing is interpreted.

    `packages`: a folder whose packages come before the installed ones. The answer is kept, and given again as long as
    the kernels, these scripts and the compiler are the same.
    """
    if packages is not None and not packages.exists():  # or the installed Triton would compile, and its answer be kept
        raise FileNotFoundError(f"no {packages}: `make .venv/{packages.name}` puts it there, as `make test` does first")
    kept = CACHE / f"{_identity(script, arguments, packages)}.jsonl"
    CACHE.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker that asks for the same waits for the answer
        if not kept.exists():
            beside = kept.with_suffix(".new")
            beside.write_text(_run(script, arguments, packages))
            beside.replace(kept)
    return [json.loads(line) for line in kept.read_text().splitlines() if line.startswith("{")]


def _identity(script: str, arguments: tuple[str, ...], packages: Path | None) -> str:
    root = Path(__file__).parents[2]
    found = hashlib.sha256(repr((script, arguments, str(packages), triton.__version__, torch.__version__)).encode())
    sources = [
        *(root / "kernels").rglob("*.py"),
        *(root / "kernels").rglob("*.json"),
        *Path(__file__).parent.glob("*.py"),
    ]
    for path in sorted(sources):
        found.update(path.read_bytes())
    return found.hexdigest()[:32]


def _run(script: str, arguments: tuple[str, ...], packages: Path | None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_ALWAYS_COMPILE"] = "1"  # of what Triton has kept, ptxas says nothing
    paths = [Path(__file__).parents[2], *([] if packages is None else [packages])]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, reversed(paths)))
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Compiled(NamedTuple):
    """One kernel of a call: what it takes of a multiprocessor."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    assembly: str
    binary: bytes
    warnings: list[str]  # of ptxas


def compile_launches(
    call: Callable[[], object], architecture: str, only: tuple[str, ...] | None = None, floats: str = "fp32"
) -> list[Compiled]:
    """The kernels that `call` launches on `meta` tensors, for `architecture`: sm_80, sm_90, ... or AMD's gfx942.

    `only`: of these names. `floats`: what Python's are passed as, by torch.compile fp64.
    """
    compiled: list[Compiled] = []
    is_nvidia = architecture.startswith("sm_")
    target = GPUTarget("cuda", int(architecture[3:]), 32) if is_nvidia else GPUTarget("hip", architecture, 64)

    def run(kernel, *args, grid, warmup, **kwargs):
        if only is None or kernel.__name__ in only:
            compiled.append(_compile(kernel, args, kwargs, target, floats))

    pretended = architecture if is_nvidia else "hip"
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(hardware, "architecture", return_value=pretended),
    ):
        call()
    return compiled


def _compile(kernel: JITFunction, args: tuple, kwargs: dict, target: GPUTarget, floats: str) -> Compiled:
    names = kernel.arg_names
    options = {name: value for name, value in kwargs.items() if name not in names}
    values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    declared_constant = {p.name for p in kernel.params if p.is_constexpr}
    general = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = values[name]
        if (
            name in declared_constant
            or value is None
            or (isinstance(value, int) and value == 1 and name not in general)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in general:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = floats
    source_type = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_type(kernel, signature, constants, attributes)
    ptxas = PtxasLog()
    with mock.patch.object(nvidia, "subprocess", ptxas):
        result = triton.compile(source, target=target, options=options)
    assembly = result.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    binary = result.asm["cubin" if target.backend == "cuda" else "hsaco"]
    registers, spills, warnings = ptxas.summary() if target.backend == "cuda" else _amd_metadata(assembly)
    return Compiled(kernel.__name__, registers, spills, result.metadata.shared, assembly, binary, warnings)


def _amd_metadata(assembly: str) -> tuple[int, int, list[str]]:
    """(vector registers a thread, bytes spilled, nothing)."""
    found = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", assembly)}
    return found["vgpr_count"], 4 * found["vgpr_spill_count"], []


class PtxasLog:
    """Reads what ptxas says when Triton calls it: it is not run a second time for that."""

    def __init__(self) -> None:
        self.said = ""

    def __getattr__(self, name: str) -> object:
        return getattr(subprocess, name)

    def run(self, command: list, **arguments: Any) -> subprocess.CompletedProcess:
        done = subprocess.run(command, **arguments)
        if "-v" in command:
            self.said = Path(arguments["stderr"].name).read_text()
        return done

    def summary(self) -> tuple[int, int, list[str]]:
        """(registers a thread, bytes spilled, what it warns of)."""
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", self.said)]
        warnings = [
            line for line in self.said.splitlines() if "Potential Performance Loss" in line or "warning" in line
        ]
        return max(int(n) for n in re.findall(r"Used (\d+) registers", self.said)), sum(spills), warnings
