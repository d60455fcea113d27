"""Activation offload: what blocks keep for the backward pass waits in host memory.

What a block keeps leaves while the next one computes, and comes back, one block ahead, while the backward pass is at
the block after. Each layer has its place in host memory for the whole run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.host_memory import HostCopies, host_tensor


class ActivationOffload:
    """What the first `layers` blocks of a rank's model keep."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.layers, self.device, self.copies = layers, device, HostCopies(device)
        self.places: dict[int, list[Tensor]] = {}  # by layer
        self.kept: list[tuple[int, list[Tensor], torch.cuda.Event | None]] = []  # layers, where, and when they are
        self.leaving: tuple[Sequence[Tensor], torch.cuda.Event | None] | None = None
        self.coming: dict[int, tuple[list[Tensor], torch.cuda.Event | None]] = {}

    def put(self, layer: int, tensors: Sequence[Tensor]) -> None:
        """Begins to copy what `layer` keeps; nobody writes to it any more, and who has no other use for it drops it."""
        self.settle()
        if self.kept and self.kept[-1][0] >= layer:  # of a forward pass whose backward pass never came
            self.kept, self.coming = [], {}
        event, places = None, self._places_for(layer, tensors)
        for tensor, place in zip(tensors, places, strict=True):
            event = self.copies.to_host(tensor, place)
        self.leaving = tensors, event
        self.kept.append((layer, places, event))

    def get(self, layer: int) -> list[Tensor]:
        """What was put last, of `layer`, on the device."""
        number, *_ = self.kept[-1]
        assert number == layer, f"layer {layer} asks for what it keeps before layer {number} does"
        self.prefetch()
        tensors, event = self.coming.pop(layer)
        self.kept.pop()
        self.copies.wait(event)
        self.prefetch()
        return tensors

    def prefetch(self) -> None:
        """Begins to bring back what will be asked for next."""
        if not self.kept or self.kept[-1][0] in self.coming:
            return
        layer, places, is_there = self.kept[-1]
        tensors, event = [torch.empty(place.shape, dtype=place.dtype, device=self.device) for place in places], None
        for place, tensor in zip(places, tensors, strict=True):
            event = self.copies.to_device(place, tensor, is_there)
        self.coming[layer] = tensors, event

    def settle(self) -> None:
        """Lets go of what has left, which a layer later it has."""
        if self.leaving is not None:
            self.copies.wait(self.leaving[1])
            self.leaving = None

    def _places_for(self, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The layer's host memory, made anew where it is too small: before the first step and after short sequences."""
        made = self.places.get(layer, [])
        if len(made) != len(tensors) or any(p.nbytes < t.nbytes for p, t in zip(made, tensors, strict=True)):
            self.places.pop(layer, None)
            made = self.places[layer] = [host_tensor([t.nbytes], torch.uint8, self.device) for t in tensors]
        return [
            place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for place, tensor in zip(made, tensors, strict=True)
        ]
