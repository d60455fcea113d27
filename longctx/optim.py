"""Optimizers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longctx.config import OptimConfig, Optimizer
from longctx.muon import Muon
from longctx.offloaded_adamw import OffloadedAdamW
from longctx.schedule import schedule


class Optimizers:
    """AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the rest."""

    def __init__(
        self, model: nn.Module, optim: OptimConfig, compute: torch.dtype = torch.float32, is_offloaded: bool = False
    ) -> None:  # fmt: skip
        """compute: the dtype that Muon's iteration is computed in; is_offloaded: AdamW's moments in host memory."""
        self.config = optim
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        is_muon = optim.optimizer == Optimizer.muon
        muon = [p for p, name in self.names.items() if is_muon and p.ndim == 2 and name.startswith("blocks.")]
        chosen = set(muon)
        rest = [p for p in self.names if p not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = OffloadedAdamW if is_offloaded else partial(torch.optim.AdamW, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [
            adamw([g for g in groups if g["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        ]
        if muon:
            self.optimizers.append(Muon(muon, optim.muon_lr, optim.muon_momentum, optim.weight_decay, compute))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["top_lr"] = group["lr"]

    def step(self, step: int) -> None:
        """Updates the parameters with the rates of step number `step`."""
        fraction = schedule(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * fraction
            optimizer.step()

    def rates(self, step: int) -> dict[str, float]:
        """The learning rates of step number `step`, as metrics."""
        fraction = schedule(step, self.config)
        rates = {"optim/lr": self.config.lr * fraction}
        if self.config.optimizer == Optimizer.muon:
            rates["optim/muon_lr"] = self.config.muon_lr * fraction
        return rates

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The tensors a checkpoint keeps, by `<state>.<parameter>`; created if no step was taken yet."""
        if not self.optimizers[0].state:
            self._create_state()
        return {
            f"{key}.{self.names[parameter]}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if key != "step"
        }

    @property
    def updates(self) -> int:
        """Steps that have changed the parameters."""
        states = self.optimizers[0].state.values()
        return next((int(state["step"]) for state in states), 0)

    @updates.setter
    def updates(self, count: int) -> None:
        self.state()
        for state in self.optimizers[0].state.values():
            state["step"].fill_(count)

    def _create_state(self) -> None:
        """A step of AdamW with zero gradients and a rate of zero: it makes the state and changes no parameter."""
        adamw = self.optimizers[0]
        if isinstance(adamw, OffloadedAdamW):
            adamw.create_state()
            return
        for group in adamw.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        adamw.step()
        self.zero_grad()
        for state in adamw.state.values():
            state["step"].zero_()


def global_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, over all ranks that share them."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
