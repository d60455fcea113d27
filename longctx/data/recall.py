"""Synthetic sequences that can only be predicted by using the context, for training and for looking at a model.

Key-value recall (`data=recall`): pairs of a key and its value. Each sequence draws a new value for every key, so at a
key's first occurrence its value costs log(values) nats, and every later one can be read off the context. Only values
are targets; the loss by position falls with the share of keys that were seen before.

Copies: random ids, in which runs of 32 come back after 32, 64, 128, ... tokens. Any language model can be asked: once
the first tokens of a run are seen again, the others follow from the context (Olsson et al. 2022, In-context Learning
and Induction Heads).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from longctx.data.packing import IGNORE_INDEX, Sequence, cut_attention

RUN = 32  # tokens that come back
CUE = 8  # of them, that only tell which run it is


class Probe(NamedTuple):
    """A sequence, and for each target how many tokens before it the same one can be read off; 0: nowhere."""

    sequence: Sequence
    distance: np.ndarray  # int64, (sequence_length,)


def recall_sequence(index: int, length: int, keys: int, values: int, seed: int) -> Sequence:
    """Sequence number `index`, a pure function of its arguments: ids 0..keys-1 are keys, the rest values."""
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    value_of = keys + random.integers(values, size=keys)
    pairs = random.integers(keys, size=length // 2 + 1)
    stream = np.stack((pairs, value_of[pairs]), axis=1).reshape(-1)[: length + 1]
    position = np.arange(length)
    targets = np.where(position % 2 == 0, stream[1:], IGNORE_INDEX)
    return Sequence(stream[:-1], targets, position, np.zeros_like(position))


def recall_probe(sequence: Sequence) -> Probe:
    """Of a sequence of `recall_sequence`: distances to the last time a value's key was seen."""
    keys = np.flatnonzero(sequence.targets != IGNORE_INDEX)
    order = np.lexsort((keys, sequence.tokens[keys]))  # by key, then by place
    is_again = np.diff(sequence.tokens[keys[order]], prepend=-1) == 0
    distance = np.zeros_like(sequence.positions)
    distance[keys[order]] = np.where(is_again, np.diff(keys[order], prepend=0), 0)
    return Probe(sequence, distance)


def copies_probe(index: int, length: int, vocab_size: int, seed: int) -> Probe:
    """Probe number `index`, a pure function of its arguments: one run for each distance that finds room."""
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    stream = random.integers(vocab_size, size=length + 1)
    targets, distance = np.full(length, IGNORE_INDEX), np.zeros(length, np.int64)
    is_taken = np.zeros(length + 1, bool)
    longest = (length + 1 - RUN).bit_length() - 1 if length + 1 >= 2 * RUN else 0
    for far in (2**power for power in range(longest, RUN.bit_length() - 2, -1)):
        first = _free_place(random, is_taken, far)
        if first is None:
            continue
        again = first + far
        stream[again : again + RUN] = stream[first : first + RUN]
        is_taken[first : first + RUN] = is_taken[again : again + RUN] = True
        asked = slice(again + CUE - 1, again + RUN - 1)
        targets[asked], distance[asked] = stream[again + CUE : again + RUN], far
    position = np.arange(length)
    return Probe(Sequence(stream[:-1], targets, position, np.zeros_like(position)), distance)


def copies_sequence(index: int, length: int, vocab_size: int, seed: int, span: int | None = None) -> Sequence:
    """Sequence number `index` to train on, a pure function of its arguments: half of it comes back from earlier.

    Stretches of 16 to 64 tokens, new ones and copies by turns; a copy's distance is as often near as far, by octaves.
    Targets are the copies' tokens but for the first `CUE` of each, which nothing tells. Attention is cut at every
    multiple of `span` tokens, and what stands before a cut is never asked for after it.
    """
    span = span or length + 1
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    stream = random.integers(vocab_size, size=length + 1)
    targets = np.full(length + 1, IGNORE_INDEX)
    sizes = random.integers(16, 65, size=length // 16 + 1)
    ends = np.minimum(np.cumsum(sizes), length + 1)
    for first, end, far in zip(ends[:-1], ends[1:], random.random(len(sizes)), strict=False):
        size, seen = int(end - first), int(first % span)
        if random.random() < 0.5 or seen < size or size <= CUE or seen + size > span:
            continue
        distance = int(size * (seen / size) ** far)
        stream[first:end] = stream[first - distance : end - distance]
        targets[first + CUE : end] = stream[first + CUE : end]
    position = np.arange(length)
    return cut_attention(Sequence(stream[:-1], targets[1:], position, np.zeros_like(position)), span)


def _free_place(random: np.random.Generator, is_taken: np.ndarray, far: int) -> int | None:
    """Where a run may begin that comes back `far` tokens later; a place is drawn up to a hundred times."""
    for first in random.integers(len(is_taken) - far - RUN + 1, size=100):
        if not (is_taken[first : first + RUN].any() or is_taken[first + far : first + far + RUN].any()):
            return int(first)
    return None
