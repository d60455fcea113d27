"""How a stream of tokens becomes sequences: each target is that of one sequence, and none is lost.

Both ways are read as `read(number)`, for the sequences 0, 1, 2, ...: ids (length + 1,) int64, the indices in them where
another document begins, and which are trained on (bool), as `TokenSplit.read` gives them. A target is predicted from
the token before it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Protocol

import numpy as np

from longctx.data.tokens import TokenSplit

PACKED_TOGETHER = 4096  # pieces of documents: among so many a start finds the best place for each within milliseconds


class Windows(Protocol):
    """Sequences by number."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


class EqualCuts:
    """Of text: as few sequences as can be, with equally many targets, to one: a short one would count as much.

    Where the targets do not fill a sequence, it begins or ends with a token that is another one's target.
    """

    def __init__(self, split: TokenSplit, length: int) -> None:
        self.split, self.length, self.targets = split, length, len(split) - 1
        self.number = (self.targets + length - 1) // length

    def __len__(self) -> int:
        return self.number

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        begin, end = number * self.targets // self.number, (number + 1) * self.targets // self.number
        first = min(begin, self.targets - self.length)
        ids, starts, is_trained = self.split.read(first, self.length + 1)
        is_trained[: begin + 1 - first] = is_trained[end + 1 - first :] = False
        return ids, starts, is_trained


class PackedDocuments:
    """Of conversations: as many whole documents in each sequence as fit, so that no answer is without its question.

    Each has its place by best-fit decreasing, as TRL packs too: the longest first, into the fullest sequence that it
    fits. A document longer than a sequence is in several pieces; pieces of which nothing is trained on are left out.
    The rest of a sequence is one more document, of the last token over and over, on which nothing is trained.
    """

    def __init__(self, split: TokenSplit, length: int) -> None:
        self.split, self.length = split, length
        pieces = _pieces(split, length)
        sizes = pieces[:, 1] - pieces[:, 0] + 1
        sequence = np.empty(len(pieces), dtype=np.int64)
        number = 0
        for at in range(0, len(pieces), PACKED_TOGETHER):
            some = slice(at, at + PACKED_TOGETHER)
            sequence[some] = number + _best_fit(sizes[some].tolist(), length + 1)
            number = int(sequence[some].max()) + 1
        self.pieces = pieces[np.argsort(sequence, kind="stable")]
        self.first = np.concatenate(([0], np.bincount(sequence, minlength=number).cumsum()))  # piece of each sequence

    def __len__(self) -> int:
        return len(self.first) - 1

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, starts, is_trained = np.empty(self.length + 1, np.int64), [], np.zeros(self.length + 1, dtype=bool)
        filled = 0
        pieces = self.pieces[self.first[number] : self.first[number + 1]].tolist()
        for piece, is_piece_trained in self.split.read_pieces(pieces):
            starts.append(filled)
            of_piece = slice(filled, filled + len(piece))
            ids[of_piece], is_trained[of_piece] = piece, is_piece_trained
            filled = of_piece.stop
        if filled <= self.length:
            starts.append(filled)
            ids[filled:] = ids[filled - 1]
        return ids, np.array(starts[1:], dtype=np.int64), is_trained


def _pieces(split: TokenSplit, length: int) -> np.ndarray:
    """Of all documents, in pieces of at most `length` targets, the first token and the last target, (pieces, 2) int64.

    Without those in which no target is trained on. The first token of a document is no target.
    """
    found = [np.empty((0, 2), np.int64)]
    for shard, ends in enumerate(split.document_ends):
        targets = np.diff(ends, prepend=0) - 1
        starts = ends - 1 - targets
        of_each = (targets + length - 1) // length
        begin = np.repeat(starts, of_each)
        begin += length * (np.arange(len(begin)) - np.repeat(of_each.cumsum() - of_each, of_each))
        last = np.minimum(begin + length, np.repeat(starts + targets, of_each))
        if len(begin):
            is_trained = split.trained_of_shard(shard)
            is_trained[starts] = False
            wanted = np.logical_or.reduceat(is_trained, begin + 1)
            found.append(np.stack((begin, last), 1)[wanted] + split.first[shard])
    return np.concatenate(found)


def _best_fit(sizes: list[int], room: int) -> np.ndarray:
    """The sequence, 0, 1, 2, ..., that each piece goes to, int64; each has room for so many tokens."""
    sequence = np.empty(len(sizes), dtype=np.int64)
    left: list[tuple[int, int]] = []  # of each sequence the room that is left, and its number; ascending
    opened = 0
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        at = bisect_left(left, (sizes[piece], 0))
        if at == len(left):
            left.append((room, opened))  # more than is left in any other
            opened += 1
        room_left, sequence[piece] = left.pop(at)
        insort(left, (room_left - sizes[piece], int(sequence[piece])))
    return sequence
