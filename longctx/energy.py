"""Energy that the GPU of this rank takes, as NVIDIA's management library (NVML) counts it."""

from __future__ import annotations

import pynvml
import torch


class EnergyMeter:
    """Reads the counter of the GPU, which grows by millijoules since the driver was loaded."""

    def __init__(self, device: torch.device) -> None:
        self.handle = None
        if device.type == "cuda" and torch.version.cuda:
            uuid = torch.cuda.get_device_properties(device).uuid
            try:
                pynvml.nvmlInit()
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
            except pynvml.NVMLError:  # a GPU that has no counter, or a machine that hides it
                self.handle = None

    def joules(self) -> float | None:
        """The counter now; None where there is none."""
        if self.handle is None:
            return None
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        except pynvml.NVMLError:
            return None
