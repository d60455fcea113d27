"""Derivatives in forward mode, which the ops do not have."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises NotImplementedError if one of an op's inputs has a tangent: torch would go on with a derivative of 0.

    So it is with every `torch.library.custom_op`, in `torch.autograd.forward_ad` as in `torch.func.jvp`; and with these
    ops still where torch.compile traces them, and for tangents of what a backward pass is given.
    """
    if torch.compiler.is_compiling():  # which cannot ask
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "longctx's ops have no derivatives in forward mode (torch.func.jvp, torch.autograd.forward_ad): "
            "use reverse mode (backward, torch.autograd.grad), or plain torch in their place"
        )
