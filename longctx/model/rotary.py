"""Rotary frequencies and their scalings to longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longctx.config import RotaryConfig, RotaryScaling


def frequencies(rotary: RotaryConfig, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Radians a token of each pair of dimensions: float64, (head_dim / 2,)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    base = stretched_theta(rotary, head_dim) ** -exponent
    if rotary.scaling == RotaryScaling.linear:  # Chen et al. 2023, position interpolation
        return base / rotary.factor
    if rotary.scaling == RotaryScaling.llama3:
        return _llama3(base, rotary)
    if rotary.scaling == RotaryScaling.yarn:
        return _yarn(base, rotary, head_dim)
    return base


def stretched_theta(rotary: RotaryConfig, head_dim: int) -> float:
    """Theta, or the larger one of scalings that are nothing else (bloc97 2023, ntk: only slow dimensions stretch)."""
    if rotary.scaling == RotaryScaling.ntk:
        return rotary.theta * rotary.factor ** (head_dim / (head_dim - 2))
    if rotary.scaling == RotaryScaling.dynamic and rotary.longest > rotary.original_length:  # emozilla 2023
        stretch = rotary.factor * rotary.longest / rotary.original_length - (rotary.factor - 1)
        return rotary.theta * stretch ** (head_dim / (head_dim - 2))
    return rotary.theta


def _llama3(base: Tensor, rotary: RotaryConfig) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended. (Llama 3.1, 2024)"""
    turns = rotary.original_length * base / (2 * math.pi)  # within the original context
    low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return base * keep + base / rotary.factor * (1 - keep)


def _yarn(base: Tensor, rotary: RotaryConfig, head_dim: int) -> Tensor:
    """A ramp over the dimensions from kept to divided by `factor`. (Peng et al. 2023, YaRN, section 3.2)"""

    def dimension_turning(turns: float) -> float:
        return head_dim * math.log(rotary.original_length / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low = max(math.floor(dimension_turning(rotary.beta_fast)), 0)
    high = min(math.ceil(dimension_turning(rotary.beta_slow)), head_dim - 1)
    dimension = torch.arange(len(base), dtype=base.dtype, device=base.device)
    keep = 1 - ((dimension - low) / max(high - low, 0.001)).clamp(0, 1)
    return base * keep + base / rotary.factor * (1 - keep)


def attention_factor(rotary: RotaryConfig) -> float:
    """What cos and sin are multiplied by: YaRN's temperature, 1 for all else. (YaRN, section 3.3)"""
    if rotary.scaling == RotaryScaling.yarn and rotary.attention_factor is not None:
        return rotary.attention_factor
    if rotary.scaling == RotaryScaling.yarn and rotary.factor > 1:
        return 0.1 * math.log(rotary.factor) + 1.0
    return 1.0


def cos_sin(positions: Tensor, rotary: RotaryConfig, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at `positions` (batch, sequence): each (batch, sequence, head_dim / 2).

    The angles are float64: at position 1M a float32 angle is off by 0.06 radians.
    """
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies(rotary, head_dim, positions.device)
    factor = attention_factor(rotary)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
