"""What the compiler makes of the attention kernels: registers, spills and shared memory, without a GPU."""

from __future__ import annotations

import pytest
from compiled import SHARED_MEMORY, kernels_of


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    return kernels_of("compile_attention.py")


def test_everything_was_compiled(kernels):
    names = [kernel["kernel"] for kernel in kernels]
    assert [names.count(name) for name in ("_forward_kernel", "_delta_kernel", "_backward_kernel")] == [21, 21, 21]


def test_programs_fit(kernels):
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["architecture"]], kernel


def test_the_forward_pass_spills_nothing(kernels):
    for kernel in kernels:
        if kernel["kernel"] == "_forward_kernel" and "dropout" not in kernel["options"]:
            assert kernel["spills"] == 0, kernel


def test_the_backward_pass_spills_little(kernels):
    """dK and dV of 128 keys take half of the registers; bytes as of triton 3.7.1, with room for 3.6.0.

    At head_dim 64 tiles of 128 rows spill, and are the fastest all the same.
    """
    most = {64: 1024, 128: 1024, 256: 2048}
    for kernel in kernels:
        if (
            kernel["kernel"] == "_backward_kernel"
            and kernel["architecture"].startswith("sm_")
            and not kernel["options"]
        ):
            assert kernel["spills"] <= most[kernel["head_dim"]], kernel


def test_hopper_uses_its_matrix_units_and_vector_atomics(kernels):
    for kernel in kernels:
        is_hopper = kernel["architecture"] == "sm_90" and kernel["dtype"] == "torch.bfloat16"
        # the matrix units take 64 rows or more: block-sparse has tiles of 32 keys at head_dim 256
        if is_hopper and kernel["mask"] == "KeyIntervals" and kernel["kernel"] != "_delta_kernel":
            assert kernel["wgmma"] > 0, kernel
            assert kernel["kernel"] == "_forward_kernel" or kernel["vector_atomics"] > 0, kernel
