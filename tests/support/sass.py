"""Reads the machine code of Hopper kernels: the loops that multiply, and what a compiler may have done to them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# instructions that write nothing into a thread's registers
WITHOUT_RESULT = ["STG", "STS", "STL", "STSM", "RED", "BAR", "BRA", "SYNCS", "ISETP", "FSETP", "R2UR", "R2P"]


class Code(NamedTuple):
    """Instructions without their predicates, and at which of them each label stands."""

    instructions: list[str]
    labels: dict[str, int]


def disassembled(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(instruction[1])
    return Code(instructions, labels)


def loops(code: Code) -> list[list[str]]:
    """The innermost loops with matrix products in them."""
    ranges = []
    for i, instruction in enumerate(code.instructions):
        target = re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if target and (first := code.labels.get(target[1], i)) < i:
            ranges.append((first, i + 1))
    multiplying = [r for r in ranges if any(x.startswith("HGMMA") for x in code.instructions[slice(*r)])]
    inner = [r for r in multiplying if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in multiplying)]
    return [code.instructions[slice(*r)] for r in inner]


def spills(loop: list[str]) -> int:
    return sum(x.startswith(("STL", "LDL")) for x in loop)


def votes(loop: list[str]) -> int:
    """VOTE instructions: questions that the threads of a warp decide together."""
    return sum(x.startswith("VOTE") for x in loop)


def comparisons(loop: list[str]) -> int:
    """ISETP instructions: comparisons of integers."""
    return sum(x.startswith("ISETP") for x in loop)


def bytes_of_stores(code: Code) -> list[int]:
    """Of a thread, of each kind of instruction that stores to global memory."""
    stores = {x.split()[0] for x in code.instructions if x.startswith("STG")}
    return sorted(int(width[1]) // 8 if (width := re.search(r"\.(64|128)$", store)) else 4 for store in stores)


def exponentials_by_pending_products(loop: list[str]) -> dict[int, int]:
    """How many exponentials are issued after a wait that leaves so many groups of products pending."""
    found: dict[int, int] = {}
    pending = -1
    for instruction in loop * 2:  # what is before the first wait follows the last one
        if wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", instruction):
            pending = int(wait[1], 16)
        elif instruction.startswith("MUFU.EX2") and pending >= 0:
            found[pending] = found.get(pending, 0) + 1
    return found


def overwritten_operands(loop: list[str]) -> list[str]:
    """Instructions that write registers which a product in flight still reads as its first operand.

    ptxas before 13.3 may move them there. A product's registers are its own until a wait retires its group.
    """
    groups: list[set[int]] = []
    current: set[int] = set()
    bad = []
    for instruction in loop * 2:
        if product := re.match(r"HGMMA\S* R\d+, R(\d+), ", instruction):
            current |= set(range(int(product[1]), int(product[1]) + 4))
        if instruction.startswith("HGMMA"):
            if "gsb0" in instruction:
                groups, current = [*groups, current], set()
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", instruction):
            pending = int(wait[1], 16)
            groups = groups[-pending:] if pending else []
        elif _written(instruction) & current.union(*groups):
            bad.append(instruction)
    return bad


def _written(instruction: str) -> set[int]:
    name, _, operands = instruction.partition(" ")
    if name.split(".")[0] in WITHOUT_RESULT:
        return set()
    target = re.match(r"(?:U?P\w+, )*R(\d+)\b", operands)
    if not target:
        return set()
    width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name or name.startswith("CS2R") else 1
    return set(range(int(target[1]), int(target[1]) + width))
