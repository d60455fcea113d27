"""Activation offload: what blocks keep for the backward pass waits in host memory.

What a block keeps leaves while the next one computes, and comes back, one block ahead, while the backward pass is at
the block after. Each layer has its place in host memory for the whole run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.host_memory import HostCopies, host_tensor


@dataclass(eq=False)
class Kept:
    """What one block keeps of one forward pass."""

    layer: int
    places: list[Tensor]  # in host memory
    is_there: torch.cuda.Event | None  # when it is
    back: list[Tensor] | None = None  # on the device, from when on it is asked for
    is_back: torch.cuda.Event | None = None


class ActivationOffload:
    """What the first `layers` blocks of a rank's model keep."""

    def __init__(self, layers: int, device: torch.device) -> None:
        assert layers >= 0, f"{layers} layers: see `remedies.with_layers_chosen`"
        self.layers, self.device, self.copies = layers, device, HostCopies(device)
        self.places: dict[int, list[Tensor]] = {}  # by layer
        self.kept: list[Kept] = []
        self.leaving: tuple[Sequence[Tensor], torch.cuda.Event | None] | None = None

    def put(self, layer: int, tensors: Sequence[Tensor]) -> Kept:
        """Begins to copy what `layer` keeps; nobody writes to it any more, and who has no other use for it drops it."""
        self.settle()
        if self.kept and self.kept[-1].layer >= layer:  # of a forward pass whose backward pass never came
            for left in self.kept:
                self.copies.wait(left.is_back)
            self.kept = []
        event, places = None, self._places_for(layer, tensors)
        for tensor, place in zip(tensors, places, strict=True):
            event = self.copies.to_host(tensor, place)
        self.leaving = tensors, event
        self.kept.append(Kept(layer, places, event))
        return self.kept[-1]

    def get(self, kept: Kept) -> list[Tensor]:
        """What was put, on the device. Raises `RuntimeError` unless it is what was put last and not asked for yet."""
        if not self.kept or self.kept[-1] is not kept:
            raise RuntimeError(
                f"layer {kept.layer}: what it keeps was written over by a later forward pass; run each backward pass "
                "before the next forward pass, or set parallel.offload=0"
            )
        self.prefetch()
        self.kept.pop()
        self.copies.wait(kept.is_back)
        self.prefetch()
        assert kept.back is not None
        tensors, kept.back = kept.back, None
        return tensors

    def prefetch(self) -> None:
        """Begins to bring back what will be asked for next."""
        if not self.kept or self.kept[-1].back is not None:
            return
        kept = self.kept[-1]
        kept.back = [torch.empty(place.shape, dtype=place.dtype, device=self.device) for place in kept.places]
        for place, tensor in zip(kept.places, kept.back, strict=True):
            kept.is_back = self.copies.to_device(place, tensor, kept.is_there)

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
