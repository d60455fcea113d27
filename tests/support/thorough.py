"""How often random tests draw: all of their examples on GPUs and in `make test-all`, a quarter of them elsewhere."""

from __future__ import annotations

import os

import torch

IS_THOROUGH = torch.cuda.is_available() or "LONGCTX_THOROUGH" in os.environ


def examples(most: int) -> int:
    """So many examples of a random test."""
    return most if IS_THOROUGH else max(8, most // 4)
