"""What the compiler makes of the attention kernels: registers, spills and shared memory, without a GPU."""

from __future__ import annotations

import pytest

from compile_attention import cases
from compiled import SHARED_MEMORY, kernels_of

OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm_90", "sm_80", "sm_89", "gfx942")]


@pytest.fixture(scope="module", params=["sm_90 short", *OTHERS])
def kernels(request) -> list[dict]:
    return kernels_of("compile_attention.py", *request.param.split())


def test_everything_was_compiled(kernels, request):
    """A forward kernel, a backward kernel and what it needs of rows, for each case."""
    names = [kernel["kernel"] for kernel in kernels]
    n_cases = len(cases(*request.node.callspec.params["kernels"].split()))
    for name in ("attention_forward_triton", "attention_delta_triton", "attention_backward_triton"):
        assert names.count(name) == n_cases, name


def test_programs_fit(kernels):
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["architecture"]], kernel


def test_the_forward_pass_spills_nothing(kernels):
    for kernel in kernels:
        if kernel["kernel"] == "attention_forward_triton" and "dropout" not in kernel["options"]:
            assert kernel["spills"] == 0, kernel


def test_the_backward_pass_spills_little(kernels):
    """dK and dV of 128 keys take half of the registers; bytes as of triton 3.7.1, with room for 3.6.0.

    At head_dim 64 tiles of 128 rows spill, and are the fastest all the same.
    """
    most = {64: 1024, 128: 1024, 256: 2048}
    for kernel in kernels:
        if (
            kernel["kernel"] == "attention_backward_triton"
            and kernel["architecture"].startswith("sm_")
            and not kernel["options"]
        ):
            assert kernel["spills"] <= most[kernel["head_dim"]], kernel


def test_hopper_uses_its_matrix_units_and_vector_atomics(kernels):
    for kernel in kernels:
        is_hopper = kernel["architecture"] == "sm_90" and kernel["dtype"] == "torch.bfloat16"
        # the matrix units take 64 rows or more: block-sparse has tiles of 32 keys at head_dim 256
        if is_hopper and kernel["mask"] == "KeyIntervals" and kernel["kernel"] != "attention_delta_triton":
            assert kernel["wgmma"] > 0, kernel
            assert kernel["kernel"] == "attention_forward_triton" or kernel["vector_atomics"] > 0, kernel
