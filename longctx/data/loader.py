"""Which sequence comes when: a pure function of the seed and the number of sequences consumed so far.

That number is the loader's whole state, so a run resumes with the same sequences at any number of data ranks, none
lost and none repeated.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch

from longctx.batch import Batch
from longctx.config import DataConfig, micro_batch
from longctx.data.packing import Sequence, cut_attention, pack
from longctx.data.recall import Probe, copies_probe, copies_sequence, recall_probe, recall_sequence
from longctx.data.tokens import TokenSplit
from longctx.data.windows import EqualCuts, PackedDocuments, Windows
from longctx.errors import DataError


def collate(sequences: list[Sequence]) -> Batch:
    """Sequences of one length as a batch."""
    return Batch(*(torch.from_numpy(np.stack(field)) for field in zip(*sequences, strict=True)))


class Source(Protocol):
    """An endless stream of sequences that can be read at any place: number 0, 1, 2, ...

    Attention is cut at every multiple of `span` tokens; None: not at all.
    """

    def sequence(self, number: int, span: int | None = None) -> Sequence: ...


class HeldOut(Protocol):
    """The same of sequences to validate on, whose attention is never cut."""

    def sequence(self, number: int) -> Sequence: ...


class Probes(Protocol):
    """The same of sequences that ask what a model recalls."""

    def probe(self, number: int) -> Probe: ...


def shuffled(number: int, size: int, seed: int, epoch: int) -> int:
    """Where `number` lands in a shuffle of 0..size-1: a Feistel network, walked until it stays in range.

    Nothing is stored, so corpora of any size cost nothing. (Black and Rogaway 2002, Ciphers with Arbitrary Domains)
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = number >> half_bits, number & mask
        for round_number in range(4):
            word = f"{seed},{epoch},{round_number},{right}".encode()
            left, right = right, left ^ (int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "big") & mask)
        number = left << half_bits | right
        if number < size:
            return number


def is_packed(split: TokenSplit, data: DataConfig) -> bool:
    """Whether whole documents are packed into sequences, rather than text cut."""
    return split.is_partly_trained and data.separate_documents


class TokenWindows:
    """A split cut into sequences, each with a token more: the target of its last one. See `windows.py`."""

    def __init__(self, split: TokenSplit, data: DataConfig, where: str) -> None:
        """Raises `DataError` if a text is too short for one window; `where` names it."""
        length, self.separate_documents = data.sequence_length, data.separate_documents
        if len(split) <= length and not is_packed(split, data):
            shorter = f" or set data.sequence_length={len(split) - 1} or less" if len(split) > 1 else ""
            raise DataError(f"{where}: {len(split)} tokens, a sequence needs {length + 1}; add text{shorter}")
        self.windows: Windows = (PackedDocuments if is_packed(split, data) else EqualCuts)(split, length)
        if not len(self.windows):
            raise DataError(f"{where}: none of its tokens is trained on; prepare it again")

    def window(self, number: int) -> Sequence:
        return pack(*self.windows.read(number), self.separate_documents)


class ShuffledTokens(TokenWindows):
    """Training order: each window once an epoch, shuffled anew each epoch."""

    def __init__(self, split: TokenSplit, data: DataConfig, seed: int, where: str) -> None:
        super().__init__(split, data, where)
        self.seed, self.size = seed, len(self.windows)

    def sequence(self, number: int, span: int | None = None) -> Sequence:
        epoch, number = divmod(number, self.size)
        return cut_attention(self.window(shuffled(number, self.size, self.seed, epoch)), span)


class SpacedTokens(TokenWindows):
    """Validation order: windows spread evenly over the split, the same ones each time.

    `repeats`: where there are fewer than `sequences`, they come more than once.
    """

    def __init__(self, split: TokenSplit, data: DataConfig, sequences: int, where: str, repeats: bool) -> None:
        super().__init__(split, data, where)
        self.size = sequences if repeats else min(sequences, len(self.windows))

    def sequence(self, number: int) -> Sequence:
        return self.window(number % self.size * len(self.windows) // self.size)


class RecallStream:
    """Endless synthetic recall; see `recall.py`. `size`: how many sequences validation takes of it."""

    def __init__(self, data: DataConfig, seed: int, size: int = 0) -> None:
        self.data, self.seed, self.size = data, seed, size

    def sequence(self, number: int, span: int | None = None) -> Sequence:
        recall = self.data.recall
        whole = recall_sequence(number, self.data.sequence_length, recall.keys, recall.values, self.seed)
        return cut_attention(whole, span)

    def probe(self, number: int) -> Probe:
        return recall_probe(self.sequence(number))


class Copies:
    """Endless random ids of which some come back, to train on or to ask a model of text; see `recall.py`."""

    def __init__(self, data: DataConfig, vocab_size: int, seed: int) -> None:
        self.length, self.vocab_size, self.seed = data.sequence_length, vocab_size, seed

    def sequence(self, number: int, span: int | None = None) -> Sequence:
        return copies_sequence(number, self.length, self.vocab_size, self.seed, span)

    def probe(self, number: int) -> Probe:
        return copies_probe(number, self.length, self.vocab_size, self.seed)


class Loader:
    """Hands data rank `rank` of `ranks` its share of each step's sequences."""

    def __init__(self, source: Source, data: DataConfig, rank: int, ranks: int) -> None:
        self.source, self.rank, self.ranks = source, rank, ranks
        self.micro_batch = micro_batch(data, ranks)
        self.accumulation = data.sequences_per_step // (ranks * self.micro_batch)

    def step(self, consumed: int, span: int | None = None) -> list[Batch]:
        """This rank's micro-batches of the step that begins when `consumed` sequences are done.

        Attention is cut at every multiple of `span` tokens; None: not at all.
        """
        firsts = (consumed + (part * self.ranks + self.rank) * self.micro_batch for part in range(self.accumulation))
        return [collate([self.source.sequence(first + i, span) for i in range(self.micro_batch)]) for first in firsts]
