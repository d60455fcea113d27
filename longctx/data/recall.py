"""Synthetic key-value recall: a stream that can only be predicted by using the context.

A sequence is pairs of a key and its value. Each sequence draws a new value for every key, so at a key's first
occurrence its value costs log(values) nats, and every later one can be read off the context. Only values are targets;
the loss by position falls with the share of keys that were seen before.
"""

from __future__ import annotations

import numpy as np

from longctx.data.packing import IGNORE_INDEX, Sequence


def recall_sequence(index: int, length: int, keys: int, values: int, seed: int) -> Sequence:
    """Sequence number `index`, a pure function of its arguments: ids 0..keys-1 are keys, the rest values."""
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    value_of = keys + random.integers(values, size=keys)
    pairs = random.integers(keys, size=length // 2 + 1)
    stream = np.stack((pairs, value_of[pairs]), axis=1).reshape(-1)[: length + 1]
    position = np.arange(length)
    targets = np.where(position % 2 == 0, stream[1:], IGNORE_INDEX)
    return Sequence(stream[:-1], targets, position, np.zeros_like(position))
