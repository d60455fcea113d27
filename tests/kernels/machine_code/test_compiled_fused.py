"""What the compiler makes of the fused ops' kernels: spills, shared memory and the width of accesses, without a GPU."""

from __future__ import annotations

import pytest

from compile_fused import CASES
from compiled import SHARED_MEMORY, kernels_of

# write numbers of a token alone, or with others of their name a matrix
FEW_WRITES = ("cross_entropy_forward_triton", "cross_entropy_statistics_triton")


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "gfx942")]


@pytest.fixture(scope="module", params=["sm_90", *OTHERS])
def kernels(request) -> list[dict]:
    return kernels_of("compile_fused.py", request.param)


def test_everything_was_compiled(kernels):
    assert list(dict.fromkeys(kernel["case"] for kernel in kernels)) == list(CASES)
    assert len(kernels) >= 2 * len(CASES)  # a forward and a backward pass, or more


def test_programs_fit_and_hardly_spill(kernels):
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["architecture"]], kernel
        assert kernel["spills"] <= 32, kernel  # bytes of a thread


def test_accesses_are_sixteen_bytes_wide(kernels):
    """Of all that is as large as the activations; where rows of logits are no multiple of 16 bytes nothing can be."""
    for kernel in kernels:
        if kernel["architecture"] == "gfx942" or "50257" in kernel["case"]:
            continue
        assert kernel["async_copies"] + kernel["wide_loads"] > 0, kernel
        assert kernel["wide_stores"] > 0 or kernel["kernel"] in FEW_WRITES, kernel


def test_nothing_is_computed_in_float64(kernels):
    """Although torch.compile passes Python's floats so."""
    assert [(kernel["kernel"], kernel["doubles"]) for kernel in kernels if kernel["doubles"]] == []
    assert {kernel["kernel"] for kernel in kernels if kernel["is_seen_by_compile"]} == {
        "norm_forward_triton", "norm_backward_triton", "rotary_triton", "swiglu_forward_triton",
        "swiglu_backward_triton",
    }  # fmt: skip
