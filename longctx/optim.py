"""Optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from longctx.config import OptimConfig, Optimizer
from longctx.schedule import schedule


class Optimizers:
    """AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the rest."""

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
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
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [g for g in groups if g["params"]],
                lr=optim.lr,
                betas=(optim.beta1, optim.beta2),
                eps=optim.eps,
                fused=True,
            )
        ]
        if muon:
            self.optimizers.append(
                torch.optim.Muon(muon, lr=optim.muon_lr, momentum=optim.muon_momentum, weight_decay=optim.weight_decay)
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["top_lr"] = group["lr"]

    def step(self, step: int) -> None:
        """Updates the parameters with the rates of step number `step`."""
        fraction = schedule(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * fraction
            if isinstance(optimizer, torch.optim.Muon):
                _gather_gradients(optimizer)
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
        if not all(optimizer.state for optimizer in self.optimizers):
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
        """A step with zero gradients and a rate of zero: it makes the state and changes no parameter."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            if isinstance(optimizer, torch.optim.Muon):
                _gather_gradients(optimizer)
            optimizer.step()
        self.zero_grad()
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for key, value in state.items():
                    if key == "step":
                        value.zero_()


def _gather_gradients(muon: torch.optim.Muon) -> None:
    """Makes the gradients whole on every rank: Muon's iteration multiplies whole matrices, some fifteen times each.

    Gathered once, every product is local; the momentum is then whole on every rank too.
    """
    for group in muon.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter.grad, DTensor):
                replicated = [Replicate()] * parameter.grad.device_mesh.ndim
                parameter.grad = parameter.grad.redistribute(placements=replicated)


def global_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, over all ranks that share them."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
