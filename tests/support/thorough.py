"""How often random tests draw: all of their examples on GPUs and in `make test-all`, a quarter of them elsewhere."""

from __future__ import annotations

import os

import torch


def examples(most: int) -> int:
    """So many examples of a random test."""
    is_thorough = torch.cuda.is_available() or "LONGCTX_THOROUGH" in os.environ
    return most if is_thorough else max(8, most // 4)
