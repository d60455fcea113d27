"""Gradients of keys and values that other ranks have given: the sum of an inbox, by torch and by Triton."""

from __future__ import annotations

import pytest
import torch

from longctx.kernels.attention.key_gradients import add_up
from precision import DEVICE


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), (5, 128)], ids=["24 wide", "640 wide"])
def test_what_was_given_is_added_up(implementation, is_added, heads, head_dim):
    """And nothing else: where nobody gave, an inbox holds what was there before, such as NaN."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(5, 2, 37, 2, heads, head_dim, generator=generator, dtype=torch.float64)
    givers = torch.randint(32, (37,), generator=generator)
    has_given = (givers >> torch.arange(5)[:, None] & 1).bool()[:, None, :, None, None, None]
    before = torch.randn(2, 2, 37, heads, head_dim, generator=generator)
    expected = (given * has_given).sum(0).unbind(2)
    inbox = torch.where(has_given, given, torch.nan).float().to(DEVICE)
    dk, dv = before.clone().to(DEVICE).unbind(0)
    add_up(inbox, givers.to(DEVICE), dk, dv, is_added, implementation)
    for found, sums, first in zip((dk, dv), expected, before, strict=True):
        wanted = sums + first if is_added else sums
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-6, atol=1e-6)


def test_sums_are_rounded_once():
    inbox = torch.tensor([1.0, 2.0**-8, 2.0**-8]).view(3, 1, 1, 1, 1, 1).expand(3, 1, 1, 2, 1, 16).contiguous()
    for implementation in ("reference", "triton"):
        dk, dv = torch.zeros(2, 1, 1, 1, 16, dtype=torch.float16, device=DEVICE).unbind(0)
        add_up(inbox.to(DEVICE), torch.tensor([7], device=DEVICE), dk, dv, False, implementation)
        assert dk.unique().tolist() == dv.unique().tolist() == [1 + 2.0**-7]
