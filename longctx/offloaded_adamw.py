"""AdamW whose moments stay in host memory and pass through the device piece by piece in each update.

The same kernel as torch's fused AdamW, on the same numbers: the same bits. While a piece is updated the next one comes
and the one before leaves. (Ren et al. 2021, ZeRO-Offload, keeps the state there too, and updates it on the CPU)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from longctx.host_memory import HostCopies, host_tensor
from longctx.local_part import local_of, with_local
from longctx.plan import MOMENTS_IN_FLIGHT, MOMENTS_PIECE

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Piece(NamedTuple):
    """Some numbers of a parameter, flat."""

    group: dict[str, Any]
    step: Tensor  # of the parameter
    is_last: bool  # of the parameter
    parameter: Tensor
    gradient: Tensor
    moments: list[Tensor]  # in host memory


class OffloadedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with `exp_avg` and `exp_avg_sq` in host memory; parameters may be DTensors."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.device = local_of(self.param_groups[0]["params"][0]).device
        self.copies = HostCopies(self.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all parameters that have gradients."""
        self.create_state()
        pieces = list(self._pieces())
        size = max((piece.parameter.numel() for piece in pieces), default=0)
        buffers = torch.empty((MOMENTS_IN_FLIGHT, len(MOMENTS), size), device=self.device)
        # of each buffer: when its moments are in host memory again
        left: list[torch.cuda.Event | None] = [None] * MOMENTS_IN_FLIGHT

        def fetch(number: int) -> tuple[list[Tensor], list[torch.cuda.Event | None]]:
            buffer, piece = number % MOMENTS_IN_FLIGHT, pieces[number]
            moments = [row[: piece.parameter.numel()] for row in buffers[buffer]]
            pairs = zip(piece.moments, moments, strict=True)
            return moments, [self.copies.to_device(host, here, left[buffer]) for host, here in pairs]

        following = fetch(0) if pieces else None
        for number, piece in enumerate(pieces):
            assert following is not None
            moments, arrived = following
            if number + 1 < len(pieces):
                following = fetch(number + 1)
            for event in arrived:
                self.copies.wait(event)
            _update(piece, moments)
            for here, host in zip(moments, piece.moments, strict=True):
                left[number % MOMENTS_IN_FLIGHT] = self.copies.to_host(here, host)
        for event in left:
            self.copies.wait(event)

    def _pieces(self) -> Iterator[_Piece]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                local, gradient = (local_of(t).view(-1) for t in (parameter, parameter.grad))
                moments = [local_of(state[name]).view(-1) for name in MOMENTS]
                flat = [t.split(MOMENTS_PIECE) for t in (local, gradient, *moments)]
                for number, (of_parameter, of_gradient, *of_moments) in enumerate(zip(*flat, strict=True), 1):
                    is_last = number == len(flat[0])
                    yield _Piece(group, state["step"], is_last, of_parameter, of_gradient, of_moments)

    def create_state(self) -> None:
        """Makes the moments of all parameters, zeros, where there are none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                local, state = local_of(parameter), self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=self.device)
                    for name in MOMENTS:
                        state[name] = with_local(parameter, host_tensor(local.shape, local.dtype, self.device))


def _update(piece: _Piece, moments: list[Tensor]) -> None:
    group, (beta1, beta2) = piece.group, piece.group["betas"]
    step = piece.step if piece.is_last else piece.step.clone()  # which adamw counts up
    adamw(
        [piece.parameter], [piece.gradient], [moments[0]], [moments[1]], [], [step], fused=True, amsgrad=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip
