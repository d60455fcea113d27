"""Tiles that kernels visit, beside the properties in test_hopper.py."""

from __future__ import annotations

import torch

from longctx.kernels.attention import tiles
from longctx.kernels.attention.key_intervals import KeyIntervals


def test_no_tile_of_rows_is_masked_in_vain():
    """Where a block of keys begins with the rows' first key, as in a causal mask and in documents."""
    causal = KeyIntervals.causal(16).with_bounds("cpu")
    documents = KeyIntervals.documents(torch.tensor([[0] * 8 + [8] * 8]))
    assert tiles.row_tiles(causal, 4, 4)[0].tolist() == [[0, 1, 4, 4], [1, 2, 4, 4], [2, 3, 4, 4], [3, 4, 4, 4]]
    assert tiles.row_tiles(documents, 4, 4)[0].tolist() == [[0, 1, 2, 2], [1, 2, 2, 2], [2, 3, 4, 4], [3, 4, 4, 4]]
