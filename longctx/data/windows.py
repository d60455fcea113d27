"""Where a stream of tokens is cut into sequences: each target is that of one sequence, and none is lost.

A cut (begin, end) has the targets begin + 1 to end: each is predicted from the token before it. The tokens of its
sequence begin at `begin`, or earlier where the stream ends before the sequence does.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Cuts(Protocol):
    """Cuts of a stream by number, 0, 1, 2, ..."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[int, int]: ...


class EqualCuts:
    """Of text: as many targets in each, fewer in the last one."""

    def __init__(self, tokens: int, length: int) -> None:
        self.targets, self.length = tokens - 1, length

    def __len__(self) -> int:
        return (self.targets + self.length - 1) // self.length

    def __getitem__(self, number: int) -> tuple[int, int]:
        begin = number * self.length
        return begin, min(begin + self.length, self.targets)


class WholeDocuments:
    """Of conversations: as many whole documents in each as fit, so that no answer is without its question.

    A document longer than a sequence fills several; what follows it begins in the last of them.
    """

    def __init__(self, document_ends: np.ndarray, length: int) -> None:
        """document_ends (documents,), ascending: the index after the last token of each."""
        cuts, begin, last = [], 0, int(document_ends[-1]) - 1
        while begin < last:
            reach = begin + length
            fitting = int(np.searchsorted(document_ends, reach + 1, "right"))
            border = int(document_ends[fitting - 1]) if fitting else 0
            end, following = (border - 1, border) if border > begin else (reach, reach)
            if end > begin:  # a document of one token has no target
                cuts.append((begin, end))
            begin = following
        self.cuts = np.array(cuts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, number: int) -> tuple[int, int]:
        begin, end = self.cuts[number].tolist()
        return begin, end
