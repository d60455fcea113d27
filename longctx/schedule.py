"""The learning rate, as a pure function of the step."""

from __future__ import annotations

import math

from longctx.config import OptimConfig, Schedule, warmup_steps


def schedule(step: int, optim: OptimConfig) -> float:
    """The learning rate of step 0, 1, ... as a fraction of its top.

    A linear warm-up, then: cosine to the final fraction (Loshchilov and Hutter 2017), or wsd: constant, with a linear
    fall over the last `decay_fraction` of the steps (Hu et al. 2024, MiniCPM), or constant.
    """
    warmup = warmup_steps(optim)
    if step < warmup:
        return (step + 1) / warmup
    final = optim.final_lr_fraction
    if optim.schedule == Schedule.constant:
        return 1.0
    if optim.schedule == Schedule.cosine:
        progress = (step - warmup) / max(1, optim.steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    start = decay_start(optim)
    progress = (step - start) / max(1, optim.steps - start)
    return 1.0 - (1 - final) * min(1.0, max(0.0, progress))


def decay_start(optim: OptimConfig) -> int:
    """The step from which on wsd lets the rate fall, after the warm-up."""
    return max(warmup_steps(optim), optim.steps - round(optim.decay_fraction * optim.steps))
