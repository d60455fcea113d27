"""What the oldest and the newest Triton make of the Hopper kernels.

If a change costs the overlap of products and softmax, this fails.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from compiled import SHARED_MEMORY, kernels_of

OLDEST, NEWEST = "3.6.0", "3.9.0"  # of torch 2.11 and 2.15; `make` puts them beside the installed one
IN_USE = version("triton")
SHORT = f"{NEWEST}, one of each form"
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("3.8.0", IN_USE, NEWEST)]


@pytest.fixture(scope="module", params=[OLDEST, SHORT, *LONG])
def kernels(request) -> list[dict]:
    number, *forms = request.param.split(", ")
    folder = Path(__file__).parents[3] / f".venv/triton-{number}"
    found = kernels_of("compile_hopper.py", *("short" for _ in forms), packages=None if number == IN_USE else folder)
    assert {kernel["triton"] for kernel in found} == {number}
    return found


def test_everything_was_compiled(kernels, request):
    names = [kernel["kernel"] for kernel in kernels]
    expected = [5, 4] if request.node.callspec.params["kernels"] == SHORT else [6, 9]
    assert [names.count(name) for name in ("attention_forward_hopper", "attention_backward_hopper")] == expected


def test_programs_fit(kernels):
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY["sm_90"], kernel
        assert kernel["registers"] == 168, kernel  # 168 x 384 threads, redistributed: 240 a consumer, 24 the others


def test_the_loops_of_the_forward_pass_spill_nothing(kernels):
    for kernel in kernels:
        if kernel["kernel"] == "attention_forward_hopper":
            assert len(kernel["loops"]) >= 4, kernel  # of two consumers, with and without a mask
            for loop in kernel["loops"][:4]:
                # merging into float32: an address
                assert loop["spills"] <= (1 if kernel["blocks"] and kernel["triton"] == NEWEST else 0), kernel


def test_the_loops_of_the_backward_pass_spill_addresses_alone(kernels):
    """dK and dV take half of the registers; what else spills are numbers that are the same for a whole loop."""
    for kernel in kernels:
        if kernel["kernel"] == "attention_backward_hopper":
            assert len(kernel["loops"]) >= 2, kernel  # of two consumers
            most = {"3.8.0": 34, NEWEST: 32}.get(kernel["triton"], 24)
            assert all(loop["spills"] <= most for loop in kernel["loops"][:2]), kernel


def test_gradients_go_to_other_gpus_16_bytes_at_a_time(kernels):
    """By 4 bytes at a time a backward pass at 8k tokens a GPU took half as long again."""
    sending = [kernel for kernel in kernels if kernel["kernel"] == "attention_backward_hopper" and kernel["blocks"]]
    assert sending
    assert all(kernel["stores"] == [16] for kernel in sending), sending


def test_the_softmax_is_between_the_two_waits(kernels):
    """While it runs, one group of products is pending: P V of the tile before, or dO V^T."""
    for kernel in kernels:
        for loop in kernel["loops"][: 4 if kernel["kernel"] == "attention_forward_hopper" else 2]:
            assert loop["exponentials"].keys() == {"1"}, kernel


def test_products_are_not_serialized_and_keep_their_operands(kernels):
    for kernel in kernels:
        assert kernel["warnings"] == [], kernel
        assert all(loop["overwritten"] == [] for loop in kernel["loops"]), kernel
