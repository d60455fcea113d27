"""Where the supported releases of torch differ; docs/versions.md lists what was tried."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule


def parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's groups of parameters that are gathered together: one a module in torch 2.11, several since."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
