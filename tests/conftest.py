"""Tests marked `gpu` run where there is a GPU; elsewhere they are not collected, their CPU twins are."""

from __future__ import annotations

import torch


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
