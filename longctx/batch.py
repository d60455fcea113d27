"""A batch of whole sequences, as it is read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Sequences side by side; each tensor int64, (batch, sequence_length), on the CPU."""

    tokens: Tensor
    targets: Tensor  # the token that follows; -100 where none of the document does
    positions: Tensor  # inside the document
    document_start: Tensor  # index of the first token of the document
