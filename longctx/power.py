"""Power that the GPU of this rank draws, as NVIDIA's management library (NVML) measures it."""

from __future__ import annotations

import pynvml
import torch


class PowerMeter:
    """Asks the driver, which takes a fifth of a millisecond: to be read while the GPU is busy."""

    def __init__(self, device: torch.device) -> None:
        self.handle = None
        if device.type == "cuda" and torch.version.cuda:
            try:
                pynvml.nvmlInit()
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            except pynvml.NVMLError:  # a machine that hides it
                return

    def watts(self) -> float | None:
        """Mean power over the last second on GPUs since Ampere; None where nothing is measured."""
        if self.handle is None:
            return None
        try:
            return pynvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3
        except pynvml.NVMLError:
            return None
