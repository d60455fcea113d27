"""What a cross entropy does besides taking the logarithm."""

from __future__ import annotations

import math
from typing import NamedTuple


class LossOptions(NamedTuple):
    """loss = lse - (1 - label_smoothing) * x[target] - label_smoothing * mean(x) + z_loss * lse^2, in nats.

    x: the logits, or softcap * tanh(logits / softcap) where softcap is not 0; lse = log(sum(exp(x))). The loss of a
    token whose target is `ignore_index` is 0, and NaN for any other target outside the vocabulary.
    (Szegedy et al. 2016, label smoothing; Chowdhery et al. 2022, z-loss; Gemma Team 2024, softcap)
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0

    def check(self) -> list[str]:
        """What is wrong with the options."""
        problems = []
        if not 0 <= self.label_smoothing <= 1:
            problems.append(f"label_smoothing={self.label_smoothing}: must be 0 to 1")
        if not 0 <= self.z_loss < math.inf:
            problems.append(f"z_loss={self.z_loss}: must be finite, 0 or more")
        if not 0 <= self.softcap < math.inf:
            problems.append(f"softcap={self.softcap}: must be finite and above 0, or None for none")
        return problems


PLAIN = LossOptions()
LOSS_SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap, str implementation"
