"""What the oldest Triton makes of the Hopper kernels, and in `make test-all` the newer ones.

If a change costs the overlap of products and softmax, this fails.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from compile_hopper import KERNELS
from compiled import SHARED_MEMORY, kernels_of

OLDEST, NEWEST = "3.6.0", "3.9.0"  # of torch 2.11 and 2.15; `make` puts them beside the installed one
IN_USE = version("triton")
SHORT = f"{OLDEST}, one of each form"
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in (OLDEST, IN_USE, "3.8.0", NEWEST)]


@pytest.fixture(scope="module", params=[SHORT, *LONG])
def kernels(request) -> list[dict]:
    number, *forms = request.param.split(", ")
    folder = Path(__file__).parents[3] / f".venv/triton-{number}"
    found = kernels_of("compile_hopper.py", *("short" for _ in forms), packages=None if number == IN_USE else folder)
    assert {kernel["triton"] for kernel in found} == {number}
    return found


def is_forward(kernel: dict) -> bool:
    return kernel["kernel"] == "attention_forward_hopper"


def consumers(kernel: dict) -> int:
    """Warpgroups that multiply."""
    return 3 if is_forward(kernel) and kernel["head_dim"] == 64 else 2


def loops_of_tiles(kernel: dict) -> list[dict]:
    """Those over tiles, of each consumer; of the forward pass with a mask and without."""
    return kernel["loops"][: consumers(kernel) * (2 if is_forward(kernel) else 1)]


def test_everything_was_compiled(kernels, request):
    names = [kernel["kernel"] for kernel in kernels]
    expected = [4, 4, 1] if request.node.callspec.params["kernels"] == SHORT else [7, 11, 5]
    assert [names.count(name) for name in KERNELS] == expected
    for kernel in kernels:
        assert len(loops_of_tiles(kernel)) == consumers(kernel) * (2 if is_forward(kernel) else 1), kernel


def test_programs_fit(kernels):
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY["sm_90"], kernel
        # a thread's of all 12 or 16 warps, redistributed: 240 or 160 to the consumers, 24 to the others
        assert kernel["registers"] == {2: 168, 3: 128}[consumers(kernel)], kernel


def test_the_loops_of_the_forward_pass_spill_nothing(kernels):
    for kernel in filter(is_forward, kernels):
        for number, loop in enumerate(loops_of_tiles(kernel)):
            # with a mask three consumers do under the newest Triton; of two that merge into float32, addresses
            merging = (9 if kernel["head_dim"] == 256 else 1) if kernel["blocks"] else 0
            most = {3: 0 if number % 2 else 19, 2: merging}[consumers(kernel)]
            assert loop["spills"] <= (most if kernel["triton"] == NEWEST else 0), kernel


def test_sums_are_scaled_where_a_warp_has_to(kernels):
    """A branch around the products; without it each tile takes 32, 64 or 128 more instructions of a thread."""
    for kernel in filter(is_forward, kernels):
        is_always = kernel["blocks"] and kernel["head_dim"] == 256
        votes = [loop["votes"] for loop in loops_of_tiles(kernel)]
        assert votes == [0 if is_always else 1] * 2 * consumers(kernel), kernel


def test_scores_are_hidden_by_bits(kernels):
    """Two comparisons a score are 128 of a tile and a thread, and with them 60 more selections."""
    for kernel in filter(is_forward, kernels):
        assert all(loop["comparisons"] <= 8 for loop in loops_of_tiles(kernel)), kernel


def test_the_loops_of_the_backward_pass_spill_nothing(kernels):
    """dK and dV take half of the registers: addresses that are the same for a whole loop are computed in it."""
    for kernel in kernels:
        if not is_forward(kernel):
            assert all(loop["spills"] == 0 for loop in loops_of_tiles(kernel)), kernel


def test_gradients_go_to_other_gpus_16_bytes_at_a_time(kernels):
    """By 4 bytes at a time a backward pass at 8k tokens a GPU took half as long again."""
    sending = [kernel for kernel in kernels if not is_forward(kernel) and kernel["blocks"]]
    assert sending
    assert all(kernel["stores"] == [16] for kernel in sending), sending


def test_the_softmax_is_between_the_two_waits(kernels):
    """While it runs, one group of products is pending: P V of the tile before, or dO V^T. Of three consumers none is:
    while one takes its softmax the others multiply. What sums shrink by, of two rows, the newest Triton takes later."""
    for kernel in kernels:
        for loop in loops_of_tiles(kernel):
            found = loop["exponentials"]
            late = 0 if consumers(kernel) == 3 or kernel["triton"] != NEWEST else found.get("0", 0)
            assert late <= 4, kernel
            assert found.keys() - ({"0"} if late else set()) == {"0" if consumers(kernel) == 3 else "1"}, kernel


def test_products_are_not_serialized_and_keep_their_operands(kernels):
    for kernel in kernels:
        assert kernel["warnings"] == [], kernel
        assert all(loop["overwritten"] == [] for loop in kernel["loops"]), kernel
