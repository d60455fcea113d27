"""Derivatives in forward mode: refused by every op that has kernels, where torch's custom ops give 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from longctx import ops
from longctx.kernels.swiglu import swiglu_linear
from precision import DEVICE, random

WIDTH = 32
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: ops.attention(*(3 * [x.view(1, 4, 2, 16)]), ops.KeyIntervals.causal(4))[0],
    "flash_attn_func": lambda x: ops.flash_attn_func(*(3 * [x.view(1, 4, 2, 16)])),
    "rms_norm": lambda x: ops.rms_norm(x, random(WIDTH), implementation="triton"),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x, random(WIDTH), random(WIDTH), implementation="triton")[0],
    "swiglu": lambda x: ops.swiglu(x, implementation="triton"),
    "swiglu_linear": lambda x: swiglu_linear(x, x, random(8, WIDTH), implementation="triton"),
    "softmax": lambda x: ops.softmax(x, implementation="triton"),
    "apply_rotary": lambda x: ops.apply_rotary(
        x.view(1, 4, 2, 16), random(1, 4, 8), random(1, 4, 8), implementation="triton"
    ),
    "cross_entropy": lambda x: ops.cross_entropy(x, torch.zeros(4, dtype=torch.long, device=DEVICE)),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x, random(8, WIDTH), torch.zeros(4, dtype=torch.long, device=DEVICE)
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_a_tangent_is_refused(op):
    x = random(4, WIDTH)
    with pytest.raises(NotImplementedError, match="forward mode.*use reverse mode"):
        torch.func.jvp(OPS[op], (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        OPS[op](forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():
        assert OPS[op](x).isfinite().all()  # another tensor's forward mode is none of the op's
